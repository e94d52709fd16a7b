"""Health: which analyzers are there. Checked once, by the supervisor; what it finds stands in the shared block.

An analyzer goes offline after ``fall`` failures in a row, of checks or of deliveries (workers count those in the block
and take it offline themselves), and comes online after ``rise`` checks in a row that succeed; one that deliveries took
offline is then on probation, and comes online when it takes a packet (``fastdist.probation``). The two rows are kept
apart: one that answers its check but fails every delivery goes offline, and so does one that says it is unwell while it
still takes packets.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from typing import TYPE_CHECKING, cast

from fastdist import timeouts
from fastdist.forward import describe
from fastdist.names import Names
from fastdist.shared import AnalyzerState, AnalyzerWord
from fastdist.sockets import connect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdist._core.states import AnalyzerStates
    from fastdist.config import Analyzer, Health

OK = range(200, 300)
LONGEST_LINE = 8192  # bytes of a status line


class Probe(asyncio.Protocol):
    """One check: sends ``request``, and gives the first line that comes back to ``status_line``.

    A protocol rather than streams, which cost several times as much: with a thousand analyzers that would show.
    """

    def __init__(self, request: bytes, status_line: asyncio.Future[bytes]) -> None:
        self.request, self.status_line = request, status_line
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Take in a part of the reply."""
        self._received += data
        if b"\n" in self._received:
            self._settle()
        elif len(self._received) > LONGEST_LINE:  # it goes on and on
            self._received = b"?"
            self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make do with what has come."""
        if exc is not None and not self.status_line.done():
            self.status_line.set_exception(exc)
        self._settle()

    def _settle(self) -> None:
        if not self.status_line.done():
            self.status_line.set_result(self._received.partition(b"\n")[0])
        self._received = b""


class HealthChecker:
    """Checks the analyzers of ``roster`` (by slot), each in a task of its own."""

    def __init__(self, states: AnalyzerStates, settings: Health) -> None:
        self.states, self.settings = states, settings
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._roster: dict[int, Analyzer] = {}
        self._tls = ssl.create_default_context()
        self._names = Names()

    def set_roster(self, roster: Mapping[int, Analyzer]) -> None:
        """Check these from now on."""
        for slot, analyzer in list(self._roster.items()):
            if roster.get(slot) is None or roster[slot].health_url != analyzer.health_url:
                self._tasks.pop(slot).cancel()
        self._roster = dict(roster)
        for slot, analyzer in roster.items():
            if slot not in self._tasks:
                self._tasks[slot] = asyncio.get_running_loop().create_task(self._watch(slot, analyzer))

    def close(self) -> None:
        """Stop checking."""
        for task in self._tasks.values():
            task.cancel()

    async def _watch(self, slot: int, analyzer: Analyzer) -> None:
        """Check at once, then every ``interval`` (a little less, so that the checks of many spread out)."""
        while True:
            started = time.monotonic()
            status, error = await self._probe(analyzer)
            self.record(slot, status, error)
            pause = self.settings.interval * random.uniform(0.9, 1.0)  # noqa: S311
            await asyncio.sleep(max(0.01, pause - (time.monotonic() - started)))

    async def _probe(self, analyzer: Analyzer) -> tuple[int, str]:
        """Ask once; return the status (0: no reply) and what was wrong ("": nothing)."""
        address, timeout = analyzer.health_address, self.settings.timeout
        try:
            await self._names.infos(address.host, address.port, timeout)  # which is not the analyzer's time
            async with timeouts.running(timeout):
                status = await self._ask(analyzer)
        except Exception as error:  # noqa: BLE001  (whatever it is, the next check is due all the same)
            return 0, f"health check: {describe(error, self.settings.timeout)}"
        return status, "" if status in OK else f"health check: HTTP {status}"

    async def _ask(self, analyzer: Analyzer) -> int:
        address = analyzer.health_address
        tls = self._tls if address.scheme == "https" else None
        loop = asyncio.get_running_loop()
        probe = Probe(
            f"GET {address.path_and_query} HTTP/1.1\r\nHost: {address.host_header}\r\n"
            "Accept: */*\r\nUser-Agent: fastdist-health\r\nConnection: close\r\n\r\n".encode("latin-1"),
            loop.create_future(),
        )
        await connect(probe, self._names, address, self.settings.timeout, tls=tls)
        try:
            line = await probe.status_line
        finally:
            probe.transport.close()
        if not line:
            raise ConnectionError("connection closed before the reply")
        version, _, rest = line.partition(b" ")
        status = rest[:3]
        if not version.startswith(b"HTTP/1.") or not status.isdigit():
            raise ValueError("a reply that is not HTTP")
        return int(status)

    def record(self, slot: int, status: int, error: str) -> None:
        """Take in a check's outcome: the state machine."""
        states, word = self.states, AnalyzerWord
        states.set(slot, word.LAST_CHECK_NS, time.time_ns())
        states.set(slot, word.LAST_STATUS, status)
        if error:
            states.set_error(slot, error)
            failures = states.get(slot, word.CHECK_FAILURES) + 1
            states.set(slot, word.CHECK_FAILURES, failures)
            states.set(slot, word.CHECK_SUCCESSES, 0)
            if failures >= self.settings.fall:
                states.go_offline(slot)
            return
        successes = states.get(slot, word.CHECK_SUCCESSES) + 1
        states.set(slot, word.CHECK_SUCCESSES, successes)
        states.set(slot, word.CHECK_FAILURES, 0)
        if states.get(slot, word.STATE) == AnalyzerState.OFFLINE and successes >= self.settings.rise:
            if not states.needs_trial(slot):
                states.go_online(slot)
            elif successes == self.settings.rise and not states.has_failed_trials(slot):
                states.set(slot, word.SINCE_NS, time.time_ns())  # shown as online, on probation
