"""Splunk's HTTP Event Collector: what Splunk's loggers, Docker's splunk driver, Fluent Bit and Vector send."""

from __future__ import annotations

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
    from fastdist.protocols.base import Limits, Work

SUCCESS = b'{"text":"Success","code":0}'
NO_TOKEN, NOT_UNDERSTOOD, UNKNOWN_TOKEN, NO_DATA, INVALID_DATA, INTERNAL, BUSY_CODE = 2, 3, 4, 5, 6, 8, 9
NO_EVENT, BLANK_EVENT, ACK_OFF, HEALTHY, FULL, LARGE = 12, 13, 14, 17, 18, 27
TEXTS = {
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

    def refuse(self, request: Request, refused: Refused) -> Reply:
        """Return Splunk's text and code; the number of the event at fault; what exactly is wrong as ``detail``."""
        code, status = (
            refused.code if isinstance(refused, EventError) else _code(request, refused.reason),
            STATUSES[refused.reason],
        )
        if code == UNKNOWN_TOKEN:
            status = 403
        document: dict[str, object] = {"text": TEXTS[code], "code": code}
        if refused.record is not None:
            document["invalid-event-number"] = refused.record
        document["detail"] = printable(refused.detail)
        headers = refused.headers + retry_after(refused) + challenge(refused, b"Splunk")
        return Reply(status, orjson.dumps(document), JSON + headers)


def _code(request: Request, why: Reason) -> int:
    if why is Reason.UNAUTHORIZED:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return NO_TOKEN
        return UNKNOWN_TOKEN if scheme.lower() in ("splunk", "bearer", "basic") and given.strip() else NOT_UNDERSTOOD
    if why in BUSY:
        return BUSY_CODE
    return {Reason.TOO_LARGE: LARGE, Reason.FAULT: INTERNAL, Reason.DEAD_LETTER: INTERNAL}.get(why, INVALID_DATA)


def _reply(status: int, code: int) -> Reply:
    return Reply(status, orjson.dumps({"text": TEXTS[code], "code": code}), JSON)


def _options(_request: Request, _obstacle: str) -> Reply:
    return Reply(200, b"", b"Allow: POST, OPTIONS\r\n")


def _health(_request: Request, obstacle: str) -> Reply:
    return _reply(503, FULL) if obstacle else _reply(200, HEALTHY)


def _no_ack(_request: Request, _obstacle: str) -> Reply:
    return _reply(400, ACK_OFF)


def _take(_request: Request, _limits: Limits) -> Work:
    yield
    raise Refused(Reason.UNSUPPORTED, "not implemented")


_take_raw = _take
