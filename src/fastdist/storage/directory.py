"""The queue's folder: its lock, a ring file per worker, and old rings to be migrated.

``ring-<n>.fdq`` belongs to worker n. A ring that does not fit the configuration any more (another capacity, a worker
that is not there) is renamed ``adopt-<id>.fdq``; a worker moves its packets into its own ring, then deletes it. A file
without an intact header cannot be read, for its salt is gone; it is set aside for a person to look at, never deleted.

Two services must never have one ring. So not only the folder's ``lock`` is locked, which may be deleted, but every ring
as well, from before it has its name until the last process that has it open has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastdist import logs
from fastdist._core import (
    CutShortError,
    NewerFormatError,
    PacketRing,
    RingError,
    file_size,
    record_bytes,
    round_capacity,
)
from fastdist.errors import StartError
from fastdist.storage import format1, locks
from fastdist.storage.files import has_name, identity, is_irregular, sync_folder
from fastdist.storage.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Callable

CLEARED = 1 << 30  # bytes of rings in memory, at most, that are cleared at the start
ENDING = 10.0  # seconds that the workers of a fastdist which was killed have to end
AGAIN = 0.02  # seconds between two tries to lock
LOG_AFTER = 1.0  # seconds that a start waits for a reader of the queue before it logs that
LOCK, SUFFIX = "lock", ".fdq"

log = logs.get()


class OldRing(NamedTuple):
    """A ring to be migrated: its open file and where it is."""

    fd: int
    path: str


class InTheWay(NamedTuple):
    """A file that another process has locked, and which process, as far as that is known."""

    path: Path
    read: bool  # only that, as ``queue verify`` does
    pid: int | None


class QueueFolder:
    """The folder of a queue that is used by this process and its workers alone, once ``lock`` has succeeded."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = -1
        self._identity = (0, 0)  # of the folder that was locked
        self._rings: dict[Path, int] = {}  # open and locked

    def lock(self) -> None:
        """Make the folder ours, creating it if need be. Raises StartError when another fastdist has it.

        The locks are shared with the workers (``held``, and the rings they get), and so held until the last of them has
        ended. It waits a while for those of a supervisor that was killed, and for a reader however long it takes.
        """
        begun = time.monotonic()
        logged = False
        while (in_the_way := self._try_lock_all()) is not None:
            waited = time.monotonic() - begun
            if not in_the_way.read:
                self._judge(in_the_way, waited)
            elif waited > LOG_AFTER and not logged:
                logged = True
                reader = locks.describe(in_the_way.pid)
                log.warning("the queue is being read; the start waits", file=str(in_the_way.path), by=reader)
            time.sleep(AGAIN)

    def _judge(self, in_the_way: InTheWay, waited: float) -> None:
        """Raise StartError if there is no sense in waiting (any longer)."""
        pid = in_the_way.pid
        if pid is not None and locks.is_alive(pid):
            who = f"a running fastdist (pid {pid}); give each its own queue.path"
        elif waited < ENDING:
            return
        elif pid is not None:
            who = f"workers of a fastdist that is gone (pid {pid}); they do not end"
        else:
            who = "a process that cannot be seen from here: a fastdist in another container, or what is left of one"
        raise StartError(f"the queue in {self.path} is in use by {who}")

    def _try_lock_all(self) -> InTheWay | None:
        try:
            if self._lock < 0 or not has_name(self._lock, self.path / LOCK):
                self._open_lock()
            if not try_lock(self._lock):
                return _in_the_way(self._lock, self.path / LOCK)
        except FileExistsError as error:
            what = "a link to nothing" if Path(error.filename).is_symlink() else "not a folder"
            raise StartError(f"cannot use {self.path} for the queue: {error.filename} is {what}") from error
        except OSError as error:
            raise StartError(f"cannot use {self.path} for the queue: {error.strerror}") from error
        locks.write_pid(self._lock)
        return self._try_lock_rings()

    def _open_lock(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = fd
        self._identity = identity(self.path)

    def _try_lock_rings(self) -> InTheWay | None:
        """Open and lock the rings that are there and are not ours yet."""
        for path in sorted(self.path.glob(f"*{SUFFIX}")):
            if path in self._rings and has_name(self._rings[path], path):
                continue
            fd = _open(path)
            self._refuse_second_name(fd, path)
            if not try_lock(fd):
                in_the_way = _in_the_way(fd, path)
                os.close(fd)
                return in_the_way
            self._rings[path] = fd
        return None

    def _refuse_second_name(self, fd: int, path: Path) -> None:
        """Raise StartError for a link to a ring that is ours already: it would be delivered twice."""
        for other in self._rings:
            if other != path and has_name(fd, other):
                raise StartError(f"the queue files {other} and {path} are one file under two names; delete one of them")

    def renew_lock(self) -> None:
        """Put a lock where ours was deleted or replaced: others would look there first. Raises OSError.

        A folder that is another one by now is not ours to lock.
        """
        path = self.path / LOCK
        if self._lock < 0 or has_name(self._lock, path) or identity(self.path) != self._identity:
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(fd):
            os.close(fd)
            raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
        os.close(self._lock)
        self._lock = fd
        locks.write_pid(self._lock)
        log.warning("the queue's lock was deleted, and is there again; what deletes files here?", file=str(path))

    @property
    def held(self) -> tuple[int, ...]:
        """The descriptors that workers only have to keep open."""
        return (self._lock,) if self._lock >= 0 else ()

    def has_rings(self) -> bool:
        """Whether there are rings of an earlier run."""
        return any(self.path.glob(f"*{SUFFIX}"))

    def memory_rings(self, workers: int, capacity: int) -> list[int]:
        """Return rings of ``capacity`` bytes each that live in memory only, as open files."""
        rings = []
        for index in range(workers):
            fd = os.memfd_create(f"fastdist-ring-{index}")
            _clear(fd, min(file_size(capacity), CLEARED // workers), "memory")
            _make(fd, capacity, "memory")
            rings.append(fd)
        return rings

    def rings(self, workers: int, capacity: int) -> list[int]:
        """Return the workers' rings as open files: those that are there and fit, new ones otherwise."""
        capacity = round_capacity(capacity)
        try:
            return self._worker_rings(workers, capacity)
        except OSError as error:
            where = error.filename or self.path
            raise StartError(f"cannot make the queue in {self.path}: {where}: {error.strerror}") from error

    def _worker_rings(self, workers: int, capacity: int) -> list[int]:
        paths = [ring_path(self.path, index) for index in range(workers)]
        self._sort_out(paths, capacity)
        for path in paths:
            if path not in self._rings:
                self._rings[path] = _make_file(path, capacity)
            _allocate(self._rings[path], file_size(capacity), str(path))
        sync_folder(self.path)
        return [self._rings[path] for path in paths]

    def retire_all(self) -> None:
        """Set every ring aside to be migrated (none of the workers' rings is a file now)."""
        self._sort_out([], 0)

    def _sort_out(self, wanted: list[Path], capacity: int) -> None:
        """Keep rings whose name and capacity fit; rename others to be migrated; set aside those that cannot be read.

        Nothing is touched while there is one that only a newer version can read.
        """
        if (in_the_way := self._try_lock_rings()) is not None:  # a file that is here since the folder was locked
            raise StartError(f"the queue file {in_the_way.path} is in use by {locks.describe(in_the_way.pid)}")
        for path, fd in self._rings.items():
            if format1.is_format1(fd):
                _convert(path, fd, self._rings)
        found = {path: _look_at(path, fd) for path, fd in self._rings.items()}
        for path, ring in found.items():
            if isinstance(ring, str):
                aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
                path.rename(aside)
                os.close(self._rings.pop(path))
                log.error("a queue file cannot be read and is set aside", file=str(path), moved_to=str(aside), why=ring)
            elif not path.name.startswith("adopt-") and not (path in wanted and ring == capacity):
                renamed = path.rename(path.with_name(f"adopt-{secrets.token_hex(4)}{SUFFIX}"))
                self._rings[renamed] = self._rings.pop(path)

    def old_rings(self) -> list[OldRing]:
        """Return the rings to be migrated."""
        rings = [OldRing(fd, str(path)) for path, fd in sorted(self._rings.items()) if path.name.startswith("adopt-")]
        for fd, path in rings:
            _allocate(fd, os.fstat(fd).st_size, path)  # there may be holes where it was cut, or copied
        return rings


def ring_path(folder: str | Path, index: int) -> Path:
    """Return where a worker's ring is."""
    return Path(folder) / f"ring-{index}{SUFFIX}"


def _in_the_way(fd: int, path: Path) -> InTheWay:
    read = locks.is_only_read(fd)
    pid = locks.holder(fd)
    if pid is None and not read and path.name == LOCK:
        pid = locks.written_pid(fd)
    return InTheWay(path, read, pid)


def _look_at(path: Path, fd: int) -> int | str:
    """Return a ring's capacity, or what is wrong with the file. Raises StartError where that is not ours to fix.

    A file that was cut short is given its length again: what is left of it can then be recovered.
    """
    try:
        try:
            return PacketRing(fd, private=True).capacity
        except CutShortError as cut:
            log.warning("a queue file was cut short", file=str(path), bytes=os.fstat(fd).st_size)
            os.truncate(fd, file_size(cut.capacity))
            return PacketRing(fd, private=True).capacity
    except NewerFormatError as error:
        raise StartError(f"{path}: {error}; it is left as it is") from error
    except RingError as error:
        return str(error)
    except OSError as error:
        raise StartError(f"cannot open the queue file {path}: {error.strerror}") from error


def _convert(path: Path, fd: int, rings: dict[Path, int]) -> None:
    """Replace a ring of format 1, open as ``fd``, by one of the present format with the packets that wait in it.

    A damaged one is kept beside it.
    """

    def copy(new: int) -> None:
        ring = PacketRing(new)
        for packet in format1.read(fd).waiting():
            ring.push(**packet._replace(flags=0)._asdict())

    try:
        old, size, largest = format1.read(fd), 0, 0
        for packet in old.waiting():
            record = record_bytes(len(packet.key or ""), len(packet.body))
            size, largest = size + record, max(largest, record)
        if old.damage:
            aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
            aside.hardlink_to(path)
            log.error("a queue file is damaged and is kept", file=str(aside), packets=old.undone, lost=old.corrupt)
        rings[path] = _make_file(path, size + 2 * largest, copy)
    except RingError:
        return  # it is set aside
    except OSError as error:
        raise StartError(f"cannot convert the queue file {path} to the present format: {error.strerror}") from error
    os.close(fd)
    log.info("a queue file of an older version was converted", file=str(path), packets=old.undone)


def _make_file(path: Path, capacity: int, fill: Callable[[int], None] | None = None) -> int:
    """Make a ring under another name, then rename it: a ring with its name is whole, and locked. Return it open."""
    beside = path.with_suffix(".new")
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        if not try_lock(fd):
            raise StartError(f"the queue file {path} is being made by another fastdist; give each its own queue.path")
        undo.callback(beside.unlink, missing_ok=True)  # what was allocated is needed by others
        os.truncate(fd, 0)  # only now: it may have been another's
        _make(fd, capacity, str(path))
        if fill is not None:
            fill(fd)
            os.fsync(fd)
        beside.rename(path)
        undo.pop_all()
    return fd


def _open(path: Path) -> int:
    try:
        if is_irregular(path):
            raise StartError(f"cannot open the queue file {path}: not a regular file")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(f"cannot open the queue file {path}: {error.strerror}") from error


def _make(fd: int, capacity: int, what: str) -> None:
    _allocate(fd, file_size(capacity), what)
    try:
        PacketRing(fd, capacity)
        os.fsync(fd)
    except OSError as error:
        raise StartError(f"cannot make the queue ({what}): {error.strerror}") from error


def _allocate(fd: int, size: int, what: str) -> None:
    """Allocate all of the file's space: a full disk must show here, not in the middle of a write."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise StartError(
            f"cannot allocate {size} bytes for the queue ({what}): {error.strerror}; make room or lower queue.capacity"
        ) from error


def _clear(fd: int, size: int, what: str) -> None:
    """Write zeros: a page of shared memory is cleared when it is first written to, and that is not to be by a push.

    256 MiB take some 60 ms.
    """
    _allocate(fd, size, what)
    zeros = bytes(1 << 20)
    at = 0
    while at < size:
        at += os.pwrite(fd, zeros[: size - at], at)
