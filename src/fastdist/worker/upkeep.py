"""A worker's upkeep: tasks that are run from time to time, in parts so short that no packet waits for them.

What concerns each of very many connections is a ``Sweep``. ``LoopLag`` and ``EmitterTimeouts`` are two of the tasks.
"""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence

    from fastdist._core import Counters, Intake
    from fastdist.settings import Server
    from fastdist.shm.block import Step
    from fastdist.shm.upkeep import Upkeep

    class Timed(Protocol):
        """What notes its longest run, until that is reset."""

        peak_ns: int


TICK = 0.02  # seconds: heartbeat, retries of deliveries, gauges
TICK_NS = int(TICK * 1e9)
CLOCK_NS = 1_000_000  # what the event loop's timers count in
MIN_INTERVAL_NS = 2 * CLOCK_NS  # of a task: what is due within CLOCK_NS runs at once
LATE_NS = 2_000_000  # tasks that are this late do not wait for another iteration
TOGETHER_NS = 100_000  # of an iteration, for tasks that share it because they are short
PART_NS = 20_000  # of an iteration, for a sweep
SHARE = 4  # part of the time that a sweep takes where iterations are long
MAX_PART_NS = 3_000_000


class Task(NamedTuple):
    """``work(now_ns)`` is called every ``interval`` seconds, or soon again if it returns True: it is not finished."""

    step: Step
    interval: float
    work: Callable[[int], object]


class Schedule:
    """Runs tasks when they are due, in an event-loop iteration as many as are short or one that is long after them.

    So packets are read in between. Where iterations are long, tasks that are late run as well: none is put off by the
    others. A task that fails is called again at its next time; see ``Upkeep``.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, upkeep: Upkeep, tasks: Sequence[Task]) -> None:
        self._loop, self._upkeep, self._tasks = loop, upkeep, tasks
        self._due: list[tuple[int, int]] = []  # a heap: when (monotonic ns) which task is
        self.peak_ns = 0  # of ``run``, until it is reset

    def start(self) -> None:
        """Run the first task now, and one more in each TICK until all have begun: so the rarer ones do not meet."""
        now = time.monotonic_ns()
        self._due = [(now + number * TICK_NS, number) for number in range(len(self._tasks))]
        self.run()

    def run(self) -> None:
        """Run tasks that are due, and come back for the next."""
        now = ended = time.monotonic_ns()
        due = now + CLOCK_NS
        while self._due[0][0] <= due:
            unfinished = self._run_first(now)
            ended = time.monotonic_ns()
            if unfinished or ended - now > TOGETHER_NS:
                due = now - LATE_NS
        self.peak_ns = max(self.peak_ns, ended - now)
        pause = self._due[0][0] - ended
        if pause > CLOCK_NS:
            self._loop.call_later(pause / 1e9, self.run)
        else:
            self._loop.call_soon(self.run)

    def _run_first(self, now_ns: int) -> bool:
        """Run the task that is most due; return whether it is unfinished."""
        number = self._due[0][1]
        step, interval, work = self._tasks[number]
        unfinished = bool(self._upkeep.run(step, work, now_ns))
        pause = 0 if unfinished else max(MIN_INTERVAL_NS, int(interval * 1e9))
        heapq.heapreplace(self._due, (now_ns + pause, number))
        return unfinished


class Sweep:
    """Goes through very many things in parts: ``begin(now_ns)`` returns them, ``check(thing, now_ns)`` does one.

    The first part is to begin. The others take PART_NS, or a SHARE of the time since the one before if that is more. An
    error keeps no other thing from being checked, and is raised when all are.
    """

    def __init__(self, begin: Callable[[int], Iterable[Any]], check: Callable[[Any, int], object]) -> None:
        self._begin, self._check = begin, check
        self._left: list[Any] = []
        self._error: Exception | None = None
        self._last = 0  # monotonic ns: when the last part began

    def go_on(self, now_ns: int) -> bool:
        """Begin a sweep, or go on with the one that is under way; return whether things are left."""
        began = time.monotonic_ns()
        if not self._left:
            self._left, self._last = list(self._begin(now_ns)), began
            return bool(self._left)
        end = began + min(MAX_PART_NS, max(PART_NS, (began - self._last) // SHARE))
        self._last = began
        while self._left:
            try:
                self._check(self._left.pop(), now_ns)
            except Exception as error:  # noqa: BLE001  (whatever it is, the others must be checked)
                self._error = error
            if self._left and time.monotonic_ns() >= end:
                return True
        failed, self._error = self._error, None
        if failed is not None:
            raise failed
        return False


class LoopLag:
    """How long the event loop was blocked: the longest time in each tick, for the histogram.

    The loop itself does not report it. What is known is by how much a tick is late, and how long ``parts`` took that
    may take long: reading (of streams; of what was held back), and the upkeep.
    """

    def __init__(self, counters: Counters, parts: Sequence[Timed]) -> None:
        self._counters, self._parts = counters, parts
        self._due = 0  # the first tick is no later than any other

    def observe(self, now_ns: int) -> None:
        """Observe the lag since the last tick; call this every TICK seconds."""
        lag = max(0, now_ns - self._due) if self._due else 0
        for part in self._parts:
            lag = max(lag, part.peak_ns)
            part.peak_ns = 0
        self._counters.observe_loop_lag(lag)
        self._due = now_ns + TICK_NS


class EmitterTimeouts:
    """Checks the emitters' time-outs every ``interval`` seconds, often enough for the shortest.

    A sweep that is far too late is our fault (the machine was stopped), not theirs: it ends no connection.
    """

    def __init__(self, intake: Intake, server: Server) -> None:
        shortest = min(server.header_timeout, server.body_timeout, server.keepalive_timeout)
        self.interval = min(1.0, max(TICK, shortest / 8))
        self._intake = intake
        self._sweep = Sweep(self._begin, self._check)
        self._due, self._late = time.monotonic_ns(), 0
        self._excused = False

    def go_on(self, now_ns: int) -> bool:
        """Begin a sweep, or go on with the one that is under way; return whether connections are left."""
        try:
            return self._sweep.go_on(now_ns)
        finally:
            self._due = now_ns + int(self.interval * 1e9)

    def _begin(self, now_ns: int) -> Iterable[Any]:
        self._late = now_ns - self._due
        self._excused = self._late > self.interval * 1e9
        return self._intake.connections

    def _check(self, connection: Any, now_ns: int) -> None:
        if connection.transport is None:
            return
        if self._excused:
            connection.excuse(now_ns, self._late)
        else:
            connection.check(now_ns)
