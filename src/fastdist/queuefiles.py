"""The queue's folder: its lock, a ring file per worker, and old rings that wait to be adopted.

``ring-<n>.fdq`` belongs to worker n. A ring that does not fit the configuration any more (another capacity, a worker
that is not there) is renamed ``adopt-<id>.fdq``; a worker moves its packets into its own ring, then deletes it. A file
without an intact header cannot be read, for its salt is gone; it is set aside for a person to look at, never deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from fastdist import logs
from fastdist._core.ring import PacketRing, RingError, file_size, round_capacity
from fastdist.errors import StartError

CLEARED = 1 << 30  # bytes of rings in memory, at most, that are cleared at the start
ENDING = 10.0  # seconds that the workers of a fastdist which was killed have to end

_CUT_SHORT = re.compile(r"shorter than the (\d+) bytes")  # what the ring says of a file whose header is sound

log = logs.get()


class OldRing(NamedTuple):
    """A ring to be adopted: its open file and where it is."""

    fd: int
    path: str


class QueueFolder:
    """The folder of a queue that is used by this process and its workers alone, once ``lock`` has succeeded."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = -1

    def lock(self) -> None:
        """Make the folder ours, creating it if need be. Raises StartError when another fastdist has it.

        The lock is shared with the workers (``held``), and so held until the last of them has ended: two processes
        must never write one ring. Those of a supervisor that was killed are waited for.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            end = time.monotonic() + ENDING
            while not self._try_lock():
                holder = os.pread(self._lock, 32, 0).decode("latin-1").strip()
                if _is_alive(holder):
                    who = f"a running fastdist (pid {holder}); give each its own queue.path"
                    raise StartError(f"the queue in {self.path} is in use by {who}")
                if time.monotonic() > end:
                    who = f"workers of a fastdist that is gone (pid {holder or 'unknown'}); they do not end"
                    raise StartError(f"the queue in {self.path} is in use by {who}")
                time.sleep(0.02)
        except FileExistsError as error:
            what = "a link to nothing" if Path(error.filename).is_symlink() else "not a folder"
            raise StartError(f"cannot use {self.path} for the queue: {error.filename} is {what}") from error
        except OSError as error:
            raise StartError(f"cannot use {self.path} for the queue: {error.strerror}") from error
        with contextlib.suppress(OSError):  # on a full disk: it is only for people
            os.pwrite(self._lock, f"{os.getpid():<16}".encode(), 0)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @property
    def held(self) -> tuple[int, ...]:
        """The descriptors that workers only have to keep open."""
        return (self._lock,) if self._lock >= 0 else ()

    def has_rings(self) -> bool:
        """Whether there are rings of an earlier run."""
        return any(self.path.glob("*.fdq"))

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
            return self._rings(workers, capacity)
        except OSError as error:
            where = error.filename or self.path
            raise StartError(f"cannot make the queue in {self.path}: {where}: {error.strerror}") from error

    def _rings(self, workers: int, capacity: int) -> list[int]:
        self._sort_out([f"ring-{index}.fdq" for index in range(workers)], capacity)
        rings = []
        for index in range(workers):
            path = self.path / f"ring-{index}.fdq"
            if not path.exists():
                _make_file(path, capacity)
            fd = _open(path)
            _allocate(fd, file_size(capacity), str(path))
            rings.append(fd)
        _sync_folder(self.path)
        return rings

    def retire_all(self) -> None:
        """Have every ring adopted (none of the workers' rings is a file now)."""
        self._sort_out([], 0)

    def _sort_out(self, wanted: list[str], capacity: int) -> None:
        """Leave rings where they are if name and capacity fit; have others adopted, set aside what cannot be read.

        Nothing is touched while there is one that only a newer version can read.
        """
        found = {path: _look_at(path) for path in sorted(self.path.glob("*.fdq"))}
        for path, ring in found.items():
            if isinstance(ring, str):
                aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
                path.rename(aside)
                log.error("a queue file cannot be read and is set aside", file=str(path), moved_to=str(aside), why=ring)
            elif not path.name.startswith("adopt-") and not (path.name in wanted and ring == capacity):
                path.rename(path.with_name(f"adopt-{secrets.token_hex(4)}.fdq"))

    def old_rings(self) -> list[OldRing]:
        """Return what is to be adopted."""
        rings = [OldRing(_open(path), str(path)) for path in sorted(self.path.glob("adopt-*.fdq"))]
        for fd, path in rings:
            _allocate(fd, os.fstat(fd).st_size, path)  # there may be holes where it was cut, or copied
        return rings


def is_nameless(fd: int) -> bool:
    """Whether an open file is in no folder (a memfd, or deleted), and ends with whoever has it open."""
    return os.fstat(fd).st_nlink == 0


def _is_alive(pid: str) -> bool:
    """Whether there is such a process."""
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.Error):
        return False


def _look_at(path: Path) -> int | str:
    """Return a ring's capacity, or what is wrong with the file. Raises StartError where that is not ours to fix.

    A file that was cut short is given its length again: what is left of it can then be recovered.
    """
    try:
        if not path.is_file() and not path.is_dir() and path.exists():  # a pipe would keep us waiting for ever
            raise StartError(f"cannot open the queue file {path}: not a regular file")
        with path.open("rb") as file:
            try:
                return PacketRing(file.fileno(), private=True).capacity
            except RingError as error:
                cut = _CUT_SHORT.search(str(error))
                if cut is None:
                    raise
                log.warning("a queue file was cut short", file=str(path), bytes=os.fstat(file.fileno()).st_size)
                os.truncate(path, file_size(int(cut[1])))
                return PacketRing(file.fileno(), private=True).capacity
    except RingError as error:
        if "newer version" in str(error):
            raise StartError(f"{path}: {error}; it is left as it is") from error
        return str(error)
    except OSError as error:
        raise StartError(f"cannot open the queue file {path}: {error.strerror}") from error


def _make_file(path: Path, capacity: int) -> None:
    """Make a ring beside its place, then put it there: whatever has its name is whole."""
    beside = path.with_suffix(".new")
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _make(fd, capacity, str(path))
        beside.rename(path)
    except StartError:
        beside.unlink()  # what was allocated is needed by others
        raise
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
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
    """Have all of the file's space for certain: a full disk is to be met here, not in the middle of a write."""
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


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Adoption:
    """The move of an old ring's packets into a worker's own ring, as there is room.

    A packet is done in the old ring when its copy is synced: at every moment one of the two is safe.
    """

    def __init__(self, old: OldRing) -> None:
        self.old = old
        self.ring = PacketRing(old.fd)
        self._copied: list[int] = []  # handles in the old ring whose copies are not synced yet
        self._position = 0  # the sync that covers the copies

    @property
    def undone(self) -> int:
        """Packets that are still to be moved (a copy that is not synced counts in the new ring)."""
        return self.ring.undone - len(self._copied)

    def step(self, target: PacketRing, most: int) -> tuple[int, list[int]]:
        """Copy up to ``most`` packets; return how many were, and handles of packets too large for ``target``.

        What is copied and not yet synced is copied again after a kill: ``most`` is how many may be sent twice then.
        """
        if not self.settle(target):
            return 0, []
        oversized = []
        while len(self._copied) < most and target.undone_bytes < target.capacity // 2 and (handle := self.ring.claim()):
            try:
                if not target.adopt(self.ring, handle):
                    self.ring.release(handle)
                    break
            except ValueError:
                oversized.append(handle)
            else:
                self._copied.append(handle)
        self._position = target.tail_position
        return len(self._copied), oversized

    def settle(self, target: PacketRing) -> bool:
        """Let go of what was copied, if the copies are synced; say whether that is so."""
        if target.synced_position < self._position:
            return False
        for handle in self._copied:
            self.ring.done(handle)
        self._copied.clear()
        return True

    @property
    def finished(self) -> bool:
        """Whether the old ring holds nothing any more."""
        return self.ring.undone == 0

    def delete(self) -> None:
        """Delete the old ring's file."""
        Path(self.old.path).unlink(missing_ok=True)
