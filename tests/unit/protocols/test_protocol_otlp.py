"""OTLP: the compiled reader against protobuf's own classes as its model, JSON against both, errors as Status."""

from __future__ import annotations

import base64
import gzip
import json
import math

import msgspec
import pytest
from agents import (
    LIMITS,
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
from google.protobuf import json_format
from google.rpc import status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from fastdist._core import date_time
from fastdist.protocols.base import STATUSES, Reason, Refused
from fastdist.protocols.records import level_of

PROTOBUF = "application/x-protobuf"
LEVELS = ("trace", "debug", "info", "warn", "error", "fatal")

# ------------------------------------------------------------------------------------------ requests, and a model


def array(values):
    any_value = AnyValue()
    any_value.array_value.values.extend(values)
    any_value.array_value.SetInParent()
    return any_value


def table(members):
    any_value = AnyValue()
    any_value.kvlist_value.values.extend(pairs(members))
    any_value.kvlist_value.SetInParent()
    return any_value


def pairs(members):
    return [KeyValue(key=key, value=value) for key, value in members.items()]


any_values = st.recursive(
    st.builds(AnyValue)
    | st.builds(AnyValue, string_value=st.text(max_size=20))
    | st.builds(AnyValue, bool_value=st.booleans())
    | st.builds(AnyValue, int_value=st.integers(-(2**63), 2**63 - 1))
    | st.builds(AnyValue, double_value=st.floats())
    | st.builds(AnyValue, bytes_value=st.binary(max_size=9)),
    lambda inner: (
        st.lists(inner, max_size=3).map(array) | st.dictionaries(st.text(max_size=6), inner, max_size=3).map(table)
    ),
    max_leaves=4,
)
keys = st.text(max_size=8) | st.sampled_from(["service.name", "host.name"])
attributes = st.dictionaries(
    st.text(max_size=8) | st.sampled_from(["service.name", "host.name"]), any_values, max_size=4
)
times = st.just(0) | st.integers(1, 2**64 - 1) | st.integers(1_700_000_000 * 10**9, 1_800_000_000 * 10**9)
log_records = st.builds(
    LogRecord,
    time_unix_nano=times,
    observed_time_unix_nano=times,
    severity_number=st.integers(0, 30),
    severity_text=st.sampled_from(["", "INFO", "Warning", "notice", "odd", "é" * 20]),
    body=st.none() | any_values,
    attributes=attributes.map(pairs),
    dropped_attributes_count=st.integers(0, 2**32 - 1),
    flags=st.integers(0, 2**32 - 1),
    trace_id=st.just(b"") | st.binary(min_size=16, max_size=16),
    span_id=st.just(b"") | st.binary(min_size=8, max_size=8),
    event_name=st.text(max_size=8),
)
scopes = st.tuples(st.text(max_size=8), st.text(max_size=4), attributes, st.lists(log_records, max_size=2))
resources = st.lists(st.tuples(attributes, st.lists(scopes, max_size=2)), max_size=3)


def export(resources):
    asked = ExportLogsServiceRequest()
    for members, scoped in resources:
        resource_logs = asked.resource_logs.add()
        resource_logs.resource.attributes.extend(pairs(members))
        for name, version, about, logged in scoped:
            scope_logs = resource_logs.scope_logs.add()
            scope_logs.scope.name, scope_logs.scope.version = name, version
            scope_logs.scope.attributes.extend(pairs(about))
            scope_logs.log_records.extend(logged)
    return asked


def plain(value):
    """Return what an AnyValue says, as JSON has it."""
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    inner = getattr(value, kind)
    if kind == "array_value":
        return [plain(item) for item in inner.values]
    if kind == "kvlist_value":
        return plain_all(inner.values)
    if kind == "bytes_value":
        return base64.b64encode(inner).decode()
    if kind == "double_value" and not math.isfinite(inner):
        return "NaN" if math.isnan(inner) else "Infinity" if inner > 0 else "-Infinity"
    return inner


def plain_all(keys_and_values):
    return {each.key: plain(each.value) for each in keys_and_values}


def text_of(value):
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def model(asked):
    """Yield the emitter and the message of each record, by protobuf's own classes."""
    for resource_logs in asked.resource_logs:
        resource = plain_all(resource_logs.resource.attributes)
        emitter = next((text_of(v) for n in ("service.name", "host.name") if (v := resource.get(n))), "otlp")[:256]
        for scope_logs in resource_logs.scope_logs:
            about = {"name": scope_logs.scope.name, "version": scope_logs.scope.version}
            about["attributes"] = plain_all(scope_logs.scope.attributes)
            about = {key: value for key, value in about.items() if value}
            for log in scope_logs.log_records:
                yield emitter, model_message(log, resource, about)


def model_message(log, resource, about):
    time = log.time_unix_nano or log.observed_time_unix_nano
    number = log.severity_number
    body = plain(log.body)
    metadata = {
        "attributes": plain_all(log.attributes),
        "body": None if isinstance(body, str) and log.body.HasField("string_value") else body,
        "observedTimeUnixNano": str(log.observed_time_unix_nano)
        if log.time_unix_nano and log.observed_time_unix_nano
        else "",
        "severityNumber": number,
        "severityText": log.severity_text,
        "eventName": log.event_name,
        "traceId": log.trace_id.hex(),
        "spanId": log.span_id.hex(),
        "flags": log.flags,
        "droppedAttributesCount": log.dropped_attributes_count,
        "resource": resource,
        "scope": about,
    }
    kept = {key: value for key, value in metadata.items() if value or (key == "body" and value is not None)}
    expected = {
        "timestamp": date_time(*divmod(time, 10**9)) if time else RECEIVED,
        "level": LEVELS[(number - 1) // 4] if 1 <= number <= 24 else level_of(log.severity_text) or "info",
        "message": log.event_name if body is None else text_of(body),
        "metadata": kept,
    }
    return expected | ({"source": about["name"]} if "name" in about else {})


def by_emitter(emitted):
    found = {}
    for emitter, one in emitted:
        found.setdefault(emitter, []).append(comparable(one))
    return found


def comparable(one):
    """Return a message with its text parsed where that is JSON: numbers are written in more ways than one."""
    try:
        return one | {"message": json.loads(one["message"]), "metadata": one.get("metadata", {})}
    except ValueError:
        return one | {"metadata": one.get("metadata", {})}


def emitted(batch):
    return [(each["emitterId"], one) for each in packets(batch) for one in each["messages"]]


@given(resources.map(export))
@settings(max_examples=settings().max_examples // 4)
def test_records_are_what_the_classes_say(asked):
    batch = convert("/v1/logs", asked.SerializeToString(), content_type=PROTOBUF)
    assert by_emitter(emitted(batch)) == by_emitter(model(asked))
    assert batch.reply.status == 200
    assert batch.reply.body == b""
    assert header(batch.reply, "Content-Type") == PROTOBUF


@given(resources.map(export))
@settings(max_examples=settings().max_examples // 4)
def test_json_says_the_same_as_protobuf(asked):
    body = json_format.MessageToDict(asked)
    for resource_logs in body.get("resourceLogs", ()):
        for scope_logs in resource_logs.get("scopeLogs", ()):
            for log in scope_logs.get("logRecords", ()):
                log |= {name: base64.b64decode(log[name]).hex() for name in ("traceId", "spanId") if name in log}
                if isinstance(log.get("severityNumber"), str):
                    log["severityNumber"] = LogRecord(severity_number=log["severityNumber"]).severity_number
    batch = convert("/v1/logs", json.dumps(body).encode(), content_type="application/json; charset=utf-8")
    assert by_emitter(emitted(batch)) == by_emitter(model(asked))
    assert document(batch.reply) == {}


# ------------------------------------------------------------------------------------------------------------- details


def one_record(**members):
    return export([({}, [("", "", {}, [LogRecord(**members)])])]).SerializeToString()


def test_numbers_are_exact():
    body = one_record(attributes=pairs({"n": AnyValue(int_value=2**63 - 1), "m": AnyValue(int_value=-(2**63))}))
    (each,) = convert("/v1/logs", body, content_type=PROTOBUF).packets
    assert b'"n":9223372036854775807,"m":-9223372036854775808' in each.body


def test_numbers_may_be_strings_in_json():
    logs = [
        {"timeUnixNano": value, "body": {"intValue": value}} for value in ("1700000000123456789", 1700000000123456789)
    ]
    body = json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": logs, "unknown": 1}]}], "other": {}}).encode()
    first, second = messages(convert("/v1/logs", body, content_type="application/json"))
    assert first == second
    assert (first["timestamp"], first["message"]) == ("2023-11-14T22:13:20.123456789Z", "1700000000123456789")


@pytest.mark.parametrize("event", ["started", 5, True, ["a"], {"a": 1}])
def test_any_event_name_makes_a_text(event):
    body = json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": [{"eventName": event}]}]}]}).encode()
    (message,) = messages(convert("/v1/logs", body, content_type="application/json"))
    assert message["message"] == (event if isinstance(event, str) else json.dumps(event, separators=(",", ":")))
    assert message["metadata"] == {"eventName": event}


@pytest.mark.parametrize("coding", ["gzip", "identity"])
@pytest.mark.parametrize("empty", [b"", ExportLogsServiceRequest().SerializeToString()])
def test_no_records_are_a_success(coding, empty):
    body = gzip.compress(empty) if coding == "gzip" else empty
    batch = convert("/v1/logs", body, content_type=PROTOBUF, content_encoding=coding)
    assert (batch.packets, batch.records, batch.reply.status) == ([], 0, 200)


def test_text_that_is_no_utf8_is_mended():
    body = one_record(body=AnyValue(string_value="aXXXb")).replace(b"XXX", b"\xff\xc3\xa9")
    assert message("/v1/logs", body, content_type=PROTOBUF)["message"] == "a\ufffd\u00e9b"


def test_unknown_fields_are_passed_over():
    body = b"\x98\x06\x01\xa2\x06\x03abc\xa9\x06" + bytes(8) + b"\xb5\x06" + bytes(4)
    assert convert("/v1/logs", body + one_record(event_name="e"), content_type=PROTOBUF).records == 1


def test_a_request_cut_anywhere_is_400():
    body = one_record(body=AnyValue(string_value="text"), attributes=pairs({"a": array([AnyValue(int_value=300)])}))
    for cut in range(1, len(body)):
        error, reply = refusal("/v1/logs", body[:cut], content_type=PROTOBUF)
        assert (error.reason, reply.status) == (Reason.MALFORMED, 400)


@given(body=st.binary(max_size=200))
def test_noise_is_a_batch_or_400(body):
    for kind in (PROTOBUF, "application/json"):
        try:
            convert("/v1/logs", body, content_type=kind)
        except Refused as error:
            assert error.reason is Reason.MALFORMED  # noqa: PT017 - the other outcome is no exception


@given(resources.map(export), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=settings().max_examples // 2)
def test_damage_is_a_batch_or_400(asked, place, byte):
    body = bytearray(asked.SerializeToString() or b"\0")
    body[place % len(body)] = byte
    try:
        convert("/v1/logs", bytes(body), content_type=PROTOBUF)
    except Refused as error:
        assert error.reason is Reason.MALFORMED  # noqa: PT017 - the other outcome is no exception


def nested(depth):
    value = AnyValue(string_value="x")
    for _ in range(depth):
        value = array([value])
    return value


def test_deep_nesting_is_400():
    assert convert("/v1/logs", one_record(body=nested(40)), content_type=PROTOBUF).records == 1
    for depth in (61, 5000):
        value = b""
        for _ in range(depth):
            value = framed(5, framed(1, value))
        body = framed(1, framed(2, framed(2, framed(5, value))))
        error, _ = refusal("/v1/logs", body, content_type=PROTOBUF)
        assert "nested too deep" in error.detail


def framed(number, data):
    """Return a field with bytes."""
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def test_very_many_attributes_are_kept():
    members = {f"key{n}": AnyValue(int_value=n) for n in range(50_000)}
    limits = msgspec.structs.replace(LIMITS, max_body=8 << 20, max_packet=8 << 20)
    batch = convert("/v1/logs", one_record(attributes=pairs(members)), limits, content_type=PROTOBUF)
    (one,) = messages(batch)
    assert one["metadata"]["attributes"] == {f"key{n}": n for n in range(50_000)}


@pytest.mark.parametrize("kind", ["text/plain", "", "application/json2", "application/grpc"])
def test_other_types_are_415(kind):
    error, reply = refusal("/v1/logs", b"{}", content_type=kind)
    assert (error.reason, reply.status) == (Reason.UNSUPPORTED, 415)
    assert document(reply)["message"]


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics"])
def test_traces_and_metrics_are_404(path):
    """Whatever the limits, the tokens and the queue say: exporters would try again."""
    for obstacle in ("", "the queue is full"):
        with pytest.raises(Refused) as caught:
            answer(path, "POST", obstacle, content_type=PROTOBUF)
        assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("reason", Reason)
def test_errors_are_a_status(reason):
    refused = Refused(reason, "what is wrong é", retry_after=60)
    asked = request("/v1/logs", content_type=PROTOBUF)
    reply = route(asked).protocol.refuse(asked, refused)
    status = status_pb2.Status.FromString(reply.body)
    assert (status.message, reply.status) == ("what is wrong é", STATUSES[reason])
    as_json = route(asked).protocol.refuse(request("/v1/logs", content_type="application/json"), refused)
    assert document(as_json) == {"code": status.code, "message": status.message}
    assert header(reply, "Retry-After") == ("5" if reply.status == 503 else None)  # SDKs give up for a longer one
    assert (header(reply, "WWW-Authenticate") is not None) == (reply.status == 401)


def test_probes_are_no_part_of_it():
    with pytest.raises((TypeError, AssertionError)):
        answer("/v1/logs")
