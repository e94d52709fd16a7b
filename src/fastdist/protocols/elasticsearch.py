"""Elasticsearch's bulk and document APIs: what Filebeat, Logstash, Fluent Bit, Vector and the official clients send.

Nothing is searched here, and nothing has to be set up: what clients ask for before they send is said to be there.
"""

from __future__ import annotations

import binascii
import re
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote

import orjson
from msgspec import Struct

from fastdist._core import json_fault
from fastdist.errors import printable
from fastdist.exchange import JSON, Request, Response
from fastdist.protocols.base import BUSY, STATUSES, Protocol, Reason, Refused, Route, refusal_headers
from fastdist.protocols.encodings import decode
from fastdist.protocols.packets import Packets, encode
from fastdist.protocols.records import MAX_DEPTH, Common, decode_value, text_of, whole_lines

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from fastdist.protocols.base import Limits, Respond, Work

VERSION = "8.19.0"  # of Elasticsearch, that clients are told: Filebeat refuses one that is lower than its own
PRODUCT = b"X-Elastic-Product: Elasticsearch\r\n"  # on every response, or official clients refuse it
TYPES = {
    Reason.UNAUTHORIZED: "security_exception",
    Reason.TOO_LARGE: "content_too_long_exception",
    Reason.FAULT: "exception",
    Reason.DEAD_LETTER: "exception",
    Reason.TIMEOUT: "timeout_exception",
}
EMITTER = "elasticsearch"  # of records that say neither host nor index
ACTIONS = ("index", "create", "update", "delete")
# What follows an item's id: status last, as Elasticsearch has it.
_SHARDS = b'"_shards":{"total":1,"successful":1,"failed":0}'
_REST = b',"_version":1,"result":"%b",' + _SHARDS + b',"_seq_no":0,"_primary_term":1,"status":%d}'
CREATED, UPDATED = _REST % (b"created", 201), _REST % (b"updated", 200)
MAX_SEEN = 64  # action lines that are remembered
PIECE = 16384  # bytes that are cut into lines at once
MAX_INDEX = 255  # characters of an index's name: Elasticsearch takes 255 bytes
ITEM = 64  # bytes that an item of a response takes besides its own
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
        bulk, exists, done = {"POST": _take_bulk, "PUT": _take_bulk}, _constant({}), _constant({"acknowledged": True})
        document = {"PUT": _take_document, "POST": _take_document}
        self.routes = [
            Route("/_bulk", bulk),
            Route("/{index}/_bulk", bulk),
            Route("/{index}/_doc", {"POST": _take_document}),
            Route("/{index}/_doc/{id}", document),
            Route("/{index}/_create/{id}", document),
            Route("/", reply={"GET": _constant(ROOT)}, for_json=True),
            Route("/_license", reply={"GET": _constant(LICENSE)}),
            Route("/_cluster/health", reply={"GET": _constant(HEALTH)}),
            Route("/_nodes/http", reply={"GET": _nodes}),
            Route("/_xpack", reply={"GET": _constant(XPACK)}),
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

    def refuse(self, _request: Request, refused: Refused) -> Response:
        """Return an error as Elasticsearch has it; where another try makes sense 429, after which clients wait."""
        status = 429 if refused.reason in BUSY else STATUSES[refused.reason]
        kind = "es_rejected_execution_exception" if refused.reason in BUSY else TYPES.get(refused.reason)
        cause = {"type": kind or "illegal_argument_exception", "reason": printable(refused.detail)}
        headers = JSON + PRODUCT + refusal_headers(refused, b"Basic")
        return Response(status, orjson.dumps({"error": {"root_cause": [cause], **cause}, "status": status}), headers)


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
XPACK = {"features": {"ilm": {"available": False, "enabled": False}}}  # else Filebeat 7 asks for more than that
REFRESHED = {"_shards": SHARDS}


def _constant(document: object) -> Respond:
    reply = Response(200, orjson.dumps(document), JSON + PRODUCT)
    return lambda _request, _obstacle: reply


def _nodes(request: Request, _obstacle: str) -> Response:
    """Return the one node there is, where the client has found it: those that look for nodes use no others then."""
    address = request.headers.get("host", "")
    if not re.search(r":\d+$", address):  # it is the default port, and clients would take another for it
        address += ":443" if request.headers.get("x-forwarded-proto", "").lower() == "https" else ":80"
    node = {"name": "fastdist", "version": VERSION, "roles": ["data", "ingest"], "http": {"publish_address": address}}
    document = {"_nodes": SHARDS, "cluster_name": "fastdist", "nodes": {"fastdist": node}}
    return Response(200, orjson.dumps(document), JSON + PRODUCT)


def _content(request: Request, limits: Limits) -> Generator[None, None, bytes]:
    kind = request.media_type
    if kind and "json" not in kind:
        raise Refused(
            Reason.UNSUPPORTED, f"Content-Type {kind} is not taken; use application/json or application/x-ndjson"
        )
    return (yield from decode(request, limits.max_body))


# ---------------------------------------------------------------------------------------------------------------- bulk


class Action(Struct, frozen=True):
    """An action: its name, index and id (None if not given), the beginning of its item, metadata of its record."""

    name: str
    index: str
    id: str | None
    item: bytes
    metadata: bytes


def _take_bulk(request: Request, limits: Limits) -> Work:
    body = yield from _content(request, limits)
    path = request.path.split("/")
    bulk = _Bulk(request, limits, _index(unquote(path[1])) if len(path) > 2 else "")  # noqa: PLR2004
    bulk.packets.decoded = len(body)
    for part in whole_lines(body, PIECE):
        for line in part.removesuffix(b"\n").split(b"\n"):
            bulk.line(line)
        if bulk.packets.slices.over():
            yield bulk.packets.kept
    return (yield from bulk.packets.finish(bulk.reply(), bulk.refused))


class _Bulk:
    """A bulk request that is read line by line, and its response as it grows."""

    def __init__(self, request: Request, limits: Limits, index: str) -> None:
        self.packets = Packets(limits, {"protocol": "elasticsearch"})
        self.refused = 0
        self._index, self._request = index, request
        self._common = Common(request.received_ns, "")
        self._mapper = self._common.mapper()
        self._action: Action | None = None  # whose source comes next
        self._items: list[bytes] = []
        self._seen: dict[bytes, Action] = {}  # action lines without an id: most requests repeat one

    def line(self, line: bytes) -> None:
        """Take the next line."""
        if self._action is None:
            if line in (b"", b"\r"):
                return
            self._action = self._seen.get(line) or self._read(line)
            if self._action.name == "delete":
                self._refuse(self._action, "illegal_argument_exception", "records are forwarded: none can be deleted")
                self._action = None
            return
        action, self._action = self._action, None
        mapped = self._mapper.one(line, action.metadata, MAX_DEPTH) if action.name != "update" else None
        if mapped is not None:
            self._stored(action)
            self.packets.add_chunk(mapped[0] or action.index or EMITTER, mapped[1], 1)
            return
        try:
            source = _object(line)
            if action.name == "update":
                source = next(inner for name in ("doc", "upsert") if type(inner := source.get(name)) is dict)
        except (ValueError, StopIteration):
            detail = (
                "an update has neither doc nor upsert" if action.name == "update" else "the source is no JSON object"
            )
            self._refuse(action, "document_parsing_exception", detail)
            return
        self._stored(action)
        self.packets.add(*_message(source, action.index, action.id, self._common), len(line))

    def _read(self, line: bytes) -> Action:
        """Read an action line: an object with an action, beside which and in which there may be anything."""
        number = len(self._items)
        try:
            action = _object(line)
            name, about = next((name, about) for name, about in action.items() if name in ACTIONS)
            given, index = about.get("_id"), about.get("_index")
        except (ValueError, StopIteration, AttributeError):
            detail = f"Malformed action/metadata line [{number + 1}], expected one of {', '.join(ACTIONS)}"
            raise Refused(Reason.MALFORMED, detail, record=number) from None
        index = _index(text_of(index), number) if index is not None else self._index
        item = b'{"%b":{"_index":%b,"_id":' % (name.encode(), encode(index))
        identity = None if given is None else text_of(given)
        read = Action(name, index, identity, item, encode(_about(index, identity))[1:-1])
        if given is None and len(self._seen) < MAX_SEEN:
            self._seen[line] = read
        return read

    def _identify(self, action: Action) -> bytes:
        """Return the id of a record, as JSON: a given one, or one that is made up."""
        return b'"%x-%x"' % (self._request.received_ns, len(self._items)) if action.id is None else encode(action.id)

    def _answer(self, action: Action, rest: bytes) -> None:
        """Add the item of an action to the response, which is kept as records are."""
        item = action.item + self._identify(action) + rest
        self.packets.reserve(len(item) + ITEM)
        self._items.append(item)

    def _stored(self, action: Action) -> None:
        self._answer(action, (UPDATED if action.name == "update" else CREATED) + b"}")

    def _refuse(self, action: Action, kind: str, detail: str) -> None:
        error = encode({"status": 400, "error": {"type": kind, "reason": detail}})
        self._answer(action, b"," + error[1:] + b"}")
        self.refused += 1

    def reply(self) -> Response:
        """Return the response. Raises Refused if the request ends too early."""
        if self._action is not None:
            detail = f"action line [{len(self._items) + 1}] has no source behind it"
            raise Refused(Reason.MALFORMED, detail, record=len(self._items))
        if not self._items:
            raise Refused(Reason.MALFORMED, "Validation Failed: 1: no requests added;")
        errors = b"true" if self.refused else b"false"
        body = b'{"took":0,"errors":%b,"items":[%b]}' % (errors, b",".join(self._items))
        return Response(200, body, JSON + PRODUCT)


def _index(name: str, number: int = 0) -> str:
    """Return the name of an index. Raises Refused if it is too long: it is in every item of a response."""
    if len(name) > MAX_INDEX:
        detail = f"index name is too long, ({len(name)} > {MAX_INDEX})"
        raise Refused(Reason.MALFORMED, detail, record=number)
    return name


def _object(line: bytes) -> dict[str, Any]:
    """Return the object that a line is; ValueError if it is anything else."""
    if json_fault(line, MAX_DEPTH) is not None:
        raise ValueError
    value = decode_value(line)
    if type(value) is not dict:
        raise ValueError
    return value


def _message(source: dict[str, Any], index: str, identity: str | None, common: Common) -> tuple[str, dict[str, Any]]:
    """Return the emitter and the message of a document; the former is the index if it does not say."""
    emitter, message = common.message(source)
    message.setdefault("metadata", source).update(_about(index, identity))
    return emitter or index or EMITTER, message


def _about(index: str, identity: str | None) -> dict[str, str]:
    """Return what is known of a document besides its source."""
    return {name: value for name, value in (("_index", index), ("_id", identity)) if value}


# ------------------------------------------------------------------------------------------------------- one document


def _take_document(request: Request, limits: Limits) -> Work:
    body = yield from _content(request, limits)
    index, _, *given = (unquote(part) for part in request.path.split("/")[1:])
    index = _index(index)
    try:
        source = _object(body)
    except ValueError:
        raise Refused(Reason.MALFORMED, "the document is no JSON object", record=0) from None
    packets = Packets(limits, {"protocol": "elasticsearch"})
    packets.add(*_message(source, index, given[0] if given else None, Common(request.received_ns, "")), len(body))
    identity = encode(given[0]) if given else b'"%x-0"' % request.received_ns
    reply = Response(201, b'{"_index":%b,"_id":%b%b' % (encode(index), identity, CREATED), JSON + PRODUCT)
    return (yield from packets.finish(reply))
