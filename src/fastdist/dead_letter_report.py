"""What the supervisor tells the workers about the dead letters that are there, for the API and the metrics to show."""

from __future__ import annotations

from collections import Counter

import msgspec
from msgspec import Struct

LAST = 20  # dead letters that are described
MAX_ERROR = 200  # characters
NEARLY_FULL = 0.8  # of a file system
OTHER = "other"  # than the reasons that are most frequent; files of others may have any


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
    """Return it as bytes, ``room`` at most: the last are left out, rare analyzers and reasons summed up, as needed."""
    while len(data := msgspec.msgpack.encode(report)) > room:
        if report.last:
            report = msgspec.structs.replace(report, last=report.last[: len(report.last) // 2])
        else:
            report = msgspec.structs.replace(report, counts=_summed(report.counts))
    return data


def _summed(counts: tuple[Count, ...]) -> tuple[Count, ...]:
    """Return the rarer half of those of an analyzer as those of none; where none has one, as those of ``OTHER``."""
    of_analyzers = [each for each in counts if each.analyzer]
    ordered = sorted(
        of_analyzers or (each for each in counts if each.reason != OTHER), key=lambda count: count.packets, reverse=True
    )
    sums = Counter({(each.reason, each.analyzer): each.packets for each in counts})
    for each in ordered[len(ordered) // 2 :]:
        packets = sums.pop((each.reason, each.analyzer))
        sums[each.reason if each.analyzer else OTHER, ""] += packets
    return tuple(Count(*kind, packets=packets) for kind, packets in sums.items())
