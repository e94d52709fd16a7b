"""Offset files: how far a log has been sent, so that sending can go on there after anything, kill -9 included.

The rules:

1. ``offset`` only covers what the distributor has accepted, without a gap.
2. Behind it, ``planned`` names the ends of the packets that may be under way. It is written before they are sent. So
   whoever goes on makes the same packets of the same bytes, under the same ids: analyzers can tell repetitions.
3. The file is written whole beside the old one, synced and renamed: at every moment there is an old or a new one.
4. One process at a time: it is locked, and a replaced one is locked before it gets its name.
5. It is about a log, not about a name: inode, size and the bytes before the offset have to be those it has noted.
   A log that only looks like it would lose its beginning; one that is sent again only costs time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
from typing import TYPE_CHECKING, Self

import msgspec

from fastdist.deadletters import sync_folder
from fastdist.errors import FastdistError

if TYPE_CHECKING:
    from pathlib import Path

TAIL = 4096  # bytes before the offset that have to be the same
TEMPORARY_SUFFIX = ".tmp"


class InUseError(FastdistError):
    """Somebody else has the file."""


class Position(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """What an offset file says. ``identity`` is what packet ids of this log are made with."""

    file: str
    device: int
    inode: int
    identity: str
    offset: int = 0
    planned: list[int] = []
    tail: str = ""

    def fits(self, fd: int) -> bool:
        """Return whether an open file is the log that this is about. Raises OSError."""
        status = os.fstat(fd)
        # Not the device: its number may change when the system starts anew.
        return (
            status.st_ino == self.inode and status.st_size >= self.offset and tail_digest(fd, self.offset) == self.tail
        )


def tail_digest(fd: int, offset: int) -> str:
    """Return a digest of the last bytes before an offset. Raises OSError."""
    size = min(offset, TAIL)
    return hashlib.blake2b(os.pread(fd, size, offset - size), digest_size=16).hexdigest()


class OffsetFile:
    """An offset file that is this process's alone until it is closed. ``position``: what it said when it was opened."""

    def __init__(self, path: Path) -> None:
        """Open and lock it; it need not exist yet. Raises InUseError, ValueError for what is none, and OSError."""
        self.path = path
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), path.stat()):
                        self.position = _read(fd, path)
                        self._fd = fd
                        return
            except BlockingIOError:
                os.close(fd)
                raise InUseError(f"{path}: in use by another fastdist send") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was replaced between the opening and the locking

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def save(self, position: Position) -> None:
        """Replace what it says. Raises OSError, and then it says what it said before."""
        temporary = self.path.with_name(self.path.name + TEMPORARY_SUFFIX)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(position)) + b"\n")
            os.fsync(fd)
            temporary.rename(self.path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        sync_folder(self.path.parent)


def _read(fd: int, path: Path) -> Position | None:
    content = b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
    if not content:
        return None
    advice = "delete it to send the log from its beginning"
    try:
        position = msgspec.json.decode(content, type=Position)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of offsets ({error}); {advice}") from None
    ends = [position.offset, *position.planned]
    if position.offset < 0 or any(end <= before for before, end in itertools.pairwise(ends)):
        raise ValueError(f"{path}: its offsets are out of order; {advice}")
    return position
