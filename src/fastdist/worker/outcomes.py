"""Outcomes: what becomes of packets whose delivery failed or was refused, and what that says of their analyzers.

1. A failure speaks against the analyzer; ``fall`` of them in a row, over all workers, take it offline. The packet goes
   at once to another that can be picked and that it has not failed on in this round; without such a one it backs off
   (exponential, full jitter) and starts a new round. While no analyzer can be picked it waits in the ring.
2. A refusal speaks against the packet: a dead letter. But an analyzer that has refused ``fall`` packets in a row
   without a 2xx is *in doubt*, and so is one that deliveries took offline: what it refuses then is tried elsewhere.
   Taken there, that was a failure of the first; refused there too, or with no other online, it is a dead letter.
3. What has been sent ``max_attempts`` times is a dead letter.
4. What a failure says of the analyzer counts at once. Its packets may be very many, of many analyzers that fail
   together: they are queued here, and requeued in the next flushes, a part in each.
5. After an error of the program the packet is picked again.
"""

from __future__ import annotations

import heapq
import random
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, NotRequired, Protocol, TypedDict

from fastdist import logs
from fastdist._core import DispatchBase, Rendezvous, Retrying
from fastdist.retry_after import parse_retry_after
from fastdist.shm.block import AnalyzerWord
from fastdist.shm.weights import effective_weights
from fastdist.storage.dead_letter_writer import DeadLetterWriter, PendingDeadLetter
from fastdist.worker.probation import Probation
from fastdist.worker.upstream import LOG_INTERVAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Unpack

    from fastdist._core import AnalyzerStates, Counters, PacketRing
    from fastdist.settings import Analyzer, Config
    from fastdist.storage.dead_letter_files import DeadLetterFiles
    from fastdist.storage.dead_letter_writer import Runner
    from fastdist.worker.upstream import AnalyzerPool

    MakeWriter = Callable[[Callable[[PacketRing, int], None]], "Writer"]

MIN_PAUSE = 1.0  # seconds, for a Retry-After that is 0 or just past: its unit is whole seconds
MAX_PAUSE = 3600.0  # seconds; a Retry-After beyond that is taken for a mistake

log = logs.get()


class Writer(Protocol):
    """What takes dead letters: to files (``DeadLetterWriter``), or to a stream."""

    counters: Counters
    failed: int
    syncing: bool

    def add(self, *dead_letters: PendingDeadLetter) -> None:
        """Make dead letters of claimed packets."""

    def tick(self, now_ns: int) -> None:
        """Go on with what waits."""

    def look(self, now_ns: int) -> None:
        """Look after files."""

    def sync_soon(self) -> None:
        """Let nothing wait for more."""

    def finish(self) -> None:
        """Make safe what was written."""

    def close(self) -> None:
        """Write nothing more."""

    def write_all(self, dead_letters: Iterable[PendingDeadLetter], progress: Callable[[], object]) -> None:
        """Write these and all others now. Raises OSError."""


class Returned(NamedTuple):
    """Packets of a request that was not taken, until all are requeued."""

    pool: AnalyzerPool
    handles: list[int]
    error: str
    status: int | None
    response: bytes | None  # the beginning of its body
    failed: bool  # else the analyzer has not looked at it


class Parts(TypedDict):
    """What a dispatcher is wired to.

    ``dead_letters``: files; or what, given whom to tell of each, returns what takes them.

    ``settled(sequence, analyzer)`` is called for packets that failed or that an emitter waits for, with the id of the
    analyzer that took it, or None for a dead letter. ``run_in_thread``: see ``DeadLetterWriter``.
    ``given_up(reason, analyzer=, status=)`` gets packets that become dead letters, as examples for the log.
    """

    counters: Counters
    dead_letters: DeadLetterFiles | MakeWriter
    settled: Callable[[int, str | None], None]
    run_in_thread: NotRequired[Runner | None]
    given_up: NotRequired[Callable[..., None]]


class Outcomes(DispatchBase):
    """Gets outcomes from the pools. ``Dispatcher`` keeps ``analyzers`` and ``weights``."""

    def __init__(self, states: AnalyzerStates, config: Config, **parts: Unpack[Parts]) -> None:
        self.analyzer_states, self.config, self.counters = states, config, parts["counters"]
        self.settled, self.given_up = parts["settled"], parts.get("given_up", lambda *_, **__: None)
        self.analyzers: dict[int, Analyzer] = {}
        self.weights: dict[int, float] = {}  # of those the table names, by slot
        self.retrying: dict[int, Retrying] = {}  # by sequence
        self.refused_by: dict[
            int, tuple[AnalyzerPool, int]
        ] = {}  # sequence -> the analyzer that is in doubt, and the status
        self.returned: deque[Returned] = deque()
        self.backing_off: list[tuple[int, int]] = []  # a heap of (due, monotonic ns; handle)
        self.backed_off: deque[list[tuple[int, int]]] = deque()  # the same, of those that need not wait any longer
        self.any_pickable = False  # whether an analyzer is online, if only paused
        self.probation = Probation(states, config.health.rise)
        delay = 0.0 if config.queue.durability == "fsync" else config.queue.sync_interval
        dead_letters, run = parts["dead_letters"], parts.get("run_in_thread")
        self.dead_letter_writer: Writer = (
            dead_letters(self._dead_lettered)
            if callable(dead_letters)
            else DeadLetterWriter(dead_letters, self.counters, self._dead_lettered, run, delay)
        )
        self._log_limit = logs.Throttle(LOG_INTERVAL)  # of errors, by kind and line
        self._second_opinions: dict[tuple[int, ...], Rendezvous | None] = {}  # by slots already asked
        self.parts: deque[Callable[[], bool]] = deque((self.requeue_next, self.end_next_back_off))

    # ---- work that is done in parts

    def work_off(self) -> None:
        """Do some of what concerns very many packets; each of ``parts`` says if there was anything."""
        end = time.monotonic_ns() + self.part_ns
        for part in tuple(self.parts):
            while part():
                if time.monotonic_ns() >= end:
                    self.parts.rotate(-1)  # another is first next time
                    self.go_on()
                    return

    def went_wrong(self, error: Exception) -> None:
        """Log an error of the program, from the same line once a minute at most; deliveries go on."""
        lines = traceback.extract_tb(error.__traceback__)[-1:]
        if self._log_limit.allow((type(error), *((line.filename, line.lineno) for line in lines))):
            log.error("an error in fastdist while it deals with deliveries; no packet is lost", exc_info=error)

    # ---- outcomes, reported by the pools

    def delivered(self, pool: AnalyzerPool, sequences: list[int]) -> None:
        """Note that packets which had failed before, or which an emitter waits for, were delivered."""
        for sequence in sequences:
            try:
                self.probation.passed(pool, sequence)
                self.retrying.pop(sequence, None)
                if sequence in self.refused_by:
                    self._refused_before(sequence, pool)
                self.settled(sequence, pool.analyzer.id)
            except Exception as error:  # noqa: BLE001  (whatever it is, the others must be settled too)
                self.went_wrong(error)

    def failed(  # noqa: PLR0913  (as the core calls it)
        self,
        pool: AnalyzerPool,
        handles: list[int],
        error: str,
        *,
        counted: bool,
        status: int | None = None,
        response: bytes | None = None,
    ) -> None:
        """Send packets elsewhere: a request failed with ``error``. ``counted``: it speaks against the analyzer."""
        error = pool.analyzer.without_secrets(error)
        self.counters.add_to(pool.slot, "failed", len(handles))
        if counted:
            self._count_failure(pool, error)
        if self.probation.is_trying(pool.slot):
            for handle in handles:
                self.probation.failed(pool, self.ring.sequence(handle), time.monotonic_ns(), counted=counted)
        self._return(Returned(pool, handles.copy(), error, status, response, failed=True), handles)

    def _return(self, returned: Returned, handles: list[int]) -> None:
        """Requeue packets in the next flushes; from here on the caller does not own them any more."""
        self.returned.append(returned)
        handles.clear()
        self.go_on()
        self.wake(returned.pool)

    def _count_failure(self, pool: AnalyzerPool, error: str) -> None:
        slot, states = pool.slot, self.analyzer_states
        if pool.retired or states.delivery_failed(slot, error) < self.config.health.fall:
            return
        states.go_offline(slot, by_deliveries=True)
        if slot in self.weights:
            pool.paused = True  # until the next flush has taken its packets elsewhere

    def paused_for(
        self, pool: AnalyzerPool, handles: list[int], status: int, value: str, *, response: bytes | None = None
    ) -> None:
        """Send nothing to the analyzer for a while, as it asks for (429 or 503 with Retry-After)."""
        seconds = pause_of(value)
        if not pool.retired and seconds is not None:
            self.analyzer_states.set_error(pool.slot, f"HTTP {status}, Retry-After: {value[:40]}")
            self.analyzer_states.pause(pool.slot, time.monotonic_ns() + int(seconds * 1e9))
            pool.paused = True
        self.failed(pool, handles, f"HTTP {status}", counted=seconds is None, status=status, response=response)

    def refused(
        self, pool: AnalyzerPool, handles: list[int], status: int, *, batch: bool, response: bytes | None = None
    ) -> None:
        """Make a packet that was refused a dead letter; of a refused batch, find out first which packet it was.

        A trial's batch has but one, and what that tells is of the analyzer: it is not sent as single.
        Those that may not be sent again (``max_attempts``) are dead letters as well: which one was at fault is unknown.
        """
        error = f"HTTP {status}"
        self.counters.add_to(pool.slot, "failed", len(handles))
        trial = self.probation.trial(pool, self.ring.sequence(handles[0])) if len(handles) == 1 else None
        if batch and (trial is None or trial.refused):
            self._note_refusal(pool, error)
            self._send_again(Returned(pool, handles, error, status, response, failed=True), alone=True)
        while handles:
            self._refused_alone(pool, handles[-1], status, response)
            handles.pop()
        self.wake(pool)

    def not_sent(self, pool: AnalyzerPool, handles: list[int]) -> None:
        """Send packets again that the analyzer has not looked at."""
        error = "connection closed before the reply"
        self._return(Returned(pool, handles.copy(), error, None, None, failed=False), handles)

    # ---- refusals

    def _refused_alone(self, pool: AnalyzerPool, handle: int, status: int, response: bytes | None) -> None:
        packet = self.ring.sequence(handle)
        in_doubt = self._count_refusal(pool)
        self.probation.refused(pool, packet, time.monotonic_ns())
        first, _ = self.refused_by.get(packet, (pool, 0))
        if in_doubt and first is pool and self._ask_another(pool, handle, status):
            return
        error = f"HTTP {status}"
        self._note_refusal(pool, error)
        self._dead_letter(handle, "refused", Returned(pool, [], error, status, response, failed=True))

    def _note_refusal(self, pool: AnalyzerPool, error: str) -> None:
        """Keep an error for the operator, unless deliveries fail too: what takes the analyzer offline is the reason."""
        states, slot = self.analyzer_states, pool.slot
        if not pool.retired and not states.get(slot, AnalyzerWord.DELIVERY_FAILURES):
            states.set_error(slot, error)

    def _count_refusal(self, pool: AnalyzerPool) -> bool:
        """Count a packet that was refused; return whether the analyzer is in doubt: it seems to refuse everything."""
        if pool.retired:  # perhaps because it refused everything
            return True
        slot, states, fall = pool.slot, self.analyzer_states, self.config.health.fall
        refusals = states.delivery_refused(slot)
        if refusals <= fall and not states.needs_trial(slot):
            states.delivery_succeeded(slot)
            return False
        return True

    def _ask_another(self, pool: AnalyzerPool, handle: int, status: int) -> bool:
        """Have another analyzer say whether a packet is at fault; False without one, or if it was sent too often.

        As if the first were not there: weight 0 helps out where it was the only one with a weight.
        """
        states, limit = self.analyzer_states, self.config.retry.max_attempts
        if limit and self.ring.attempts(handle) >= limit:
            return False
        if not any(states.is_pickable(slot) for slot in self.analyzers if slot != pool.slot):
            return False
        retrying = self._remember(pool, handle)
        self.refused_by[self.ring.sequence(handle)] = pool, status
        candidates = self._second_opinion(retrying.tried())
        self._pass_on(handle, retrying, self.pick_from(candidates, handle, retrying) if candidates else -1, apart=True)
        return True

    def _second_opinion(self, asked: tuple[int, ...]) -> Rendezvous | None:
        """Return which others may be asked, cached for a moment; first those not in doubt themselves."""
        if asked not in self._second_opinions:
            states = self.analyzer_states
            others = {slot: analyzer for slot, analyzer in self.analyzers.items() if slot not in asked}
            weights = effective_weights(states, others, self.config.health, time.monotonic_ns())
            believed = {s: weight for s, weight in weights.items() if states.refusals(s) <= self.config.health.fall}
            self._second_opinions[asked] = self.rendezvous_of(believed or weights)
        return self._second_opinions[asked]

    def rendezvous_of(self, weights: Mapping[int, float]) -> Rendezvous | None:
        """Return what gives each emitter one of these analyzers (weights by slot), None without any."""
        names = [self.analyzers[slot].id for slot in weights]
        return Rendezvous(names, list(weights), list(weights.values())) if weights else None

    def _refused_before(self, sequence: int, taker: AnalyzerPool) -> None:
        """Count a failure of an analyzer that has refused what another has taken."""
        pool, status = self.refused_by.pop(sequence)
        if pool is taker:
            return
        self._count_failure(pool, f"HTTP {status}, but {taker.analyzer.id} took the packet")
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

    def requeue_next(self) -> bool:
        """Requeue a packet that failed, or those of a request no analyzer looked at; False without any."""
        if not self.returned:
            return False
        returned = self.returned[0]
        handles = returned.handles
        try:
            if not returned.failed:
                self._send_again(returned)
            elif handles:  # each goes to the front of its new list, so that the first is first again
                self._retry(handles[-1], returned)
                handles.pop()
        except Exception as error:  # noqa: BLE001  (whatever it is, the packet must be sent again)
            self.went_wrong(error)
            if handles:
                self.ring.release(handles.pop())
        if not handles:
            self.returned.popleft()
        return True

    def _send_again(self, returned: Returned, *, alone: bool = False) -> None:
        """Send packets to the same analyzer before all others, or to the one picked if it gets none now."""
        pool, handles = returned.pool, returned.handles
        while handles:
            if not self._exhausted(handles[-1], returned):
                self._count_retries(pool, 1)
                pool.prepend(handles[-1], alone)
            handles.pop()
        if pool.retired or pool.slot not in self.weights:
            pool.release_waiting()

    def _exhausted(self, handle: int, returned: Returned) -> bool:
        """Make a packet that has been sent ``max_attempts`` times a dead letter; return whether it was one."""
        limit = self.config.retry.max_attempts
        if not limit or self.ring.attempts(handle) < limit:
            return False
        self._dead_letter(handle, "exhausted", returned)
        return True

    def _retry(self, handle: int, returned: Returned) -> None:
        if self._exhausted(handle, returned):
            return
        retrying = self._remember(returned.pool, handle)
        self._pass_on(handle, retrying, self.another(handle, retrying))

    def _remember(self, pool: AnalyzerPool, handle: int) -> Retrying:
        """Note that an analyzer has not taken a packet, which will be sent once more."""
        self._count_retries(pool, 1)
        sequence = self.ring.sequence(handle)
        retrying = self.retrying.get(sequence)
        if retrying is None:
            retrying = self.retrying[sequence] = Retrying()
        retrying.add(pool.slot)
        pool.watch(handle)
        return retrying

    def failed_on(self, handle: int) -> Retrying | None:
        """Return where a packet has failed in this round."""
        return self.retrying.get(self.ring.sequence(handle))

    def make_takers(self) -> Rendezvous | None:
        """Return the analyzers that get packets now."""
        return self.rendezvous_of(self.weights)

    def _pass_on(self, handle: int, retrying: Retrying, slot: int, *, apart: bool = False) -> None:
        """Queue a packet for the analyzer in ``slot``; -1: none can take it now. ``apart``: in no batch with others."""
        if slot >= 0:
            target = self.pools[slot]
            self.touch(target)
            target.prepend(handle, apart=apart)
        elif not self.any_pickable:
            retrying.clear()
            self.ring.release(handle)  # all are offline: it waits in the ring for the first that comes back
        else:
            retry = self.config.retry
            retrying.rounds += 1
            delay = random.uniform(0, min(retry.cap, retry.base * 2 ** min(retrying.rounds - 1, 60)))  # noqa: S311
            heapq.heappush(self.backing_off, (time.monotonic_ns() + int(delay * 1e9), handle))

    def end_back_offs(self) -> None:
        """End the back-off of all packets: they are picked again."""
        if self.backing_off:
            self.backed_off.append(self.backing_off)
            self.backing_off = []
            self.go_on()

    def end_next_back_off(self) -> bool:
        """Release a packet whose back-off has expired; False without any."""
        if self.backed_off:
            heap = self.backed_off[0]
        elif self.backing_off and self.backing_off[0][0] <= time.monotonic_ns():
            heap = self.backing_off
        else:
            return False
        handle = heapq.heappop(heap)[1]
        if self.backed_off and not self.backed_off[0]:
            self.backed_off.popleft()
        retrying = self.retrying.get(self.ring.sequence(handle))
        if retrying is not None:
            retrying.clear()
        self.ring.release(handle)
        return True

    def give_back(self) -> None:
        """Give all packets that wait here back to the ring."""
        for returned in self.returned:
            for handle in returned.handles:
                self.ring.release(handle)
        self.returned.clear()
        self.end_back_offs()
        while self.end_next_back_off():
            pass

    def lost(self, sequence: int) -> None:
        """Forget a packet that was damaged in the queue."""
        self.retrying.pop(sequence, None)
        self.refused_by.pop(sequence, None)

    # ---- dead letters

    def _dead_letter(self, handle: int, reason: str, last: Returned) -> None:
        analyzer, response = last.pool.analyzer, last.response
        if response and analyzer.has_secrets:  # which it may have sent back
            text = analyzer.without_secrets(response.decode("utf-8", "surrogateescape"))
            response = text.encode("utf-8", "surrogateescape")
        self.given_up(reason, analyzer=analyzer.id, status=last.status)
        pending = PendingDeadLetter(self.ring, handle, reason, analyzer.id, last.status, last.error, response)
        self.dead_letter_writer.add(pending)

    def _dead_lettered(self, ring: PacketRing, sequence: int) -> None:
        if ring is self.ring:  # not an old one
            self.retrying.pop(sequence, None)
            self.refused_by.pop(sequence, None)
            try:
                self.settled(sequence, None)
            except Exception as error:  # noqa: BLE001  (whatever it is, the other dead letters must leave the ring)
                self.went_wrong(error)


def pause_of(value: str) -> float | None:
    """Return how many seconds to pause, as Retry-After says; None for what is neither seconds nor an HTTP date."""
    seconds = parse_retry_after(value)
    return None if seconds is None else min(max(seconds, MIN_PAUSE), MAX_PAUSE)
