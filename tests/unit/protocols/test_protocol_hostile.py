"""Requests made to cost much: each is refused in its protocol's shape, or converted, with memory of its own order."""

from __future__ import annotations

import json
import tracemalloc

import cramjam
import pytest
from agents import LIMITS, convert, messages, refusal
from msgspec.structs import replace

from fastdist.protocols.base import Limits, Reason

PROTOBUF = "application/x-protobuf"
PUSH = "/loki/api/v1/push"
LARGE = Limits(max_body=4 << 20, max_packet=4 << 20, max_batch=8 << 20)


def field(number, data):
    """Return a protobuf field with bytes."""
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def snappy(body):
    return bytes(cramjam.snappy.compress_raw(body))


def export(resource, records):
    attribute = field(1, field(1, b"a") + field(2, field(1, resource)))
    return field(1, field(1, attribute) + field(2, field(2, b"") * records))


def export_json(resource, records):
    attribute = {"key": "a", "value": {"stringValue": resource}}
    logs = {"resource": {"attributes": [attribute]}, "scopeLogs": [{"logRecords": [{}] * records}]}
    return json.dumps({"resourceLogs": [logs]}).encode()


def push_json(label, entries):
    return json.dumps({"streams": [{"stream": {"a": label}, "values": [["1", ""]] * entries}]}).encode()


@pytest.mark.parametrize(
    ("target", "kind", "body"),
    [
        ("/v1/logs", PROTOBUF, export(b"x" * 500_000, 100_000)),
        ("/v1/logs", "application/json", export_json("x" * 500_000, 50_000)),
        (PUSH, PROTOBUF, snappy(field(1, field(1, b'{a="%b"}' % (b"x" * 60_000)) + field(2, b"") * 100_000))),
        (PUSH, "application/json", push_json("x" * 500_000, 50_000)),
        ("/" + "i" * 1000 + "/_bulk", "", b'{"index":{}}\n{}\n' * 50_000),
        ("/ingest/" + "s" * 1000, "", b"{}" * 50_000),
    ],
    ids=["otlp", "otlp-json", "loki", "loki-json", "bulk", "ingest"],
)
def test_what_is_shared_is_not_multiplied(target, kind, body):
    """What stands once in a request and in every message of it ends at ``max_batch``."""
    tracemalloc.start()
    error, reply = refusal(target, body, LARGE, content_type=kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (error.reason, reply.status) == (Reason.TOO_LARGE, 413)
    assert peak < 64 << 20


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/v1/logs", b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[' + b"0," * 1_000_000 + b"0]}]}]}"),
        ("/v1/logs", b'{"resourceLogs":[' + b"{}," * 1_000_000 + b"{}]}"),
        (PUSH, b'{"streams":[{"values":[' + b"0," * 1_000_000 + b"0]}]}"),
        ("/ingest", b'{"a":[' + b"0," * 1_000_000 + b"0]}"),
        ("/_bulk", b'{"index":{}}\n{"a":[' + b"0," * 1_000_000 + b'0], "b\\u0061":1}\n'),
        ("/services/collector", b'{"event":[' + b"0," * 1_000_000 + b"0]}"),
    ],
)
def test_very_many_values_are_413(target, body):
    error, reply = refusal(target, body, LARGE, content_type="application/json")
    assert (error.reason, reply.status) == (Reason.TOO_LARGE, 413)


@pytest.mark.parametrize("body", [b"\x0a\x00" * 300_000, field(1, b"\x12\x00") * 50_000])
def test_very_many_empty_parts_make_nothing(body):
    assert convert("/v1/logs", body, content_type=PROTOBUF).records == 0


def test_very_many_streams_make_records():
    stream = field(1, field(1, b'{a="b"}') + field(2, field(2, b"x")))
    assert convert(PUSH, snappy(stream * 5000), content_type=PROTOBUF).records == 5000
    assert convert(PUSH, snappy(field(1, b"") * 300_000), content_type=PROTOBUF).records == 0


def test_labels_longer_than_any_are_400():
    body = snappy(field(1, field(1, b'{a="%b"}' % (b"x" * 100_000)) + field(2, b"")))
    assert refusal(PUSH, body, content_type=PROTOBUF)[1].status == 400


def test_lying_lengths_are_400():
    for length in (b"\x7f", b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff" * 12):
        for tag in (b"\x0a", b"\x12", b"\xa2\x06"):
            assert refusal("/v1/logs", tag + length + b"x", content_type=PROTOBUF)[1].status == 400
            assert refusal(PUSH, snappy(tag + length + b"x"), content_type=PROTOBUF)[1].status == 400


def test_many_emitters_have_a_packet_each():
    limits = replace(LIMITS, max_packet=8192)
    body = b"".join(b'{"message":"m","host":"h%d"}' % n for n in range(5000))
    batch = convert("/ingest", body, limits)
    assert len(batch.packets) == 5000
    assert len(messages(batch)) == 5000
