"""Requests of log agents, 512 records each, and what decoding them costs with the library one would take for it.

To convert them takes at least that: the race and ``micro/test_protocols.py`` compare to it.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NamedTuple

import cramjam
import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

RECORDS = 512
CHANCE = random.Random(1)
NANOSECOND = 1_760_000_000_000_000_000


def record(number: int) -> dict[str, object]:
    """Return a record as an application's logger writes it."""
    return {
        "@timestamp": f"2026-01-31T12:34:56.{number:06}Z",
        "message": f"GET /orders/{CHANCE.randrange(10**6)} HTTP/1.1 200 {CHANCE.randrange(9999)} in 12.5 ms",
        "level": CHANCE.choice(["info", "warn", "error"]),
        "logger": "app.orders",
        "host": "web-1",
        "pid": CHANCE.randrange(65536),
        "trace_id": f"{CHANCE.getrandbits(128):032x}",
        "kubernetes": {"pod": "web-1-abcde", "namespace": "prod"},
    }


LINES = [orjson.dumps(record(number)) for number in range(RECORDS)]


class Request(NamedTuple):
    """A request of an agent. ``decode``: its body with a library, into Python's objects or the library's."""

    path: str
    content_type: str
    body: bytes
    decode: Callable[[bytes], object]

    def decoded_in(self, seconds: float = 0.5) -> float:
        """Return the seconds of processor that decoding takes, the mean over as long a time."""
        self.decode(self.body)
        count, began = 0, time.process_time()
        while time.process_time() - began < seconds:
            self.decode(self.body)
            count += 1
        return (time.process_time() - began) / count


def export(records: int) -> bytes:
    """Return OTLP's request with so many records."""
    request = ExportLogsServiceRequest()
    resource_logs = request.resource_logs.add()
    for key, value in (("service.name", "checkout"), ("host.name", "web-1")):
        resource_logs.resource.attributes.add(key=key).value.string_value = value
    scope_logs = resource_logs.scope_logs.add()
    scope_logs.scope.name = "app.orders"
    for number in range(records):
        fields = orjson.loads(LINES[number % RECORDS])
        log = scope_logs.log_records.add(time_unix_nano=NANOSECOND + number, severity_number=9)
        log.body.string_value = fields["message"]
        log.trace_id = bytes.fromhex(fields["trace_id"])
        for key in ("level", "logger", "host"):
            log.attributes.add(key=key).value.string_value = fields[key]
    body: bytes = request.SerializeToString()
    return body


def _push_request() -> type[Message]:
    """Return Loki's message, as far as it is needed here: streams of labels and entries, these of a time and a line."""
    fields = {
        "Time": [("seconds", "int64"), ("nanos", "int32")],
        "Entry": [("timestamp", "Time"), ("line", "string")],
        "Stream": [("labels", "string"), ("entries", "[Entry]")],
        "PushRequest": [("streams", "[Stream]")],
    }
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="push.proto", package="loki", syntax="proto3")
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for number, (member, kind) in enumerate(members, 1):
            label = kinds.LABEL_REPEATED if kind.startswith("[") else kinds.LABEL_OPTIONAL
            field = message.field.add(name=member, number=number, label=label)
            if kind.strip("[]") in fields:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".loki.{kind.strip('[]')}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found: type[Message] = message_factory.GetMessageClass(pool.FindMessageTypeByName("loki.PushRequest"))
    return found


PushRequest = _push_request()


def push(records: int) -> bytes:
    """Return Loki's request with so many records."""
    entries = []
    for number in range(records):
        fields = orjson.loads(LINES[number % RECORDS])
        line = f"level={fields['level']} msg={fields['message']!r} trace={fields['trace_id']}"
        entries.append({"timestamp": {"seconds": NANOSECOND // 10**9, "nanos": number}, "line": line})
    request = PushRequest(streams=[{"labels": '{app="orders",host="web-1"}', "entries": entries}])
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


def _lines(body: bytes) -> object:
    return [orjson.loads(line) for line in body.split(b"\n") if line]


NDJSON = "application/x-ndjson"
REQUESTS = {
    "otlp": Request("/v1/logs", "application/x-protobuf", export(RECORDS), ExportLogsServiceRequest.FromString),
    "ndjson": Request("/ingest", NDJSON, b"\n".join(LINES), _lines),
    "loki": Request(
        "/loki/api/v1/push",
        "application/x-protobuf",
        push(RECORDS),
        lambda body: PushRequest.FromString(bytes(cramjam.snappy.decompress_raw(body))),
    ),
    "bulk": Request("/_bulk", NDJSON, b"".join(b'{"create":{"_index":"logs"}}\n%b\n' % line for line in LINES), _lines),
    "hec": Request(
        "/services/collector",
        "application/json",
        b"\n".join(b'{"event":%b,"host":"web-1"}' % line for line in LINES),
        _lines,
    ),
}
