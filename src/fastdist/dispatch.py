"""Dispatching: what the table looks like, and what becomes of packets that could not be delivered at once.

The hot path (claim, pick, wait, send) is compiled (``DispatchBase``). Here are its exceptions:

- a failed packet goes at once to another analyzer that can be picked and that it has not failed on in this round; when
  there is none, it backs off (exponential, full jitter) and starts a new round;
- while no analyzer can be picked packets stay in the ring, and what was picked for one that is gone is picked anew;
- a packet that has waited ``spill_after`` for its analyzer goes to another that has room (compiled, too);
- what an analyzer refuses, or what has been sent ``max_attempts`` times, goes to the dead letters.
"""

from __future__ import annotations

import heapq
import random
import ssl
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist._core.dispatch import DispatchBase
from fastdist._core.pick import AliasTable, Rendezvous
from fastdist.deadletter_writer import DeadLetterWriter, Letter, what_is_left
from fastdist.forward import AnalyzerPool
from fastdist.names import Names
from fastdist.shared import AnalyzerWord
from fastdist.shares import effective_weights

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

    from fastdist._core.counters import Counters
    from fastdist._core.ring import PacketRing
    from fastdist._core.states import AnalyzerStates
    from fastdist._core.stream import Poller
    from fastdist.config import Analyzer, Config
    from fastdist.deadletters import DeadLetters

LONGEST_PAUSE = 3600.0  # seconds; a Retry-After beyond that is taken for a mistake
RAMP_STEP_NS = 250_000_000  # how often weights are looked at while an analyzer starts slowly
CHECK_NS = 100_000_000  # how often connections and waiting lists are looked at
PRUNING_NS = 1_000_000_000  # how often idle connections are
RELAXATION = 0.01  # a second: how much slower an analyzer may become before that counts as its usual speed

log = logs.get()


class Retrying:
    """What is remembered of a packet that has failed."""

    __slots__ = ("round", "tried")

    def __init__(self) -> None:
        self.tried: set[int] = set()  # slots it failed on in this round
        self.round = 0  # rounds it has backed off


class Dispatcher(DispatchBase):
    """Gives packets to analyzers.

    ``settled(sequence, analyzer)`` hears what became of packets that failed or are awaited: the id of the analyzer that
    took it, or None for a dead letter.
    """

    def __init__(  # noqa: PLR0913  (the parts a worker is wired from)
        self,
        loop: asyncio.AbstractEventLoop,  # noqa: ARG002  (taken by __cinit__)
        ring: PacketRing,  # noqa: ARG002
        states: AnalyzerStates,
        config: Config,
        *,
        counters: Counters,
        dead_letters: DeadLetters,
        settled: Callable[[int, str | None], None],
        poller: Poller,
    ) -> None:
        self.poller, self.names = poller, Names()
        self.analyzer_states, self.counters, self.settled = states, counters, settled
        self.roster: dict[int, Analyzer] = {}
        self.retired: list[AnalyzerPool] = []  # of analyzers that were removed, until their connections are closed
        self.weights: dict[int, float] = {}
        self.online: set[int] = set()
        self.retrying: dict[int, Retrying] = {}  # by sequence
        self.backing_off: list[tuple[int, int]] = []  # a heap of (due, monotonic ns; handle)
        self.letters = DeadLetterWriter(dead_letters, counters, self._buried)
        self._tls: ssl.SSLContext | None = None
        self._next_check = self._next_pruning = self._next_ramp = self._ramp_looked = 0
        self._resume_at = 0
        self.config = config

    def set_roster(self, roster: Mapping[int, Analyzer]) -> None:
        """Deliver to these analyzers (by slot) from now on."""
        if self._tls is None and any(analyzer.address.scheme == "https" for analyzer in roster.values()):
            self._tls = ssl.create_default_context()
        for slot in range(len(self.pools)):
            pool, analyzer = self.pools[slot], roster.get(slot)
            if analyzer is None or (
                pool is not None and pool.analyzer != analyzer and pool.analyzer.endpoint != analyzer.endpoint
            ):
                self._retire(slot)
                pool = None
            if analyzer is not None and pool is None:
                pool = self.pools[slot] = AnalyzerPool(self.ring, self.counters, self.analyzer_states, slot, self)
            if analyzer is not None:
                pool.set_up(analyzer, self.config.delivery, self._tls)
        self.roster = dict(roster)
        self.refresh()
        self.schedule()

    def _retire(self, slot: int) -> None:
        pool = self.pools[slot]
        if pool is not None:
            pool.retired = True  # what is in flight may finish
            pool.release_waiting()
            self.retired.append(pool)
            self.pools[slot] = None

    # ---- the table

    def refresh(self) -> None:
        """Build the table anew from what the analyzers' states and weights are now."""
        now = time.monotonic_ns()
        states = self.analyzer_states
        self.weights = effective_weights(states, self.roster, self.config.health, now)
        sticky = self.config.distribution.strategy == "sticky"
        online = {slot for slot in self.roster if states.is_online(slot)}
        paused = {slot: until for slot in online if (until := states.get(slot, AnalyzerWord.PAUSED_UNTIL_NS)) > now}
        self._resume_at = min(paused.values(), default=0)
        if sticky:  # a paused analyzer keeps its emitters: their packets wait for it
            held = {slot: max(states.weight(slot), 0.0) for slot in paused if states.is_pickable(slot)}
            pickable = self.weights | {slot: weight for slot, weight in held.items() if weight > 0}
        else:
            pickable = self.weights
        for slot in self.roster:
            pool = self.pools[slot]
            pool.paused = slot in paused
            if slot not in pickable and pool.waiting:
                pool.release_waiting()
        self._build(pickable, sticky=sticky)
        if online - self.online:
            self._end_back_off()
        self.online = online
        for slot in pickable:
            self.touch(self.pools[slot])

    def _build(self, pickable: Mapping[int, float], *, sticky: bool) -> None:
        slots, weights = list(pickable), list(pickable.values())
        if not slots:
            self.set_table(None, None)
        elif sticky:
            self.set_table(None, Rendezvous([self.roster[slot].id for slot in slots], slots, weights))
        else:
            self.set_table(AliasTable(slots, weights), None)

    # ---- outcomes, told by the pools

    def delivered(self, pool: AnalyzerPool, sequences: list[int]) -> None:
        """Hear that packets which had failed before, or which an emitter waits for, were delivered."""
        for sequence in sequences:
            self.retrying.pop(sequence, None)
            self.settled(sequence, pool.analyzer.id)

    def failed(
        self, pool: AnalyzerPool, handles: list[int], error: str, *, counted: bool, status: int | None = None
    ) -> None:
        """Send packets elsewhere: a request failed with ``error``. ``counted``: it speaks against the analyzer."""
        slot, states = pool.slot, self.analyzer_states
        self.counters.add_to(slot, "failed", len(handles))
        if counted and not pool.retired and states.delivery_failed(slot, error) >= self.config.health.fall:
            states.go_offline(slot)
            pool.paused = True  # until the next flush has taken its packets elsewhere
        for handle in reversed(handles):  # each goes to the front of its new list: the first is to be first again
            self._retry(pool, handle, status, error)
        self.wake(pool)

    def paused_for(self, pool: AnalyzerPool, handles: list[int], status: int, value: str) -> None:
        """Send nothing to the analyzer for a while, as it asks for (429 or 503 with Retry-After)."""
        seconds = retry_after(value)
        if not pool.retired and seconds:
            self.analyzer_states.set_error(pool.slot, f"HTTP {status}, Retry-After: {value[:40]}")
            self.analyzer_states.pause(pool.slot, time.monotonic_ns() + int(seconds * 1e9))
            pool.paused = True
        self.failed(pool, handles, f"HTTP {status}", counted=not seconds, status=status)

    def refused(self, pool: AnalyzerPool, handles: list[int], status: int, *, batch: bool) -> None:
        """Put a packet that was refused to the dead letters; of a refused batch, find out first which packet it was.

        Those that may not be sent again (``max_attempts``) are dead letters as well: nobody knows whose fault it was.
        """
        error = f"HTTP {status}"
        self.analyzer_states.delivery_succeeded(pool.slot)
        self.analyzer_states.set_error(pool.slot, error)
        self.counters.add_to(pool.slot, "failed", len(handles))
        if batch:
            left = [handle for handle in handles if not self._exhausted(pool, handle, status, error)]
            self._send_again(pool, left, alone=True)
        else:
            for handle in handles:
                self._bury(pool, handle, "refused", status, error)
        self.wake(pool)

    def not_sent(self, pool: AnalyzerPool, handles: list[int]) -> None:
        """Send packets again that the analyzer has not looked at."""
        error = "connection closed before the reply"
        self._send_again(pool, [handle for handle in handles if not self._exhausted(pool, handle, None, error)])
        self.wake(pool)

    def wake(self, pool: AnalyzerPool) -> None:
        """Look at the pool in the next flush."""
        self.touch(pool)
        self.schedule()

    # ---- retries

    def _count_retries(self, pool: AnalyzerPool, packets: int) -> None:
        self.counters.add("retried", packets)
        self.counters.add_to(pool.slot, "retries", packets)

    def _send_again(self, pool: AnalyzerPool, handles: list[int], *, alone: bool = False) -> None:
        """Have the same analyzer get packets before all others, or whoever is picked if it gets none now."""
        self._count_retries(pool, len(handles))
        for handle in reversed(handles):
            pool.prepend(handle, alone)
        if pool.retired or pool.slot not in self.weights:
            pool.release_waiting()

    def _exhausted(self, pool: AnalyzerPool, handle: int, status: int | None, error: str) -> bool:
        """Put a packet that has been sent ``max_attempts`` times to the dead letters; say if it was."""
        limit = self.config.retry.max_attempts
        if not limit or self.ring.attempts(handle) < limit:
            return False
        self._bury(pool, handle, "exhausted", status, error)
        return True

    def _retry(self, pool: AnalyzerPool, handle: int, status: int | None, error: str) -> None:
        if self._exhausted(pool, handle, status, error):
            return
        self._count_retries(pool, 1)
        packet = self.ring.sequence(handle)
        retrying = self.retrying.setdefault(packet, Retrying())
        retrying.tried.add(pool.slot)
        pool.watch(handle)
        target = self._alternative(handle, retrying.tried)
        if target is not None:
            target.prepend(handle)
            self.touch(target)
        elif not any(self.analyzer_states.is_pickable(slot) for slot in self.roster):
            retrying.tried.clear()
            self.ring.release(handle)  # nobody is there: it waits in the ring for whoever comes first
        else:
            retry = self.config.retry
            retrying.round += 1
            delay = random.uniform(0, min(retry.cap, retry.base * 2 ** min(retrying.round - 1, 60)))  # noqa: S311
            self._back_off(handle, delay)

    def _alternative(self, handle: int, tried: set[int]) -> AnalyzerPool | None:
        """Return the pool of another analyzer, picked by weight (sticky: the next in the packet's own order)."""
        states = self.analyzer_states
        others = {
            slot: weight for slot, weight in self.weights.items() if slot not in tried and states.is_pickable(slot)
        }
        if not others:
            return None
        if self.config.distribution.strategy == "sticky":
            names = [self.roster[slot].id for slot in others]
            slot = Rendezvous(names, list(others), list(others.values())).pick(self.ring.packet(handle).emitter)
        else:
            slot = random.choices(list(others), list(others.values()))[0]  # noqa: S311
        pool: AnalyzerPool = self.pools[slot]
        return pool

    def _back_off(self, handle: int, seconds: float) -> None:
        heapq.heappush(self.backing_off, (time.monotonic_ns() + int(seconds * 1e9), handle))

    def _end_back_off(self, now_ns: int | None = None) -> None:
        """Have packets picked again whose time has come (all of them without ``now_ns``)."""
        while self.backing_off and (now_ns is None or self.backing_off[0][0] <= now_ns):
            handle = heapq.heappop(self.backing_off)[1]
            retrying = self.retrying.get(self.ring.sequence(handle))
            if retrying is not None:
                retrying.tried.clear()
            self.ring.release(handle)
            self.schedule()

    # ---- dead letters

    @property
    def storage_failed(self) -> bool:
        """Whether there are dead letters that could not be written or synced."""
        return self.letters.failed

    def _bury(self, pool: AnalyzerPool, handle: int, reason: str, status: int | None, error: str) -> None:
        self.letters.add(Letter(self.ring, handle, reason, pool.analyzer.id, status, error))

    def _buried(self, ring: PacketRing, sequence: int) -> None:
        if ring is self.ring:  # not an old one
            self.retrying.pop(sequence, None)
            self.settled(sequence, None)

    def bury_all(self) -> int:
        """Write all that is left to the dead letters (reason ``shutdown``); return how many packets. Raises OSError."""
        self.close()
        for pool in self.pools:
            if pool is not None:
                pool.release_waiting()
        self._end_back_off()
        undone = self.ring.undone
        self.letters.write_all(what_is_left(self.ring))
        return undone

    # ---- upkeep

    def tick(self, now_ns: int) -> None:
        """Do what time asks for: back-offs, time-outs, spills, pauses and slow starts that end."""
        if self.backing_off:
            self._end_back_off(now_ns)
        self.letters.tick(now_ns)
        if self.analyzer_states.epoch != self.seen_epoch or (self._resume_at and now_ns >= self._resume_at):
            self._resume_at = 0
            self.seen_epoch = -1  # the flush refreshes
            self.schedule()
        if now_ns >= self._next_check:
            self._next_check = now_ns + CHECK_NS
            self._check(now_ns)
        self.spill_at(now_ns)
        if self.config.health.slow_start and now_ns >= self._next_ramp:
            self._next_ramp = now_ns + RAMP_STEP_NS
            looked, self._ramp_looked = self._ramp_looked, now_ns  # however late this look is, the last one counts
            online_since = [self.analyzer_states.get(slot, AnalyzerWord.ONLINE_SINCE_NS) for slot in self.roster]
            if any(since and looked - since < self.config.health.slow_start * 1e9 for since in online_since):
                self.seen_epoch = -1
                self.schedule()

    def _check(self, now_ns: int) -> None:
        for pool in self.retired:
            pool.check(now_ns)
        self.retired = [pool for pool in self.retired if pool.open_connections or pool.opening]
        idle_too = now_ns >= self._next_pruning
        if idle_too:
            self._next_pruning = now_ns + PRUNING_NS
        for slot in self.roster:
            pool = self.pools[slot]
            if pool.requests_in_flight or (idle_too and pool.open_connections):
                pool.check(now_ns)
            if idle_too:
                pool.relax(1 + RELAXATION)

    def close(self) -> None:
        """Close all connections to analyzers and open no more."""
        for pool in (*self.pools, *self.retired):
            if pool is not None:
                pool.close()


def retry_after(value: str) -> float:
    """Return the seconds a Retry-After (seconds or an HTTP date) asks for; 0 for what is neither."""
    if value.isdecimal():
        return min(float(value), LONGEST_PAUSE)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    if date.tzinfo is None:  # the oldest of the three forms names no zone; it is GMT
        date = date.replace(tzinfo=UTC)
    return min(max(date.timestamp() - time.time(), 0.0), LONGEST_PAUSE)
