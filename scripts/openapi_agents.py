"""The paths of log agents in openapi.json: what is sent to each, in short. Their formats are their protocols'.

Paths and methods are those of ``fastdist.protocols.table``, without HEAD and OPTIONS.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from fastdist.protocols.table import PROTOCOLS

if TYPE_CHECKING:
    from openapi_parts import Json

    from fastdist.protocols.base import Protocol, Route

TAG = "agents"
NOT_TAKEN = ("/v1/traces", "/v1/metrics")  # have a response of their own, which is 404


class About(NamedTuple):
    """What there is to say of a protocol: who speaks it, media types of its requests, the status of its success."""

    who: str
    what: str
    types: tuple[str, ...]
    success: str = "200"


ABOUT = {
    "json": About(
        "Fluent Bit, Vector, Fluentd, Logstash, syslog-ng, rsyslog",
        "JSON values one after the other, with or without white space between them, arrays of them, or lines of text",
        ("application/json", "application/x-ndjson", "text/plain"),
    ),
    "otlp": About(
        "OpenTelemetry's SDKs and Collector",
        "an ExportLogsServiceRequest (OTLP/HTTP)",
        ("application/x-protobuf", "application/json"),
    ),
    "loki": About(
        "Grafana Alloy, promtail, loggers for Loki",
        "streams of Loki's push API, as JSON or as protobuf packed with snappy",
        ("application/json", "application/x-protobuf"),
        "204",
    ),
    "splunk": About(
        "clients of Splunk's HTTP Event Collector",
        "events (JSON objects one after the other), or below /raw lines of text",
        ("application/json", "text/plain"),
    ),
    "elasticsearch": About(
        "Filebeat and Elasticsearch's clients",
        "what Elasticsearch's bulk and document APIs take",
        ("application/x-ndjson", "application/json"),
    ),
}
PARAMETERS = {
    "source": "Where the records come from, if they do not say so.",
    "index": "Becomes the emitter, if the records name none.",
    "id": "Is kept in the record's metadata.",
    "name": "Anything.",
}


def paths() -> Json:
    """Return the paths of all protocols."""
    return {
        route.path: _item(protocol, route)
        for protocol in PROTOCOLS
        for route in protocol.routes
        if not route.for_json and route.path not in NOT_TAKEN
    }


def _item(protocol: Protocol, route: Route) -> Json:
    return {method.lower(): _operation(protocol, route, method) for method in (*route.take, *route.reply)}


def _operation(protocol: Protocol, route: Route, method: str) -> Json:
    about = ABOUT[protocol.name]
    words = re.split(r"[\W_]+", route.path.replace("{", "of_") + ("slash" if route.path.endswith("/") else ""))
    found: Json = {"operationId": method.lower() + "".join(map(str.capitalize, words)), "tags": [TAG]}
    names = re.findall(r"\{(\w+)\}", route.path)
    if names:
        found["parameters"] = [_parameter(name) for name in names]
    if method not in route.take:
        return found | {
            "summary": "What clients ask before they send",
            "description": f"For {about.who}.",
            "responses": {"default": {"description": "In the shape of the protocol."}},
        }
    return found | {
        "summary": f"Records in the format of {protocol.name}",
        "description": f"From {about.who}. Taken are {about.what}; also with a Content-Encoding of gzip, deflate, zstd "
        "or snappy. All records of a request are stored, or none is; each becomes a message of a packet. "
        f"`server.protocols` without `{protocol.name}` switches it off.",
        "security": [{}, {"token": []}],
        "requestBody": {"required": True, "content": {kind: {} for kind in about.types}},
        "responses": {
            about.success: {"description": "All records are stored as `queue.durability` says."},
            "default": {"description": "What is wrong, in the shape of the protocol."},
        },
    }


def _parameter(name: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": PARAMETERS[name],
        "schema": {"type": "string"},
        "example": "app",
    }
