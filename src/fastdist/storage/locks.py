"""Locks of whole files (flock), and the processes that hold them.

A lock belongs to the open file, not to the process: a process that inherits the descriptor holds it as well, and it
stays through renaming. It ends with the last descriptor.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastdist.storage.files import has_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCKS = Path("/proc/locks")


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file, exclusively or shared with other readers; return whether that was possible at once."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_locked(path: Path, flags: int, lock: Callable[[int], None]) -> int:
    """Open the file that has this name, and lock it; again when it was replaced meanwhile.

    Raises OSError, and what ``lock`` (which gets the descriptor) raises.
    """
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            lock(fd)
            if has_name(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def is_only_read(fd: int) -> bool:
    """Whether the processes that hold the file have locked it for reading only."""
    if not try_lock(fd, shared=True):
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def holder(fd: int) -> int | None:
    """Return the pid of a process that has locked the file; None where the system does not show it.

    It is the process that asked for the lock. That one may have ended, and others may have inherited the descriptor.
    """
    state = os.fstat(fd)
    inode = str(state.st_ino)
    exact = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{inode}"
    found = [(pid, place) for pid, place in _locks() if place.rpartition(":")[2] == inode and pid != os.getpid()]
    # Some file systems (overlayfs, btrfs) have numbers of their own there: then the inode has to do.
    return next((pid for pid, place in found if place == exact), found[0][0] if found else None)


def write_pid(fd: int) -> None:
    """Write our pid into a file that we have locked."""
    with contextlib.suppress(OSError):  # on a full disk: it is only for people
        os.pwrite(fd, f"{os.getpid():<16}".encode(), 0)


def written_pid(fd: int) -> int | None:
    """Return the pid of another process that ``write_pid`` has left in the file."""
    written = os.pread(fd, 32, 0).strip()
    return int(written) if written.isdigit() and int(written) != os.getpid() else None


def _locks() -> Iterator[tuple[int, str]]:
    """Yield pid and device:inode of every flock that is held."""
    try:
        lines = LOCKS.read_text("latin-1").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 fe:00:131074 0 EOF; one that is waited for has "->" second
        if len(words) > 5 and words[1] == "FLOCK" and words[4].isdecimal():  # noqa: PLR2004
            yield int(words[4]), words[5]


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    import psutil  # noqa: PLC0415  (takes a while, and is needed only when another process is in the way)

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.Error):
        return False


def describe(pid: int | None) -> str:
    """Return how messages name a process."""
    if pid is None:
        return "an unknown process"
    import psutil  # noqa: PLC0415  (as above)

    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"
