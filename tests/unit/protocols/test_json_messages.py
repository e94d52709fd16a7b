"""JSON of OTLP and of Loki as messages: what comes of a body is what the mapping makes of each record, in any order."""

from __future__ import annotations

import json

import pytest
from agents import LIMITS, RECEIVED, convert, message, packets, refusal, request, route
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_json_records import NAMES, Members, any_json, bodies

from fastdist._core import json_fault
from fastdist.protocols import loki, otlp
from fastdist.protocols.base import Reason
from fastdist.protocols.packets import encode
from fastdist.protocols.records import MAX_DEPTH

LOGS, PUSH = "/v1/logs", "/loki/api/v1/push"
KIND = "application/json"


def otlp_messages(body):
    """Yield the emitter and the message of each record: a walk through what json makes of all of the body."""
    for resource_logs in body.get("resourceLogs") or ():
        resource = otlp._attributes((resource_logs.get("resource") or {}).get("attributes"))
        for scope_logs in resource_logs.get("scopeLogs") or ():
            scope = scope_logs.get("scope") or {}
            about = otlp._Scope(*(scope.get(name) for name in ("name", "version", "attributes")))
            for record in scope_logs.get("logRecords") or ():
                one = otlp._message(record, RECEIVED, about.name, otlp._common(resource, about))
                yield otlp._emitter(resource)[:256], one


def loki_messages(body):
    for streamed in body.get("streams", ()):
        labels = streamed.get("stream", {})
        stream = loki.Stream({name: loki.text_of(value) for name, value in labels.items()})
        for entry in streamed.get("values", ()):
            yield stream.emitter[:256], loki._entry(entry, stream, RECEIVED, 0)


def by_emitter(pairs):
    found = {}
    for emitter, one in pairs:
        found.setdefault(emitter, []).append(one)
    return found


def agrees(path, body, expected):
    """Check that a body becomes these messages, a few at a time too."""
    batch = convert(path, body, content_type=KIND)
    found = [(each["emitterId"], one) for each in packets(batch) for one in each["messages"]]
    assert by_emitter(found) == by_emitter(json.loads(encode(list(expected(json.loads(body))))))


texts = st.text(max_size=5) | st.sampled_from(["service.name", "host.name", "info", "host", "level"])
scalars = texts | st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(-1e300, 1e300)
kinds = [
    ("stringValue", texts), ("intValue", st.integers(-(2**63), 2**63) | st.integers().map(str)),
    ("doubleValue", st.floats(-1e300, 1e300)), ("boolValue", st.booleans()), ("x", scalars),
]  # fmt: skip
any_values = st.one_of([st.tuples(st.just(kind), inner).map(lambda pair: Members([pair])) for kind, inner in kinds])
pairs = st.tuples(texts, any_values).map(lambda pair: Members(zip(("key", "value"), pair, strict=True)))
attributes = st.lists(pairs, max_size=3)
named = {
    "timeUnixNano": st.integers(0, 2**64).map(str) | st.integers(0, 2**65), "observedTimeUnixNano": st.just("1"),
    "severityNumber": st.integers(0, 30), "severityText": texts, "body": any_values, "attributes": attributes,
    "traceId": texts, "flags": scalars, "eventName": texts, "unknown": any_json,
}  # fmt: skip


def some(strategies):
    """Return objects of these members, in any order, any number of times."""
    members = [st.tuples(st.just(name), strategy) for name, strategy in strategies.items()]
    return st.lists(st.one_of(members), max_size=6).map(Members)


names_of_scope = {"attributes": attributes | st.none(), "name": texts | st.none(), "version": texts | st.none()}
origins = {
    "resource": some({"attributes": attributes | st.none(), "x": scalars}),
    "scope": some(names_of_scope),
    "stream": some(dict.fromkeys(("host", "app", "level", "job", "a"), scalars)),
}
times = st.sampled_from(["1700000000123456789", "0", "x", ""]) | scalars
metadata = some(dict.fromkeys(("level", "app", "b"), scalars))
entries = st.tuples(times, scalars).map(list) | st.tuples(times, texts, metadata).map(list)


@given(bodies(NAMES[0], origins, some(named)))
def test_messages_of_otlp_are_the_models(body):
    assume(b"ud800" not in body)
    agrees(LOGS, body, otlp_messages)


@given(bodies(NAMES[1], origins, entries))
def test_messages_of_loki_are_the_models(body):
    assume(b"ud800" not in body)
    agrees(PUSH, body, loki_messages)


RESOURCE = {"attributes": [{"key": "service.name", "value": {"stringValue": "s"}}]}


def test_common_parts_may_follow_records():
    record = {"body": {"stringValue": "m"}}
    scoped = {"logRecords": [record] * 300, "scope": {"name": "n"}}
    body = {"resourceLogs": [{"scopeLogs": [scoped, {"logRecords": [record]}], "resource": RESOURCE}]}
    agrees(LOGS, json.dumps(body).encode(), otlp_messages)
    body = {"streams": [{"values": [["1", "x"]] * 300, "stream": {"host": "h"}}, {"values": [["1", "y"]]}]}
    agrees(PUSH, json.dumps(body).encode(), loki_messages)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (LOGS, {"resourceLogs": {}}, "resourceLogs is no array at line 1, column 18 (byte 17)"),
        (LOGS, {"resourceLogs": [{"scopeLogs": [5]}]}, "an item of scopeLogs is no object at line 1, column 34"),
        (LOGS, {"resourceLogs": [{"resource": []}]}, "resource is no object"),
        (LOGS, {"resourceLogs": [{"resource": {"attributes": 5}}]}, "got `int` - at `resource.attributes`"),
        (LOGS, {"resourceLogs": [{"resource": {"attributes": [5]}}]}, "got `int` - at `resource.attributes[0]`"),
        (LOGS, {"resourceLogs": [{"scopeLogs": [{"scope": {"name": 5}}]}]}, "got `int` - at `scope.name`"),
        (LOGS, {"resourceLogs": [{"scopeLogs": [{"logRecords": [0]}]}]}, "an item of logRecords is no object"),
        (LOGS, [], "it is no object"),
        (PUSH, {"streams": None}, "streams is no array"),
        (PUSH, {"streams": [None]}, "an item of streams is no object"),
        (PUSH, {"streams": [{"stream": None}]}, "stream is no object"),
        (PUSH, {"streams": [{"values": {}}]}, "values is no array"),
        (PUSH, {"streams": [{"values": [0]}]}, "an entry of values is not [time, line]"),
    ],
)
def test_wrong_types_are_named(path, body, words):
    error, reply = refusal(path, json.dumps(body).encode(), content_type=KIND)
    assert (error.reason, reply.status) == (Reason.MALFORMED, 400)
    assert words in error.detail


@pytest.mark.parametrize("path", [LOGS, PUSH])
def test_faults_behind_records_refuse_all(path):
    lists = b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[' if path == LOGS else b'{"streams":[{"values":['
    ends = b"]}]}]}" if path == LOGS else b"]}]}"
    record = b"{}" if path == LOGS else b'["1","x"]'
    body = lists + b",\n".join([record] * 2000) + ends
    assert convert(path, body, content_type=KIND).records == 2000
    for broken in (body[:-1], body + b"]", body.replace(ends, b"," + ends), body[: -len(ends)] + b',"\xff"' + ends):
        error, _ = refusal(path, broken, content_type=KIND)
        what, *place = json_fault(broken, MAX_DEPTH)
        assert error.detail == "{} at line {}, column {} (byte {})".format(what, *place)


def test_halves_of_surrogates_are_mended():
    body = b'{"streams":[{"stream":{"a":"\\ud800"},"values":[["1","\\udfff"]]}],"\\ud800":["\\udc00"]}'
    one = message(PUSH, body, content_type=KIND)
    assert (one["message"], one["metadata"]) == ("\ufffd", {"a": "\ufffd"})
    origin = b'{"attributes":[{"key":"a","value":{"stringValue":"\\ud800"}}],"x":1e400}'
    body = b'{"resourceLogs":[{"resource":%b,"scopeLogs":[{"scope":%b,"logRecords":[{}]}]}]}' % (origin, origin)
    expected = {"a": "\ufffd"}
    assert message(LOGS, body, content_type=KIND)["metadata"] == {
        "resource": expected,
        "scope": {"attributes": expected},
    }


def test_numbers_too_large_for_any_type_stay():
    body = b'{"streams":[{"stream":{"a":1e400},"values":[["1","x",{"b":-1e999}]]}]}'
    (each,) = convert(PUSH, body, content_type=KIND).packets
    assert b'"b":-1e999' in each.body
    assert b'"a":"1e400"' in each.body
    value = b'{"doubleValue":1e400}'
    origin = b'{"attributes":[{"key":"a","value":%b}]}' % value
    body = b'{"resourceLogs":[{"resource":%b,"scopeLogs":[{"logRecords":[{"body":%b}]}]}]}' % (origin, value)
    (each,) = convert(LOGS, body, content_type=KIND).packets
    assert b'"message":"1e400"' in each.body
    assert b'"resource":{"a":1e400}' in each.body


def test_very_many_values_are_taken():
    record = {"attributes": [{"key": f"k{n}", "value": {"intValue": n}} for n in range(50)]}
    body = {"resourceLogs": [{"scopeLogs": [{"logRecords": [record] * 6000}]}]}
    text = json.dumps(body, separators=(",", ":")).encode()
    assert text.count(b",") > 500_000
    limits = replace(LIMITS, max_body=16 << 20, max_batch=64 << 20)
    assert convert(LOGS, text, limits, content_type=KIND).records == 6000


@pytest.mark.parametrize(
    ("path", "before", "part", "behind"),
    [
        (LOGS, b'{"resourceLogs":[', b'{"resource":{"":0}},', b"{}]}"),
        (LOGS, b'{"resourceLogs":[{"scopeLogs":[', b'{"scope":{"":0}},', b"{}]}]}"),
        (PUSH, b'{"streams":[', b'{"stream":{"":0}},', b"{}]}"),
        (
            LOGS,
            b'{"resourceLogs":[{"resource":{"attributes":[',
            b'{"key":"a"},',
            b'{}]},"scopeLogs":[{"logRecords":[{}]}]}]}',
        ),
        (PUSH, b'{"streams":[{"stream":{', b'"a":0,', b'"b":1},"values":[["1","x"]]}]}'),
        (LOGS, b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"flags":[', b"[],", b"[]]}]}]}]}"),
    ],
    ids=["resources", "scopes", "streams", "resource", "labels", "record"],
)
def test_what_is_kept_of_json_is_told(path, before, part, behind, monkeypatch):
    monkeypatch.setattr("fastdist.protocols.base.SLICE_NS", 0)
    count = 20_000
    asked = request(path, before + part * count + behind, content_type=KIND)
    work = route(asked).take(asked, LIMITS)
    told = [size for size in work if size is not None]
    assert max(told) > len(asked.body) + 16 * count
