"""Steps of a worker's upkeep: how late the event loop is, and emitters' time-outs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdist._core import Counters, Intake, Poller
    from fastdist.settings import Server

TICK = 0.02  # seconds: heartbeat, time-outs of deliveries, gauges
TICK_NS = int(TICK * 1e9)
SWEEP_NS = 3_000_000  # of a tick that may go to emitters' time-outs


class LoopLag:
    """How long the event loop was blocked: the longest time in each tick, for the histogram.

    The loop itself does not report it. What is known is by how much a tick is late, and how long the parts took that
    may take long: reading (of streams; of what was held back), and the tick before.
    """

    def __init__(self, counters: Counters, poller: Poller, intake: Intake) -> None:
        self._counters, self._poller, self._intake = counters, poller, intake
        self._due = 0  # the first tick is no later than any other
        self._took = 0

    def begin(self, now_ns: int) -> None:
        """Observe the lag up to now, when a tick begins."""
        parts = (self._poller.longest_ns, self._intake.longest_ns, self._took)
        self._counters.observe_loop_lag(max(now_ns - self._due if self._due else 0, *parts))
        self._poller.longest_ns = self._intake.longest_ns = 0
        self._due = now_ns + TICK_NS

    def end(self, began_ns: int) -> None:
        """Note how long the tick took that began then."""
        self._took = time.monotonic_ns() - began_ns


class Sweep:
    """Checks the emitters' time-outs, often enough for the shortest, and no more at once than a tick has time for.

    A sweep that is far too late is our fault (the machine was stopped), not theirs: it ends no connection.
    """

    def __init__(self, intake: Intake, server: Server) -> None:
        shortest = min(server.header_timeout, server.body_timeout, server.keepalive_timeout)
        self._intake = intake
        self._interval = int(min(1.0, max(TICK, shortest / 8)) * 1e9)
        self._left: list[Any] = []
        self._due, self._late = time.monotonic_ns(), 0

    def go_on(self, now_ns: int) -> None:
        """Begin a sweep when it is due, and go on with the one that is under way."""
        if not self._left:
            if now_ns < self._due:
                return
            self._late = now_ns - self._due
            self._left = list(self._intake.connections)
        self._due = now_ns + self._interval
        began = time.monotonic_ns()
        while self._left and time.monotonic_ns() - began <= SWEEP_NS:
            connection = self._left.pop()
            if connection.transport is None:
                continue
            if self._late > self._interval:
                connection.excuse(now_ns, self._late)
            else:
                connection.check(now_ns)
