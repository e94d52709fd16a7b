"""Records as JSON or lines of text: from Fluent Bit, Vector, Fluentd, Logstash, syslog-ng and rsyslog, to /ingest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from urllib.parse import unquote

from fastdist.exchange import JSON, Request, Response
from fastdist.http.responses import problem
from fastdist.packet import MAX_EMITTER_ID
from fastdist.protocols.base import STATUSES, Protocol, Reason, Refused, Route, header_text, refusal_headers
from fastdist.protocols.encodings import decode
from fastdist.protocols.packets import Packets
from fastdist.protocols.records import Common, add_lines, add_records

if TYPE_CHECKING:
    from fastdist.protocols.base import Limits, Work

JSON_TYPES = (
    "",
    "application/json",
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/jsonlines",
    "application/x-jsonlines",
    "application/json-lines",
    "text/json",
)


class Json(Protocol):
    """``/ingest`` and ``/ingest/{source}``."""

    name: ClassVar[str] = "json"

    def __init__(self) -> None:
        take, reply = {"POST": _take, "PUT": _take}, {"GET": _ready}
        self.routes = [Route("/ingest", take, reply), Route("/ingest/{source}", take, reply)]

    def refuse(self, _request: Request, refused: Refused) -> Response:
        """Return a problem document (RFC 9457) whose pointer is the number of the record at fault."""
        status = STATUSES[refused.reason]
        errors = [] if refused.record is None else [{"pointer": f"/{refused.record}", "detail": refused.detail}]
        return problem(status, refused.detail, errors=errors, headers=refusal_headers(refused))


def _ready(_request: Request, _obstacle: str) -> Response:
    return Response(200, b'{"status":"ok"}', JSON)


def _take(request: Request, limits: Limits) -> Work:
    kind = request.media_type
    as_text = kind not in JSON_TYPES
    if as_text and not kind.startswith("text/") and kind != "application/x-www-form-urlencoded":  # libcurl's default
        detail = f"Content-Type {kind} is not taken; use application/json, application/x-ndjson or text/plain"
        raise Refused(
            Reason.UNSUPPORTED, detail, headers=b"Accept: application/json, application/x-ndjson, text/plain\r\n"
        )
    body = yield from decode(request, limits.max_body)
    header = header_text(request.headers.get("x-emitter-id", ""))
    metadata = {"protocol": "json", **({"emitterId": header} if len(header) > MAX_EMITTER_ID else {})}
    packets = Packets(limits, metadata, len(body))
    source = unquote(request.path.removeprefix("/ingest").removeprefix("/"))
    common = Common(request.received_ns, header or request.client or "unknown", source, fixed_emitter=bool(header))
    if as_text:
        yield from add_lines(body, common, packets, {})
    else:
        yield from add_records(body, common, packets)
    reply = Response(200, b'{"status":"accepted","records":%d}' % packets.number, JSON)
    return (yield from packets.finish(reply))
