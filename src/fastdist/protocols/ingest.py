"""Records as JSON or lines of text: from Fluent Bit, Vector, Fluentd, Logstash, syslog-ng and rsyslog, to /ingest."""

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
from fastdist.statuses import reason

if TYPE_CHECKING:
    from fastdist.protocols.base import Limits, Work

PROBLEM = b"Content-Type: application/problem+json\r\n"


class Json(Protocol):
    """``/ingest`` and ``/ingest/{source}``."""

    name: ClassVar[str] = "json"

    def __init__(self) -> None:
        take, reply = {"POST": _take, "PUT": _take}, {"GET": _ready}
        self.routes = [Route("/ingest", take, reply), Route("/ingest/{source}", take, reply)]

    def refuse(self, _request: Request, refused: Refused) -> Reply:
        """Return a problem document (RFC 9457) whose pointer is the number of the record at fault."""
        status = STATUSES[refused.reason]
        problem: dict[str, object] = {"type": "about:blank", "title": reason(status), "status": status}
        problem["detail"] = printable(refused.detail)
        if refused.record is not None:
            problem["errors"] = [{"pointer": f"/{refused.record}", "detail": printable(refused.detail)}]
        headers = PROBLEM + refused.headers + retry_after(refused) + challenge(refused)
        return Reply(status, orjson.dumps(problem), headers)


def _ready(_request: Request, _obstacle: str) -> Reply:
    return Reply(200, b'{"status":"ok"}', JSON)


def _take(_request: Request, _limits: Limits) -> Work:
    yield
    raise Refused(Reason.UNSUPPORTED, "not implemented")
