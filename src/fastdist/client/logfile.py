"""Where lines come from: a log file, which may grow, be rotated or truncated meanwhile, or a stream such as a pipe.

The rules:

1. A log is sent from where its offset file says, if that is about this very log; else from its beginning. One that was
   renamed since is finished first, wherever in the same folder it is now, then those that came after it (``rotation``).
2. What was planned before is cut as it was planned (see ``offsets``).
3. A log is followed until another file has its name and nothing more was written for a while: writers notice a
   rotation late.
4. Whenever more is read, the bytes before it have to be those that were read. Else the log was truncated, whatever
   size it has by now: it begins anew.
5. What has been read from a stream cannot be read again: when told to stop, a stream still yields all of it.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import select
import stat
import time
from typing import TYPE_CHECKING

import msgspec

from fastdist._core import birth_ns
from fastdist.client.lines import LineCutter
from fastdist.client.offsets import TAIL, Position, file_text, tail_digest
from fastdist.client.packing import Packer
from fastdist.client.rotation import Rotation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fastdist.client.offsets import OffsetFile
    from fastdist.client.packing import Packet, Recipe

BLOCK = 1 << 18  # bytes that are read at once
IDLE = 0.25  # seconds between looks at a log that is followed
LINGER = 0.5  # seconds that lines of a stream wait for more to make a packet with
LOOK_AROUND = 5.0  # seconds between looks at what lies beside a log that is followed
ROTATION_PATIENCE = 5.0  # seconds without a line before a renamed log is done with
MOST_LEFT_IN_PIPE = 1 << 20  # bytes: the largest pipe an ordinary user may have


class Log:
    """An open log file, to be read from its position on. ``outcome`` says why its packets ended."""

    resumable = True

    def __init__(self, rotation: Rotation, fd: int, position: Position, recipe: Recipe) -> None:
        """``rotation`` has the name that is watched; ``position`` is about the open file."""
        self.position = position
        self.outcome = ""  # "end", "rotated" or "truncated"
        self._rotation, self._fd, self._recipe = rotation, fd, recipe
        self._at = position.offset
        # What was read before that: the log may be truncated and written anew meanwhile.
        self._read = os.pread(fd, min(self._at, TAIL), max(0, self._at - TAIL))
        self._siblings = set(position.siblings)
        self._looked_at = -math.inf
        self._stamp: tuple[int, ...] = ()  # of the folder, when the siblings were those
        self._moved_at: float | None = None

    @property
    def start(self) -> int:
        """The offset from which on it is sent."""
        return self.position.offset

    @property
    def size(self) -> int:
        """Bytes of the whole log, now."""
        return os.fstat(self._fd).st_size

    @property
    def in_doubt(self) -> set[int]:
        """The ends of the packets that may have been under way when this was sent before."""
        return {end for end, cut in self._plan() if cut}

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def anew(self) -> Log:
        """Return it as it is now, to be read from its beginning: none of its packets is one that was sent."""
        fresh = msgspec.structs.replace(
            self.reached(None, []), identity=_identity(self._fd, again=True), offset=0, tail="", planned=[], cuts=[]
        )
        return Log(self._rotation, os.dup(self._fd), fresh, self._recipe)

    def reached(self, last: Packet | None, plan: list[tuple[int, int]]) -> Position:
        """Return the position after a packet (None: at the start), with ends and cuts of what is planned behind it."""
        return msgspec.structs.replace(
            self.position,
            offset=last.end if last else self.position.offset,
            tail=last.tail if last else self.position.tail or tail_digest(b""),
            planned=[end for end, _ in plan],
            cuts=[cut for _, cut in plan],
            birth=birth_ns(self._fd),
            written=os.fstat(self._fd).st_mtime_ns,
            siblings=sorted(self._siblings),
        )

    def packets(self, stopping: Callable[[], bool], *, follow: bool = False) -> Iterator[Packet | None]:
        """Yield packets; None when there is nothing more for now. Raises OSError."""
        self.look_around()
        yield from self._planned()
        cutter = LineCutter(self._recipe.longest, self._at, at_start=self._begins_line)
        packer = Packer(self._recipe, self.position.identity)
        while not stopping():
            data = self._more(BLOCK)
            if data:
                for line in cutter.feed(data):
                    yield from self._with_tails(packer.add(line))
                self._forget(cutter.pending)
                continue
            if follow:
                yield from self._with_tails(packer.flush())
                yield None
            if data is None:
                self.outcome = "truncated"
            else:
                self.outcome = self._state() if follow else "end"
            if self.outcome:
                for line in cutter.finish():
                    yield from self._with_tails(packer.add(line))
                yield from self._with_tails(packer.flush())
                return
            time.sleep(IDLE)
        if follow:  # what was read is to be sent; a line without an end is not
            yield from self._with_tails(packer.flush())

    def _plan(self) -> Iterator[tuple[int, int]]:
        """Yield end and cut of what was planned before; who noted no cuts had the limits that are set now."""
        planned, cuts = self.position.planned, self.position.cuts
        yield from zip(planned, cuts or [self._recipe.most_bytes] * len(planned), strict=True)

    def _planned(self) -> Iterator[Packet]:
        """Yield the packets that may have been under way when this was sent before; what was refused is cut anew."""
        for end, cut in self._plan():
            if end > self.size:
                return  # a crash of the system has cost the log its end
            recipe = msgspec.structs.replace(self._recipe, most_bytes=cut or self._recipe.most_bytes)
            cutter = LineCutter(recipe.longest, self._at, at_start=self._begins_line)
            packer = Packer(recipe, self.position.identity, all_in_one=cut > 0)
            lines = []
            while self._at < end and (data := self._more(end - self._at)):
                lines += cutter.feed(data)
            if self._at == end:  # else it changes this very moment
                for line in (*lines, *cutter.finish()):
                    yield from self._with_tails(packer.add(line))
                yield from self._with_tails(packer.flush())
            self._forget(0)

    def _more(self, most: int) -> bytes | None:
        """Return what comes next; None if what was read before it has changed: then it is another log."""
        tail = self._read[-TAIL:]
        data = os.pread(self._fd, len(tail) + most, self._at - len(tail))
        if not data.startswith(tail):
            return None
        new = data[len(tail) :]
        self._read += new
        self._at += len(new)
        return new

    def _forget(self, pending: int) -> None:
        """Keep, of what was read, what packets are still made of, and what is before it."""
        self._read = self._read[-(TAIL + pending) :]

    def _with_tails(self, packets: Iterator[Packet]) -> Iterator[Packet]:
        for packet in packets:
            end = len(self._read) - (self._at - packet.end)
            yield packet._replace(tail=tail_digest(self._read[max(0, end - TAIL) : end]))

    @property
    def _begins_line(self) -> bool:
        return self._at == 0 or self._read.endswith(b"\n")

    def look_around(self) -> None:
        """Note, while it has its name, what rotated logs there are: they are older. Raises OSError."""
        if time.monotonic() < self._looked_at + LOOK_AROUND:
            return
        self._looked_at = time.monotonic()
        stamp = self._rotation.stamp()
        if stamp == self._stamp:
            return
        siblings = {file.key for file in self._rotation.rotated()}
        if self._has_name():
            self._siblings, self._stamp = siblings, stamp

    def _has_name(self) -> bool | None:
        """Return whether it has the name that is watched; None if nothing has that can be looked at."""
        try:
            return os.path.samestat(os.fstat(self._fd), self._rotation.path.stat())
        except (FileNotFoundError, PermissionError):
            return None

    def _state(self) -> str:
        """Return why there will be no more lines; nothing if there may be."""
        if self.size != self._at:  # written this very moment
            self._moved_at = None
            return ""
        if self._has_name() is not False:  # perhaps it was renamed, and there is no new one yet
            self._moved_at = None
            self.look_around()
            return ""
        self._moved_at = self._moved_at or time.monotonic()
        return "rotated" if time.monotonic() - self._moved_at >= ROTATION_PATIENCE else ""


def _identity(fd: int, *, again: bool) -> str:
    """Return what tells this log's packets from those of others.

    ``again``: a log of this name was sent before. This one may be the same file with the same bytes in the same place;
    so that those are no repetitions, its identity gets a random part.
    """
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}:" + (secrets.token_hex(8) if again else str(birth_ns(fd)))


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

    def begin(self, offsets: OffsetFile | None) -> Log | Stream:  # noqa: ARG002  (as a trail has it)
        """Return the stream."""
        return Stream(os.dup(0), self._recipe)

    def following(self, log: Log, stopping: Callable[[], bool]) -> None:
        """Return nothing: it ends once."""


class Trail:
    """The logs that have had one name: which of them to send, one after another.

    ``note`` is told what a person should know: that a log was rotated, truncated or exchanged, or cannot be sent.
    """

    def __init__(self, path: Path, recipe: Recipe, note: Callable[[str], None]) -> None:
        self.path, self._recipe, self._note = path, recipe, note
        self._rotation = Rotation(path)
        self._goal: tuple[int, int] | None = None  # the log that ends it, if it is not followed
        self._told: set[tuple[int, int]] = set()  # of these compressed logs

    def begin(self, offsets: OffsetFile | None) -> Log | Stream:
        """Return what is to be sent first, open. Raises OSError, and ValueError if the offsets are another log's."""
        before = offsets.position if offsets else None
        current = self._rotation.current()
        self._goal = current.key if current else None
        if before is None or offsets is None:
            return self._opened(self.path)
        if current is not None:
            source = self._opened(self.path, before)
            if isinstance(source, Stream) or source.position is before:
                return source
            if before.file != source.position.file:
                source.close()
                raise ValueError(
                    f"{offsets.path}: these are the offsets of {before.file}; each log needs a file of its own"
                )
            if before.inode == source.position.inode and (
                before.birth == source.position.birth or not before.birth or not source.position.birth
            ):
                self._note(f"{self.path} was truncated or written anew; sending it from its beginning")
                return source
            source.close()
        return self._rest_of(before)

    def _rest_of(self, before: Position) -> Log:
        """Return the log that had the name before, or what came after it if it is gone."""
        named = self._rotation.current() is not None
        if (found := self._renamed(before)) is not None:
            name, log = found
            self._note(
                f"{self.path} was rotated; sending the rest of the old one from {name} first"
                if named
                else f"{self.path} is not there; sending the rest of it from {name}"
            )
            return log
        if (following := self._next(before, gone=True)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        name, log = following
        self._note(
            f"{self.path} is a new file, and the one before is gone, with what was not sent of it; "
            f"sending {name} from its beginning"
        )
        return log

    def following(self, log: Log, stopping: Callable[[], bool]) -> Log | None:
        """Return what comes after a log that ended; None when nothing does, or told to stop. Raises OSError."""
        if log.outcome == "truncated":
            self._note(f"{self.path} was truncated; beginning anew; what was not read before that is lost")
            return log.anew()
        before = log.reached(None, [])
        if log.outcome == "rotated":
            return self._awaited(before, stopping)
        if log.outcome != "end" or before.key == self._goal or (found := self._next(before)) is None:
            return None
        return found[1]

    def _awaited(self, before: Position, stopping: Callable[[], bool]) -> Log | None:
        """Return what comes after a log that was followed, as soon as it is there and may be read."""
        told = False
        while not stopping():
            try:
                found = self._next(before)
            except PermissionError as error:
                if not told:
                    self._note(f"{error.filename}: {error.strerror}; waiting until it can be read")
                told, found = True, None
            if found is not None:
                name, log = found
                now = "the new one" if name == self.path.name else f"{name}, which came next"
                self._note(f"{self.path} was rotated; going on with {now}")
                return log
            time.sleep(IDLE)
        return None

    def _next(self, before: Position, *, gone: bool = False) -> tuple[str, Log] | None:
        """Return what came next after a log, and its name; tell of what cannot be sent. Raises OSError."""
        while True:
            chain, packed = self._rotation.after(before, gone=gone)
            for file in packed:
                if file.key not in self._told:
                    self._told.add(file.key)
                    self._note(f"{file.path.name} is compressed and is NOT sent; unpack it to fastdist send -")
            if not chain:
                return None
            try:
                source = self._opened(chain[0].path, before, again=True)
            except FileNotFoundError:
                continue  # it was rotated once more
            if not isinstance(source, Log):
                source.close()
                raise ValueError(f"{self.path} is no longer a file")  # noqa: TRY004  (a person's value)
            if source.position.key == chain[0].key:
                return chain[0].path.name, source
            source.close()

    def _opened(self, path: Path, before: Position | None = None, *, again: bool = False) -> Log | Stream:
        """Open what a name leads to: at the position before, if that is about the same log and not ``again``."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):  # a folder cannot be read, and says so
                return Stream(fd, self._recipe)
            if before is not None and not again and before.fits(fd):
                return Log(self._rotation, fd, before, self._recipe)
            identity = _identity(fd, again=before is not None)
            position = Position(
                file_text(self.path),
                status.st_dev,
                status.st_ino,
                identity,
                birth=birth_ns(fd),
                siblings=[*before.siblings, before.key] if before else [],
            )
            return Log(self._rotation, fd, position, self._recipe)
        except BaseException:
            os.close(fd)
            raise

    def _renamed(self, before: Position) -> tuple[str, Log] | None:
        """Return the log that the position is about, and the name it has now; None if it is gone."""
        for _ in range(2):  # one look may miss what is renamed meanwhile
            for entry in self._rotation.entries():
                if entry.inode() != before.inode or not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                if before.fits(fd):
                    return entry.name, Log(self._rotation, fd, before, self._recipe)
                try:
                    if before.birth and before.is_about(fd):  # it was truncated, and renamed after that
                        return entry.name, Log(self._rotation, fd, before, self._recipe).anew()
                finally:
                    os.close(fd)
        return None
