"""A 2xx that comes before its request is written whole: the rest is still written, and only then was it a delivery."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time

import pytest
from upstream_harness import (
    OK,
    SECOND,
    Desk,
    ScriptServer,
    World,
    endpoint,
    reply,
    requests_in,
    run,
    start_mock,
    until,
)

LARGE = b"x" * (8 << 20)
CLOSE = reply(200, "Connection: close", body=b"ok")
RST = ConnectionResetError(104, "Connection reset by peer")
# How an analyzer says that it has taken a packet, and whether the connection is used again.
EARLY = {
    "kept": (reply(202, body=b"ok"), True),
    "no body": (OK, True),
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
    "behind an interim": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, True),
    "close": (CLOSE, False),
    "close with chunks": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        False,
    ),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
}


def at_work(*bodies, unwritten, limit=None, **delivery):
    """Return a desk and its connection, with a request in flight for each body and so many bytes yet to be written.

    ``limit``: of requests in flight, as many as there are bodies by default.
    """
    desk = Desk(connections=1, pipeline=limit or len(bodies), **delivery)
    connection = desk.connect()
    desk.push(*bodies)
    desk.pool.pump()
    connection.transport.unflushed = unwritten
    return desk, connection


def look(desk):
    desk.pool.check(time.monotonic_ns())
    desk.check()


# ---- by hand


@pytest.mark.parametrize("kind", EARLY)
def test_early_2xx_counts_when_all_written(kind):
    data, kept = EARLY[kind]
    for at in range(1, len(data) + 1):
        desk, connection = at_work(b"1", unwritten=1)
        desk.push(b"2")
        for piece in (data[:at], data[at:]):
            if piece:
                connection.data_received(piece)
            look(desk)
            desk.pool.pump()
            assert (desk.ring.undone, connection.in_flight(), desk.pool.waiting) == (2, 1, 1)
            assert connection.transport.ended is None
        connection.transport.unflushed = 0
        look(desk)
        assert desk.ring.undone == 1
        assert connection.transport.ended == (None if kept else "close")
        assert [request.ids for request in connection.transport.requests] == [["p1"], ["p2"]][: 1 + kept]
        assert desk.owner.events == []


def test_early_2xx_waits_only_for_request():
    desk, connection = at_work(b"1", b"2", b"3", unwritten=0)
    one, two, three = (len(request.head + request.body) for request in connection.transport.requests)
    connection.transport.unflushed = two + three
    connection.data_received(OK)
    assert desk.ring.undone == 2
    connection.data_received(OK)
    for unwritten in (two + three, three + 1):
        connection.transport.unflushed = unwritten
        look(desk)
        assert (desk.ring.undone, connection.in_flight()) == (2, 2)
    connection.transport.unflushed = three
    connection.data_received(OK[:20])  # also when the next reply is what has it looked at
    assert (desk.ring.undone, connection.in_flight()) == (1, 1)
    connection.transport.unflushed = 0
    connection.data_received(OK[20:])
    assert desk.ring.undone == 0
    assert desk.owner.events == []
    assert one == two == three


def test_answered_early_takes_no_requests():
    """Nor is it offered to the pool, which would ask it again and again."""
    desk, connection = at_work(b"1", unwritten=1, limit=4)
    connection.data_received(OK)
    desk.push(b"2")
    desk.pool.pump()
    assert (desk.pool.idle, desk.pool.waiting, connection.in_flight()) == ([], 1, 1)
    connection.transport.unflushed = 0
    look(desk)
    desk.pool.pump()
    assert [request.ids for request in connection.transport.requests] == [["p1"], ["p2"]]
    assert desk.ring.undone == 1


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("reset", "connection lost: [Errno 104] Connection reset by peer"),
        ("a second reply", "a second reply before its request was written"),
        ("no progress", "no whole request taken within 5 s"),
    ],
)
@pytest.mark.parametrize("kind", EARLY)
def test_early_2xx_cut_off_is_no_delivery(kind, how, error):
    data, kept = EARLY[kind]
    desk, connection = at_work(b"1", b"2", unwritten=1000, timeout=5.0)
    connection.data_received(data)
    if how == "reset":
        connection.connection_lost(RST)
    elif how == "a second reply":
        connection.data_received(OK)
    else:
        desk.pool.check(time.monotonic_ns() + 6 * SECOND)
        assert connection.transport.ended == "abort"
    if kept or how != "a second reply":
        assert desk.owner.events == [("not sent", ["p2"]), ("failed", ["p1"], error, True, None)]
        assert desk.ring.undone == 2
    else:  # what comes behind the last reply is ignored
        connection.transport.unflushed = 0
        look(desk)
        assert desk.owner.events == [("not sent", ["p2"])]
        assert desk.ring.undone == 1
    desk.check()


def test_requests_behind_early_reply_move():
    desk, connection = at_work(b"1", b"2", b"3", unwritten=1000)
    connection.data_received(CLOSE[:-1])
    assert desk.owner.events == [("not sent", ["p3"]), ("not sent", ["p2"])]
    assert connection.in_flight() == 1
    connection.data_received(CLOSE[-1:])
    connection.transport.unflushed = 100  # what is left is of the others
    look(desk)
    assert connection.transport.ended == "abort"
    assert desk.ring.undone == 2
    assert len(desk.owner.events) == 2
    desk.check()


def test_end_of_input_keeps_an_early_2xx():
    desk, connection = at_work(b"1", b"2", unwritten=1000)
    connection.data_received(OK)
    assert connection.eof_received() is False  # the transport closes when it has written all
    assert desk.owner.events == [("not sent", ["p2"])]
    look(desk)
    assert (desk.ring.undone, connection.transport.ended) == (2, None)
    connection.connection_lost(None)
    assert desk.ring.undone == 1
    assert len(desk.owner.events) == 1
    desk.check()


def test_retired_ends_early_request_first():
    desk, connection = at_work(b"1", unwritten=1000)
    connection.data_received(OK)
    desk.pool.retired = True
    look(desk)
    assert connection.transport.ended is None
    connection.transport.unflushed = 0
    look(desk)
    assert connection.transport.ended == "close"
    assert desk.ring.undone == 0


@pytest.mark.parametrize("status", [400, 413, 422, 500, 503])
@pytest.mark.parametrize("closes", [False, True])
def test_early_non_2xx_counts_at_once(status, closes):
    desk, connection = at_work(b"1", unwritten=1000)
    connection.data_received(reply(status, *["Connection: close"] * closes))
    ((what, ids, *_),) = desk.owner.events
    assert (what, ids) == ("failed" if status >= 500 else "refused", ["p1"])
    assert connection.transport.ended == ("abort" if closes else None)
    desk.check()


# ---- on real sockets


class Early(ScriptServer):
    """Writes ``answer`` when a request begins, and reads on only when ``read_on`` is called."""

    def __init__(self, answer, finish=lambda _transport: None):
        super().__init__(self.answer_at_once)
        self.answer, self.finish = answer, finish

    def answer_at_once(self, _number, transport, data):
        if b"POST" in data[:4]:
            transport.write(self.answer)
            transport.pause_reading()
            self.finish(transport)

    def read_on(self):
        for transport in self.transports:
            if not transport.is_closing():
                transport.resume_reading()

    @property
    def taken(self):
        """The bytes of each connection."""
        return [b"".join(data for at, data in self.received if at == n) for n in range(len(self.transports))]


def early_connections(world):
    return [each for pool in world.pools for each in pool.connections if each.is_early()]


@pytest.mark.parametrize("kind", ["kept", "close", "HTTP/1.0"])
def test_rest_of_an_early_answered_is_sent(tmp_path, tls, kind):
    async def scenario():
        server = await Early(EARLY[kind][0]).start(tls, room=1 << 16)
        async with World(tmp_path, {"A1": endpoint(server.port, tls)}, capacity=1 << 25) as w:
            w.push(1, LARGE)
            await until(lambda: early_connections(w))
            assert (w.delivered(0), w.ring.undone) == (0, 1)
            server.read_on()
            await w.until_empty()
            assert w.counters.get_of(0, "failed") == w.counters.get("retried") == 0
            await until(lambda: len(server.taken[0]) >= len(LARGE) and requests_in(server.taken[0]))
            assert [request.body for request in requests_in(server.taken[0])] == [LARGE]
            assert len(server.transports) == 1
        server.stop()

    run(scenario())


@pytest.mark.parametrize("kind", ["kept", "close"])
def test_early_answered_and_cut_off_retries(tmp_path, tls, kind):
    async def scenario():
        server = await Early(EARLY[kind][0], lambda transport: transport.abort()).start(tls, room=1 << 16)
        mock = start_mock("A2")
        servers = {"A1": endpoint(server.port, tls), "A2": mock}
        async with World(tmp_path, servers, health={"fall": 1}, capacity=1 << 26) as w:
            w.push(3, LARGE)
            await w.until_empty()
            assert (w.delivered(0), w.delivered(1)) == (0, 3)
            assert mock.ledger.acknowledged == 3
            assert w.counters.get_of(0, "failed") > 0
        server.stop()

    run(scenario())


@pytest.mark.parametrize("kind", ["kept", "close"])
def test_analyzer_may_half_close_and_read(tmp_path, kind):
    async def scenario():
        server = await Early(EARLY[kind][0], lambda transport: transport.write_eof()).start(room=1 << 16)
        async with World(tmp_path, {"A1": server}, capacity=1 << 25) as w:
            w.push(1, LARGE)
            await until(lambda: early_connections(w))
            await asyncio.sleep(0.05)
            assert (w.delivered(0), w.ring.undone) == (0, 1)
            server.read_on()
            await w.until_empty()
            assert w.counters.get_of(0, "failed") == w.counters.get("retried") == 0
            await until(lambda: len(server.taken[0]) >= len(LARGE) and requests_in(server.taken[0]))

    run(scenario())


@contextlib.contextmanager
def half_closing_tls(context):
    """Yield a listener and the bytes of an analyzer that answers early, ends its side of the socket, and reads on."""
    taken, listener = [], socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                raw, _ = listener.accept()
                with context.wrap_socket(raw, server_side=True) as connection:
                    data = [connection.recv(65536)]
                    connection.sendall(CLOSE)
                    with socket.socket(fileno=os.dup(connection.fileno())) as same:
                        same.shutdown(socket.SHUT_WR)
                    time.sleep(0.2)
                    with contextlib.suppress(OSError):
                        while data[-1]:
                            data.append(connection.recv(1 << 20))
                    taken.append(b"".join(data))

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield listener, taken


def test_tls_analyzer_may_end_its_side_too(tmp_path, trusted):
    async def scenario():
        with half_closing_tls(trusted) as (listener, taken):
            async with World(tmp_path, {"A1": endpoint(listener.getsockname()[1], trusted)}, capacity=1 << 25) as w:
                w.push(1, LARGE)
                await w.until_empty()
                assert w.counters.get_of(0, "failed") == w.counters.get("retried") == 0
                await until(lambda: taken)
                assert [request.body for request in requests_in(taken[0])] == [LARGE]

    run(scenario())


def test_early_413_counts_despite_a_reset(tmp_path, tls):
    async def scenario():
        answer = reply(413, "Connection: close")
        server = await Early(answer, lambda transport: transport.close()).start(tls, room=1 << 16)
        async with World(tmp_path, {"A1": endpoint(server.port, tls)}, capacity=1 << 26) as w:
            for _ in range(3):
                w.push(1, LARGE)
                await w.until_empty()
            assert w.counters.get("refused") == 3
            assert len(server.transports) == 3
        server.stop()

    run(scenario())
