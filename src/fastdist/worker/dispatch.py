"""Dispatching: what the table looks like, and which packets leave the analyzer they were picked for.

The hot path (claim, pick, wait, send) is compiled (``DispatchBase``); ``Outcomes`` handles packets that are not taken.
Here is the rest:

- while no analyzer can be picked packets stay in the ring, and what was picked for one that is gone is picked again;
- a packet that has waited ``spill_after`` for its analyzer goes to another that has room (compiled, too);
- an analyzer on probation gets one packet at a time (``fastdist.worker.probation``).
"""

from __future__ import annotations

import math
import os
import random
import time
from bisect import bisect_left
from typing import TYPE_CHECKING

from fastdist._core import UNLIMITED, AliasTable, busy_ns
from fastdist.net.connect import Shortage, max_upstream_connections
from fastdist.net.names import Names
from fastdist.net.upstream_tls import Contexts
from fastdist.shm.block import AnalyzerWord, Step
from fastdist.shm.weights import effective_weights
from fastdist.storage.dead_letter_writer import what_is_left
from fastdist.worker.outcomes import Outcomes
from fastdist.worker.probation import choose
from fastdist.worker.upkeep import TICK, Sweep, Task
from fastdist.worker.upstream import AnalyzerPool, max_in_flight

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from typing import Unpack

    from fastdist._core import AnalyzerStates, PacketRing, Poller
    from fastdist.settings import Analyzer, Config
    from fastdist.worker.outcomes import Parts
    from fastdist.worker.upstream import AnalyzerConnection

RAMP_STEP = 0.25  # seconds: how often weights are looked at while an analyzer starts slowly
CHECK = 0.1  # seconds: how often connections and waiting lists are looked at
PRUNING_NS = 1_000_000_000  # how often idle connections are
OVERLOAD = 0.85  # of the time busy: this process is the bottleneck
CLAIMS_AHEAD = 4  # times what can be in flight: how much is claimed then
MAX_GRACE = 1.0  # seconds that it counts as the bottleneck after it was
SCHEDSTAT = "/proc/thread-self/schedstat"  # ns that this thread ran and waited for a processor, and how often
SLOW = 3.0  # times the others' latency
SLOW_FOR_NS = 400_000_000  # at a stretch: a hiccup does not make an analyzer slow


class Dispatcher(Outcomes):
    """Gives packets to analyzers."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,  # noqa: ARG002  (taken by __cinit__)
        ring: PacketRing,  # noqa: ARG002
        states: AnalyzerStates,
        config: Config,
        *,
        poller: Poller,
        **parts: Unpack[Parts],
    ) -> None:
        super().__init__(states, config, **parts)
        self.poller, self.names = poller, Names()
        self._max_connections = max_upstream_connections(config.server.max_connections)
        self.room = self._max_connections  # for connections that may still be opened, till the next check
        self.shortage = Shortage()  # that kept connections from being opened
        self._short = False  # since the last check
        self.retired: list[AnalyzerPool] = []  # of analyzers that were removed, until their connections are closed
        self.online: set[int] = set()
        self.tls = Contexts()
        self._next_pruning = self._ramp_looked = self._resume_at = 0
        self._load = LoadMeter()
        self._slow_since: dict[int, int] = {}  # slot -> monotonic ns
        self._judged: tuple[set[int], bool] = (set(), True)
        self._overloaded_at = 0  # monotonic ns: when this process was last overloaded
        self._all_in_flight = 0  # how many packets the analyzers in the table may have at once
        self.tasks = (
            Task(Step.DELIVERIES, CHECK, Sweep(self._begin_checks, self._check).go_on),
            Task(Step.DELIVERIES, CHECK, self._measure_load),
            Task(Step.DELIVERIES, CHECK, self._judge),
            Task(Step.DELIVERIES, RAMP_STEP, self._ramp),
            Task(Step.DELIVERIES, CHECK, self._share_descriptors),
            Task(Step.DELIVERIES, TICK, self.tick),
        )

    def set_analyzers(self, analyzers: Mapping[int, Analyzer]) -> None:
        """Deliver to these analyzers (by slot) from now on."""
        for slot in range(len(self.pools)):
            pool, analyzer = self.pools[slot], analyzers.get(slot)
            if analyzer is None or (
                pool is not None and pool.analyzer != analyzer and pool.analyzer.endpoint != analyzer.endpoint
            ):
                self._retire(slot)
                pool = None
            if analyzer is not None and pool is None:
                pool = self.pools[slot] = AnalyzerPool(self.ring, self.counters, self.analyzer_states, slot, self)
            if analyzer is not None:
                tls = self.tls.of(analyzer) if analyzer.address.scheme == "https" else None
                pool.set_up(analyzer, self.config.delivery, tls)
        self.tls.keep(analyzers.values())
        self.analyzers = dict(analyzers)
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
        """Rebuild the table from the analyzers' present states and weights."""
        now = time.monotonic_ns()
        states = self.analyzer_states
        self.weights = effective_weights(states, self.analyzers, self.config.health, now)
        self.probation.refresh(self.analyzers)
        online = {slot for slot in self.analyzers if states.is_online(slot)}
        paused = {slot: until for slot in online if (until := states.get(slot, AnalyzerWord.PAUSED_UNTIL_NS)) > now}
        self._resume_at = min(paused.values(), default=0)
        pickable = self.weights
        if self._sticky:  # a paused analyzer keeps its emitters: their packets wait for it
            held = {slot: max(states.weight(slot), 0.0) for slot in paused if states.is_pickable(slot)}
            pickable = pickable | {slot: weight for slot, weight in held.items() if weight > 0}
        for slot in self.analyzers:
            pool = self.pools[slot]
            pool.paused = slot in paused
            if slot not in pickable and pool.waiting and not self.probation.is_trying(slot):
                pool.release_waiting()
        if self._sticky:
            self.set_table(None, self.rendezvous_of(pickable))
        else:
            self.set_table(AliasTable(list(pickable), list(pickable.values())) if pickable else None, None)
        self.any_pickable = any(states.is_pickable(slot) for slot in self.analyzers)
        self._second_opinions.clear()
        if online - self.online:
            self.end_back_offs()
        self.online = online
        for slot in pickable:
            self.touch(self.pools[slot])
        self._all_in_flight = sum(max_in_flight(self.pools[slot].delivery) for slot in self.weights)

    @property
    def _sticky(self) -> bool:
        return self.config.distribution.strategy == "sticky"

    # ---- probation

    def begin_trials(self) -> None:
        """Give a packet each to the analyzers that may be tried; without one, look again in the next flush."""
        if not self.ring.has_more:
            return
        self.trials_due = False  # tick looks again
        now = time.monotonic_ns()
        due = self.probation.due(now)
        for slot in random.sample(due, len(due)):  # so that the time does not always run out for the same one
            if time.monotonic_ns() - now > self.part_ns:
                break
            weights = self._weights_with(slot, now)
            if slot in weights:
                self._try(self.pools[slot], weights, now)

    def _weights_with(self, slot: int, now_ns: int) -> dict[int, float]:
        """Return the weights as if this one were online; without it if it is paused, or of weight 0 beside others."""
        return effective_weights(self.analyzer_states, self.analyzers, self.config.health, now_ns, also=slot)

    def _try(self, pool: AnalyzerPool, weights: Mapping[int, float], now_ns: int) -> None:
        handle = choose(self.ring, pool.slot, self.rendezvous_of(weights) if self._sticky else None)
        if not handle:
            return
        if not self.probation.begin(pool, self.ring.sequence(handle), now_ns):
            self.ring.release(handle)
            return
        pool.paused = False
        pool.watch(handle)
        pool.prepend(handle, apart=True)
        self.touch(pool)

    def wants_trial(self) -> bool:
        """Whether an analyzer on probation waits for a packet."""
        now = time.monotonic_ns()
        return any(slot in self._weights_with(slot, now) for slot in self.probation.due(now))

    # ---- upkeep

    @property
    def stalled(self) -> int:
        """How many packets wait for a back-off, or for an analyzer that is paused or slow, and hold up no others."""
        if not self.weights:
            return 0
        waiting = sum(pool.waiting for pool in self.pools_waiting() if pool.paused or pool.slow)
        return len(self.backing_off) + int(waiting)

    def short_of(self, lacking: OSError) -> None:
        """Note that this process lacks something for a connection, which the pool retries in a moment."""
        self.shortage.last, self._short = lacking, True

    def _share_descriptors(self, _now_ns: int) -> None:
        """Leave some for emitters; while there are too few for analyzers, close idle connections."""
        self.room = self._max_connections
        pools = [pool for pool in (*self.pools, *self.retired) if pool is not None]
        many = sum(pool.connection_limit for pool in pools) > self._max_connections
        if many or self._short:
            if self._short:
                self._short = False
                for pool in pools:
                    pool.close_idle()
            if many:
                self.room -= sum(pool.open_connections + pool.opening for pool in pools)

    def dead_letter_all(self, progress: Callable[[], object] = lambda: None) -> int:
        """Make all packets that are left dead letters (reason ``shutdown``); return how many. Raises OSError."""
        self.stop()
        self.give_back()
        undone = self.ring.undone
        self.dead_letter_writer.write_all(what_is_left(self.ring), progress)
        return undone

    def tick(self, now_ns: int) -> None:
        """Run what cannot wait: back-offs, trials, changes of states, pauses that end, and spills."""
        if self.returned or self.backed_off or (self.backing_off and self.backing_off[0][0] <= now_ns):
            self.go_on()
        self.trials_due = self.probation.tick(now_ns)
        if self.trials_due and self.ring.has_more:
            self.schedule()
        if self.analyzer_states.epoch != self.seen_epoch or (self._resume_at and now_ns >= self._resume_at):
            self._resume_at = 0
            self.seen_epoch = -1  # the flush refreshes
            self.schedule()
        self.spill_at(now_ns)

    def _ramp(self, now_ns: int) -> None:
        """Give analyzers that start slowly more of their weight."""
        if not self.config.health.slow_start:
            return
        looked, self._ramp_looked = self._ramp_looked, now_ns  # however late this look is, the last one counts
        online_since = [self.analyzer_states.get(slot, AnalyzerWord.ONLINE_SINCE_NS) for slot in self.analyzers]
        if any(since and looked - since < self.config.health.slow_start * 1e9 for since in online_since):
            self.seen_epoch = -1
            self.schedule()

    def _begin_checks(self, now_ns: int) -> list[AnalyzerConnection]:
        """Return the connections whose time-outs are to be checked: idle ones seldom."""
        pools: list[AnalyzerPool] = self.retired
        self.retired = [pool for pool in pools if pool.open_connections or pool.opening]
        idle_too = now_ns >= self._next_pruning
        if idle_too:
            self._next_pruning = now_ns + PRUNING_NS
        return [
            each for pool in (*pools, *self.pools_in_use(idle_too)) for each in pool.look(now_ns, idle_too=idle_too)
        ]

    def _check(self, connection: AnalyzerConnection, _now_ns: int) -> None:
        try:
            connection.check()
        except Exception as error:  # noqa: BLE001  (whatever it is, deliveries go on)
            self.went_wrong(error)

    def _measure_load(self, now_ns: int) -> None:
        if self._load.measure(now_ns) > OVERLOAD:
            self._overloaded_at = now_ns

    def _judge(self, now_ns: int) -> None:
        """Find which analyzers are slow, and whether this process is the bottleneck: both decide what spills."""
        self._second_opinions.clear()
        slow = self._slow_for_long(now_ns)
        steady = self._limit_claims(now_ns, lift=bool(slow))
        if (slow, steady) != self._judged:
            self._judged = (slow, steady)
            for slot in self.analyzers:
                self.pools[slot].slow = slot in slow
            self.judge(steady)
            self.schedule()  # what may go elsewhere now goes at once

    def _limit_claims(self, now_ns: int, *, lift: bool) -> bool:
        """Leave the backlog in the ring while this process is the bottleneck, and shortly after; return if it is not.

        Lists would grow by weight although no analyzer is slow, and packets age in them. ``lift``: an analyzer is slow,
        and must not hold up the claiming for the others.
        """
        grace = min(self.config.delivery.spill_after, MAX_GRACE)
        steady = now_ns - self._overloaded_at > grace * 1e9
        if steady or lift:
            self.claim_limit = UNLIMITED
        else:
            self.claim_limit = CLAIMS_AHEAD * (self._all_in_flight or max_in_flight(self.config.delivery))
        if self.ring.has_more:
            self.schedule()
        return steady

    def _slow_for_long(self, now_ns: int) -> set[int]:
        """Return the slots of analyzers that packets wait for, and that have been slow at a stretch."""
        waiting = self.pools_waiting()
        for pool in waiting:
            if not (pool.requests_in_flight or pool.opening):
                self.wake(pool)  # as it should be already: after an error they must not wait for ever
        if not (waiting or self._slow_since):
            return set()
        slow = self._slow_among(waiting, now_ns)
        self._slow_since = {slot: self._slow_since.get(slot, now_ns) for slot in slow}
        return {slot for slot, since in self._slow_since.items() if now_ns - since >= SLOW_FOR_NS}

    def _slow_among(self, waiting: list[AnalyzerPool], now_ns: int) -> set[int]:
        """Return the slots of those that cannot be reached, or take much longer to reply than the others do."""
        latencies = sorted(self.pools[slot].latency(now_ns) for slot in self.weights)
        # No median of the others is below this: most analyzers need no search for theirs.
        least = min(median_of_others(latencies, each) for each in (*latencies[-1:], None))
        slow = set()
        for pool in waiting:
            mine = pool.latency(now_ns) if pool.requests_in_flight else math.inf
            if mine <= SLOW * least:
                continue
            known = pool.requests_in_flight and pool.slot in self.weights
            if mine > SLOW * median_of_others(latencies, mine if known else None):
                slow.add(pool.slot)
        return slow

    def stop(self) -> None:
        """Send nothing from here on, and close all connections: what is in flight goes back to the ring."""
        self.set_analyzers({})
        for pool in self.retired:
            pool.close()


def median_of_others(ordered: Sequence[float], one: float | None) -> float:
    """Return the median of ``ordered`` without ``one`` of its values (None: of all); infinity if that leaves nothing.

    In constant time but for the search: it is asked for each of perhaps a thousand analyzers.
    """
    left_out = len(ordered) if one is None else bisect_left(ordered, one)
    count = len(ordered) - (one is not None)
    if count == 0:
        return math.inf
    low, high = ((at + (at >= left_out)) for at in ((count - 1) // 2, count // 2))
    return (ordered[low] + ordered[high]) / 2


class LoadMeter:
    """How busy this thread, the event loop's, is: the part of the time it ran or waited for a processor."""

    def __init__(self) -> None:
        self._last = (0, 0)
        try:
            self._fd = os.open(SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)  # stays open: that takes longer than all else
        except OSError:  # a kernel without it
            self._fd = -1

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def measure(self, now_ns: int) -> float:
        """Return the load (0..1) since the last call."""
        busy = busy_ns(self._fd)
        if busy < 0:
            busy = time.thread_time_ns()
        (then_ns, then_busy), self._last = self._last, (now_ns, busy)
        return (busy - then_busy) / max(1, now_ns - then_ns) if then_ns else 0.0
