"""Mapping: times, levels and texts; records of any types come out once each, in order, and packets are valid."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from agents import LIMITS, RECEIVED, RECEIVED_NS, convert, messages, packets, request, route
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fastdist._core import JsonValues, count_commas, date_time, is_rfc3339, json_fault
from fastdist.packet import LEVELS, is_date_time
from fastdist.protocols import records
from fastdist.protocols.base import Reason, Refused
from fastdist.protocols.packets import Packets, encode
from fastdist.protocols.records import level_of, time_of

# ------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-01-02T03:04:05Z", "2024-01-02T03:04:05Z"),
        ("2024-01-02T03:04:05.123456789+02:00", "2024-01-02T03:04:05.123456789+02:00"),
        ("2024-01-02t03:04:05z", "2024-01-02t03:04:05z"),
        ("2024-01-02 03:04:05.123456", "2024-01-02T03:04:05.123456Z"),
        ("2024-01-02 03:04:05,123", "2024-01-02T03:04:05.123Z"),
        ("2024-01-02T03:04:05", "2024-01-02T03:04:05Z"),
        ("2024-01-02T03:04:05+0200", "2024-01-02T03:04:05+02:00"),
        ("2024-01-02 03:04:05 -07:00", "2024-01-02T03:04:05-07:00"),
        ("2024-01-02 03:04:05 UTC", "2024-01-02T03:04:05Z"),
        ("2024-01-02T03:04", "2024-01-02T03:04:00Z"),
        ("2024-02-30 03:04:05", None),
        ("2024-01-02 24:04:05", None),
        ("yesterday", None),
        ("", None),
        ("2024-01-02", None),
        (1700000000, "2023-11-14T22:13:20Z"),
        (1700000000123, "2023-11-14T22:13:20.123Z"),
        (1700000000123456, "2023-11-14T22:13:20.123456Z"),
        (1700000000123456789, "2023-11-14T22:13:20.123456789Z"),
        ("1700000000", "2023-11-14T22:13:20Z"),
        ("1700000000123456789", "2023-11-14T22:13:20.123456789Z"),
        ("1700000000.123456789", "2023-11-14T22:13:20.123456789Z"),
        ("1700000000123.5", "2023-11-14T22:13:20.123500Z"),
        (1700000000.123456, "2023-11-14T22:13:20.123456Z"),
        (1700000000123.25, "2023-11-14T22:13:20.123250Z"),
        (0, "1970-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59Z"),
        (10**11 - 1, "5138-11-16T09:46:39Z"),
        (10**11, "1973-03-03T09:46:40Z"),
        (10**14, "1973-03-03T09:46:40Z"),
        (10**17, "1973-03-03T09:46:40Z"),
        (253402300799999999999, "9999-12-31T23:59:59.999999999Z"),
        (253402300800000000000, None),
        (10**400, None),
        ("9" * 400, None),
        (1e300, None),
        (-1e300, None),
        (True, None),
        (None, None),
        ([], None),
        ({}, None),
    ],
)
def test_times_are_read_by_form_and_size(value, expected):
    assert time_of(value) == expected
    assert expected is None or is_date_time(expected)


@given(st.text(max_size=40) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
@example("2024-01-02 03:04:60")
@example("0000-01-02 03:04:05")
def test_what_is_read_as_a_time_is_one(value):
    time = time_of(value)
    assert time is None or is_date_time(time)


@given(st.datetimes(min_value=datetime(1, 1, 1)), st.integers(0, 999))  # noqa: DTZ001 - its zone is UTC below
def test_date_times_are_those_of_datetime(moment, nanosecond):
    moment = moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    text = date_time(since // timedelta(seconds=1), moment.microsecond * 1000 + nanosecond)
    assert datetime.fromisoformat(text) == moment
    assert is_date_time(text)
    assert nanosecond == 0 or text.endswith(f"{nanosecond:03}Z")


@given(st.text(max_size=30) | st.from_regex(r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-6]\d:[0-6]\d(\.\d+)?(Z|[+-]\d\d:\d\d)"))
def test_is_rfc3339_agrees_with_its_model(text):
    assert is_rfc3339(text) == is_date_time(text)


# ------------------------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize(
    ("level", "names"),
    {
        "trace": ["trace", "TRACE", "Verbose", 10, "10"],
        "debug": ["debug", "Debug", 7, "7", 20],
        "info": ["info", "INFO", "Information", "informational", "notice", "NOTICE", 5, 6, "6", 30, 35, 30.0],
        "warn": ["warn", "WARNING", "Warn", 4, "4", 40],
        "error": ["error", "Err", "ERROR", 3, 50],
        "critical": ["crit", "CRITICAL", 2],
        "fatal": ["fatal", "emerg", "Emergency", "ALERT", "panic", 0, 1, "0", 60],
        None: ["", "loud", 8, 9, 61, -1, 100, True, None, [], {}, 3.5, float("nan"), "x" * 10_000, "İ" * 15],
    }.items(),
)
def test_levels_are_known_by_name_and_number(level, names):
    assert [level_of(name) for name in names] == [level] * len(names)
    assert level is None or level in LEVELS


# -------------------------------------------------------------------------------------------------------- JSON values

json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
space = st.sampled_from([b"", b" ", b"\n", b"\r\n", b" \t "])


@given(st.lists(st.tuples(json_texts, space)), st.integers(1, 5))
def test_values_are_cut_where_they_end(pairs, most):
    body = b"".join(json.dumps(value).encode() + b"\n" + after for value, after in pairs)
    cutter, found = JsonValues(body, 128), []
    while texts := cutter.take(most):
        assert len(texts) <= most
        found += [json.loads(text) for text in texts]
    flat = [item for value, _ in pairs for item in (value if isinstance(value, list) else [value])]
    assert found == flat


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        (b"[1,2", 2), (b"[1 2]", 1), (b"[1,]", 1), (b"[", 0), (b"]", 0), (b"1,2", 1), (b'{"a":1}}', 1), (b"[1]]", 1),
        (b'{"a":1', 0), (b"nul", 0), (b"{} x", 1), (b'"\xff"', 0), (b"[[1],[2", 1), (b"1\0", 1), (b"[1,,2]", 1),
    ],
)  # fmt: skip
def test_faults_come_behind_values_before(body, whole):
    for most in (1, 100):
        cutter, found = JsonValues(body, 128), []
        with pytest.raises(ValueError, match="not"):
            take_all(cutter, most, found)
        assert len(found) == whole


def take_all(cutter, most, found):
    while texts := cutter.take(most):
        found += texts


@given(st.binary(max_size=60))
def test_noise_is_cut_or_refused(body):
    cutter = JsonValues(body, 128)
    try:
        while texts := cutter.take(3):
            for text in texts:
                assert json_fault(text, 128) is None
    except ValueError as error:
        assert len(error.args) == 4  # noqa: PT017 - the other outcome is no exception


@given(st.integers(0, 1000), st.binary(max_size=400) | st.text(",;\x00\uac2c", max_size=400).map(str.encode))
def test_commas_are_counted(repeated, piece):
    text = b"," * repeated + piece * 7
    assert count_commas(text) == text.count(b",")


@pytest.mark.parametrize("text", [b"[" * 120 + b"]" * 120, b'{"":' * 119 + b"{}" + b"}" * 119])
def test_depth_is_bounded(text):
    assert json_fault(text, records.MAX_DEPTH) is None
    assert "nested" in json_fault(b"[" + text + b"]", records.MAX_DEPTH)[0]
    assert convert("/ingest", b'{"a":%b}' % text[1:-1] if text[:1] == b"[" else text).records == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'"\\ud800"', "\ufffd"),
        (b'"\\udc00x\\ud83d\\ude00"', "\ufffdx\U0001f600"),
        (b'{"\\ud800":["\\udfff"]}', {"\ufffd": ["\ufffd"]}),
        (b"18446744073709551617", 18446744073709551617),
        (b"-9223372036854775809", -9223372036854775809),
        (b'{"a":1,"a":2}', {"a": 2}),
    ],
)
def test_odd_values_are_decoded(text, expected):
    assert records.decode_value(text) == expected


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"9" * 5000, b"1" * 400 + b".5"])
def test_numbers_of_any_size_stay(number):
    (each,) = convert("/ingest", b'{"message":"m","n":%b}' % number).packets
    assert b'"n":%b}' % number in each.body


# ------------------------------------------------------------------------------------------------------------ packets


def records_of(emitters):
    return b"\n".join(b'{"host":"h%d","message":"%d"}' % (emitter, n) for n, emitter in enumerate(emitters))


@given(st.lists(st.integers(0, 4), max_size=600))
def test_emitters_have_packets_in_order(emitters):
    batch = convert("/ingest", records_of(emitters))
    assert batch.records == len(emitters)
    found = {each["emitterId"]: [int(m["message"]) for m in each["messages"]] for each in packets(batch)}
    assert len(found) == len(batch.packets)
    assert found == {
        f"h{emitter}": [n for n, each in enumerate(emitters) if each == emitter] for emitter in set(emitters)
    }


@pytest.mark.parametrize("length", [1, 100, 3000])
def test_too_large_packets_are_split(length):
    limits = replace(LIMITS, max_packet=8192)
    body = b"\n".join(b'{"host":"h","message":"%d %b"}' % (n, b"x" * length) for n in range(300))
    batch = convert("/ingest", body, limits)
    assert len(batch.packets) > 1
    assert [m["message"].split()[0] for m in messages(batch)] == [str(n) for n in range(300)]


def test_a_packet_may_be_full_to_the_byte():
    limits = replace(LIMITS, max_packet=8192)
    fits = []
    for length in range(5000, 8192):
        texts = ["x" * length, "second"]
        body = b"\n".join(b'{"host":"h","message":"%b"}' % each.encode() for each in texts)
        with contextlib.suppress(Refused):
            batch = convert("/ingest", body, limits)
            assert [m["message"] for m in messages(batch)] == texts
            assert sum(each.messages for each in batch.packets) == len(texts)
            fits.append(length)
    assert fits == list(range(5000, fits[-1] + 1))
    assert fits[-1] < 8191


def test_a_record_over_a_packet_is_413():
    limits = replace(LIMITS, max_packet=8192)
    body = b'{"message":"a"}\n{"message":"%b"}' % (b"\\u0000" * 2000)
    with pytest.raises(Refused) as caught:
        convert("/ingest", body, limits)
    assert (caught.value.reason, caught.value.record) == (Reason.TOO_LARGE, 1)


def test_large_messages_do_not_wait_for_many():
    gathered = Packets(LIMITS, {})
    for number in range(1, 20):
        gathered.add("e", {"message": "m"}, 50_000)
        assert gathered.number == number
        assert number - 2 <= gathered.records < number


def test_many_tiny_records_end_at_max_batch():
    with pytest.raises(Refused) as caught:
        convert("/ingest", b"{}" * (LIMITS.max_body // 2))
    assert caught.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize("path", ["/ingest", "/_bulk"])
def test_conversions_go_on_in_slices(path, monkeypatch):
    monkeypatch.setattr("fastdist.protocols.base.SLICE_NS", 0)
    line = b'{"index":{"_index":"i"}}\n' if path == "/_bulk" else b""
    asked = request(path, (line + b'{"message":"m"}\n') * 10_000)
    work = route(asked).take(asked, LIMITS)
    assert sum(1 for _ in work) > 5


# ------------------------------------------------------------------------------------ every record, whatever its types

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["info", "NOTICE", "2024-01-02T03:04:05Z", 1700000000.5, "yesterday", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = [*records.TEXTS, *records.TIMES, *records.LEVEL_NAMES, *records.SOURCES, *records.EMITTERS, "service", "a"]
objects = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=8)


def accounted_for(record, message, emitter):
    """Whether each member of a record is in its message: under its own name, or as what it was taken for."""
    metadata = message.get("metadata", {})
    taken = dict.fromkeys(records.TEXTS, message["message"]) | dict.fromkeys(records.TIMES, message["timestamp"])
    taken |= dict.fromkeys(records.LEVEL_NAMES, message["level"]) | dict.fromkeys(records.EMITTERS, emitter)
    taken |= {name: message.get("source") for name in records.SOURCES}
    assert set(metadata) <= set(record)
    for name, value in record.items():
        assert metadata[name] == value if name in metadata else taken[name] == value, name


@given(st.lists(objects, max_size=8))
def test_every_record_comes_out(items):
    body = b"\n".join(msgspec.json.encode(item) for item in items)
    batch = convert("/ingest", body)
    assert batch.records == len(items)
    left = {}
    for each in packets(batch):
        left[each["emitterId"]] = each["messages"]
    for item in items:  # each is the next message of one emitter
        matching = []
        for emitter, waiting in left.items():
            try:
                accounted_for(item, waiting[0], emitter)
                matching.append(emitter)
            except (AssertionError, IndexError, KeyError):
                continue
        assert matching, item
        left[matching[0]].pop(0)


M = {"message": "m"}
LOG = {"log": {"level": "warn"}}
EPOCH = "1970-01-01T00:00:01Z"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"message": "m"}, {"message": "m"}),
        ({"message": ""}, {"message": ""}),
        ({"msg": " m "}, {"message": " m "}),
        ({"message": None, "log": "l"}, {"message": "l", "metadata": {"message": None}}),
        ({"message": 5}, {"message": "5", "metadata": {"message": 5}}),
        ({"message": {"a": [1]}}, {"message": '{"a":[1]}', "metadata": {"message": {"a": [1]}}}),
        ({"a": 1}, {"message": '{"a":1}', "metadata": {"a": 1}}),
        ({}, {"message": "{}"}),
        (LOG, {"message": '{"log":{"level":"warn"}}', "level": "warn", "metadata": LOG}),
        ({"message": "m", "level": "error"}, {"message": "m", "level": "error"}),
        ({"message": "m", "level": "ERROR"}, {"message": "m", "level": "error", "metadata": {"level": "ERROR"}}),
        (M | {"level": "x", "PRIORITY": "3"}, M | {"level": "error", "metadata": {"level": "x", "PRIORITY": "3"}}),
        ({"message": "m", "log.level": "warn"}, {"message": "m", "level": "warn"}),
        ({"message": "m", "logger": "app"}, {"message": "m", "source": "app"}),
        (M | {"log": {"file": {"path": "/x"}}}, M | {"source": "/x", "metadata": {"log": {"file": {"path": "/x"}}}}),
        (M | {"source": {"class": "A"}, "file": "f"}, M | {"source": "f", "metadata": {"source": {"class": "A"}}}),
        ({"message": "m", "time": "yesterday"}, {"message": "m", "metadata": {"time": "yesterday"}}),
        (M | {"timestamp": "x", "date": 1}, M | {"timestamp": EPOCH, "metadata": {"timestamp": "x", "date": 1}}),
    ],
)  # fmt: skip
def test_members_are_mapped(record, expected):
    (one,) = messages(convert("/ingest", json.dumps(record).encode()))
    assert one == {"timestamp": RECEIVED, "level": "info"} | expected


@pytest.mark.parametrize(
    ("record", "emitter"),
    [
        ({"host": "h"}, "h"),
        ({"host": {"name": "h", "ip": "x"}}, "h"),
        ({"service": {"name": "s"}, "host": "h"}, "s"),
        ({"service.name": "s", "hostname": "h"}, "s"),
        ({"host.name": "n", "host": "h"}, "n"),
        ({"HOST": "H"}, "H"),
        ({"host": "", "hostname": 5}, "192.0.2.7"),
        ({"host": "x" * 300}, "x" * 256),
    ],
)
def test_emitters_are_found(record, emitter):
    (each,) = packets(convert("/ingest", json.dumps(record | {"message": "m"}).encode()))
    assert each["emitterId"] == emitter
    (one,) = each["messages"]
    assert emitter != "x" * 256 or one["metadata"]["host"] == record["host"]


# ------------------------------------------------------------------------------ the compiled mapping, against its model

usual = st.dictionaries(
    st.sampled_from([*NAMES, "b", "trace"]),
    st.sampled_from(
        ["info", "WARN", "7", "", "x", "é", 3, 30, 0, 1700000000, 1700000000123456789, 1700000000.123456, None]
    )
    | st.sampled_from(
        ["2024-01-02T03:04:05.5Z", True, {"name": "n"}, {"level": "warn", "file": {"path": "/p"}}, [1], {}]
    )
    | st.text(max_size=5)
    | st.integers(0, 10**20)
    | st.floats(0, 5e9),
    max_size=7,
)


def mapped(record, **common):
    """Return what the core makes of a record: None if it leaves that to Python."""
    each = records.Common(RECEIVED_NS, "-", **common)
    one = each.mapper().one(msgspec.json.encode(record), b"", records.MAX_DEPTH)
    return one and (one[0] or "-", json.loads(one[1]))


@given(usual | objects, st.booleans())
@example({"message": "m", "date": 1700000000.123456, "level": 30, "host": {"name": "h"}}, False)
@example({"log": "l", "log.level": "warn", "service": {"name": "s"}, "timestamp": 1700000000123456789}, False)
@settings(max_examples=settings().max_examples * 5)
def test_compiled_mapping_agrees(record, fixed):
    common = {"source": "s", "fixed_emitter": fixed}
    found = mapped(record, **common)
    expected = records.Common(RECEIVED_NS, "-", **common).message(dict(record))
    assert found is None or found == (expected[0], json.loads(encode(expected[1])))


@pytest.mark.parametrize(
    "record",
    [
        {"message": "m"},
        {"message": "m\n", "@timestamp": "2024-01-02T03:04:05.123Z", "level": "INFO", "host": {"name": "h"}},
        {"log": "l", "date": 1700000000.123456, "stream": "stderr", "kubernetes": {"pod": "p"}},
        {"MESSAGE": "m", "PRIORITY": "err", "HOST": "h", "PROGRAM": "p", "ISODATE": "2024-01-02T03:04:05+00:00"},
        {"msg": "m", "time": 1700000000123, "level": 30, "pid": 5, "hostname": "h"},
        {"message": "m", "log": {"level": "warn", "file": {"path": "/p"}}, "service": {"name": "s"}},
    ],
)
def test_usual_records_need_no_python(record):
    assert mapped(record) is not None


def test_order_is_kept_beside_odd_records():
    body = b"\n".join(b'{"message":%b,"n":%d}' % (b"5" if n % 3 else b'"m"', n) for n in range(1000))
    assert [one["metadata"]["n"] for one in messages(convert("/ingest", body))] == list(range(1000))
