"""What the supervisor tells the workers about the dead letters that are there, for the API and the metrics to show."""

from __future__ import annotations

import msgspec
from msgspec import Struct

LAST = 20  # dead letters that are described
MAX_ERROR = 200  # characters
NEARLY_FULL = 0.8  # of a file system


class Count(Struct, frozen=True, array_like=True):
    """How many there are for one reason, last seen by one analyzer ("": by none)."""

    reason: str
    analyzer: str
    packets: int


class Described(Struct, frozen=True, array_like=True):
    """One of the last dead letters, without its packet and without the analyzer's response. Times are RFC 3339."""

    id: str
    reason: str
    analyzer: str | None
    status: int | None
    error: str | None
    attempts: int
    messages: int
    accepted_at: str
    dead_lettered_at: str
    bytes: int


class Report(Struct, frozen=True, array_like=True):
    """What is there: dead letters and unreadable lines by reason and analyzer, bytes and number of files, the last."""

    counts: tuple[Count, ...] = ()
    bytes: int = 0
    files: int = 0
    last: tuple[Described, ...] = ()  # the latest first
    size: int = 0  # bytes of the file system, 0: unknown
    available: int = 0  # bytes of it that we may still use

    @property
    def packets(self) -> int:
        """How many there are in all."""
        return sum(count.packets for count in self.counts)

    @property
    def used(self) -> float:
        """Which part of the file system is used."""
        return 1 - self.available / self.size if self.size else 0.0

    @property
    def warning(self) -> str:
        """What is wrong with that, while there are dead letters to be removed; empty if nothing is."""
        if self.used < NEARLY_FULL or not self.packets:
            return ""
        return f"the file system of the dead letters is over {NEARLY_FULL:.0%} full"


def encode(report: Report, room: int) -> bytes:
    """Return it as bytes, ``room`` at most: the last are left out, rare analyzers counted together, as needed."""
    while len(data := msgspec.msgpack.encode(report)) > room:
        if report.last:
            report = msgspec.structs.replace(report, last=report.last[: len(report.last) // 2])
        else:
            report = msgspec.structs.replace(report, counts=_summed(report.counts))
    return data


def _summed(counts: tuple[Count, ...]) -> tuple[Count, ...]:
    """Return the larger half of the counts, with the others as those of no analyzer."""
    ordered = sorted(counts, key=lambda count: count.packets, reverse=True)
    kept, others = ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]
    sums: dict[str, int] = {}
    for count in [*others, *(each for each in kept if not each.analyzer)]:
        sums[count.reason] = sums.get(count.reason, 0) + count.packets
    return (
        *(each for each in kept if each.analyzer),
        *(Count(reason, "", packets) for reason, packets in sums.items()),
    )
