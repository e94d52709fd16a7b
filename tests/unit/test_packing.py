"""Lines as packets: nothing of a line lost, no packet that the schema refuses, ids that can be relied on."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist import packet
from fastdist.client.lines import LineCutter
from fastdist.client.packing import MIN_PACKET_BYTES, TALLIES, Encoder, Format, Packer, Recipe, Style

STYLE = Style("web-42", "app.log")
RECIPE = Recipe(STYLE, 3, MIN_PACKET_BYTES)


def lines_of(data, recipe=RECIPE):
    cutter = LineCutter(recipe.max_line)
    return [*cutter.feed(data), *cutter.finish()]


def packets_of(data, recipe=RECIPE, identity="me"):
    packer = Packer(recipe, identity)
    return [packet for line in lines_of(data, recipe) for packet in packer.add(line)] + list(packer.flush())


def messages_of(data, **style):
    """Return the messages that bytes become, and what was special about them."""
    tally = Counter()
    encoder = Encoder(Style("web-42", "app.log", **style))
    encoded = [encoder.encode(line, tally) for line in lines_of(data)]
    return [json.loads(message) for message in encoded if message is not None], {k: v for k, v in tally.items() if v}


# ------------------------------------------------------------------------------------------------------------- messages


def test_a_line_of_text_is_a_message():
    assert messages_of('GET /cart 200 "ü"\t😀\x00\n'.encode()) == ([{"message": 'GET /cart 200 "ü"\t😀\x00'}], {})


def test_json_log_message_passes_unchanged():
    line = b' { "message":"caf\\u00e9", "level" : "info","n":1e2, "big":12345678901234567890, "m\\u00fc":[null] }'
    assert Encoder(STYLE).encode(lines_of(line)[0], Counter()) == line


def test_other_json_object_goes_to_metadata():
    pino = b'{"level":30,"time":1531171074631,"msg":"hello","pid":657}'
    docker = b'{"log":"a line\\n","stream":"stderr","time":"2026-01-02T03:04:05.1Z"}'
    logstash = b'{"@timestamp":"2026-01-02T03:04:05Z","severity":"WARN","logger":"db","message":"slow","level":4}'
    bare = b'{"event":"started"}'
    messages, tally = messages_of(b"\n".join([pino, docker, logstash, bare]))
    assert messages == [
        {"message": "hello", "metadata": json.loads(pino)},
        {"message": "a line\n", "timestamp": "2026-01-02T03:04:05.1Z", "metadata": json.loads(docker)},
        {
            "message": "slow",
            "timestamp": "2026-01-02T03:04:05Z",
            "level": "WARN",
            "source": "db",
            "metadata": json.loads(logstash),
        },
        {"message": bare.decode(), "metadata": json.loads(bare)},
    ]
    assert tally == {"wrapped": 4}


def test_unknown_times_levels_are_metadata():
    (message,), _ = messages_of(b'{"msg":"x","time":"yesterday","severity":"loud"}')
    assert message.keys() == {"message", "metadata"}


@pytest.mark.parametrize(
    "line",
    [
        b'{"message":"a"},{"message":"b"}',
        b'{"message":"a"}],"x":[{}',
        b'{"message":"a"}],"metadata":{"x":1},"y":[1',
        b'{"message":"cut of',
        b'{"message":"a","n":NaN}',
        b'{"message":"half \\ud800 a pair"}',
        b'{"message":"a","message":"b","metadata":' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"a":' * 140 + b"1" + b"}" * 140,
        b'["message"]',
        b'"message"',
        b"{}x",
    ],
)
def test_unusable_json_object_is_text(line):
    assert messages_of(line) == ([{"message": line.decode()}], {})
    assert messages_of(line, format=Format.NDJSON) == ([{"message": line.decode()}], {"not JSON": 1})


def test_duplicate_members_are_no_message():
    (message,), tally = messages_of(b'{"message":"a","message":"b"}')
    assert message["message"] == "b"
    assert tally == {"wrapped": 1}


def test_json_is_text_if_asked_for():
    line = b'{"message":"a"}'
    assert messages_of(line, format=Format.TEXT) == ([{"message": line.decode()}], {})


def test_non_utf8_lines_carry_their_bytes():
    for line in (b"caf\xe9 au lait", b"\xff\xfe", b"\xed\xa0\x80", b'{"message":"\xff"}'):
        (message,), tally = messages_of(line)
        assert message["message"] == line.decode(errors="replace")
        assert base64.b64decode(message["metadata"]["bytesBase64"]) == line
        assert tally == {"not UTF-8": 1}


def test_only_empty_lines_are_left_out():
    assert messages_of(b"\n\r\n \na\n\n") == ([{"message": " "}, {"message": "a"}], {"empty": 3})


def test_byte_order_mark_is_not_in_line():
    messages, _ = messages_of(b'\xef\xbb\xbf{"message":"a"}\n\xef\xbb\xbfb\n')
    assert messages == [{"message": "a"}, {"message": "\ufeffb"}]


@given(st.lists(st.sampled_from([b"\xff", b"\x00", b"x", "😀".encode(), b'"']), min_size=1), st.integers(1, 4))
def test_parts_of_a_long_line_make_the_line(alphabet, times):
    line = b"".join(alphabet) * (RECIPE.max_line * times // len(b"".join(alphabet)) + 1)
    messages, tally = messages_of(b"first\n" + line + b"\nlast\n")
    assert (messages[0], messages[-1]) == ({"message": "first"}, {"message": "last"})
    assert tally["parts"] == len(messages) - 2 >= 2
    whole, end = b"", 6
    for message in messages[1:-1]:
        meta = message["metadata"]
        assert meta["part"]["offset"] == end
        raw = base64.b64decode(meta["bytesBase64"]) if "bytesBase64" in meta else message["message"].encode()
        assert meta["part"]["bytes"] == len(raw)
        end += len(raw)
        whole += raw
    assert whole == line


def test_given_members_only_fill_missing():
    messages, _ = messages_of(
        b'a\n{"message":"b","level":"warn"}\n{"msg":"c","level":"error"}\n', level="info", source="s"
    )
    assert messages[0] == {"message": "a", "level": "info", "source": "s"}
    assert messages[1] == {"source": "s", "message": "b", "level": "warn"}
    assert (messages[2]["level"], messages[2]["source"]) == ("error", "s")


def test_a_stamp_is_a_time_that_strict_takes():
    messages, _ = messages_of(b'a\n{"message":"b"}\n{"message":"c","timestamp":"2026-01-02T03:04:05Z"}\n', stamp=True)
    assert all(packet.is_date_time(message["timestamp"]) for message in messages)
    assert messages[2]["timestamp"] == "2026-01-02T03:04:05Z"


# -------------------------------------------------------------------------------------------------------------- packets

ANY_LINE = st.binary(max_size=40) | st.sampled_from(
    [
        b'{"message":"m"}',
        b'{"msg":1}',
        b"{",
        b'{"message":"\\ud800"}',
        b'{"level":"info","message":"' + b"x" * 9000 + b'"}',
    ]
)


@given(st.lists(ANY_LINE).map(b"\n".join), st.sampled_from(list(Format)))
def test_the_schema_takes_every_packet(data, kind):
    recipe = Recipe(Style("ü" * 256, "f" * 255, kind), 3, MIN_PACKET_BYTES)
    end = 0
    for made in packets_of(data, recipe):
        assert made.offset == end
        end = made.end
        if made.messages:
            assert packet.check(made.body).messages == made.messages <= 3
            assert len(made.body) <= MIN_PACKET_BYTES
    assert end == len(data)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b'"', b"x", b"\x1f\xff"])
def test_any_line_fits_into_a_packet(byte):
    recipe = Recipe(Style("\x7f" * 256, "\x01" * 255), 500, MIN_PACKET_BYTES)
    data = (byte * recipe.max_line)[: recipe.max_line] + b"\n"
    (made,) = packets_of(data * 1, recipe)
    assert len(made.body) <= MIN_PACKET_BYTES
    assert max(len(made.body) for made in packets_of(data * 9, recipe)) <= MIN_PACKET_BYTES


def test_a_packet_says_where_it_comes_from():
    first, second = packets_of(b"a\nb\nc\nd\n")
    assert json.loads(first.body) == {
        "emitterId": "web-42",
        "metadata": {"file": "app.log", "offset": 0},
        "messages": [{"message": "a"}, {"message": "b"}, {"message": "c"}],
    }
    assert json.loads(second.body)["metadata"]["offset"] == second.offset == 6


def test_empty_lines_at_end_are_accounted():
    (first, second) = packets_of(b"a\nb\nc\n\n\r\n")
    assert (first.messages, first.end) == (3, 6)
    assert (second.messages, second.offset, second.end) == (0, 6, 9)
    assert second.tally == {"empty": 2}


def test_what_is_tallied_has_words_for_it():
    data = b"\n\xff\n{}\n{\n" + b"x" * RECIPE.max_line * 2
    assert messages_of(data, format=Format.NDJSON)[1].keys() == TALLIES.keys()


# ------------------------------------------------------------------------------------------------------------------ ids


def test_id_is_a_valid_and_readable_key():
    for made in packets_of(b"a\n" * 10):
        assert re.fullmatch(rf"[0-9a-f]{{24}}-{made.offset}", made.id)


def test_same_lines_of_a_log_have_same_ids():
    assert [made.id for made in packets_of(b"a\nb\nc\nd\n")] == [made.id for made in packets_of(b"a\nb\nc\nd\n")]


def test_ids_differ_by_every_input():
    data = b"a\na\na\na\na\na\n"
    ids = [made.id for made in packets_of(data)]
    ids += [made.id for made in packets_of(data, identity="you")]
    ids += [made.id for made in packets_of(data, Recipe(Style("other", "app.log"), 3, MIN_PACKET_BYTES))]
    ids += [made.id for made in packets_of(data, Recipe(STYLE, 2, MIN_PACKET_BYTES))]
    ids += [made.id for made in packets_of(b"b" + data[1:])][:1]
    assert len(ids) == len(set(ids)) == 10
