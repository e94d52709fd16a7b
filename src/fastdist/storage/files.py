"""Open files and their names: whether they still belong together, and how names get to stable storage."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from fastdist._core import has_name as has_name  # noqa: PLC0414  (for all that deals with files)

_KEPT_UNTIL_CLOSED = (".nfs", ".fuse_hidden")  # names that file systems give to deleted files that are still open


def sync_folder(folder: Path) -> None:
    """Put a folder's entries (new files, renamed ones) on stable storage. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, for us alone, and put their entries on stable storage.

    Raises OSError; FileExistsError where there is something that is no folder.
    """
    for folder in reversed([each for each in (path, *path.parents) if not each.is_dir()]):
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_entry(folder)


def sync_entry(path: Path) -> None:
    """Put the entry of a file or folder on stable storage. Raises OSError."""
    try:
        sync_folder(path.parent)
    except PermissionError:  # a folder of others, which we may not read
        os.sync()


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Return what is in a folder under names that match, sorted. Raises OSError; ``Path.glob`` would find nothing."""
    return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))


def is_irregular(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder: a pipe would keep us waiting for ever."""
    return path.exists() and not path.is_file() and not path.is_dir()


def identity(path: Path) -> tuple[int, int]:
    """Return what distinguishes a folder from another of its name; (0, 0) if it does not exist."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (state.st_dev, state.st_ino)


def present_path(fd: int) -> str | None:
    """Return where the open file is now; None if it is nowhere: deleted, or never in a folder (a memfd).

    A deleted file that has another link is nowhere as well: it is not known where that link is.
    """
    path = str(Path(f"/proc/self/fd/{fd}").readlink())
    if path.rpartition("/")[2].startswith(_KEPT_UNTIL_CLOSED):
        return None
    return path if has_name(fd, path) else None


def is_nameless(fd: int) -> bool:
    """Whether the open file cannot be found again when all processes that have it open have ended."""
    try:
        return present_path(fd) is None
    except OSError:
        return os.fstat(fd).st_nlink == 0
