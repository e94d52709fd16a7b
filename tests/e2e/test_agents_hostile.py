"""Hostile requests in the protocols of log agents: each is answered in its own shape, and costs the others nothing."""

from __future__ import annotations

import functools
import gzip
import json
import re
import socket
import threading
import zlib
from pathlib import Path

import cramjam
import pytest
from support import BODY, Emitter, request, wait_until

MAX_BODY = 10 << 20
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
# Where records are taken, as which type, and the type of errors.
PATHS = {
    "json": ("/ingest", JSON, "application/problem+json"),
    "text": ("/ingest/x", "text/plain", "application/problem+json"),
    "otlp": ("/v1/logs", PROTOBUF, PROTOBUF),
    "otlp-json": ("/v1/logs", JSON, JSON),
    "loki": ("/loki/api/v1/push", PROTOBUF, "text/plain; charset=utf-8"),
    "loki-json": ("/loki/api/v1/push", JSON, "text/plain; charset=utf-8"),
    "splunk": ("/services/collector/event", JSON, JSON),
    "splunk-raw": ("/services/collector/raw", "text/plain", JSON),
    "bulk": ("/_bulk", "application/x-ndjson", JSON),
    "document": ("/i/_doc", JSON, JSON),
    "packet": ("/logs", JSON, "application/problem+json"),
}
SUCCESS = (200, 201, 202, 204)
METHODS = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "X")

pytestmark = pytest.mark.processes


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def deep(levels):
    """Return an AnyValue within others."""
    value = field(1, b"x")
    for _ in range(levels):
        value = field(5, field(1, value))
    return value


def record(data):
    return field(1, field(2, field(2, data)))


def snappy(body):
    return bytes(cramjam.snappy.compress_raw(body))


ATTRIBUTES = b"".join(field(6, field(1, b"k%d" % n) + field(2, field(1, b"v"))) for n in range(100_000))
MEMBERS = ",".join(f'"k{n}":{n}' for n in range(100_000)).encode()
LYING = [
    b"\x0a\x7f",
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x0a" + b"\xff" * 9 + b"\x01",
    b"\x0a" + b"\xff" * 12,
    b"\x0b",
    b"\x0f",
]
BODIES = [
    b"",
    b"\x00",
    b"{",
    b"null",
    b"[" * 1_000_000,
    b'{"a":' * 500_000,
    b'{"event":' + b"[" * 200 + b"]" * 200 + b"}",
    b'{"message":' + b"9" * 100_000 + b"}",
    b'{"event":1e99999,"message":-1e99999,"time":1e99999}',
    b'{"message":"\xff\xfe","event":"\xff"}',
    b'{"message":"\\ud800","event":"\\udfff"}',
    b'{"message":"m","event":"e",' + MEMBERS + b"}",
    b'{"index":{}}\n{"message":"m",' + MEMBERS + b"}\n",
    b'{"index":{' + MEMBERS + b"}}\n{}\n",
    b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"intValue":1e300},"timeUnixNano":"'
    + b"9" * 5000
    + b'"}]}]}]}',
    b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"intValue":1e300}}]}]}]}',
    b'{"streams":[{"stream":{"a":{}},"values":[[1e300,{"a":[1]},{"x":1e999}],["' + b"9" * 5000 + b'",""]]}]}',
    record(field(5, deep(50))),
    record(field(5, deep(5000))),
    record(ATTRIBUTES),
    snappy(record(ATTRIBUTES)),
    snappy(field(1, field(1, b"{" + b'a="b",' * 10_000 + b"}") + field(2, b"")) * 100),
    snappy(field(1, field(1, b'{a="' + b"\\" * 60_000) + field(2, b""))),
    b"\xff\xff\xff\xff\x0f" + b"x",
    b"\xff\xff\xff\xff\xff",
    b"\x80\x80\x80\x04\x00",
    *LYING,
    *(snappy(lie) for lie in LYING),
    b"\xff\n" * 10_000,
    b"\xff" * 100_000,
    b"\n" * 1_000_000,
]


def peak_memory(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def assert_unharmed(fastdist):
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0] * len(fastdist.stats()["workers"])
    assert not [line for line in fastdist.lines if "Traceback" in line or json.loads(line)["level"] == "error"]
    assert fastdist.post()[0] == 202


def send(port, name, body, method="POST", **headers):
    path, kind, _ = PATHS[name]
    named = {each.replace("_", "-"): value for each, value in headers.items()}
    return request(port, method, path, body, {"Content-Type": kind} | named)


def check_shape(name, status, headers, body):
    """An error is one of the protocol."""
    assert headers["content-type"] == PATHS[name][2], (name, status, body)
    if PATHS[name][2] == PROTOBUF:
        assert (body[:1], body[2:3]) == (b"\x08", b"\x12")
    elif name.startswith("loki"):
        assert body.endswith(b"\n")
    elif name in ("bulk", "document"):
        assert json.loads(body)["status"] == status
        assert headers["x-elastic-product"] == "Elasticsearch"
    elif name.startswith(("splunk", "otlp")):
        assert "code" in json.loads(body)
    else:
        assert json.loads(body)["status"] == status


@pytest.fixture
def beside(mocks):
    """Send packets on connections of their own until the test is over: none is refused, and all arrive."""
    emitters = []

    def begin(port):
        emitters.append(Emitter(port, connections=2, pause=0.005).start())

    yield begin
    for emitter in emitters:
        emitter.stop()
        assert emitter.count(202) == len(emitter.answers) > 0
        wait_until(lambda e=emitter: e.accepted <= mocks.delivered().keys(), "all are delivered")


@pytest.mark.parametrize("name", PATHS)
def test_any_body_is_taken_or_refused(shared, name):
    fastdist = shared({"server": {"workers": 1}})
    for number, body in enumerate(BODIES):
        status, headers, answer = send(fastdist.port, name, body)
        assert status in (*SUCCESS, 400, 413), (number, status, answer)
        if status not in SUCCESS:
            check_shape(name, status, headers, answer)
    assert_unharmed(fastdist)


@pytest.mark.parametrize("name", PATHS)
def test_any_method_has_a_response(shared, name):
    fastdist = shared({"server": {"workers": 1}})
    for method in METHODS:
        status, headers, _ = send(fastdist.port, name, b"{}", method)
        assert status in (*SUCCESS, 400, 405, 501), (method, status)
        assert status != 405 or "POST" in headers["allow"]
    assert_unharmed(fastdist)


def members(body):
    """Return so many empty members of gzip that their heads alone take long."""
    return gzip.compress(b"") * 100_000 + body


def zstd_frame(descriptor, rest):
    return b"\x28\xb5\x2f\xfd" + descriptor + rest


@functools.cache
def all_bombs():
    return list(bombs())


def bombs():
    """Yield encoded bodies, their codings, and what becomes of them: none of them is one of records."""
    zeros = bytes(200_000_000)
    once = {"gzip": gzip.compress(zeros, 1), "deflate": zlib.compress(zeros, 1)}
    once["zstd"] = bytes(cramjam.zstd.compress(zeros))
    for coding, bomb in once.items():
        yield coding, bomb, 413
        yield f"{coding}, gzip", gzip.compress(bomb), 413
        yield coding, bomb[: len(bomb) // 2], 413
    raw = zlib.compressobj(1, wbits=-15)
    yield "deflate", raw.compress(zeros) + raw.flush(), 413
    yield "snappy", snappy(zeros[:50_000_000]), 413
    yield "snappy", b"\xff\xff\xff\xff\x0f", 413
    yield "snappy", b"\xff\x06\x00\x00sNaPpY" + b"\xfe\x00\x00\x00" * 2_000_000, 400
    yield "snappy", bytes(cramjam.snappy.compress(zeros[:50_000_000])), 413
    yield "gzip", members(b""), 400
    yield "gzip", gzip.compress(b"x") + b"noise", 400
    yield "gzip, gzip, gzip, gzip", b"", 415
    yield "zstd", zstd_frame(b"\x00", b"\xf8" + b"\x01\x00\x00"), 400  # a window of 2 TiB
    yield "zstd", zstd_frame(b"\xc0", b"\x58" + b"\xff" * 7 + b"\x00\x01\x00\x00"), 413  # a size of 64 PiB
    yield "zstd", b"\x50\x2a\x4d\x18\xff\xff\xff\xff", 400  # what may be skipped, of 4 GiB
    yield "zstd", b"\x50\x2a\x4d\x18\x00\x00\x00\x00" * 100_000, 400
    size = (1 << 32) - 1
    yield "gzip", gzip.compress(b"{}")[:-4] + size.to_bytes(4, "little"), 400


@pytest.mark.parametrize("name", ["json", "otlp", "loki", "bulk", "packet"])
def test_bombs_cost_little_memory(mocks, serve, beside, name):
    fastdist = serve(mocks, {"server": {"workers": 1}})
    worker = fastdist.stats()["workers"][0]
    before = peak_memory(worker["pid"])
    beside(fastdist.port)
    for coding, bomb, expected in all_bombs():
        if name == "loki" and coding == "snappy":  # which means nothing more there
            continue
        status, headers, answer = send(fastdist.port, name, bomb, Content_Encoding=coding)
        assert status == expected, (coding, len(bomb), status, answer)
        if status not in SUCCESS:
            check_shape(name, status, headers, answer)
    assert peak_memory(worker["pid"]) < before + 8 * MAX_BODY
    assert_unharmed(fastdist)


# A record, the bytes of them in a request, and how many requests: the first two alone would become 1.3 GiB. The others
# take ten times as long for as many bytes, so there is less of them.
GROWING = {
    "bulk": (b'{"delete":{}}\n', MAX_BODY, 6),
    "text": (b"a\n", MAX_BODY, 6),
    "json": (b"{}", MAX_BODY // 8, 1),
    "splunk": (b'{"event":0}', MAX_BODY // 8, 1),
    "otlp": (b"\x0a\x04\x12\x02\x12\x00", MAX_BODY // 8, 1),
}


def test_small_requests_become_no_gigabytes(mocks, serve, beside):
    """A few kilobytes that unpack to records of a byte or two, and responses to actions of nothing, many at a time."""
    fastdist = serve(mocks, {"server": {"workers": 1}, "queue": {"capacity": "1GiB"}})
    worker = fastdist.stats()["workers"][0]
    before = peak_memory(worker["pid"])
    beside(fastdist.port)
    statuses = []

    def attack(name):
        growing, size, _ = GROWING[name]
        body = gzip.compress(growing * (size // len(growing)))
        path, kind, _ = PATHS[name]
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Encoding: gzip\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", fastdist.port), timeout=300) as connection:
            connection.sendall(head.encode() + body)
            statuses.append(int(connection.recv(65536)[9:12]))

    threads = [threading.Thread(target=attack, args=(name,)) for name in GROWING for _ in range(GROWING[name][2])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == len(threads)
    assert set(statuses) <= {200, 413, 429, 503}
    assert peak_memory(worker["pid"]) < before + (700 << 20)  # 256 MiB of bodies, the queue, what is being joined
    assert_unharmed(fastdist)


@pytest.mark.parametrize("name", PATHS)
def test_slow_bodies_are_cut_off(shared, name):
    fastdist = shared({"server": {"workers": 1, "body_timeout": "1s"}})
    path, kind, expected = PATHS[name]
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        file = connection.makefile("rb")
        assert file.readline().startswith(b"HTTP/1.1 408 ")
        assert f"content-type: {expected}".encode() in file.read().lower()
    assert_unharmed(fastdist)


FORMS = [
    "",
    "Bearer",
    "Bearer ",
    "Bearer x",
    "Basic",
    "Basic !",
    "Basic eDp4",
    "Basic " + "/" * 1000,
    "Splunk x",
    "ApiKey x",
]
FORMS += [
    "ApiKey eDp4",
    "ApiKey \xff",
    "Bearer \xe9",
    "Negotiate x",
    "bearer\tsecret-token",
    "Bearersecret-token",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", PATHS)
def test_tokens_of_no_form_are_refused(shared, name):
    fastdist = shared({"server": {"workers": 1}, "security": {"tokens": ["secret-token"]}})
    before = fastdist.stats()["rejected"]["unauthorized"]
    for form in FORMS:
        status, headers, answer = send(fastdist.port, name, BODY, Authorization=form)
        assert status in ((401, 403) if name.startswith("splunk") else (401,)), form
        assert status == 403 or "www-authenticate" in headers
        check_shape(name, status, headers, answer)
        assert b"secret" not in answer
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0]
    wait_until(lambda: fastdist.stats()["rejected"]["unauthorized"] == before + len(FORMS), "all are counted")
