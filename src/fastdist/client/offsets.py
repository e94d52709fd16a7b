"""Offset files: how far a log has been sent, so that sending can resume there after any end, kill -9 included.

The rules:

1. ``offset`` only covers what the distributor has accepted, without a gap.
2. Behind it, ``planned`` has the ends of the packets that may be in flight. It is written before they are sent. So the
   next run makes the same packets of the same bytes, under the same ids (of the same emitter): analyzers can recognise
   repetitions. ``cuts`` has how each was cut; one that was refused for good is not made again, its bytes are cut again.
3. The file is written whole beside the old one, synced and renamed: at every moment there is an old or a new one.
   Where that cannot be (the file alone is mounted, the folder may not be written to), lines are appended, each with a
   checksum, and the last whole one counts.
4. One process at a time: it is locked, and a replaced one is locked before it gets its name. Before each save it is
   checked whether the name still is that file; if not, the name is taken again or, if it is another's, nothing written.
5. It is about a log, not about a name: inode, time of birth, size and the bytes before the offset have to be those it
   has noted. A log that only looks like it would lose its beginning; one that is sent again only costs time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
from pathlib import Path
from typing import Self

import msgspec

from fastdist._core import birth_ns
from fastdist.errors import UNDECODABLE, FastdistError
from fastdist.storage.files import has_name, sync_folder
from fastdist.storage.locks import open_locked, try_lock

TAIL = 4096  # bytes before the offset that have to be the same
TEMPORARY_SUFFIX = ".tmp"
RECORD = b"\n#fastdist "  # before the checksum of a line that was written in place
MAX_IN_PLACE = 1 << 16  # bytes, after which lines are written from the beginning again
CANNOT_REPLACE = {errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES, errno.EPERM}


class InUseError(FastdistError):
    """Another run has the file."""


class Position(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """What an offset file says. ``identity`` is what packet ids of this log are made with.

    ``cuts`` has for each planned packet the ``Recipe.max_bytes`` that it was cut with, 0 if it was
    refused. ``birth`` (0: not known) and ``written``, when the log was last written to, are in ns. ``siblings`` are
    inode and birth of the rotated logs that lay beside it while it had its name: none of them is younger.
    """

    file: str
    device: int
    inode: int
    identity: str
    offset: int = 0
    planned: list[int] = []
    tail: str = ""
    cuts: list[int] = []
    birth: int = 0
    written: int = 0
    siblings: list[tuple[int, int]] = []

    @property
    def key(self) -> tuple[int, int]:
        """What identifies the log among all others, while its birth is known."""
        return self.inode, self.birth

    def is_about(self, fd: int) -> bool:
        """Return whether an open file has the inode and the birth of the log that this is about. Raises OSError."""
        # Not the device: its number may change when the system restarts.
        if os.fstat(fd).st_ino != self.inode:
            return False
        birth = birth_ns(fd)
        return birth == self.birth or not birth or not self.birth

    def fits(self, fd: int) -> bool:
        """Return whether an open file is the log that this is about, and goes on from there. Raises OSError."""
        return (
            self.is_about(fd)
            and os.fstat(fd).st_size >= self.offset
            and tail_digest(os.pread(fd, min(self.offset, TAIL), max(0, self.offset - TAIL))) == self.tail
        )


def tail_digest(before: bytes) -> str:
    """Return a digest of the last bytes before an offset."""
    return hashlib.blake2b(before[-TAIL:], digest_size=16).hexdigest()


def file_text(path: Path) -> str:
    """Return a path, absolute, as text that can be written: what is no UTF-8 in it is shown in hexadecimal."""
    absolute = os.path.abspath(path)  # noqa: PTH100  (resolve() would follow links, which are exchanged)
    return os.fsencode(absolute).decode(errors="backslashreplace")


class OffsetFile:
    """An offset file that is this process's alone until it is closed. ``position``: what it said when it was opened."""

    def __init__(self, path: Path) -> None:
        """Open and lock it; it need not exist yet. Raises InUseError, OSError, ValueError for other files."""
        self.path = path
        self._in_place = False
        self._saved: Position | None = None  # by this process
        self._last = 0  # bytes of the line that was last written in place
        self._fd = self._open()
        try:
            self.position = _read(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self) -> int:
        """Return the file that has the name, open and locked; created if it does not exist."""
        return open_locked(self.path, os.O_RDWR | os.O_CREAT, self._lock)

    def _lock(self, fd: int) -> None:
        if not try_lock(fd):
            raise InUseError(f"{self.path}: in use by another fastdist send")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def offset(self) -> int:
        """Up to where the log is sent, as the file says."""
        said = self._saved or self.position
        return said.offset if said else 0

    @property
    def has_its_name(self) -> bool:
        """Whether the name still is the file that was written last: not deleted, not exchanged, nor its folder."""
        try:
            return has_name(self._fd, self.path)
        except OSError:  # writing says what is wrong
            return False

    def save(self, position: Position) -> None:
        """Replace what it says. Raises InUseError, and OSError; then it says what it said before."""
        if not self.has_its_name:
            fd = self._open()
            os.close(self._fd)
            self._fd = fd
        # That the log was written to is not worth a sync.
        elif self._saved == msgspec.structs.replace(position, written=self._saved.written if self._saved else 0):
            return
        if not self._in_place:
            try:
                self._replace(position)
            except OSError as error:
                if error.errno not in CANNOT_REPLACE:
                    raise
                self._in_place = True
        if self._in_place:
            self._append(position)
        self._saved = position

    def _replace(self, position: Position) -> None:
        """Write it beside the file, and give it the file's name."""
        target = Path(os.path.realpath(self.path))  # not the link to it
        temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(position)) + b"\n")
            os.fsync(fd)
            temporary.rename(target)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        sync_folder(target.parent)

    def _append(self, position: Position) -> None:
        """Write it behind what the file says; from its beginning when that has become long and is not overwritten."""
        content = msgspec.json.encode(position)
        line = RECORD + _checksum(content) + b" " + content + b"\n"
        end = os.fstat(self._fd).st_size
        again = self._last > 0 and end > MAX_IN_PLACE and end - self._last >= len(line)
        start = 0 if again else end
        if os.pwrite(self._fd, line, start) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self._fd)
        if again:
            os.ftruncate(self._fd, len(line))
            os.fsync(self._fd)
        self._last = len(line)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def _read(fd: int, path: Path) -> Position | None:
    content = b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
    whole, *lines = content.split(RECORD)
    for line in reversed(lines):
        checksum, _, text = line.partition(b"\n")[0].partition(b" ")
        if checksum == _checksum(text):
            whole = text
            break
    if not whole.strip():
        return None
    advice = "delete it to send the log from its beginning"
    try:
        position = msgspec.json.decode(whole, type=Position)
    except UNDECODABLE as error:
        raise ValueError(f"{path}: not a file of offsets ({error}); {advice}") from None
    ends = [position.offset, *position.planned]
    if position.offset < 0 or any(end <= before for before, end in itertools.pairwise(ends)):
        raise ValueError(f"{path}: its offsets are out of order; {advice}")
    if position.cuts and len(position.cuts) != len(position.planned):
        raise ValueError(f"{path}: its plan is not whole; {advice}")
    return position
