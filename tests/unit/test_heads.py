"""Templates of heads: whatever one takes httptools takes, with the same meaning, and what differs in holes is taken."""

from __future__ import annotations

import contextlib
import time

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import ReplyHead, RequestHead

REQUEST = (
    b"POST /logs HTTP/1.1\r\nHost: logs.example:3000\r\nUser-Agent: agent/1.2\r\nContent-Type: application/json\r\n"
    b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nContent-Length: 452\r\n"
    b"Idempotency-Key: a-1\r\nAuthorization: Bearer sesame\r\n\r\n"
)
REPLY = b"HTTP/1.1 200 OK\r\nDate: Sat, 28 Nov 2026 10:00:00 GMT\r\nX-Request-Id: 17\r\nContent-Length: 2\r\n\r\n"
NAMES = [
    b"Host",
    b"Content-Length",
    b"content-length",
    b"Transfer-Encoding",
    b"Connection",
    b"Proxy-Connection",
    b"Upgrade",
    b"Content-Type",
    b"Content-Encoding",
    b"Expect",
    b"Prefer",
    b"Origin",
    b"Idempotency-Key",
    b"Authorization",
    b"Retry-After",
    b"Date",
    b"X-Request-Id",
    b"User-Agent",
]
VALUES = [
    b"",
    b"0",
    b"5",
    b"007",
    b"close",
    b"keep-alive",
    b"chunked",
    b"gzip",
    b"100-continue",
    b"wait=5",
    b"a",
    b"a, b",
]
SPACES = st.sampled_from([b"", b" ", b"\t", b"  "])
FIELDS = st.builds(
    lambda name, before, value, after: name + b":" + before + value + after,
    st.sampled_from(NAMES),
    SPACES,
    st.one_of(st.sampled_from(VALUES), st.text("a1:\t \x80\xff", max_size=6).map(lambda text: text.encode("latin-1"))),
    SPACES,
)
LINES = st.lists(st.one_of(st.just(b"Host: a"), FIELDS), max_size=6)


def heads(first_lines):
    return st.builds(lambda line, fields: b"\r\n".join([line, *fields, b"", b""]), st.sampled_from(first_lines), LINES)


REQUESTS = st.one_of(
    st.just(REQUEST),
    heads([b"POST /logs HTTP/1.1", b"POST /logs HTTP/1.0", b"GET /stats?x HTTP/1.1", b"OPTIONS * HTTP/1.1"]),
)
REPLIES = st.one_of(
    st.just(REPLY), heads([b"HTTP/1.1 200 OK", b"HTTP/1.0 204 No", b"HTTP/1.1 503 x", b"HTTP/1.1 100 C"])
)


@st.composite
def varied(draw, of):
    """Return a head, and one that differs from it in some bytes, mostly within the values of fields."""
    head = draw(of)
    other = bytearray(head)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(other) - 1))
        end = min(len(other), at + draw(st.integers(0, 4)))
        other[at:end] = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"7", b"\r\n", b"\n", b": ", b"x", b"\r\nA: b"]))
        )
    return head, bytes(other)


class Fields:
    """What httptools says of a head."""

    def __init__(self, parser, data):
        self.fields = []
        self.parser = parser(self)
        with contextlib.suppress(httptools.HttpParserUpgrade):
            self.parser.feed_data(data)

    def on_header(self, name, value):
        self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self):
        self.keep_alive = self.parser.should_keep_alive()

    def all_of(self, name):
        return [value for field, value in self.fields if field == name]


def facts(head):
    names = [name for name in dir(type(head)) if not name.startswith(("_", "on_", "filled_by"))]
    return {name: getattr(head, name) for name in names if name not in ("text", "fields")}


def check(template, other, parser):
    """Fail unless the template, if it takes the other head, takes it as the parser does."""
    filled = template.filled_by(other + b"what follows")
    if filled is None:
        return
    length, content_length, key, credentials = filled
    read = type(template)(other[:length])
    assert read.fault is None
    assert facts(read) == facts(template)
    assert read.filled_by(other) == filled
    if parser is httptools.HttpResponseParser and b"\n" in other[:length].replace(b"\r\n", b""):
        return  # a bare LF, which a parser as it comes does not take
    second = Fields(parser, other[:length])
    assert second.keep_alive == read.keep_alive
    assert [content_length] == ([int(value) for value in second.all_of(b"content-length")] or [-1])
    assert (b"chunked" in b",".join(second.all_of(b"transfer-encoding")).lower()) == read.chunked
    assert key == (second.all_of(b"idempotency-key") or [b""])[-1]
    assert credentials == (second.all_of(b"authorization") or [b""])[-1]


@given(varied(REQUESTS))
def test_request_template_matches_httptools(pair):
    template = RequestHead(pair[0])
    if template.status == 0:
        assert template.filled_by(pair[0]) is not None
        check(template, pair[1], httptools.HttpRequestParser)


@given(varied(REPLIES))
def test_reply_template_matches_httptools(pair):
    template = ReplyHead(pair[0])
    if template.fault is None:
        assert template.filled_by(pair[0]) is not None
        check(template, pair[1], httptools.HttpResponseParser)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", b"1-2"),
        (b"agent/1.2", b"another agent, of a longer name"),
        (b"agent/1.2", b""),
        (b": 452", b": 17"),
        (b"a-1", b'"a-2"'),
        (b"Bearer sesame", b"Bearer \xe4"),
    ],
)
def test_values_deciding_nothing_may_differ(old, new):
    other = REQUEST.replace(old, new)
    assert other != REQUEST
    assert RequestHead(REQUEST).filled_by(other) == RequestHead(other).filled_by(other)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"logs.example", b"logs.elsewhere"),
        (b"/logs", b"/stats"),
        (b"POST", b"HEAD"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"application/json", b"text/plain"),
        (b": 452", b": 4 2"),
        (b": 452", b": -1"),
        (b": 452", b": "),
        (b": 452", b": " + b"9" * 19),
        (b"agent/1.2", b"agent\x00"),
        (b"agent/1.2", b"agent\r\nTransfer-Encoding: chunked"),
        (b"agent/1.2", b"agent\n"),
        (b"agent/1.2", b"agent\r\n folded"),
    ],
)
def test_values_that_decide_must_match(old, new):
    other = REQUEST.replace(old, new)
    assert other != REQUEST
    assert RequestHead(REQUEST).filled_by(other) is None


def test_a_reply_of_another_second_is_taken():
    other = REPLY.replace(b"10:00:00", b"10:00:01").replace(b": 17", b": 1234")
    assert ReplyHead(REPLY).filled_by(other) == (len(other), 2, b"", b"")
    assert ReplyHead(REPLY).filled_by(other.replace(b"200", b"503")) is None


def test_fields_beyond_the_holes_must_match():
    fields = b"".join(b"X-%d: a\r\n" % number for number in range(100))
    head = b"POST /logs HTTP/1.1\r\nHost: a\r\n" + fields + b"Content-Length: 5\r\n\r\n"
    template = RequestHead(head)
    assert template.filled_by(head) == (len(head), 5, b"", b"")
    assert template.filled_by(head.replace(b"X-0: a", b"X-0: b")) is not None
    assert template.filled_by(head.replace(b"X-99: a", b"X-99: b")) is None
    assert template.filled_by(head.replace(b": 5", b": 6"))[1] == 6


@pytest.mark.parametrize("name", [b"Content-Length", b"Idempotency-Key", b"Authorization", b"X"])
def test_any_field_may_be_there_very_often(name):
    head = b"POST /logs HTTP/1.1\r\nHost: a\r\n" + b"%b: 5\r\n" % name * 100 + b"\r\n"
    assert (RequestHead(head).status == 0) == (name in (b"Idempotency-Key", b"X"))
    assert ReplyHead(head.replace(b"POST /logs HTTP/1.1", b"HTTP/1.1 200 OK")).status == 200


@pytest.mark.parametrize("before", range(26))
def test_extracted_fields_among_very_many(before):
    fields = b"X: a\r\n" * before + b"Idempotency-Key: k\r\n" + b"Y: b\r\n" * 200 + b"Content-Length: 7\r\n"
    head = b"POST /logs HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"
    assert RequestHead(head).filled_by(head) == (len(head), 7, b"k", b"")


@pytest.mark.parametrize("length", range(len(REQUEST)))
def test_a_part_of_a_head_is_not_taken(length):
    assert RequestHead(REQUEST).filled_by(REQUEST[:length]) is None


def test_repeated_field_is_read_as_fast():
    def cost(names):
        head = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"%b:\r\n" % name for name in names) + b"\r\n"
        began = time.process_time()
        assert RequestHead(head).status == 0
        return time.process_time() - began

    count = 200_000
    assert cost([b"a"] * count) < 3 * cost([b"%x" % number for number in range(count)])


def test_values_of_repeated_field_are_joined():
    assert RequestHead(b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nY:\r\nx: 2\r\n\r\n").fields == {
        "host": "a",
        "x": "1, 2",
        "y": "",
    }


@pytest.mark.parametrize("forwards", [0, 1, 2, 3, 24])
@pytest.mark.parametrize("others", [0, 19, 20, 21, 60])
def test_what_is_handed_out_is_always_found(forwards, others):
    """However many fields come before it, also of those that each proxy adds."""
    head = b"".join(
        [
            b"POST /logs HTTP/1.1\r\nHost: a\r\n",
            *(b"X-%d: a\r\n" % number for number in range(others)),
            *(b"X-Forwarded-For: 192.0.2.%d\r\n" % number for number in range(forwards)),
            b"Content-Length: 7\r\nAuthorization: Bearer sesame\r\nIdempotency-Key: k\r\n\r\n",
        ]
    )
    read = RequestHead(head)
    assert read.status == 0
    assert read.filled_by(head) == (len(head), 7, b"k", b"Bearer sesame")
    other = head.replace(b": k", b": other").replace(b"sesame", b"x").replace(b": 7", b": 12")
    assert read.filled_by(other) == (len(other), 12, b"other", b"Bearer x")
