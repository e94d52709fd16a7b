"""A worker's queue: its ring, the old rings that are migrated to it, and whether what is accepted is safe in them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist._core import PacketRing
from fastdist.shm.block import HeadWord, WorkerWord
from fastdist.storage.dead_letter_writer import PendingDeadLetter
from fastdist.storage.directory import OldRing, ring_path
from fastdist.storage.files import has_name, present_path
from fastdist.storage.group_commit import RETRY_SECONDS, Syncer, make_safe
from fastdist.worker.migrate import Migration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fastdist.ipc import Assignment
    from fastdist.settings import Config
    from fastdist.shm.block import SharedBlock
    from fastdist.storage.dead_letter_writer import DeadLetterWriter

HEARTBEAT = 0.5  # seconds, before the event loop runs
HEARTBEATS_TILL_LOGGED = 20

log = logs.get()


class Queue:
    """What is kept of packets. ``synced(position)`` and ``not_synced(error)`` are called in the event loop."""

    def __init__(
        self,
        assignment: Assignment,
        config: Config,
        block: SharedBlock,
        *,
        synced: Callable[[int], None],
        not_synced: Callable[[OSError], None],
    ) -> None:
        durability = config.queue.durability
        self.fd = assignment.ring
        self.ring = PacketRing(self.fd, volatile=durability == "memory", claims_wait_for_sync=durability == "fsync")
        self.ring.clock_offset = block.head[HeadWord.CLOCK_OFFSET_NS]
        self.migrations = [Migration(OldRing(fd, path)) for path, fd in assignment.old_rings.items()]
        path = None if durability == "memory" else ring_path(config.queue.path, assignment.index)
        self.names = RingNames(self.ring, self.fd, path)
        self._unwritable = False
        self._next_try = 0.0  # at writing, time.monotonic()
        self.syncer = None
        if path is not None:
            self.syncer = Syncer(
                self.ring,
                self.fd,
                synced,
                not_synced,
                path=path if durability == "fsync" else None,
                failing=not self._make_safe(block.worker(assignment.index)),
            )

    def _make_safe(self, words: memoryview) -> bool:
        """Sync what was found in files, each whatever happens to the others; return whether all of it is safe."""
        rings = [(self.ring, self.fd), *((each.ring, each.old.fd) for each in self.migrations)]
        with _heartbeats(words):
            return all([make_safe(ring, fd) for ring, fd in rings])  # noqa: C419

    @property
    def undone(self) -> int:
        """Packets in the worker's own ring and in those that are migrated."""
        return self.ring.undone + sum(migration.undone for migration in self.migrations)

    @property
    def is_ready(self) -> bool:
        """Whether the worker's own ring takes writes and syncs, and will be found by the next start."""
        return not (self.names.misplaced or self._unwritable or (self.syncer is not None and self.syncer.failing))

    @property
    def is_broken(self) -> bool:
        """Whether nothing may be accepted: for the same reasons, or because an old ring is not where it should be."""
        return not self.is_ready or self.names.misplaced_old

    def not_written(self, error: OSError) -> None:
        """Accept nothing until writing works again, which is tried once a second."""
        if not self._unwritable:
            log.error("cannot write to the queue; packets are rejected", error=error.strerror)
        self._unwritable = True
        self._next_try = time.monotonic() + RETRY_SECONDS

    def look(self) -> None:
        """Look whether files are under their names, and a ring that could not be written to can be. Raises OSError."""
        self.names.look(self.migrations)
        if self._unwritable and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + RETRY_SECONDS
            with contextlib.suppress(OSError):
                self.ring.try_to_write()
                self._unwritable = False
                log.info("the queue can be written to again")

    def sync(self) -> None:
        """Sync the ring if anything has changed."""
        if self.syncer is not None:
            self.syncer.want_if_changed()

    def migrate(self, limit: int, dead_letter_writer: DeadLetterWriter, deleted: Callable[[str], object]) -> None:
        """Move up to ``limit`` packets of each old ring, whatever happens to the others. Raises the last one's error.

        What the ring cannot take becomes a dead letter. ``deleted(path)`` is called when an old ring is empty and gone.
        """
        failure = None
        for migration in tuple(self.migrations) if self.is_ready else ():
            try:
                self._migrate(migration, limit, dead_letter_writer)
                if migration.finished and time.monotonic() >= migration.next_deletion:
                    migration.delete()
                    self.migrations.remove(migration)
                    os.close(migration.old.fd)
                    deleted(migration.old.path)
                    log.info("old ring migrated and deleted", ring=migration.old.path)
            except Exception as error:  # noqa: BLE001
                failure = error
        if failure is not None:
            raise failure

    def _migrate(self, migration: Migration, limit: int, dead_letter_writer: DeadLetterWriter) -> None:
        moved, oversized = migration.step(self.ring, dead_letter_writer.counters, limit)
        if oversized:
            why = "larger than the queue takes now"
            dead_letter_writer.add(
                *(PendingDeadLetter(migration.ring, each, "oversized", None, None, why) for each in oversized)
            )
        if moved and self.syncer is not None:
            self.syncer.want()

    def close(self) -> None:
        """Sync once more, and mark migrated packets done whose copies are safe."""
        if self.syncer is not None:
            self.syncer.close()
        for migration in () if self.names.misplaced else self.migrations:
            migration.settle(self.ring)


class RingNames:
    """Whether a worker's ring (open as ``fd``; of ``path``, if it is a file) and old ones are under their names."""

    def __init__(self, ring: PacketRing, fd: int, path: Path | None) -> None:
        self.misplaced = False  # the worker's own ring
        self._ring, self._fd, self._path = ring, fd, path
        self._old = set[str]()

    @property
    def misplaced_old(self) -> bool:
        """Whether an old ring that holds packets is not under its name."""
        return bool(self._old)

    def look(self, migrations: Sequence[Migration]) -> None:
        """Look, and log what has changed. Raises OSError."""
        if self._path is not None and self.misplaced == has_name(self._fd, self._path):
            self.misplaced = not self.misplaced
            self._log_misplaced(self._path)
        unfinished = (migration.old for migration in migrations if not migration.finished)
        found = [old for old in unfinished if not has_name(old.fd, old.path)]
        for old in found:
            if old.path not in self._old:
                what = "an old ring was deleted or renamed; nothing is accepted until its packets are in another ring"
                log.error(what, file=old.path, now=present_path(old.fd))
        self._old = {old.path for old in found}

    def _log_misplaced(self, path: Path) -> None:
        if not self.misplaced:
            log.info("the queue's file has its name again; packets are accepted", file=str(path))
        elif (now := present_path(self._fd)) is None:
            what = "the queue's file was deleted; nothing can be accepted until fastdist is restarted"
            log.error(what, file=str(path), packets=self._ring.undone)
        else:
            what = "the queue's file was renamed; nothing is accepted until it has its name again"
            log.error(what, file=str(path), now=now, packets=self._ring.undone)


@contextlib.contextmanager
def _heartbeats(words: memoryview) -> Iterator[None]:
    """Give the event loop's heartbeats while we wait for the disk; a kill would not end that wait sooner."""
    done = threading.Event()

    def beat() -> None:
        beats = 0
        while not done.wait(HEARTBEAT):
            words[WorkerWord.HEARTBEAT_NS] = time.monotonic_ns()
            beats += 1
            if beats == HEARTBEATS_TILL_LOGGED:
                log.warning("the disk takes long to write what the last run has left in the queue; waiting for it")

    thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        words[WorkerWord.HEARTBEAT_NS] = time.monotonic_ns()
