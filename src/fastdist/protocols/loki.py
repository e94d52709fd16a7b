"""Loki's push API, as JSON and snappy protobuf: what promtail, Alloy, Vector, Fluent Bit and logging handlers send."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fastdist.errors import printable
from fastdist.protocols.base import (
    STATUSES,
    TEXT,
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


class Loki(Protocol):
    """``/loki/api/v1/push``. Its probe, ``GET /ready``, is the API's own."""

    name: ClassVar[str] = "loki"

    def __init__(self) -> None:
        self.routes = [Route("/loki/api/v1/push", {"POST": _take})]

    def refuse(self, _request: Request, refused: Refused) -> Reply:
        """Return the reason as text."""
        headers = TEXT + refused.headers + retry_after(refused) + challenge(refused)
        return Reply(STATUSES[refused.reason], printable(refused.detail).encode() + b"\n", headers)


def _take(_request: Request, _limits: Limits) -> Work:
    yield
    raise Refused(Reason.UNSUPPORTED, "not implemented")
