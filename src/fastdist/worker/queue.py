"""A worker's queue: its ring, the old rings that are migrated to it, and whether what is accepted is safe in them."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist._core import PacketRing, RingError
from fastdist.errors import StartError
from fastdist.shm.block import HeadWord, WorkerWord
from fastdist.storage.dead_letter_writer import PendingDeadLetter
from fastdist.storage.directory import OldRing, ring_path
from fastdist.storage.files import has_name, is_nameless, present_path
from fastdist.storage.group_commit import RETRY_SECONDS, Syncer, make_safe
from fastdist.worker.migrate import Migration
from fastdist.worker.reconcile import reconcile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fastdist._core import Counters
    from fastdist.ipc import Assignment
    from fastdist.settings import Config
    from fastdist.shm.block import SharedBlock
    from fastdist.worker.outcomes import Writer

HEARTBEAT = 0.5  # seconds, before the event loop runs
HEARTBEATS_TILL_LOGGED = 20
OWN = "the worker's own"  # what the log calls its ring

log = logs.get()


class Queue:
    """What is kept of packets. ``synced(position)`` and ``not_synced(error)`` are called in the event loop.

    ``damaged(ring, offset, what, packets lost, sequence)`` is called when damage is found in rings in use. ``ring``:
    OWN or an old ring's path; ``sequence``: of the packet lost, where it is known, else 0.
    """

    def __init__(  # noqa: PLR0913  (what it is of, and the callbacks)
        self,
        assignment: Assignment,
        config: Config,
        block: SharedBlock,
        *,
        synced: Callable[[int], None],
        not_synced: Callable[[OSError], None],
        damaged: Callable[[str, int, str, int, int], None],
    ) -> None:
        durability = config.queue.durability
        self.responds_after_sync = durability == "fsync"
        self.sync_interval = config.queue.sync_interval
        self.fd = assignment.ring
        try:
            self.ring = PacketRing(
                self.fd,
                volatile=durability == "memory",
                claims_wait_for_sync=durability == "fsync",
                clock_offset=block.head[HeadWord.CLOCK_OFFSET_NS],
                on_damage=partial(damaged, OWN),
            )
            self.migrations = [
                Migration(OldRing(fd, path), partial(damaged, path)) for path, fd in assignment.old_rings.items()
            ]
        except RingError as error:
            raise StartError(f"a queue file cannot be read: {error}") from error
        rings = (self.ring, *(migration.ring for migration in self.migrations))
        if any(ring.broken for ring in rings) and not assignment.irreplaceable:
            raise StartError("a queue file cannot be read in part")
        path = None if durability == "memory" else ring_path(config.queue.path, assignment.index)
        self.names = RingNames(self.ring, self.fd, path)
        self._unwritable = OSError(errno.EIO, os.strerror(errno.EIO)) if self.ring.broken else None
        self._next_try = 0.0  # at writing, time.monotonic()
        self._closed = False
        self.syncer = None
        if path is not None:
            self.syncer = Syncer(
                self.ring,
                self.fd,
                synced,
                not_synced,
                path=path if durability == "fsync" else None,
                error=self._make_safe(block.worker(assignment.index)),
            )

    def _make_safe(self, words: memoryview) -> OSError | None:
        """Sync what was found in files, each whatever happens to the others; return why not all of it is safe."""
        rings = [(self.ring, self.fd), *((each.ring, each.old.fd) for each in self.migrations)]
        with _heartbeats(words):
            errors = [make_safe(ring, fd) for ring, fd in rings]
        for migration, error in zip(self.migrations, errors[1:], strict=True):
            if error is None:  # else the header on the disk may count what is not needed any more
                migration.ring.free_unused()
        return next((error for error in errors if error is not None), None)

    # ---- what a queue that is a stream has otherwise, see ``worker.stream.queue``

    @property
    def claimed(self) -> PacketRing:
        """The ring that the dispatcher claims from."""
        return self.ring

    @property
    def want_sync(self) -> Callable[[], None] | None:
        """What is called when a sync is wanted."""
        return self.syncer.want if self.syncer is not None else None

    @property
    def lacking(self) -> int:
        """Bytes to become free until there is room for one more packet like the last; 0: there is."""
        return self.ring.room_lacking()

    @property
    def unfinished(self) -> bool:
        """Whether a worker that ends has something to wait for."""
        return bool(self.undone)

    @property
    def ends_here(self) -> bool:
        """Whether what is queued is lost with this process."""
        return bool(self.ring.undone) and is_nameless(self.fd)

    end_seconds = 0.0  # that ``end`` takes

    def begin_to_end(self) -> None:
        """All that is queued is delivered before the end, as far as there is time."""

    async def end(self, deadline: float) -> None:
        """Do nothing: only this service has the queue."""

    # ----

    @property
    def undone(self) -> int:
        """Packets in the worker's own ring and in those that are migrated."""
        return self.ring.undone + sum(migration.undone for migration in self.migrations)

    def reconcile(self, counters: Counters, *, renewed: bool) -> None:
        """Make ``counters`` agree with the rings; see ``fastdist.worker.reconcile``."""
        reconcile(self.ring, self.migrations, counters, renewed=renewed)

    @property
    def old_bytes(self) -> int:
        """Bytes of records that old rings still hold."""
        return sum(migration.undone_bytes for migration in self.migrations)

    @property
    def oldest_ns(self) -> int:
        """When the oldest packet was accepted (see ``PacketRing.oldest_ns``), 0 without any."""
        stamps = (self.ring.oldest_ns, *(migration.ring.oldest_ns for migration in self.migrations))
        return min(filter(None, stamps), default=0)

    def reserve(self, rows: Sequence[Counters], index: int) -> None:
        """Keep room for what old rings hold, of all workers, whose counters are ``rows``."""
        largest = max((migration.ring.largest_record for migration in self.migrations), default=0)
        self.ring.reserve(share_of_old(rows, index), largest)

    @property
    def is_ready(self) -> bool:
        """Whether the worker's own ring takes writes and syncs, and will be found by the next start."""
        return not (self.names.misplaced or self._error)

    @property
    def _error(self) -> OSError | None:
        """Why the worker's ring takes no writes or syncs."""
        return self._unwritable or (self.syncer.error if self.syncer is not None else None)

    @property
    def fault(self) -> int:
        """Why nothing may be accepted, an errno; 0 if it may. ENOENT: this ring or an old one is not under its name."""
        if self._error is not None:
            return self._error.errno or errno.EIO
        return errno.ENOENT if self.names.misplaced or self.names.misplaced_old else 0

    def not_written(self, error: OSError) -> None:
        """Accept nothing until writing works again, which is tried once a second."""
        if self._unwritable is None and logs.may_log():
            log.error("cannot write to the queue; packets are rejected", error=str(error))
        self._unwritable = error
        self._next_try = time.monotonic() + RETRY_SECONDS

    def look(self) -> None:
        """Look whether a ring that could not be written to can be, and files are under their names. Raises OSError."""
        if self._unwritable is not None and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + RETRY_SECONDS
            try:
                self.ring.try_to_write()
            except OSError as error:
                self._unwritable = error
            else:
                self._unwritable = None
                if logs.may_log():
                    log.info("the queue can be written to again")
        self.names.look(self.migrations)  # last: it may be impossible, and packets be accepted all the same

    def sync(self, _now_ns: int = 0) -> None:
        """Sync the ring if anything has changed."""
        if self.syncer is not None:
            self.syncer.want_if_changed()

    def migrate(self, limit: int, dead_letter_writer: Writer, deleted: Callable[[str], object]) -> None:
        """Move up to ``limit`` packets of each old ring, whatever happens to the others. Raises the last one's error.

        What the ring cannot take becomes a dead letter. ``deleted(path)`` is called when an old ring is empty and gone.
        """
        failure = None
        for migration in tuple(self.migrations) if self.is_ready and not self._closed else ():
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

    def _migrate(self, migration: Migration, limit: int, dead_letter_writer: Writer) -> None:
        tail = self.ring.tail_position
        try:
            _, oversized = migration.step(self.ring, dead_letter_writer.counters, limit)
        except OSError as error:
            self.not_written(error)
            raise
        finally:
            if self.ring.tail_position != tail and self.syncer is not None:
                self.syncer.want()
        if oversized:
            why = "larger than the queue takes now"
            dead_letter_writer.add(
                *(PendingDeadLetter(migration.ring, each, "oversized", None, None, why) for each in oversized)
            )

    def close(self) -> None:
        """Sync once more, and mark migrated packets done whose copies are safe. None is copied any more."""
        self._closed = True
        if self.syncer is not None:
            self.syncer.close()
        for migration in () if self.names.misplaced else self.migrations:
            migration.settle(self.ring)


def share_of_old(rows: Sequence[Counters], index: int) -> int:
    """Return how many bytes of its ring a worker has to keep free, so that all packets stay below the capacity.

    That is what old rings hold that it migrates, and a part of what is too much for the workers that migrate it.
    """
    old = [row.get("old_bytes") for row in rows]
    if not any(old):
        return 0
    room = [row.get("queue_capacity") - row.get("queue_bytes") for row in rows]  # which is less what old rings hold
    spare = [max(0, each) for each in room]
    too_much = -sum(min(0, each) for each in room)
    return old[index] + (too_much * spare[index] // sum(spare) if any(spare) else 0)


class RingNames:
    """Whether a worker's ring (open as ``fd``; of ``path``, if it is a file) and old ones are under their names."""

    def __init__(self, ring: PacketRing, fd: int, path: Path | None) -> None:
        self.misplaced = False  # the worker's own ring
        self._ring, self._fd, self._path = ring, fd, None if path is None else str(path)
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
        if not (migrations or self._old):
            return
        unfinished = (migration.old for migration in migrations if not migration.finished)
        found = [old for old in unfinished if not has_name(old.fd, old.path)]
        for old in found:
            if old.path not in self._old:
                what = "an old ring was deleted or renamed; nothing is accepted until its packets are in another ring"
                log.error(what, file=old.path, now=present_path(old.fd))
        self._old = {old.path for old in found}

    def _log_misplaced(self, path: str) -> None:
        if not self.misplaced:
            log.info("the queue's file has its name again; packets are accepted", file=path)
        elif (now := present_path(self._fd)) is None:
            what = "the queue's file was deleted; nothing can be accepted until fastdist is restarted"
            log.error(what, file=path, packets=self._ring.undone)
        else:
            what = "the queue's file was renamed; nothing is accepted until it has its name again"
            log.error(what, file=path, now=now, packets=self._ring.undone)


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
