"""Loki's push API, as JSON and snappy protobuf: what promtail, Alloy, Vector, Fluent Bit and logging handlers send."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from fastdist._core import RecordParts, find_field, loki_entries
from fastdist.errors import printable
from fastdist.exchange import Request, Response
from fastdist.protocols.base import (
    PROTOBUF_TYPES,
    STATUSES,
    TEXT,
    Protocol,
    Reason,
    Refused,
    Route,
    header_text,
    refusal_headers,
)
from fastdist.protocols.encodings import decode, snappy_block
from fastdist.protocols.packets import FLUSH, Packets, encode
from fastdist.protocols.records import (
    LEVELS_BYTES,
    STEP,
    Common,
    decode_value,
    decoded_size,
    json_records,
    level_of,
    text_of,
    time_of,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from fastdist.protocols.base import Limits, Work


LEVEL_LABELS = ("level", "detected_level", "severity")
EMITTER_LABELS = ("host", "hostname", "instance", "service_name", "app", "job")
SOURCE_LABELS = ("filename", "logger", "job")
MAX_LABELS = 65536  # characters of a stream's labels as text
MAX_CACHED = 4096


class Stream:
    """A stream's labels, and what they say of its records: level, emitter, source."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.level = next((level for name in LEVEL_LABELS if (level := level_of(labels.get(name)))), "info")
        self.emitter = next((labels[name] for name in EMITTER_LABELS if labels.get(name)), "loki")
        self.source = next((labels[name] for name in SOURCE_LABELS if labels.get(name)), "")


class Loki(Protocol):
    """``/loki/api/v1/push``. Its probe, ``GET /ready``, is the API's own."""

    name: ClassVar[str] = "loki"

    def __init__(self) -> None:
        self.routes = [Route("/loki/api/v1/push", {"POST": _take})]

    def refuse(self, _request: Request, refused: Refused) -> Response:
        """Return the reason as text."""
        headers = TEXT + refusal_headers(refused)
        return Response(STATUSES[refused.reason], printable(refused.detail).encode() + b"\n", headers)


def _take(request: Request, limits: Limits) -> Work:
    kind, headers = request.media_type, request.headers
    if kind not in ("", "application/json", *PROTOBUF_TYPES):
        detail = f"Content-Type {kind} is not taken; use application/json or application/x-protobuf"
        raise Refused(Reason.UNSUPPORTED, detail)
    tenant = header_text(headers.get("x-scope-orgid", ""))
    packets = Packets(limits, {"protocol": "loki", **({"tenant": tenant} if tenant else {})})
    received = Common(request.received_ns, "").received
    if kind in PROTOBUF_TYPES:
        yield from _protobuf(request, limits, packets, received)
    else:
        yield from _json((yield from decode(request, limits.max_body)), packets, received)
    return (yield from packets.finish(Response(204)))


# ------------------------------------------------------------------------------------------------------------ protobuf


def _protobuf(request: Request, limits: Limits, packets: Packets, received: str) -> Generator[int | None, None, None]:
    """Convert a PushRequest, which is a block of snappy whatever Content-Encoding says of that."""
    body = yield from decode(request, limits.max_body, meaningless="snappy")
    body = yield from snappy_block(body, limits.max_body)
    packets.decoded, at = len(body), 0
    try:
        while (field := find_field(body, at, len(body), 1)) is not None:
            begin, end, at = field
            if packets.slices.over():
                yield packets.kept
            if find_field(body, begin, end, 2) is None:
                continue
            labels = find_field(body, begin, end, 1)
            text = body[labels[0] : labels[1]].decode(errors="replace") if labels is not None else "{}"
            stream = _stream(text)
            parts = RecordParts(
                received.encode(),
                LEVELS_BYTES,
                limits.max_packet,
                encode(stream.source) if stream.source else b"",
                encode(stream.labels)[1:-1],
                stream.level.encode(),
                {name.encode() for name in stream.labels},
            )
            while begin < end:
                chunk, count, begin = loki_entries(body, begin, end, parts, FLUSH)
                packets.add_chunk(stream.emitter, chunk, count)
                if packets.slices.over():
                    yield packets.kept
    except OverflowError:
        raise packets.record_too_large() from None
    except ValueError as error:
        raise Refused(Reason.MALFORMED, f"the body is not a PushRequest: {error}", record=packets.records) from None


_LABEL = re.compile(
    r"""\s*(?:"((?:[^"\\]|\\.)*)"|([^\s=,{}"`]+))\s*(?:=|!=)\s*(?:"((?:[^"\\]|\\.)*)"|`([^`]*)`)\s*(,|$)""", re.DOTALL
)
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-7]{3}|.)", re.DOTALL)
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def _stream(text: str) -> Stream:
    """Return the stream with these labels, as text: ``{name="value", ...}`` with Go's escapes. Raises Refused."""
    if len(text) > MAX_LABELS:
        raise Refused(Reason.MALFORMED, f"the labels of a stream are longer than {MAX_LABELS} characters")
    return _cached(text) if len(text) <= MAX_CACHED else _parsed(text)


def _parsed(text: str) -> Stream:
    labels: dict[str, str] = {}
    inner = text.strip()
    if not (inner.startswith("{") and inner.endswith("}")):
        raise Refused(Reason.MALFORMED, f"these are no labels: {text[:100]}")
    inner, at = inner[1:-1].strip(), 0
    while at < len(inner):
        match = _LABEL.match(inner, at)
        if match is None:
            raise Refused(Reason.MALFORMED, f"these are no labels from character {at} on: {text[:100]}")
        quoted, name, value, raw, _ = match.groups()
        labels[_unescaped(quoted) if name is None else name] = raw if value is None else _unescaped(value)
        at = match.end()
    return Stream(labels)


_cached = lru_cache(maxsize=1024)(_parsed)


def _unescaped(text: str) -> str:
    """Return what a string of Go says: some of its escapes are bytes."""
    if "\\" not in text:
        return text
    return _ESCAPE.sub(_character, text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _character(match: re.Match[str]) -> str:
    escape = match[1]
    if escape[0] in "uU" and len(escape) > 1:
        code = int(escape[1:], 16)
        return chr(code) if code < 0xD800 or 0xDFFF < code < 0x110000 else "\ufffd"  # noqa: PLR2004  (no surrogates)
    if len(escape) == 3:  # noqa: PLR2004  (xhh, ooo)
        byte = int(escape[1:], 16) if escape[0] == "x" else int(escape, 8) & 0xFF
        return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)  # noqa: PLR2004  (what surrogateescape makes a byte)
    return _ESCAPES.get(escape, escape)


# ---------------------------------------------------------------------------------------------------------------- JSON


NAMES = (b"streams", b"stream", b"values")
FORMER_ENTRIES = re.compile(rb'"entries"\s*:\s*\[')
FORMER = 'streams with "labels" and "entries" are a former format; send "stream" and "values" (version="1" in Python)'


def _json(body: bytes, packets: Packets, received: str) -> Generator[int | None, None, None]:
    """Convert what is pushed."""
    records = yield from json_records(body, NAMES, packets, "what is pushed to Loki")
    decoded, about = packets.decoded, None
    while (taken := records.take(STEP)) is not None:
        if taken[0] is not about and taken[1]:
            about = taken[0]
            given = decode_value(about[0] or b"{}").items()
            stream = Stream({name: text_of(value) for name, value in given})
            size = len(encode(stream.labels))
            packets.decoded = decoded + decoded_size(about[0])
        for text in taken[1]:
            message = _entry(decode_value(text), stream, received, packets.number)
            packets.add(stream.emitter, message, size + decoded_size(text))
        if packets.slices.over():
            yield packets.kept
    if not packets.number and FORMER_ENTRIES.search(body):
        raise Refused(Reason.MALFORMED, FORMER)


def _entry(entry: Any, stream: Stream, received: str, record: int) -> dict[str, Any]:
    """Return the message of ``[time, line, structured metadata]``."""
    if type(entry) is not list or len(entry) < 2:  # noqa: PLR2004
        raise Refused(Reason.MALFORMED, "an entry of values is not [time, line]", record=record)
    extra = entry[2] if len(entry) > 2 else {}  # noqa: PLR2004
    if type(extra) is not dict:
        raise Refused(Reason.MALFORMED, "the structured metadata of an entry is no object", record=record)
    level = next((level for name in LEVEL_LABELS if (level := level_of(extra.get(name)))), None) if extra else None
    time = time_of(entry[0]) if entry[0] not in ("0", 0) else None
    message: dict[str, Any] = {
        "timestamp": time or received,
        "level": level or stream.level,
        "message": text_of(entry[1]),
    }
    if stream.source:
        message["source"] = stream.source
    message["metadata"] = stream.labels
    if time is None and entry[0] not in ("0", 0):
        extra = {"time": entry[0]} | extra
    if extra:
        own = {f"{name}_extracted" if name in stream.labels else name: value for name, value in extra.items()}
        message["metadata"] = own | stream.labels
    return message
