"""OTLP/HTTP logs, as protobuf and as JSON: what OpenTelemetry's SDKs, the Collector and Fluent Bit send to /v1/logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import orjson
from msgspec import Struct, ValidationError, convert
from msgspec.json import Decoder

from fastdist._core import RecordParts, date_time, find_field, otlp_attributes, otlp_records
from fastdist.errors import printable
from fastdist.exchange import JSON, Request, Response
from fastdist.protocols.base import PROTOBUF_TYPES, STATUSES, Protocol, Reason, Refused, Route, refusal_headers
from fastdist.protocols.encodings import decode
from fastdist.protocols.packets import FLUSH, Packets, encode
from fastdist.protocols.records import (
    LEVELS_BYTES,
    NS,
    STEP,
    Common,
    decode_value,
    decoded_size,
    json_records,
    level_of,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from fastdist.protocols.base import Limits, Work

PROTOBUF = b"Content-Type: application/x-protobuf\r\n"
MAX_RETRY_AFTER = 5  # seconds: SDKs give up at once when it is more than what is left of their 10
LEVEL_NUMBERS = ("trace", "debug", "info", "warn", "error", "fatal")  # four severity numbers each
EMITTERS = ("service.name", "host.name")
# google.rpc.Code by status.
CODES = {400: 3, 401: 16, 404: 12, 405: 12, 408: 4, 413: 3, 415: 3, 417: 3, 500: 13, 502: 14, 503: 14}


class Otlp(Protocol):
    """``/v1/logs``; traces and metrics are not taken."""

    name: ClassVar[str] = "otlp"

    def __init__(self) -> None:
        other = {"POST": _not_taken}
        logs = Route("/v1/logs", {"POST": _take})
        self.routes = [logs, Route("/v1/traces", reply=other), Route("/v1/metrics", reply=other)]

    def refuse(self, request: Request, refused: Refused) -> Response:
        """Return a google.rpc.Status in the request's encoding."""
        status = STATUSES[refused.reason]
        code, text = CODES[status], printable(refused.detail)
        headers = refusal_headers(refused, max_seconds=MAX_RETRY_AFTER)
        if request.media_type in PROTOBUF_TYPES:
            message = text.encode()
            return Response(status, b"\x08%c\x12%b%b" % (code, _varint(len(message)), message), PROTOBUF + headers)
        return Response(status, orjson.dumps({"code": code, "message": text}), JSON + headers)


def _varint(number: int) -> bytes:
    septets = []
    while number > 0x7F:  # noqa: PLR2004  (seven bits each)
        septets.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*septets, number])


def _not_taken(_request: Request, _obstacle: str) -> Response:
    raise Refused(Reason.NOT_FOUND, "only logs are taken, at /v1/logs: no traces, no metrics")


def _take(request: Request, limits: Limits) -> Work:
    kind = request.media_type
    if kind != "application/json" and kind not in PROTOBUF_TYPES:
        detail = f"Content-Type {kind or 'is missing and'} is not taken; use application/x-protobuf or application/json"
        raise Refused(Reason.UNSUPPORTED, detail)
    body = yield from decode(request, limits.max_body)
    packets = Packets(limits, {"protocol": "otlp"}, len(body))
    received = Common(request.received_ns, "").received
    if kind == "application/json":
        yield from _json(body, packets, received)
        return (yield from packets.finish(Response(200, b"{}", JSON)))
    yield from _protobuf(body, packets, received)
    return (yield from packets.finish(Response(200, b"", PROTOBUF)))


def _emitter(attributes: dict[str, Any]) -> str:
    return next((text_of(value) for name in EMITTERS if (value := attributes.get(name))), "otlp")


def _parts(received: str, resource: bytes, scope: dict[str, Any], scope_attributes: bytes, limit: int) -> RecordParts:
    """Return what all records of a scope have in common: its resource and itself in their metadata."""
    metadata = b'"resource":%b' % resource if resource != b"{}" else b""
    if scope or scope_attributes != b"{}":
        members = [encode(scope)[1:-1]] if scope else []
        members += [b'"attributes":%b' % scope_attributes] if scope_attributes != b"{}" else []
        metadata += (b"," if metadata else b"") + b'"scope":{%b}' % b",".join(members)
    name = scope.get("name")
    return RecordParts(received.encode(), LEVELS_BYTES, limit, encode(name) if name else b"", metadata)


# ------------------------------------------------------------------------------------------------------------ protobuf


def _protobuf(body: bytes, packets: Packets, received: str) -> Generator[int | None, None, None]:
    """Convert an ExportLogsServiceRequest."""
    at = 0
    try:
        while (field := find_field(body, at, len(body), 1)) is not None:  # ResourceLogs
            if packets.slices.over():
                yield packets.kept
            begin, end, at = field
            if begin == end:
                continue
            resource = find_field(body, begin, end, 1)
            attributes = (
                otlp_attributes(body, *resource[:2], 1, packets.limits.max_packet) if resource is not None else b"{}"
            )
            emitter = _emitter(decode_value(attributes))
            while (field := find_field(body, begin, end, 2)) is not None:  # ScopeLogs
                yield from _scope(body, field, packets, (emitter, received, attributes))
                begin = field[2]
                if packets.slices.over():
                    yield packets.kept
    except OverflowError:
        raise packets.record_too_large() from None
    except ValueError as error:
        raise Refused(Reason.MALFORMED, f"the body is not an ExportLogsServiceRequest: {error}") from None


def _scope(
    body: bytes, field: tuple[int, int, int], packets: Packets, outer: tuple[str, str, bytes]
) -> Generator[int | None, None, None]:
    """Convert a ScopeLogs; ``outer``: the emitter, the time of receipt, the resource's attributes."""
    begin, end, _ = field
    emitter, received, resource = outer
    scope: dict[str, Any] = {}
    attributes = b"{}"
    found = find_field(body, begin, end, 1)
    if found is not None:
        for number, name in ((1, "name"), (2, "version")):
            text = find_field(body, found[0], found[1], number)
            if text is not None and text[0] < text[1]:
                scope[name] = body[text[0] : text[1]].decode(errors="replace")
        attributes = otlp_attributes(body, found[0], found[1], 3, packets.limits.max_packet)
    parts = _parts(received, resource, scope, attributes, packets.limits.max_packet)
    while begin < end:
        chunk, count, begin = otlp_records(body, begin, end, parts, FLUSH)
        packets.add_chunk(emitter, chunk, count)
        if packets.slices.over():
            yield packets.kept


# ---------------------------------------------------------------------------------------------------------------- JSON


NAMES = (b"resourceLogs", b"resource", b"scopeLogs", b"scope", b"logRecords")


class _Resource(Struct):
    attributes: list[dict[str, Any]] | None = None


class _Scope(Struct):
    name: str | None = None
    version: str | None = None
    attributes: list[dict[str, Any]] | None = None


T = TypeVar("T", _Resource, _Scope)


def _json(body: bytes, packets: Packets, received: str) -> Generator[int | None, None, None]:
    """Convert an ExportLogsServiceRequest."""
    records = yield from json_records(body, NAMES, packets, "an ExportLogsServiceRequest", nulls=True)
    decoded, about, resource_text = packets.decoded, None, None
    try:
        while (taken := records.take(STEP)) is not None:
            if taken[0] is not about:
                about = taken[0]
                if about[0] is not resource_text:  # which may be large, and stand before very many scopes
                    resource_text = about[0]
                    resource = _attributes(_read(resource_text, _RESOURCE, "resource").attributes)
                    emitter, resource_size = _emitter(resource), len(encode(resource))
                    kept = decoded + decoded_size(resource_text)
                scope = _read(about[1], _SCOPE, "scope")
                common, size = _common(resource, scope), resource_size + len(about[1])
                packets.decoded = kept + decoded_size(about[1])
            for text in taken[1]:
                message = _message(decode_value(text), received, scope.name, common)
                packets.add(emitter, message, size + decoded_size(text))
            if packets.slices.over():
                yield packets.kept
    except (ValueError, TypeError, AttributeError) as error:
        detail = f"the body is not an ExportLogsServiceRequest: {error}"
        raise Refused(Reason.MALFORMED, detail, record=packets.number) from None


_RESOURCE, _SCOPE = Decoder(_Resource), Decoder(_Scope)


def _read(text: bytes, decoder: Decoder[T], name: str) -> T:
    """Return what records have in common, of a text that is an object, or empty. Raises ValueError."""
    try:
        value = decode_value(text, decoder.decode) if text else {}
        return value if type(value) is decoder.type else convert(value, decoder.type)
    except ValidationError as error:
        raise ValueError(str(error).replace("`$", f"`{name}")) from None


def _common(resource: dict[str, Any], scope: _Scope) -> dict[str, Any]:
    about = {"name": scope.name, "version": scope.version, "attributes": _attributes(scope.attributes)}
    about = {name: value for name, value in about.items() if value}
    return ({"resource": resource} if resource else {}) | ({"scope": about} if about else {})


def _attributes(pairs: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {str(pair.get("key", "")): _value(pair.get("value")) for pair in pairs or ()}


def _value(value: dict[str, Any] | None) -> Any:
    """Return what an AnyValue says."""
    for kind, inner in (value or {}).items():
        if inner is None:
            continue
        if kind == "intValue":
            return int(inner)
        if kind == "arrayValue":
            return [_value(item) for item in inner.get("values") or ()]
        if kind == "kvlistValue":
            return _attributes(inner.get("values"))
        if kind in ("stringValue", "boolValue", "doubleValue", "bytesValue"):
            return inner
    return None


def _nanoseconds(value: Any) -> int:
    """Return a time, which may be a string; 0 for none, or for one that protobuf could not hold."""
    number = int(value) if value else 0
    return number if 0 < number < 1 << 64 else 0


def _message(record: Any, received: str, source: str | None, common: dict[str, Any]) -> dict[str, Any]:
    if type(record) is not dict:
        raise TypeError("an item of logRecords is no object")
    time, observed = (_nanoseconds(record.get(name)) for name in ("timeUnixNano", "observedTimeUnixNano"))
    number, text = record.get("severityNumber") or 0, record.get("severityText") or ""
    event = record.get("eventName") or ""
    given = record.get("body") or {}
    body = _value(given)
    known = LEVEL_NUMBERS[(number - 1) // 4] if type(number) is int and 1 <= number <= 24 else level_of(text)  # noqa: PLR2004
    message: dict[str, Any] = {
        "timestamp": date_time(*divmod(time or observed, NS)) if time or observed else received,
        "level": known or "info",
        "message": text_of(event if body is None else body),
    }
    if source:
        message["source"] = source
    metadata = {
        "timeUnixNano": record.get("timeUnixNano") if not time and record.get("timeUnixNano") != "0" else None,
        "attributes": _attributes(record.get("attributes")),
        "observedTimeUnixNano": str(observed) if time and observed else None,
        "severityNumber": number,
        "severityText": text,
        "eventName": event,
        "traceId": record.get("traceId"),
        "spanId": record.get("spanId"),
        "flags": record.get("flags"),
        "droppedAttributesCount": record.get("droppedAttributesCount"),
    }
    kept = {name: value for name, value in metadata.items() if value}
    if body is not None and "stringValue" not in given:
        kept["body"] = body
    return message | {"metadata": kept | common}
