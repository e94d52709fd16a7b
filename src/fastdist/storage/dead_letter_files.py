"""The files of dead letters as they are written: packets that were given up, one a line.

A packet leaves the queue only when its dead letter is safe here: in a file that still has its name, and (except with
durability memory) synced; ``DeadLetterWriter`` takes care of that. Rules for the writer and the readers:

1. Every worker writes its own files, locked (flock) while they are open. A file without a new dead letter for a second
   is closed, so that other processes can lock it; the writer reopens it if it is not locked, and else begins a new one.
   While dead letters arrive without a pause, a new file is begun every minute, and at once when another process asks
   for the file, by a lock on its first byte. A file whose write fails is closed too: a purge may have to make room.
2. Other processes change a file only while they hold its lock, and only by renaming another over it or by deleting it.
   So after taking the lock, check that the file still is the one of that name.
3. Other tools may delete, rename or truncate a file or its folder at any time. So after writing, the writer checks that
   the name still is that of its file; if not, all since the last such check is written again.
4. What was replayed is noted in a journal next to the file (``FILE.replayed``: offset and digest of the line) until the
   file is rewritten without it; readers skip what is noted there. An entry hides exactly that dead letter, so one that
   is left of an earlier file does no harm.
5. A line that is not a dead letter (torn by a crash, damaged) is shown as unreadable and otherwise left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.settings import DeadLetters
from fastdist.storage.dead_letter_bounds import Bounds
from fastdist.storage.dead_letter_format import SUFFIX, folder_of
from fastdist.storage.files import is_nameless, make_folder, sync_entry, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDLE_NS = 1_000_000_000  # without a dead letter, after which a file is closed
MAX_OPEN_NS = 60_000_000_000  # however many dead letters come
RECORD_LOCK = "hhqqi"  # struct flock: type, whence, start, length, pid

log = logs.get()


class _File:
    """A file of ours, open and locked: its size, and up to where what it holds is settled."""

    __slots__ = ("fd", "identity", "name_synced", "opened_ns", "path", "settled", "size")

    def __init__(self, fd: int, path: Path) -> None:
        state = os.fstat(fd)
        self.fd, self.path = fd, path
        self.identity = state.st_dev, state.st_ino
        self.size = self.settled = state.st_size
        self.name_synced = False  # not since it was opened
        self.opened_ns = 0  # the first tick after that

    @property
    def is_ours(self) -> bool:
        """Whether the path still leads to this file, with all that was written to it."""
        try:
            state = self.path.stat()
        except OSError:
            return False
        return (state.st_dev, state.st_ino, state.st_size) == (*self.identity, self.size)

    def close(self) -> None:
        """Close it; the descriptor is gone then, also where that is an error (a network, a quota)."""
        try:
            os.close(self.fd)
        except OSError as error:
            log.error(
                "closing a dead-letter file failed; its last entries may be missing",
                file=str(self.path),
                error=str(error),
            )


class DeadLetterFiles:
    """The files that the process ``owner`` (a word fit for a file name) writes below ``queue_path``, or in ``path``.

    ``beside`` is an open file of the queue: as long as it has a name, a missing queue folder is not created again. It
    was renamed then, and a new folder would prevent renaming it back. ``bounds`` says how large and how old a file may
    become, and makes room for it.

    What was written must be settled: after a sync (``begin_sync``), if there is one, ``settle`` returns whether it is
    safe. Until then its files stay open.
    """

    def __init__(
        self,
        queue_path: str | Path,
        owner: str,
        beside: int | None = None,
        *,
        path: str = "",
        bounds: Bounds | None = None,
    ) -> None:
        self._folder = folder_of(queue_path, path)
        self._owner, self._beside = owner, None if path else beside
        self.bounds = bounds or Bounds(self._folder, DeadLetters(), 1, lambda _: None)  # without any
        self._begun = 0.0  # time.monotonic(): the current file, or that which was until it had been idle
        self._open: list[_File] = []  # that which is written to, and those that are not settled
        self._current: _File | None = None
        self._last: Path | None = None  # of the current file, or that which was until it had been idle
        self._written = False  # since the last tick
        self._idle_since = 0  # ns

    def write(self, line: bytes) -> None:
        """Append a dead letter (``as_line``). Raises OSError; BlockingIOError: there is no room yet, see ``Bounds``."""
        file = self._current
        if file is not None and self._fits(file, line):
            self._write(file, line)
            return
        if file is not None:  # it may have to be discarded as well
            self._last = None
            self._release()
        with self.bounds.room(len(line)):
            file = self._reopen()
            self._write(file if file is not None and self._fits(file, line) else self._create(), line)

    def tick(self, now_ns: int) -> None:
        """Close the file when other processes may have it; call this regularly (``now_ns``: time.monotonic_ns()).

        What is not settled stays open until it is.
        """
        file = self._current
        if file is None:
            return
        file.opened_ns = file.opened_ns or now_ns
        if now_ns - file.opened_ns >= MAX_OPEN_NS or _is_asked_for(file.fd):
            self._abandon(file)
        elif self._written:
            self._written, self._idle_since = False, now_ns
        elif now_ns - self._idle_since >= IDLE_NS:
            self._release()

    def close(self) -> None:
        """Close all files, settled or not; what comes after goes to another."""
        for file in self._open:
            file.close()
        self._open, self._current, self._last = [], None, None

    # ---- what becomes of what was written

    @property
    def wants_sync(self) -> bool:
        """Whether so much is unsettled that more of it would leave no room within the bounds."""
        return self.unsettled >= 2 * self.bounds.file_size

    @property
    def unsettled(self) -> int:
        """Bytes that were written since the last time all was settled."""
        return sum(file.size - file.settled for file in self._open)

    def begin_sync(self) -> Callable[[], None]:
        """Return what will put all that was written so far on stable storage; ``settle`` must follow.

        It may be called in a thread, while nothing is written. It raises OSError.
        """
        files = [file for file in self._open if file.settled < file.size]
        folder = None if all(file.name_synced for file in files) else self._folder
        return partial(_sync, [file.fd for file in files], folder)

    def settle(self, error: OSError | None = None) -> bool:
        """Return whether all that was written since the last time is safe; if not, write all of it again.

        ``error``: what came of the sync, if there was one.
        """
        files = [file for file in self._open if file.settled < file.size]
        gone = [file for file in files if not file.is_ours]
        safe = error is None and not gone
        for file in gone:
            log.warning(
                "a dead-letter file was moved, deleted or changed; its last entries are written to another",
                file=str(file.path),
            )
            file.settled = file.size
            self._abandon(file)
        for file in files:
            if safe:
                file.settled, file.name_synced = file.size, True
            elif file not in gone:
                self._take_back(file)
        self._close_settled()
        return safe

    def _take_back(self, file: _File) -> None:
        """Remove what is not settled: the packets are still queued, and will be written again."""
        try:
            os.ftruncate(file.fd, file.settled)
        except OSError:  # better twice than never
            file.settled = file.size
            self._abandon(file)
        else:
            file.size = file.settled

    # ---- files

    def _fits(self, file: _File, line: bytes) -> bool:
        """Whether a line may be appended to a file: it has room for that, and is not too old."""
        if not file.size:
            return True
        is_old = time.monotonic() - self._begun > self.bounds.file_age
        return not is_old and file.size + len(line) <= self.bounds.file_size

    def _write(self, file: _File, line: bytes) -> None:
        self._written = True
        while True:
            try:
                self._write_to(file, line)
            except OSError as error:
                self._undo(file)
                if error.errno != errno.EFBIG or not file.size:
                    self._release()
                    raise
                file = self._create()  # that one is as large as this process may make one
            else:
                return

    def _write_to(self, file: _File, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += os.write(file.fd, line[written:])
        file.size += len(line)

    def _undo(self, file: _File) -> None:
        """Leave no half of a line behind: the packet is still queued, and will be written again."""
        try:
            os.ftruncate(file.fd, file.size)
        except OSError:
            self._abandon(file)  # at least nothing will be appended to that half

    def _create(self) -> _File:
        self._last = None
        self._release()
        if self._beside is None or is_nameless(self._beside):
            make_folder(self._folder.parent)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{self._owner}{SUFFIX}"
        hidden = path.with_suffix(".new")  # until it is locked: a purge must not find and delete it before
        fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(path)
        except OSError:
            os.close(fd)
            for name in (hidden, path):  # or there would be one more for every try
                with contextlib.suppress(OSError):
                    name.unlink(missing_ok=True)
            raise
        self._last, self._begun = path, time.monotonic()
        return self._take_up(_File(fd, path))

    def _reopen(self) -> _File | None:
        """Reopen the file that was closed last, so that rare dead letters share it; None if it is locked or changed."""
        if self._last is None:
            return None
        for file in self._open:  # it waits to be closed
            if file.path == self._last:
                self._current = file
                return file
        try:
            fd = os.open(self._last, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            return None
        file = _File(fd, self._last)
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.is_ours:
                return self._take_up(file)
        os.close(fd)
        return None

    def _take_up(self, file: _File) -> _File:
        self._open.append(file)
        self._current = file
        return file

    def _release(self) -> None:
        """Close the current file as soon as it is settled; it is reopened unless another process locks it."""
        self._current = None
        self._close_settled()

    def _abandon(self, file: _File) -> None:
        """Write nothing more to a file."""
        if file is self._current:
            self._current = None
        if file.path == self._last:
            self._last = None
        self._close_settled()

    def _close_settled(self) -> None:
        """Close files that are no longer needed."""
        for file in [file for file in self._open if file is not self._current and file.settled == file.size]:
            self._open.remove(file)
            file.close()


def _sync(files: list[int], folder: Path | None) -> None:
    """Put files on stable storage, and then their names in ``folder``, if they are new."""
    for fd in files:
        os.fdatasync(fd)
    if folder is not None:
        with contextlib.suppress(FileNotFoundError):  # ``settle`` will see that
            sync_folder(folder)
            sync_entry(folder)


# A worker holds a file by flock. A process that waits for it shows that by a lock of another kind, on the first byte:
# it ends with that process, however it ends, and needs no room on a full disk.


def ask_for(fd: int) -> None:
    """Ask the worker that writes to this open file to close it soon. No effect on file systems without such locks."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(RECORD_LOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0))


def _is_asked_for(fd: int) -> bool:
    try:
        lock = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(RECORD_LOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    except OSError:
        return False
    return bool(struct.unpack(RECORD_LOCK, lock)[0] != fcntl.F_UNLCK)
