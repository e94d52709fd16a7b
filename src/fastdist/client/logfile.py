"""Where lines come from: a log file, which may grow, be rotated or truncated meanwhile, or a stream such as a pipe.

The rules:

1. A log is sent from where its offset file says, if that is about this very log; else from its beginning. One that was
   renamed since is finished first, wherever in the same folder it is now, then those that came after it (``rotation``).
2. What was planned before is cut as it was planned (see ``offsets``).
3. A log is followed until another file has its name and nothing more was written for a while: writers notice a
   rotation late.
4. Whenever more is read, the bytes before it have to be those that were read. Else the log was truncated, whatever
   size it has by now, and is sent from its beginning.
5. What has been read from a stream cannot be read again: when asked to stop, a stream still yields all of it.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import select
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fastdist._core import birth_ns
from fastdist.client.offsets import TAIL, Position, file_text, tail_digest
from fastdist.client.packing import Packer
from fastdist.client.rotation import Rotation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastdist.client.offsets import OffsetFile
    from fastdist.client.packing import Packet, Recipe

BLOCK = 1 << 18  # bytes that are read at once
IDLE = 0.25  # seconds between reads of a log that is followed
LINGER = 0.5  # seconds that lines of a stream wait for more to make a packet with
LIST_EVERY = 5.0  # seconds between lists of what lies beside a log that is followed
ROTATION_PATIENCE = 5.0  # seconds without a line before a renamed log is done with
MAX_LEFT_IN_PIPE = 1 << 20  # bytes: the largest pipe an ordinary user may have


class Log:
    """An open log file, to be read from its position on. ``outcome`` says why its packets ended."""

    resumable = True

    def __init__(self, name: str, fd: int, position: Position, rotation: Rotation, recipe: Recipe) -> None:
        """``name``: that of the open file now; ``position`` is about it; ``rotation`` has the name that is watched."""
        self.name, self.fd, self.position = name, fd, position
        self.outcome = ""  # "end", "rotated" or "truncated"
        self._rotation, self._recipe = rotation, recipe
        self._at = position.offset
        # What was read before that: the log may be truncated and written again meanwhile.
        self._read = os.pread(fd, min(self._at, TAIL), max(0, self._at - TAIL))
        self._earlier = list(self._plan())
        self._siblings = set(position.siblings)
        self._listed_at = -math.inf
        self._stamp: tuple[int, ...] = ()  # of the folder, when the siblings were those
        self._moved_at: float | None = None

    @property
    def start(self) -> int:
        """The offset from which on it is sent."""
        return self.position.offset

    @property
    def size(self) -> int:
        """Bytes of the whole log, now."""
        return os.fstat(self.fd).st_size

    @property
    def in_doubt(self) -> set[int]:
        """The ends of the packets that may have been in flight when this was sent before."""
        return {end for end, cut in self._plan() if cut}

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)

    def reached(self, last: Packet | None, plan: list[tuple[int, int]]) -> Position:
        """Return the position after a packet (None: at the start), with ends and cuts of what is planned behind it.

        What an earlier run has planned behind that stays planned: it may have been in flight.
        """
        offset = last.end if last else self.position.offset
        end = plan[-1][0] if plan else offset
        plan = plan + [planned for planned in self._earlier if planned[0] > end]
        return msgspec.structs.replace(
            self.position,
            offset=offset,
            tail=last.tail if last else self.position.tail or tail_digest(b""),
            planned=[end for end, _ in plan],
            cuts=[cut for _, cut in plan],
            birth=birth_ns(self.fd),
            written=os.fstat(self.fd).st_mtime_ns,
            siblings=sorted(self._siblings),
        )

    def packets(self, stopping: Callable[[], bool], *, follow: bool = False) -> Iterator[Packet | None]:
        """Yield packets; None when there is nothing more for now. Raises OSError."""
        self.list_siblings()
        yield from self._planned()
        packer = self._packer(self._recipe)
        while not stopping():
            data = self._more(BLOCK)
            if data:
                yield from self._with_tails(packer.feed(data))
                self._forget(packer.pending)
                continue
            if follow:
                yield from self._with_tails(packer.flush())
                yield None
            if data is None:
                self.outcome = "truncated"
                self._earlier = []
            else:
                self.outcome = self._state() if follow else "end"
            if self.outcome:
                yield from self._with_tails(packer.finish())
                return
            time.sleep(IDLE)
        if follow:  # what was read must be sent; a line without an end is not
            yield from self._with_tails(packer.flush())

    def _packer(self, recipe: Recipe, *, all_in_one: bool = False) -> Packer:
        """Return what makes packets from here on."""
        at_start = self._at == 0 or self._read.endswith(b"\n")
        return Packer(recipe, self.position.identity, self._at, at_start=at_start, all_in_one=all_in_one)

    def _plan(self) -> Iterator[tuple[int, int]]:
        """Yield end and cut of what was planned before; an offset file without cuts had the limits that are set now."""
        planned, cuts = self.position.planned, self.position.cuts
        yield from zip(planned, cuts or [self._recipe.max_bytes] * len(planned), strict=True)

    def _planned(self) -> Iterator[Packet]:
        """Yield the packets that may have been in flight when this was sent before; what was refused is cut again."""
        for end, cut in self._plan():
            if end > self.size:  # a crash of the system has cost the log its end
                self._earlier = []
                return
            recipe = msgspec.structs.replace(self._recipe, max_bytes=cut or self._recipe.max_bytes)
            packer = self._packer(recipe, all_in_one=cut > 0)
            packets: list[Packet] = []
            while self._at < end and (data := self._more(end - self._at)):
                packets += packer.feed(data)
            if self._at == end:  # else it changes this very moment
                yield from self._with_tails(iter([*packets, *packer.finish()]))
            self._forget(0)

    def _more(self, limit: int) -> bytes | None:
        """Return what comes next; None if what was read before it has changed: then it is another log."""
        tail = self._read[-TAIL:]
        data = os.pread(self.fd, len(tail) + limit, self._at - len(tail))
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

    def list_siblings(self) -> None:
        """Note, while it has its name, what rotated logs there are: they are older. Raises OSError."""
        if time.monotonic() < self._listed_at + LIST_EVERY:
            return
        self._listed_at = time.monotonic()
        stamp = self._rotation.stamp()
        if stamp == self._stamp:
            return
        siblings = {file.key for file in self._rotation.rotated()}
        if self._has_name():
            self._siblings, self._stamp = siblings, stamp

    def _has_name(self) -> bool | None:
        """Return whether it has the name that is watched; None when no file has that can be looked at."""
        try:
            return os.path.samestat(os.fstat(self.fd), self._rotation.path.stat())
        except (FileNotFoundError, PermissionError):
            return None

    def _state(self) -> str:
        """Return why there will be no more lines; nothing if there may be."""
        grown = self.size != self._at  # this very moment
        if grown or self._has_name() is not False:  # perhaps it was renamed, and there is no new one yet
            self._moved_at = None
            if not grown:
                self.list_siblings()
            return ""
        self._moved_at = self._moved_at or time.monotonic()
        return "rotated" if time.monotonic() - self._moved_at >= ROTATION_PATIENCE else ""


class Stream:
    """Standard input, a pipe or whatever else can be read once only. Its packets' ids hold for this one run."""

    resumable = False
    size = None
    start = 0
    in_doubt: frozenset[int] = frozenset()

    def __init__(self, fd: int, recipe: Recipe) -> None:
        self._fd = fd
        self._packer = Packer(recipe, secrets.token_hex(16))

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def packets(self, stopping: Callable[[], bool], *, follow: bool = False) -> Iterator[Packet | None]:  # noqa: ARG002
        """Yield packets; None when there is nothing more for now. Raises OSError."""
        due = 0.0  # when waiting lines must be sent, whether they fill a packet or not
        left = MAX_LEFT_IN_PIPE
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
            yield from self._packer.feed(data)
        yield from self._packer.finish()


class Trail:
    """The logs that have had one name: which of them to send, one after another.

    ``note`` gets what the user should know: that a log was rotated, truncated or exchanged, or cannot be sent.
    """

    def __init__(self, path: Path, recipe: Recipe, note: Callable[[str], None]) -> None:
        self.path, self._recipe, self._note = path, recipe, note
        self._rotation = Rotation(path)
        self._goal: tuple[int, int] | None = None  # the log that ends it, if it is not followed
        self._noted: set[tuple[int, int]] = set()  # of these compressed logs

    def sources(self, offsets: OffsetFile | None, stopping: Callable[[], bool]) -> Iterator[Log | Stream]:
        """Yield what must be sent, open; each is closed when the next one is asked for. Raises as ``begin`` does."""
        source: Log | Stream | None = self.begin(offsets)
        while source is not None:
            try:
                yield source
                after = self.following(source, stopping) if isinstance(source, Log) else None
            finally:
                source.close()
            source = after

    def begin(self, offsets: OffsetFile | None) -> Log | Stream:
        """Return what must be sent first, open. Raises OSError, and ValueError if the offsets are another log's."""
        before = offsets.position if offsets else None
        current = self._rotation.current()
        self._goal = current.key if current else None
        if before is None or offsets is None:
            return self._open(self.path)
        if current is not None:
            source = self._open(self.path, before)
            if isinstance(source, Stream) or source.position is before:
                return source
            if before.is_about(source.fd) and before.file == source.position.file:
                self._note(f"{self.path} was truncated or rewritten; sending it from its beginning")
                return source
            source.close()
            if before.file != source.position.file:
                raise ValueError(
                    f"{offsets.path}: these are the offsets of {before.file}; each log needs a file of its own"
                )
        return self._rest_of(before)

    def _rest_of(self, before: Position) -> Log:
        """Return the log that had the name before, or what came after it if it is gone."""
        if (log := self._renamed(before)) is not None:
            self._note(
                f"{self.path} was rotated; sending the rest of the old one from {log.name} first"
                if self.path.exists()
                else f"{self.path} is not there; sending the rest of it from {log.name}"
            )
        elif (log := self._next(before, gone=True)) is not None:
            self._note(
                f"{self.path} is a new file, and the one before is gone, with what was not sent of it; "
                f"sending {log.name} from its beginning"
            )
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        return log

    def following(self, log: Log, stopping: Callable[[], bool]) -> Log | None:
        """Return what comes after a log that ended; None when nothing does, or asked to stop. Raises OSError."""
        before = log.reached(None, [])
        if log.outcome == "truncated":
            self._note(f"{self.path} was truncated; sending it from its beginning; what was not read before is lost")
            return self._log(log.name, os.dup(log.fd), before, known=False)
        if log.outcome == "rotated":
            return self._awaited(before, stopping)
        return self._next(before) if log.outcome == "end" and before.key != self._goal else None

    def _awaited(self, before: Position, stopping: Callable[[], bool]) -> Log | None:
        """Return what comes after a log that was followed, as soon as it is there and may be read."""
        noted = False
        while not stopping():
            try:
                log = self._next(before)
            except PermissionError as error:
                if not noted:
                    self._note(f"{error.filename}: {error.strerror}; waiting until it can be read")
                noted, log = True, None
            if log is not None:
                now = "the new one" if log.name == self.path.name else f"{log.name}, which came next"
                self._note(f"{self.path} was rotated; going on with {now}")
                return log
            time.sleep(IDLE)
        return None

    def _next(self, before: Position, *, gone: bool = False) -> Log | None:
        """Return what came next after a log; report what cannot be sent. Raises OSError."""
        while True:
            chain, packed = self._rotation.after(before, gone=gone)
            for file in packed:
                if file.key not in self._noted:
                    self._noted.add(file.key)
                    self._note(f"{file.path.name} is compressed and is NOT sent; unpack it to fastdist send -")
            if not chain:
                return None
            try:
                source = self._open(chain[0].path, before, known=False)
            except FileNotFoundError:
                continue  # it was rotated once more
            if not isinstance(source, Log):
                source.close()
                raise ValueError(f"{self.path} is no longer a file")  # noqa: TRY004  (a person's value)
            if source.position.key == chain[0].key:
                return source
            source.close()

    def _renamed(self, before: Position) -> Log | None:
        """Return the log that the position is about, whatever name it has now; None if it is gone."""
        for _ in range(2):  # one list may miss what is renamed meanwhile
            for entry in self._rotation.entries():
                if entry.inode() != before.inode or not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    log = self._open(Path(entry.path), before)
                except FileNotFoundError:
                    continue
                # If it does not fit, it was truncated, and renamed after that.
                if isinstance(log, Log) and (log.position is before or (before.birth and before.is_about(log.fd))):
                    return log
                log.close()
        return None

    def _open(self, path: Path, before: Position | None = None, *, known: bool = True) -> Log | Stream:
        """Open what a name leads to; see ``_log``."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a folder cannot be read, and says so
            return Stream(fd, self._recipe)
        return self._log(path.name, fd, before, known=known)

    def _log(self, name: str, fd: int, before: Position | None, *, known: bool) -> Log:
        """Return an open log: at the position before if it may be ``known`` and is that log, else at its beginning.

        Where a log of this name was sent before, this one may be the same file with the same bytes at the same offset.
        So that those are no repetitions, its identity gets a random part.
        """
        try:
            if before is not None and known and before.fits(fd):
                position = before
            else:
                device, inode, birth = os.fstat(fd).st_dev, os.fstat(fd).st_ino, birth_ns(fd)
                identity = f"{device}:{inode}:{secrets.token_hex(8) if before else birth}"
                siblings = [*before.siblings, before.key] if before else []
                position = Position(file_text(self.path), device, inode, identity, birth=birth, siblings=siblings)
            return Log(name, fd, position, self._rotation, self._recipe)
        except BaseException:
            os.close(fd)
            raise
