"""Loki: the compiled reader against a model written by hand, JSON against it, labels with Go's escapes."""

from __future__ import annotations

import gzip
import json

import cramjam
import pytest
from agents import RECEIVED, convert, header, message, messages, packets, refusal, request, route
from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import date_time
from fastdist.protocols.base import STATUSES, Reason, Refused
from fastdist.protocols.loki import LEVEL_LABELS, Stream, _stream

PUSH = "/loki/api/v1/push"
PROTOBUF = "application/x-protobuf"

# ------------------------------------------------------------------------------------------------ a writer of protobuf


def varint(number):
    number &= (1 << 64) - 1
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value) if value else b""
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def entry(ns, line, pairs=()):
    second, nanosecond = divmod(ns, 10**9)
    extra = b"".join(field(3, field(1, name) + field(2, value)) for name, value in pairs)
    return field(2, field(1, field(1, second) + field(2, nanosecond)) + field(2, line) + extra)


def quoted(text):
    return '"' + "".join(f"\\{c}" if c in '"\\' else f"\\U{ord(c):08x}" if ord(c) < 32 else c for c in text) + '"'


def labels_text(labels):
    return "{" + ", ".join(f"{name}={quoted(value)}" for name, value in labels.items()) + "}"


def push(streams):
    """Return a PushRequest of ``[(labels, [(ns, line, pairs)])]``, as a block of snappy."""
    body = b""
    for labels, entries in streams:
        body += field(1, field(1, labels_text(labels)) + b"".join(entry(*each) for each in entries) + field(3, 12345))
    return snappy(body)


def snappy(body):
    return bytes(cramjam.snappy.compress_raw(body))


names = st.sampled_from(["app", "job", "host", "level", "detected_level", "severity", "filename", "a_b", "x"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
level_texts = st.sampled_from(["info", "WARN", "Error", "loud"])
labels = st.dictionaries(names, texts | level_texts, max_size=4)
entries = st.tuples(
    st.integers(-(10**18), 4 * 10**18), texts, st.dictionaries(names, texts | level_texts, max_size=3).map(dict.items)
)
streams = st.lists(st.tuples(labels, st.lists(entries, max_size=4)), max_size=3)


def model(streams):
    found = {}
    for members, logged in streams:
        stream = Stream(members)
        for ns, line, pairs in logged:
            extra = {(f"{name}_extracted" if name in members else name): value for name, value in pairs}
            level = Stream(dict(pairs)).level if known(dict(pairs)) else stream.level
            one = {"timestamp": date_time(*divmod(ns, 10**9)) if ns else RECEIVED, "level": level, "message": line}
            one["metadata"] = extra | members
            found.setdefault(stream.emitter, []).append(one | ({"source": stream.source} if stream.source else {}))
    return found


def known(pairs):
    return Stream(pairs).level != "info" or any(pairs.get(name) == "info" for name in LEVEL_LABELS)


def emitted(batch):
    found = {}
    for each in packets(batch):
        mine = [{"metadata": {}} | one for one in each["messages"]]
        found[each["emitterId"]] = found.get(each["emitterId"], []) + mine
    return found


@given(streams)
def test_every_entry_comes_out_of_protobuf(pushed):
    batch = convert(PUSH, push(pushed), content_type=PROTOBUF)
    assert emitted(batch) == model(pushed)
    assert (batch.reply.status, batch.reply.body) == (204, b"")


@given(streams)
def test_every_entry_comes_out_of_json(pushed):
    pushed = [
        (members, [each for each in logged if abs(each[0]) > 10**17 or not each[0]]) for members, logged in pushed
    ]
    body = {
        "streams": [
            {
                "stream": members,
                "values": [[str(ns), line, dict(pairs)][: 3 if pairs else 2] for ns, line, pairs in logged],
            }
            for members, logged in pushed
        ]
    }
    batch = convert(PUSH, json.dumps(body).encode(), content_type="application/json")
    assert emitted(batch) == model(pushed)
    assert (batch.reply.status, batch.reply.body) == (204, b"")


def test_gzip_and_snappy_may_be_named():
    body = push([({"app": "a"}, [(1, "x", ())])])
    for coding, sent in (("snappy", body), ("gzip", gzip.compress(body)), ("snappy, gzip", gzip.compress(body))):
        assert convert(PUSH, sent, content_type=PROTOBUF, content_encoding=coding).records == 1


def test_json_may_be_snappy():
    body = snappy(b'{"streams":[{"stream":{},"values":[["1","x"]]}]}')
    assert convert(PUSH, body, content_type="application/json", content_encoding="snappy").records == 1


@pytest.mark.parametrize("body", [b"{}", b'{"streams":[]}', b'{"streams":[{"stream":{"a":"b"},"values":[]}]}'])
def test_nothing_pushed_is_a_success(body):
    assert convert(PUSH, body, content_type="application/json").reply.status == 204


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {}),
        (' { a = "b" , c="d"} ', {"a": "b", "c": "d"}),
        ('{a="b",}', {"a": "b"}),
        (r'{a="x\"y\\z", b="\n\t\x41\101\u00e9\U0001F600"}', {"a": 'x"y\\z', "b": "\n\tAA\u00e9\U0001f600"}),
        (r'{a="\xc3\xa9\xff", b="\ud800"}', {"a": "\u00e9\ufffd", "b": "\ufffd"}),
        ("{a=`raw \\n`}", {"a": "raw \\n"}),
        ('{a="x, y=\\"z\\"}", b=""}', {"a": 'x, y="z"}', "b": ""}),
        ('{"a.b"="c"}', {"a.b": "c"}),
    ],
)
def test_labels_are_read_as_go_writes_them(text, expected):
    assert _stream(text).labels == expected


@pytest.mark.parametrize("text", ["", "a", "{", '{a="b"', "{a=b}", '{a="b" c="d"}', '{="b"}', '{a="b\\"}'])
def test_what_are_no_labels_is_400(text):
    body = snappy(field(1, field(1, text) + entry(1, "x")))
    error, reply = refusal(PUSH, body, content_type=PROTOBUF)
    assert (error.reason, reply.status) == (Reason.MALFORMED, 400)
    assert header(reply, "Content-Type").startswith("text/plain")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b'{"streams":{}}', b'{"streams":[{"stream":{},"values":[1]}]}', b'{"streams":[1]}',
        b'{"streams":[{"values":[["1"]]}]}', b'{"streams":[{"values":[["1","x",1]]}]}', b'{"streams":',
    ],
)  # fmt: skip
def test_malformed_json_is_400(body):
    error, _ = refusal(PUSH, body, content_type="application/json")
    assert error.reason is Reason.MALFORMED


@given(body=st.binary(max_size=200))
def test_noise_is_a_batch_or_400(body):
    for kind, sent in ((PROTOBUF, body), (PROTOBUF, snappy(body)), ("application/json", body)):
        try:
            convert(PUSH, sent, content_type=kind)
        except Refused as error:
            assert error.reason in (Reason.MALFORMED, Reason.TOO_LARGE)  # noqa: PT017 - the other outcome


def test_a_request_cut_anywhere_is_no_more():
    body = field(1, field(1, '{a="b"}') + entry(10**18, "line", [("c", "d")]) + entry(1, "x"))
    for cut in range(len(body)):
        try:
            assert convert(PUSH, snappy(body[:cut]), content_type=PROTOBUF).records == 0
        except Refused as error:
            assert error.reason is Reason.MALFORMED  # noqa: PT017 - the other outcome is no exception


def test_labels_become_emitter_source_level():
    body = push(
        [
            (
                {"job": "j", "filename": "/f", "detected_level": "error"},
                [(1, "x", [("detected_level", "debug")]), (2, "y", ())],
            )
        ]
    )
    batch = convert(PUSH, body, content_type=PROTOBUF, x_scope_orgid="tenant")
    assert [(one["level"], one["source"]) for one in messages(batch)] == [("debug", "/f"), ("error", "/f")]
    assert packets(batch)[0]["emitterId"] == "j"
    assert packets(batch)[0]["metadata"]["tenant"] == "tenant"


def test_entries_without_time_get_one():
    body = snappy(field(1, field(1, "{}") + field(2, field(2, "x"))))
    assert message(PUSH, body, content_type=PROTOBUF)["timestamp"] == RECEIVED


def test_entries_as_once_sent_are_400():
    body = b'{"streams":[{"labels":"{app=\\"x\\"}","entries":[{"ts":"2026-01-02T03:04:05.678901Z","line":"lost"}]}]}'
    error, reply = refusal(PUSH, body, content_type="application/json")
    assert reply.status == 400
    assert 'version="1"' in error.detail
    named = b'{"streams":[{"stream":{"entries":"x"},"values":[]}]}'
    assert convert(PUSH, named, content_type="application/json").records == 0


@pytest.mark.parametrize("reason", Reason)
def test_errors_are_text(reason):
    asked = request(PUSH)
    reply = route(asked).protocol.refuse(asked, Refused(reason, "what is wrong", retry_after=2.5))
    assert (reply.status, reply.body) == (STATUSES[reason], b"what is wrong\n")
    assert header(reply, "Retry-After") == ("3" if reply.status == 503 else None)
