"""Lines of a log as packets for POST /logs.

The rules:

1. Nothing of a line is lost. What is no UTF-8 is shown with U+FFFD and comes with its bytes in
   ``metadata.bytesBase64``; a part of an over-long line says which in ``metadata.part``; of a JSON object that is no
   log message all travels on in ``metadata``.
2. A JSON object that is a log message travels on byte for byte, and only then: a line never makes a packet that the
   schema refuses, nor more than one message.
3. Only empty lines are left out; they are counted.
4. Which lines make a packet depends on the lines alone. Its id is made from the log's identity, the emitter, the
   offsets and the bytes: the same part of a log that the same emitter sends again has the same id.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import orjson

from fastdist import packet
from fastdist._core import scan
from fastdist.client.lines import LineCutter
from fastdist.errors import PacketError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.client.lines import Line

MIN_PACKET_BYTES = 64 * 1024  # bytes that ``max_bytes`` has to allow
LINES_IN_PACKET = 8  # a line as long as this part of a packet fits, whatever is in it: \u0000 for a byte is worst

MESSAGE_KEYS = ("message", "msg", "log", "MESSAGE")
TIMESTAMP_KEYS = ("timestamp", "@timestamp", "time")
LEVEL_KEYS = ("level", "severity")
SOURCE_KEYS = ("source", "logger")
TALLIES = {
    "empty": "empty lines left out",
    "parts": "parts of over-long lines (metadata.part)",
    "not UTF-8": "lines that are not UTF-8 (metadata.bytesBase64)",
    "wrapped": "JSON objects that are no log message (in metadata)",
    "not JSON": "lines that are no usable JSON object, sent as text",
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Format(StrEnum):
    """What lines are: ``auto`` looks at each whether it is a JSON object."""

    AUTO = "auto"
    TEXT = "text"
    NDJSON = "ndjson"


class Style(msgspec.Struct, frozen=True):
    """What messages look like. ``level`` and ``source`` are for lines that have none; ``stamp``: so is the time."""

    emitter: str
    file: str
    format: Format = Format.AUTO
    level: str | None = None
    source: str | None = None
    stamp: bool = False


class Recipe(msgspec.Struct, frozen=True):
    """How lines become packets: their style, and what one packet holds at most (bytes of its JSON)."""

    style: Style
    max_messages: int = 500
    max_bytes: int = 1 << 20

    @property
    def max_line(self) -> int:
        """Bytes of a line that fits into a packet whatever is in it; a longer one comes in parts."""
        return self.max_bytes // LINES_IN_PACKET


class Packet(NamedTuple):
    """A packet, made of the bytes from ``offset`` to ``end``; one without messages (empty lines only) is not sent.

    ``tally`` counts what was special about its lines, by the names in TALLIES. ``cut`` is the recipe's ``max_bytes``,
    on which it depends where a line too long for a packet is cut. ``tail``: a digest of the log's bytes before ``end``.
    """

    id: str
    body: bytes
    offset: int
    end: int
    messages: int
    tally: Counter[str]
    cut: int
    tail: str = ""


class Encoder:
    """Makes messages out of lines, as JSON."""

    def __init__(self, style: Style) -> None:
        self.style = style
        self._given = {
            name: value for name, value in (("level", style.level), ("source", style.source)) if value is not None
        }
        self._plain = style.format is Format.TEXT

    def encode(self, line: Line, tally: Counter[str]) -> bytes | None:
        """Return the message that a line makes, None if it is empty; count what is special about it."""
        raw = line.raw.removeprefix(BYTE_ORDER_MARK) if line.offset == 0 else line.raw
        if not raw:
            tally["empty"] += line.whole
            return None
        if line.whole and not self._plain:
            if raw.lstrip()[:1] == b"{" and (message := self._from_object(raw, tally)) is not None:
                return message
            if self.style.format is Format.NDJSON:
                tally["not JSON"] += 1
        return self._from_text(line, raw, tally)

    def _from_text(self, line: Line, raw: bytes, tally: Counter[str]) -> bytes:
        metadata: dict[str, object] = {}
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            metadata["bytesBase64"] = base64.b64encode(raw).decode()
            tally["not UTF-8"] += 1
        if not line.whole:
            metadata["part"] = {"offset": line.offset, "bytes": len(line.raw)}
            tally["parts"] += 1
        return orjson.dumps({"message": text} | self._defaults() | ({"metadata": metadata} if metadata else {}))

    def _from_object(self, raw: bytes, tally: Counter[str]) -> bytes | None:
        """Return the message that a JSON object is or holds; None if it cannot travel on as JSON."""
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(value, dict):
            return None
        if _is_message(raw):
            missing = {name: given for name, given in self._defaults().items() if name not in value}
            return orjson.dumps(missing)[:-1] + b"," + raw.lstrip()[1:] if missing else raw
        # What a message has to have is looked for; the object itself, with all that is in it, becomes its metadata.
        text = _first(value, MESSAGE_KEYS) or raw.decode()
        members = {"message": text} | self._defaults() | _known(value) | {"metadata": orjson.Fragment(raw)}
        message = orjson.dumps(members)
        if not _is_message(message):
            return None
        tally["wrapped"] += 1
        return message

    def _defaults(self) -> dict[str, str]:
        if not self.style.stamp:
            return self._given
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"timestamp": now} | self._given


def _is_message(raw: bytes) -> bool:
    """Return whether a JSON object is a log message as the schema has it."""
    body = b'{"emitterId":"-","messages":[%s]}' % raw
    if scan(body) is not None:
        return True
    try:
        packet.check(body)
    except PacketError:
        return False
    return True


def _known(value: dict[str, Any]) -> dict[str, str]:
    """Return what an object of another make says about time, level and source, where it is what the schema wants."""
    found = {}
    timestamp, level, source = (_first(value, keys) for keys in (TIMESTAMP_KEYS, LEVEL_KEYS, SOURCE_KEYS))
    if timestamp and packet.is_date_time(timestamp):
        found["timestamp"] = timestamp
    if level and level.lower() in packet.LEVELS:
        found["level"] = level
    if source:
        found["source"] = source
    return found


def _first(value: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((value[key] for key in keys if isinstance(value.get(key), str)), None)


class Packer:
    """Puts the lines of one log, from an offset on, into packets; ``all_in_one``: into one, whatever its size."""

    def __init__(
        self, recipe: Recipe, identity: str, offset: int = 0, *, at_start: bool = True, all_in_one: bool = False
    ) -> None:
        """``at_start``: a line begins at ``offset``."""
        self._cutter = LineCutter(recipe.max_line, offset, at_start=at_start)
        self._encoder, self._identity = Encoder(recipe.style), identity
        self._cut = recipe.max_bytes
        self._max_messages = sys.maxsize if all_in_one else recipe.max_messages
        self._max_bytes = sys.maxsize if all_in_one else recipe.max_bytes
        self._emitter = orjson.dumps(recipe.style.emitter)
        self._file = orjson.dumps(recipe.style.file)
        self._clear()

    def _clear(self) -> None:
        self._messages: list[bytes] = []
        self._raw: list[bytes] = []
        self._tally: Counter[str] = Counter()
        self._offset = self._end = -1
        self._size = 0

    @property
    def empty(self) -> bool:
        """Whether no line is waiting for its packet to be complete."""
        return self._offset < 0

    @property
    def pending(self) -> int:
        """Bytes of a line whose end has not come yet."""
        return self._cutter.pending

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Yield the packets that are complete with the next bytes of the log."""
        for line in self._cutter.feed(data):
            yield from self.add(line)

    def finish(self) -> Iterator[Packet]:
        """Yield what is left: the log ends here."""
        for line in self._cutter.finish():
            yield from self.add(line)
        yield from self.flush()

    def add(self, line: Line) -> Iterator[Packet]:
        """Yield the packets that are complete with, or just before, this line."""
        tally: Counter[str] = Counter()
        message = self._encoder.encode(line, tally)
        if message is not None and self._messages and self._size + len(message) + 1 > self._max_bytes:
            yield from self.flush()
        if self.empty:
            self._offset, self._size = line.offset, len(self._body(line.offset))
        self._end = line.end
        self._tally += tally
        if message is None:
            return
        self._messages.append(message)
        self._raw.append(line.raw)
        self._size += len(message) + 1
        if len(self._messages) == self._max_messages:
            yield from self.flush()

    def flush(self) -> Iterator[Packet]:
        """Yield a packet of the lines that wait, if there are any."""
        if not self.empty:
            body = self._body(self._offset)
            packet = Packet(self._id(), body, self._offset, self._end, len(self._messages), self._tally, self._cut)
            self._clear()
            yield packet

    def _body(self, offset: int) -> bytes:
        return b'{"emitterId":%s,"metadata":{"file":%s,"offset":%d},"messages":[%s]}' % (
            self._emitter,
            self._file,
            offset,
            b",".join(self._messages),
        )

    def _id(self) -> str:
        """Return an id: 24 hexadecimal digits of a digest, and the offset, to find it in the log."""
        where = f"{self._identity}\0{self._encoder.style.emitter}\0{self._offset}\0{self._end}\0".encode()
        digest = hashlib.blake2b(where + b"\n".join(self._raw), digest_size=12).hexdigest()
        return f"{digest}-{self._offset}"
