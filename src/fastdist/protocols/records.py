"""How records of any protocol become messages.

The rules:

1. Every record becomes one message. What a message has no member for goes to its metadata under its own name, and so
   does what was converted, as it came: nothing is lost.
2. A time is RFC 3339, exact to the nanosecond (a JSON number with a fraction: to the microsecond); one that cannot be
   read counts as none, and then the time of receipt is taken. A level is one of ``packet.LEVELS``, else ``info``.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fastdist._core import JsonRecords, JsonValues, RecordMapper, count_commas, date_time, is_rfc3339
from fastdist.packet import MAX_EMITTER_ID
from fastdist.protocols.base import Reason, Refused
from fastdist.protocols.packets import FLUSH, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from fastdist.protocols.packets import Packets

PIECE: Final = 64 << 10  # bytes of JSON or lines that are read before it is asked whether a slice is over
STEP: Final = 16  # records that are mapped in Python before that is asked
SMALL: Final = 1024  # bytes of a JSON text whose values are not counted
MAX_VALUES: Final = 200_000  # of what is decoded at once: a record, or what records have in common
VALUE_BYTES: Final = 224  # that a decoded value takes at most, about: a name and a text, both short
MAX_DEPTH: Final = 120  # of a value, so that a packet with it in a message's metadata is not nested too deep
NS: Final = 1_000_000_000  # of a second
US: Final = 1_000_000
# A number is seconds, milliseconds, microseconds or nanoseconds, by its size: (below, units in a second).
UNITS: Final = ((10**11, 1), (10**14, 1000), (10**17, 1_000_000))

_decode = msgspec.json.Decoder().decode


# ------------------------------------------------------------------------------------------------------------ decoding


def json_texts(body: bytes) -> Iterator[list[bytes]]:
    """Yield JSON texts that follow each other, arrays taken apart, some at a time.

    Raises Refused with the number of the value at fault.
    """
    values = JsonValues(body, MAX_DEPTH)
    count = 0
    while True:
        try:
            texts = values.take(FLUSH)
        except ValueError as error:
            raise not_json(error.args, count) from None
        if not texts:
            return
        yield texts
        count += len(texts)


def decode_value(text: bytes, decode: Callable[[bytes], Any] = _decode) -> Any:
    """Return the value of a JSON text that is known to be one; a number too large for Python is ``msgspec.Raw``.

    ``decode``: may return what it likes, or raise what msgspec does.
    """
    if len(text) > MAX_VALUES and count_commas(text) > MAX_VALUES:  # much more memory than the text, and a long step
        raise Refused(Reason.TOO_LARGE, f"a record, or what is said of several, has more than {MAX_VALUES} values")
    try:
        return decode(text)
    except (msgspec.DecodeError, ValueError):  # half a surrogate pair, 1e400, an integer of thousands of digits
        return _without_surrogates(_DECODER.decode(text.decode()))


def decoded_size(text: bytes) -> int:
    """Return how many bytes a JSON text takes decoded, about; of a small one how many it has."""
    return len(text) + count_commas(text) * VALUE_BYTES if len(text) > SMALL else len(text)


def json_records(
    body: bytes, names: tuple[bytes, ...], packets: Packets, what: str, *, nulls: bool = False
) -> Generator[int, None, JsonRecords]:
    """Check a body of JSON, and return what takes its records: see JsonRecords. Raises Refused.

    ``what``: what it should be, for a person. How much is kept is told in ``packets.decoded``.
    """
    records = JsonRecords(body, MAX_DEPTH, names, nulls)
    more = True
    try:
        while more:
            more = records.check(PIECE)
            packets.decoded = len(body) + records.noted
            if packets.slices.over():
                yield packets.kept
    except ValueError as error:
        raise not_json(error.args) from None
    except TypeError as error:
        raise Refused(Reason.MALFORMED, f"the body is not {what}: {not_json(error.args)}") from None
    return records


def not_json(fault: tuple[str, int, int, int], record: int | None = None) -> Refused:
    """Return the refusal of what the core says of a text."""
    what, line, column, byte = fault
    return Refused(Reason.MALFORMED, f"{what} at line {line}, column {column} (byte {byte})", record=record)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _number(text: str) -> float | int | msgspec.Raw:
    """Return the value of a number, itself if there is no such value."""
    try:
        value = float(text) if any(mark in text for mark in ".eE") else int(text)
    except ValueError:  # thousands of digits
        return msgspec.Raw(text.encode())
    return value if abs(value) < float("inf") else msgspec.Raw(text.encode())


_DECODER: Final = json.JSONDecoder(parse_float=_number, parse_int=_number)


# --------------------------------------------------------------------------------------------------------------- times

_LOOSE: Final = (
    re.compile(  # of ISO 8601, as loggers write it: a space or T, a comma or dot, a zone of any form or none
        r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d+))?)?(?: ?(?:([Zz]|UTC|GMT)|([+-]\d\d):?(\d\d)?))?",
        re.ASCII,
    )
)
_DIGITS: Final = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
MAX_TIME_TEXT: Final = 100  # characters


def time_of(value: Any) -> str | None:
    """Return a time as RFC 3339; None if it cannot be read. A text that is RFC 3339 stays as it is."""
    kind = type(value)
    if kind is str:
        if is_rfc3339(value):
            return value  # type: ignore[no-any-return]
        return _time_of_text(value) if len(value) <= MAX_TIME_TEXT else None
    if kind is float:
        scale = _scale(value)
        microseconds = round(value * (US // scale)) if scale <= US else round(value) // 1000
        return date_time(microseconds // US, microseconds % US * 1000) if abs(value) < 10**20 else None
    return epoch(value) if kind is int else None


def epoch(number: int, fraction: str = "") -> str | None:
    """Return a time since 1970 as RFC 3339: a number of units by its size, and decimals."""
    scale = _scale(number)
    second, rest = divmod(number, scale)
    digits = len(str(scale)) - 1  # that the units take of the second's nine decimals
    nanosecond = rest * (NS // scale)
    if fraction:
        part = int(fraction[: 9 - digits].ljust(9 - digits, "0") or "0")
        nanosecond += part
    return date_time(second, nanosecond) if abs(second) < NS * NS else None


def _scale(number: float) -> int:
    return next((scale for below, scale in UNITS if abs(number) < below), NS)


def _time_of_text(text: str) -> str | None:
    if _DIGITS.fullmatch(text):
        number, _, fraction = text.partition(".")
        return epoch(int(number), "" if number.startswith("-") else fraction)
    match = _LOOSE.fullmatch(text)
    if match is None:
        return None
    date, minute, second, fraction, _, hours, minutes = match.groups()
    zone = f"{hours}:{minutes or '00'}" if hours else "Z"
    rewritten = f"{date}T{minute}:{second or '00'}{'.' + fraction if fraction else ''}{zone}"
    return rewritten if is_rfc3339(rewritten) else None


# -------------------------------------------------------------------------------------------------------------- levels

_NAMES: Final = {
    "trace": ("trace", "verbose"),
    "debug": ("debug",),
    "info": ("info", "information", "informational", "notice"),
    "warn": ("warn", "warning"),
    "error": ("error", "err"),
    "critical": ("crit", "critical"),
    "fatal": ("fatal", "emerg", "emergency", "alert", "panic"),
}
SYSLOG: Final = ("fatal", "fatal", "critical", "error", "warn", "info", "info", "debug")  # by severity
PINO: Final = {10: "trace", 20: "debug", 30: "info", 40: "warn", 50: "error", 60: "fatal"}
_NUMBERS: Final = {**dict(enumerate(SYSLOG)), **{n: PINO[n // 10 * 10] for n in range(10, 61)}}
LEVELS: Final[dict[str, str]] = {
    **{name: level for level, names in _NAMES.items() for name in names},
    **{str(number): level for number, level in _NUMBERS.items()},
}
LEVELS_BYTES: Final = {name.encode(): level.encode() for name, level in LEVELS.items()}  # for the core


def level_of(value: Any) -> str | None:
    """Return the level that a name or number means; None for an unknown one."""
    kind = type(value)
    if kind is str:
        return LEVELS.get(value) or (LEVELS.get(value.lower()) if len(value) < 16 else None)  # noqa: PLR2004
    return _NUMBERS.get(value) if kind is int or kind is float else None


# --------------------------------------------------------------------------------------------- records that are objects

TEXTS: Final = ("message", "msg", "log", "MESSAGE", "short_message")
TIMES: Final = ("timestamp", "@timestamp", "time", "date", "ts", "ISODATE")
LEVEL_NAMES: Final = ("level", "severity", "loglevel", "log.level", "PRIORITY")
SOURCES: Final = ("source", "logger", "log.file.path", "file", "program", "PROGRAM")
EMITTERS: Final = ("service.name", "host.name", "hostname", "host", "HOST")
NAMES: Final = tuple(tuple(name.encode() for name in names) for names in (TEXTS, TIMES, LEVEL_NAMES, SOURCES, EMITTERS))


def text_of(value: Any) -> str:
    """Return a value as the text of a message: itself, or its compact JSON."""
    return value if type(value) is str else encode(value).decode()


def member(record: dict[str, Any], name: str) -> Any:
    """Return a member by its name, which may have dots: flat or nested; None if there is no such member."""
    value = record.get(name)
    if value is None and "." in name:
        value = record
        for part in name.split("."):
            value = value.get(part) if type(value) is dict else None
    return value


class Common:
    """What all records of a request have in common: the time of receipt, and what is taken if they do not say."""

    def __init__(self, received_ns: int, emitter: str, source: str = "", *, fixed_emitter: bool = False) -> None:
        self.received = date_time(*divmod(received_ns, NS)) or "1970-01-01T00:00:00Z"
        self.emitter, self.source, self.fixed_emitter = emitter, source, fixed_emitter

    def mapper(self) -> RecordMapper:
        """Return what does the same as ``message`` for records of the usual kind, without decoding them."""
        source = encode(self.source) if self.source else b""
        return RecordMapper(NAMES, LEVELS_BYTES, self.received.encode(), source, self.fixed_emitter)

    def line(self, text: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the message of a line of text."""
        message: dict[str, Any] = {"timestamp": self.received, "level": "info", "message": text}
        if self.source:
            message["source"] = self.source
        if metadata:
            message["metadata"] = metadata
        return message

    def message(self, record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the emitter and the message of a record, which is used up: what is left of it becomes metadata."""
        text = _take_text(record)
        emitter = self.emitter if self.fixed_emitter else _take_emitter(record) or self.emitter
        message = {
            "timestamp": _take_time(record) or self.received,
            "level": _take_level(record) or "info",
            "message": text,
        }
        source = _take_source(record) or self.source
        if source:
            message["source"] = source
        if record:
            message["metadata"] = record  # type: ignore[assignment]
        return emitter, message


def _take_text(record: dict[str, Any]) -> str:
    for name in TEXTS:
        value = record.get(name)
        if type(value) is str:
            del record[name]
            return value
        if value is not None and not (name == "log" and type(value) is dict):  # which has log.level and the like
            return text_of(value)
    return text_of(record)


def _take_time(record: dict[str, Any]) -> str | None:
    for name in TIMES:
        value = record.get(name)
        if value is not None:
            time = time_of(value)
            if time is not None:
                if time is value:
                    del record[name]
                return time
    return None


def _take_level(record: dict[str, Any]) -> str | None:
    for name in LEVEL_NAMES:
        value = record.get(name) if name in record else member(record, name) if name == "log.level" else None
        if value is not None:
            level = level_of(value)
            if level is not None:
                if level == value and name in record:
                    del record[name]
                return level
    return None


def _take_source(record: dict[str, Any]) -> str | None:
    for name in SOURCES:
        value = record.get(name) if name in record else member(record, name) if name == "log.file.path" else None
        if value and type(value) is str:
            record.pop(name, None)
            return value
    return None


def _take_emitter(record: dict[str, Any]) -> str | None:
    for name in EMITTERS:
        value = record.get(name) if name in record else member(record, name) if "." in name else None
        if type(value) is dict:
            value = value.get("name")
        if value and type(value) is str:
            if name in record and record[name] is value and len(value) <= MAX_EMITTER_ID:
                del record[name]
            return value
    return None


def add_records(body: bytes, common: Common, packets: Packets) -> Generator[int, None, None]:
    """Add the records of a body of JSON; a value that is no object is a line. Raises Refused."""
    values, mapper = JsonValues(body, MAX_DEPTH), common.mapper()
    while True:
        try:
            found = mapper.take(values, FLUSH)
        except ValueError as error:
            raise not_json(error.args, packets.number) from None
        if not found:
            return
        for item in found:
            if type(item) is tuple:
                packets.add_chunk(item[0] or common.emitter, item[1], item[2])
                continue
            value = decode_value(item)  # type: ignore[arg-type]
            if type(value) is dict:
                packets.add(*common.message(value), len(item))
            else:
                packets.add(common.emitter, common.line(text_of(value)), len(item))
        if packets.slices.over():
            yield packets.kept


def add_lines(body: bytes, common: Common, packets: Packets, metadata: dict[str, Any]) -> Generator[int, None, None]:
    """Add the lines of a text that are not empty; one that is not UTF-8 has its bytes in its metadata."""
    for part in whole_lines(body, PIECE):
        for raw in part.split(b"\n"):
            if line := raw.removesuffix(b"\r"):
                text, odd = _line(line)
                packets.add(common.emitter, common.line(text, metadata | odd if odd else metadata), len(text))
        if packets.slices.over():
            yield packets.kept


def whole_lines(body: bytes, size: int) -> Iterator[bytes]:
    """Yield a text in parts of about so many bytes, each to the end of a line or of the text."""
    at = 0
    while at < len(body):
        end = body.find(b"\n", min(at + size, len(body) - 1))
        end = len(body) if end < 0 else end + 1
        yield body[at:end]
        at = end


def _line(raw: bytes) -> tuple[str, dict[str, str] | None]:
    try:
        return raw.decode(), None
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), {"bytesBase64": base64.b64encode(raw).decode()}
