"""What a log packet is.

``LogPacket`` and ``LogMessage`` are the schema as a person reads it; ``check`` decides whether a body conforms to it,
and says what is wrong if it does not. The scanner in ``core/schema.pxi`` answers for all bodies that conform before
``check`` is asked, so this module is written to be right and clear, and the scanner is tested against it. Whether a
body is JSON at all, and where it is not, the scanner says: Python's decoder has other words for that in every version.

To decode a body takes a hundred times as long as to scan it, and ten times its memory, so of a large one (over
MAX_EXPLAINED) only the place is decoded where the scanner stopped: its first fault is told, not all of them.

A body that is accepted travels on unchanged to analyzers in any language. So ``check`` also refuses what parsers are
known to disagree about, lest an analyzer sees another packet than the one checked here: a member of the schema that
appears twice, half a surrogate pair, deep nesting, NaN. Members unknown to the schema may be anything that is JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from datetime import date
from itertools import islice
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, NoReturn

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fastdist._core import hash_text, locate, malformed, scan
from fastdist.errors import PacketError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_EMITTER_ID: Final = 256  # characters
MAX_ERRORS: Final = 20  # reported for one packet
MAX_EXPLAINED: Final = 16 * 1024  # bytes that are decoded to tell what is wrong with them: some 4 ms
_SPACE: Final = b" \t\r\n"
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
    _refuse_malformed(body)
    body = body.strip(_SPACE)
    if len(body) > MAX_EXPLAINED:
        facts = scan(body, strict)
        if facts is None:
            _refuse_large(body, strict=strict)
        return Facts(*facts)
    packet = _DECODER.decode(body.decode())
    _refuse_if_any(_faults(packet, strict=strict))
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


# The values of numbers do not matter, and an integer of 5,000 digits is as valid as any but too long for int().
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


# -------------------------------------------------------------------------------------------------------- large bodies

_TYPES: Final[dict[str, type]] = {"{": dict, "[": list, '"': str, "t": bool, "f": bool, "n": NoneType}


_COLON: Final = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")


def _text(body: bytes, at: int) -> str:
    """Return as much of the text from a byte on as is looked at; its last character may be cut through."""
    return body[at : at + MAX_EXPLAINED].decode(errors="ignore")


def _like(first: str) -> Any:
    """Return a value of the type of one that begins with this character: enough to say whether it is the right type."""
    return _TYPES.get(first, float)()


def _refuse_large(body: bytes, *, strict: bool) -> NoReturn:
    """Say what is wrong with a large body of JSON, as far as can be seen from where its scan stopped."""
    if not body.startswith(b"{"):
        _refuse_if_any(_faults_of_object(_like(chr(body[0])), "", {}))
    at, message, seen = locate(body, strict)
    piece = _text(body, at)
    pointer = "/messages" if message is None else f"/messages/{message}"
    with contextlib.suppress(json.JSONDecodeError):  # the piece ends before what it begins with
        if piece.startswith("]"):
            _refuse_if_any([_NO_MESSAGE])
        elif message is not None:
            value, _ = _DECODER.raw_decode(piece)
            _refuse_if_any(_faults_of_message(value, pointer, strict=strict))
        elif piece.startswith("}"):
            _refuse_if_any(_Fault(f"/{name}", "is required") for name in ("emitterId", "messages") if name not in seen)
        else:
            key, end = _DECODER.raw_decode(piece)
            pointer = f"/{key}"
            value_at = _COLON.match(body, at + end).end()  # type: ignore[union-attr]
            _refuse_if_any(_faults_of_member(key, _text(body, value_at), seen))
    far = _Fault(pointer, f"what is wrong is over {MAX_EXPLAINED} bytes behind its beginning")
    raise PacketError("invalid", f"{far.pointer}: {far.detail}", [far._asdict()])


def _faults_of_member(key: str, text: str, seen: list[str]) -> Iterator[_Fault]:
    """Yield what is wrong with a member of the packet that these came before; ``text`` begins with its value."""
    if key in seen:
        yield _Fault(f"/{key}", "appears twice")
    yield from _faults_of_object({key: _like(text[0])}, "", {key: _PACKET[key]})
    if key == "emitterId":
        yield from _faults_of_emitter(_DECODER.raw_decode(text)[0])


# ---------------------------------------------------------------------------------------------------------- the schema


class _Fault(NamedTuple):
    pointer: str
    detail: str


class _Member(NamedTuple):
    type: type
    required: bool


_NO_MESSAGE: Final = _Fault("/messages", "expected at least one message")
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
        yield _NO_MESSAGE
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
