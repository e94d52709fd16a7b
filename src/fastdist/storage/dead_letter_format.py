"""Dead letters as they stand in files (and messages of a stream): what one has, and how they are read.

Packets that were given up are kept as NDJSON to inspect and to send again. Rules for those who write the files and
those who read them stand in ``dead_letter_files``.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import hashlib
import os
import stat
import time
from datetime import MAXYEAR, MINYEAR, UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NamedTuple

import msgspec
import orjson

from fastdist.errors import UNDECODABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastdist._core import Packet


FOLDER = "dead-letters"
SUFFIX = ".ndjson"
JOURNAL_SUFFIX = ".replayed"  # after the name of a file: what of it was replayed
MAX_FILE = 64 << 20  # bytes
UNREADABLE = "unreadable"  # the reason that a line which is not a dead letter is listed under


def iso_time(ns: int) -> str:
    """Return wall-clock nanoseconds as RFC 3339, to the microsecond."""
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def as_line(  # noqa: PLR0913, PLR0917  (what a dead letter has)
    packet: Packet,
    reason: str,
    analyzer: str | None,
    status: int | None,
    error: str | None,
    response: bytes | None = None,
) -> bytes:
    """Return the dead letter of a packet, as it stands in files and streams: JSON and a line feed."""
    dead_letter: dict[str, object] = {
        "id": packet.id,
        "reason": reason,
        "analyzer": analyzer,
        "status": status,
        "error": error,
        "attempts": packet.attempts,
        "messages": packet.messages,
        "acceptedAt": iso_time(packet.accepted_ns),
        "deadLetteredAt": iso_time(time.time_ns()),
    }
    if response:
        dead_letter["response"] = _as_text(response)
    try:
        dead_letter["body"] = packet.body.decode()
    except UnicodeDecodeError:
        dead_letter["bodyBase64"] = base64.b64encode(packet.body).decode()
    return orjson.dumps(dead_letter, option=orjson.OPT_APPEND_NEWLINE)


def _as_text(response: bytes) -> str:
    """Return what was kept of a response as text: without the part of a character that it may end in."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(response)


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, gc=False, rename="camel"):
    """A line of such a file. Of ``body`` (text) and ``body_base64`` (what is not UTF-8) exactly one is there."""

    # What Idempotency-Key may be; \Z, because $ is also before a line feed at the end.
    id: Annotated[str, msgspec.Meta(pattern=r"\A[!#-+\--:<-\[\]-~]{1,64}\Z")]
    reason: str
    accepted_at: datetime
    dead_lettered_at: datetime
    analyzer: str | None = None
    status: int | None = None
    error: str | None = None
    response: str | None = None  # the beginning of its body
    attempts: int = 0
    messages: int = 0
    body: str | None = None
    body_base64: bytes | None = None

    def __post_init__(self) -> None:
        if (self.body is None) == (self.body_base64 is None):
            raise ValueError("a dead letter has one body")
        if self.accepted_at.tzinfo is None or self.dead_lettered_at.tzinfo is None:
            raise ValueError("times have a zone")
        if not {self.accepted_at.year, self.dead_lettered_at.year}.isdisjoint((MINYEAR, MAXYEAR)):
            raise ValueError("times can be shown in every zone")

    @property
    def packet(self) -> bytes:
        """The packet's body, byte for byte as it was accepted."""
        return self.body.encode() if self.body is not None else self.body_base64 or b""


_decoder = msgspec.json.Decoder(DeadLetter)


class Line(NamedTuple):
    """A line of a file: a dead letter, or what is left of one (``dead_letter`` is None).

    In a stream it is a message, and ``offset`` its sequence.
    """

    offset: int
    raw: bytes
    dead_letter: DeadLetter | None
    time: datetime  # when it became a dead letter; of an unreadable line: when its file was last changed

    @property
    def reason(self) -> str:
        """Why it is here."""
        return self.dead_letter.reason if self.dead_letter else UNREADABLE

    @property
    def size(self) -> int:
        """Bytes of the packet; of an unreadable line, all it has."""
        return len(self.dead_letter.packet) if self.dead_letter else len(self.raw)


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


def folder_of(queue_path: str | Path, path: str = "") -> Path:
    """Return the folder of dead letters: ``path`` if it is set, else one in that of the queue."""
    return Path(path) if path else Path(queue_path) / FOLDER


def find_files(path: Path) -> list[Found]:
    """Return the files of dead letters in ``path``: a queue's folder, its folder of dead letters, or one such file.

    They come oldest first. Raises OSError when the path cannot be read, ValueError when it is a file of another kind.
    """
    if not stat.S_ISDIR(path.stat().st_mode):
        if path.suffix != SUFFIX:
            raise ValueError(f"{path}: neither a folder nor a file of dead letters (*{SUFFIX})")
        return [Found(path, path.stat().st_size)]
    return files_of(path / FOLDER if (path / FOLDER).is_dir() else path)


def files_of(folder: Path) -> list[Found]:
    """Return the files in a folder of dead letters, oldest first. Raises OSError."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix == SUFFIX and file.is_file():
            with contextlib.suppress(FileNotFoundError):  # deleted since
                found.append(Found(file, file.stat().st_size))
    return found


def journal_of(path: Path) -> Path:
    """Return where it is noted which dead letters of this file were replayed."""
    return path.with_name(path.name + JOURNAL_SUFFIX)


def digest_of(raw: bytes) -> str:
    """Return what a journal calls a line."""
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def read_journal(path: Path) -> dict[int, str]:
    """Return offset and digest of the lines of this file that were replayed but are still in it.

    What is left of the journal of an earlier file of that name may be among it.
    """
    try:
        text = journal_of(path).read_text("latin-1")
    except FileNotFoundError:
        return {}
    entries = (line.split(" ") for line in text.split("\n"))
    return {int(entry[0]): entry[1] for entry in entries if len(entry) == 2 and entry[0].isdecimal()}  # noqa: PLR2004


def read_lines(file: BinaryIO, end: int, replayed: Mapping[int, str]) -> Iterator[Line]:
    """Yield the lines that start before ``end`` bytes of a file, but for those that are blank or were replayed."""
    changed = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
    offset = file.seek(0)
    for raw in file:
        if offset >= end:
            return
        line = as_read(offset, raw, changed)
        if line.dead_letter is None:
            if raw.strip():
                yield line
        elif offset not in replayed or replayed[offset] != digest_of(raw):
            yield line
        offset += len(raw)


def as_read(offset: int, raw: bytes, changed: datetime) -> Line:
    """Return a line as what it is; ``changed``: its time, if it is not a dead letter."""
    dead_letter = decoded(raw)
    return Line(offset, raw, dead_letter, dead_letter.dead_lettered_at if dead_letter else changed)


def decoded(raw: bytes) -> DeadLetter | None:
    """Return the dead letter in a line, None for anything else."""
    try:
        return _decoder.decode(raw)
    except UNDECODABLE:
        return None


def read_file(found: Found) -> Iterator[Line]:
    """Yield the lines of a file; none when it was deleted meanwhile. Raises OSError."""
    try:
        file = found.path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from read_lines(file, found.size, read_journal(found.path))
