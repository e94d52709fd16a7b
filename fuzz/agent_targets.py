"""Targets for what log agents send: a request is converted to strictly valid packets, or refused in its own shape.

Where the same is said in a slower way, as protobuf's classes, Python's decoder of JSON and the mapping in Python do,
the two are compared.
"""

from __future__ import annotations

import gzip
import json
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cramjam
import msgspec
from agents import RECEIVED_NS, convert, request, route
from agents_harness import REQUESTS
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from test_json_records import EXAMPLES, LOKI, OTLP, compared
from test_protocol_loki import entry, field, labels_text
from test_protocol_otlp import by_emitter, emitted, model

from fastdist.protocols import encodings, records
from fastdist.protocols.base import Limits, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastdist._core import Input  # type: ignore[attr-defined]
    from fastdist.protocols.base import Batch

PROTOBUF = "application/x-protobuf"
LIMITS = Limits(max_body=4096, max_packet=4096, max_batch=32768)
EXPECTED = (400, 413)


def converted(target: str, body: bytes, kind: str) -> Batch | None:
    """Return the batch, whose packets are valid; None if it is refused, as it should be if so."""
    try:
        return convert(target, body, LIMITS, content_type=kind)
    except Refused as refused:
        asked = request(target, body, content_type=kind)
        reply = route(asked).protocol.refuse(asked, refused)
        if reply.status not in EXPECTED:
            raise AssertionError((reply, body)) from refused
        return None


def otlp(given: Input) -> None:
    """Check that records are what the classes of protobuf say; JSON is walked as the model does, in any pieces."""
    body = given.data
    if body[:1] == b"{":
        compared(body, OTLP, 1 + len(body) % 50, 1 + len(body) % 3)
        converted("/v1/logs", body, "application/json")
        return
    batch = converted("/v1/logs", body, PROTOBUF)
    if batch is None:
        return
    asked = ExportLogsServiceRequest()
    try:
        asked.ParseFromString(body)
    except DecodeError:  # which text that is no UTF-8 is for them
        return
    if plainly(asked, body) and by_emitter(emitted(batch)) != by_emitter(model(asked)):
        raise AssertionError(("protobuf reads it otherwise", emitted(batch), list(model(asked)), body))


def plainly(asked: ExportLogsServiceRequest, body: bytes) -> bool:
    """Whether it is as programs write it: protobuf merges what comes twice, and here the last is taken."""
    again = asked.SerializeToString()
    repeated = any(
        len({pair.key for pair in pairs}) < len(pairs)
        for resource_logs in asked.resource_logs
        for pairs in (
            resource_logs.resource.attributes,
            *(scope_logs.scope.attributes for scope_logs in resource_logs.scope_logs),
            *(log.attributes for scope_logs in resource_logs.scope_logs for log in scope_logs.log_records),
        )
    )
    return again == body and not repeated


def loki(given: Input) -> None:
    """Check that what is pushed is converted, or refused: protobuf, which is packed for that, and JSON as above."""
    body = given.data
    target = "/loki/api/v1/push"
    if body[:1] == b"{":
        compared(body, LOKI, 1 + len(body) % 50, 1 + len(body) % 3)
        converted(target, body, "application/json")
        return
    converted(target, bytes(cramjam.snappy.compress_raw(body)), PROTOBUF)
    converted(target, body, PROTOBUF)


class ByPython:
    """Leaves every record to Python."""

    def __init__(self, *_: object) -> None:
        pass

    def take(self, values: records.JsonValues, limit: int) -> list[bytes]:
        """Return the next values as their bytes."""
        return values.take(limit)

    def one(self, *_: object) -> None:
        """Map none."""


@contextmanager
def without_compiled_mapping() -> Iterator[None]:
    """Have all records mapped in Python."""
    compiled = records.RecordMapper
    records.RecordMapper = ByPython  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        records.RecordMapper = compiled  # type: ignore[misc]


def agreed(target: str, body: bytes, kind: str) -> None:
    """Check that both mappings make the same of it: of members of one name, JSON's last counts."""
    batch = converted(target, body, kind)
    with without_compiled_mapping():
        model = converted(target, body, kind)
    if batch is None or model is None:
        if (batch is None) != (model is None):
            if len(body) * 8 > LIMITS.max_packet:  # one writes numbers shorter than the other leaves them
                return
            raise AssertionError(("only one of the mappings takes it", body))
        return
    found, expected = (
        [(each["emitterId"], each["messages"]) for packet in made.packets for each in [json.loads(packet.body)]]
        for made in (batch, model)
    )
    if merged(found) != merged(expected) or batch.reply != model.reply:
        raise AssertionError(("the mappings differ", found, expected, body))


def merged(found: Iterable[tuple[str, list[object]]]) -> dict[str, list[object]]:
    """Return the messages by emitter."""
    by_name: dict[str, list[object]] = {}
    for emitter, some in found:
        by_name.setdefault(emitter, []).extend(some)
    return by_name


def ingest(given: Input) -> None:
    """Check that records are the same by both mappings, and that text is taken."""
    agreed("/ingest/app", given.data, "application/json")
    converted("/ingest", given.data, "text/plain")


def bulk(given: Input) -> None:
    """Check that a bulk is the same by both mappings, and that a response is JSON with an item for each action."""
    agreed("/i/_bulk", given.data, "")
    batch = converted("/i/_bulk", given.data, "")
    if batch is not None:
        items = msgspec.json.decode(batch.reply.body)["items"]
        if len(items) != batch.records + batch.refused:
            raise AssertionError((batch, given.data))


def hec(given: Input) -> None:
    """Check that events are converted, or refused."""
    converted("/services/collector", given.data, "")
    converted("/services/collector/raw?host=h", given.data, "")


MAX_BODY = 100_000


def decoding(given: Input) -> None:
    """Check that nothing but bytes within the limit, or a refusal, comes of any body in any coding."""
    body = given.data
    for coding in ("gzip", "deflate", "zstd", "snappy", "gzip, zstd", "snappy, deflate"):
        found = decoded(body, coding)
        if found is not None and len(found) > MAX_BODY:
            raise AssertionError((coding, len(found), body))
    one = inflated(body)
    if one is not None and decoded(body, "gzip") != one:
        raise AssertionError(("zlib says otherwise of this gzip", body))


def decoded(body: bytes, coding: str) -> bytes | None:
    """Return the body decoded; None if it is refused."""
    work = encodings.decode(request("/ingest", body, content_encoding=coding), MAX_BODY)
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    except Refused as refused:
        if refused.reason not in ("malformed", "too_large"):
            raise AssertionError((coding, body)) from refused
        return None


def inflated(body: bytes) -> bytes | None:
    """Return what one whole member of gzip says."""
    inflate = zlib.decompressobj(31)
    try:
        data = inflate.decompress(body, MAX_BODY)
    except zlib.error:
        return None
    return data if inflate.eof and not inflate.unused_data else None


TARGETS: dict[str, Callable[[Input], None]] = {
    "otlp": otlp,
    "loki": loki,
    "ingest": ingest,
    "bulk": bulk,
    "hec": hec,
    "decoding": decoding,
}


def seeds(target: str) -> Iterable[bytes]:
    """Yield inputs to start from."""
    names = {"ingest": "json", "bulk": "elasticsearch", "hec": "splunk"}
    if target != "decoding":
        yield REQUESTS[names.get(target, target)].body
    if target in ("otlp", "loki"):
        yield from EXAMPLES
    if target == "otlp":
        asked = ExportLogsServiceRequest()
        one = asked.resource_logs.add()
        one.resource.attributes.add(key="service.name").value.string_value = "s"
        scope = one.scope_logs.add()
        scope.scope.name, scope.scope.version = "n", "v"
        log = scope.log_records.add(
            time_unix_nano=RECEIVED_NS, severity_number=9, severity_text="x", trace_id=b"t" * 16
        )
        log.body.kvlist_value.values.add(key="k").value.array_value.values.add().double_value = 1.5
        log.attributes.add(key="i").value.int_value = -1
        log.attributes.add(key="b").value.bytes_value = b"\x00"
        yield asked.SerializeToString()
    elif target == "loki":
        text = labels_text({"host": "h", "level": "warn"}).encode()
        yield field(1, field(1, text) + field(2, entry(RECEIVED_NS, "line", [("level", "error"), ("a", "b")])))
    elif target == "ingest":
        yield b'[{"message":"m","time":1700000000.5,"level":30,"host":{"name":"h"},"log":{"level":"x","file":{"path":"p"}}}]'  # noqa: E501
        yield b'{"log":"\\ud800","timestamp":"2024-01-02T03:04:05Z","service.name":"s"}{"MESSAGE":"m","PRIORITY":"3"} 5 "x"'  # noqa: E501
    elif target == "bulk":
        yield b'{"index":{"_index":"x","_id":"1"}}\n{"message":"m","@timestamp":"2024-01-02T03:04:05Z"}\n{"delete":{}}\n'  # noqa: E501
        yield b'{"update":{}}\n{"doc":{"message":"m"}}\n{"create":{"_index":5},"attempts":0}\r\n{"host":{"name":"h"}}\r\n'  # noqa: E501
    elif target == "hec":
        yield b'{"time":"1700000000.123","host":"h","source":"s","event":{"message":"m","level":"warn"},"fields":{"a":1}}'  # noqa: E501
    elif target == "decoding":
        yield gzip.compress(b"x" * 1000) + gzip.compress(b"y")
        yield zlib.compress(b"x" * 1000)
        yield encodings.zstd.compress(b"x" * 1000) + encodings.zstd.compress(b"y")
        yield bytes(cramjam.snappy.compress_raw(b"x" * 1000))
        yield bytes(cramjam.snappy.compress(b"x" * 1000))
