"""What a ``Snapshot`` says of one worker, analyzer or protocol."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from fastdist.shm.block import HUNG, WorkerState

if TYPE_CHECKING:
    from fastdist.settings import Analyzer

FIRST_ERROR = 400  # of statuses


def signal_name(number: int) -> str:
    """Return what a signal is called; its number for those that have no name (real-time signals)."""
    names = {int(each): each.name for each in signal.Signals}
    return names.get(number, str(number))


class Rates(NamedTuple):
    """Packets a second."""

    accepted: float
    delivered: float


class WorkerFigures(Struct, frozen=True):
    """What is shown of a worker; ``oldest_ns`` is as ``age`` takes it, ``end_ns`` wall clock; 0 for none.

    ``lacking``: bytes that have to become free until there is room for one more packet like the last.
    ``end_status`` and ``end_ns`` are of the process before this one, if there was one: see ``WorkerWord``.
    """

    id: int
    pid: int
    state: WorkerState
    restarts: int
    cpu_ns: int
    cpu_percent: float
    rss_bytes: int
    accepted: int
    delivered: int
    queued: int
    queue_bytes: int
    capacity_bytes: int
    undone: int
    oldest_ns: int
    storage_fault: int  # errno, 0: packets can be stored
    dead_letters_fault: int  # errno, 0: dead letters can be written
    lacking: int
    end_status: int
    end_ns: int

    @property
    def running(self) -> bool:
        """Whether it serves."""
        return self.state in {WorkerState.RUNNING, WorkerState.DRAINING}

    @property
    def ended(self) -> str:
        """How the process before the present one ended, unasked; empty if none did."""
        if not self.end_ns:
            return ""
        if self.end_status == HUNG:
            return "it hung and was killed"
        if self.end_status < 0:
            return f"ended by signal {signal_name(-self.end_status)}"
        return f"ended with exit status {self.end_status}"


class ProtocolFigures(NamedTuple):
    """What has come of requests in an agents' protocol: records that were accepted, responses by status."""

    records: int
    statuses: dict[int, int]

    @property
    def requests(self) -> int:
        """All of them."""
        return sum(self.statuses.values())

    @property
    def refused(self) -> int:
        """Those that were answered with an error."""
        return sum(count for status, count in self.statuses.items() if status >= FIRST_ERROR)


class AnalyzerFigures(Struct, frozen=True):
    """What every view shows of an analyzer: its shares, and counts over all workers."""

    slot: int
    analyzer: Analyzer
    weight: float
    weight_overridden: bool
    online: bool
    on_probation: bool
    draining: bool
    target_share: float
    effective_share: float
    actual_share: float
    delivered: int
    failed: int
    retried: int
    in_flight: int
    connections: int

    @property
    def state(self) -> str:
        """One word; the administrator's setting comes before the state."""
        return "draining" if self.draining else "online" if self.online else "offline"
