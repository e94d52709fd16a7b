"""Dead letters: packets no analyzer will ever take, kept as NDJSON files for a person to look at and to send again.

A packet is written here (and, with durability fsync, synced) before it leaves the queue; what cannot be written stays
queued. With durability disk it is synced within ``sync_interval``. The rules that writer and readers keep:

1. Every worker writes files of its own, locked (flock) while they are open. A file that has had no letter for a second
   is closed, so that others can have it; it is taken up again if nobody has it, else a new one is begun.
2. Others change a file only while they hold its lock, and only by renaming another over it or by deleting it. So
   whoever gets the lock looks whether the file is still the one of that name.
3. What was replayed is noted in a journal next to the file (``FILE.replayed``: offset and id) until the file is
   rewritten without it; readers pass over what is noted there.
4. A line that is no letter (torn by a crash, damaged) is shown as unreadable and otherwise left alone.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import stat
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NamedTuple

import msgspec
import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from fastdist._core.ring import Packet

FOLDER = "dead-letters"
SUFFIX = ".ndjson"
JOURNAL_SUFFIX = ".replayed"  # after the name of a file: what of it was replayed
LARGEST_FILE = 64 << 20  # bytes
IDLE_NS = 1_000_000_000  # without a letter, after which a file is closed
UNREADABLE = "unreadable"  # the reason that a line which is no letter is listed under


def iso_time(ns: int) -> str:
    """Return wall-clock nanoseconds as RFC 3339, to the microsecond."""
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class _File:
    """A file of ours, open and locked: its size, and up to where it is known to be on stable storage."""

    __slots__ = ("fd", "name_synced", "path", "size", "suspect", "synced")

    def __init__(self, fd: int, path: Path, size: int, *, new: bool) -> None:
        self.fd, self.path, self.size = fd, path, size
        self.synced = size
        self.name_synced = not new
        self.suspect = False  # a sync has failed: the kernel may take for written what is not

    @property
    def unsynced(self) -> bool:
        return self.synced < self.size


class DeadLetters:
    """The files that the process ``owner`` (a word fit for a file name) writes below ``queue_path``.

    ``sync``: somebody will sync what is written (``sync``; ``begin_sync`` and ``end_sync`` when a thread is to do it).
    """

    def __init__(self, queue_path: str | Path, owner: str, *, sync: bool = False) -> None:
        self._folder = Path(queue_path) / FOLDER
        self._owner, self._syncs = owner, sync
        self._path: Path | None = None  # of the file that is open, or was until it had been idle
        self._file: _File | None = None
        self._held: list[_File] = []  # nothing more is written to them, but they are not synced
        self._batch: list[tuple[_File, int]] = []  # being synced, up to there
        self.syncing = False
        self._written = False  # since the last tick
        self._idle_since = 0  # ns

    def write(self, packet: Packet, reason: str, analyzer: str | None, status: int | None, error: str | None) -> None:
        """Append a packet: why it is here, and the last analyzer that saw it with what it said. Raises OSError."""
        letter: dict[str, object] = {
            "id": packet.id,
            "reason": reason,
            "analyzer": analyzer,
            "status": status,
            "error": error,
            "attempts": packet.attempts,
            "messages": packet.messages,
            "acceptedAt": iso_time(packet.accepted_ns),
            "deadLetteredAt": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        }
        try:
            letter["body"] = packet.body.decode()
        except UnicodeDecodeError:
            letter["bodyBase64"] = base64.b64encode(packet.body).decode()
        self._append(orjson.dumps(letter, option=orjson.OPT_APPEND_NEWLINE))

    def tick(self, now_ns: int) -> None:
        """Close the file when it has been idle; to be called every now and then (``now_ns``: time.monotonic_ns())."""
        if self._file is None:
            return
        if self._written or self.unsynced or self.syncing:
            self._written, self._idle_since = False, now_ns
        elif now_ns - self._idle_since >= IDLE_NS:
            self._release()

    def close(self) -> None:
        """Close the present file, if one is open; what comes after goes to another."""
        self._release()
        self._path = None

    # ---- syncing

    @property
    def unsynced(self) -> bool:
        """Whether there is anything to be synced."""
        return self._syncs and any(file.unsynced for file in self._open_files)

    @property
    def _open_files(self) -> list[_File]:
        return [*self._held, self._file] if self._file is not None else self._held

    def begin_sync(self) -> Callable[[], None]:
        """Return what will put all that was written so far on stable storage; ``end_sync`` is to follow.

        It may be called in a thread, while more is written. It raises OSError.
        """
        self.syncing = True
        self._batch = [(file, file.size) for file in self._open_files if file.unsynced]
        again = [(file.path, file.synced, size) for file, size in self._batch if file.suspect]
        folders = [self._folder, self._folder.parent] if any(not file.name_synced for file, _ in self._batch) else []
        return partial(_sync, [file.fd for file, _ in self._batch], again, folders)

    def end_sync(self, error: OSError | None) -> None:
        """Take note of what became of the sync that was begun."""
        for file, size in self._batch:
            file.suspect = error is not None
            if error is None:
                file.synced, file.name_synced = size, True
        self.syncing, self._batch = False, []
        self._close_held()

    def sync(self) -> None:
        """Sync all that was written, here and now. Raises OSError."""
        if not self.unsynced:
            return
        work = self.begin_sync()
        try:
            work()
        except OSError as error:
            self.end_sync(error)
            raise
        self.end_sync(None)

    def take_back(self) -> None:
        """Remove what is not synced: the packets are still queued, and will be written again."""
        for file in self._open_files:
            if file.unsynced:
                try:
                    os.ftruncate(file.fd, file.synced)
                except OSError:  # better twice than never
                    file.synced = file.size
                    self.close()
                else:
                    file.size, file.suspect = file.synced, False
        self._close_held()

    # ---- files

    def _append(self, line: bytes) -> None:
        file = self._file or self._reopen()
        if file is None or (file.size and file.size + len(line) > LARGEST_FILE):
            file = self._create()
        self._written = True
        written = 0
        try:
            while written < len(line):
                written += os.write(file.fd, line[written:])
        except OSError:
            self._undo(file)
            raise
        file.size += len(line)

    def _undo(self, file: _File) -> None:
        """Leave no half of a line behind: the packet is still queued, and will be written again."""
        try:
            os.ftruncate(file.fd, file.size)
        except OSError:
            self.close()  # at least nothing will be appended to that half

    def _create(self) -> _File:
        self.close()
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{self._owner}{SUFFIX}"
        hidden = path.with_suffix(".new")  # until it is locked: nobody is to find it without its owner and delete it
        fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(path)
        except OSError:
            os.close(fd)
            for name in (hidden, path):  # or there would be one more for every try
                with contextlib.suppress(OSError):
                    name.unlink(missing_ok=True)
            raise
        self._file, self._path = _File(fd, path, 0, new=True), path
        return self._file

    def _reopen(self) -> _File | None:
        """Go on with the file that was closed, lest rare letters make a file each; unless somebody has or had it."""
        if self._path is None:
            return None
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = os.fstat(fd)
            ours = os.path.samestat(state, self._path.stat())
        except OSError:
            ours = False
        if not ours:
            os.close(fd)
            return None
        self._file = _File(fd, self._path, state.st_size, new=False)
        return self._file

    def _release(self) -> None:
        if self._file is not None:
            self._held.append(self._file)
            self._file = None
            self._close_held()

    def _close_held(self) -> None:
        """Close what nobody needs open any more."""
        keep = {file for file, _ in self._batch} | {file for file in self._held if self._syncs and file.unsynced}
        for file in self._held:
            if file not in keep:
                os.close(file.fd)
        self._held = [file for file in self._held if file in keep]


def _sync(files: list[int], again: list[tuple[Path, int, int]], folders: list[Path]) -> None:
    """Put files on stable storage, after writing parts of them (from, to) once more, and then their names."""
    for path, start, end in again:
        _write_again(path, start, end)
    for fd in files:
        os.fdatasync(fd)
    for folder in folders:
        sync_folder(folder)


def _write_again(path: Path, start: int, end: int) -> None:
    """Have the kernel take these bytes of a file for changed, for it may never have written them."""
    with path.open("r+b", buffering=0) as file:
        while start < end and (piece := os.pread(file.fileno(), min(1 << 20, end - start), start)):
            start += os.pwrite(file.fileno(), piece, start)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries (new files, renamed ones) on stable storage. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Letter(msgspec.Struct, frozen=True, kw_only=True, gc=False, rename="camel"):
    """A line of such a file. Of ``body`` (text) and ``body_base64`` (what is not UTF-8) exactly one is there."""

    # What Idempotency-Key may be; \Z, because $ is also before a line feed at the end.
    id: Annotated[str, msgspec.Meta(pattern=r"\A[!#-+\--:<-\[\]-~]{1,64}\Z")]
    reason: str
    accepted_at: datetime
    dead_lettered_at: datetime
    analyzer: str | None = None
    status: int | None = None
    error: str | None = None
    attempts: int = 0
    messages: int = 0
    body: str | None = None
    body_base64: bytes | None = None

    def __post_init__(self) -> None:
        if (self.body is None) == (self.body_base64 is None):
            raise ValueError("a letter has one body")
        if self.accepted_at.tzinfo is None or self.dead_lettered_at.tzinfo is None:
            raise ValueError("times have a zone")

    @property
    def packet(self) -> bytes:
        """The packet's body, byte for byte as it was accepted."""
        return self.body.encode() if self.body is not None else self.body_base64 or b""


class Line(NamedTuple):
    """A line of a file: a letter, or what is left of one (``letter`` is None)."""

    offset: int
    raw: bytes
    letter: Letter | None
    time: datetime  # when it became a dead letter; of an unreadable line: when its file was last changed

    @property
    def reason(self) -> str:
        """Why it is here."""
        return self.letter.reason if self.letter else UNREADABLE

    @property
    def size(self) -> int:
        """Bytes of the packet; of an unreadable line, all it has."""
        return len(self.letter.packet) if self.letter else len(self.raw)


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines a command is about: all that agree with what is not None."""

    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __contains__(self, line: Line) -> bool:
        return (
            (self.reason is None or self.reason == line.reason)
            and (self.since is None or line.time >= self.since)
            and (self.until is None or line.time <= self.until)
        )


class Found(NamedTuple):
    """A file as it was when it was looked for; what is written to it after that is left for the next time."""

    path: Path
    size: int


def find_files(path: Path) -> list[Found]:
    """Return the files of dead letters in ``path``: a queue's folder, its folder of dead letters, or one such file.

    They come oldest first. Raises OSError when the path cannot be read, ValueError when it is a file of another kind.
    """
    if not stat.S_ISDIR(path.stat().st_mode):
        if path.suffix != SUFFIX:
            raise ValueError(f"{path}: neither a folder nor a file of dead letters (*{SUFFIX})")
        return [Found(path, path.stat().st_size)]
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix == SUFFIX:
            with contextlib.suppress(FileNotFoundError):  # deleted since
                found.append(Found(file, file.stat().st_size))
    return found


def journal_of(path: Path) -> Path:
    """Return where it is noted which letters of this file were replayed."""
    return path.with_name(path.name + JOURNAL_SUFFIX)


def read_journal(path: Path) -> set[tuple[int, str]]:
    """Return offset and id of the letters of this file that were replayed but are still in it."""
    try:
        text = journal_of(path).read_text("latin-1")
    except FileNotFoundError:
        return set()
    entries = (line.split(" ", 1) for line in text.split("\n"))
    return {(int(entry[0]), entry[1]) for entry in entries if len(entry) == 2 and entry[0].isdecimal()}  # noqa: PLR2004


def read_lines(file: BinaryIO, end: int, replayed: Container[tuple[int, str]]) -> Iterator[Line]:
    """Yield the lines that start before ``end`` bytes of a file, but for those that are blank or were replayed."""
    decoder = msgspec.json.Decoder(Letter)
    changed = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
    offset = file.seek(0)
    for raw in file:
        if offset >= end:
            return
        try:
            letter = decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            if raw.strip():
                yield Line(offset, raw, None, changed)
        else:
            if (offset, letter.id) not in replayed:
                yield Line(offset, raw, letter, letter.dead_lettered_at)
        offset += len(raw)


def read_file(found: Found) -> Iterator[Line]:
    """Yield the lines of a file; none when somebody has deleted it meanwhile. Raises OSError."""
    try:
        file = found.path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from read_lines(file, found.size, read_journal(found.path))
