"""Requests of agents: decoding alone with a library, beside converting them into packets."""

from __future__ import annotations

import gzip
import json
import random

import cramjam
import orjson
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from fastdist.protocols.base import Limits, Request, finish
from fastdist.protocols.table import NAMES, find

LIMITS = Limits(max_body=10 << 20, max_packet=10 << 20, max_batch=64 << 20)
RECORDS = 512
CHANCE = random.Random(1)


def record(n):
    return {
        "@timestamp": f"2026-01-31T12:34:56.{n:06}Z",
        "message": f"GET /orders/{CHANCE.randrange(10**6)} HTTP/1.1 200 {CHANCE.randrange(9999)} in 12.5 ms",
        "level": CHANCE.choice(["info", "warn", "error"]),
        "logger": "app.orders",
        "host": "web-1",
        "pid": CHANCE.randrange(65536),
        "trace_id": f"{CHANCE.getrandbits(128):032x}",
        "kubernetes": {"pod": "web-1-abcde", "namespace": "prod"},
    }


LINES = [orjson.dumps(record(n)) for n in range(RECORDS)]


def export():
    asked = ExportLogsServiceRequest()
    resource_logs = asked.resource_logs.add()
    for key, value in (("service.name", "checkout"), ("host.name", "web-1")):
        resource_logs.resource.attributes.add(key=key).value.string_value = value
    scope_logs = resource_logs.scope_logs.add()
    scope_logs.scope.name = "app.orders"
    for line in LINES:
        fields = json.loads(line)
        log = scope_logs.log_records.add(time_unix_nano=1_760_000_000_000_000_000, severity_number=9)
        log.body.string_value = fields["message"]
        log.trace_id = bytes.fromhex(fields["trace_id"])
        for key in ("level", "logger", "host"):
            log.attributes.add(key=key).value.string_value = fields[key]
    return asked.SerializeToString()


def field(number, data):
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def push():
    second = b"\x08\x80\xd0\xe8\xc3\x06"
    entries = b"".join(field(2, field(1, second) + field(2, line)) for line in LINES)
    return bytes(cramjam.snappy.compress_raw(field(1, field(1, b'{app="orders",host="web-1"}') + entries)))


BODIES = {
    "otlp": ("/v1/logs", "application/x-protobuf", export()),
    "ndjson": ("/ingest", "application/x-ndjson", b"\n".join(LINES)),
    "loki": ("/loki/api/v1/push", "application/x-protobuf", push()),
    "bulk": (
        "/_bulk",
        "application/x-ndjson",
        b"".join(b'{"create":{"_index":"logs"}}\n%b\n' % line for line in LINES),
    ),
    "hec": ("/services/collector", "application/json", b"".join(b'{"event":%b,"host":"h"}' % line for line in LINES)),
}


def decoded(name, body):
    if name == "otlp":
        return ExportLogsServiceRequest.FromString(body)
    if name == "loki":
        return cramjam.snappy.decompress_raw(body)
    return [orjson.loads(line) for line in body.replace(b"}{", b"}\n{").split(b"\n") if line]


def converted(target, kind, body, coding=""):
    asked = Request("POST", target, {"content-type": kind, "content-encoding": coding}, body, "192.0.2.1", 1)
    found = find("POST", target, asked.headers, NAMES)
    return finish(found.take(asked, LIMITS)).packets


@pytest.mark.parametrize("name", BODIES)
def test_decode_alone(benchmark, name):
    benchmark.group = f"{name}, {RECORDS} records"
    assert benchmark(decoded, name, BODIES[name][2])


@pytest.mark.parametrize("name", BODIES)
def test_convert(benchmark, name):
    benchmark.group = f"{name}, {RECORDS} records"
    assert benchmark(converted, *BODIES[name])


@pytest.mark.parametrize("name", BODIES)
def test_convert_gzip(benchmark, name):
    benchmark.group = f"{name}, {RECORDS} records"
    target, kind, body = BODIES[name]
    assert benchmark(converted, target, kind, gzip.compress(body), "snappy, gzip" if name == "loki" else "gzip")
