"""Write src/fastdist/http/openapi.json: ``make generated``. With ``--check``: fail unless it is what would be written.

Schemas are those of ``fastdist.http.models`` and ``responses``; the rest stands here and in ``openapi_parts``
(responses and their headers), what is for log agents in ``openapi_agents`` and ``openapi_formats``. HEAD and OPTIONS
follow from the routes, as in ``fastdist.http.api``.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import openapi_agents
from openapi_parts import HEADERS, RESPONSES, Json, content, ref

from fastdist import __version__
from fastdist.http import models
from fastdist.packet import LEVELS, LogMessage, LogPacket
from fastdist.shm.block import Step
from fastdist.shm.problems import KINDS

FILE = Path(__file__).resolve().parent.parent / "src" / "fastdist" / "http" / "openapi.json"

INFO = {
    "title": "fastdist",
    "version": __version__,
    "license": {"name": "MIT", "identifier": "MIT"},
    "summary": "Splits a stream of log packets over analyzers by weight, and loses none of them.",
    "description": """\
Emitters post packets of log messages to `/logs`; each is answered as soon as it is safe and handed to exactly one of \
the analyzers, in proportion to their weights.

Every error is a problem document (RFC 9457), but to log agents, which get it in the shape of their protocol. A \
path that does not exist is answered 404, a method that a path does not take 405 with Allow; HEAD is answered as \
GET, without the body. Broken HTTP is answered 400 and the connection closed, whatever the path; so are requests \
that are too slow (408) or too large (413, 431). A fault in the service itself is answered 500, and its log has the \
traceback. An idle connection is closed without a response.

Times are RFC 3339 in UTC, latencies milliseconds, shares fractions of 1. Figures are over all workers, whichever \
answers.""",
}
TAGS = {
    "packets": "What emitters do.",
    openapi_agents.TAG: "What log agents do, in their own protocols: `server.protocols` lists those that are served.",
    "figures": "Looking at the service, without a token.",
    "changes": "Changing it while it runs: for administrators.",
    "dashboard": "For browsers.",
    "cross-origin": "OPTIONS, and with it the preflights of CORS.",
}
SECURITY = {
    "token": "One of `security.tokens`. Without any, no token is needed.",
    "adminToken": "One of `security.admin_tokens`. Without any, changes are taken from this machine only.",
}


# ---- parameters

ID = r"[!#-+\--:<-\[\]-~]{1,64}"


def parameter(name: str, place: str, description: str, pattern: str | None = None, /, **examples: str) -> Json:
    """Return a parameter of requests: ``place`` is path or header."""
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": {"type": "string"} | ({"pattern": pattern} if pattern else {}),
        "examples": {key: {"value": value} for key, value in examples.items()},
    }


PARAMETERS = {
    "AnalyzerId": parameter(
        "id", "path", "An analyzer's id, as it is configured.", r"^(?!\.\.?$)[A-Za-z0-9._-]{1,64}$", first="A1"
    ),
    "DashboardFile": parameter("file", "path", "Its name.", r"^[a-z]+\.[a-z]+$", script="app.js"),
    "IdempotencyKey": parameter(
        "Idempotency-Key",
        "header",
        'An id for the packet, in place of a UUIDv7: 1 to 64 visible ASCII characters other than `" , ; \\`, bare or '
        "in double quotes. It is passed on, not remembered: analyzers recognise repetitions by it.",
        f'^({ID}|"{ID}")$',
        bare="order-4711-log-1",
        quoted='"order-4711-log-1"',
    ),
    "Prefer": parameter(
        "Prefer",
        "header",
        "`wait=<seconds>` (RFC 7240): answer after delivery, 202 when the time is up first. At most a day counts, and "
        "5 s from when the emitter shuts down its side of the connection. Anything else is passed over.",
        wait="wait=5",
    ),
    "IfNoneMatch": parameter(
        "If-None-Match", "header", "ETags of what the client has.", held='"0123456789abcdef0123456789abcdef"'
    ),
}
IN_PATH = {"{id}": "AnalyzerId", "{file}": "DashboardFile"}


# ---- routes


class Route(NamedTuple):
    """A request: its ``responses`` on top of those that any request may get, by status."""

    method: str
    path: str
    name: str
    tag: str
    summary: str
    description: str
    responses: dict[int, str]
    parameters: tuple[str, ...] = ()
    security: str = ""
    body: Json | None = None


def takes(description: str, schema: str, **examples: Json) -> Json:
    """Return the body of requests."""
    return {
        "required": True,
        "description": description,
        "content": content("application/json", ref("schemas", schema), examples),
    }


OF_ANY = {
    400: "BadRequest",
    408: "RequestTimeout",
    413: "ContentTooLarge",
    417: "ExpectationFailed",
    431: "HeadTooLarge",
    501: "NotImplemented",
    503: "TooManyConnections",
    505: "VersionNotSupported",
}
OF_CHANGES = {401: "AdminUnauthorized", 403: "AdminForbidden", 503: "ChangeNotStored"}
WITHOUT_BODY = {200: "Headers", 404: "UnknownFileHeaders"}  # what HEAD gets
ROUTES = [
    Route(
        "get",
        "/",
        "getDashboard",
        "dashboard",
        "The dashboard",
        "A live view of /stats, /analyzers, /queue and /health for browsers. Its script, style and picture are below "
        "/dashboard/. To an Accept that names JSON, and to clients of Elasticsearch that name none, it is what "
        "Elasticsearch says of itself, with X-Elastic-Product, as long as `server.protocols` has `elasticsearch`.",
        {200: "Page", 304: "NotModified"},
        ("IfNoneMatch",),
    ),
    Route(
        "get",
        "/dashboard/{file}",
        "getDashboardFile",
        "dashboard",
        "A file of the dashboard",
        "Static; the same for all clients.",
        {200: "PageFile", 304: "NotModified", 404: "UnknownFile"},
        ("IfNoneMatch",),
    ),
    Route(
        "post",
        "/logs",
        "postLogs",
        "packets",
        "Hand over a packet of log messages",
        "Answered as soon as the packet is safe, or with `Prefer: wait` once it is delivered. It goes to one of the "
        "analyzers, in proportion to their weights; delivery is at least once, under the id in the response.\n\n"
        "Bodies are taken with Content-Length or chunked, also with a Content-Encoding of gzip, deflate, zstd or "
        "snappy; `Expect: 100-continue` is understood, requests may be pipelined. Limits are checked first, then the "
        "token, then the rest.\n\n"
        'With `server.validation = "none"` the body may be anything but empty, and is not read.',
        {
            200: "Delivered",
            202: "Accepted",
            400: "NoPacket",
            401: "Unauthorized",
            413: "PacketTooLarge",
            415: "UnsupportedPacket",
            429: "RateLimited",
            500: "PacketLost",
            502: "DeadLetter",
            503: "PacketNotStored",
        },
        ("IdempotencyKey", "Prefer"),
        "token",
        takes(
            "A packet.",
            "LogPacket",
            smallest={"emitterId": "web-42", "messages": [{"message": "hello"}]},
            usual={
                "emitterId": "web-42",
                "metadata": {"host": "web-42.example"},
                "messages": [
                    {
                        "timestamp": "2026-01-02T03:04:05.678Z",
                        "level": "info",
                        "message": "GET /cart 200 in 12.8 ms",
                        "source": "frontend",
                        "metadata": {"region": "eu-west-1"},
                    },
                    {"level": "warn", "message": "payment provider answered slowly"},
                ],
            },
        ),
    ),
    Route(
        "get",
        "/health",
        "getHealth",
        "figures",
        "Whether the service is well",
        "200 while it serves, also `unavailable`: a restart would not help. For liveness probes and alerts.",
        {200: "Health"},
    ),
    Route(
        "get",
        "/ready",
        "getReady",
        "figures",
        "Whether the service wants packets",
        "For load balancers and readiness probes.",
        {200: "Ready", 503: "Unready"},
    ),
    Route(
        "get",
        "/stats",
        "getStats",
        "figures",
        "Counts, rates, latencies, shares, workers",
        "Over all workers; they survive the workers.",
        {200: "Stats"},
    ),
    Route(
        "get", "/queue", "getQueue", "figures", "What waits", "Over all workers, and each one's part.", {200: "Queue"}
    ),
    Route(
        "get",
        "/analyzers",
        "getAnalyzers",
        "figures",
        "The analyzers",
        "State, weights, shares, health, last error and latencies of each.",
        {200: "Analyzers"},
    ),
    Route(
        "get",
        "/dead-letters",
        "getDeadLetters",
        "figures",
        "The dead letters that are there",
        "How many, by reason and analyzer, and the last 20 without their packets. Figures may be some seconds old.",
        {200: "LastDeadLetters"},
    ),
    Route(
        "get",
        "/metrics",
        "getMetrics",
        "figures",
        "The figures for Prometheus",
        "The names are listed in the documentation.",
        {200: "Metrics"},
    ),
    Route("get", "/openapi.json", "getOpenapi", "figures", "This description", "OpenAPI 3.1.", {200: "Description"}),
    Route(
        "patch",
        "/analyzers/{id}",
        "changeAnalyzer",
        "changes",
        "Change an analyzer's weight, or drain it",
        "An override: it holds over reloads and restarts, until it is deleted. What is not named stays as it is.",
        OF_CHANGES
        | {
            200: "Changed",
            400: "BadChange",
            404: "UnknownAnalyzer",
            415: "CompressedChange",
            422: "WrongChange",
        },
        security="adminToken",
        body=takes(
            "The changes.",
            "Change",
            weight={"weight": 0.2},
            drain={"state": "draining"},
            both={"weight": 1, "state": "online"},
        ),
    ),
    Route(
        "delete",
        "/analyzers/{id}/override",
        "clearOverride",
        "changes",
        "Take an override back",
        "What the configuration says is in force again. Also where there is no override.",
        OF_CHANGES | {200: "Changed", 404: "UnknownAnalyzer", 422: "NoneLeft"},
        security="adminToken",
    ),
    Route(
        "post",
        "/admin/reload",
        "reload",
        "changes",
        "Read the configuration again",
        "As SIGHUP does. Analyzers, weights, limits, tokens, origins and certificates change without dropping a "
        "connection or a packet. If the new configuration is invalid the old one stays.",
        OF_CHANGES | {200: "Reloaded", 422: "BadConfiguration"},
        security="adminToken",
    ),
]


def operation(route: Route) -> Json:
    """Return a route as OpenAPI has it."""
    placeholders = [name for placeholder, name in IN_PATH.items() if placeholder in route.path]
    parameters = [ref("parameters", name) for name in (*placeholders, *route.parameters)]
    found: Json = {
        "operationId": route.name,
        "tags": [route.tag],
        "summary": route.summary,
        "description": route.description,
    }
    if route.security:
        found["security"] = [{}, {route.security: []}]
    if parameters:
        found["parameters"] = parameters
    if route.body:
        found["requestBody"] = route.body
    responses = sorted((OF_ANY | route.responses).items())
    return found | {"responses": {str(status): ref("responses", name) for status, name in responses}}


def head(route: Route) -> Route:
    """Return the HEAD that comes with a GET."""
    without_body = WITHOUT_BODY | ({200: "PageHeaders"} if 304 in route.responses else {})  # noqa: PLR2004
    return route._replace(
        name=f"{route.name}Head",
        summary=f"{route.summary}: the headers",
        description="As GET, without a body.",
        responses={status: without_body.get(status, name) for status, name in route.responses.items()},
    )


def options(route: Route) -> Route:
    """Return the OPTIONS that every path has."""
    unknown = {404: route.responses[404]} if "{" in route.path else {}
    return Route(
        "options",
        route.path,
        f"{route.name}Options",
        "cross-origin",
        "What the path takes",
        "Also the preflight of CORS.",
        {204: "Options"} | unknown,
    )


# ---- the document

OF_PACKETS: dict[type[msgspec.Struct], dict[str, str]] = {
    LogPacket: {
        "": "A packet of log messages. Members that are not listed are allowed, and travel on. No listed member may "
        "come twice, no value be nested more than 128 levels deep.",
        "emitterId": "The emitter.",
        "messages": "In the emitter's order.",
        "metadata": "Anything about the packet as a whole.",
    },
    LogMessage: {
        "": "A log message. Members that are not listed are allowed, and travel on. With "
        '`server.validation = "strict"` `timestamp` and `level` are required.',
        "message": "The text.",
        "timestamp": "When it happened. With `strict`: RFC 3339.",
        "level": f"How grave it is. With `strict`: {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, in any case.",
        "source": "Where in the emitter it comes from.",
        "metadata": "Anything else.",
    },
}


def schemas() -> Json:
    """Return the schemas of all models, and of packets."""
    of_models = [
        each for base in (models.Model, models.AnalyzerInShort, models.DeadLetters) for each in base.__subclasses__()
    ]
    kinds: list[type[msgspec.Struct]] = sorted([*of_models, *OF_PACKETS], key=lambda kind: kind.__name__)
    _, found = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in kinds:
        schema, members = found[kind.__name__], found[kind.__name__]["properties"]
        del schema["title"]
        schema["description"] = inspect.cleandoc(kind.__doc__ or "")
        # A default is for readers of other versions; what may be absent is UNSET.
        fields = msgspec.structs.fields(kind)
        schema["required"] = [field.encode_name for field in fields if field.default is not msgspec.UNSET]
        for member in members.values():
            member.pop("default", None)
        for name, description in OF_PACKETS.get(kind, {}).items():
            (members[name] if name else schema)["description"] = description
    found["Health"]["properties"]["failing"]["items"]["enum"] = [step.word for step in Step]
    found["ListedProblem"]["properties"]["code"]["enum"] = list(KINDS)
    found["Change"]["minProperties"] = 1
    return {kind.__name__: found[kind.__name__] for kind in kinds}


def document() -> Json:
    """Return the description of the API."""
    paths: Json = {}
    for route in ROUTES:
        also_head = {"head": operation(head(route))} if route.method == "get" else {}
        paths[route.path] = {route.method: operation(route), **also_head, "options": operation(options(route))}
    paths |= openapi_agents.paths()
    return {
        "openapi": "3.1.0",
        "info": INFO,
        "servers": [{"url": "/", "description": "The service that this description comes from."}],
        "tags": [{"name": name, "description": description} for name, description in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas() | openapi_agents.SCHEMAS,
            "responses": RESPONSES | openapi_agents.RESPONSES,
            "parameters": PARAMETERS | openapi_agents.PARAMETERS,
            "requestBodies": openapi_agents.BODIES,
            "headers": HEADERS | openapi_agents.HEADERS,
            "securitySchemes": {
                name: {"type": "http", "scheme": "bearer", "description": description}
                for name, description in SECURITY.items()
            }
            | openapi_agents.SECURITY,
        },
    }


def written() -> str:
    """Return the file's text: references on one line each."""
    indented = json.dumps(document(), indent=2, ensure_ascii=False)
    return re.sub(r'\{\s+("\$ref": "[^"]+")\s+\}', r"{\1}", indented) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        FILE.write_text(written())
    elif FILE.read_text() != written():
        sys.exit("src/fastdist/http/openapi.json is not what its sources say; run `make generated`")
