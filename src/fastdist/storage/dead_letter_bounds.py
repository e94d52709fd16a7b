"""The bounds of dead letters: how many bytes there may be of them, and for how long they are kept.

1. Files are discarded whole, the oldest first, and only under their lock. One that is locked by another is passed over:
   a worker writes to it or has not settled it, or a replay or a purge goes through it.
2. A worker makes room for a whole file before it begins or reopens one, and writes no more than that to it (but one
   dead letter in any case). It does so under the lock of the folder, so that no two give away the same room.
3. Without anything left that may be discarded the bound gives way: a dead letter is written rather than lost.
4. A worker has no time for much of that. What takes longer is left to the supervisor, which looks every second, and the
   packets stay queued meanwhile (``BlockingIOError``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from fastdist.storage.dead_letter_format import MAX_FILE, SUFFIX, journal_of, read_journal, read_lines
from fastdist.storage.files import has_name
from fastdist.storage.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fastdist.settings import DeadLetters as Settings

FILES = 8  # that each writer's part of the bound is divided into
MIN_FILE = 1024  # bytes
QUICK = 4 << 20  # bytes: a worker discards no file that is larger, unless its own are
MAX_FILES = 4096  # of this size; with a very large bound files are larger
PART_NS = 8_000_000  # nor for longer than this
LOCK_PATIENCE = 1.0  # seconds that the supervisor waits for the lock of the folder
AGES = 8  # part of ``max_age`` after which a file is not written to any more


class _There(NamedTuple):
    """A file: its size, what it may become, and when it was last written to (wall clock, seconds)."""

    path: Path
    size: int
    room: int
    changed: float


class Bounds:
    """The bounds of the files in ``folder``, for one of ``writers`` processes; ``discarded(dead_letters)`` counts."""

    def __init__(self, folder: Path, settings: Settings, writers: int, discarded: Callable[[int], None]) -> None:
        self.folder, self._writers, self._discarded = folder, writers, discarded
        self.gives_way = False  # where another holds the lock: at the end, when nothing can wait
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """Put these bounds in force; of the settings, ``path`` stays what it was."""
        self.max_bytes, self.max_age = settings.max_bytes, settings.max_age

    @property
    def file_size(self) -> int:
        """How large a file may become."""
        if not self.max_bytes:
            return MAX_FILE
        part = self.max_bytes // (FILES * self._writers)
        return min(max(MIN_FILE, part), max(QUICK, min(MAX_FILE, self.max_bytes // MAX_FILES)))

    @property
    def file_age(self) -> float:
        """After how many seconds a file is not written to any more."""
        return self.max_age / AGES if self.max_age else float("inf")

    # ---- a worker's part

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Hold the lock of the folder while another file is begun: there is room for ``size`` bytes, and for all of it.

        Raises BlockingIOError when that has to wait, and OSError.
        """
        if not self.max_bytes or not self.folder.is_dir():
            yield
            return
        with self._locked(0.0) as locked:
            if not locked and not self.gives_way:
                raise BlockingIOError
            self._make_room(max(size, self.file_size), time.monotonic_ns() + PART_NS)
            yield

    def _make_room(self, size: int, end_ns: int) -> None:
        files = self._look()
        left = self.max_bytes - size - sum(file.room for file in files)
        for file in files:
            if left >= 0:
                return
            if file.size > max(QUICK, self.file_size) or time.monotonic_ns() > end_ns:
                if self.gives_way:
                    return
                if left + size < self.file_size:  # else the supervisor sees nothing to do
                    raise BlockingIOError
            dead_letters = discard(file.path)
            if dead_letters is not None or not file.path.exists():
                left += file.room
                self._discarded(dead_letters or 0)

    # ---- the supervisor's part

    def enforce(self, discarded_for_age: Callable[[int], None], halted: Callable[[], bool] = lambda: False) -> None:
        """Discard what is too old, and what leaves no room for another file, until ``halted()``. Raises OSError."""
        if self.max_age:
            oldest = time.time() - self.max_age
            for file in self._look():
                if not halted() and file.changed < oldest and (dead_letters := discard(file.path)) is not None:
                    discarded_for_age(dead_letters)
        passed_over: set[Path] = set()
        while self.max_bytes and not halted() and (path := self._too_much(passed_over)) is not None:
            with self._locked(LOCK_PATIENCE) as locked:  # for one file only: workers wait for it
                dead_letters = discard(path) if locked else None
            if dead_letters is not None:
                self._discarded(dead_letters)
            passed_over.add(path)

    def _too_much(self, passed_over: set[Path]) -> Path | None:
        files = self._look()
        if sum(file.room for file in files) <= self.max_bytes - self.file_size:
            return None
        return next((file.path for file in files if file.path not in passed_over), None)

    # ---- files

    def _look(self) -> list[_There]:
        """Return the files, oldest first. What is locked may grow, unless it is large already."""
        found, full = [], self.file_size if self.max_bytes else 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and entry.is_file():  # nothing else may be opened
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        state = entry.stat()
                        room = full if state.st_size < full and _is_locked(entry.path) else state.st_size
                        found.append(_There(self.folder / entry.name, state.st_size, room, state.st_mtime))
        return sorted(found)

    @contextlib.contextmanager
    def _locked(self, patience: float) -> Iterator[bool]:
        """Hold the lock of the folder, if it can be had within ``patience`` seconds."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            end = time.monotonic() + patience
            while not (locked := try_lock(fd)) and time.monotonic() < end:
                time.sleep(0.001)
            yield locked
        finally:
            os.close(fd)


def _is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # another user's
        return True
    try:
        return not try_lock(fd, shared=True)
    finally:
        os.close(fd)


def discard(path: Path) -> int | None:
    """Delete a file for good; return how many dead letters it had, None if it is gone or not ours. Raises OSError.

    Those that cannot be read are not counted.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, PermissionError):
        return None
    with file:
        if not try_lock(file.fileno()) or not has_name(file.fileno(), path):
            return None
        dead_letters = 0
        with contextlib.suppress(OSError):
            for line in read_lines(file, sys.maxsize, read_journal(path)):
                dead_letters += line.dead_letter is not None
        path.unlink()
        journal_of(path).unlink(missing_ok=True)
        return dead_letters
