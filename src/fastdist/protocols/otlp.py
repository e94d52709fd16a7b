"""OTLP/HTTP logs, as protobuf and as JSON: what OpenTelemetry's SDKs, the Collector and Fluent Bit send to /v1/logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import orjson

from fastdist.errors import printable
from fastdist.protocols.base import (
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

PROTOBUF = b"Content-Type: application/x-protobuf\r\n"
PROTOBUF_TYPES = ("application/x-protobuf", "application/protobuf")
MAX_RETRY_AFTER = 5  # seconds: SDKs give up at once when it is more than what is left of their 10
# google.rpc.Code by status.
CODES = {400: 3, 401: 16, 404: 12, 405: 12, 408: 4, 413: 3, 415: 3, 417: 3, 500: 13, 502: 14, 503: 14}


class Otlp(Protocol):
    """``/v1/logs``; traces and metrics are not taken."""

    name: ClassVar[str] = "otlp"

    def __init__(self) -> None:
        other = {"POST": _not_taken}
        self.routes = [Route("/v1/logs", {"POST": _take}), Route("/v1/traces", other), Route("/v1/metrics", other)]

    def refuse(self, request: Request, refused: Refused) -> Reply:
        """Return a google.rpc.Status in the request's encoding."""
        status = STATUSES[refused.reason]
        code, text = CODES[status], printable(refused.detail)
        headers = refused.headers + retry_after(refused, MAX_RETRY_AFTER) + challenge(refused)
        if request.media_type in PROTOBUF_TYPES:
            message = text.encode()
            return Reply(status, b"\x08%c\x12%b%b" % (code, _varint(len(message)), message), PROTOBUF + headers)
        return Reply(status, orjson.dumps({"code": code, "message": text}), JSON + headers)


def _varint(number: int) -> bytes:
    septets = []
    while number > 0x7F:  # noqa: PLR2004  (seven bits each)
        septets.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*septets, number])


def _not_taken(_request: Request, _limits: Limits) -> Work:
    raise Refused(Reason.NOT_FOUND, "only logs are taken, at /v1/logs: no traces, no metrics")
    yield


def _take(_request: Request, _limits: Limits) -> Work:
    yield
    raise Refused(Reason.UNSUPPORTED, "not implemented")
