"""Elasticsearch's bulk and document APIs: what Filebeat, Logstash, Fluent Bit, Vector and the official clients send.

Nothing is searched here, and nothing has to be set up: what clients ask for before they send is said to be there.
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING, ClassVar

import orjson

from fastdist.errors import printable
from fastdist.protocols.base import (
    BUSY,
    JSON,
    STATUSES,
    Protocol,
    Reason,
    Refused,
    Reply,
    Request,
    Route,
    challenge,
    retry_after,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdist.protocols.base import Answer, Limits, Work

VERSION = "8.19.0"  # of Elasticsearch, that clients are told: Filebeat refuses one that is lower than its own
PRODUCT = b"X-Elastic-Product: Elasticsearch\r\n"  # on every response, or official clients refuse it
TYPES = {
    Reason.UNAUTHORIZED: "security_exception",
    Reason.TOO_LARGE: "content_too_long_exception",
    Reason.FAULT: "exception",
    Reason.DEAD_LETTER: "exception",
    Reason.TIMEOUT: "timeout_exception",
}
SETUP = (
    "/_ilm/policy/{name}",
    "/_index_template/{name}",
    "/_template/{name}",
    "/_component_template/{name}",
    "/_ingest/pipeline/{name}",
    "/_data_stream/{name}",
)


class Elasticsearch(Protocol):
    """Bulk, documents, and what clients ask besides."""

    name: ClassVar[str] = "elasticsearch"
    schemes: ClassVar[tuple[str, ...]] = ("apikey",)

    def __init__(self) -> None:
        bulk, exists, done = {"POST": _take, "PUT": _take}, _constant({}), _constant({"acknowledged": True})
        self.routes = [
            Route("/_bulk", bulk),
            Route("/{index}/_bulk", bulk),
            Route("/{index}/_doc", {"POST": _take}),
            Route("/{index}/_create/{id}", {"PUT": _take, "POST": _take}),
            Route("/", reply={"GET": _constant(ROOT)}, for_json=True),
            Route("/_license", reply={"GET": _constant(LICENSE)}),
            Route("/_cluster/health", reply={"GET": _constant(HEALTH)}),
            Route("/_nodes/http", reply={"GET": _constant(NODES)}),
            Route("/{index}/_refresh", reply={"POST": _constant(REFRESHED), "GET": _constant(REFRESHED)}),
            *(Route(path, reply={"GET": exists, "PUT": done}) for path in SETUP),
        ]

    def tokens(self, headers: Mapping[str, str]) -> list[str]:
        """As ``Protocol.tokens``; an API key is the token, or base64 of ``id:token``."""
        tokens = super().tokens(headers)
        if not headers.get("authorization", "").lower().startswith("apikey "):
            return tokens
        try:
            _, colon, secret = binascii.a2b_base64(tokens[0]).decode().partition(":")
        except ValueError:
            return tokens
        return [*tokens, secret] if colon else tokens

    def refuse(self, _request: Request, refused: Refused) -> Reply:
        """Return an error as Elasticsearch has it; where another try makes sense 429, after which clients wait."""
        status = 429 if refused.reason in BUSY else STATUSES[refused.reason]
        kind = "es_rejected_execution_exception" if refused.reason in BUSY else TYPES.get(refused.reason)
        cause = {"type": kind or "illegal_argument_exception", "reason": printable(refused.detail)}
        headers = JSON + PRODUCT + refused.headers + retry_after(refused) + challenge(refused, b"Basic")
        return Reply(status, orjson.dumps({"error": {"root_cause": [cause], **cause}, "status": status}), headers)


SHARDS = {"total": 1, "successful": 1, "failed": 0}
ROOT = {
    "name": "fastdist",
    "cluster_name": "fastdist",
    "cluster_uuid": "fastdist00000000000000",
    "version": {
        "number": VERSION,
        "build_flavor": "default",
        "build_type": "tar",
        "build_hash": "0000000000000000000000000000000000000000",
        "build_date": "2025-01-01T00:00:00.000000000Z",
        "build_snapshot": False,
        "lucene_version": "9.12.0",
        "minimum_wire_compatibility_version": "7.17.0",
        "minimum_index_compatibility_version": "7.0.0",
    },
    "tagline": "You Know, for Search",
}
LICENSE = {
    "license": {"status": "active", "uid": "fastdist", "type": "basic", "mode": "basic", "issued_to": "fastdist"}
}
HEALTH = {
    "cluster_name": "fastdist",
    "status": "green",
    "timed_out": False,
    "number_of_nodes": 1,
    "number_of_data_nodes": 1,
    "active_primary_shards": 1,
    "active_shards": 1,
    "relocating_shards": 0,
    "initializing_shards": 0,
    "unassigned_shards": 0,
    "delayed_unassigned_shards": 0,
    "number_of_pending_tasks": 0,
    "number_of_in_flight_fetch": 0,
    "task_max_waiting_in_queue_millis": 0,
    "active_shards_percent_as_number": 100.0,
}
NODES = {"_nodes": SHARDS, "cluster_name": "fastdist", "nodes": {}}
REFRESHED = {"_shards": SHARDS}


def _constant(document: object) -> Answer:
    reply = Reply(200, orjson.dumps(document), JSON + PRODUCT)
    return lambda _request, _obstacle: reply


def _take(_request: Request, _limits: Limits) -> Work:
    yield
    raise Refused(Reason.UNSUPPORTED, "not implemented")
