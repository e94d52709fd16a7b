"""Splunk's HTTP Event Collector: what Splunk's loggers, Docker's splunk driver, Fluent Bit and Vector send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qsl

import orjson

from fastdist.errors import printable
from fastdist.exchange import JSON, Request, Response
from fastdist.packet import MAX_EMITTER_ID
from fastdist.protocols.base import BUSY, STATUSES, Protocol, Reason, Refused, Route, header_text, refusal_headers
from fastdist.protocols.encodings import decode
from fastdist.protocols.packets import Packets
from fastdist.protocols.records import Common, add_lines, decode_value, json_texts, level_of, text_of, time_of

if TYPE_CHECKING:
    from fastdist.protocols.base import Limits, Work

EMITTER = "splunk"  # of events without a host
TEXTS = ("message", "msg", "log")
LEVEL_NAMES = ("level", "severity")
SUCCESS = b'{"text":"Success","code":0}'
NO_TOKEN, NOT_UNDERSTOOD, UNKNOWN_TOKEN, NO_DATA, INVALID_DATA, INTERNAL, BUSY_CODE = 2, 3, 4, 5, 6, 8, 9
NO_EVENT, BLANK_EVENT, ACK_OFF, HEALTHY, FULL, LARGE = 12, 13, 14, 17, 18, 27
MEANINGS = {
    NO_TOKEN: "Token is required",
    NOT_UNDERSTOOD: "Invalid authorization",
    UNKNOWN_TOKEN: "Invalid token",
    NO_DATA: "No data",
    INVALID_DATA: "Invalid data format",
    INTERNAL: "Internal server error",
    BUSY_CODE: "Server is busy",
    NO_EVENT: "Event field is required",
    BLANK_EVENT: "Event field cannot be blank",
    ACK_OFF: "ACK is disabled",
    HEALTHY: "HEC is healthy",
    FULL: "HEC is unhealthy, queues are full",
    LARGE: "Content too large",
}


class EventError(Refused):
    """What is wrong with an event, as one of Splunk's codes; ``record`` is its number."""

    def __init__(self, code: int, detail: str, record: int | None = None) -> None:
        super().__init__(Reason.MALFORMED if code == INVALID_DATA else Reason.INVALID, detail, record=record)
        self.args = (code, detail, record)
        self.code = code


class Splunk(Protocol):
    """``/services/collector`` and what is below it."""

    name: ClassVar[str] = "splunk"
    schemes: ClassVar[tuple[str, ...]] = ("splunk",)

    def __init__(self) -> None:
        base, options, events, raw = "/services/collector", {"OPTIONS": _options}, {"POST": _take}, {"POST": _take_raw}
        self.routes = [
            *(Route(base + end, events, options) for end in ("", "/", "/event", "/event/1.0")),
            *(Route(base + end, raw, options) for end in ("/raw", "/raw/1.0")),
            *(Route(base + end, reply={"GET": _health}) for end in ("/health", "/health/1.0")),
            Route(base + "/ack", reply={"POST": _no_ack}),
        ]

    def refuse(self, request: Request, refused: Refused) -> Response:
        """Return Splunk's text and code; the number of the event at fault; what exactly is wrong as ``detail``."""
        code = refused.code if isinstance(refused, EventError) else _code(request, refused.reason)
        status = 403 if code == UNKNOWN_TOKEN else STATUSES[refused.reason]
        document: dict[str, object] = {"text": MEANINGS[code], "code": code}
        if refused.record is not None:
            document["invalid-event-number"] = refused.record
        document["detail"] = printable(refused.detail)
        headers = refusal_headers(refused, b"Splunk" if status == 401 else b"")  # noqa: PLR2004
        return Response(status, orjson.dumps(document), JSON + headers)


def _code(request: Request, why: Reason) -> int:
    if why is Reason.UNAUTHORIZED:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return NO_TOKEN
        return UNKNOWN_TOKEN if scheme.lower() in ("splunk", "bearer", "basic") and given.strip() else NOT_UNDERSTOOD
    if why in BUSY:
        return BUSY_CODE
    return {Reason.TOO_LARGE: LARGE, Reason.FAULT: INTERNAL, Reason.DEAD_LETTER: INTERNAL}.get(why, INVALID_DATA)


def _reply(status: int, code: int) -> Response:
    return Response(status, orjson.dumps({"text": MEANINGS[code], "code": code}), JSON)


def _options(_request: Request, _obstacle: str) -> Response:
    return Response(200, b"", b"Allow: POST, OPTIONS\r\n")


def _health(_request: Request, obstacle: str) -> Response:
    return _reply(503, FULL) if obstacle else _reply(200, HEALTHY)


def _no_ack(_request: Request, _obstacle: str) -> Response:
    return _reply(400, ACK_OFF)


def _packets(request: Request, limits: Limits, body: bytes) -> Packets:
    channel = header_text(request.headers.get("x-splunk-request-channel", ""))
    return Packets(limits, {"protocol": "splunk", **({"channel": channel} if channel else {})}, len(body))


def _take(request: Request, limits: Limits) -> Work:
    """Convert events; those before one that is wrong are stored, as Splunk does."""
    body = yield from decode(request, limits.max_body)
    packets = _packets(request, limits, body)
    common = Common(request.received_ns, EMITTER)
    reply = Response(200, SUCCESS, JSON)
    try:
        for texts in json_texts(body):
            for text in texts:
                emitter, message = _event(decode_value(text), common, packets.number)
                packets.add(emitter, message, len(text))
            if packets.slices.over():
                yield packets.kept
        if not packets.number:
            raise EventError(NO_DATA, "there is no event in the body")
    except Refused as refused:
        error = refused
        if not isinstance(refused, EventError) and refused.reason is Reason.MALFORMED:
            error = EventError(INVALID_DATA, refused.detail, refused.record)
        if not packets.number or error.reason is Reason.TOO_LARGE:
            raise error from None
        reply = PROTOCOL.refuse(request, error)
    return (yield from packets.finish(reply, refused=int(reply.status != 200)))  # noqa: PLR2004


def _event(value: Any, common: Common, number: int) -> tuple[str, dict[str, Any]]:
    """Return the emitter and the message of an event, which is used up: what is left of it becomes metadata."""
    if type(value) is not dict:
        raise EventError(INVALID_DATA, "an event is no object", number)
    event = value.pop("event", None)
    if event is None:
        raise EventError(NO_EVENT, "an event has no member called event", number)
    if event == "":
        raise EventError(BLANK_EVENT, "the member called event is empty", number)
    time = time_of(value.get("time"))
    if time is not None and time == value.get("time"):
        del value["time"]
    level = _level(value.get("fields"), event)
    text = event if type(event) is str else _text(event)
    message: dict[str, Any] = {"timestamp": time or common.received, "level": level, "message": text}
    source = next((value[name] for name in ("source", "sourcetype") if _is_text(value.get(name))), None)
    if source is not None:
        message["source"] = source
        if source is value.get("source"):
            del value["source"]
    emitter: str = value["host"] if _is_text(value.get("host")) else common.emitter
    if emitter is value.get("host") and len(emitter) <= MAX_EMITTER_ID:
        del value["host"]
    if type(event) is not str and event not in ({}, []):
        value["event"] = event
    if value:
        message["metadata"] = value
    return emitter, message


def _is_text(value: Any) -> bool:
    return type(value) is str and value != ""


def _text(event: Any) -> str:
    """Return the text of an event that is no string; a member that is all of it is taken out."""
    if type(event) is dict:
        for name in TEXTS:
            if event.get(name) is not None:
                return event.pop(name) if type(event[name]) is str else text_of(event[name])
    return text_of(event)


def _level(*objects: Any) -> str:
    values = [item.get(name) for item in objects if type(item) is dict for name in LEVEL_NAMES]
    return next((level for value in values if (level := level_of(value)) is not None), "info")


def _take_raw(request: Request, limits: Limits) -> Work:
    """Convert lines; what is common to them stands in the query."""
    body = yield from decode(request, limits.max_body)
    packets = _packets(request, limits, body)
    query = dict(parse_qsl(request.query, errors="replace"))
    emitter = query.get("host") or EMITTER
    common = Common(request.received_ns, emitter, query.get("source") or query.get("sourcetype") or "")
    names = ("sourcetype", "index", "host") if len(emitter) > MAX_EMITTER_ID else ("sourcetype", "index")
    metadata = {name: query[name] for name in names if name in query}
    yield from add_lines(body, common, packets, metadata)
    if not packets.number:
        raise EventError(NO_DATA, "there is no line in the body")
    return (yield from packets.finish(Response(200, SUCCESS, JSON)))


PROTOCOL = Splunk()
