"""The queue's folder: its lock, a ring file per worker, and old rings to be migrated.

``ring-<n>.fdq`` belongs to worker n. A ring that does not fit the configuration any more (another capacity, a worker
that is not there) is renamed ``adopt-<id>.fdq``; a worker moves its packets into its own ring, then deletes it. One
that fits a worker without a ring becomes that worker's. New rings are made, and have their space, before any is
renamed: so a change that is refused for want of space can be undone. A file without an intact header cannot be read,
for its salt is gone; it is set aside for a person to look at, never deleted.
So is one that the disk cannot read in part, and a new ring in its place has the packets that can be read.

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
from typing import NamedTuple

from fastdist import logs
from fastdist._core import HEADER_SIZE, PacketRing, file_size, round_capacity
from fastdist.errors import StartError
from fastdist.storage import format1, locks, ring_files
from fastdist.storage.files import files_in, has_name, identity, make_folder, sync_entry, sync_folder
from fastdist.storage.locks import try_lock
from fastdist.storage.ring_files import NEW, Found

CLEARED = 1 << 30  # bytes of rings in memory, at most, that are cleared at the start
ENDING = 10.0  # seconds that the workers of a fastdist which was killed have to end
AGAIN = 0.02  # seconds between two tries to lock
LOG_AFTER = 1.0  # seconds that a start waits for a reader of the queue before it logs that
LOCK, SUFFIX, OLD = "lock", ".fdq", "adopt-"

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
        self._capacity = 0  # of each worker's ring

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
        make_folder(self.path)
        sync_entry(self.path)  # it may have been made by a process that was killed before it could do so
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = fd
        self._identity = identity(self.path)

    def _try_lock_rings(self) -> InTheWay | None:
        """Open and lock the rings that are there and are not ours yet."""
        for path in self._files(f"*{SUFFIX}"):
            if path in self._rings and has_name(self._rings[path], path):
                continue
            fd = ring_files.open_ring(path)
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
        """Whether there are rings of an earlier run. Raises StartError where the folder cannot be read."""
        return bool(self._files(f"*{SUFFIX}"))

    def _files(self, pattern: str) -> list[Path]:
        """Return its files under names that match. Raises StartError: rings that are not seen would be overwritten."""
        try:
            return files_in(self.path, pattern)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StartError(f"the queue's folder {self.path} cannot be read: {error.strerror}") from error

    def memory_rings(self, workers: int, capacity: int) -> list[int]:
        """Return rings of ``capacity`` bytes each that live in memory only, as open files."""
        rings = []
        for index in range(workers):
            fd = os.memfd_create(f"fastdist-ring-{index}")
            ring_files.clear(fd, min(file_size(capacity), CLEARED // workers), "memory")
            ring_files.make(fd, capacity, "memory")
            rings.append(fd)
        return rings

    def rings(self, workers: int, capacity: int) -> list[int]:
        """Return the workers' rings as open files: those that are there and fit, new ones otherwise."""
        self._capacity = capacity = round_capacity(capacity)
        paths = [ring_path(self.path, index) for index in range(workers)]
        try:
            self._sort_out(paths, capacity)
            sync_folder(self.path)
        except OSError as error:
            where = error.filename or self.path
            raise StartError(f"cannot make the queue in {self.path}: {where}: {error.strerror}") from error
        return [self._rings[path] for path in paths]

    def ring(self, index: int) -> int:
        """Return a worker's ring as an open file."""
        return self._rings[ring_path(self.path, index)]

    def renew(self, index: int, sequence: int) -> list[OldRing] | None:
        """Do for the ring of a worker that cannot start what a start does; return what is to be migrated to a new one.

        None: it is sound now, as far as can be seen. The first packet of a new one gets ``sequence``. Raises StartError
        and OSError if there can be no new one: then the old one is where it was, or what can be read of it.
        """
        path = ring_path(self.path, index)
        before = self._rings[path]
        found = ring_files.look_at(path, before, self._rings)
        if isinstance(found, Found) and self._rings[path] == before:
            ring_files.allocate(before, file_size(found.capacity), str(path))  # there may be holes where it was cut
            return None
        moved = self._retire(path) if isinstance(found, Found) else path.rename(ring_files.name_aside(path))
        try:
            fd = ring_files.replace(path, self._capacity, lambda fd: PacketRing(fd).continue_at(sequence))
        except BaseException:
            self._rings[moved.rename(path)] = self._rings.pop(moved, before)
            raise
        self._rings[path] = fd
        sync_folder(self.path)
        if isinstance(found, Found):
            return [OldRing(self._rings[moved], str(moved))]
        os.close(before)
        ring_files.log_aside(path, moved, found)
        return []

    def renew_old(self, old: OldRing) -> OldRing | None:
        """Do so for an old ring; return it, or what can be read of it, and None for nothing. Raises StartError."""
        path = Path(old.path)
        found = ring_files.look_at(path, old.fd, self._rings)
        if isinstance(found, str):
            self._set_aside(path, found)
            return None
        return OldRing(self._rings[path], old.path)

    def retire_all(self) -> None:
        """Set every ring aside to be migrated (none of the workers' rings is a file now)."""
        self._sort_out([], 0)

    def _sort_out(self, wanted: list[Path], capacity: int) -> None:
        """Have rings of this capacity at the ``wanted`` paths; set others aside to be migrated, unless they are empty.

        Nothing is touched while there is one that only a newer version can read, and nothing is renamed before all
        space is allocated.
        """
        found = self._look_at_rings()
        others = [path for path in found if not (path in wanted and found[path].capacity == capacity)]
        free = [path for path in wanted if path not in found or path in others]
        fitting = [path for path in others if found[path].capacity == capacity and found[path].packets][: len(free)]
        for path in [path for path in others if found[path].is_empty]:
            with contextlib.suppress(OSError):  # a worker tries it again
                path.unlink()
                others.remove(path)
                os.close(self._rings.pop(path))
        for path, fd in self._rings.items():  # there may be holes: it was cut, copied, or an old ring
            size = found[path].capacity
            old = path in others and path not in fitting  # which needs no space but for marks
            ring_files.allocate(fd, file_size(size), str(path), HEADER_SIZE + size if old else 0)
        with contextlib.ExitStack() as undo:
            made = {path: ring_files.make_beside(path, capacity, undo) for path in free[len(fitting) :]}
            for path in others:
                if path not in fitting and not path.name.startswith(OLD):
                    self._retire(path)
            for path, place in zip(fitting, free, strict=False):
                self._rename(path, place)
            for path, fd in made.items():
                ring_files.beside(path).rename(path)
                self._rings[path] = fd
            undo.pop_all()

    def _retire(self, path: Path) -> Path:
        """Rename a ring to be migrated; return its new name."""
        return self._rename(path, path.with_name(f"{OLD}{secrets.token_hex(4)}{SUFFIX}"))

    def _rename(self, path: Path, new: Path) -> Path:
        self._rings[path.rename(new)] = self._rings.pop(path)
        return new

    def _look_at_rings(self) -> dict[Path, Found]:
        """Look at all rings; convert those of the earlier format, set aside those that cannot be read.

        What a start that was killed has left half made is deleted.
        """
        if (in_the_way := self._try_lock_rings()) is not None:  # a file that is here since the folder was locked
            raise StartError(f"the queue file {in_the_way.path} is in use by {locks.describe(in_the_way.pid)}")
        for path, fd in self._rings.items():
            if format1.is_format1(fd):
                ring_files.convert(path, fd, self._rings)
        found = {path: ring_files.look_at(path, fd, self._rings) for path, fd in self._rings.items()}
        for pattern in (f"ring-*{NEW}", f"{OLD}*{NEW}"):
            for path in self._files(pattern):
                if path.is_file():
                    ring_files.delete_half_made(path)
        for path, ring in found.items():
            if isinstance(ring, str):
                self._set_aside(path, ring)
        return {path: ring for path, ring in found.items() if not isinstance(ring, str)}

    def _set_aside(self, path: Path, why: str) -> None:
        aside = ring_files.name_aside(path)
        path.rename(aside)
        os.close(self._rings.pop(path))
        ring_files.log_aside(path, aside, why)

    def old_rings(self) -> list[OldRing]:
        """Return the rings to be migrated."""
        return [OldRing(fd, str(path)) for path, fd in sorted(self._rings.items()) if path.name.startswith(OLD)]


def ring_path(folder: str | Path, index: int) -> Path:
    """Return where a worker's ring is."""
    return Path(folder) / f"ring-{index}{SUFFIX}"


def _in_the_way(fd: int, path: Path) -> InTheWay:
    read = locks.is_only_read(fd)
    pid = locks.holder(fd)
    if pid is None and not read and path.name == LOCK:
        pid = locks.written_pid(fd)
    return InTheWay(path, read, pid)
