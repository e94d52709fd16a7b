"""What a log packet is.

``LogPacket`` and ``LogMessage`` are the schema; ``check`` decides whether a body conforms to it, and says what is wrong
if it does not. The scanner in ``core/packet_scan.pxi`` accepts conforming bodies before ``check`` is called, so
this module is written to be correct and clear, and the scanner is tested against it. Whether a body is JSON at all, and
where it is not, is reported by the scanner: the texts of Python's decoder differ between versions.

To decode a body takes a hundred times as long as to scan it, and ten times its memory, so of a large one (over
MAX_EXPLAINED) only the part where the scanner stopped is decoded: its first fault is reported, not all of them.

An accepted body is forwarded unchanged to analyzers in any language. So ``check`` also refuses what parsers are
known to disagree about, so that no analyzer reads another packet than the one checked here: a member of the schema that
appears twice, half a surrogate pair, deep nesting, NaN. Members unknown to the schema may be anything that is JSON.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import date
from functools import partial
from itertools import islice
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType, inspect

from fastdist._core import hash_text, locate, malformed, scan
from fastdist.errors import PacketError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MAX_EMITTER_ID: Final = 256  # characters
MAX_ERRORS: Final = 20  # reported for one packet
MAX_EXPLAINED: Final = 16 * 1024  # bytes that are decoded to report what is wrong with them: some 4 ms
_SPACE: Final = b" \t\r\n"
_COLON: Final = _SPACE + b":"
LEVELS: Final = ("trace", "debug", "info", "warn", "warning", "error", "fatal", "critical")


class LogMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One log message. Validation ``strict`` also requires ``timestamp`` (RFC 3339) and ``level`` (one of LEVELS)."""

    timestamp: str | UnsetType = UNSET
    level: str | UnsetType = UNSET
    message: str
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
    """Return the facts about a log packet; raise PacketError, ``malformed`` or ``invalid``, if the body is not one."""
    _refuse_malformed(body)
    body = body.strip(_SPACE)
    if len(body) > MAX_EXPLAINED:
        position = locate(body, strict)
        if position is not None:
            _refuse_if_any(_faults_of_large(body, *position, strict=strict))
            _refuse_if_any([_Fault("", "does not conform to the schema")])  # for certain: the scanner refused it
        return Facts(*cast("tuple[int, int]", scan(body, strict)))
    packet = _DECODER.decode(body.decode())
    _refuse_if_any(_faults(packet, "", _PACKET[strict]))
    return Facts(len(packet["messages"]), hash_text(packet["emitterId"].encode()))


def decode(body: bytes) -> Any:
    """Return what a body says, numbers as floats; raise PacketError, ``malformed``, if it is not JSON."""
    _refuse_malformed(body)
    return _DECODER.decode(body.decode())


def _refuse_malformed(body: bytes) -> None:
    if not body:
        raise PacketError("malformed", "the body is empty")
    fault = malformed(body)
    if fault is not None:
        what, line, column, byte = fault
        raise PacketError("malformed", f"{what} at line {line}, column {column} (byte {byte})")


def _refuse_if_any(all_faults: Iterable[_Fault]) -> None:
    faults = list(islice(all_faults, MAX_ERRORS))
    if faults:
        first = f"{faults[0].pointer or 'the body'}: {faults[0].detail}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise PacketError("invalid", first + more, [fault._asdict() for fault in faults])


# --------------------------------------------------------------------------------------------------------- decoding it


class _Ambiguous(dict[str, Any]):
    """A JSON object some of whose keys came more than once; their last values count.

    Which ones is asked of few objects: counting the keys of each would let a body of many such objects stop a worker
    for seconds.
    """

    members: list[tuple[str, Any]]


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(members)
    if len(value) < len(members):
        value = _Ambiguous(value)
        value.members = members
    return value


# The values of numbers do not matter, and an integer of 5,000 digits is as valid as any but too long for int().
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


# ---------------------------------------------------------------------------------------------------------- the schema


class _Fault(NamedTuple):
    pointer: str
    detail: str


def _no_faults(_value: Any, _pointer: str) -> Iterable[_Fault]:
    return ()


class _Member(NamedTuple):
    type: type
    required: bool
    faults: Callable[[Any, str], Iterable[_Fault]]  # what else may be wrong with a value of that type, and its pointer


_NAMES: Final[dict[type, str]] = {
    str: "a string",
    float: "a number",
    bool: "a boolean",
    NoneType: "null",
    list: "an array",
    dict: "an object",
    _Ambiguous: "an object",
}


def _faults(value: Any, pointer: str, members: dict[str, _Member]) -> Iterator[_Fault]:
    """Yield what keeps a value from being an object with these members: the types of all of them, then the rest."""
    if not isinstance(value, dict):
        yield _Fault(pointer, f"expected an object, got {_NAMES[type(value)]}")
        return
    times = Counter(key for key, _ in value.members) if isinstance(value, _Ambiguous) else {}
    for key, member in members.items():
        at = f"{pointer}/{key}"
        if times.get(key, 0) > 1:
            yield _Fault(at, "appears twice")
        if key not in value:
            if member.required:
                yield _Fault(at, "is required")
        elif not isinstance(value[key], member.type):
            yield _Fault(at, f"expected {_NAMES[member.type]}, got {_NAMES[type(value[key])]}")
    for key, member in members.items():
        if isinstance(value.get(key), member.type):
            yield from member.faults(value[key], f"{pointer}/{key}")


def _faults_of_emitter(emitter: str, pointer: str) -> Iterator[_Fault]:
    if not 1 <= len(emitter) <= MAX_EMITTER_ID:
        yield _Fault(pointer, f"expected 1 to {MAX_EMITTER_ID} characters, got {len(emitter)}")


def _faults_of_messages(messages: list[Any], pointer: str, *, strict: bool) -> Iterator[_Fault]:
    if not messages:
        yield _Fault(pointer, "expected at least one message")
    for index, message in enumerate(messages):
        yield from _faults(message, f"{pointer}/{index}", _MESSAGE[strict])


def _faults_of_timestamp(timestamp: str, pointer: str) -> Iterator[_Fault]:
    if not is_date_time(timestamp):
        yield _Fault(pointer, "expected an RFC 3339 date-time such as 2026-01-31T12:34:56.789Z")


def _faults_of_level(level: str, pointer: str) -> Iterator[_Fault]:
    if level.lower() not in LEVELS:
        yield _Fault(pointer, f"expected one of {', '.join(LEVELS)}, in any case")


def _members(struct: type, **faults: Callable[[Any, str], Iterable[_Fault]]) -> dict[str, _Member]:
    """Return the members that a struct describes; one that has ``faults`` of its own by strict rules is required."""
    types = {inspect.StrType: str, inspect.ListType: list, inspect.DictType: dict}
    return {
        field.encode_name: _Member(
            types[type(field.type)], field.required or field.name in faults, faults.get(field.name, _no_faults)
        )
        for field in cast("inspect.StructType", inspect.type_info(struct)).fields
    }


# By whether validation is strict.
_MESSAGE: Final = {
    False: _members(LogMessage),
    True: _members(LogMessage, timestamp=_faults_of_timestamp, level=_faults_of_level),
}
_PACKET: Final = {
    strict: _members(LogPacket, emitter_id=_faults_of_emitter, messages=partial(_faults_of_messages, strict=strict))
    for strict in (False, True)
}

# -------------------------------------------------------------------------------------------------------- large bodies

_TYPES: Final[dict[str, type]] = {"{": dict, "[": list, '"': str, "t": bool, "f": bool, "n": NoneType}


def _value(text: str, expected: type) -> Any:
    """Return the value that a text begins with; if it is of another type than expected, any value of its type."""
    value = _TYPES.get(text[0], float)()
    return _DECODER.raw_decode(text)[0] if isinstance(value, expected) else value


def _faults_of_large(body: bytes, at: int, message: int | None, seen: list[str], *, strict: bool) -> Iterator[_Fault]:
    """Yield what is wrong with a large body of JSON, as far as can be seen from where its scan stopped (``locate``)."""

    def piece(begin: int) -> str:  # its last character may be cut through
        return body[begin : begin + MAX_EXPLAINED].decode(errors="ignore")

    text, packet, pointer = piece(at), _PACKET[strict], ""
    try:
        if at == 0:
            yield from _faults(_value(text, dict), pointer, packet)
        elif text[0] == "]":
            yield from _faults_of_messages([], "/messages", strict=strict)
        elif text[0] == "}":
            missing = (name for name, member in packet.items() if member.required and name not in seen)
            yield from (_Fault(f"/{name}", "is required") for name in missing)
        elif message is not None:
            pointer = f"/messages/{message}"
            yield from _faults(_value(text, dict), pointer, _MESSAGE[strict])
        else:
            key, end = _DECODER.raw_decode(text)
            pointer = f"/{key}"
            if key in seen:
                yield _Fault(pointer, "appears twice")
            elif key in packet:
                value = _value(piece(len(body) - len(body[at + end :].lstrip(_COLON))), packet[key].type)
                yield from _faults({key: value}, "", {key: packet[key]})
    except json.JSONDecodeError:  # the piece ends within its first value
        yield _Fault(pointer, f"what is wrong is over {MAX_EXPLAINED} bytes behind its beginning")


# ---------------------------------------------------------------------------------------------------------- date-times

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
