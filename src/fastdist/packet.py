"""What a log packet is.

``LogPacket`` and ``LogMessage`` are the schema as a person reads it; ``check`` decides whether a body conforms to it,
and says what is wrong if it does not. The scanner in ``_core/schema.pyx`` answers for nearly all bodies that conform
before ``check`` is asked, so this module is written to be right and clear, and the scanner is tested against it.

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

from fastdist._core.schema import hash_text
from fastdist.errors import PacketError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_EMITTER_ID: Final = 256  # characters
MAX_DEPTH: Final = 128  # containers within each other, the packet itself included
MAX_ERRORS: Final = 20  # reported for one packet
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
    packet = _decode(body)
    faults = list(islice(_faults(packet, strict=strict), MAX_ERRORS))
    if faults:
        first = f"{faults[0].pointer or 'the body'}: {faults[0].detail}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise PacketError("invalid", first + more, [fault._asdict() for fault in faults])
    return Facts(len(packet["messages"]), hash_text(packet["emitterId"].encode()))


# ------------------------------------------------------------------------------------------------------------ the JSON

_STRING: Final = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_STRINGS: Final = re.compile(_STRING, re.DOTALL)
_CONSTANTS: Final = re.compile(rf"{_STRING}|(NaN|-?Infinity)", re.DOTALL)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_UP_TO_LONE_SURROGATE: Final = re.compile(
    r"[^\\]*+(?:\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB]..\\u[dD][c-fC-F]..)[^\\]*+)*+", re.DOTALL
)
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
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" at").rstrip(": ")
        raise _malformed(text, error.pos, what) from None
    except _ConstantError as error:
        first = next(match for match in _CONSTANTS.finditer(text) if match[1])
        raise _malformed(text, first.start(), f"{error} is no JSON value") from None
    _check_surrogates(text)
    return packet


def _check_depth(text: str) -> None:
    """Before decoding, since the decoder calls itself for each level."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    brackets = _STRINGS.sub("", text).encode().translate(_STEPS, _OTHER_THAN_BRACKETS)
    if max(accumulate(memoryview(brackets).cast("b")), default=0) > MAX_DEPTH:
        raise PacketError("malformed", f"nested more than {MAX_DEPTH} levels deep")


def _check_surrogates(text: str) -> None:
    """After decoding: backslashes then occur in strings only, and each starts a valid escape."""
    if _SURROGATE.search(text) and (match := _UP_TO_LONE_SURROGATE.match(text)) and match.end() != len(text):
        raise _malformed(text, match.end(), "half a surrogate pair, which is no character")


def _malformed(text: str, position: int, what: str) -> PacketError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    byte = len(text[:position].encode())
    return PacketError("malformed", f"not JSON: {what} at line {line}, column {column} (byte {byte})")


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
    emitter = packet.get("emitterId")
    if isinstance(emitter, str) and not 1 <= len(emitter) <= MAX_EMITTER_ID:
        yield _Fault("/emitterId", f"expected 1 to {MAX_EMITTER_ID} characters, got {len(emitter)}")
    messages = packet.get("messages")
    if not isinstance(messages, list):
        return
    if not messages:
        yield _Fault("/messages", "expected at least one message")
    for index, message in enumerate(messages):
        pointer = f"/messages/{index}"
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
