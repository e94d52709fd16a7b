"""The paths of log agents in openapi.json. Their formats stand in ``openapi_formats``.

Paths and methods are those of ``fastdist.protocols.table``, without HEAD and OPTIONS; what is answered is what the
protocols themselves make of the examples, and of reasons to refuse them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from openapi_formats import FORMATS, OBJECT, SCHEMAS, TEXT
from openapi_parts import IN_ALL, content, fixed, header, ref, response

from fastdist.exchange import Request
from fastdist.protocols.base import Limits, Reason, Refused, finish
from fastdist.protocols.encodings import ACCEPTED
from fastdist.protocols.table import NAMES, PROTOCOLS, find

if TYPE_CHECKING:
    from collections.abc import Iterable

    from openapi_formats import Format
    from openapi_parts import Json

    from fastdist.exchange import Response
    from fastdist.protocols.base import Protocol, Route

TAG = "agents"
NOT_TAKEN = ("/v1/traces", "/v1/metrics")  # have a response of their own, which is 404
LIMITS = Limits(10 << 20, 10 << 20, 64 << 20)
RECEIVED_NS = 1_767_323_045_700_000_000
JSON, PROBLEM, PROTOBUF = "application/json", "application/problem+json", "application/x-protobuf"


class About(NamedTuple):
    """What there is to say of a protocol: its clients, the schema of its errors, other schemes than Bearer and Basic.

    ``parameters``: headers and queries that are looked at.
    """

    who: str
    error: Json
    media_type: str = JSON
    schemes: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


ABOUT = {
    "json": About(
        "Fluent Bit, Vector, Fluentd, Logstash, syslog-ng, rsyslog",
        ref("schemas", "Problem"),
        PROBLEM,
        parameters=("EmitterId",),
    ),
    "otlp": About("OpenTelemetry's SDKs and Collector", ref("schemas", "OtlpStatus")),
    "loki": About("Grafana Alloy, promtail, loggers for Loki", TEXT, "text/plain", parameters=("Tenant",)),
    "splunk": About(
        "clients of Splunk's HTTP Event Collector",
        ref("schemas", "SplunkReply"),
        schemes=("splunkToken",),
        parameters=("Channel",),
    ),
    "elasticsearch": About(
        "Filebeat and Elasticsearch's clients", ref("schemas", "ElasticsearchError"), schemes=("elasticsearchKey",)
    ),
}
FORMAT_OF = {"json": "Records", "otlp": "OtlpLogs", "loki": "LokiPush", "splunk": "SplunkEvents"}  # but for others
QUERY = ("Host", "Source", "Sourcetype", "Index")  # of raw lines


def format_of(protocol: Protocol, route: Route) -> str:
    """Return the name of the format that a path takes."""
    if protocol.name == "elasticsearch":
        return "ElasticsearchBulk" if route.path.endswith("_bulk") else "ElasticsearchDocument"
    return "SplunkLines" if "/raw" in route.path else FORMAT_OF[protocol.name]


# ---- parameters, headers, schemes


def _parameter(place: str, name: str, description: str, example: str, **schema: object) -> Json:
    always = {"required": True} if place == "path" else {}
    return {
        "name": name,
        "in": place,
        **always,
        "description": description,
        "schema": TEXT | schema,
        "example": example,
    }


PARAMETERS = {
    "RecordsSource": _parameter("path", "source", "Where the records come from, if they do not say so.", "shop"),
    "IndexName": _parameter("path", "index", "Becomes the emitter, if a record names none.", "logs-app"),
    "DocumentId": _parameter("path", "id", "Is kept in the record's metadata.", "7"),
    "SetupName": _parameter("path", "name", "Anything.", "filebeat"),
    "EmitterId": _parameter("header", "X-Emitter-Id", "The emitter of all records, whatever they say.", "web-42"),
    "Tenant": _parameter("header", "X-Scope-OrgID", "Loki's tenant: kept in the packet's metadata.", "shop"),
    "Channel": _parameter(
        "header",
        "X-Splunk-Request-Channel",
        "Kept in the packet's metadata.",
        "0aeeac95-ac74-4aa9-b30d-6c4c0ac581ba",
    ),
    "LinesHost": _parameter("query", "host", "The emitter.", "web-42"),
    "LinesSource": _parameter("query", "source", "Where the lines come from.", "/var/log/shop.log"),
    "LinesSourcetype": _parameter(
        "query", "sourcetype", "Kept in metadata; the source, where that is not given.", "access"
    ),
    "LinesIndex": _parameter("query", "index", "Kept in metadata.", "main"),
    "PreferDelivery": _parameter(
        "header",
        "Prefer",
        "`wait=<seconds>` (RFC 7240): answer after delivery, or when the time is up; the success reads the same.",
        "wait=5",
    ),
}
IN_PATH = {"source": "RecordsSource", "index": "IndexName", "id": "DocumentId", "name": "SetupName"}
HEADERS = {
    "X-Elastic-Product": fixed("On all that is Elasticsearch's: official clients ask for it.", "Elasticsearch"),
    "ElasticProductPerhaps": fixed("Not on a problem document.", "Elasticsearch", required=False),
    "AgentChallenge": header(
        "A token is needed, in one of the forms that the protocol has.",
        'Bearer realm="fastdist"',
        pattern='^(Bearer|Basic|Splunk) realm="fastdist"$',
    ),
    "AcceptedRecords": fixed(
        "Where it was the media type: what is taken.",
        "application/json, application/x-ndjson, text/plain",
        required=False,
    ),
    "AllowedEvents": fixed("What the path takes.", "POST, OPTIONS"),
}


def _scheme(description: str, **more: str) -> Json:
    return more | {"description": description}


SECURITY = {
    "agentPassword": _scheme("One of `security.tokens` as the password; any user.", type="http", scheme="basic"),
    "splunkToken": _scheme("`Splunk <token>`.", type="apiKey", name="Authorization", **{"in": "header"}),
    "elasticsearchKey": _scheme(
        "`ApiKey <token>`, or base64 of `id:token`.", type="apiKey", name="Authorization", **{"in": "header"}
    ),
}

# ---- responses

OF_ANY = {431: "HeadTooLarge", 501: "NotImplemented", 505: "VersionNotSupported"}
OF_PROBES = (400, 408, 413, 417)  # in the protocol's own shape, to requests without records as well
PROBLEMS = {503: "TooManyConnections"}
ELSEWHERE = (400, 408, 503)  # also as problem documents
BUSY = (
    "It cannot be stored now; try again. The queue is full, `limits` are exceeded, the service is about to end, or its "
    "storage fails."
)
WRONG = {
    400: "The body is not in the format of the path; nothing of it is stored (of Splunk's events: those before the one "
    "at fault). Or the request is no HTTP: then it is a problem document, and the connection is closed.",
    401: "`security.tokens` are set, and the request has none of them.",
    403: "The token is not known.",
    408: "The request did not arrive in time. The connection is closed.",
    413: "The body, as it was sent or decoded, is larger than `server.max_body`, or there are more records than can be "
    "stored of one request.",
    415: "Not a media type that is taken here, or a Content-Encoding other than gzip, deflate, zstd and snappy.",
    417: "Expect holds something other than 100-continue.",
    429: BUSY,
    502: "To `Prefer: wait`: not all records could be delivered; some are now among the dead letters.",
    503: f"{BUSY} Or there are too many connections: then it is a problem document.",
}
REFUSALS = (
    ("token", Reason.UNAUTHORIZED, "a token is needed"),
    ("slowBody", Reason.TIMEOUT, "the request's body came too slowly"),
    ("tooLarge", Reason.TOO_LARGE, "the body is larger than the 10485760 bytes allowed here"),
    ("expectation", Reason.EXPECTATION, "the only expectation understood is 100-continue"),
    ("deadLetter", Reason.DEAD_LETTER, "not all records could be delivered; some are now among the dead letters"),
    ("full", Reason.QUEUE_FULL, "the queue is full; try again in 1 s"),
    ("rate", Reason.RATE_LIMITED, "more requests than the limit allows; try again in 1 s"),
    ("draining", Reason.DRAINING, "the service is shutting down"),
)
CODING = "Content-Encoding br is not understood; use gzip, deflate, zstd or snappy"


def _request(form: Format, media_type: str, body: bytes, **headers: str) -> Request:
    return Request("POST", form.path, {"content-type": media_type} | headers, body, "192.0.2.7", RECEIVED_NS)


def encoded(example: object) -> bytes:
    """Return an example as it is sent."""
    return example.encode() if isinstance(example, str) else json.dumps(example).encode()


def _convert(form: Format, asked: Request) -> Response:
    """Return the success that a request gets; raises Refused."""
    found = find(asked.method, asked.target, asked.headers, NAMES)
    if found is None or found.take is None:
        raise AssertionError(form.path)
    return finish(found.take(asked, LIMITS)).reply


def _shown(reply: Response) -> object:
    return json.loads(reply.body) if reply.body[:1] == b"{" else reply.body.decode()


def _refused(protocol: Protocol, form: Format) -> dict[int, dict[str, object]]:
    """Return examples of errors by their status: of bodies that are wrong, and of other reasons."""
    media_type = next(iter(form.bodies))
    usual = _request(form, media_type, b"")
    found: dict[int, dict[str, object]] = {}

    def add(label: str, asked: Request, refused: Refused) -> None:
        reply = protocol.refuse(asked, refused)
        found.setdefault(reply.status, {})[label] = _shown(reply)

    wrong = [(label, _request(form, media_type, body.encode())) for label, body in form.wrong.items()]
    if protocol.name != "splunk":  # which looks at no media type
        wrong.append(("type", _request(form, "application/msgpack", b"\x90")))
    for label, asked in wrong:
        try:
            _convert(form, asked)
        except Refused as refused:
            add(label, usual, refused)
    for label, reason, detail in REFUSALS:
        add(label, usual, Refused(reason, detail))
    if protocol.name == "splunk":
        with_token = _request(form, media_type, b"", authorization="Splunk wrong")
        add("token", with_token, Refused(Reason.UNAUTHORIZED, "this token is not known"))
    add("coding", usual, Refused(Reason.UNSUPPORTED, CODING, headers=ACCEPTED))
    return dict(sorted(found.items()))


def _responses(protocol: Protocol, name: str) -> dict[int, Json]:
    """Return what is answered to requests with records in a format."""
    form, about, elastic = FORMATS[name], ABOUT[protocol.name], protocol.name == "elasticsearch"
    replies = {
        label: _convert(form, _request(form, kind, encoded(example)))
        for kind, (_, bodies) in form.bodies.items()
        for label, example in bodies.items()
    }
    examples = {label: _shown(reply) for label, reply in replies.items()}
    body = content(JSON, form.schema, examples) if form.schema else None
    if body and PROTOBUF in form.bodies:
        body |= {PROTOBUF: {}}
    headers = IN_ALL | ({"X-Elastic-Product": "X-Elastic-Product"} if elastic else {})
    success = response("All records are stored as `queue.durability` says.", body, headers)
    found = {next(iter(replies.values())).status: success}
    for status, refused in _refused(protocol, form).items():
        found[status] = _refusal(about, status, refused, binary=PROTOBUF in form.bodies, elastic=elastic)
    return found | ({503: ref("responses", "TooManyConnections")} if elastic else {})


def _refusal(about: About, status: int, examples: dict[str, object], *, binary: bool, elastic: bool) -> Json:
    body = content(about.media_type, about.error, examples)
    if binary and about.media_type == JSON:
        body |= {PROTOBUF: {}}
    headers = dict(IN_ALL)
    if status in ELSEWHERE:
        body.setdefault(PROBLEM, {"schema": ref("schemas", "Problem")})
    if elastic:
        headers["X-Elastic-Product"] = "ElasticProductPerhaps" if status in ELSEWHERE else "X-Elastic-Product"
    if status in (429, 503):
        headers["Retry-After"] = "Retry-After"
    if status == 401:  # noqa: PLR2004
        headers["WWW-Authenticate"] = "AgentChallenge"
    if status == 415:  # noqa: PLR2004
        headers["Accept-Encoding"] = "AcceptedCodings"
        headers |= {"Accept": "AcceptedRecords"} if about.media_type == PROBLEM else {}
    return response(WRONG[status], body, headers)


def _title(name: str) -> str:
    return "".join(map(str.capitalize, re.split(r"[\W_]+", name)))


def _component(name: str, found: Json) -> Json:
    """Return a reference to a response, which is kept under that name unless there is an equal one."""
    if "$ref" in found:
        return found
    key = next((key for key, other in RESPONSES.items() if other == found), name)
    RESPONSES[key] = found
    return ref("responses", key)


RESPONSES: Json = {}
OF_FORMATS = {
    name: {status: _component(f"{name}{status}", found) for status, found in _responses(protocol, name).items()}
    for protocol in PROTOCOLS
    for name in dict.fromkeys(format_of(protocol, route) for route in protocol.routes if route.take)
}
BODIES = {
    name: {
        "required": name != "Records",  # of which there may be none
        "description": form.description,
        "content": {
            kind: {} if schema is None else content(kind, schema, examples)[kind]
            for kind, (schema, examples) in form.bodies.items()
        },
    }
    for name, form in FORMATS.items()
}


# ---- paths


def paths() -> Json:
    """Return the paths of all protocols."""
    return {
        route.path: {method.lower(): _operation(protocol, route, method) for method in (*route.take, *route.reply)}
        for protocol in PROTOCOLS
        for route in protocol.routes
        if not route.for_json and route.path not in NOT_TAKEN
    }


def _operation(protocol: Protocol, route: Route, method: str) -> Json:
    about = ABOUT[protocol.name]
    path = route.path.replace("{", "of_") + ("slash" if route.path.endswith("/") else "")
    found: Json = {"operationId": method.lower() + _title(path), "tags": [TAG]}
    in_path = [IN_PATH[name] for name in re.findall(r"\{(\w+)\}", route.path)]
    off = {404: ref("responses", "ProtocolOff")}
    if method not in route.take:
        others = off | {status: ref("responses", name) for status, name in (OF_ANY | PROBLEMS).items()}
        others |= {status: OF_FORMATS[format_of(protocol, protocol.routes[0])][status] for status in OF_PROBES}
        return (
            found
            | {"summary": "What clients ask before they send", "description": f"For {about.who}. No token is needed."}
            | _parameters(in_path)
            | {"responses": _sorted(others | _replies(route, method))}
        )
    name = format_of(protocol, route)
    others = off | {status: ref("responses", other) for status, other in OF_ANY.items()}
    query = [f"Lines{each}" for each in QUERY] if name == "SplunkLines" else []
    return (
        found
        | {
            "summary": f"Records in the format of {protocol.name}",
            "description": f"From {about.who}. The body may have a Content-Encoding of gzip, deflate, zstd or snappy. "
            "All records of a request are stored, or none is; each becomes a message of a packet. `server.protocols` "
            f"without `{protocol.name}` switches it off.",
            "security": [{}, *({each: []} for each in ("token", "agentPassword", *about.schemes))],
        }
        | _parameters([*in_path, *query, *about.parameters, "PreferDelivery"])
        | {
            "requestBody": ref("requestBodies", name),
            "responses": _sorted(others | OF_FORMATS[name]),
        }
    )


def _parameters(names: Iterable[str]) -> Json:
    found = [ref("parameters", name) for name in names]
    return {"parameters": found} if found else {}


def _sorted(responses: dict[int, Json]) -> Json:
    return {str(status): responses[status] for status in sorted(responses)}


def _replies(route: Route, method: str) -> dict[int, Json]:
    """Return what is answered to a request without records: while all is well, and while nothing can be stored."""
    found: dict[int, Json] = {}
    for obstacle in ("", "the queue is full"):
        reply = route.reply[method](Request(method, route.path, {"host": "logs.example:3000"}), obstacle)
        headers = IN_ALL | ({"X-Elastic-Product": "X-Elastic-Product"} if b"X-Elastic-Product" in reply.headers else {})
        headers |= {"Allow": "AllowedEvents"} if method == "OPTIONS" else {}
        schema = ref("schemas", "SplunkReply") if b'"code"' in reply.body else OBJECT
        body = content(JSON, schema, {"reply": _shown(reply)}) if reply.body else None
        if reply.status in ELSEWHERE and body:
            body[PROBLEM] = {"schema": ref("schemas", "Problem")}
            headers |= {"Retry-After": "RetryAfterPerhaps"}
        told = response("As the protocol has it.", body, headers)
        found[reply.status] = _component(f"{_title(method)}{_title(route.path)}{reply.status}", told)
    return found | ({204: ref("responses", "Options")} if method == "OPTIONS" else {})


__all__ = ["BODIES", "HEADERS", "PARAMETERS", "RESPONSES", "SCHEMAS", "SECURITY", "TAG", "paths"]
