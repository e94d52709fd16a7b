"""Dispatching: what the table looks like, and which packets leave the analyzer they were picked for.

The hot path (claim, pick, wait, send) is compiled (``DispatchBase``); what becomes of packets that are not taken is
said in ``Outcomes``. Here is the rest:

- while no analyzer can be picked packets stay in the ring, and what was picked for one that is gone is picked anew;
- a packet that has waited ``spill_after`` for its analyzer goes to another that has room (compiled, too);
- an analyzer on probation gets one packet at a time (``fastdist.probation``).
"""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING

from fastdist._core.pick import AliasTable, Rendezvous
from fastdist.deadletter_writer import what_is_left
from fastdist.forward import AnalyzerPool
from fastdist.names import Names
from fastdist.outcomes import Outcomes
from fastdist.probation import choose
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

RAMP_STEP_NS = 250_000_000  # how often weights are looked at while an analyzer starts slowly
CHECK_NS = 100_000_000  # how often connections and waiting lists are looked at
PRUNING_NS = 1_000_000_000  # how often idle connections are
RELAXATION = 0.01  # a second: how much slower an analyzer may become before that counts as its usual speed


class Dispatcher(Outcomes):
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
        super().__init__(states, config, counters, dead_letters, settled)
        self.poller, self.names = poller, Names()
        self.retired: list[AnalyzerPool] = []  # of analyzers that were removed, until their connections are closed
        self.online: set[int] = set()
        self._tls: ssl.SSLContext | None = None
        self._next_check = self._next_pruning = self._next_ramp = self._ramp_looked = 0
        self._resume_at = 0

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
        self.probation.refresh(self.roster)
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
            if slot not in pickable and pool.waiting and not self.probation.is_trying(slot):
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

    # ---- probation

    def begin_trials(self) -> None:
        """Give a packet each to the analyzers that may be tried; without one, look again in the next flush."""
        if not self.ring.has_more:
            return
        self.trials_due = False  # tick looks again
        now = time.monotonic_ns()
        for slot in self.probation.due(now):
            weights = effective_weights(self.analyzer_states, self.roster, self.config.health, now, also=slot)
            if slot in weights:  # not paused, nor of weight 0 where others are online
                self._try(self.pools[slot], weights, now)

    def _try(self, pool: AnalyzerPool, weights: Mapping[int, float], now_ns: int) -> None:
        sticky = self.config.distribution.strategy == "sticky"
        handle = choose(self.ring, self.roster, pool.slot, weights if sticky else None)
        if not handle:
            return
        if not self.probation.begin(pool, self.ring.sequence(handle), now_ns):
            self.ring.release(handle)
            return
        pool.paused = False
        pool.watch(handle)
        pool.prepend(handle, alone=True)
        self.touch(pool)

    # ---- upkeep

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

    def tick(self, now_ns: int) -> None:
        """Do what time asks for: back-offs, time-outs, spills, pauses and slow starts that end."""
        if self.backing_off:
            self._end_back_off(now_ns)
        self.letters.tick(now_ns)
        self.trials_due = self.probation.tick(now_ns)
        if self.trials_due and self.ring.has_more:
            self.schedule()
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
