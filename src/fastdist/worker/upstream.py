"""Connections to analyzers: opened when something waits and none is free, kept alive, pruned when idle.

``PoolBase`` and ``ReplyBase`` (compiled) send and read; here is what happens seldom. A pool decides nothing about
packets: it reports every outcome to its owner, the dispatcher.
"""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
import time
from typing import TYPE_CHECKING, Protocol

from fastdist import logs
from fastdist._core import PoolBase, ReplyBase
from fastdist.net.connect import YOUNGEST, connect, describe, shortage
from fastdist.net.upstream_tls import not_after
from fastdist.shm.block import AnalyzerWord

if TYPE_CHECKING:
    from fastdist._core import AnalyzerStates, Counters, PacketRing, Poller, PoolOwner
    from fastdist.net.names import Names
    from fastdist.settings import Analyzer, Delivery

    class Owner(PoolOwner, Protocol):
        """What a pool needs of its owner, the dispatcher, besides what the compiled half calls."""

        analyzer_states: AnalyzerStates
        poller: Poller
        names: Names
        room: int  # for connections, of all pools
        openings: int  # connections that may be begun to open now

        def short_of(self, lacking: OSError) -> None: ...  # noqa: D102


IDLE_NS = 60_000_000_000  # after which a connection that nothing was sent on is closed
MAX_REPLY = 12  # times the time-out without progress: from the first byte of a reply to its last
LOG_INTERVAL = 60.0  # between warnings of one kind about an analyzer
USUAL_GAP_NS = 1_000_000_000  # between two checks of a pool, at most
PAUSED_NS = 1_500_000_000  # a longer one: no check ran, and the time beyond the usual does not count
# Packets wait so long for the connections there are, before as many again are allowed. An analyzer that replies at once
# needs few: one for all that waits while many analyzers want their first would be for that moment only.
GROWTH = 0.005  # seconds
SPILLS_LATER = 8  # the default limit of connections is reached before packets go to another analyzer
SHORT_PAUSE = 0.5  # seconds until a connection that failed for want of a descriptor is retried

log = logs.get()


class AnalyzerConnection(ReplyBase, asyncio.Protocol):
    """One connection to an analyzer."""

    pool: AnalyzerPool
    address = ""  # that it was opened to

    def __init__(self, pool: AnalyzerPool) -> None:
        age = pool.delivery.max_age * (1 - (1 - YOUNGEST) * random.random())  # noqa: S311
        self.replace_at = time.monotonic_ns() + int(age * 1e9)
        self.way = pool.way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the pool."""
        self.transport = transport
        self.pool.connected(self)

    def connection_lost(self, error: BaseException | None) -> None:
        """End its life; an alert of TLS is named as one."""
        super().connection_lost(OSError(describe(error, 0)) if isinstance(error, ssl.SSLError) else error)

    def check(self) -> None:
        """Close the connection if it makes no progress or was not used for long; retire it when it is old."""
        pool, now_ns = self.pool, self.pool.looked_ns
        if pool.late_ns:
            self.excuse(now_ns, pool.late_ns)
        if self.is_endless(now_ns, MAX_REPLY * pool.timeout_ns):
            self.close_endless(f"no end of a reply within {MAX_REPLY * pool.delivery.timeout:g} s")
        elif self.overdue(now_ns, pool.timeout_ns):
            what = "no whole request taken" if self.is_early() else "no reply"
            self.close_after(f"{what} within {pool.delivery.timeout:g} s", True)  # noqa: FBT003
        elif pool.retired or now_ns > self.replace_at or pool.has_moved(self):
            self.retire()
        elif self.in_flight() == 0 and now_ns - self.used_ns > IDLE_NS:
            self.close_after("", False)  # noqa: FBT003


class AnalyzerPool(PoolBase):
    """All connections of one worker to one analyzer, and the packets that wait for them."""

    owner: Owner

    def __init__(
        self,
        ring: PacketRing,  # noqa: ARG002  (taken by __cinit__)
        counters: Counters,  # noqa: ARG002
        states: AnalyzerStates,  # noqa: ARG002
        slot: int,  # noqa: ARG002
        owner: Owner,  # noqa: ARG002
    ) -> None:
        self.connections: set[AnalyzerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.retired = False
        self._warnings = logs.Throttle(LOG_INTERVAL)  # of unsolicited replies
        self.looked_ns = 0  # monotonic: the time of the check that is under way
        self.late_ns = 0  # by how much it is too late
        self._addresses: frozenset[str] = frozenset()  # of the analyzer's name, at that time
        self._short: asyncio.TimerHandle | None = None  # while this process has no descriptor for a connection
        self.way: tuple[object, ...] = ()  # how connections are made: those made otherwise are replaced

    def set_up(self, analyzer: Analyzer, delivery: Delivery, tls: ssl.SSLContext | None) -> None:
        """Aim the pool at ``analyzer``; ``delivery`` and ``tls`` are for all of them, and for this one."""
        self.analyzer, self.delivery = analyzer, analyzer.delivery(delivery)
        delivery = self.delivery
        self.timeout_ns = int(delivery.timeout * 1e9)
        self.growth_ns = int(min(GROWTH, delivery.spill_after / SPILLS_LATER) * 1e9)
        self._address = analyzer.address
        self._tls = tls if self._address.scheme == "https" else None
        head = (
            f"POST {self._address.path_and_query} HTTP/1.1\r\nHost: {self._address.host_header}\r\n"
            "Content-Type: application/json\r\n"
        )
        self.configure(
            head.encode("latin-1") + analyzer.header_lines,
            delivery.connections,
            delivery.pipeline,
            delivery.mode == "batch",
            delivery.batch_packets,
            delivery.batch_bytes,
            delivery.linger,
        )
        self.way = (self._tls, analyzer.tls_name, delivery.pipeline)
        self._replace_connections()

    def _replace_connections(self) -> None:
        """Retire connections that are made otherwise than they are now, and those over the limit: idle ones first."""
        others = [each for each in self.connections if each.way != self.way]
        alike = sorted((each for each in self.connections if each.way == self.way), key=lambda each: each.in_flight())
        surplus = max(0, len(alike) - self.connection_limit)
        for connection in (*others, *alike[:surplus]):
            connection.retire()

    # ---- connecting

    def open_more(self) -> None:
        """Begin to open as many connections as there are requests waiting, within the limit and what is ``allowed``."""
        if self._short is not None:
            return
        per_connection = (self.delivery.batch_packets if self.delivery.mode == "batch" else 1) * self.pipeline
        there = self.open_connections + self.opening
        limit = min(self.connection_limit, self.allowed) if self.growth_ns else self.connection_limit
        wanted = min(-(-self.waiting // per_connection) - self.opening, limit - there)
        if wanted > 0 and self.owner.room <= 0:
            self._wait_out(OSError(errno.EMFILE, "the descriptors left are for emitters' connections"))
        wanted = min(wanted, self.owner.room)
        if wanted > self.owner.openings:  # the rest later: many analyzers may want many at once
            wanted = self.owner.openings
            self.owner.wake(self)
        for _ in range(wanted):
            self.owner.room -= 1
            self.owner.openings -= 1
            self.opening += 1
            task = asyncio.get_running_loop().create_task(self._open())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _open(self) -> None:
        connection = AnalyzerConnection(self)  # made here, as uvloop needs its protocol before it connects
        try:
            connection.address = await connect(
                connection,
                self.owner.names,
                self._address,
                self.delivery.connect_timeout,
                poller=self.owner.poller,
                tls=self._tls,
                server_name=self.analyzer.tls_name,
            )
            if self._tls is not None and not self.retired:
                self.owner.analyzer_states.set(self.slot, AnalyzerWord.NOT_AFTER, not_after(connection.transport))
        except Exception as error:  # noqa: BLE001  (OSError, nearly always; whatever it is, packets wait for this)
            if lacking := shortage(error):
                self._wait_out(lacking)
            else:
                self._unreachable(describe(error, self.delivery.connect_timeout))
        finally:
            if connection.transport is None:
                self.opening -= 1

    def _unreachable(self, error: str) -> None:
        """Fail the packets of a request for which no connection could be made."""
        self.hand_over(self.owner.failed, self.take_request(), f"cannot connect: {error}", counted=True)

    def _wait_out(self, lacking: OSError) -> None:
        """Open no connection for a moment: this process lacks something, which is no failure of the analyzer."""
        self.owner.short_of(lacking)
        if self._short is None and not self.retired:
            self._short = asyncio.get_running_loop().call_later(SHORT_PAUSE, self._try_again)

    def _try_again(self) -> None:
        self._short = None
        self.owner.wake(self)

    def connected(self, connection: AnalyzerConnection) -> None:
        """Take a new connection into use."""
        self.opening -= 1
        self.connections.add(connection)
        self.connection_count(1)
        if connection.way != self.way or self.open_connections > self.connection_limit:  # changed meanwhile
            connection.retire()
        connection.offer()
        self.owner.wake(self)

    def lost(self, connection: AnalyzerConnection) -> None:
        """Forget a connection that has ended."""
        self.connections.discard(connection)
        self.owner.wake(self)

    # ---- upkeep

    def look(self, now_ns: int, *, idle_too: bool = True) -> list[AnalyzerConnection]:
        """Begin a check of the connections, as of ``now_ns``: return those to ``check`` soon."""
        gap, self.looked_ns = now_ns - (self.looked_ns or now_ns), now_ns
        self.late_ns = gap - USUAL_GAP_NS if gap > PAUSED_NS else 0
        self._addresses = self.owner.names.current(self._address.host)
        return [each for each in self.connections if idle_too or self.retired or each.in_flight()]

    def close_idle(self) -> None:
        """Close the connections that are idle and not about to be used."""
        for connection in () if self.waiting else tuple(self.connections):
            if connection.in_flight() == 0:
                connection.close_after("", False)  # noqa: FBT003

    def has_moved(self, connection: AnalyzerConnection) -> bool:
        """Whether the analyzer's name resolves to other addresses by now."""
        return bool(self._addresses and connection.address) and connection.address not in self._addresses

    def close(self) -> None:
        """Close every connection and open no more; what was in flight goes back to the owner."""
        self.paused = True
        if self._short is not None:
            self._short.cancel()
        for task in self._tasks:
            task.cancel()
        for connection in tuple(self.connections):
            connection.close_after("", False)  # noqa: FBT003

    # ---- called by ReplyBase

    def unasked(self, beginning: bytes) -> None:
        """Warn of an analyzer that sends an unsolicited reply: with pipelining, that may settle the wrong request."""
        if beginning.startswith((b"HTTP/1.1 408", b"HTTP/1.0 408")):  # how some servers close an idle connection
            return
        if self._warnings.allow():
            log.warning(
                "an analyzer sent more than the replies it was asked for; the connection is closed",
                analyzer=self.analyzer.id,
                beginning=self.analyzer.without_secrets(beginning.decode("latin-1")),
            )


def max_in_flight(delivery: Delivery) -> int:
    """Return how many packets a worker may have in flight to an analyzer."""
    return delivery.connections * delivery.pipeline * (delivery.batch_packets if delivery.mode == "batch" else 1)
