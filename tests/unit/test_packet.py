"""The schema: what is accepted, what is refused, and that a refusal says where the fault is."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import hash_text
from fastdist.errors import PacketError
from fastdist.packet import MAX_ERRORS, MAX_EXPLAINED, Facts, LogPacket, check

MAX_DEPTH = 128

MESSAGE = {"timestamp": "2026-01-31T12:34:56.789Z", "level": "info", "message": "started", "source": "api"}
PACKET = {"emitterId": "web-1", "messages": [MESSAGE, MESSAGE | {"metadata": {"pid": 7}}], "metadata": {"zone": "a"}}


def encode(packet: Any) -> bytes:
    return packet if isinstance(packet, bytes) else json.dumps(packet).encode()


def refusal(body: Any, *, strict: bool = False) -> PacketError:
    with pytest.raises(PacketError) as caught:
        check(encode(body), strict=strict)
    return caught.value


def faults(body: Any, *, strict: bool = False) -> list[tuple[str, str]]:
    error = refusal(body, strict=strict)
    assert error.reason == "invalid"
    return [(fault["pointer"], fault["detail"]) for fault in error.errors]


def pointers(body: Any, *, strict: bool = False) -> list[str]:
    return [pointer for pointer, _ in faults(body, strict=strict)]


def words(text: str) -> list[str]:
    return text.split()


def packet(**members: Any) -> dict[str, Any]:
    return {"emitterId": "e", "messages": [{"message": "m"}]} | members


def one_message(**members: Any) -> dict[str, Any]:
    return packet(messages=[{"message": "m"} | members])


@pytest.mark.parametrize("strict", [False, True])
def test_facts_of_the_documented_packet(strict):
    assert check(encode(PACKET), strict=strict) == Facts(messages=2, emitter_hash=hash_text(b"web-1"))


@pytest.mark.parametrize("emitter", ["web-1", "x", "п" * 256, "\U0001f600" * 256, 'quo"te\\', "tab\t", "\0", "é/~1"])
def test_hash_is_over_the_decoded_emitter(emitter):
    hashes = {check(json.dumps(packet(emitterId=emitter), ensure_ascii=a).encode()).emitter_hash for a in (True, False)}
    assert hashes == {hash_text(emitter.encode())}
    assert 0 <= hashes.pop() < 2**64


def test_hash_stays_the_same_over_versions():
    """Sticky packets would change their analyzers otherwise, and queued ones carry the hash over a restart."""
    assert (hash_text(b""), hash_text(b"web-1")) == (3165970993698975659, 5280794028165958626)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "the body is empty"),
        (b" \n", "not JSON: expected a value at line 2, column 1 (byte 2)"),
        (b"hello", "not JSON: expected a value at line 1, column 1 (byte 0)"),
        (b"[tru]", "not JSON: expected a value at line 1, column 2 (byte 1)"),
        (b"[1,]", "not JSON: expected a value at line 1, column 4 (byte 3)"),
        ("[é]".encode(), "not JSON: expected a value at line 1, column 2 (byte 1)"),
        (b'{"emitterId": "\xff"}', "not UTF-8 at line 1, column 16 (byte 15)"),
        (b'{"x": "\xc3"}', "not UTF-8 at line 1, column 8 (byte 7)"),
        (b'{"x": "\xed\xa0\x80"}', "not UTF-8 at line 1, column 8 (byte 7)"),
        (b"[\xe9]", "not UTF-8 at line 1, column 2 (byte 1)"),
        (b"\xff\xfe{\0}\0", "not UTF-8 at line 1, column 1 (byte 0)"),
        (b"\xef\xbb\xbf{}", "not JSON: a byte order mark at line 1, column 1 (byte 0)"),
        (b'{"a": 1} x', "not JSON: expected the end of the body at line 1, column 10 (byte 9)"),
        (b'{"a": 1}\0', "not JSON: expected the end of the body at line 1, column 9 (byte 8)"),
        (b"01", "not JSON: expected the end of the body at line 1, column 2 (byte 1)"),
        (
            b'{\n  "a": 1\n  "b": 2\n}',
            "not JSON: expected a comma or a closing brace at line 3, column 3 (byte 13)",
        ),
        ('{"é": 1 2}'.encode(), "not JSON: expected a comma or a closing brace at line 1, column 9 (byte 9)"),
        (b"[[1 2]]", "not JSON: expected a comma or a closing bracket at line 1, column 5 (byte 4)"),
        (b'{"a":1,}', "not JSON: expected a name in double quotes at line 1, column 8 (byte 7)"),
        (b"{a: 1}", "not JSON: expected a name in double quotes at line 1, column 2 (byte 1)"),
        (b'{"a" 1}', "not JSON: expected a colon at line 1, column 6 (byte 5)"),
        (b"[1.]", "not JSON: expected a digit at line 1, column 4 (byte 3)"),
        (b'{"a": "x', "not JSON: unterminated string, which begins at line 1, column 7 (byte 6)"),
        (b'{"a\\"b": "\\n', "not JSON: unterminated string, which begins at line 1, column 10 (byte 9)"),
        (b'{"a": "x\ny"}', "not JSON: unescaped control character in a string at line 1, column 9 (byte 8)"),
        (b'{"a": "\\x"}', "not JSON: invalid escape sequence at line 1, column 8 (byte 7)"),
        (b'["NaN", 1, NaN]', "not JSON, which knows no NaN and no Infinity, at line 1, column 12 (byte 11)"),
        (b"[-Infinity]", "not JSON, which knows no NaN and no Infinity, at line 1, column 3 (byte 2)"),
        (
            b'["\\ud83d\\ude00 \\\\ud800 \\ud83d"]',
            "not JSON: half a surrogate pair, which is no character, at line 1, column 24 (byte 23)",
        ),
        (
            b'{"\\udc00": 1}',
            "not JSON: half a surrogate pair, which is no character, at line 1, column 3 (byte 2)",
        ),
        (b"[" * 200, "nested more than 128 levels deep at line 1, column 129 (byte 128)"),
    ],
)
def test_malformed_bodies_say_what_and_where(body, detail, monkeypatch):
    """In our words, the same whatever the version of Python: its decoder is not asked."""
    monkeypatch.setattr("fastdist.packet._DECODER", None)
    error = refusal(body)
    assert error.reason == "malformed"
    assert error.errors == []
    assert error.detail == detail


@pytest.mark.parametrize(("opening", "closing"), ["[]", "{}"])
@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 5_000, 100_000])
def test_depth_is_limited_not_by_the_stack(opening, closing, depth):
    """The packet is the first level, what nests in its member the rest."""
    inner = ('{"":' if opening == "{" else "[") * (depth - 1) + opening + closing + closing * (depth - 1)
    body = f'{{"emitterId": "[[[{{", "messages": [{{"message": "]"}}], "x": {inner}}}'.encode()
    if depth < MAX_DEPTH:
        assert check(body).messages == 1
    else:
        error = refusal(body)
        assert error.reason == "malformed"
        assert error.detail.startswith("nested more than 128 levels deep at line 1, ")


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"":' * 100_000, b"]" * 100_000, b'"' * 100_000, b"[[[" + b"\\" * 99]
)
def test_senseless_nesting_is_malformed(body):
    assert refusal(body).reason == "malformed"


@pytest.mark.parametrize(
    "number", ["9" * 5_000, "-" + "9" * 5_000, "1" * 400 + ".5", "1e99999", "0." + "0" * 5_000 + "1"]
)
def test_numbers_of_any_size_are_json(number):
    assert check(f'{{"emitterId": "e", "messages": [{{"message": "", "x": {number}}}]}}'.encode()).messages == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([], [("", "expected an object, got an array")]),
        ("packet", [("", "expected an object, got a string")]),
        (1, [("", "expected an object, got a number")]),
        (None, [("", "expected an object, got null")]),
        (True, [("", "expected an object, got a boolean")]),
        ({}, [("/emitterId", "is required"), ("/messages", "is required")]),
        (packet(emitterId=""), [("/emitterId", "expected 1 to 256 characters, got 0")]),
        (packet(emitterId="x" * 257), [("/emitterId", "expected 1 to 256 characters, got 257")]),
        (packet(emitterId="\U0001f600" * 257), [("/emitterId", "expected 1 to 256 characters, got 257")]),
        (packet(emitterId=5), [("/emitterId", "expected a string, got a number")]),
        (packet(emitterId=None), [("/emitterId", "expected a string, got null")]),
        (packet(metadata=None), [("/metadata", "expected an object, got null")]),
        (packet(metadata=[]), [("/metadata", "expected an object, got an array")]),
        (packet(messages=[]), [("/messages", "expected at least one message")]),
        (packet(messages={"message": "m"}), [("/messages", "expected an array, got an object")]),
        (packet(messages=None), [("/messages", "expected an array, got null")]),
        (packet(messages=["m"]), [("/messages/0", "expected an object, got a string")]),
        (packet(messages=[{}]), [("/messages/0/message", "is required")]),
        (packet(messages=[{"Message": "m"}]), [("/messages/0/message", "is required")]),
        (one_message(message=None), [("/messages/0/message", "expected a string, got null")]),
        (one_message(message=1.5), [("/messages/0/message", "expected a string, got a number")]),
        (one_message(timestamp=1700000000), [("/messages/0/timestamp", "expected a string, got a number")]),
        (one_message(level=False), [("/messages/0/level", "expected a string, got a boolean")]),
        (one_message(source=[]), [("/messages/0/source", "expected a string, got an array")]),
        (one_message(metadata="x"), [("/messages/0/metadata", "expected an object, got a string")]),
        (
            {"messages": [MESSAGE, {"level": 1}, 7], "metadata": 1},
            [
                ("/emitterId", "is required"),
                ("/metadata", "expected an object, got a number"),
                ("/messages/1/level", "expected a string, got a number"),
                ("/messages/1/message", "is required"),
                ("/messages/2", "expected an object, got a number"),
            ],
        ),
    ],
)
def test_every_fault_is_pointed_at(body, expected):
    assert faults(body) == expected


def test_detail_has_first_fault_and_count():
    assert refusal({"messages": [{}]}).detail == "/emitterId: is required (and 1 more)"
    assert refusal([]).detail == "the body: expected an object, got an array"


def test_reported_faults_are_limited():
    assert pointers(packet(messages=[{}] * 1000)) == [f"/messages/{i}/message" for i in range(MAX_ERRORS)]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"emitterId":"a","emitterId":"b","messages":[{"message":""}]}', "/emitterId"),
        (b'{"emitterId":"a","messages":[{"message":""}],"messages":[{"message":""}]}', "/messages"),
        (b'{"metadata":{},"emitterId":"a","messages":[{"message":""}],"metadata":{}}', "/metadata"),
        (b'{"emitterId":"a","messages":[{"message":""},{"message":"1","message":"2"}]}', "/messages/1/message"),
        (b'{"emitterId":"a","messages":[{"message":"1","\\u006dessage":"2"}]}', "/messages/0/message"),
        (b'{"emitterId":"a","messages":[{"message":"","level":"","level":"","level":""}]}', "/messages/0/level"),
        (b'{"emitterId":"a","messages":[{"message":"","source":"","source":""}]}', "/messages/0/source"),
        (b'{"emitterId":"a","messages":[{"message":"","timestamp":"","timestamp":""}]}', "/messages/0/timestamp"),
        (b'{"emitterId":"a","messages":[{"message":"","metadata":{},"metadata":{}}]}', "/messages/0/metadata"),
    ],
)
def test_known_member_must_not_appear_twice(body, pointer):
    """Parsers take the first or the last: an analyzer might read another packet than the one that was checked."""
    assert faults(body) == [(pointer, "appears twice")]


def test_unknown_members_may_be_anything():
    body = (
        b'{"x":1,"x":2,"emitterId":"a","messages":[{"message":"","y":null,"y":[],"metadata":{"z":1,"z":2}}],"level":3}'
    )
    assert check(body).messages == 1


ACCEPTED_TIMESTAMPS = words("""
    2026-01-31T12:34:56Z 2026-01-31t12:34:56z 2026-01-31T12:34:56.7Z 2026-01-31T12:34:56.123456789012Z
    2026-01-31T12:34:56+00:00 2026-01-31T12:34:56-23:59 2026-01-31T12:34:56.5+05:30 2024-02-29T00:00:00Z
    2000-02-29T00:00:00Z 0000-01-01T00:00:00Z 0000-02-29T00:00:00Z 9999-12-31T23:59:59.999Z 2016-12-31T23:59:60Z
    2016-12-31T15:59:60-08:00 2017-01-01T05:29:60.25+05:30 2026-04-30T23:00:00z
""")
REFUSED_TIMESTAMPS = words("""
    2026-01-31T12:34:56 2026-01-31T12:34Z 2026-01-31 2026-01-31T12:34:56.Z 2026-01-31T12:34:56,5Z
    2026-1-31T12:34:56Z 2026-01-31T1:34:56Z 26-01-31T12:34:56Z 2026/01/31T12:34:56Z 2026-01-32T00:00:00Z
    2026-02-29T00:00:00Z 1900-02-29T00:00:00Z 2026-04-31T00:00:00Z 2026-13-01T00:00:00Z 2026-00-01T00:00:00Z
    2026-01-00T00:00:00Z 2026-01-31T24:00:00Z 2026-01-31T12:60:00Z 2026-01-31T12:34:61Z 2026-01-31T12:34:60Z
    2016-12-31T23:59:60+01:00 2026-01-31T12:34:56+24:00 2026-01-31T12:34:56+01:60 2026-01-31T12:34:56+0100
    2026-01-31T12:34:56+01 2026-01-31T12:34:56ZZ 2026-01-31T12:34:56Z+01:00 x2026-01-31T12:34:56Z
    2026-01-31T12:34:56.5 +2026-01-31T12:34:56Z -026-01-31T12:34:56Z 1769862896 2026-01-31T12-34-56Z
    2026-W05-6T12:34:56Z
    2026:01:31T12:34:56Z 2026-01-31_12:34:56Z
""")
REFUSED_TIMESTAMPS += ["", " ", "2026-01-31 12:34:56Z", "2026-01-31T12:34:56Z\n", " 2026-01-31T12:34:56Z", "Z" * 25]
REFUSED_TIMESTAMPS += [
    "\0" * 20,
    "\uff12026-01-31T12:34:56Z",
    "2026-01-31T12:34:5\u0663Z",
    "2026-01-31T12:34:56\u221201:00",
]


@pytest.mark.parametrize("timestamp", ACCEPTED_TIMESTAMPS)
def test_strict_accepts_rfc_3339_timestamps(timestamp):
    assert check(encode(one_message(level="info", timestamp=timestamp)), strict=True).messages == 1


@pytest.mark.parametrize("timestamp", REFUSED_TIMESTAMPS)
def test_strict_refuses_other_timestamps(timestamp):
    body = encode(one_message(level="info", timestamp=timestamp))
    assert check(body).messages == 1
    assert pointers(body, strict=True) == ["/messages/0/timestamp"]


ACCEPTED_LEVELS = words("trace debug info warn warning error fatal critical INFO Warn wARNING CRITICAL")
REFUSED_LEVELS = [
    "",
    "notice",
    "information",
    "err",
    "inf",
    "info ",
    " info",
    "infos",
    "warn\0",
    "warn   ",
    "\u0131nfo",
    "5",
]


@pytest.mark.parametrize("level", ACCEPTED_LEVELS)
def test_strict_accepts_levels_in_any_case(level):
    assert check(encode(one_message(level=level, timestamp=ACCEPTED_TIMESTAMPS[0])), strict=True).messages == 1


@pytest.mark.parametrize("level", REFUSED_LEVELS)
def test_strict_refuses_other_levels(level):
    body = encode(one_message(level=level, timestamp=ACCEPTED_TIMESTAMPS[0]))
    assert check(body).messages == 1
    assert pointers(body, strict=True) == ["/messages/0/level"]


def test_strict_requires_timestamp_and_level():
    assert pointers(packet(), strict=True) == ["/messages/0/timestamp", "/messages/0/level"]
    assert pointers(one_message(level=1, timestamp=None), strict=True) == ["/messages/0/timestamp", "/messages/0/level"]


TYPES = st.sampled_from([None, True, 1, 0.5, "", "x", [], [1], {}, {"message": "m"}, [{"message": "m", "x": None}]])


@given(
    st.dictionaries(st.sampled_from(["emitterId", "messages", "metadata", "other"]), TYPES),
    st.lists(
        st.dictionaries(st.sampled_from(["message", "timestamp", "level", "source", "metadata", "emitterId"]), TYPES),
    ),
)
def test_the_structs_say_the_same_as_check(members, messages):
    """The schema stands in the code twice: as structs to be read and generated from, and as the tables of check."""
    candidate = members if "messages" in members else members | {"messages": messages}
    body = encode(candidate)
    try:
        decoded = msgspec.json.decode(body, type=LogPacket)
    except msgspec.ValidationError:
        assert refusal(body).reason == "invalid"
    else:
        assert check(body) == (len(decoded.messages), hash_text(decoded.emitter_id.encode()))


def test_keys_are_counted_only_as_needed(monkeypatch):
    """Counting those of every object of ten megabytes took five seconds, in which a worker did nothing else."""
    counted = []
    monkeypatch.setattr("fastdist.packet.Counter", lambda keys: counted.append(1) or Counter(keys))
    twice = b'{"a":1,"a":2}'
    check(PACKET_WITH % b",".join([twice] * 1000))
    assert counted == []
    with pytest.raises(PacketError, match="/emitterId: appears twice"):
        check(b'{"emitterId":"e","emitterId":"f","messages":[{"message":"m","message":"n"}]}')
    assert len(counted) == 2


PACKET_WITH = b'{"emitterId":"e","messages":[{"message":"m"}],"x":[%b]}'


# ---- large bodies


GOOD = b'{"message":"m"},'
ROOM = MAX_EXPLAINED // len(GOOD)


def large(messages: bytes = GOOD[:-1], *, before: bytes = b"", behind: bytes = b"", emitter: bytes = b'"e"') -> bytes:
    """Return a body that is too large to be decoded whole, whose messages end with these."""
    return b'{%b"emitterId":%b,"messages":[%b%b]%b}' % (before, emitter, GOOD * 3 * ROOM, messages, behind)


def whole(body: bytes, monkeypatch: pytest.MonkeyPatch, *, strict: bool = False) -> PacketError:
    """Return what is said of it if it is decoded whole."""
    with monkeypatch.context() as patch:
        patch.setattr("fastdist.packet.MAX_EXPLAINED", 1 << 60)
        return refusal(body, strict=strict)


def test_large_packets_accepted_like_small():
    for body in (large(), large(emitter=b'"\\u0065"'), large(behind=b',"x":' + b"[" * 127 + b"]" * 127 + b"\n")):
        assert check(body) == Facts(3 * ROOM + 1, hash_text(b"e"))


@pytest.mark.parametrize(
    "body",
    [
        large(b"{}"),
        large(b'{"message":1}'),
        large(b'{"message":"m","message":"m"}'),
        large(b'{"message":"m","level":1,"metadata":[]}'),
        large(b"7"),
        large(b'"x"'),
        large(b"null"),
        large(emitter=b"1"),
        large(emitter=b'""'),
        large(emitter=b'"' + b"x" * 257 + b'"'),
        large(emitter=b'"' + b"\\ud83d\\ude00" * 257 + b'"'),
        large(behind=b',"emitterId":"e"'),
        large(behind=b',"messages":1'),
        large(behind=b',"metadata":[]'),
        large(behind=b',"met\\u0061data":1'),
        large().replace(b'"emitterId"', b'"emitter"'),
        large().replace(b'"messages"', b'"message"'),
        large(behind=b',"metadata":{},"metadata":{}'),
        large(behind=b',"metadata"%b:%b1' % (b" " * MAX_EXPLAINED, b" " * MAX_EXPLAINED)),
        large(behind=b',"metadata":[%b0]' % (b"0," * MAX_EXPLAINED)),
        large(behind=b',"metadata":"%b"' % (b"x" * 2 * MAX_EXPLAINED)),
        b'{"emitterId":"e","messages":[],"x":"%b"}' % (b"x" * 3 * MAX_EXPLAINED),
        b'{"emitterId":"e","x":"%b"}' % (b"x" * 3 * MAX_EXPLAINED),
        b" [%b0]" % (b"0," * MAX_EXPLAINED),
        b'"%b"' % (b"x" * 2 * MAX_EXPLAINED),
        *(value + b" " * 2 * MAX_EXPLAINED for value in (b"1", b"-1", b"true", b"false", b"null", b"{}")),
    ],
    ids=map(str, itertools.count()),
)
def test_first_large_body_fault_is_located(body, monkeypatch):
    error, expected = refusal(body), whole(body, monkeypatch)
    assert error.reason == expected.reason == "invalid"
    assert error.errors[0] == expected.errors[0]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (large(b'{"x":"%b"}' % (b"x" * 2 * MAX_EXPLAINED)), f"/messages/{3 * ROOM}"),
        (large(emitter=b'"%b"' % (b"x" * 2 * MAX_EXPLAINED)), "/emitterId"),
    ],
)
def test_fault_too_far_names_its_parent(body, pointer):
    error = refusal(body)
    assert error.reason == "invalid"
    assert error.detail == f"{pointer}: what is wrong is over {MAX_EXPLAINED} bytes behind its beginning"
    assert [fault["pointer"] for fault in error.errors] == [pointer]


@pytest.mark.parametrize(("what", "message"), [(b'"emitterId"', None), (b'"x"', None), (b'{"message"', 0)])
def test_large_body_without_fault_is_refused(what, message, monkeypatch):
    body = large(before=b'"x":1,')
    monkeypatch.setattr("fastdist.packet.locate", lambda body, _strict: (body.index(what), message, []))
    assert faults(body) == [("", "does not conform to the schema")]


@pytest.mark.parametrize("level", ["nonsense", "\\u0000"])
def test_strict_large_body_fault_is_located(level, monkeypatch):
    good = b'{"message":"m","timestamp":"2026-01-31T12:34:56Z","level":"%b"}'
    messages = b",".join([*[good % b"info"] * ROOM, good % level.encode()])
    body = b'{"emitterId":"e","messages":[%b]}' % messages
    error = refusal(body, strict=True)
    assert error.errors == whole(body, monkeypatch, strict=True).errors
    assert [fault["pointer"] for fault in error.errors] == [f"/messages/{ROOM}/level"]


@pytest.mark.parametrize(
    ("end", "what", "column"),
    [
        (b"tru]}", "not JSON: expected a value", 1),
        (b'"\xff', "not UTF-8", 2),
        (b'"x\xf0\x9f\x98', "not UTF-8", 3),
        (b'"\\ud83d"', "not JSON: half a surrogate pair, which is no character,", 2),
        (b'"x', "not JSON: unterminated string, which begins", 1),
        (b"1}", "not JSON: expected a comma or a closing bracket", 2),
        (b"1]};", "not JSON: expected the end of the body", 4),
    ],
)
def test_malformed_large_body_has_position(end, what, column):
    """Before what keeps it from being a packet, and wherever it stands."""
    before = b'{"emitterId":7,"x":["%b",\n' % ("é".encode() * MAX_EXPLAINED)
    error = refusal(before + end)
    assert error.reason == "malformed"
    assert error.detail == f"{what} at line 2, column {column} (byte {len(before) + column - 1})"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 10**6,
        b"{" * 10**6,
        b'{"x":' * 10**6,
        b'"' * 10**6,
        b"[" + b"0," * 10**6 + b"0",
        b"\xff" * 10**6,
        b"{" + b" " * 10**6,
        b" " * 10**6,
        large() + b"x",
        large() + large(),
        large()[:-1],
        large()[1:],
        large(behind=b',"x":' + b"[" * 128 + b"]" * 128),
        large(b'{"message":"m","x":' + b"[" * 126 + b"]" * 126 + b"}"),
        large(b'{"message":"%b\\x"}' % (b"x" * 2 * MAX_EXPLAINED)),
        large(b'{"message":"%b' % ("é".encode() * MAX_EXPLAINED)),
        large(behind=b',"x":"%b"' % (b"\\ud83d\\ude00" * MAX_EXPLAINED + b"\\ud83d")),
        large(behind=b',"%b"' % (b"k" * 2 * MAX_EXPLAINED)),
        large(behind=b',"x":[%b' % (b"[],{}," * MAX_EXPLAINED)),
    ],
    ids=map(str, itertools.count()),
)
def test_large_body_diagnosis_uses_one_piece(body):
    """To decode ten megabytes took two seconds and 400 MB, while the worker did nothing else."""
    tracemalloc.start()
    try:
        error = refusal(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.reason == "malformed"
    assert len(error.detail) < 200
    assert peak < 60 * MAX_EXPLAINED


PIECES = [
    GOOD * 5,
    b"{}",
    b"]",
    b"[",
    b"{",
    b"}",
    b",",
    b'"',
    b"\\",
    b"\xff",
    b" ",
    b'"emitterId":"e"',
    b'"messages":[',
    b"0",
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 30))
def test_large_body_is_judged_as_if_decoded(pieces, where, gone):
    body = large(b'{"message":"m","metadata":{"a":[1,{}]}}', behind=b',"x":[{"y":"z"}]')
    at = int(where * len(body))
    body = body[:at] + b"".join(pieces) + body[at + gone :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdist.packet.MAX_EXPLAINED", 1 << 60)
        expected = outcome(body)
    assert outcome(body) == expected


def outcome(body: bytes) -> Facts | None:
    try:
        return check(body)
    except PacketError:
        return None
