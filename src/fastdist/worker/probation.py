"""Probation: an analyzer that deliveries took offline has to take a packet before it gets its share again.

Its health check may be good all the while. So once ``rise`` checks in a row have succeeded it is tried with one packet
at a time, over all workers:

1. The worker that claims the analyzer's row may try it (a *trial*). The claim expires, and is renewed while the trial
   is under way, so that a worker that was killed or hangs blocks no other.
2. 2xx: it is online. A failure: the next trial has to wait, twice as long each time (1 s to 30 s). Anything else (a
   kept connection that was stale, Retry-After): another may begin.
3. For picking, the analyzer is offline until then: the others have its share, those of weight 0 help out, and with no
   other online packets wait in the ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastdist._core import AnalyzerStates, PacketRing, Rendezvous
    from fastdist.worker.upstream import AnalyzerPool

HOLD_NS = 3_000_000_000  # after which a trial that was not renewed is over
LOOKED_AT = 64  # packets a trial's is chosen from


class Trial(NamedTuple):
    """A packet on its way to an analyzer on probation. ``refused``: it awaits the verdict of another."""

    pool: AnalyzerPool
    sequence: int
    refused: bool = False

    @property
    def under_way(self) -> bool:
        """Whether the packet may be at the analyzer or on its list; what was sent there before counts as well."""
        return not self.pool.retired and bool(self.pool.waiting or self.pool.requests_in_flight)


class Probation:
    """The analyzers that need a trial, as one worker sees them, and its own trials."""

    def __init__(self, states: AnalyzerStates, rise: int) -> None:
        self._states, self._rise = states, rise
        self._slots: list[int] = []
        self._trials: dict[int, Trial] = {}

    def refresh(self, analyzers: Iterable[int]) -> None:
        """Note which analyzers need a trial."""
        self._slots = [slot for slot in analyzers if self._states.needs_trial(slot)]

    def tick(self, now_ns: int) -> bool:
        """Renew the trials that are under way, end the others; return whether one may begin."""
        if not (self._slots or self._trials):
            return False
        for slot, trial in list(self._trials.items()):
            if trial.refused:
                continue
            if trial.under_way:
                self._states.hold_trial(slot, now_ns + HOLD_NS)
            else:
                del self._trials[slot]
                if not trial.pool.retired:  # else the slot may be another's
                    self._states.end_trial(slot)
        return bool(self.due(now_ns))

    def due(self, now_ns: int) -> list[int]:
        """Return the slots of analyzers that may be tried now."""
        return [slot for slot in self._slots if self._states.may_try(slot, self._rise, now_ns)]

    def begin(self, pool: AnalyzerPool, sequence: int, now_ns: int) -> bool:
        """Take the analyzer's trial for this packet; False if another worker was quicker."""
        if not self._states.begin_trial(pool.slot, self._rise, now_ns, now_ns + HOLD_NS):
            return False
        self._trials[pool.slot] = Trial(pool, sequence)
        return True

    def is_trying(self, slot: int) -> bool:
        """Whether a packet of this worker is on its way there."""
        return slot in self._trials and not self._trials[slot].refused

    @property
    def trying(self) -> bool:
        """Whether a packet of this worker is on its way to any."""
        return any(not trial.refused for trial in self._trials.values())

    def trial(self, pool: AnalyzerPool, sequence: int) -> Trial | None:
        """Return the trial with this packet at this analyzer, if there is one."""
        trial = self._trials.get(pool.slot)
        return trial if trial is not None and trial.pool is pool and trial.sequence == sequence else None

    def _take(self, pool: AnalyzerPool, sequence: int) -> bool:
        """End the trial with this packet at this analyzer; False without one."""
        if self.trial(pool, sequence) is None:
            return False
        del self._trials[pool.slot]
        return not pool.retired

    def passed(self, pool: AnalyzerPool, sequence: int) -> None:
        """Note that the analyzer has taken a packet."""
        if self._take(pool, sequence):
            self._states.pass_trial(pool.slot, self._rise)

    def failed(self, pool: AnalyzerPool, sequence: int, now_ns: int, *, counted: bool = True) -> None:
        """Note that a packet has failed there; ``counted``: that speaks against the analyzer."""
        if self._take(pool, sequence):
            if counted:
                self._states.fail_trial(pool.slot, now_ns)
            else:
                self._states.end_trial(pool.slot)

    def refused(self, pool: AnalyzerPool, sequence: int, now_ns: int) -> None:
        """Note that the analyzer has refused a packet: only another's response shows which is at fault."""
        if self._take(pool, sequence):
            self._trials[pool.slot] = Trial(pool, sequence, refused=True)
            self._states.postpone_trial(pool.slot, now_ns)


def choose(ring: PacketRing, slot: int, owners: Rendezvous | None) -> int:
    """Claim the packet for a trial: of the next few the one that was sent least often. Return its handle, 0 for none.

    So a packet that no analyzer takes does not keep all offline. With ``owners`` (sticky: all that are online, and
    ``slot``) it is one that would be the analyzer's own.
    """
    claimed: list[int] = []
    while len(claimed) < LOOKED_AT and (handle := ring.claim()):
        claimed.append(handle)
    fit = [handle for handle in claimed if owners is None or owners.pick(ring.emitter(handle)) == slot]
    chosen = min(fit, key=ring.attempts, default=0)
    for handle in claimed:  # they keep their order
        if handle != chosen:
            ring.release(handle)
    return chosen
