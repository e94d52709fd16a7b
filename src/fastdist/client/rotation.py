"""Rotated logs: which of those beside a log came after it, in what order.

The rules:

1. After a log that was rotated comes the next of the chain, not what has the name now: there may be several.
2. What lay beside a log while it had the name is older than it, or a copy. So the younger ones are those that were not
   there then; the time of birth says in what order they came. The one that has the name is the last.
3. A file is known by inode and time of birth, whatever it is called now. Where the file system has no time of birth,
   the younger ones are those that were written to later.
4. What is compressed cannot be sent; it is reported.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastdist._core import birth_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.client.offsets import Position

COMPRESSED = (".gz", ".xz", ".zst", ".bz2", ".lz4", ".Z")
MARK = r"[.\-_](?:\d[\d.:_TZ+-]*|old|bak|prev)"  # of a rotation: a number, a time
MAX_LISTS = 20  # of a folder that changes all the while
SECOND = 1_000_000_000  # ns


class File(NamedTuple):
    """A file as it lay there. ``birth`` (0: not known) and ``written``, its last change, in ns."""

    path: Path
    inode: int
    birth: int
    written: int
    regular: bool

    @property
    def key(self) -> tuple[int, int]:
        """What identifies it among all others, while its birth is known."""
        return self.inode, self.birth

    @property
    def compressed(self) -> bool:
        """Whether its lines can only be read after unpacking it."""
        return self.path.name.endswith(COMPRESSED)

    @property
    def order(self) -> int:
        """What sorts files by when they were written."""
        return self.birth or self.written


def file_at(path: Path, *, follow: bool) -> File | None:
    """Return what has a name (of a link, to ``follow`` it: its target), readable or not; None if nothing has."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        return File(path, status.st_ino, birth_ns(fd), status.st_mtime_ns, stat.S_ISREG(status.st_mode))
    finally:
        os.close(fd)


class Rotation:
    """A log's name, and the folder with the rotated logs that had it: also that of the file a link leads to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def current(self) -> File | None:
        """Return what has the name now. Raises OSError but for FileNotFoundError."""
        return file_at(self.path, follow=True)

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Yield all that lies in the folders; nothing of one that cannot be read."""
        for folder in {self.path.absolute().parent, self.path.resolve().parent}:
            try:
                with os.scandir(folder) as entries:
                    yield from entries
            except (FileNotFoundError, PermissionError):
                continue

    def stamp(self) -> tuple[int, ...]:
        """Return what is another value once anything was renamed, made or deleted in the folders (a tick apart)."""
        folders = sorted({self.path.absolute().parent, self.path.resolve().parent})
        return tuple(folder.stat().st_mtime_ns for folder in folders if folder.exists())

    def rotated(self) -> list[File]:
        """Return the rotated logs.

        The folder is listed until two lists are equal: one alone may miss what is renamed meanwhile.
        """
        files = self._look()
        for _ in range(MAX_LISTS):
            before, files = files, self._look()
            if {(file.path, file.key) for file in before} == {(file.path, file.key) for file in files}:
                break
        return files

    def _look(self) -> list[File]:
        forms = re.compile("|".join({_forms(self.path.name), _forms(self.path.resolve().name)}))
        found = (file_at(Path(entry.path), follow=False) for entry in self.entries() if forms.fullmatch(entry.name))
        return [file for file in found if file is not None and file.regular]

    def after(self, log: Position, *, gone: bool = False) -> tuple[list[File], list[File]]:
        """Return what came after a log: those to be sent, in order, and those that cannot because they are compressed.

        ``gone``: the log itself is no longer there, and may be one of the latter.
        """
        current, rotated = self.current(), self.rotated()
        known = {log.key, *log.siblings}
        chain = [file for file in rotated if not file.compressed and _is_younger(file, log, known)]
        chain = sorted((file for file in chain if current is None or file.key != current.key), key=lambda f: f.order)
        if current is not None and (gone or current.key != log.key):
            chain.append(current)
        since = log.written // SECOND * SECOND - 1 if gone else log.written  # times of the packed may be less exact
        plain = {file.path.name for file in rotated}
        packed = [
            file
            for file in rotated
            if file.compressed
            and file.written > since
            and file.key not in known
            and file.path.stem not in plain  # else it is being compressed
        ]
        return chain, packed


def _is_younger(file: File, log: Position, known: set[tuple[int, int]]) -> bool:
    if not log.written:  # an offset file of a version that noted neither
        return False
    if file.birth and log.birth:
        return file.key not in known and file.written >= log.birth  # else it was restored from somewhere
    return file.inode != log.inode and file.written > log.written


def _forms(name: str) -> str:
    """Return a pattern of the names that rotated logs get: app.log.1, app.log-20240131.gz, app-20240131.log, ..."""
    stem, dot, extension = name.rpartition(".")
    forms = [re.escape(name) + MARK, *([re.escape(stem) + MARK + re.escape(dot + extension)] if stem else [])]
    return f"(?:{'|'.join(forms)})(?:{'|'.join(map(re.escape, COMPRESSED))})?"
