"""Where lines come from: a log file, which may grow, be rotated or truncated meanwhile, or a stream such as a pipe.

The rules:

1. A log is sent from where its offset file says, if that is about this very log; else from its beginning. One that was
   renamed since is finished first, wherever in the same folder it is now.
2. What was planned before is cut as it was planned (see ``offsets``).
3. A log is followed until another file has its name and nothing more was written for a while: writers notice a
   rotation late. A log that has become shorter than what was read of it begins anew.
4. What has been read from a stream cannot be read again: when told to stop, a stream still yields all of it.
"""

from __future__ import annotations

import os
import secrets
import select
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fastdist.lines import LineCutter
from fastdist.offsets import Position, tail_digest
from fastdist.packing import Packer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastdist.offsets import OffsetFile
    from fastdist.packing import Packet, Recipe

BLOCK = 1 << 18  # bytes that are read at once
IDLE = 0.25  # seconds between looks at a log that is followed
LINGER = 0.5  # seconds that lines of a stream wait for more to make a packet with
ROTATION_PATIENCE = 5.0  # seconds without a line before a renamed log is done with
MOST_LEFT_IN_PIPE = 1 << 20  # bytes: the largest pipe an ordinary user may have


class Log:
    """An open log file, to be read from its position on. ``outcome`` says why its packets ended."""

    resumable = True

    def __init__(self, path: Path, fd: int, position: Position, recipe: Recipe) -> None:
        """``path`` is the name that is watched."""
        self.path, self.position = path, position
        self.name = path  # what it is called now
        self.outcome = ""  # "end", "rotated" or "truncated"
        self._fd, self._recipe = fd, recipe
        self._at = position.offset
        self._moved_at: float | None = None

    @property
    def start(self) -> int:
        """The offset from which on it is sent."""
        return self.position.offset

    @property
    def size(self) -> int:
        """Bytes of the whole log, now."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def reached(self, offset: int, planned: list[int]) -> Position:
        """Return the position after that much has been sent. Raises OSError."""
        return msgspec.structs.replace(
            self.position, offset=offset, planned=planned, tail=tail_digest(self._fd, offset)
        )

    def packets(self, stopping: Callable[[], bool], *, follow: bool = False) -> Iterator[Packet | None]:
        """Yield packets; None when there is nothing more for now. Raises OSError."""
        yield from self._planned()
        cutter = LineCutter(self._recipe.longest, self._at, at_start=self._begins_line(self._at))
        packer = Packer(self._recipe, self.position.identity)
        while not stopping():
            if data := os.pread(self._fd, BLOCK, self._at):
                self._at += len(data)
                for line in cutter.feed(data):
                    yield from packer.add(line)
                continue
            if follow:
                yield from packer.flush()
                yield None
            self.outcome = self._state() if follow else "end"
            if self.outcome:
                for line in cutter.finish():
                    yield from packer.add(line)
                yield from packer.flush()
                return
            time.sleep(IDLE)
        if follow:  # what was read is to be sent; a line without an end is not
            yield from packer.flush()

    def _planned(self) -> Iterator[Packet]:
        """Yield the packets that may have been under way when this was sent before."""
        for end in self.position.planned:
            if end > self.size:
                return  # a crash of the system has cost the log its end
            data = self._read(self._at, end)
            cutter = LineCutter(self._recipe.longest, self._at, at_start=self._begins_line(self._at))
            packer = Packer(self._recipe, self.position.identity, all_in_one=True)
            for line in (*cutter.feed(data), *cutter.finish()):
                yield from packer.add(line)
            self._at = end
            yield from packer.flush()

    def _read(self, start: int, end: int) -> bytes:
        parts = []
        while start < end and (data := os.pread(self._fd, end - start, start)):
            parts.append(data)
            start += len(data)
        return b"".join(parts)

    def _begins_line(self, offset: int) -> bool:
        return offset == 0 or os.pread(self._fd, 1, offset - 1) == b"\n"

    def _state(self) -> str:
        """Return why there will be no more lines; nothing if there may be."""
        status = os.fstat(self._fd)
        if status.st_size < self._at:
            return "truncated"
        if status.st_size > self._at:  # written this very moment
            self._moved_at = None
            return ""
        try:
            if os.path.samestat(status, self.path.stat()):
                self._moved_at = None
                return ""
        except FileNotFoundError:  # renamed, and there is no new one yet
            self._moved_at = None
            return ""
        self._moved_at = self._moved_at or time.monotonic()
        return "rotated" if time.monotonic() - self._moved_at >= ROTATION_PATIENCE else ""


class Stream:
    """Standard input, a pipe or whatever else can be read once only. Its packets' ids hold for this one run."""

    resumable = False
    size = None
    start = 0

    def __init__(self, fd: int, recipe: Recipe) -> None:
        self._fd, self._recipe = fd, recipe
        self._packer = Packer(recipe, secrets.token_hex(16))

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def packets(self, stopping: Callable[[], bool], *, follow: bool = False) -> Iterator[Packet | None]:  # noqa: ARG002
        """Yield packets; None when there is nothing more for now. Raises OSError."""
        cutter = LineCutter(self._recipe.longest)
        due = 0.0  # when what has gathered is to be sent, full or not
        left = MOST_LEFT_IN_PIPE
        while left > 0:
            ending = stopping()
            ready = select.select([self._fd], [], [], 0 if ending else IDLE)[0]
            if ending and not ready:
                break
            if self._packer.empty:
                due = time.monotonic() + LINGER
            elif time.monotonic() >= due:
                yield from self._packer.flush()
            if not ready:
                yield None
                continue
            data = os.read(self._fd, BLOCK)
            if not data:
                break
            left -= len(data) if ending else 0
            for line in cutter.feed(data):
                yield from self._packer.add(line)
        for line in cutter.finish():
            yield from self._packer.add(line)
        yield from self._packer.flush()


class StandardInput:
    """The one stream that has no name."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def begin(self, offsets: OffsetFile | None) -> list[Log | Stream]:  # noqa: ARG002  (as a trail has it)
        """Return the stream."""
        return [Stream(os.dup(0), self._recipe)]

    def following(self, log: Log, stopping: Callable[[], bool]) -> None:
        """Return nothing: it ends once."""


class Trail:
    """The logs that have had one name: which of them to send, one after another.

    ``note`` is told what a person should know: that a log was rotated, truncated or exchanged.
    """

    def __init__(self, path: Path, recipe: Recipe, note: Callable[[str], None]) -> None:
        self.path, self._recipe, self._note = path, recipe, note

    def begin(self, offsets: OffsetFile | None) -> list[Log | Stream]:
        """Return what is to be sent first, open. Raises OSError, and ValueError if the offsets are another log's."""
        before = offsets.position if offsets else None
        if offsets is None or before is None:
            return [self._opened(None, again=False)]
        try:
            current = self._opened(before, again=True)
        except FileNotFoundError:
            renamed = self._renamed(before)
            if renamed is None:
                raise
            self._note(f"{self.path} is not there; sending the rest of it from {renamed.name.name}")
            return [renamed]
        if not isinstance(current, Log) or current.position is before:
            return [current]
        if before.file != current.position.file:
            current.close()
            raise ValueError(
                f"{offsets.path}: these are the offsets of {before.file}; each log needs a file of its own"
            )
        if before.inode == current.position.inode:
            self._note(f"{self.path} was truncated or written anew; sending it from its beginning")
            return [current]
        renamed = self._renamed(before)
        if renamed is None:
            self._note(f"{self.path} is a new file, and the one before is gone; sending it from its beginning")
            return [current]
        self._note(f"{self.path} was rotated; sending the rest of the old one from {renamed.name.name} first")
        for name in self._between(renamed, current, offsets.path):
            self._note(f"{name} is younger than {renamed.name.name} and is not sent; send it by itself")
        return [renamed, current]

    def following(self, log: Log, stopping: Callable[[], bool]) -> Log | None:
        """Return what comes after a log that was followed to its end; None when told to stop. Raises OSError."""
        what = "rotated; going on with the new one" if log.outcome == "rotated" else "truncated; beginning anew"
        while not stopping():
            try:
                source = self._opened(None, again=True)
            except FileNotFoundError:  # rotated once more
                time.sleep(IDLE)
                continue
            if isinstance(source, Log):
                self._note(f"{self.path} was {what}")
                return source
            source.close()
            raise ValueError(f"{self.path} is no longer a file")
        return None

    def _opened(self, before: Position | None, *, again: bool) -> Log | Stream:
        """Open what the name leads to: at the position before, if that is about the same log.

        ``again``: a log of this name was sent before. This one may have got its inode, and have the same bytes in the
        same place; so that those are no repetitions, its identity gets a random part.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):  # a folder cannot be read, and says so
                return Stream(fd, self._recipe)
            if before is not None and before.fits(fd):
                return Log(self.path, fd, before, self._recipe)
            identity = f"{status.st_dev}:{status.st_ino}" + (f":{secrets.token_hex(8)}" if again else "")
            file = os.path.abspath(self.path)  # noqa: PTH100  (resolve() would follow links, which are exchanged)
            return Log(self.path, fd, Position(file, status.st_dev, status.st_ino, identity), self._recipe)
        except BaseException:
            os.close(fd)
            raise

    def _folders(self) -> set[Path]:
        return {self.path.absolute().parent, self.path.resolve().parent}

    def _renamed(self, before: Position) -> Log | None:
        """Return the log that the position is about, under whatever name it has now; None if it is gone."""
        for folder in self._folders():
            for entry in os.scandir(folder):
                if entry.inode() != before.inode or not entry.is_file(follow_symlinks=False):
                    continue
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                if before.fits(fd):
                    log = Log(self.path, fd, before, self._recipe)
                    log.name = Path(entry.path)
                    return log
                os.close(fd)
        return None

    def _between(self, old: Log, current: Log, offsets: Path) -> list[str]:
        """Return the names of logs that were rotated after the old one and before the current one."""
        since = old.name.stat().st_mtime_ns
        mine = {old.position.inode, current.position.inode}
        return sorted(
            entry.name
            for folder in self._folders()
            for entry in os.scandir(folder)
            if entry.name.startswith(self.path.name)
            and not entry.name.startswith(offsets.name)
            and entry.is_file(follow_symlinks=False)
            and entry.inode() not in mine
            and _written(entry) > since
        )


def _written(entry: os.DirEntry[str]) -> int:
    """Return when a file was written to, in nanoseconds; 0 if it is gone meanwhile."""
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
