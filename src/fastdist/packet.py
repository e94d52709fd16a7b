"""What a log packet is.

``LogPacket`` and ``LogMessage`` are the schema as a person reads it; ``check`` decides whether a body conforms to it,
and says what is wrong if it does not. The scanner in ``_core/schema.pyx`` answers for all bodies that conform before
``check`` is asked, so this module is written to be right and clear, and the scanner is tested against it.

To decode a body takes a hundred times as long as to scan it, and ten times its memory, so of a large one (over
MAX_EXPLAINED) only the place is decoded where the scanner stopped: its first fault is told, not all of them.

A body that is accepted travels on unchanged to analyzers in any language. So ``check`` also refuses what parsers are
known to disagree about, lest an analyzer sees another packet than the one checked here: a member of the schema that
appears twice, half a surrogate pair, deep nesting, NaN. Members unknown to the schema may be anything that is JSON.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import date
from itertools import accumulate, islice
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, NoReturn

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fastdist._core.schema import hash_text, locate, scan
from fastdist.errors import PacketError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_EMITTER_ID: Final = 256  # characters
MAX_DEPTH: Final = 128  # containers within each other, the packet itself included
MAX_ERRORS: Final = 20  # reported for one packet
MAX_EXPLAINED: Final = 128 * 1024  # bytes that are decoded to tell what is wrong with them: some 30 ms
LEVELS: Final = ("trace", "debug", "info", "warn", "warning", "error", "fatal", "critical")


class LogMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One log message. Validation ``strict`` also requires ``timestamp`` (RFC 3339) and ``level`` (one of LEVELS)."""

    message: str
    timestamp: str | UnsetType = UNSET
    level: str | UnsetType = UNSET
    source: str | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET


class LogPacket(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What an emitter posts: who it is (``emitterId``), and at least one message."""

    emitter_id: Annotated[str, Meta(min_length=1, max_length=MAX_EMITTER_ID)]
    messages: Annotated[list[LogMessage], Meta(min_length=1)]
    metadata: dict[str, Any] | UnsetType = UNSET


class Facts(NamedTuple):
    """What the service needs to know of a packet: its number of messages, and its emitterId as a 64-bit number."""

    messages: int
    emitter_hash: int


def check(body: bytes, *, strict: bool = False) -> Facts:
    """Return the facts about a log packet; raise PacketError, ``malformed`` or ``invalid``, if the body is none."""
    if len(body) > MAX_EXPLAINED:
        facts = scan(body, strict)
        if facts is None:
            raise _located(body, strict=strict)
        return Facts(*facts)
    packet = _decode(body)
    _refuse_if_any(_faults(packet, strict=strict))
    return Facts(len(packet["messages"]), hash_text(packet["emitterId"].encode()))


def _refuse_if_any(all_faults: Iterator[_Fault]) -> None:
    faults = list(islice(all_faults, MAX_ERRORS))
    if faults:
        first = f"{faults[0].pointer or 'the body'}: {faults[0].detail}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise PacketError("invalid", first + more, [fault._asdict() for fault in faults])


# ------------------------------------------------------------------------------------------------------------ the JSON

_STRING: Final = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_STRINGS: Final = re.compile(_STRING, re.DOTALL)
_CONSTANTS: Final = re.compile(rf"{_STRING}|(NaN|-?Infinity)", re.DOTALL)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_UP_TO_LONE_SURROGATE: Final = re.compile(
    r"[^\\]*+(?:\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB]..\\u[dD][c-fC-F]..)[^\\]*+)*+", re.DOTALL
)
_COLON: Final = re.compile(r"[ \t\r\n]*:[ \t\r\n]*")
_SPACE: Final = b" \t\r\n"
_CUT: Final = 16  # characters from the end of a piece, where its being cut off may be what is wrong
_STEPS: Final = bytes(1 if byte in b"[{" else 0xFF for byte in range(256))  # as signed numbers 1 and -1
_OTHER_THAN_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")


class _Ambiguous(dict[str, Any]):
    """A JSON object some of whose keys came more than once; their last values count.

    Which ones is asked of few objects, and told by counting: doing that for each would let a body of many such objects
    stop a worker for seconds.
    """

    __slots__ = ("members",)
    members: list[tuple[str, Any]]

    @property
    def repeated(self) -> set[str]:
        """The keys that came more than once."""
        return {key for key, times in Counter(key for key, _ in self.members).items() if times > 1}


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(members)
    if len(value) == len(members):
        return value
    ambiguous = _Ambiguous(value)
    ambiguous.members = members
    return ambiguous


class _ConstantError(ValueError):
    """NaN or an infinity, which Python's decoder would let pass."""


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


# The values of numbers do not matter, and an integer of 5,000 digits is as valid as any but too long for int().
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_int=float, parse_constant=_refuse_constant)


def _decode(body: bytes) -> Any:
    if not body:
        raise PacketError("malformed", "the body is empty")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise PacketError("malformed", f"not UTF-8: {error.reason} at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise _malformed(text, 0, "a byte order mark")
    _check_depth(text)
    try:
        packet = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _malformed(text, error.pos, _what(error)) from None
    except _ConstantError as error:
        first = next(match for match in _CONSTANTS.finditer(text) if match[1])
        raise _malformed(text, first.start(), f"{error} is no JSON value") from None
    _check_surrogates(text)
    return packet


def _check_depth(text: str, outside: int = 0) -> None:
    """Before decoding, since the decoder calls itself for each level; there are so many around the text."""
    if text.count("[") + text.count("{") <= MAX_DEPTH - outside:
        return
    brackets = _STRINGS.sub("", text).encode().translate(_STEPS, _OTHER_THAN_BRACKETS)
    if max(accumulate(memoryview(brackets).cast("b")), default=0) > MAX_DEPTH - outside:
        raise PacketError("malformed", f"nested more than {MAX_DEPTH} levels deep")


def _check_surrogates(text: str) -> None:
    """After decoding: backslashes then occur in strings only, and each starts a valid escape."""
    if _SURROGATE.search(text) and (match := _UP_TO_LONE_SURROGATE.match(text)) and match.end() != len(text):
        raise _malformed(text, match.end(), "half a surrogate pair, which is no character")


def _what(error: json.JSONDecodeError) -> str:
    return error.msg[:1].lower() + error.msg[1:].removesuffix(" at").rstrip(": ")


def _malformed(text: str, position: int, what: str) -> PacketError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    byte = len(text[:position].encode())
    return PacketError("malformed", f"not JSON: {what} at line {line}, column {column} (byte {byte})")


# -------------------------------------------------------------------------------------------------------- large bodies


class _Piece(NamedTuple):
    """The text of a large body from one of its bytes on, as much of it as is looked at."""

    at: int
    text: str
    cut: bool  # there is more

    @classmethod
    def of(cls, body: bytes, at: int) -> _Piece:
        data = body[at : at + MAX_EXPLAINED]
        cut = at + len(data) < len(body)
        try:
            return cls(at, data.decode(), cut)
        except UnicodeDecodeError as error:
            if not cut or error.start < len(data) - 3:  # else it is a character that was cut through
                raise PacketError("malformed", f"not UTF-8: {error.reason} at byte {at + error.start}") from None
            return cls(at, data[: error.start].decode(), cut)

    def fault(self, what: str, position: int) -> PacketError:
        return PacketError("malformed", f"not JSON: {what} at byte {self.at + len(self.text[:position].encode())}")

    def beyond(self, position: int) -> _Piece:
        return _Piece(self.at + len(self.text[:position].encode()), self.text[position:], self.cut)

    def value(self, outside: int) -> tuple[Any, int]:
        """Return the value that it begins with, and where that ends; so many containers are around it."""
        what, place = "", 0
        try:
            _check_depth(self.text, outside)
            value, end = _DECODER.raw_decode(self.text)
        except json.JSONDecodeError as error:
            what, place = _what(error), error.pos
        except _ConstantError as error:
            what = f"{error} is no JSON value"
            place = next(match for match in _CONSTANTS.finditer(self.text) if match[1]).start(1)
        else:
            match = _UP_TO_LONE_SURROGATE.match(self.text, 0, end)
            if match is None or match.end() == end:
                return value, end
            what, place = "half a surrogate pair, which is no character", match.end()
        if self.cut and (what.startswith("unterminated") or place > len(self.text) - _CUT):
            what, place = f"what is wrong is over {MAX_EXPLAINED} bytes behind the beginning of the value", 0
        raise self.fault(what, place)


def _located(body: bytes, *, strict: bool) -> PacketError:
    """Return what is wrong with a large body, as far as can be seen from where its scan stopped."""
    at, message, *seen = locate(body, strict)
    before = body[max(at - MAX_EXPLAINED, 0) : at].rstrip(_SPACE)[-1:]
    try:
        piece = _Piece.of(body, at)
        if message is not None:
            _explain_message(piece, message, before, strict=strict)
        elif before not in (b"{", b",") and piece.text.rstrip() == "}":
            there = dict(zip(("emitterId", "messages"), seen, strict=True))
            _refuse_if_any(_Fault(f"/{name}", "is required") for name in there if not there[name])
        elif before == b"," or piece.text.startswith('"'):
            _explain_member(piece, dict(zip(("emitterId", "messages"), seen, strict=True)))
        elif at > 0 and body.rstrip(_SPACE).endswith(b"}"):
            raise piece.fault("expecting ',' delimiter", 0)
    except PacketError as error:
        return error
    return PacketError("malformed", f"not JSON, or no object, from somewhere behind byte {at} on")


def _explain_message(piece: _Piece, index: int, before: bytes, *, strict: bool) -> None:
    if index == 0 and piece.text.startswith("]"):
        _refuse_if_any(iter([_Fault("/messages", "expected at least one message")]))
    if before not in (b"[", b","):
        raise piece.fault("expecting ',' delimiter", 0)
    value, _ = piece.value(2)
    _refuse_if_any(_faults_of_message(value, f"/messages/{index}", strict=strict))


def _explain_member(piece: _Piece, seen: dict[str, bool]) -> None:
    if not piece.text.startswith('"'):
        raise piece.fault("expecting property name enclosed in double quotes", 0)
    key, end = piece.value(1)
    colon = _COLON.match(piece.text, end)
    if colon is None:
        raise piece.fault("expecting ':' delimiter", end)
    value, end = piece.beyond(colon.end()).value(1)
    if key not in _PACKET:
        return
    if seen.get(key, False):
        _refuse_if_any(iter([_Fault(f"/{key}", "appears twice")]))
    _refuse_if_any(_faults_of_object({key: value}, "", {key: _PACKET[key]}))
    if key == "emitterId":
        _refuse_if_any(_faults_of_emitter(value))


# ---------------------------------------------------------------------------------------------------------- the schema


class _Fault(NamedTuple):
    pointer: str
    detail: str


class _Member(NamedTuple):
    type: type
    required: bool


_PACKET: Final = {
    "emitterId": _Member(str, required=True),
    "messages": _Member(list, required=True),
    "metadata": _Member(dict, required=False),
}
_MESSAGE: Final = {
    "timestamp": _Member(str, required=False),
    "level": _Member(str, required=False),
    "message": _Member(str, required=True),
    "source": _Member(str, required=False),
    "metadata": _Member(dict, required=False),
}
_STRICT_MESSAGE: Final = {
    **_MESSAGE,
    "timestamp": _Member(str, required=True),
    "level": _Member(str, required=True),
}
_NAMES: Final[dict[type, str]] = {
    str: "a string",
    float: "a number",
    bool: "a boolean",
    NoneType: "null",
    list: "an array",
    dict: "an object",
    _Ambiguous: "an object",
}


def _faults(packet: Any, *, strict: bool) -> Iterator[_Fault]:
    """Whatever keeps decoded JSON from being a log packet, one by one."""
    yield from _faults_of_object(packet, "", _PACKET)
    if not isinstance(packet, dict):
        return
    yield from _faults_of_emitter(packet.get("emitterId"))
    messages = packet.get("messages")
    if not isinstance(messages, list):
        return
    if not messages:
        yield _Fault("/messages", "expected at least one message")
    for index, message in enumerate(messages):
        yield from _faults_of_message(message, f"/messages/{index}", strict=strict)


def _faults_of_emitter(emitter: Any) -> Iterator[_Fault]:
    if isinstance(emitter, str) and not 1 <= len(emitter) <= MAX_EMITTER_ID:
        yield _Fault("/emitterId", f"expected 1 to {MAX_EMITTER_ID} characters, got {len(emitter)}")


def _faults_of_message(message: Any, pointer: str, *, strict: bool) -> Iterator[_Fault]:
    yield from _faults_of_object(message, pointer, _STRICT_MESSAGE if strict else _MESSAGE)
    if strict and isinstance(message, dict):
        yield from _strict_faults(message, pointer)


def _faults_of_object(value: Any, pointer: str, members: dict[str, _Member]) -> Iterator[_Fault]:
    if not isinstance(value, dict):
        yield _Fault(pointer, f"expected an object, got {_NAMES[type(value)]}")
        return
    repeated = value.repeated if isinstance(value, _Ambiguous) else ()
    for key, member in members.items():
        at = f"{pointer}/{key}"
        if key in repeated:
            yield _Fault(at, "appears twice")
        if key not in value:
            if member.required:
                yield _Fault(at, "is required")
        elif not isinstance(value[key], member.type):
            yield _Fault(at, f"expected {_NAMES[member.type]}, got {_NAMES[type(value[key])]}")


def _strict_faults(message: dict[str, Any], pointer: str) -> Iterator[_Fault]:
    timestamp, level = message.get("timestamp"), message.get("level")
    if isinstance(timestamp, str) and not is_date_time(timestamp):
        yield _Fault(f"{pointer}/timestamp", "expected an RFC 3339 date-time such as 2026-01-31T12:34:56.789Z")
    if isinstance(level, str) and level.lower() not in LEVELS:
        yield _Fault(f"{pointer}/level", f"expected one of {', '.join(LEVELS)}, in any case")


_DATE_TIME: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]"
    r"([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9]|60)(?:\.[0-9]+)?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
)


def is_date_time(text: str) -> bool:
    """RFC 3339, section 5.6: a date of the calendar; an offset is required; a leap second only where it can be."""
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        return False
    year, month, day, hour, minute, second = (int(match[group]) for group in range(1, 7))
    try:
        date(2000 + year % 400, month, day)  # after 400 years the calendar repeats; date() knows no year 0
    except ValueError:
        return False
    moment = hour * 60 + minute
    if match[7]:
        offset = int(match[8]) * 60 + int(match[9])
        moment += offset if match[7] == "-" else -offset
    last_minute = 23 * 60 + 59  # of a day in UTC, at whose end leap seconds are inserted
    return second < 60 or moment % (24 * 60) == last_minute  # noqa: PLR2004 - the seconds of a minute
