"""Files of dead letters that are changed: held by this process alone, with a journal of what was replayed.

The rules:

1. A file is changed only under its lock; a worker that is writing to it is asked for it, and releases it at once.
2. What was replayed is noted at once in the file's journal; the file itself is rewritten once, when all of it has been
   gone through. (Rewriting it every so often instead would write a file of 64 MiB many times over.)
3. At every moment either the old file or the new one is there, whole.
4. The journal says as well to whom what is noted was sent, and since when: they may have lost it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Self

from fastdist.storage.dead_letter_files import ask_for
from fastdist.storage.dead_letter_format import JOURNAL_SUFFIX, SUFFIX, digest_of, journal_of, read_journal, read_lines
from fastdist.storage.files import sync_folder
from fastdist.storage.locks import open_locked, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator
    from pathlib import Path

    from fastdist.storage.dead_letter_format import Found, Line

LOCK_PATIENCE = 5.0  # seconds to wait for a file that a worker has open
ASK_EVERY = 0.05  # seconds
TEMPORARY_SUFFIX = ".tmp"
SENT_TO = re.compile(r"to (\w+) since (\d+\.\d+)", re.ASCII)  # a line of a journal: no offset, no digest


class HeldFile:
    """A file of dead letters that is this process's alone until it is closed.

    ``sent_to``: to whom what is noted was sent, as far as the journal says it, and since when (``time.time()``);
    ``noted``: when the last was.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._replayed = read_journal(path)
        self.sent_to = _sent_to(path)
        self.noted = journal_of(path).stat().st_mtime if self._replayed else 0.0
        self._file = os.fdopen(fd, "rb")  # last: what fails before leaves fd to the caller
        self._journal = -1

    @classmethod
    def hold(cls, path: Path, patience: float) -> HeldFile | None:
        """Open and lock a file; None when it is gone. Raises BlockingIOError after ``patience`` seconds."""
        end = time.monotonic() + patience

        def lock(fd: int) -> None:
            while not try_lock(fd):
                if time.monotonic() > end:
                    raise BlockingIOError
                ask_for(fd)
                time.sleep(ASK_EVERY)

        try:
            fd = open_locked(path, os.O_RDONLY, lock)
        except FileNotFoundError:
            return None
        try:
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def hold_or_skip(cls, path: Path, note: Callable[[str], None]) -> HeldFile | None:
        """Do the same; None also when a worker still writes to it, which ``note`` reports."""
        try:
            return cls.hold(path, LOCK_PATIENCE)
        except BlockingIOError:
            note(f"{path.name}: skipped, a worker is writing to it; try again later")
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal >= 0:
            os.close(self._journal)
        self._file.close()

    @property
    def has_replayed(self) -> bool:
        """Whether there are dead letters in it that were replayed."""
        return bool(self._replayed)

    def lines(self, end: int = sys.maxsize) -> Iterator[Line]:
        """Yield the lines that start before ``end`` bytes and have not been replayed."""
        return read_lines(self._file, end, self._replayed)

    def note_replayed(self, line: Line, peer: str = "") -> None:
        """Note that a dead letter was replayed: from now on it is no longer in this file. Raises OSError.

        ``peer`` is a word for whom it was sent to, the same for all dead letters.
        """
        digest = self._replayed[line.offset] = digest_of(line.raw)
        self.noted = time.time()
        if self._journal < 0:
            since = f"to {peer} since {self.sent_to.setdefault(peer, time.time()):.3f}" if peer else ""
            self._journal = self._create(journal_of(self.path), os.O_APPEND)
            os.write(self._journal, f"\n{since}\n".encode())  # the last entry may have been torn
        os.write(self._journal, f"{line.offset} {digest}\n".encode())

    def forget_replayed(self) -> None:
        """Have what was noted as replayed be in this file again. Raises OSError."""
        journal_of(self.path).unlink(missing_ok=True)
        self._replayed, self.sent_to = {}, {}

    def rewrite(self, gone: Container[int] = ()) -> None:
        """Replace the file by one without the lines at these offsets and what was replayed; delete it if none is left.

        Raises OSError, and then it is the old one.
        """
        if not gone and not self._replayed and os.fstat(self._file.fileno()).st_size:
            return
        if any(line.offset not in gone for line in self.lines()):
            self._replace(gone)
        else:  # without a new file: the disk may be full
            self.path.unlink(missing_ok=True)
            self._temporary.unlink(missing_ok=True)  # of one that was killed
        journal_of(self.path).unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + TEMPORARY_SUFFIX)

    def _replace(self, gone: Container[int]) -> None:
        try:
            with os.fdopen(self._create(self._temporary, os.O_TRUNC), "wb") as out:
                out.writelines(line.raw.removesuffix(b"\n") + b"\n" for line in self.lines() if line.offset not in gone)
                out.flush()
                was = os.fstat(self._file.fileno())  # what is left is as old as it was
                os.utime(out.fileno(), ns=(was.st_atime_ns, was.st_mtime_ns))
                os.fsync(out.fileno())
            self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            raise

    def _create(self, path: Path, flag: int) -> int:
        """Open a file next to this one, which has the same owner also where root does this."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flag, 0o600)
        owner = os.fstat(self._file.fileno())
        with contextlib.suppress(PermissionError):
            os.fchown(fd, owner.st_uid, owner.st_gid)
        return fd


def _sent_to(path: Path) -> dict[str, float]:
    try:
        lines = journal_of(path).read_text("latin-1").split("\n")
    except FileNotFoundError:
        return {}
    found: dict[str, float] = {}
    for match in filter(None, map(SENT_TO.fullmatch, lines)):
        found.setdefault(match[1], float(match[2]))
    return found


def tidy(files: list[Found]) -> None:
    """Remove what a killed replay or purge left behind of files that are gone."""
    for folder in {found.path.parent for found in files}:
        for file in folder.iterdir():
            for suffix in (JOURNAL_SUFFIX, TEMPORARY_SUFFIX):
                if file.name.endswith(SUFFIX + suffix) and not file.with_suffix("").exists():
                    file.unlink(missing_ok=True)
