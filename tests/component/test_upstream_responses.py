"""What analyzers answer besides 2xx: the beginning of it is kept, and decides no later than it has to."""

from __future__ import annotations

import time

import pytest
from upstream_harness import OK, Desk, reply

SECOND = 10**9
LIMIT = 512
NO = b'{"error":"no such field: \xc3\xa4"}'
CHUNKED = b"HTTP/1.1 422 No\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(*pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# Bytes, and what is kept of them.
REPLIES = {
    "a length": (reply(422, body=NO), NO),
    "nothing": (reply(422), b""),
    "at the limit": (reply(400, body=b"x" * LIMIT), b"x" * LIMIT),
    "over the limit": (reply(413, body=b"y" * 2000), b"y" * LIMIT),
    "chunks": (CHUNKED + chunks(b"one, ", b"two, ", b"three"), b"one, two, three"),
    "chunks over the limit": (CHUNKED + chunks(b"a" * 300, b"b" * 300, b"c" * 300), b"a" * 300 + b"b" * 212),
    "no chunk": (CHUNKED + chunks(), b""),
    "a failure": (reply(500, body=NO), NO),
    "a pause": (reply(503, "Retry-After: 7", body=NO), NO),
    "about the endpoint": (reply(404, body=NO), NO),
    "not modified": (b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n", b""),
}


def one(data, *more, pipeline=1):
    """Return a desk that has been sent these pieces in answer to one packet (of ``pipeline``), and its connection."""
    desk = Desk(connections=1, pipeline=pipeline)
    connection = desk.connect()
    desk.push(*[b"%d" % number for number in range(pipeline)])
    desk.pool.pump()
    for piece in (data, *more):
        connection.data_received(piece)
        desk.check()
    return desk, connection


@pytest.mark.parametrize("case", REPLIES)
def test_beginning_is_kept_however_split(case):
    data, kept = REPLIES[case]
    whole, connection = one(data)
    assert whole.owner.responses == [kept]
    assert connection.in_flight() == 0
    for at in range(1, len(data)):
        desk, connection = one(data[:at], data[at:])
        assert desk.owner.responses == [kept], at
        assert desk.owner.events == whole.owner.events
        assert connection.in_flight() == 0
    desk, connection = one(*(data[at : at + 1] for at in range(len(data))))
    assert (desk.owner.responses, desk.owner.events) == ([kept], whole.owner.events)


@pytest.mark.parametrize("case", REPLIES)
def test_the_connection_goes_on_behind_it(case):
    data, kept = REPLIES[case]
    desk, connection = one(data + OK + data, pipeline=3)
    assert desk.owner.responses == [kept, kept]
    assert desk.counters.get_of(1, "delivered") == 1
    desk.push(b"next")
    desk.pool.pump()
    connection.data_received(OK)
    assert desk.counters.get_of(1, "delivered") == 2


def test_a_usual_body_does_not_hide_another():
    """A chunked body like the last one is passed over unread; one that is kept must not be."""
    desk, connection = one(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(b"same"))
    desk.push(b"next")
    desk.pool.pump()
    connection.data_received(CHUNKED + chunks(b"same"))
    assert desk.owner.responses == [b"same"]


def test_it_settles_before_a_long_body_ends():
    desk, connection = one(b"HTTP/1.1 422 No\r\nContent-Length: 1000000\r\n\r\n" + b"z" * (LIMIT - 1))
    assert (desk.owner.events, connection.in_flight()) == ([], 1)
    connection.data_received(b"z")
    assert desk.owner.responses == [b"z" * LIMIT]
    assert connection.in_flight() == 0
    desk.check()


@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "reset")])
@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 422 No\r\nContent-Length: 100\r\n\r\n", CHUNKED + b"64\r\n", b"HTTP/1.1 422 No\r\n\r\n"]
)
def test_an_end_in_the_body_is_no_failure(head, error):
    desk, connection = one(head + b"cut")
    connection.connection_lost(error)
    assert desk.owner.events == [("refused", ["p1"], 422, False)]
    assert desk.owner.responses == [b"cut"]
    desk.check()


def test_broken_chunks_change_no_verdict():
    desk, connection = one(CHUNKED + b"3\r\ncutX")
    assert desk.owner.events == [("refused", ["p1"], 422, False)]
    assert desk.owner.responses == [b"cut"]
    assert connection.transport.ended == "abort"


def test_requests_behind_it_do_not_fail():
    desk, connection = one(b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\ncut", pipeline=3)
    connection.connection_lost(ConnectionResetError(104, "reset"))
    assert desk.owner.events == [
        ("not sent", ["p3"]),
        ("not sent", ["p2"]),
        ("failed", ["p1"], "HTTP 500", True, 500),
    ]
    desk.check()


def test_a_missing_body_is_not_waited_for():
    """A second at most: the packet has to go elsewhere."""
    desk, connection = one(b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\nbegun")
    now = time.monotonic_ns()
    desk.pool.check(now)
    assert desk.owner.events == []
    desk.pool.check(now + SECOND + SECOND // 2)
    assert desk.owner.events == [("failed", ["p1"], "HTTP 500", True, 500)]
    assert desk.owner.responses == [b"begun"]
    assert connection.transport.ended is None, "the rest of the body may still come"
    connection.data_received(b"x" * 95)
    desk.push(b"next")
    desk.pool.pump()
    connection.data_received(OK)
    assert desk.counters.get_of(1, "delivered") == 1
    desk.check()


def test_the_last_reply_is_read_to_its_end():
    desk, connection = one(reply(422, "Connection: close", body=NO)[:-3], pipeline=2)
    assert desk.owner.events == [("not sent", ["p2"])]
    connection.data_received(NO[-3:])
    assert desk.owner.responses == [NO]
    assert connection.transport.ended == "close"
    desk.check()


def test_closing_the_pool_settles_it():
    desk, connection = one(b"HTTP/1.1 422 No\r\nContent-Length: 100\r\n\r\nbegun")
    desk.pool.close()
    assert desk.owner.events == [("refused", ["p1"], 422, False)]
    assert connection.transport.ended
    desk.check()
