"""Health: which analyzers are up. Only the supervisor checks; its findings are in the shared block.

An analyzer goes offline after ``fall`` failures in a row, of checks or of deliveries (workers count those in the block
and take it offline themselves), and comes online after ``rise`` checks in a row that succeed; one that deliveries took
offline is then on probation, and comes online when it takes a packet (``fastdist.worker.probation``). The two
counts are kept apart: one that passes its check but fails every delivery goes offline, and so does one that fails its
check while it still takes packets.

A connection to an https URL is kept for the next check, as a handshake costs more than all the rest. A failure
on a kept connection proves nothing: the check is repeated on a new one. What this machine lacks is no outcome at all.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from fastdist.net import timeouts
from fastdist.net.connect import YOUNGEST, Shortage, connect, describe, descriptors, shortage, time_for
from fastdist.net.names import Names
from fastdist.net.upstream_tls import Contexts, not_after
from fastdist.shm.block import AnalyzerState, AnalyzerWord

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from fastdist._core import AnalyzerStates
    from fastdist.settings import Analyzer, Health

OK = range(200, 300)
INTERIM = {*range(100, 200)} - {101}  # after that one, what follows is not HTTP
MAX_BEGINNING = 16384  # bytes up to the end of the head, interim responses before it included
MAX_REPLY = 65536  # bytes; a connection with a longer one is not kept
SHORT_PAUSE = 1.0  # seconds at most until a check that failed for want of a descriptor is retried


class Probe(asyncio.Protocol):
    """A connection for checks: ``ask`` sends a request and returns the reply's status. Interim responses are skipped.

    A protocol rather than streams, which cost several times as much: with a thousand analyzers that matters.
    """

    address = ""  # the one it was opened to

    def __init__(self, max_age: float) -> None:
        self._replace_at = time.monotonic() + max_age * random.uniform(YOUNGEST, 1.0)  # noqa: S311
        self._status: asyncio.Future[int] | None = None
        self._ended: Exception | None = None
        self._parser: HttpResponseParser | None = None
        self._received = 0  # bytes of the reply
        self._whole = self._kept_alive = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    async def ask(self, request: bytes) -> int:
        """Return the status of the reply. Raises OSError, ValueError."""
        if self._ended is not None:
            raise self._ended
        self._parser = HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True)  # as RFC 9112 lets a recipient
        self._received, self._whole = 0, False
        self._status = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._status

    def data_received(self, data: bytes) -> None:
        """Parse a part of the reply."""
        self._received += len(data)
        if self._parser is not None:
            try:
                self._parser.feed_data(data)
            except HttpParserUpgrade:
                self._whole = False
            except HttpParserError:
                self._fail(ValueError("a reply that is not HTTP"))
        known = self._status is None or self._status.done()
        if self._received > MAX_BEGINNING and not known:  # it does not end
            self._fail(ValueError("a reply that is not HTTP"))
        if self._received > MAX_REPLY:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Note that a reply begins (called by the parser): after the one that was asked for there should be none."""
        self._whole = False

    def on_headers_complete(self) -> None:
        """Note that a head is complete."""
        if self._parser is None or self._status is None:
            return
        if not self._parser.get_http_version().startswith("1."):
            raise ValueError("not HTTP/1")
        status = self._parser.get_status_code()
        if status not in INTERIM and not self._status.done():
            self._kept_alive = self._parser.should_keep_alive()
            self._status.set_result(status)

    def on_message_complete(self) -> None:
        """Note that a reply is complete."""
        self._whole = self._status is not None and self._status.done()

    def _fail(self, error: Exception) -> None:
        self._whole = False
        if self._status is not None and not self._status.done():
            self._status.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request under way."""
        self._parser = None
        self._ended = exc or ConnectionError("connection closed before the reply")
        self._fail(self._ended)

    def can_be_asked_again(self, addresses: frozenset[str]) -> bool:
        """Whether the last reply is complete, and the connection young and to an address the name still has."""
        if self._ended is not None or self.transport.is_closing() or time.monotonic() > self._replace_at:
            return False
        return self._whole and self._kept_alive and not (addresses and self.address not in addresses)


class HealthChecker:
    """Checks the analyzers (by slot), each in a task of its own.

    Concurrent new connections, and those that are kept, are each limited to a quarter of this process's descriptors:
    whatever the number of analyzers, some are left for all else. ``max_age``: seconds that a connection is kept.
    """

    def __init__(self, states: AnalyzerStates, settings: Health, max_age: float) -> None:
        self.states, self.settings, self._max_age = states, settings, max_age
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._analyzers: dict[int, Analyzer] = {}
        self._names = Names()
        self._max_connections = max(1, descriptors() // 4)
        self._limit = asyncio.Semaphore(self._max_connections)
        self._kept: dict[tuple[object, ...], Probe] = {}  # by _way, while no check uses it
        self._not_after: dict[str, int] = {}  # of certificates that were seen and not recorded yet, by analyzer
        self.tls = Contexts()
        self.shortage = Shortage()  # that kept checks from being made

    def set_analyzers(self, analyzers: Mapping[int, Analyzer]) -> None:
        """Check these from now on."""
        for slot, analyzer in list(self._analyzers.items()):
            now = analyzers.get(slot)
            if now is None or _asked(now) != _asked(analyzer):
                self._tasks.pop(slot).cancel()
                self._let_go(_way(analyzer))
        self._analyzers = dict(analyzers)
        self.tls.keep(analyzers.values())
        for slot, analyzer in analyzers.items():
            if slot not in self._tasks:
                self._tasks[slot] = asyncio.get_running_loop().create_task(self._watch(slot, analyzer))

    def close(self) -> None:
        """Stop checking."""
        for task in self._tasks.values():
            task.cancel()
        for way in list(self._kept):
            self._let_go(way)

    def _let_go(self, way: tuple[object, ...]) -> None:
        if probe := self._kept.pop(way, None):
            probe.transport.close()

    async def _watch(self, slot: int, analyzer: Analyzer) -> None:
        """Check at once, then every ``interval`` (a little less, so that the checks of many analyzers spread out)."""
        while True:
            started = time.monotonic()
            pause = self.settings.interval * random.uniform(0.9, 1.0)  # noqa: S311
            outcome = await self.check_once(analyzer)
            if outcome is None:
                pause = min(pause, SHORT_PAUSE)
            else:
                self.record(slot, *outcome)
            if ends := self._not_after.pop(analyzer.id, 0):
                self.states.set(slot, AnalyzerWord.NOT_AFTER, ends)
            await asyncio.sleep(max(0.01, pause - (time.monotonic() - started)))

    async def check_once(self, analyzer: Analyzer) -> tuple[int, str] | None:
        """Check an analyzer now; return the status (0: no reply) and the error ("": none); None: we could not check."""
        address, timeout = analyzer.health_address, self.settings.timeout
        try:
            status = await self._ask_again(analyzer)
            if not status:
                async with self._limit:  # what is not the analyzer's is outside its time-out
                    infos = await self._names.infos(address.host, address.port, timeout)
                    tls = self.tls.of(analyzer) if address.scheme == "https" else None
                    async with timeouts.running(time_for(infos, timeout)):  # a dead one takes none from the others
                        status = await self._ask(analyzer, tls)
        except Exception as error:  # noqa: BLE001  (whatever it is, the next check is due all the same)
            if lacking := shortage(error):
                self.shortage.last = lacking
                return None
            return 0, f"health check: {describe(error, self.settings.timeout)}"
        return status, "" if status in OK else f"health check: HTTP {status}"

    async def _ask_again(self, analyzer: Analyzer) -> int:
        """Check on the kept connection; return the status, or 0 if a new connection is needed."""
        probe = self._kept.pop(_way(analyzer), None)
        if probe is None:
            return 0
        if not probe.can_be_asked_again(self._names.current(analyzer.health_address.host)):
            probe.transport.close()
            return 0
        try:
            async with timeouts.running(self.settings.timeout):
                return await self._ask_on(probe, analyzer)
        except Exception:  # noqa: BLE001  (as above)
            return 0

    async def _ask(self, analyzer: Analyzer, tls: ssl.SSLContext | None) -> int:
        address, probe, name = analyzer.health_address, Probe(self._max_age), analyzer.health_tls_name
        probe.address = await connect(probe, self._names, address, self.settings.timeout, tls=tls, server_name=name)
        if tls is not None and address.origin == analyzer.address.origin:
            self._not_after[analyzer.id] = not_after(probe.transport)
        async with timeouts.running(self.settings.timeout):  # the rest was for connecting to one of many addresses
            return await self._ask_on(probe, analyzer)

    async def _ask_on(self, probe: Probe, analyzer: Analyzer) -> int:
        """Return the status; the connection is kept if it can be used again, else closed."""
        address = analyzer.health_address
        keep = address.scheme == "https"
        request = (
            f"GET {address.path_and_query} HTTP/1.1\r\nHost: {address.host_header}\r\n"
            f"Accept: */*\r\nUser-Agent: fastdist-health\r\nConnection: {'keep-alive' if keep else 'close'}\r\n"
        )
        try:
            status = await probe.ask(request.encode("latin-1") + analyzer.header_lines + b"\r\n")
        except BaseException:
            probe.transport.abort()  # without waiting for the end of TLS
            raise
        way = _way(analyzer)
        if keep and way not in self._kept and len(self._kept) < self._max_connections:
            self._kept[way] = probe
        else:
            probe.transport.close()
        return status

    def record(self, slot: int, status: int, error: str) -> None:
        """Record a check's outcome: the state machine."""
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


def _asked(analyzer: Analyzer) -> tuple[object, ...]:
    """Return what a check depends on."""
    return *_way(analyzer), analyzer.headers, analyzer.endpoint


def _way(analyzer: Analyzer) -> tuple[object, ...]:
    """Return what tells connections for checks apart: analyzers behind one URL share them if they speak TLS alike."""
    return analyzer.health_url, analyzer.health_tls_name, analyzer.tls
