"""Files of single rings: looked at, made, converted, and replaced by those of which a part can be read.

A ring is made under another name (``beside``), and is whole and locked when it gets its own. What cannot be read is
renamed (``name_aside``) for a person to look at, never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from typing import TYPE_CHECKING, NamedTuple

from fastdist import logs
from fastdist._core import (
    CutShortError,
    DamagedError,
    NewerFormatError,
    PacketRing,
    RingError,
    file_size,
    record_bytes,
)
from fastdist.errors import StartError
from fastdist.storage import format1
from fastdist.storage.files import is_irregular
from fastdist.storage.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ID_BYTES = 64  # at most
NEW = ".new"

log = logs.get()


class Found(NamedTuple):
    """A ring as it was found: bytes of its data, packets that wait, whether anything is damaged."""

    capacity: int
    packets: int
    damaged: bool

    @property
    def is_empty(self) -> bool:
        """Whether nothing is lost with it, and nothing is to be reported of it."""
        return not (self.packets or self.damaged)


def look_at(path: Path, fd: int, rings: dict[Path, int]) -> Found | str:
    """Return what is known of a ring, or what is wrong with the file. Raises StartError where that is not ours to fix.

    A file that was cut short is given its length again: what is left of it can then be recovered. One that cannot be
    read in part is replaced.
    """
    try:
        try:
            ring = PacketRing(fd, private=True)
        except CutShortError as cut:
            log.warning("a queue file was cut short", file=str(path), bytes=os.fstat(fd).st_size)
            os.truncate(fd, file_size(cut.capacity))
            ring = PacketRing(fd, private=True)
        if ring.broken:
            ring = _keep_readable(path, ring, rings)
        return Found(ring.capacity, ring.undone, bool(ring.damage))
    except NewerFormatError as error:
        raise StartError(f"{path}: {error}; it is left as it is") from error
    except RingError as error:
        return str(error)
    except OSError as error:
        raise StartError(f"cannot open the queue file {path}: {error.strerror}") from error


def name_aside(path: Path) -> Path:
    """Return a name for a file that is set aside."""
    return path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")


def log_aside(path: Path, aside: Path, why: str) -> None:
    """Log that a file that cannot be read was renamed."""
    log.error("a queue file cannot be read and is set aside", file=str(path), moved_to=str(aside), why=why)


def _keep_readable(path: Path, broken: PacketRing, rings: dict[Path, int]) -> PacketRing:
    """Replace a ring by a new one, just large enough, with the packets that can be read; set the file aside.

    Raises OSError, StartError.
    """
    sizes = [record_bytes(ID_BYTES, len(packet.body)) for packet in broken.waiting()]

    def copy(new: int) -> None:
        ring = PacketRing(new)
        while handle := broken.claim():
            with contextlib.suppress(DamagedError):
                if not ring.push_copy(broken, handle):
                    raise OSError(errno.ENOSPC, "its packets do not fit into a new one", str(path))

    aside = name_aside(path)
    aside.hardlink_to(path)
    try:
        fd = replace(path, sum(sizes) + 2 * max(sizes, default=0), copy)
    except BaseException:
        aside.unlink()
        raise
    os.close(rings[path])
    rings[path] = fd
    log.error(
        "a queue file cannot be read in part; its other packets are in a new one, and it is set aside",
        file=str(path),
        moved_to=str(aside),
        packets=len(sizes),
        why="; ".join(f"at {offset}: {what}" for offset, what in broken.damage),
    )
    return PacketRing(fd, private=True)


def convert(path: Path, fd: int, rings: dict[Path, int]) -> None:
    """Replace a ring of format 1, open as ``fd``, by one of the present format with the packets that wait in it.

    A damaged one is kept beside it.
    """

    def copy(new: int) -> None:
        ring = PacketRing(new)
        for packet in format1.read(fd).waiting():
            if not ring.push(**packet._replace(flags=0)._asdict()):
                raise OSError(errno.ENOSPC, "its packets do not fit into a new one")

    try:
        old, size, largest = format1.read(fd), 0, 0
        for packet in old.waiting():
            record = record_bytes(len(packet.key or ""), len(packet.body))
            size, largest = size + record, max(largest, record)
        with contextlib.ExitStack() as undo:
            if old.damage:
                aside = name_aside(path)
                aside.hardlink_to(path)
                undo.callback(aside.unlink)
            rings[path] = replace(path, size + 2 * largest, copy)
            undo.pop_all()
    except RingError:
        return  # it is set aside
    except OSError as error:
        raise StartError(f"cannot convert the queue file {path} to the present format: {error.strerror}") from error
    os.close(fd)
    if old.damage:
        log.error("a queue file is damaged and is kept", file=str(aside), packets=old.undone, lost=old.corrupt)
    log.info("a queue file of an older version was converted", file=str(path), packets=old.undone)


def replace(path: Path, capacity: int, fill: Callable[[int], None]) -> int:
    """Make a ring, with what ``fill`` puts into it, in the place of another. Return it open.

    Raises StartError, OSError.
    """
    with contextlib.ExitStack() as undo:
        fd = make_beside(path, capacity, undo)
        fill(fd)
        os.fsync(fd)
        beside(path).rename(path)
        undo.pop_all()
    return fd


def make_beside(path: Path, capacity: int, undo: contextlib.ExitStack) -> int:
    """Make a ring under another name: one that is renamed then is whole, and locked. Return it open."""
    new = beside(path)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    undo.callback(os.close, fd)
    if not try_lock(fd):
        raise _being_made(path)
    undo.callback(new.unlink, missing_ok=True)  # what was allocated is needed by others
    os.truncate(fd, 0)  # only now: it may have been another's
    make(fd, capacity, str(path))
    return fd


def beside(path: Path) -> Path:
    """Return the name under which a ring is made."""
    return path.with_suffix(NEW)


def delete_half_made(path: Path) -> None:
    """Delete what a start that was killed has left. Raises StartError if another fastdist is making it, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not try_lock(fd):
            raise _being_made(path)
        path.unlink()
    finally:
        os.close(fd)


def _being_made(path: Path) -> StartError:
    return StartError(f"the queue file {path} is being made by another fastdist; give each its own queue.path")


def open_ring(path: Path) -> int:
    """Open a ring's file, unlocked. Raises StartError."""
    try:
        if is_irregular(path):
            raise StartError(f"cannot open the queue file {path}: not a regular file")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(f"cannot open the queue file {path}: {error.strerror}") from error


def make(fd: int, capacity: int, what: str) -> None:
    """Make a ring of ``capacity`` bytes in an open file; ``what``: how errors call it. Raises StartError."""
    allocate(fd, file_size(capacity), what)
    try:
        PacketRing(fd, capacity)
        os.fsync(fd)
    except OSError as error:
        raise StartError(f"cannot make the queue ({what}): {error.strerror}") from error


def allocate(fd: int, size: int, what: str, begin: int = 0) -> None:
    """Allocate the file's space from ``begin`` on: a full disk must show here, not in the middle of a write.

    Raises StartError.
    """
    try:
        os.posix_fallocate(fd, begin, size - begin)
    except OSError as error:
        raise StartError(
            f"cannot allocate {size} bytes for the queue ({what}): {error.strerror}; make room or lower queue.capacity"
        ) from error


def clear(fd: int, size: int, what: str) -> None:
    """Write zeros: a page of shared memory is cleared when it is first written to, and that is not to be by a push.

    256 MiB take some 60 ms.
    """
    allocate(fd, size, what)
    zeros = bytes(1 << 20)
    at = 0
    while at < size:
        at += os.pwrite(fd, zeros[: size - at], at)
