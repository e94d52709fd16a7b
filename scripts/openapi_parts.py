"""The responses in openapi.json, with their headers and examples.

Examples are documents that the service's own code makes.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from fastdist import __version__
from fastdist.http import models
from fastdist.http.api import PREFLIGHT_SECONDS, REQUEST_HEADERS
from fastdist.http.responses import Accepted, ChangedSetting, Delivered, Ready, Reloaded, problem
from fastdist.http.static import POLICY

Json = dict[str, Any]


# ---- headers


def header(description: str, example: str | int, *, required: bool = True, **schema: Any) -> Json:
    """Return a header of responses; not ``required``: in some of them."""
    kind = "integer" if isinstance(example, int) else "string"
    always = {"required": True} if required else {}
    return {"description": description, **always, "schema": {"type": kind, **schema}, "example": example}


def fixed(description: str, value: str, *, required: bool = True) -> Json:
    """Return a header that has one value."""
    return header(description, value, required=required, const=value)


RETRY_AFTER = ("In how many seconds to try again.", 1)
HEADERS = {
    # in all responses
    "Date": header(
        "When the response was made.",
        "Fri, 02 Jan 2026 03:04:05 GMT",
        pattern=r"^\w{3}, \d{2} \w{3} \d{4} \d{2}:\d{2}:\d{2} GMT$",
    ),
    "X-Content-Type-Options": fixed("The body is what Content-Type says.", "nosniff"),
    "Cache-Control": fixed("Nothing that is live is kept.", "no-store"),
    "Content-Security-Policy": fixed(
        "Should a browser ever take it for a page: it loads nothing, and is in no frame.",
        "default-src 'none'; frame-ancestors 'none'",
    ),
    "Connection": header(
        "The connection is closed after this response.", "close", required=False, enum=["close", "keep-alive"]
    ),
    "Access-Control-Allow-Origin": header(
        "To a request whose Origin is one of `security.cors_origins`: that origin, or `*`.",
        "https://ops.example",
        required=False,
    ),
    "Access-Control-Expose-Headers": header("With it: what scripts may read.", "Retry-After", required=False),
    "Vary": fixed("With Access-Control-Allow-Origin, unless that is `*`.", "Origin", required=False),
    # in some
    "Retry-After": header(*RETRY_AFTER, minimum=1),
    "RetryAfterPerhaps": header(*RETRY_AFTER, required=False, minimum=1),
    "Allow": header("What the path takes.", "GET, HEAD, OPTIONS", pattern="^[A-Z]+(, [A-Z]+)*$"),
    "WWW-Authenticate": header(
        "A bearer token (RFC 6750) is needed.",
        'Bearer realm="fastdist"',
        pattern='^Bearer realm="fastdist( admin)?"(, error="invalid_token")?$',
    ),
    "Accept-Encoding": fixed("Where it was the body's coding: what is taken.", "identity", required=False),
    "AcceptedCodings": fixed(
        "Where it was the body's coding: what is taken.", "gzip, deflate, zstd, snappy", required=False
    ),
    "Accept": fixed("Where it was the media type: what is taken.", "application/json", required=False),
    "Access-Control-Allow-Methods": header("To a preflight from a listed origin.", "POST, OPTIONS", required=False),
    "Access-Control-Allow-Headers": header(
        "To a preflight from a listed origin.", REQUEST_HEADERS.decode(), required=False
    ),
    "Access-Control-Max-Age": header(
        "To a preflight from a listed origin: seconds that it holds.", PREFLIGHT_SECONDS, required=False
    ),
    "ETag": header("Stands for the file's content.", '"0123456789abcdef0123456789abcdef"', pattern='^"[0-9a-f]{32}"$'),
    "PageCacheControl": fixed("Kept by browsers, but asked for again each time.", "no-cache"),
    "PagePolicy": fixed("Nothing is loaded from elsewhere, and nothing runs inline.", POLICY),
    "Referrer-Policy": fixed("Other sites do not learn of it.", "no-referrer"),
    "Cross-Origin-Resource-Policy": fixed("Not for pages of other sites.", "same-origin"),
}
IN_ALL = {name: name for name in list(HEADERS)[: list(HEADERS).index("Retry-After")]}
IN_ACCEPTED = {name: name for name in IN_ALL if name != "Content-Security-Policy"}
IN_PAGES = IN_ALL | {
    "Cache-Control": "PageCacheControl",
    "Content-Security-Policy": "PagePolicy",
    "ETag": "ETag",
    "Referrer-Policy": "Referrer-Policy",
    "Cross-Origin-Resource-Policy": "Cross-Origin-Resource-Policy",
}

# ---- responses


def ref(kind: str, name: str) -> Json:
    """Return a reference to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def content(media_type: str, schema: Json, examples: Json) -> Json:
    """Return a body."""
    return {media_type: {"schema": schema, "examples": {name: {"value": each} for name, each in examples.items()}}}


def response(description: str, body: Json | None = None, headers: dict[str, str] = IN_ALL) -> Json:
    """Return a response; ``headers`` are names and the components that describe them."""
    found: Json = {"description": description, "headers": {name: ref("headers", of) for name, of in headers.items()}}
    return found | ({"content": body} if body else {})


def shows(description: str, headers: dict[str, str] = IN_ALL, /, **examples: models.Model) -> Json:
    """Return a response that is JSON, all ``examples`` of one model."""
    schema = ref("schemas", type(next(iter(examples.values()))).__name__)
    return response(description, content("application/json", schema, msgspec.to_builtins(examples)), headers)


def refuses(
    status: int, description: str, /, *headers: str, perhaps: bool = False, **details: str | tuple[str, dict[str, str]]
) -> Json:
    """Return a response that is a problem document; examples are their details, or those and the faults by pointer."""
    examples = {}
    for name, each in details.items():
        detail, faults = (each, {}) if isinstance(each, str) else each
        errors = [{"pointer": pointer, "detail": fault} for pointer, fault in faults.items()]
        examples[name] = json.loads(problem(status, detail, errors=errors).body)
    more = {_NAMES.get(name, name): "RetryAfterPerhaps" if perhaps else name for name in headers}
    return response(
        description, content("application/problem+json", ref("schemas", "Problem"), examples), IN_ALL | more
    )


def text(*bodies: tuple[str, str, str]) -> Json:
    """Return bodies that are text: media types, names of the examples, and these."""
    return {key: each for kind, name, body in bodies for key, each in content(kind, STRING, {name: body}).items()}


STRING = {"type": "string"}
_NAMES = {"AcceptedCodings": "Accept-Encoding"}  # of headers that are called otherwise as components
BROKEN = "the request is not HTTP: no Host header"
CROWDED = "too many connections; try again shortly"
NONE_LEFT = "nothing would be left to deliver to"
PACKET_ID = "019b7a5c-3f2e-7c4d-8a1b-5e6f708192a3"
SOME = models.Percentiles(p50=0.61, p90=0.85, p99=1.7, p999=2.2, max=2.31)
LAG = models.Percentiles(p50=0.31, p90=0.62, p99=1.1, p999=2.9, max=4.2)
MOMENT, LONG_AGO = "2026-01-02T03:04:04.880Z", "2026-01-02T03:00:00.120Z"


def analyzer(number: int, share: float, **changes: Any) -> models.Analyzer:
    """Return an example of an analyzer that has had its share of 100 packets."""
    found = models.Analyzer(
        id=f"A{number}",
        state="online",
        target_share=share,
        actual_share=share,
        delivered=round(100 * share),
        failed=0,
        retried=0,
        in_flight=0,
        endpoint=f"http://127.0.0.1:300{number}/analyze",
        weight=share,
        effective_share=share,
        since=LONG_AGO,
        health=models.Checks(last_check=MOMENT, last_status=200, consecutive_successes=122),
        connections=2,
        last_error=None,
        latency_ms=SOME,
    )
    return msgspec.structs.replace(found, **changes)


ANALYZERS = [analyzer(number, share) for number, share in enumerate((0.1, 0.4, 0.2, 0.3), 1)]
OFFLINE = analyzer(
    2,
    0.4,
    state="offline",
    effective_share=0.0,
    health=models.Checks(last_check=MOMENT, consecutive_failures=3),
    last_error="connection refused",
    last_error_at=MOMENT,
)
DRAINING = analyzer(1, 0.1, state="draining", override=models.Override(state="draining"), effective_share=0.0)
HEALTH = models.Health(
    status="ok",
    version=__version__,
    uptime_seconds=244.913,
    workers=models.RunningWorkers(running=2, configured=2),
    analyzers=models.OnlineAnalyzers(online=4, total=4),
)
DEGRADED = msgspec.structs.replace(
    HEALTH,
    status="degraded",
    analyzers=models.OnlineAnalyzers(online=3, total=4),
    problems=[
        models.ListedProblem(
            code="analyzer_offline",
            level="warning",
            since=LONG_AGO,
            subject="A2",
            detail="A2 is offline: health check: HTTP 503",
        )
    ],
)
STATS = models.Stats(
    uptime_seconds=244.913,
    packets=models.Packets(received=101, accepted=100, rejected=1, delivered=100),
    messages=models.InAndOut(accepted=200, delivered=200),
    bytes=models.InAndOut(accepted=45200, delivered=45200),
    rejected=models.Rejected(invalid=1),
    protocols={"otlp": models.ProtocolCounts(requests=12, records=100)},
    rates=models.Rates(accepted_per_second=9.8, delivered_per_second=9.8),
    latency_ms=models.Latencies(
        ingest=models.Percentiles(p50=0.021, p90=0.034, p99=0.09, p999=0.11, max=0.118),
        queue_wait=models.Percentiles(p50=0.05, p90=0.08, p99=0.3, p999=0.41, max=0.42),
        delivery=SOME,
    ),
    analyzers=[msgspec.convert(each, models.AnalyzerInShort, from_attributes=True) for each in ANALYZERS],
    workers=[
        models.Worker(
            id=number,
            pid=4242 + number,
            state="running",
            restarts=0,
            cpu_percent=3.1,
            rss_bytes=45678592,
            accepted=50,
            delivered=50,
            loop_lag_ms=LAG,
        )
        for number in range(2)
    ],
    supervisor=models.Supervisor(pid=4241),
    configuration=models.ConfigurationState(file="/etc/fastdist/fastdist.toml", last_success_at=LONG_AGO),
)
QUEUE = models.Queue(
    packets=0,
    bytes=0,
    capacity_bytes=1 << 28,
    in_flight=0,
    oldest_age_seconds=0.0,
    durability="disk",
    sync_interval_seconds=0.5,
    drain_rate_per_second=9.8,
    estimated_drain_seconds=0.0,
    workers=[
        models.WorkerQueue(id=number, packets=0, bytes=0, capacity_bytes=1 << 27, oldest_age_seconds=0.0)
        for number in range(2)
    ],
)
DEAD_LETTERS = models.LastDeadLetters(
    packets=3,
    bytes=2117,
    files=1,
    counts=[models.DeadLetterCount(reason="refused", analyzer="A2", packets=3)],
    discarded=models.Discarded(max_bytes=120),
    last=[
        models.DescribedDeadLetter(
            id=PACKET_ID,
            reason="refused",
            analyzer="A2",
            status=422,
            error="HTTP 422",
            attempts=1,
            messages=2,
            accepted_at="2026-01-02T03:04:04.880211Z",
            dead_lettered_at="2026-01-02T03:04:04.883870Z",
            bytes=397,
        )
    ],
)
METRICS = """\
# HELP fastdist_packets_accepted{0} Packets that were stored and acknowledged.
# TYPE fastdist_packets_accepted{0} counter
fastdist_packets_accepted_total 100
"""

RESPONSES = {
    # of any request
    "BadRequest": refuses(
        400,
        "The request is no HTTP as RFC 9112 has it, or might be read in more than one way. The connection is closed.",
        brokenHttp=BROKEN,
    ),
    "RequestTimeout": refuses(
        408,
        "The request did not arrive in time, or its body came slowly and others needed the memory. The connection is "
        "closed.",
        slowHead="the request's head did not arrive in time",
        slowBody="the request's body came too slowly",
    ),
    "ContentTooLarge": refuses(
        413,
        "The body is larger than is taken here. The connection is closed.",
        tooLarge="the body is larger than the 1048576 bytes allowed here",
    ),
    "ExpectationFailed": refuses(
        417,
        "Expect holds something other than 100-continue.",
        expectation="the only expectation understood is 100-continue",
    ),
    "HeadTooLarge": refuses(
        431,
        "The request's head is larger than `server.max_header`. The connection is closed.",
        headTooLarge="the request's head is larger than the 16384 bytes allowed",
    ),
    "NotImplemented": refuses(
        501,
        "Transfer-Encoding names a coding other than chunked. The connection is closed.",
        coding="the request is not HTTP: the only transfer coding understood is chunked",
    ),
    "TooManyConnections": refuses(
        503,
        "There are more connections than `server.max_connections` allows, or more in-progress bodies than there is "
        "memory for. The connection is closed.",
        "Retry-After",
        connections=CROWDED,
        bodies="more bodies are on their way than there is memory for; try again shortly",
    ),
    "VersionNotSupported": refuses(
        505,
        "Neither HTTP/1.0 nor HTTP/1.1. The connection is closed.",
        version="the request is not HTTP: only HTTP/1.0 and HTTP/1.1 are spoken here",
    ),
    "Headers": response("The headers of GET, without its body."),
    "Options": response(
        "What the path takes; to a preflight from a listed origin also what CORS asks for.",
        headers=IN_ALL
        | {
            name: name
            for name in (
                "Allow",
                "Access-Control-Allow-Methods",
                "Access-Control-Allow-Headers",
                "Access-Control-Max-Age",
            )
        },
    ),
    # packets
    "Delivered": shows(
        "To `Prefer: wait`: the packet was delivered.",
        delivered=Delivered(packet_id=PACKET_ID, messages=2, analyzer="A2"),
    ),
    "Accepted": shows(
        "The packet is safe (`queue.durability` says against what), and will be delivered.",
        IN_ACCEPTED,
        accepted=Accepted(packet_id=PACKET_ID, messages=2),
        withValidationNone=Accepted(packet_id="my-key-1"),
    ),
    "NoPacket": refuses(
        400,
        "The body is no log packet, the Idempotency-Key is not valid, or the request is no HTTP (then the connection "
        "is closed).",
        notJson="not JSON: expected a comma or a closing brace at line 1, column 18 (byte 17)",
        notUtf8="not UTF-8: invalid start byte at byte 14",
        empty="the body is empty",
        schema=("/messages/0/message: is required", {"/messages/0/message": "is required"}),
        several=(
            "/emitterId: expected a string, got a number (and 1 more)",
            {"/emitterId": "expected a string, got a number", "/messages": "expected at least one message"},
        ),
        key='Idempotency-Key must be one value of 1 to 64 visible ASCII characters other than " , ; \\, bare or in '
        "double quotes",
        brokenHttp=BROKEN,
    ),
    "Unauthorized": refuses(
        401,
        "`security.tokens` are set, and the request has none of them.",
        "WWW-Authenticate",
        none="a bearer token is needed",
        unknown="this token is not known",
    ),
    "PacketTooLarge": refuses(
        413,
        "The body is larger than `server.max_body` (a Content-Length is refused before the body is read, and the "
        "connection closed), or the packet larger than half of what a worker's part of the queue holds.",
        body="the body is 20000000 bytes, more than the 10485760 allowed",
        chunked="the body is larger than the 10485760 bytes allowed",
        queue="a packet of 90000000 bytes is over half of what a worker's part of the queue holds (134217728 bytes)",
    ),
    "UnsupportedPacket": refuses(
        415,
        "Not application/json, or in a coding that is not taken.",
        "Accept",
        "AcceptedCodings",
        type="Content-Type must be application/json",
        coding="Content-Encoding must be gzip, deflate, zstd or snappy",
    ),
    "RateLimited": refuses(
        429,
        "More requests than `limits` allow, of all emitters together or of this address.",
        "Retry-After",
        rate="more requests than the limit allows; try again in 1 s",
    ),
    "PacketLost": refuses(
        500,
        "To `Prefer: wait`: the packet was accepted, and is lost since the queue's file was damaged meanwhile.",
        damaged=f"packet {PACKET_ID} was accepted, but is lost: the queue's file was damaged; send it again",
    ),
    "DeadLetter": refuses(
        502,
        "To `Prefer: wait`: the packet could not be delivered, and is now a dead letter.",
        deadLetter=f"packet {PACKET_ID} could not be delivered and is now among the dead letters",
    ),
    "PacketNotStored": refuses(
        503,
        "The packet cannot be stored now: the queue is full, the service is about to end, or its storage fails. Or: "
        "too many connections, too many in-progress bodies.",
        "Retry-After",
        full="the queue is full; try again shortly",
        draining="the service is shutting down",
        storage="the queue's storage fails; nothing can be stored safely now",
        sync="the packet could not be written to disk: Input/output error",
        connections=CROWDED,
    ),
    "ProtocolOff": refuses(
        404,
        "The protocol is not among `server.protocols`.",
        off="there is nothing at this path; packets go to POST /logs",
    ),
    # figures
    "Health": shows("It serves.", usual=HEALTH, degraded=DEGRADED),
    "Ready": shows("It does.", usual=Ready()),
    "Unready": refuses(
        503,
        "Draining, full or unable to store: send no packets now. Or: too many connections.",
        "Retry-After",
        draining="the service is draining: it is about to end",
        full="the queue is full",
        storage="packets cannot be stored: writing to disk fails, or the queue's file was deleted or renamed",
    ),
    "Stats": shows("The figures.", usual=STATS),
    "Queue": shows("The figures.", usual=QUEUE),
    "LastDeadLetters": shows("The figures.", usual=DEAD_LETTERS),
    "Analyzers": shows("All of them.", usual=models.Analyzers(analyzers=[ANALYZERS[0], OFFLINE])),
    "Metrics": response(
        "The figures; in OpenMetrics' format if Accept names that, else in Prometheus' own.",
        text(
            ("text/plain", "prometheus", METRICS.format("_total")),
            ("application/openmetrics-text", "openmetrics", METRICS.format("") + "# EOF\n"),
        ),
    ),
    "Description": response(
        "This description.",
        content(
            "application/json",
            {"type": "object", "required": ["openapi", "info", "paths"]},
            {"start": {"openapi": "3.1.0", "info": {"title": "fastdist", "version": __version__}, "paths": {}}},
        ),
    ),
    # dashboard
    "Page": response("The page.", text(("text/html", "page", "<!doctype html>\n<title>fastdist</title>\n")), IN_PAGES),
    "PageFile": response(
        "The file.",
        text(
            ("text/css", "file", ":root { color-scheme: light dark; }\n"),
            ("text/javascript", "file", '"use strict";\n'),
            ("image/svg+xml", "file", '<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ),
        IN_PAGES,
    ),
    "PageHeaders": response("The headers of GET, without its body.", headers=IN_PAGES),
    "NotModified": response("To If-None-Match: the client has it as it is.", headers=IN_PAGES),
    "UnknownFile": refuses(
        404, "There is no such file.", unknown="there is nothing at this path; packets go to POST /logs"
    ),
    "UnknownFileHeaders": response("There is no such file."),
    # changes
    "Changed": shows("The change is in force, and kept over restarts. This is the analyzer now.", draining=DRAINING),
    "Reloaded": shows(
        "It is in force.",
        usual=Reloaded(
            changed=[ChangedSetting(setting="analyzers[A2].weight", before="0.4", after="0.6")],
            needs_restart=["server.port"],
            masked=["A3"],
        ),
    ),
    "BadChange": refuses(
        400,
        "The body is not JSON, or the request is no HTTP.",
        notJson="not JSON: expected a comma or a closing brace at line 1, column 14 (byte 13)",
        brokenHttp=BROKEN,
    ),
    "AdminUnauthorized": refuses(
        401,
        "`security.admin_tokens` are set, and the request has none of them.",
        "WWW-Authenticate",
        token="an admin token is needed",
    ),
    "AdminForbidden": refuses(
        403,
        "Without `security.admin_tokens` changes are taken from this machine only, and not from pages of other sites "
        "in its browsers.",
        elsewhere="without security.admin_tokens changes are taken from this machine only",
        page="without security.admin_tokens changes are not taken from pages of https://elsewhere.example; open the "
        "dashboard as localhost, or list that origin in security.cors_origins",
    ),
    "UnknownAnalyzer": refuses(
        404, "There is no such analyzer.", unknown="there is no analyzer 'A9'; there are A1, A2, A3, A4"
    ),
    "CompressedChange": refuses(
        415, "The body is compressed.", "Accept-Encoding", coding="compressed bodies are not understood"
    ),
    "WrongChange": refuses(
        422,
        "A wrong value, or nothing would be left to deliver to.",
        wrong=("the analyzer cannot be changed like that", {"/weight": "must be a number from 0 to 1e+100"}),
        noObject='the body must be an object such as {"weight": 0.2} or {"state": "draining"}',
        noneLeft=NONE_LEFT,
    ),
    "NoneLeft": refuses(422, "Nothing would be left to deliver to.", noneLeft=NONE_LEFT),
    "BadConfiguration": refuses(
        422,
        "The new configuration cannot be used; the old one stays.",
        invalid=(
            "the new configuration cannot be used; the old one stays",
            {"/analyzers/2/weight": "analyzers[2].weight: must be >= 0"},
        ),
    ),
    "ChangeNotStored": refuses(
        503,
        "The change could not be stored, or the supervisor has not answered in time; or there are too many connections "
        "(then with Retry-After).",
        "Retry-After",
        perhaps=True,
        disk="the change cannot be stored in fastdist-data: No space left on device",
        supervisor="the supervisor has not answered in time",
        connections=CROWDED,
    ),
}
