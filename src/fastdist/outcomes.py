"""Outcomes: what becomes of packets whose delivery failed or was refused, and what that says of their analyzers.

1. A failure speaks against the analyzer; ``fall`` of them in a row, over all workers, take it offline. The packet goes
   at once to another that can be picked and that it has not failed on in this round; when there is none, it backs off
   (exponential, full jitter) and starts a new round. While nobody can be picked it waits in the ring.
2. A refusal speaks against the packet: a dead letter. But an analyzer that has refused ``fall`` packets in a row
   without a 2xx is *in doubt*, and so is one that deliveries took offline: what it refuses then is tried elsewhere.
   Taken there, that was a failure of the first; refused there too, or nobody else online, a dead letter.
3. What has been sent ``max_attempts`` times is a dead letter.
"""

from __future__ import annotations

import heapq
import random
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist._core.dispatch import DispatchBase
from fastdist._core.pick import Rendezvous
from fastdist.deadletter_writer import DeadLetterWriter, Letter
from fastdist.forward import COMPLAINT_SECONDS
from fastdist.probation import Probation
from fastdist.shared import AnalyzerWord
from fastdist.shares import effective_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from fastdist._core.counters import Counters
    from fastdist._core.ring import PacketRing
    from fastdist._core.states import AnalyzerStates
    from fastdist.config import Analyzer, Config
    from fastdist.deadletters import DeadLetters
    from fastdist.forward import AnalyzerPool

SHORTEST_PAUSE = 1.0  # seconds, for a Retry-After that is 0 or just past: it speaks of full seconds
LONGEST_PAUSE = 3600.0  # seconds; a Retry-After beyond that is taken for a mistake

log = logs.get()


class Retrying:
    """What is remembered of a packet that has failed."""

    __slots__ = ("refused_by", "refused_with", "round", "tried")

    def __init__(self) -> None:
        self.refused_by: AnalyzerPool | None = None  # which was not believed
        self.refused_with = 0  # status
        self.tried: set[int] = set()  # slots it failed on in this round
        self.round = 0  # rounds it has backed off


class Outcomes(DispatchBase):
    """Hears of outcomes from the pools. ``settled`` as for ``Dispatcher``, which keeps ``roster`` and ``weights``."""

    def __init__(
        self,
        states: AnalyzerStates,
        config: Config,
        counters: Counters,
        dead_letters: DeadLetters,
        settled: Callable[[int, str | None], None],
    ) -> None:
        self.analyzer_states, self.config, self.counters, self.settled = states, config, counters, settled
        self.roster: dict[int, Analyzer] = {}
        self.weights: dict[int, float] = {}  # of those the table names, by slot
        self.retrying: dict[int, Retrying] = {}  # by sequence
        self.backing_off: list[tuple[int, int]] = []  # a heap of (due, monotonic ns; handle)
        self.probation = Probation(states, config.health.rise)
        self.letters = DeadLetterWriter(dead_letters, counters, self._buried)
        self._warned_ns: dict[int, int] = {}  # slot -> monotonic ns: when to warn again that it refuses everything

    # ---- outcomes, told by the pools

    def delivered(self, pool: AnalyzerPool, sequences: list[int]) -> None:
        """Hear that packets which had failed before, or which an emitter waits for, were delivered."""
        for sequence in sequences:
            self.probation.passed(pool, sequence)
            retrying = self.retrying.pop(sequence, None)
            if retrying is not None and retrying.refused_by not in {None, pool}:
                self._wrongly_refused(retrying, sequence, pool)
            self.settled(sequence, pool.analyzer.id)

    def failed(
        self, pool: AnalyzerPool, handles: list[int], error: str, *, counted: bool, status: int | None = None
    ) -> None:
        """Send packets elsewhere: a request failed with ``error``. ``counted``: it speaks against the analyzer."""
        self.counters.add_to(pool.slot, "failed", len(handles))
        if counted:
            self._count_failure(pool, error)
        for handle in reversed(handles):  # each goes to the front of its new list: the first is to be first again
            self.probation.failed(pool, self.ring.sequence(handle), time.monotonic_ns(), counted=counted)
            self._retry(pool, handle, status, error)
        self.wake(pool)

    def _count_failure(self, pool: AnalyzerPool, error: str) -> None:
        slot, states = pool.slot, self.analyzer_states
        if pool.retired or states.delivery_failed(slot, error) < self.config.health.fall:
            return
        states.go_offline(slot, by_deliveries=True)
        if slot in self.weights:
            pool.paused = True  # until the next flush has taken its packets elsewhere

    def paused_for(self, pool: AnalyzerPool, handles: list[int], status: int, value: str) -> None:
        """Send nothing to the analyzer for a while, as it asks for (429 or 503 with Retry-After)."""
        seconds = retry_after(value)
        if not pool.retired and seconds is not None:
            self.analyzer_states.set_error(pool.slot, f"HTTP {status}, Retry-After: {value[:40]}")
            self.analyzer_states.pause(pool.slot, time.monotonic_ns() + int(seconds * 1e9))
            pool.paused = True
        self.failed(pool, handles, f"HTTP {status}", counted=seconds is None, status=status)

    def refused(self, pool: AnalyzerPool, handles: list[int], status: int, *, batch: bool) -> None:
        """Put a packet that was refused to the dead letters; of a refused batch, find out first which packet it was.

        Those that may not be sent again (``max_attempts``) are dead letters as well: nobody knows whose fault it was.
        """
        error = f"HTTP {status}"
        self.counters.add_to(pool.slot, "failed", len(handles))
        if batch:
            self._note_refusal(pool, error)
            left = [handle for handle in handles if not self._exhausted(pool, handle, status, error)]
            self._send_again(pool, left, alone=True)
        else:
            for handle in handles:
                self._refused_alone(pool, handle, status, error)
        self.wake(pool)

    def not_sent(self, pool: AnalyzerPool, handles: list[int]) -> None:
        """Send packets again that the analyzer has not looked at."""
        error = "connection closed before the reply"
        self._send_again(pool, [handle for handle in handles if not self._exhausted(pool, handle, None, error)])
        self.wake(pool)

    # ---- refusals

    def _refused_alone(self, pool: AnalyzerPool, handle: int, status: int, error: str) -> None:
        packet = self.ring.sequence(handle)
        in_doubt = self._count_refusal(pool)
        self.probation.refused(pool, packet, time.monotonic_ns())
        known = self.retrying.get(packet)
        second = known is not None and known.refused_by not in {None, pool}
        if in_doubt and not second and self._ask_another(pool, handle, status):
            return
        self._note_refusal(pool, error)
        self._bury(pool, handle, "refused", status, error)

    def _note_refusal(self, pool: AnalyzerPool, error: str) -> None:
        """Keep an error for the operator, unless deliveries fail too: what takes the analyzer offline is the reason."""
        states, slot = self.analyzer_states, pool.slot
        if not pool.retired and not states.get(slot, AnalyzerWord.DELIVERY_FAILURES):
            states.set_error(slot, error)

    def _count_refusal(self, pool: AnalyzerPool) -> bool:
        """Count a packet that was refused; return whether the analyzer is in doubt: it takes nothing, as it seems."""
        if pool.retired:
            return False
        slot, states, fall = pool.slot, self.analyzer_states, self.config.health.fall
        refusals = states.delivery_refused(slot)
        if refusals <= fall and not states.needs_trial(slot):
            states.delivery_succeeded(slot)
            return False
        now = time.monotonic_ns()
        if refusals == fall + 1 and now >= self._warned_ns.get(slot, 0):
            self._warned_ns[slot] = now + int(COMPLAINT_SECONDS * 1e9)
            log.warning(
                "an analyzer refuses packet after packet; what it refuses now is tried once elsewhere",
                analyzer=pool.analyzer.id,
                refused=refusals,
            )
        return True

    def _ask_another(self, pool: AnalyzerPool, handle: int, status: int) -> bool:
        """Have another analyzer say whether a packet is at fault; False if there is none, or it was sent too often.

        As if the first were not there: weight 0 helps out where it was the only one with a weight.
        """
        states, limit = self.analyzer_states, self.config.retry.max_attempts
        if limit and self.ring.attempts(handle) >= limit:
            return False
        if not any(states.is_pickable(slot) for slot in self.roster if slot != pool.slot):
            return False
        retrying = self._remember(pool, handle)
        retrying.refused_by, retrying.refused_with = pool, status
        others = {slot: analyzer for slot, analyzer in self.roster.items() if slot not in retrying.tried}
        weights = effective_weights(states, others, self.config.health, time.monotonic_ns())
        believed = {s: weight for s, weight in weights.items() if states.refusals(s) <= self.config.health.fall}
        self._pass_on(handle, retrying, believed or weights)
        return True

    def _wrongly_refused(self, retrying: Retrying, sequence: int, taker: AnalyzerPool) -> None:
        """Hold it against an analyzer that it has refused what another has taken."""
        pool = retrying.refused_by
        assert pool is not None  # noqa: S101  (the caller has looked)
        self._count_failure(pool, f"HTTP {retrying.refused_with}, but {taker.analyzer.id} took the packet")
        self.probation.failed(pool, sequence, time.monotonic_ns())
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
        retrying = self._remember(pool, handle)
        states, tried = self.analyzer_states, retrying.tried
        others = {
            slot: weight for slot, weight in self.weights.items() if slot not in tried and states.is_pickable(slot)
        }
        self._pass_on(handle, retrying, others)

    def _remember(self, pool: AnalyzerPool, handle: int) -> Retrying:
        """Note that an analyzer has not taken a packet, which is sent once more."""
        self._count_retries(pool, 1)
        retrying = self.retrying.setdefault(self.ring.sequence(handle), Retrying())
        retrying.tried.add(pool.slot)
        pool.watch(handle)
        return retrying

    def failed_on(self, handle: int) -> Collection[int]:
        """Return the slots of the analyzers that a packet has failed on in this round."""
        retrying = self.retrying.get(self.ring.sequence(handle))
        return () if retrying is None else retrying.tried

    def _pass_on(self, handle: int, retrying: Retrying, others: Mapping[int, float]) -> None:
        """Have one of ``others`` get a packet, by weight (sticky: the next in the packet's own order), if any."""
        if others:
            if self.config.distribution.strategy == "sticky":
                names = [self.roster[slot].id for slot in others]
                slot = Rendezvous(names, list(others), list(others.values())).pick(self.ring.packet(handle).emitter)
            else:
                slot = random.choices(list(others), list(others.values()))[0]  # noqa: S311
            target = self.pools[slot]
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


def retry_after(value: str) -> float | None:
    """Return how many seconds to pause, as Retry-After (seconds or an HTTP date) says; None for what is neither."""
    if value.isdecimal():
        seconds = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        if date.tzinfo is None:  # the oldest of the three forms names no zone; it is GMT
            date = date.replace(tzinfo=UTC)
        seconds = date.timestamp() - time.time()
    return min(max(seconds, SHORTEST_PAUSE), LONGEST_PAUSE)
