"""The scanner against its models, json and packet.check: the same for all bytes, and within its buffer."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdist import packet
from fastdist._core import hash_text, malformed, scan
from fastdist.errors import PacketError
from fastdist.packet import check


@pytest.fixture(autouse=True, scope="module")
def the_model_itself():
    """Have also large bodies decoded: of those the model would ask the scanner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packet, "MAX_EXPLAINED", 1 << 60)
        yield


def verdict(body: bytes, *, strict: bool) -> tuple[int, int] | None:
    try:
        return check(body, strict=strict)
    except PacketError:
        return None


def is_json(body: bytes) -> bool:
    """Whether Python's decoder takes it for JSON, without what is refused here on purpose."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=tuple, parse_int=float, parse_constant=int)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair
        return depth(value) <= 128
    except (ValueError, RecursionError):
        return False


def depth(value: Any) -> int:
    """How many containers there are within each other. Objects are tuples of pairs."""
    if isinstance(value, tuple):
        value = [member for _, member in value]
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def assert_right(body: bytes) -> None:
    assert (malformed(body) is None) == is_json(body)
    for strict in (False, True):
        assert scan(body, strict) == verdict(body, strict=strict)


def words(text: str) -> list[str]:
    return text.split()


# ----------------------------------------------------------------------------------------------------- the JSON grammar

ACCEPTED = [
    *words(
        r"""
        0 -0 1 -1 9 10 1234567890 0.0 -0.5 1.25 1e1 1E1 1e+1 1e-1 1E+01 0e0 0E-0 -0.0e-0 1.5e300 123.456e-78 1e400
        true false null [] {} [[]] [{}] {"":{}} [1] [1,2] [[],[]] [{},{}] [true,false,null] {"a":1,"a":2} ["[{]},:'"]
        "" "/" "\"\\\/\b\f\n\r\t" "\u0000\u001f\u0022\u005c\uffff\ufffe\uabcd\uabcd" "\ud7ff\ue000" "\\ud800" "\\\\"
        "\ud83d\ude00\ud83d\ude00\udbff\udfff\ud800\udc00" ["\\","\""] {"\u0061\n":"\u0062"}
        """
    ),
    *["9" * 400, "-" + "9" * 5000, "0." + "0" * 400 + "1"],
    *[" [ ] ", "{ }", "\t[\n1\r,\r\n 2\t]\n", '{ "a" : [ 1 , { "b" : null } ] , "c" : "d" }', '" "', '"\x7f"'],
    *["[" * 60 + "]" * 60, '{"":' * 60 + "1" + "}" * 60, '[{"":' * 30 + "[]" + "}]" * 30, "[" + "[],{}," * 500 + "0]"],
    *[
        '"' + r"\n" * 100 + '"',
        '"' + "x" * 1000 + '"',
        '{"' + "k" * 100 + '":0}',
        *(f'"{"x" * n}\\""' for n in range(18)),
    ],
    '"\u00e9 \u00df \x80 \u07ff \u0800 \ud7ff \ue000 \ufeff \ufffd \uffff \U00010000 \U0001f600 \U0010ffff"',
    '"' + "\u6c49\u5b57" * 50 + "a" + "\u00e9" * 50 + '"',
    '{"\u043a\u043b\u044e\u0447":{"\u9375":[]}}',
]
REFUSED = [
    *words(
        r"""
        , : 1, ,1 []] [], {}} +1 00 01 -01 -00 1. .5 -.5 - -- -a 1e 1e+ 1e- 1E+ 1.e1 1.5. 1.5.5 1ee1 1e1.5 1e1e1 0x1F
        1_000 1f 0b1 1,5 1a 0a -0a 1-1 1+1 0e 0e+ 0. -1. 2.e3 012 1e0x2 99n NaN nan -NaN Infinity -Infinity +Infinity
        True TRUE tru truee t nul nulll Null n fals falsee False undefined None truefalse nullnull true1 'a' a inf -inf
        [ ] [1 [1, [1,] [,] [,1] [1,,2] [1}] [1:2] [[] [} [1;2] [(1)] [1,true,] ["a" ["a] [1]//comment [/**/1]
        { } {a:1} {1:1} {'a':1} {"a"} {"a":} {"a":1,} {"a",1} {"a":1:2} {,} {"a":1,,"b":2} {:1} {"a":1,b:2} {"a"::1}
        {"a":1 {"a":1] {"a {"a" {"a": {null:1} {[]:1} {"a":1"b":2} {"a":1;"b":2} {"a"=1} {"a":1}} {{}} {"\ud800":1}
        " "a a" '' "\" "\x41" "\a" "\v" "\0" "\'" "\U0041" "\N" "\u" "\u0" "\u00" "\u004" "\u004g" "\u+041" "\u-041"
        "\u0x41" "\uG000" "\u{41}" "\u_123" "\ud83d\u" "\ud83d\ude0" "\ud83d\ude0g" "\ud800" "\uDBFF" "\udc00" "\uDFFF"
        "\ud800\ud800" "\udc00\ud800" "\ud83dx\ude00" "\ud83d\n" "\ud83d\\ude00" "\ud83d\u0041" "\ud83d\ue000"
        "\ud83d\ud83d\ude00"
        """
    ),
    *["", " ", "1 2", "1 true", "[] []", '"a" "b"', "\0", "1\0", "\ufeff1"],
    *["- 1", "1 .5", "1e 5", "1e\u0663", "\uff11"],
    *["[1 2]", "[1\v]", "[1\f]", "[\u00a01]", "[\u20281]", "[1\0]", "[1, # comment\n 2]", '{"a" 1}', '{"a":1 "b":2}'],
    *['"a\n"', '"a\t"', '"\0"', '"\x1f"', '"\x01' + "x" * 20 + '"', '"' + "x" * 20 + '\r"'],
    *[r'"\ "', '"\\\n"', '"\\\u00e9"'],
    *[r'"\u00 4"', '"\\u\uff10\uff1041"', r'"\ud83d \ude00"'],
]
BROKEN_UTF8 = [
    bytes.fromhex(sequence)
    for sequence in words(
        """
        80 bf c2 df e0 ef f0 f4 e282 f09f98 c3a9c3 787878787878787878787878787878c3 c328 e28228 e228a1 f09f9828 f09f2880
        f0289880 c35c7530303431 e2825c6e c3a980 fe ff f888808080 c080 c0af c1bf e08080 e09fbf f0808080 f08fbfbf eda080
        edbfbf eda0bdedb880 f4908080 f5808080
        """
    )
]
REFUSED_BYTES = [
    *(b'"' + sequence + b'"' for sequence in BROKEN_UTF8),
    *(b'{"' + sequence + b'":1}' for sequence in BROKEN_UTF8),
    *[b"\xc3\xa9", b"[\xff]", b"1\xa0", b'\xff\xfe"\x00', b'"\xc3'],
]

PLACES = [
    b'{"emitterId":"e","messages":[{"message":"m"}],"metadata":{"x":%b}}',
    b'{"emitterId":"e","messages":[{"message":"m"}],"x":%b}',
    b'{"x":%b,"emitterId":"e","messages":[{"message":"m"}]}',
    b'{"messages":[{"message":"m","metadata":{"x":[0,{"y":%b}]}}],"emitterId":"e"}',
    b'{"messages":[{"x":%b,"message":"m"},{"message":"m","x":%b}],"emitterId":"e"}',
]


def bodies_with(value: bytes) -> list[bytes]:
    return [place.replace(b"%b", value) for place in PLACES]


def assert_generic_json(body: bytes) -> None:
    """A second opinion; this decoder has no number for 1e400, which the grammar has."""
    try:
        msgspec.json.decode(body)
    except msgspec.ValidationError as error:
        assert "out of range" in str(error)  # noqa: PT017 - the other outcome is no exception


@pytest.mark.parametrize("value", ACCEPTED)
def test_json_is_accepted_wherever_it_stands(value):
    for body in bodies_with(value.encode()):
        facts = scan(body)
        assert facts == check(body)
        assert facts == (body.count(b'"message":'), hash_text(b"e"))
        assert_generic_json(body)


@pytest.mark.parametrize("value", [*(value.encode() for value in REFUSED), *REFUSED_BYTES])
def test_invalid_json_is_refused_anywhere(value):
    for body in bodies_with(value):
        assert scan(body) is None
        with pytest.raises(PacketError) as caught:
            check(body)
        assert caught.value.reason == "malformed"


@pytest.mark.parametrize("before", ["", " ", "\t\r\n ", "\ufeff", "\0", "x", ",", "{", "[", " " * 100])
@pytest.mark.parametrize("after", ["", " ", "\n", "\r\n\t ", "\0", "x", ",", "}", "]", "{}", " " * 100, " }"])
def test_what_stands_around_a_packet(before, after):
    body = before + '{"emitterId":"a","messages":[{"message":""}]}' + after
    assert (scan(body.encode()) is not None) == (before + after).isspace() or not before + after
    assert_right(body.encode())


# ----------------------------------------------------------------------------------------------------------- the schema

MINIMAL = b'{"emitterId":"a","messages":[{"message":""}]}'
TYPICAL = (
    b'{"emitterId": "web-1", "messages": [{"timestamp": "2026-01-31T12:34:56.789Z", "level": "info", "message": "a \\"b'
    b'\\" \xc3\xa9", "source": "api", "metadata": {"a": [1, -2.5e+3, true], "b": null}}, {"level":"WARN","message":"m",'
    b'"x":0,"timestamp":"2016-12-31t23:59:60+00:00"}], "metadata": {"zone": "\\ud83d\\ude00"}, "other": {"x": [{}]}}'
)


def test_the_shortest_packet():
    assert scan(MINIMAL) == check(MINIMAL) == (1, hash_text(b"a"))
    assert scan(MINIMAL[:17] + b"  " + MINIMAL[17:] + b"\n ") == (1, hash_text(b"a"))


@pytest.mark.parametrize("text", ["", "x", "\xe9", "\u6c49", "\U0001f600"])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 512, 1024, 1025])
def test_an_emitter_has_1_to_256_characters(text, length):
    body = json.dumps({"emitterId": text * length, "messages": [{"message": ""}]}, ensure_ascii=False).encode()
    assert scan(body) == verdict(body, strict=False)


WRONG = ["null", "true", "1", '"x"', "[]", "{}", "[{}]", '[""]', "-", ""]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("key", ["emitterId", "messages", "metadata"])
def test_members_of_packet_have_their_types(key, value):
    members = {"emitterId": '"e"', "messages": '[{"message":"m"}]', "metadata": "{}", key: value}
    for order in itertools.permutations(members):
        body = "{" + ",".join(f'"{name}":{members[name]}' for name in order) + "}"
        assert scan(body.encode()) == verdict(body.encode(), strict=False)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("key", ["message", "timestamp", "level", "source", "metadata"])
def test_members_of_message_have_their_types(key, value):
    for members in itertools.permutations({"message": '"m"', "source": '"s"', key: value}.items()):
        message = "{" + ",".join(f'"{name}":{text}' for name, text in members) + "}"
        for body in (f'{{"emitterId":"e","messages":[{message}]}}', f'{{"messages":[{message}],"emitterId":"e"}}'):
            assert scan(body.encode()) == verdict(body.encode(), strict=False)


@pytest.mark.parametrize("key", ["emitterId", "messages", "metadata", "other"])
def test_a_packet_has_each_known_member_once(key):
    members = {"emitterId": '"e"', "messages": '[{"message":"m"}]', "metadata": "{}", "other": "1"}
    members.pop(key)
    without = "{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}"
    twice = MINIMAL.decode()[:-1] + f',"{key}":"x","{key}":{{}}}}'
    for body in (without, twice):
        assert scan(body.encode()) == verdict(body.encode(), strict=False)


@pytest.mark.parametrize("key", ["message", "timestamp", "level", "source", "metadata", "other"])
def test_message_has_each_known_member_once(key):
    value = "{}" if key == "metadata" else '"x"'
    twice = f'{{"emitterId":"a","messages":[{{"message":"m","{key}":{value},"{key}":{value}}}]}}'.encode()
    assert scan(twice) == verdict(twice, strict=False)
    assert (scan(twice) is None) == (key != "other")


@pytest.mark.parametrize("key", [r"\u006dessage", r"m\u0065ssage", r"messag\u0065", r"\u006d\u0065\u0073\u0073age"])
def test_escaped_known_key_is_recognized(key):
    for message in (f'{{"{key}":"m"}}', f'{{"message":"m","{key}":"n"}}', f'{{"message":"m","{key}":1}}'):
        assert_right(f'{{"emitterId":"a","messages":[{message}]}}'.encode())
    assert scan(f'{{"emitterId":"a","messages":[{{"{key}":"m"}}]}}'.encode()) == (1, hash_text(b"a"))


@pytest.mark.parametrize(
    "name", ["emitterId", "messages", "metadata", "message", "timestamp", "level", "source", "levels"]
)
@pytest.mark.parametrize("value", ['"x"', "{}", '[{"message":"m"}]', "1"])
def test_every_known_key_in_every_disguise(name, value):
    for position, c in enumerate(name):
        key = f"{name[:position]}\\u{ord(c):04x}{name[position + 1 :]}"
        assert_right(f'{{"emitterId":"a","messages":[{{"message":"m","{key}":{value}}}]}}'.encode())
        assert_right(f'{{"emitterId":"a","messages":[{{"message":"m"}}],"{key}":{value}}}'.encode())
        assert_right(f'{{"{key}":{value},"messages":[{{"{key}":{value}}}],"emitterId":"a"}}'.encode())


@pytest.mark.parametrize(
    "text", ["x", "\0", '"', "\x7f", "\x80", "\xe9", "\u07ff", "\u0800", "\uffff", "\U00010000", "\U0010ffff"]
)
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 512, 1024, 1025, 20000])
def test_an_emitter_with_escapes_is_the_same(text, length):
    escaped = "".join(f"\\u{unit}" for unit in text.encode("utf-16-be").hex(" ", 2).split())
    for spelled in (escaped * length, "x" + escaped * (length - 1), escaped + "x" * (length - 1)):
        body = f'{{"emitterId":"{spelled}","messages":[{{"message":""}}]}}'.encode()
        assert scan(body) == verdict(body, strict=False)


@pytest.mark.parametrize("escape", list('"\\/bfnrt'))
def test_short_escapes_of_an_emitter(escape):
    body = f'{{"emitterId":"a\\{escape}b","messages":[{{"message":""}}]}}'.encode()
    assert scan(body) == verdict(body, strict=False) == (1, hash_text(json.loads(f'"a\\{escape}b"').encode()))


@pytest.mark.parametrize(
    "key", ["Message", "messag", "messages", "message ", " message", "mess\u00e4ge", "message\u0301", ""]
)
def test_other_keys_are_unknown_ones(key):
    body = json.dumps({"emitterId": "a", "messages": [{"message": "m", key: 1}]}, ensure_ascii=False).encode()
    assert scan(body) == check(body)


@pytest.mark.parametrize("count", [1, 2, 3, 100, 5000])
def test_messages_are_counted(count):
    body = json.dumps({"messages": [{"message": "m"}] * count, "emitterId": "e"}).encode()
    assert scan(body) == (count, hash_text(b"e"))


@pytest.mark.parametrize("shape", ["[", '{"":', '[{"":'])
def test_depth_does_not_use_the_stack(shape):
    closing = "".join({"[": "]", "{": "}"}[c] for c in reversed(shape) if c in "[{")
    for depth in [*range(20, 140), 100_000]:
        for place in PLACES:
            value = (shape * depth + "0" + closing * depth).encode()
            if depth < 140 or place is PLACES[0]:
                assert_right(place.replace(b"%b", value))
                assert scan(place.replace(b"%b", value[: len(value) // 2])) is None


# --------------------------------------------------------------------------------------------------------------- strict

STRICT = '{"emitterId":"a","messages":[{"message":"m","timestamp":"%s","level":"%s"}]}'
EDGES = words("00 01 02 03 04 06 09 11 12 13 19 23 24 28 29 30 31 32 58 59 60 61 99 0a a0 /0 :0 -1")


@given(
    st.sampled_from(["2024", "2023", "1900", "2000", "0000", "9999", "202x", "20 4"]),
    st.lists(st.sampled_from(EDGES), min_size=5, max_size=5),
    st.sampled_from(["T", "t", "T", "T", " ", "4", "\u0074"]),
    st.sampled_from(["", "", ".1", ".123456789", ".", ",1", ".x"]),
    st.one_of(
        st.sampled_from(["Z", "z", "", "ZZ", "Y", "+", "+0100", "+01", "z00:00"]),
        st.tuples(st.sampled_from("+-*"), st.sampled_from(EDGES), st.sampled_from(EDGES)).map(
            lambda t: f"{t[0]}{t[1]}:{t[2]}"
        ),
    ),
)
@example("2016", ["12", "31", "23", "59", "60"], "T", "", "Z")
@example("2016", ["12", "31", "00", "00", "60"], "T", ".5", "+00:01")
@example("2016", ["12", "31", "23", "58", "60"], "T", "", "-23:59")
@settings(max_examples=5 * settings().max_examples, deadline=None)
def test_strict_timestamps(year, pairs, separator, fraction, offset):
    month, day, hour, minute, second = pairs
    body = (STRICT % (f"{year}-{month}-{day}{separator}{hour}:{minute}:{second}{fraction}{offset}", "info")).encode()
    assert scan(body, True) == verdict(body, strict=True)


def test_strict_timestamps_know_the_calendar():
    for year, month, day in itertools.product([2023, 2024, 1900, 2000], range(14), range(33)):
        body = (STRICT % (f"{year}-{month:02}-{day:02}T00:00:00Z", "info")).encode()
        assert scan(body, True) == verdict(body, strict=True)


TIMESTAMP = "2016-12-31T23:59:60.125-00:00"


@pytest.mark.parametrize("timestamp", [TIMESTAMP, "2024-12-30T20:50:50+20:50", "2000-02-20t20:50:50.0z"])
def test_strict_timestamps_at_every_byte(timestamp):
    for position in range(len(timestamp)):
        for c in map(chr, range(32, 127)):
            for rest in (timestamp[position + 1 :], timestamp[position:]):
                body = (STRICT % (json.dumps(timestamp[:position] + c + rest)[1:-1], "info")).encode()
                assert scan(body, True) == verdict(body, strict=True)


def test_strict_levels_at_every_byte():
    for level in ("trace", "debug", "info", "warn", "warning", "error", "fatal", "critical"):
        variants = {
            level[:i] + c + level[i + d :] for i in range(len(level) + 1) for c in map(chr, range(128)) for d in (0, 1)
        }
        for text in variants | {level.upper(), level.title(), level * 2, level + "    ", ""}:
            body = (STRICT % (TIMESTAMP, json.dumps(text)[1:-1])).encode()
            assert scan(body, True) == verdict(body, strict=True)


def spelled(text, positions):
    return "".join(f"\\u{ord(c):04X}" if i in positions else c for i, c in enumerate(text))


@pytest.mark.parametrize(
    "timestamp", [TIMESTAMP, "2024-12-30T20:50:50+20:50", "2000-02-20t20:50:50.0z", "2000-02-30T00:00:00Z"]
)
def test_strict_timestamps_with_escapes(timestamp):
    for position in range(len(timestamp)):
        for positions in ({position}, {*range(position + 1)}, {*range(position, len(timestamp))}):
            assert_right((STRICT % (spelled(timestamp, positions), "info")).encode())
        assert_right((STRICT % (timestamp[:position] + "\\u0000" + timestamp[position:], "info")).encode())


@pytest.mark.parametrize("end", ["Z", "+01:30", "+011111111111:30", "", "x", "1", "é" * 30])
@pytest.mark.parametrize("digits", [1, 7, 8, 9, 30, 60, 1000])
def test_strict_timestamps_escapes_fractions(end, digits):
    for start in (
        "2016-12-31T23:59:5",
        "2016-12-31T23:59:60.",
        "2016-12-31T23:59:00.",
        "1" * 30,
        "\\u0032016-12-31T23:59:59.",
    ):
        assert_right((STRICT % (start + "1" * digits + r"\u0031" + end, "info")).encode())
        assert_right((STRICT % (start + r"\u0031" + "1" * digits + end, "info")).encode())


def test_strict_levels_with_escapes():
    for level in ("trace", "INFO", "Warning", "critical", "criticals", "inf"):
        for position in range(len(level)):
            assert_right((STRICT % (TIMESTAMP, spelled(level, {position}))).encode())
        assert_right((STRICT % (TIMESTAMP, spelled(level, range(9)))).encode())
        assert_right((STRICT % (TIMESTAMP, level + r"\u0000")).encode())
        assert_right((STRICT % (TIMESTAMP, level + r"\u0020")).encode())


def test_strict_is_about_every_message():
    good, bad = {"message": "m", "level": "info", "timestamp": TIMESTAMP}, {"message": "m", "level": "info"}
    for messages in ([good, good], [good, bad], [bad, good], [{}], [good | {"level": 1}]):
        body = json.dumps({"emitterId": "e", "messages": messages}).encode()
        assert scan(body, True) == verdict(body, strict=True)


# ------------------------------------------------------------------------------------------ every small change, no luck


def test_every_truncation_is_refused():
    assert scan(TYPICAL) == scan(TYPICAL, True) == (2, hash_text(b"web-1"))
    for length in range(len(TYPICAL)):
        assert scan(TYPICAL[:length]) is None
        assert scan(TYPICAL[length + 1 :]) is None
        assert_right(TYPICAL[:length] + TYPICAL[length + 1 :])


COMPACT = (
    b'{"emitterId":"a\xc3\xa9","messages":[{"message":"\\n\xe2\x82\xac","level":"a","metadata":{"k":[-1.5e3,{}]}},{'
    b'"x":null,"source":"","message":"\\uD83D\\uDE00\xf0\x9f\x98\x80","timestamp":""}],"metadata":{"z":true}}'
)
TELLING = b'"\\{}[]:,0eE.+-/tTuz \n\0\x1f\x7f\x80\xbf\xc2\xe0\xed\xf0\xf4\xff'


def test_every_change_of_one_byte():
    assert scan(COMPACT) == check(COMPACT)
    for position in range(len(COMPACT)):
        head, tail = COMPACT[:position], COMPACT[position:]
        for byte in range(256):
            assert_right(head + bytes([byte]) + tail[1:])
        for byte in TELLING:
            assert_right(head + bytes([byte]) + tail)


# ----------------------------------------------------------------------------------------------------- generated bodies

Members = list[tuple[str, Any]]  # objects as written: in order, keys repeated


class Number(str):
    """The text of a JSON number."""

    __slots__ = ()


def write(value: Any, rng: random.Random) -> str:
    """JSON text of a value whose objects are tuples of members: spaces and escapes at random, all of them valid."""
    space = rng.choice(["", "", "", " ", "\n  ", "\t", "\r\n"])
    if isinstance(value, Number):
        return value
    if isinstance(value, str):
        escapes = rng.choice([*[0] * 30, 0.2])  # those that need not be
        return '"' + "".join(write_character(c, rng, escapes) for c in value) + '"'
    if isinstance(value, tuple):
        members = (f"{space}{write(k, rng)}{space}:{space}{write(v, rng)}{space}" for k, v in value)
        return "{" + (",".join(members) or space) + "}"
    if isinstance(value, list):
        return "[" + (",".join(f"{space}{write(item, rng)}{space}" for item in value) or space) + "]"
    return json.dumps(value)


def write_character(c: str, rng: random.Random, escapes: float) -> str:
    if c in '"\\' or c < " " or rng.random() < escapes:
        short = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        units = [f"\\u{unit}" for unit in c.encode("utf-16-be").hex(" ", 2).split()]
        escaped = "".join(unit.upper().replace("U", "u") if rng.random() < 0.5 else unit for unit in units)
        return short[c] if c in short and rng.random() < 0.5 else escaped
    return c


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    'ab "\\/\n\u00e9\u20ac\U0001f600', max_size=20
)
numbers = st.builds(
    lambda sign, whole, fraction, exponent: Number(f"{sign}{whole}{fraction}{exponent}"),
    st.sampled_from(["", "-"]),
    st.integers(0, 10**25),
    st.sampled_from(["", ".0", ".125", "." + "3" * 30]),
    st.sampled_from(["", "e0", "E+12", "e-300", "e999"]),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(texts, inner), max_size=4).map(tuple),
    max_leaves=8,
)
objects = st.lists(st.tuples(texts, values), max_size=3).map(tuple)
unknown = st.tuples(st.one_of(st.sampled_from(["x", "messag", "traceId", "Level", "\u00fc"]), texts), values)
timestamps = st.datetimes().map(lambda t: t.isoformat() + "Z") | st.sampled_from([TIMESTAMP, "yesterday"])
levels = st.sampled_from(["info", "WARN", "critical", "Error", "debug", "notice"])
strings = {"message": texts, "timestamp": timestamps, "level": levels, "source": texts}


def known(key: str, right: st.SearchStrategy[Any]) -> st.SearchStrategy[Members]:
    """Nearly always one member with a value of the right type; or none, one of another type, or two."""
    ways = {
        "right": right.map(lambda value: [(key, value)]),
        "missing": st.just([]),
        "wrong": values.map(lambda value: [(key, value)]),
        "twice": st.tuples(right, right).map(lambda pair: [(key, value) for value in pair]),
    }
    return st.sampled_from([*["right"] * 60, *ways]).flatmap(ways.__getitem__)


def shuffled(*parts: st.SearchStrategy[Members]) -> st.SearchStrategy[tuple[tuple[str, Any], ...]]:
    together = st.tuples(*parts).map(lambda members: list(itertools.chain(*members)))
    return together.flatmap(st.permutations).map(tuple)


messages = shuffled(
    *(known(key, right) for key, right in strings.items()),
    st.one_of(st.just([]), known("metadata", objects)),
    st.lists(unknown, max_size=1),
)
packets = shuffled(
    known("emitterId", st.text(st.characters(exclude_categories=["C", "P"]), min_size=1, max_size=20)),
    known("messages", st.lists(messages, min_size=1, max_size=3)),
    st.one_of(st.just([]), known("metadata", objects)),
    st.lists(unknown, max_size=1),
)
bodies = st.builds(lambda packet, seed: write(packet, random.Random(seed)).encode(), packets, st.integers(0, 2**32))


@given(bodies)
@settings(max_examples=5 * settings().max_examples // 2, deadline=None)
def test_right_for_almost_packets(body):
    assert_right(body)
    if scan(body) is not None:
        assert_generic_json(body)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    body = bytearray(draw(bodies | st.sampled_from([TYPICAL, COMPACT, MINIMAL])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        to = min(len(body), at + draw(st.integers(0, 5)))
        piece = draw(
            st.binary(max_size=3) | st.sampled_from([bytes([c]) for c in TELLING]) | st.just(bytes(body[to : to + 9]))
        )
        body[at:to] = piece
    return bytes(body)


@given(mutations())
@settings(max_examples=7 * settings().max_examples // 2, deadline=None)
def test_right_for_mutated_packets(body):
    assert_right(body)


@given(st.binary(max_size=120) | st.text('{}[]:," \\u0e"emitterId"', max_size=120).map(str.encode))
def test_right_for_any_bytes(body):
    assert_right(body)


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
ordinary = st.fixed_dictionaries(
    {
        "emitterId": texts.filter(bool),
        "messages": st.lists(
            st.fixed_dictionaries(
                {"message": texts},
                optional={
                    "timestamp": texts,
                    "level": texts,
                    "source": texts,
                    "metadata": st.dictionaries(texts, plain_json, max_size=4),
                    "trace_id": plain_json,
                },
            ),
            min_size=1,
            max_size=3,
        ),
    },
    optional={"metadata": st.dictionaries(texts, plain_json, max_size=4), "version": plain_json},
)


@given(ordinary, st.booleans(), st.sampled_from([None, 0, 2, "\t"]), st.sampled_from([(",", ":"), (", ", ": ")]))
@settings(max_examples=2 * settings().max_examples, deadline=None)
def test_complete_for_ordinary_packets(packet, ascii_only, indent, separators):
    body = json.dumps(packet, ensure_ascii=ascii_only, indent=indent, separators=separators).encode()
    assert scan(body) == check(body)


@pytest.mark.parametrize("space", [" ", "\n", " \n\t", "\r\n"])
@pytest.mark.parametrize("text", ["x", "\u00e9", "x\u20ac\U0001f600"])
def test_places_far_behind_are_counted(space, text):
    for count in (0, 1, 31, 32, 33, 191, 192, 193, 5000):
        before = f'["{text * count}",{space * count}"{text * count}"{space * count}'
        line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
        what = "not JSON: expected a comma or a closing bracket"
        assert malformed(f"{before}5]".encode()) == (what, line, column, len(before.encode()))


# ----------------------------------------------------------------------------------------------------------- the memory


@pytest.fixture(scope="module")
def between_walls():
    """Call the scanner on a copy of a body right before, or right behind, a page that cannot be read."""
    page, room = mmap.PAGESIZE, 4 * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + 2 * page)
    keep = ctypes.c_char.from_buffer(pages)
    start = ctypes.addressof(keep)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for wall in (start, start + page + room):
        assert mprotect(wall, page, 0) == 0

    def scan_between_walls(body: bytes, *, strict: bool = False) -> tuple[int, int] | None:
        answers = set()
        for address in (start + page, start + page + room - len(body)):
            ctypes.memmove(address, body, len(body))
            answers.add(scan((ctypes.c_ubyte * len(body)).from_address(address), strict))
        (answer,) = answers
        return answer

    yield scan_between_walls
    for wall in (start, start + page + room):
        assert mprotect(wall, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    del keep
    pages.close()


@pytest.mark.parametrize(
    "body",
    [
        TYPICAL, COMPACT, MINIMAL + b"\n\n", MINIMAL.replace(b",", b"," + b" \n\r\t" * 40), b"{" * 200, b"[" * 200,
        b"\\" * 200, b'"\\u' * 70,
    ],
)  # fmt: skip
def test_nothing_outside_the_body_is_read(between_walls, body):
    """A read across the end would end this process."""
    for piece in (body[:n] for n in range(len(body) + 1)):
        for ending in (
            b"",
            b"}",
            b'"}',
            b"\\u}",
            b"\xe2}",
            b"\xf0\x9f}",
            b'"timestamp":"2}',
            b'"timestamp":"\\u0032"}',
            b"\\u0032}",
            b"-}",
            b"1e}",
            b" \n }",
            b"t}",
        ):
            assert between_walls(piece + ending, strict=True) == scan(piece + ending, True)


@given(mutations())
@settings(max_examples=3 * settings().max_examples // 2, deadline=None)
def test_nothing_outside_a_body_is_read(between_walls, body):
    assert between_walls(body[:16000]) == scan(body[:16000])
