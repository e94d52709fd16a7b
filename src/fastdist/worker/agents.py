"""Agents' requests: what each is for, and what it is answered, which is counted by protocol and status.

All about formats is in ``fastdist.protocols``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdist.protocols.base import Limits, Reason, Refused
from fastdist.protocols.encodings import codings
from fastdist.protocols.table import find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdist._core import Counters
    from fastdist.exchange import Request, Response
    from fastdist.protocols.base import Batch, Work
    from fastdist.protocols.table import Found
    from fastdist.settings import Server

RECORD = 256  # bytes that a packet takes in the queue besides its body, at most
# Where counters have other names, or none; all others are called like their reason.
_COUNTERS = {Reason.EXPECTATION: "invalid"} | dict.fromkeys(
    (Reason.NOT_FOUND, Reason.METHOD, Reason.DEAD_LETTER, Reason.FAULT), ""
)


class Agents:
    """The protocols that a worker serves.

    ``capacity``: bytes of its part of the queue, or of what it keeps of bodies, if that is less. A request becomes half
    of that at most.
    """

    def __init__(self, server: Server, capacity: int) -> None:
        self.protocols = frozenset(server.protocols)
        limit = capacity // 2
        self.limits = Limits(server.max_body, min(server.max_body, limit - RECORD), limit - RECORD)

    def find(self, method: str, target: str, headers: Mapping[str, str]) -> tuple[object, bool] | None:
        """Return what a request is for, and whether it brings records; None: for no agent.

        Of a POST /logs that is encoded: the codings; None if they are not understood.
        """
        if method == "POST" and target.partition("?")[0] == "/logs":
            try:
                return codings(headers.get("content-encoding", "")), False
            except Refused:
                return None
        found = find(method, target, headers, self.protocols)
        return None if found is None else (found, found.take is not None)


class AgentRequest:
    """A request of an agent, and how it ends; ``counters`` are the worker's."""

    def __init__(self, route: Found, request: Request, counters: Counters) -> None:
        self.route, self.request, self._counters = route, request, counters

    def work(self, limits: Limits) -> Work:
        """Return the conversion of its records."""
        take = self.route.take
        if take is None:
            raise AssertionError(self.request.target)
        return take(self.request, limits)

    def refused(self, why: Refused) -> Response:
        """Return the response to a request that is refused, in the shape of its protocol."""
        return self._counted(self.route.protocol.refuse(self.request, why))

    def stored(self, batch: Batch) -> Response:
        """Return the response to a request that was waiting for the delivery of its packets."""
        return self._counted(batch.reply, batch.records)

    def without_records(self, obstacle: str) -> Response:
        """Return the response to a request that brings nothing. ``obstacle``: why nothing can be stored now, if so."""
        reply = self.route.reply
        if reply is not None:
            try:
                return reply(self.request, obstacle)
            except Refused as why:
                return self.refused(why)
        methods = ", ".join(self.route.allow)
        detail = f"{methods} are what this path takes"
        return self.refused(Refused(Reason.METHOD, detail, headers=f"Allow: {methods}\r\n".encode()))

    def _counted(self, reply: Response, records: int = 0) -> Response:
        self._counters.add_request(self.route.number, reply.status, records)
        return reply


def counter_of(reason: Reason) -> str:
    """Return the counter of rejections that a refusal belongs to; empty: none."""
    return _COUNTERS.get(reason, reason.value)
