"""A census of the dead letters that are there, kept up to date by reading only what is new.

1. Of each file is remembered what was counted in it, and how far it was read. Only what was appended is read, and of
   what a replay has noted in the journal only those lines, which are taken out again.
2. A file that is another one by now (a replay or a purge has rewritten it), or whose last line that was read is not
   there any more (a failed sync was taken back), or whose journal was deleted is read again from its beginning.
3. A line counts once it is whole. What is left of one that was torn counts as unreadable when nothing follows it.

So the figures follow what workers, replays, purges and other tools do to the files, within a look.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

from fastdist.dead_letter_report import LAST, MAX_ERROR, Count, Described, Report
from fastdist.storage.dead_letter_format import (
    SUFFIX,
    UNREADABLE,
    DeadLetter,
    decoded,
    digest_of,
    journal_of,
    read_journal,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RECENT = 64  # files whose last dead letters are remembered
MAX_NAME = 64  # characters of a reason or an analyzer's id, as long as the longest of ours


class HaltedError(Exception):
    """The census is not wanted any more."""


class _FileCensus:
    """What was counted in one file."""

    def __init__(self, path: Path, identity: tuple[int, int]) -> None:
        self.path = path
        self._begin(identity)

    def _begin(self, identity: tuple[int, int]) -> None:
        self.identity = identity
        self.read = 0  # bytes: up to where it was read
        self._state = (0, 0)  # size and time of the last look
        self.counts: Counter[tuple[str, str]] = Counter()
        self.last: dict[int, datetime] = {}  # when the last were given up, by offset
        self._described: dict[int, Described] = {}  # of these
        self._last_line = (0, "")  # that was read: its offset and digest
        self._replayed: dict[int, str] = {}  # that is done with
        self._journal: tuple[int, int, int] | None = None  # inode, size and time of the journal that was read
        self.torn = False

    def look(self, seen: os.stat_result, halted: Callable[[], bool]) -> None:
        """Count what has changed."""
        journal, now = _state(journal_of(self.path)), (seen.st_size, seen.st_mtime_ns)
        if (now, journal) == (self._state, self._journal) and (self.read == seen.st_size or self.torn):
            return
        # The journal first: a replay that ends removes or renames the file, and only then its journal.
        replayed = read_journal(self.path) if journal else {}
        with self.path.open("rb") as file:
            state = os.fstat(file.fileno())
            identity, is_undone = (state.st_dev, state.st_ino), not self._replayed.items() <= replayed.items()
            if identity != self.identity or is_undone or not self._is_continued(file):
                self._begin(identity)
            if journal != self._journal:
                self._take_out(file, replayed)
                self._journal = journal
            self._read_on(file, unchanged=now == self._state, halted=halted)
        self._state = now

    def _is_continued(self, file: BinaryIO) -> bool:
        """Whether what was read is there still."""
        offset, digest = self._last_line
        if not self.read:
            return True
        file.seek(offset)
        return digest_of(file.read(self.read - offset)) == digest

    def _read_on(self, file: BinaryIO, *, unchanged: bool, halted: Callable[[], bool]) -> None:
        file.seek(self.read)
        self.torn = False
        for raw in file:
            if halted():
                raise HaltedError
            if not raw.endswith(b"\n"):
                self.torn = unchanged and bool(raw.strip())
                return
            digest = digest_of(raw)
            if self._replayed.get(self.read) != digest:
                self._count(self.read, raw, 1)
            self._last_line = self.read, digest
            self.read += len(raw)

    def _take_out(self, file: BinaryIO, replayed: dict[int, str]) -> None:
        """Take out what was counted and has been replayed since."""
        for offset in replayed.keys() - self._replayed.keys():
            if offset < self.read:
                file.seek(offset)
                raw = file.readline()
                if digest_of(raw) == replayed[offset]:
                    self._count(offset, raw, -1)
        self._replayed = replayed

    def _count(self, offset: int, raw: bytes, times: int) -> None:
        dead_letter = decoded(raw)
        if dead_letter is None:
            if raw.strip():
                self.counts[UNREADABLE, ""] += times
            return
        self.counts[dead_letter.reason[:MAX_NAME], (dead_letter.analyzer or "")[:MAX_NAME]] += times
        if times < 0:
            self._forget(offset)
            return
        self.last[offset] = dead_letter.dead_lettered_at
        if len(self.last) > LAST:
            self._forget(next(iter(self.last)))

    def _forget(self, offset: int) -> None:
        self.last.pop(offset, None)
        self._described.pop(offset, None)

    def describe(self, offset: int) -> Described | None:
        """Return one of the last dead letters; None if it is gone."""
        if offset not in self._described:
            try:
                with self.path.open("rb") as file:
                    file.seek(offset)
                    dead_letter = decoded(file.readline())
            except OSError:
                return None
            if dead_letter is None:
                return None
            self._described[offset] = _described(dead_letter)
        return self._described[offset]

    def forget_last(self) -> None:
        """Describe none of them any more: there are many files with later ones."""
        self.last.clear()
        self._described.clear()


class Census:
    """What is in ``folder``; ``look`` brings it up to date."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _FileCensus] = {}  # by name
        self._seen: set[tuple[str, str]] = set()  # of which there were any: they are 0 now, and not unknown

    def look(self, halted: Callable[[], bool] = lambda: False) -> Report:
        """Return what is there now. Raises OSError, and HaltedError as soon as ``halted()`` is true."""
        found: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and entry.is_file():
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = self._look_at(entry, halted)
        self._files = {name: self._files[name] for name in sorted(found) if name in self._files}
        for file in list(self._files.values())[:-RECENT]:
            file.forget_last()
        return self._report(sum(found.values()))

    def _look_at(self, entry: os.DirEntry[str], halted: Callable[[], bool]) -> int:
        """Count what is new in a file; return its size. Raises FileNotFoundError when it is gone."""
        state = entry.stat()
        identity, file = (state.st_dev, state.st_ino), self._files.get(entry.name)
        if file is None or file.identity != identity:
            file = self._files[entry.name] = _FileCensus(self._folder / entry.name, identity)
        file.look(state, halted)
        return state.st_size

    def _report(self, size: int) -> Report:
        counts: Counter[tuple[str, str]] = Counter()
        for file in self._files.values():
            counts.update(file.counts)
            counts[UNREADABLE, ""] += file.torn
        self._seen |= {kind for kind, packets in counts.items() if packets}
        found = [(moment, file, offset) for file in self._files.values() for offset, moment in file.last.items()]
        latest = heapq.nlargest(LAST, found, key=lambda each: each[0])
        last = [file.describe(offset) for _, file, offset in latest]
        space = _space(self._folder)
        return Report(
            counts=tuple(Count(*kind, packets=counts[kind]) for kind in sorted(self._seen)),
            bytes=size,
            files=len(self._files),
            last=tuple(each for each in last if each is not None),
            size=space[0],
            available=space[1],
        )


def _described(dead_letter: DeadLetter) -> Described:
    return Described(
        id=dead_letter.id,
        reason=dead_letter.reason,
        analyzer=dead_letter.analyzer,
        status=dead_letter.status,
        error=dead_letter.error and dead_letter.error[:MAX_ERROR],
        attempts=dead_letter.attempts,
        messages=dead_letter.messages,
        accepted_at=_iso(dead_letter.accepted_at),
        dead_lettered_at=_iso(dead_letter.dead_lettered_at),
        bytes=len(dead_letter.packet),
    )


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def _space(folder: Path) -> tuple[int, int]:
    """Return how large the file system of a folder is, as far as it can be used by us, and how much is available."""
    for path in (folder, *folder.absolute().parents):
        with contextlib.suppress(FileNotFoundError):
            found = os.statvfs(path)
            used = found.f_blocks - found.f_bfree
            return (used + found.f_bavail) * found.f_frsize, found.f_bavail * found.f_frsize
    return 0, 0
