"""Lines out of bytes: nothing lost, the same whatever pieces the bytes come in and wherever one begins again."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdist.client.lines import Line, LineCutter

MAX_LENGTH = 9
# Made of what matters: line ends, characters of one to four bytes, bytes that are no UTF-8.
TEXT = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"\r", b"a", b"bc", "ü€😀".encode(), b"\xff", b"\x80"]), max_size=60
).map(b"".join)


def cut(data, offset=0, *, at_start=True, pieces=()):
    """Return the lines of bytes that come in pieces, cut at these places."""
    cutter = LineCutter(MAX_LENGTH, offset, at_start=at_start)
    places = sorted({min(place, len(data)) for place in pieces})
    lines = []
    for start, end in zip([0, *places], [*places, len(data)], strict=True):
        lines += cutter.feed(data[start:end])
    return lines + cutter.finish()


@given(TEXT, st.lists(st.integers(0, 200)))
def test_the_pieces_do_not_matter(data, pieces):
    assert cut(data, pieces=pieces) == cut(data)


@given(TEXT)
def test_nothing_is_lost(data):
    """What stands between two lines' bytes is a line end and nothing else."""
    end = 0
    for line in cut(data):
        assert line.offset == end
        assert data[line.offset :].startswith(line.raw)
        assert data[line.offset + len(line.raw) : line.end] in (b"", b"\n", b"\r\n")
        end = line.end
    assert end == len(data)


@given(TEXT)
def test_parts_are_short_cut_at_characters(data):
    for line in cut(data):
        assert len(line.raw) <= MAX_LENGTH
        if not line.whole and line.offset + len(line.raw) == line.end < len(data):
            whole = data[line.offset :].split(b"\n")[0]
            try:
                whole.decode()
            except UnicodeDecodeError:
                continue
            line.raw.decode()


@given(TEXT, st.data())
def test_resuming_at_boundary_finds_the_same(data, draw):
    lines = cut(data)
    begin = draw.draw(st.integers(0, len(lines)))
    offset = lines[begin - 1].end if begin else 0
    at_start = offset == 0 or data[offset - 1 : offset] == b"\n"
    assert cut(data[offset:], offset, at_start=at_start) == lines[begin:]


@given(TEXT, st.data())
@example(b"123456789abc", None)
def test_recut_of_a_log_gives_the_same_parts(data, draw):
    """A range from the end of one line or part to that of another, without anything behind it, has the same lines."""
    lines = cut(data)
    end = draw.draw(st.integers(0, len(lines))) if draw else 1
    begin = draw.draw(st.integers(0, end)) if draw else 0
    first, last = (lines[index - 1].end if index else 0 for index in (begin, end))
    at_start = first == 0 or data[first - 1 : first] == b"\n"
    assert cut(data[first:last], first, at_start=at_start) == lines[begin:end]


def test_line_ends_do_not_belong_to_lines():
    assert cut(b"a\r\nb\n\nc\r") == [
        Line(0, 3, b"a", whole=True),
        Line(3, 5, b"b", whole=True),
        Line(5, 6, b"", whole=True),
        Line(6, 8, b"c\r", whole=True),
    ]


def test_a_long_line_comes_in_parts():
    assert cut(b"0123456789ab\nx\n") == [
        Line(0, 9, b"012345678", whole=False),
        Line(9, 13, b"9ab", whole=False),
        Line(13, 15, b"x", whole=True),
    ]
    assert [line.raw for line in cut("12345678€€€".encode())] == [b"12345678", "€€€".encode()]
    assert [line.raw for line in cut(b"\x80" * 12)] == [b"\x80" * 9, b"\x80" * 3]


def test_start_inside_a_line_is_a_part():
    assert cut(b"rest\nnext\n", 100, at_start=False) == [
        Line(100, 105, b"rest", whole=False),
        Line(105, 110, b"next", whole=True),
    ]


def test_unsplittable_limits_are_refused():
    with pytest.raises(ValueError, match="3 bytes"):
        LineCutter(3)
