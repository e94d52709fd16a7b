"""Requests made to cost much: each is refused in its protocol's shape, or converted, with memory of its own order."""

from __future__ import annotations

import json
import struct
import tracemalloc

import cramjam
import pytest
from agents import LIMITS, convert, messages, refusal, request, route
from msgspec.structs import replace

from fastdist.protocols.base import SLICE_NS, Limits, Reason, Slices

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
        ("/" + "i" * 250 + "/_bulk", "", b'{"index":{}}\n{}\n' * 50_000),
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
        ("/v1/logs", b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":[' + b"0," * 1_000_000 + b"0]}]}]}]}"),
        ("/v1/logs", b'{"resourceLogs":[{"resource":{"attributes":[' + b"0," * 1_000_000 + b"0]}}]}"),
        ("/v1/logs", b'{"resourceLogs":[{"scopeLogs":[{"scope":{"attributes":[' + b"0," * 1_000_000 + b"0]}}]}]}"),
        (PUSH, b'{"streams":[{"values":[[' + b"0," * 1_000_000 + b"0]]}]}"),
        (PUSH, b'{"streams":[{"stream":{"a":[' + b"0," * 1_000_000 + b'0]},"values":[["1","x"]]}]}'),
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


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/v1/logs", b'{"resourceLogs":[' + b"{}," * 1_000_000 + b"{}]}"),
        ("/v1/logs", b'{"x":[' + b"0," * 1_000_000 + b"0]}"),
        (PUSH, b'{"streams":[' + b'{"values":[]},' * 250_000 + b"{}]}"),
    ],
)
def test_json_without_records_makes_nothing(target, body):
    tracemalloc.start()
    assert convert(target, body, LARGE, content_type="application/json").records == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("target", "before", "behind"),
    [
        ("/v1/logs", b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[', b"]}]}]}"),
        (PUSH, b'{"streams":[{"values":[', b"]}]}"),
    ],
)
def test_records_that_are_none_are_400(target, before, behind):
    body = before + b"0," * 1_000_000 + b"0" + behind
    assert refusal(target, body, LARGE, content_type="application/json")[1].status == 400


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


# ---- work and memory, of the order of the body's


def any_map(value):
    """Return an AnyValue: a map with one member."""
    return field(6, field(1, field(1, b"k") + field(2, value)))


def record(data):
    return field(1, field(2, field(2, data)))


def doubles(count):
    return field(5, field(5, field(1, b"\x21" + struct.pack("<d", 1 / 3)) * count))


@pytest.mark.parametrize(
    ("target", "kind", "body"),
    [
        ("/v1/logs", PROTOBUF, record(field(5, any_map(field(1, b"\x01" * 4_000_000))))),
        ("/v1/logs", PROTOBUF, record(field(6, field(1, b"\x01" * 4_000_000)))),
        ("/v1/logs", PROTOBUF, field(1, field(1, field(1, field(1, b"\x01" * 4_000_000))) + field(2, field(2, b"")))),
        ("/v1/logs", PROTOBUF, record(doubles(300_000))),
        ("/v1/logs", PROTOBUF, record(field(5, field(5, field(1, b"") * 2_000_000)))),
        (PUSH, PROTOBUF, snappy(field(1, field(1, b"{}") + field(2, field(2, b"\x01" * 4_000_000))))),
        ("/i/_bulk", "", b'{"delete":{}}\n' * 290_000),
        ("/" + "i" * 250 + "/_bulk", "", b'{"index":{}}\n\n' * 290_000),
        ("/ingest", "text/plain", b"\xff\n" * 2_000_000),
        ("/ingest", "application/json", b"".join(b'{"host":"%d"}' % n for n in range(250_000))),
    ],
    ids=["map", "key", "resource", "doubles", "nulls", "line", "delete", "no-source", "lines", "emitters"],
)
def test_what_grows_most_ends_at_a_multiple(target, kind, body):
    """Escapes within escapes, long responses to short actions, a packet for each emitter."""
    tracemalloc.start()
    error, reply = refusal(target, body, LARGE, content_type=kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (error.reason, reply.status) == (Reason.TOO_LARGE, 413)
    assert peak < 48 << 20


@pytest.mark.parametrize(
    ("target", "headers"),
    [("/services/collector", {"x_splunk_request_channel": "c" * 15_000}), (PUSH, {"x_scope_orgid": "t" * 15_000})],
)
def test_headers_in_every_packet_count(target, headers):
    if target == PUSH:
        streams = [{"stream": {"host": f"h{n}"}, "values": [["1", ""]]} for n in range(2000)]
        body = json.dumps({"streams": streams}).encode()
    else:
        body = b"".join(b'{"event":1,"host":"h%d"}' % n for n in range(2000))
    assert refusal(target, body, LARGE, content_type="application/json", **headers)[1].status == 413


def test_conversions_tell_what_they_keep(monkeypatch):
    monkeypatch.setattr("fastdist.protocols.base.SLICE_NS", 0)  # however fast this machine is
    for target, kind, body in (
        ("/ingest", "text/plain", b"a\n" * 40_000),
        ("/ingest", "application/json", b"{}" * 40_000),
        ("/v1/logs", PROTOBUF, field(1, field(2, field(2, b"") * 40_000))),
        (PUSH, PROTOBUF, snappy(field(1, field(1, b"{}") + field(2, b"") * 40_000))),
        ("/v1/logs", "application/json", export_json("", 40_000)),
        (PUSH, "application/json", push_json("", 40_000)),
        ("/services/collector", "", b'{"event":1}' * 40_000),
        ("/_bulk", "", b'{"index":{}}\n{}\n' * 20_000),
    ):
        asked = request(target, body, content_type=kind)
        work = route(asked).take(asked, replace(LARGE, max_batch=64 << 20))
        told = [size for size in work if size is not None]
        assert told == sorted(told), target
        assert told[-1] > 1_500_000, target


@pytest.mark.parametrize(
    ("target", "body", "headers"),
    [
        (PUSH, b'{"streams":[' + b"{}," * 50_000 + b"{}]}", {"content_type": "application/json"}),
        ("/v1/logs", b'{"resourceLogs":[' + b"{}," * 50_000 + b"{}]}", {"content_type": "application/json"}),
        ("/_bulk", b'{"delete":{"_id":1}}\n' * 20_000, {}),
    ],
    ids=["streams", "resources", "deletes"],
)
def test_parts_without_records_take_slices(target, body, headers, monkeypatch):
    monkeypatch.setattr("fastdist.protocols.base.SLICE_NS", 0)
    asked = request(target, body, **headers)
    work = route(asked).take(asked, replace(LARGE, max_body=8 << 20, max_batch=64 << 20))
    assert sum(1 for _ in work) > 2


@pytest.mark.parametrize("path", ["/{}/_bulk", "/{}/_doc"])
def test_index_names_have_a_limit(path):
    body = b'{"index":{}}\n{"message":"m"}\n' if path.endswith("_bulk") else b'{"message":"m"}'
    assert convert(path.format("i" * 255), body).records == 1
    assert refusal(path.format("i" * 256), body)[1].status == 400
    body = b'{"index":{"_index":"%b"}}\n{"message":"m"}\n' % (b"i" * 256)
    assert refusal("/_bulk", body)[1].status == 400


def test_chunks_without_data_are_few():
    body = b"\xff\x06\x00\x00sNaPpY" + b"\xfe\x00\x00\x00" * 4000
    assert convert("/ingest", body, content_encoding="snappy").records == 0
    assert refusal("/ingest", body + body, content_encoding="snappy")[1].status == 400


def test_a_slice_begins_when_its_work_does(monkeypatch):
    now = 0
    monkeypatch.setattr("fastdist.protocols.base.time.monotonic_ns", lambda: now)
    slices = Slices()
    now = SLICE_NS
    assert slices.over()
    now = 100 * SLICE_NS  # others had their turn
    assert not slices.over()
    now += SLICE_NS - 1
    assert not slices.over()
    now += 1
    assert slices.over()
