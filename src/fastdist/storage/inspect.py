"""Looking at a queue that no fastdist is using: is it sound, and what waits in it.

Nothing is ever changed: locks are only borrowed (the folder's, and each ring's while it is read), files are opened for
reading, and a ring is recovered on a private copy of its pages. What is damage and what can be delivered in spite of it
is thus judged by the same code that will take the queue over. A start waits until the reading is over.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from fastdist._core import PacketRing, RingError
from fastdist.errors import FastdistError
from fastdist.storage import format1, locks
from fastdist.storage.directory import LOCK, SUFFIX
from fastdist.storage.files import files_in, is_irregular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class NoQueueError(FastdistError):
    """There is no queue where one was looked for."""


class InUseError(FastdistError):
    """A running fastdist has the queue: what its files say at any moment is not meant for others."""


class Damage(msgspec.Struct, rename="camel"):
    """A place that is not as it was written: its offset in the file, and what was found there."""

    offset: int
    what: str


class RingReport(msgspec.Struct, rename="camel", kw_only=True):
    """A file of a queue: what waits in it, and what is wrong with it (``error``: it is no ring at all)."""

    file: str
    packets: int = 0
    bytes: int = 0  # of their records
    capacity_bytes: int = 0
    corrupt: int = 0  # records (or what was taken for one) that are lost
    damage: list[Damage] = []
    notes: list[Damage] = []  # what a kill may leave, and costs nothing
    error: str | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing of it is damaged."""
        return not self.damage and self.error is None


class WaitingPacket(msgspec.Struct, rename="camel", kw_only=True):
    """A packet that waits to be delivered."""

    file: str
    id: str
    accepted_at: datetime
    attempts: int
    messages: int
    bytes: int  # of its body


class QueueView(msgspec.Struct):
    """A queue as it was found; ``packets`` are the oldest ones, ``set_aside`` files an earlier start gave up on."""

    files: list[RingReport]
    packets: list[WaitingPacket]
    set_aside: list[str]

    @property
    def sound(self) -> bool:
        """Whether all files are sound."""
        return all(report.sound for report in self.files)


def look(path: Path, max_packets: int = 0) -> QueueView:
    """Return what there is in ``path``, a queue's folder or one file of it, with at most so many of its packets.

    Raises NoQueueError, InUseError, and OSError for what cannot be read.
    """
    is_folder = path.is_dir()
    if not is_folder and (SUFFIX not in path.name or not path.exists()):
        raise NoQueueError(f"no queue in {path}")
    folder = path if is_folder else path.parent
    with _borrowed_lock(folder):
        files = files_in(folder, f"*{SUFFIX}") if is_folder else [path]
        aside = [file.name for file in files_in(folder, f"*{SUFFIX}.damaged-*")] if is_folder else []
        if not files:
            hint = f" but what an earlier start has set aside: {', '.join(aside)}" if aside else ""
            raise NoQueueError(f"no queue in {path}{hint}")
        reports, packets = [], list[WaitingPacket]()
        for file in files:
            report, waiting = _look_at(file, max_packets)
            reports.append(report)
            packets += waiting
    return QueueView(reports, sorted(packets, key=_age)[:max_packets], aside)


@contextlib.contextmanager
def _borrowed_lock(folder: Path) -> Iterator[None]:
    """Keep a fastdist from starting here while the queue is read (others may read it as well)."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        if not locks.try_lock(fd, shared=True):
            raise _in_use(folder, locks.written_pid(fd) or locks.holder(fd))
        yield
    finally:
        os.close(fd)


def _in_use(folder: Path, pid: int | None) -> InUseError:
    text = f"the queue in {folder} is in use by a running fastdist (pid {pid or 'unknown'})"
    return InUseError(f"{text}; see its GET /queue")


def _look_at(file: Path, max_packets: int) -> tuple[RingReport, list[WaitingPacket]]:
    report = RingReport(file=file.name)
    if is_irregular(file):
        report.error = "not a regular file"
        return report, []
    with file.open("rb") as opened:
        fd = opened.fileno()
        if not locks.try_lock(fd, shared=True):  # though the folder's lock was free, or deleted
            raise _in_use(file.parent, locks.holder(fd))
        try:
            ring = format1.read(fd) if format1.is_format1(fd) else PacketRing(fd, private=True)
        except RingError as error:
            report.error = str(error)
            return report, []
        waiting = _packets(file.name, ring)
        packets = heapq.nsmallest(max_packets, waiting, key=_age)
        if isinstance(ring, format1.Format1Ring):
            deque(waiting, maxlen=0)  # what was found is known when all has been read
        report.packets, report.bytes, report.capacity_bytes = ring.undone, ring.undone_bytes, ring.capacity
        report.corrupt = ring.corrupt
        report.damage = [Damage(offset, what) for offset, what in ring.damage]
        report.notes = [Damage(offset, what) for offset, what in ring.notes]
    return report, packets


def _packets(file: str, ring: PacketRing | format1.Format1Ring) -> Iterator[WaitingPacket]:
    for packet in ring.waiting():
        yield WaitingPacket(
            file=file,
            id=packet.id,
            accepted_at=datetime.fromtimestamp(packet.accepted_ns / 1e9, UTC),
            attempts=packet.attempts,
            messages=packet.messages,
            bytes=len(packet.body),
        )


def _age(packet: WaitingPacket) -> datetime:
    return packet.accepted_at
