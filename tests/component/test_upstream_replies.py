"""Replies of analyzers: what each says of its request, and that it says the same however its bytes are split."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from upstream_harness import OK, Desk, reply

from fastdist.shm.block import AnalyzerWord

NOT_HTTP = "a reply that is not HTTP"
FIN = None
RST = ConnectionResetError(104, "Connection reset by peer")
OPEN = object()  # the connection does not end


class Outcome(NamedTuple):
    """What became of three pipelined requests, p1 to p3: how many were delivered, what the owner heard, the rest."""

    delivered: int
    events: list
    ended: str | None = None


def not_sent(*ids):
    return ("not sent", list(ids))


def failed(packet_id, error, status=None, *, counted=True):
    return ("failed", [packet_id], error, counted, status)


def refused(packet_id, status):
    return ("refused", [packet_id], status, False)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BARE = b"HTTP/1.1 200 OK\r\n\r\n"  # neither length nor coding: its end is the connection's
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"
BROKEN = "a reply whose chunks are broken"
GONE = "connection closed before the reply"
LOST = "connection lost: [Errno 104] Connection reset by peer"

# One reply that says "delivered", in all its forms.
DELIVERED = {
    "length": reply(200, body=b"hello"),
    "no body": OK,
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
    "empty reason": b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n",
    "201": reply(201),
    "299": reply(299, body=b"x"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "204 with a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "one chunk": CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
    "many chunks": CHUNKED + b"1\r\na\r\n00A\r\n0123456789\r\n2;x=y\r\n\r\n\r\n000\r\n\r\n",
    "no chunk": CHUNKED + b"0\r\n\r\n",
    "trailers": CHUNKED + b'3;a;b="c"\r\nabc\r\n0\r\nExpires: never\r\nX: \r\n\r\n',
    "chunked and length": b"HTTP/1.1 200\r\ncontent-length: 3\r\ntransfer-encoding: Chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "coded and chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "interims": INTERIM * 3 + b"HTTP/1.1 100 Continue\n\n" + reply(200, body=b"12"),
    "as many interims as may be": b"HTTP/1.1 102\r\n\r\n" * 32 + OK,
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    "bare LF, mixed": b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\nhi",
    "bare LF, chunked": b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1\r\n\n\r\n0\r\n\r\n",
    "HTTP/1.0 kept": b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 1\r\n\r\n!",
    "an empty line first": b"\r\n" + OK,
    "a lone LF first": b"\n" + OK,
    "an empty line first, and a date": b"\r\n" + reply(200, "Date: today", body=b"1"),
    "white space": b"HTTP/1.1 200 OK\r\nContent-Length: \t 4 \t\r\nX:\r\n\r\nbody",
    "a body like a head": reply(200, body=b"HTTP/1.1 500 No\r\n\r\n"),
    "obs-text": b"HTTP/1.1 200 \xff\xfe\r\nX: \xc3\xa9\r\nContent-Length: 0\r\n\r\n",
}
# The same, after which the connection ends.
DELIVERED_AND_CLOSED = {
    "close": reply(200, "Connection: close"),
    "close with a body": reply(200, "Connection: close", body=b"bye"),
    "close among options": reply(200, "Connection: foo, Close ,bar", body=b"bye"),
    "close with chunks": b"HTTP/1.1 200\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    "close and more": reply(200, "Connection: close") + OK + b"garbage",
}
# (bytes, how the connection ends, what is to come of it)
CASES = {
    "three replies": (OK + reply(200, body=b"xyz") + CHUNKED + b"0\r\n\r\n", OPEN, Outcome(3, [])),
    "unasked": (OK * 3 + b"H", OPEN, Outcome(3, [], "close")),
    "unasked, a whole reply": (OK * 4, OPEN, Outcome(3, [], "close")),
    "trailers that would end the connection": (
        b"".join(CHUNKED + b"1\r\n%d\r\n0\r\nConnection: close\r\nTransfer-Encoding: x\r\n\r\n" % n for n in range(3)),
        OPEN,
        Outcome(3, []),
    ),
    "closed after a reply": (OK, FIN, Outcome(1, [not_sent("p3"), not_sent("p2")], "close")),
    "reset after a reply": (OK, RST, Outcome(1, [not_sent("p3"), not_sent("p2")], "close")),
    "closed after all": (OK * 3, FIN, Outcome(3, [], "close")),
    "closed before a reply": (b"", FIN, Outcome(0, [not_sent("p3"), not_sent("p2"), failed("p1", GONE)], "abort")),
    "reset before a reply": (b"", RST, Outcome(0, [not_sent("p3"), not_sent("p2"), failed("p1", LOST)], "abort")),
    "closed in the first head": (
        b"HTTP/1.1 200 OK\r\nContent-Le",
        FIN,
        Outcome(0, [not_sent("p3"), not_sent("p2"), failed("p1", GONE)], "abort"),
    ),
    "closed in a later head": (OK + b"H", FIN, Outcome(1, [not_sent("p3"), failed("p2", GONE)], "abort")),
    "closed after an interim": (OK + INTERIM, FIN, Outcome(1, [not_sent("p3"), failed("p2", GONE)], "abort")),
    "closed in a body": (reply(200, body=b"abc")[:-1], FIN, Outcome(1, [not_sent("p3"), not_sent("p2")], "close")),
    "reset in a chunk": (CHUNKED + b"5\r\nhel", RST, Outcome(1, [not_sent("p3"), not_sent("p2")], "close")),
    "delimited by the end": (
        BARE + b"HTTP/1.1 200 OK\r\n\r\n" + OK,
        FIN,
        Outcome(1, [not_sent("p3"), not_sent("p2")], "close"),
    ),
    "delimited by an end that does not come": (BARE + b"body", OPEN, Outcome(1, [not_sent("p3"), not_sent("p2")])),
    "interims for ever": (
        OK + b"HTTP/1.1 102\r\n\r\n" * 33,
        OPEN,
        Outcome(1, [not_sent("p3"), failed("p2", "too many interim replies (1xx)")], "abort"),
    ),
    "a last reply whose body is still to come": (
        reply(200, "Connection: close", body=b"body")[:-3],
        OPEN,
        Outcome(1, [not_sent("p3"), not_sent("p2")]),
    ),
    "HTTP/1.0, delimited": (b"HTTP/1.0 200\n\nbody", FIN, Outcome(1, [not_sent("p3"), not_sent("p2")], "close")),
    "a body to come": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + OK, OPEN, Outcome(1, [])),
    "a failure among others": (OK + reply(500) + OK, OPEN, Outcome(2, [failed("p2", "HTTP 500", 500)])),
    "three failures": (
        reply(500) + reply(502, body=b"bad") + b"HTTP/1.1 599\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OPEN,
        Outcome(0, [failed("p1", "HTTP 500", 500), failed("p2", "HTTP 502", 502), failed("p3", "HTTP 599", 599)]),
    ),
    "408 425 429": (
        reply(408) + reply(425) + reply(429),
        OPEN,
        Outcome(0, [failed("p1", "HTTP 408", 408), failed("p2", "HTTP 425", 425), failed("p3", "HTTP 429", 429)]),
    ),
    "refused": (
        reply(400) + reply(422, body=b"no") + reply(499),
        OPEN,
        Outcome(0, [refused("p1", 400), refused("p2", 422), refused("p3", 499)]),
    ),
    "redirected": (
        reply(301, "Location: /\xe9?token=x") + b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n" + reply(399),
        OPEN,
        Outcome(
            0,
            [
                failed("p1", "HTTP 301 Moved Permanently, Location: /\xc3\xa9", 301),
                failed("p2", "HTTP 304 Not Modified", 304),
                failed("p3", "HTTP 399", 399),
            ],
        ),
    ),
    "about the endpoint": (
        reply(401) + reply(404, "Retry-After: 1", "Location: /x", body=b"no") + reply(451),
        OPEN,
        Outcome(
            0,
            [
                failed("p1", "HTTP 401 Unauthorized", 401),
                failed("p2", "HTTP 404 Not Found", 404),
                failed("p3", "HTTP 451 Unavailable For Legal Reasons", 451),
            ],
        ),
    ),
    "paused": (
        reply(429, "Retry-After: 7")
        + reply(503, "RETRY-AFTER:Fri, 31 Dec 1999 23:59:59 GMT ")
        + reply(500, "Retry-After: 1"),
        OPEN,
        Outcome(
            0,
            [
                ("paused", ["p1"], 429, "7"),
                ("paused", ["p2"], 503, "Fri, 31 Dec 1999 23:59:59 GMT"),
                failed("p3", "HTTP 500", 500),
            ],
        ),
    ),
    "unpaused": (
        reply(503) + reply(429, "Retry-Aft: 1") + reply(422, "Retry-After: 1"),
        OPEN,
        Outcome(0, [failed("p1", "HTTP 503", 503), failed("p2", "HTTP 429", 429), refused("p3", 422)]),
    ),
    "a failure that closes": (
        reply(503, "Connection: close"),
        OPEN,
        Outcome(0, [failed("p1", "HTTP 503", 503), not_sent("p3"), not_sent("p2")], "close"),
    ),
    "a failure, then garbage": (
        reply(500) + b"x",
        OPEN,
        Outcome(0, [failed("p1", "HTTP 500", 500), not_sent("p3"), failed("p2", NOT_HTTP)], "abort"),
    ),
    "broken chunks": (
        CHUNKED + b"5\r\nhelloX",
        OPEN,
        Outcome(1, [not_sent("p3"), failed("p2", BROKEN, counted=False)], "abort"),
    ),
    "a bare LF behind a chunk": (
        CHUNKED + b"1\r\na\n12\r\n0123456789abcdefgh\r\n0\r\n\r\n",
        OPEN,
        Outcome(1, [not_sent("p3"), failed("p2", BROKEN, counted=False)], "abort"),
    ),
    "a chunk of no length": (
        OK * 2 + CHUNKED + b"\r\n",
        OPEN,
        Outcome(3, [], "abort"),
    ),
}
GARBAGE = {
    "text": b"hello",
    "one byte": b"\0",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "another protocol": b"HTTP/2.0 200 OK\r\n\r\n",
    "lower case": b"http/1.1 200 OK\r\n\r\n",
    "no minor version": b"HTTP/1.x 200 OK\r\n\r\n",
    "no space": b"HTTP/1.1200 OK\r\nContent-Length: 0\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "short status": b"HTTP/1.1 20\r\n\r\n",
    "long status": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status 0": b"HTTP/1.1 000 OK\r\n\r\n",
    "no status": b"HTTP/1.1 \r\n\r\n",
    "only a version": b"HTTP/1.1\r\n\r\n",
    "a line without a colon": b"HTTP/1.1 200 OK\r\nhello\r\n\r\n",
    "the same length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n!",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length in hexadecimal": b"HTTP/1.1 200 OK\r\nContent-Length: 0x1\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
}
CASES |= {name: (data, OPEN, Outcome(1, [])) for name, data in DELIVERED.items()}
CASES |= {f"{name}, thrice": (data * 3, OPEN, Outcome(3, [])) for name, data in DELIVERED.items()}
CASES |= {
    name: (data, OPEN, Outcome(1, [not_sent("p3"), not_sent("p2")], "close"))
    for name, data in DELIVERED_AND_CLOSED.items()
}
CASES |= {
    f"garbage: {name}": (data, OPEN, Outcome(0, [not_sent("p3"), not_sent("p2"), failed("p1", NOT_HTTP)], "abort"))
    for name, data in GARBAGE.items()
}
CASES |= {
    f"garbage behind a reply: {name}": (OK + data, OPEN, Outcome(1, [not_sent("p3"), failed("p2", NOT_HTTP)], "abort"))
    for name, data in GARBAGE.items()
}


class Trials:
    """Three pipelined requests on a new connection, again and again."""

    def __init__(self):
        self.desk = Desk(pipeline=3, connections=1)

    def run(self, pieces, end):
        desk, owner = self.desk, self.desk.owner
        before = desk.counters.get_of(1, "delivered")
        connection = desk.connect()
        desk.push(b"1", b"2", b"3", keys=["p1", "p2", "p3"])
        desk.pool.pump()
        assert connection.in_flight() == 3
        for piece in pieces:
            connection.data_received(piece)
            desk.check()
        if end is not OPEN:
            connection.connection_lost(end)
            desk.check()
        outcome = Outcome(desk.counters.get_of(1, "delivered") - before, list(owner.events), connection.transport.ended)
        if connection.transport.ended:
            assert connection.in_flight() == 0
            assert connection not in desk.pool.idle
        if end is OPEN:
            connection.close_after("", False)
            connection.connection_lost(None)
        for handle in owner.handles:
            desk.ring.done(handle)
        desk.pushed = desk.counters.get_of(1, "delivered")
        owner.events.clear()
        owner.handles.clear()
        assert (desk.ring.undone, desk.pool.requests_in_flight, desk.pool.open_connections) == (0, 0, 0)
        assert desk.pool.idle == []
        return outcome


@pytest.mark.parametrize("case", CASES)
def test_reply_outcome_is_same_however_split(case):
    data, end, expected = CASES[case]
    trials = Trials()
    assert trials.run([data] if data else [], end) == expected
    for at in range(1, len(data)):
        assert trials.run([data[:at], data[at:]], end) == expected, f"split at {at}: {data[:at]!r} {data[at:]!r}"
    assert trials.run([data[at : at + 1] for at in range(len(data))], end) == expected, "byte by byte"


@pytest.mark.parametrize("seed", range(5))
def test_mixed_replies_are_same_when_split(seed):
    source = random.Random(seed)
    trials = Trials()
    names = [name for name in CASES if CASES[name][2].delivered == 1 and CASES[name][2] == Outcome(1, [])]
    whole = [name for name in names if name in DELIVERED]
    for _ in range(150):
        data = b"".join(DELIVERED[source.choice(whole)] for _ in range(3))
        cuts = sorted(source.sample(range(len(data) + 1), k=source.randint(0, 6)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a != b]
        assert trials.run(pieces, OPEN) == Outcome(3, [])


@pytest.mark.parametrize("size", [65535, 65536, 65537, 65538, 70_000, 200_000])
@pytest.mark.parametrize("pieces", [1, 2, 3, 50])
def test_a_head_may_have_64_kib_and_no_more(size, pieces):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: "
    data = head + b"x" * (size - len(head) - 4) + b"\r\n\r\n" + b"ab"
    step = -(-len(data) // pieces)
    outcome = Trials().run([data[at : at + step] for at in range(0, len(data), step)], OPEN)
    if size <= 65536:
        assert outcome == Outcome(1, [])
    else:
        assert outcome == Outcome(0, [not_sent("p3"), not_sent("p2"), failed("p1", NOT_HTTP)], "abort")


def test_head_counts_before_its_body():
    desk = Desk(connections=1)
    connection = desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    assert desk.counters.get_of(1, "delivered") == 1
    assert desk.ring.undone == 1
    # But the connection is free only when the body is over.
    desk.pool.pump()
    assert len(connection.transport.requests) == 1
    connection.data_received(b"x" * 999_999)
    assert len(connection.transport.requests) == 1
    connection.data_received(b"x")
    assert len(connection.transport.requests) == 2
    desk.check()


def test_nothing_is_sent_before_a_close():
    desk = Desk(connections=1, pipeline=4)
    connection = desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    assert connection in desk.pool.idle
    connection.data_received(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhel")
    desk.push(b"2")
    desk.pool.pump()
    assert connection not in desk.pool.idle
    assert len(connection.transport.requests) == 1
    connection.data_received(b"lo")
    assert connection.transport.ended == "close"
    assert desk.owner.events == []
    desk.check()


def test_batch_reply_is_one_for_all_in_it():
    desk = Desk(mode="batch", connections=2, linger=0)
    connection = desk.connect()
    for status, event in [
        (200, []),
        (500, [("failed", ["p1", "p2"], "HTTP 500", True, 500)]),
        (422, [("refused", ["p1", "p2"], 422, True)]),
    ]:
        handles = desk.push(b"1", b"2", keys=["p1", "p2"])
        desk.pool.pump()
        connection.data_received(reply(status))
        desk.check()
        assert desk.owner.events == event
        for handle in handles if event else []:
            desk.ring.done(handle)
            desk.pushed -= 1
        desk.owner.events.clear()
        desk.owner.handles.clear()
    assert desk.counters.get_of(1, "delivered") == 2


def test_watched_packets_report_delivery():
    desk = Desk(pipeline=4)
    connection = desk.connect()
    handles = desk.push(b"1", b"2") + desk.push(b"3", flags=1)  # its emitter waits
    desk.pool.watch(handles[0])
    desk.pool.pump()
    connection.data_received(OK * 3)
    assert desk.owner.events == [("delivered", [1]), ("delivered", [3])]


def test_a_success_ends_a_row_of_failures():
    desk = Desk()
    connection = desk.connect()
    assert desk.block.analyzers.delivery_failed(1, "x") == 1
    desk.push(b"1", b"2")
    desk.pool.pump()
    connection.data_received(reply(500))
    assert desk.block.analyzers.get(1, AnalyzerWord.DELIVERY_FAILURES) == 1  # the owner counts, not the connection
    connection.data_received(OK)
    assert desk.block.analyzers.get(1, AnalyzerWord.DELIVERY_FAILURES) == 0


def test_a_success_ends_a_row_of_refusals():
    desk = Desk()
    connection = desk.connect()
    assert [desk.block.analyzers.delivery_refused(1), desk.block.analyzers.delivery_refused(1)] == [1, 2]
    desk.push(b"1")
    desk.pool.pump()
    connection.data_received(OK)
    assert desk.block.analyzers.refusals(1) == 0


# ---- any bytes

PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            *DELIVERED.values(),
            *DELIVERED_AND_CLOSED.values(),
            *GARBAGE.values(),
            BARE,
            CHUNKED,
            INTERIM,
            reply(500),
            reply(404),
            reply(422),
            reply(302, "Location: https://elsewhere.test/"),
            reply(503, "Retry-After: 1"),
            b"HTTP/1.1 ",
            b"200 OK\r\n",
            b"Content-Length: 3\r\n",
            b"Content-Length: 99999999999999999999999\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Connection: close\r\n",
            b"Retry-After: \xb2\r\n",
            b"HTTP/1.1 429 Slow down\r\nRetry-After: \xb2\r\nContent-Length: 0\r\n\r\n",
            b"\r\n",
            b"\n",
            b"5\r\nhello\r\n",
            b"fffffffffffffff\r\n",
            b"ffffffffffffffff\r\n",
            b"0\r\n\r\n",
            b"X: " + b"y" * 70_000 + b"\r\n",
        ]
    ),
)
ENDS = st.sampled_from([OPEN, FIN, RST, TimeoutError(), OSError("odd"), Exception()])


@given(
    st.lists(PIECES, max_size=12),
    st.data(),
    st.tuples(st.integers(1, 4), st.sampled_from(["single", "batch"])),
    st.integers(0, 9),
    ENDS,
)
@settings(
    max_examples=3 * settings().max_examples, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
def test_no_bytes_crash_it_or_lose_a_packet(pieces, data, way, packets, end):
    pipeline, mode = way
    desk = Desk(mode=mode, pipeline=pipeline, batch_packets=3, linger=0, capacity=1 << 16)
    connection = desk.connect()
    desk.push(*[b"%d" % number for number in range(packets)])
    desk.pool.pump()
    desk.check()
    stream = b"".join(pieces)
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        connection.transport.unflushed = data.draw(st.sampled_from([0, 0, 30, 10_000]))
        connection.data_received(stream[:size])
        stream = stream[size:]
        desk.check()
    if end is not OPEN:
        connection.connection_lost(end)
    elif not connection.transport.ended:
        connection.close_after("time is up", True)
        connection.connection_lost(None)
    desk.check()
    assert desk.pool.requests_in_flight == 0
    assert desk.pool.idle == []
    # Not only the numbers: each packet that was not delivered is in one place.
    left = desk.owner.handles + [handle for _ in range(packets) for handle in desk.pool.take_request()]
    sequences = {desk.ring.sequence(handle) for handle in left}
    assert len(sequences) == len(left) == desk.ring.undone
    assert desk.counters.get_of(1, "delivered") + len(sequences) == packets


@given(st.lists(PIECES, max_size=8), st.lists(st.integers(0, 400), max_size=8), ENDS)
@settings(max_examples=2 * settings().max_examples)
def test_any_bytes_are_same_however_split(pieces, cuts, end):
    data = b"".join(pieces)
    cuts = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    parts = [data[a:b] for a, b in pairwise(cuts)]
    trials = Trials()
    whole = trials.run([data] if data else [], end)
    assert trials.run(parts, end) == whole
    if len(data) < 300:
        assert trials.run([data[at : at + 1] for at in range(len(data))], end) == whole


def test_unasked_reply_logs_once_a_minute(monkeypatch):
    desk = Desk()
    with capture_logs() as logged:
        for data in (b"HTTP/1.1 408 Request Timeout\r\n", OK, b"!\xff", OK):
            desk.connect().data_received(data)
        (line,) = logged
        assert (line["analyzer"], line["log_level"]) == ("A1", "warning")
        assert line["beginning"].startswith("HTTP/1.1 200 OK")
        later = time.monotonic() + 61
        monkeypatch.setattr("time.monotonic", lambda: later)
        desk.connect().data_received(b"!\xff")
    assert [line["beginning"] for line in logged][1:] == ["!\xff"]
