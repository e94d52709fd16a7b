"""/ingest: the bytes of the agents that post JSON or lines, and the errors they get."""

from __future__ import annotations

import gzip
import json
import zlib

import cramjam
import pytest
from agents import (
    CLIENT,
    RECEIVED,
    answer,
    convert,
    document,
    header,
    message,
    messages,
    packets,
    refusal,
    request,
    route,
)

from fastdist.protocols import encodings
from fastdist.protocols.base import BUSY, STATUSES, Reason, Refused

# What agents send, as their sources write it: content type, encoding, body, and the texts in it.
FLUENT_BIT = b'{"date":1700000000.123456,"log":"one"},{"date":1700000001.0,"log":"two"}'
VECTOR = b'{"host":"web","message":"one","source_type":"file","timestamp":"2023-11-14T22:13:20.123456789Z"}\n' * 2
FLUENTD = b'{"message":"one","tag":"app"}\n{"message":"two"}\n'
LOGSTASH = b'{"@version":"1","@timestamp":"2023-11-14T22:13:20.123Z","message":"one","host":{"name":"web"}}'
SYSLOG_NG = b"<13>1 2023-11-14T22:13:20+00:00 web app 7 - - one\n"
SYSLOG_NG_JSON = (
    b'{"PROGRAM":"app","PRIORITY":"err","PID":"7","MESSAGE":"one","ISODATE":"2023-11-14T22:13:20+00:00","HOST":"web"}'
)
RSYSLOG = (
    b'{"message":"one","fromhost":"web","facility":"daemon","priority":"info",'
    b'"timereported":"2023-11-14T22:13:20+00:00"}'
)
SNAPPY = bytes(cramjam.snappy.compress_raw(b"[" + FLUENT_BIT + b"]"))
AGENTS = {
    "fluent-bit json": ("application/json", "", b"[" + FLUENT_BIT + b"]", ["one", "two"]),
    "fluent-bit json_lines": ("application/x-ndjson", "", FLUENT_BIT.replace(b"},{", b"}\n{") + b"\n", ["one", "two"]),
    "fluent-bit json_stream": ("application/json", "", FLUENT_BIT.replace(b"},{", b"}{"), ["one", "two"]),
    "fluent-bit gzip": ("application/json", "gzip", gzip.compress(b"[" + FLUENT_BIT + b"]"), ["one", "two"]),
    "fluent-bit snappy": (
        "application/json",
        "snappy",
        bytes(cramjam.snappy.compress_raw(b"[" + FLUENT_BIT + b"]")),
        ["one", "two"],
    ),
    "vector ndjson": ("application/x-ndjson", "", VECTOR, ["one", "one"]),
    "vector json": ("application/json", "", b"[" + VECTOR.strip().replace(b"\n", b",") + b"]", ["one", "one"]),
    "vector zlib": ("application/json", "deflate", zlib.compress(VECTOR), ["one", "one"]),
    "vector zstd": ("application/json", "zstd", encodings.zstd.compress(VECTOR), ["one", "one"]),
    "fluentd ndjson": ("application/x-ndjson", "", FLUENTD, ["one", "two"]),
    "fluentd array": ("application/json", "", b"[" + FLUENTD.strip().replace(b"\n", b",") + b"]", ["one", "two"]),
    "logstash json": ("application/json", "", LOGSTASH, ["one"]),
    "logstash json_batch": ("application/json", "", b"[" + LOGSTASH + b"," + LOGSTASH + b"]", ["one", "one"]),
    "syslog-ng": ("application/x-www-form-urlencoded", "", SYSLOG_NG, [SYSLOG_NG.decode().strip()]),
    "syslog-ng json": ("application/json", "", SYSLOG_NG_JSON, ["one"]),
    "rsyslog omhttp": ("application/json", "", RSYSLOG, ["one"]),
    "rsyslog newline": ("text/plain", "", b"one\ntwo\n", ["one", "two"]),
}


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_what_agents_send_is_taken(agent, method):
    kind, coding, body, texts = AGENTS[agent]
    batch = convert("/ingest", body, method=method, content_type=kind, content_encoding=coding)
    assert [one["message"] for one in messages(batch)] == texts
    assert batch.reply.status == 200
    assert len(batch.reply.body) < 100


def test_syslog_ng_is_mapped_by_its_names():
    assert message("/ingest", SYSLOG_NG_JSON) == {
        "emitterId": "web",
        "timestamp": "2023-11-14T22:13:20+00:00",
        "level": "error",
        "message": "one",
        "source": "app",
        "metadata": {"PRIORITY": "err", "PID": "7"},
    }


def test_fluent_bits_dates_keep_microseconds():
    first, second = messages(convert("/ingest", b"[" + FLUENT_BIT + b"]"))
    assert (first["timestamp"], second["timestamp"]) == ("2023-11-14T22:13:20.123456Z", "2023-11-14T22:13:21Z")


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (b"", []),
        (b" \r\n ", []),
        (b"[]", []),
        (b"[][]", []),
        (b'\xef\xbb\xbf{"message":"m"}', ["m"]),
        (b'{"message":"a"}[{"message":"b"},{"message":"c"}]\n"d"', ["a", "b", "c", "d"]),
        (b'{\n  "message":\n  "a"\n}\n\n{"message": "b"}', ["a", "b"]),
        (b'[1,true,null,"x",[1,[2]],{"message":"m"}]', ["1", "true", "null", "x", "[1,[2]]", "m"]),
        (b'"\\ud800" {"message":"\\udc00 m"}', ["\ufffd", "\ufffd m"]),
    ],
)
def test_json_in_any_framing_is_taken(body, texts):
    assert [one["message"] for one in messages(convert("/ingest", body))] == texts


def test_lines_are_never_trimmed():
    batch = convert("/ingest", b" a \r\n\n\t\n\r\nb\rc\n\xe9", content_type="text/plain; charset=utf-8")
    assert [one["message"] for one in messages(batch)] == [" a ", "\t", "b\rc", "\ufffd"]
    assert messages(batch)[-1]["metadata"] == {"bytesBase64": "6Q=="}


def test_source_and_emitter_of_the_request():
    one = message("/ingest/my%20app", b'{"message":"m","host":"h"}', x_emitter_id="edge-1")
    assert one == {
        "emitterId": "edge-1",
        "timestamp": RECEIVED,
        "level": "info",
        "message": "m",
        "source": "my app",
        "metadata": {"host": "h"},
    }
    assert message("/ingest", b'"line"')["emitterId"] == CLIENT
    (each,) = packets(convert("/ingest", b'"line"', x_emitter_id="e" * 300))
    assert (each["emitterId"], each["metadata"]["emitterId"]) == ("e" * 256, "e" * 300)


@pytest.mark.parametrize(
    ("sent", "emitter"), [("münchen".encode(), "münchen"), ("münchen".encode("latin-1"), "münchen")]
)
def test_emitter_of_the_header_is_utf8(sent, emitter):
    """Or Latin-1, as which headers are read."""
    assert message("/ingest", b'"line"', x_emitter_id=sent.decode("latin-1"))["emitterId"] == emitter


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/ingest", "/ingest/app"])
def test_probes_are_answered(method, path):
    assert answer(path, method=method).status == 200


@pytest.mark.parametrize(
    ("body", "record"),
    [
        (b"{", 0),
        (b'{"a":1}\n{"b":2}\n{c}', 2),
        (b'[{"a":1},{"b":2}', 2),
        (b'[{"a":1} {"b":2}]', 1),
        (b'{"a":"\xff"}', 0),
        (b'{"a":NaN}', 0),
        (b"[" * 100_000, 0),
        (b'{"a":' * 100_000, 0),
        (b"{}" * 1000 + b"x", 1000),
        (b"hello", 0),
    ],
)
def test_malformed_json_points_at_the_record(body, record):
    error, reply = refusal("/ingest", body)
    problem = document(reply)
    assert (error.reason, reply.status, problem["status"]) == (Reason.MALFORMED, 400, 400)
    assert problem["errors"][0]["pointer"] == f"/{record}"
    assert header(reply, "Content-Type") == "application/problem+json"
    assert problem["title"] == "Bad Request"


@pytest.mark.parametrize(
    ("target", "body", "byte"), [("/ingest", b"{", 1), ("/ingest", b"[1", 2), ("/services/collector", b'{"event":', 9)]
)
def test_fault_of_short_body_is_placed_in_it(target, body, byte):
    error, _ = refusal(target, body)
    assert f"column {byte + 1} (byte {byte})" in str(error)


@pytest.mark.parametrize("kind", ["application/msgpack", "application/x-protobuf", "image/png", "multipart/form-data"])
def test_other_types_are_415(kind):
    error, reply = refusal("/ingest", b"{}", content_type=kind)
    assert (error.reason, reply.status) == (Reason.UNSUPPORTED, 415)


def test_the_last_content_type_counts():
    kind = "application/json, application/json; charset=utf-8"  # Fluent Bit adds a configured one to its own
    assert convert("/ingest", b'[{"message":"m"}]', content_type=kind).records == 1
    assert refusal("/ingest", b"{}", content_type="application/json, image/png")[1].status == 415


def test_very_many_members_are_kept():
    record = {f"key{n}": n for n in range(30_000)}
    (one,) = messages(convert("/ingest", json.dumps(record | {"message": "m"}).encode()))
    assert one["metadata"] == record


@pytest.mark.parametrize("reason", Reason)
def test_errors_are_problem_documents(reason):
    asked = request("/ingest")
    reply = route(asked).protocol.refuse(asked, Refused(reason, "what is wrong \ud800", retry_after=0.2))
    assert reply.status == STATUSES[reason]
    assert document(reply)["detail"]
    assert header(reply, "Retry-After") == ("1" if reason in BUSY else None)
    assert (header(reply, "WWW-Authenticate") is not None) == (reply.status == 401)
