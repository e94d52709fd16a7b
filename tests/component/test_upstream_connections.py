"""Connections to analyzers: opened on demand, used last in first out, watched, pruned, and what their end means."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time

import pytest
from upstream_harness import (
    OK,
    SECOND,
    Desk,
    DeskPool,
    ScriptServer,
    World,
    endpoint,
    reply,
    requests_in,
    run,
    start_mock,
    until,
)

from fastdist.worker.upstream import AnalyzerPool, describe

CLOSE = reply(200, "Connection: close")

# ---- which connection is used


def test_connection_used_last_is_used_next():
    desk = Desk()
    one, two, three = (desk.connect() for _ in range(3))
    desk.push(b"1", b"2")
    desk.pool.pump()
    assert [each.in_flight() for each in (one, two, three)] == [0, 1, 1]
    two.data_received(OK)
    three.data_received(OK)
    for _ in range(5):
        desk.push(b"x")
        desk.pool.pump()
        three.data_received(OK)
    assert [len(each.transport.requests) for each in (one, two, three)] == [0, 1, 6]
    desk.check()


def test_in_flight_is_at_most_the_product():
    desk = Desk(connections=3, pipeline=2)
    for _ in range(3):
        desk.connect()
    desk.push(*[b"x"] * 20)
    desk.pool.pump()
    assert desk.pool.requests_in_flight == 6
    desk.check()
    done = 0
    while desk.ring.undone:
        for connection in list(desk.pool.connections):
            if connection.in_flight():
                connection.data_received(OK)
                done += 1
                desk.check()
                assert desk.pool.requests_in_flight == min(6, 20 - done)
    sent = sorted(
        int(name[1:]) for each in desk.pool.connections for request in each.transport.requests for name in request.ids
    )
    assert sent == list(range(1, 21))


def test_connection_opens_when_none_is_free():
    desk = Desk(connections=2)
    desk.push(b"1")
    desk.pool.pump()
    assert desk.pool.asked == 1
    first = desk.connect()
    desk.pool.pump()
    assert first.in_flight() == 1
    desk.pool.pump()  # nothing waits
    assert desk.pool.asked == 1
    desk.push(b"2")
    desk.pool.opening = 1  # one is on its way
    desk.pool.pump()
    assert desk.pool.asked == 1
    desk.pool.opening = 0
    desk.pool.pump()
    assert desk.pool.asked == 2
    desk.connect()
    desk.pool.pump()
    desk.push(b"3")
    desk.pool.pump()
    assert desk.pool.asked == 2
    assert desk.pool.waiting == 1


@pytest.mark.parametrize(
    ("delivery", "in_flight", "waiting", "room"),
    [
        ({"connections": 4}, 0, 0, 4),
        ({"connections": 4}, 3, 0, 1),
        ({"connections": 4, "pipeline": 3}, 4, 0, 8),
        ({"connections": 4}, 4, 2, 0),
        ({"connections": 4, "mode": "batch", "batch_packets": 10}, 0, 0, 40),
        ({"connections": 4, "mode": "batch", "batch_packets": 10, "linger": 1000}, 1, 7, 23),
    ],
)
def test_room_is_what_could_be_sent_at_once(delivery, in_flight, waiting, room):
    desk = Desk(**delivery)
    for _ in range(4):
        desk.connect()
    for _ in range(in_flight):
        desk.push(b"x")
        desk.pool.pump()
    assert desk.pool.requests_in_flight == in_flight
    for _ in range(waiting):
        desk.push(b"x")
    desk.pool.pump()
    assert (desk.pool.waiting, desk.pool.room()) == (waiting, room)


# ---- time


def test_only_idle_connections_expire():
    desk = Desk(timeout=1000.0, max_age=1000.0)
    idle, busy = desk.connect(), desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    now = time.monotonic_ns()
    desk.pool.check(now + 59 * SECOND)
    assert idle.transport.ended is None
    desk.pool.check(now + 62 * SECOND)
    assert (idle.transport.ended, busy.transport.ended) == ("close", None)
    assert desk.pool.idle == []
    idle.connection_lost(None)
    assert desk.pool.open_connections == 1
    busy.data_received(OK)
    desk.pool.check(time.monotonic_ns() + 59 * SECOND)
    assert busy.transport.ended is None
    desk.pool.check(time.monotonic_ns() + 62 * SECOND)
    assert busy.transport.ended == "close"
    assert desk.owner.events == []


def test_retired_pool_ends_with_last_reply():
    desk = Desk()
    idle, busy = desk.connect(), desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    desk.pool.retired = True
    desk.pool.check(time.monotonic_ns())
    assert (idle.transport.ended, busy.transport.ended) == ("close", None)
    busy.data_received(OK)
    desk.pool.check(time.monotonic_ns())
    assert busy.transport.ended == "close"
    assert desk.owner.events == []
    assert desk.ring.undone == 0


def test_overdue_reply_fails_only_the_first():
    desk = Desk(timeout=5.0, pipeline=3)
    connection = desk.connect()
    desk.push(b"1", b"2", b"3")
    desk.pool.pump()
    now = time.monotonic_ns()
    desk.pool.check(now + int(4.5 * SECOND))
    assert connection.transport.ended is None
    desk.pool.check(now + int(5.5 * SECOND))
    assert connection.transport.ended == "abort"
    assert desk.owner.events == [
        ("not sent", ["p3"]),
        ("not sent", ["p2"]),
        ("failed", ["p1"], "no reply within 5 s", True, None),
    ]
    desk.check()
    connection.data_received(OK)  # too late
    connection.connection_lost(None)
    assert len(desk.owner.events) == 3
    desk.check()


def test_pipelined_clock_starts_at_reply():
    desk = Desk(timeout=60.0, pipeline=2)
    connection = desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    sent = time.monotonic_ns()
    time.sleep(0.1)
    replied = time.monotonic_ns()
    connection.data_received(OK)
    desk.pool.check(sent + 60 * SECOND + SECOND // 20)  # not yet so long after the reply
    assert connection.transport.ended is None
    assert desk.pool.latency(replied + SECOND) <= SECOND
    desk.pool.check(time.monotonic_ns() + 61 * SECOND)
    assert desk.owner.events == [("failed", ["p2"], "no reply within 60 s", True, None)]


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_endless_body_costs_its_connection(start):
    desk = Desk(timeout=5.0)
    connection = desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    connection.data_received(start)
    assert desk.pool.latency(time.monotonic_ns() + SECOND) == desk.pool.usual_latency  # no reply is awaited
    desk.pool.check(time.monotonic_ns() + 6 * SECOND)
    assert connection.transport.ended == "abort"
    assert desk.owner.events == []
    assert desk.ring.undone == 0


def test_unused_connection_is_never_overdue():
    desk = Desk(timeout=1.0)
    connection = desk.connect()
    assert not connection.overdue(time.monotonic_ns() + 3600 * SECOND, SECOND)
    desk.push(b"1")
    desk.pool.pump()
    assert connection.overdue(time.monotonic_ns() + 2 * SECOND, SECOND)
    connection.data_received(OK)
    assert not connection.overdue(time.monotonic_ns() + 3600 * SECOND, SECOND)


def test_latency_includes_the_awaited_reply():
    desk = Desk()
    connection = desk.connect()
    assert desk.pool.latency(time.monotonic_ns()) == 0
    for _ in range(200):
        desk.push(b"x")
        desk.pool.pump()
        connection.data_received(OK)
    usual = desk.pool.usual_latency
    assert 0 < usual < SECOND
    assert desk.pool.latency(time.monotonic_ns()) == usual
    desk.push(b"x")
    desk.pool.pump()
    assert 9 * SECOND < desk.pool.latency(time.monotonic_ns() + 10 * SECOND) < 60 * SECOND


# ---- ends


def test_idle_connection_closes_at_no_cost():
    desk = Desk()
    fresh, used = desk.connect(), desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    used.data_received(OK)
    for connection, error in ((fresh, None), (used, OSError("reset"))):
        connection.connection_lost(error)
        assert connection not in desk.pool.idle
    assert desk.owner.events == []
    assert (desk.pool.open_connections, desk.pool.connections) == (0, set())
    assert desk.owner.wakes == 4


def test_end_is_reported_only_once():
    desk = Desk(pipeline=2)
    connection = desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    connection.close_after("first", True)
    connection.close_after("second", True)
    connection.data_received(b"garbage")
    connection.connection_lost(OSError("third"))
    assert [event[0] for event in desk.owner.events] == ["not sent", "failed"]
    assert desk.owner.events[1][2] == "first"
    desk.check()


def test_close_drops_bytes_sent_elsewhere():
    """An analyzer that refuses early and reads no further would hold the connection for ever."""
    desk = Desk(pipeline=2)
    connection = desk.connect()
    desk.push(b"x" * 100_000, b"2")
    desk.pool.pump()
    connection.transport.unflushed = 50_000
    connection.data_received(reply(413, "Connection: close"))
    assert connection.transport.ended == "abort"
    assert desk.owner.events == [("refused", ["p1"], 413, False), ("not sent", ["p2"])]


def test_an_end_of_input_ends_the_connection():
    assert Desk().connect().eof_received() is False


def test_gauges_add_up_for_slot_of_two_pools():
    """As after a change of an analyzer's endpoint: the old pool's requests finish while the new one is at work."""
    desk = Desk()
    old = desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    successor = DeskPool(desk.ring, desk.counters, desk.block.analyzers, 1, desk.owner)
    successor.set_up(desk.pool.analyzer, desk.delivery, None)
    gauges = ("requests_in_flight", "packets_in_flight", "connections")
    assert [desk.counters.get_of(1, gauge) for gauge in gauges] == [1, 1, 1]
    desk.pool, first = successor, desk.pool
    new = desk.connect()
    desk.push(b"2")
    desk.pool.pump()
    assert new.in_flight() == 1
    assert [desk.counters.get_of(1, gauge) for gauge in gauges] == [2, 2, 2]
    old.data_received(OK)
    first.retired = True
    first.check(time.monotonic_ns())
    old.connection_lost(None)
    assert [desk.counters.get_of(1, gauge) for gauge in gauges] == [1, 1, 1]


# ---- words for errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TimeoutError(), "no answer within 1.5 s"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "connection refused"),
        (ConnectionRefusedError(), "connection refused"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "No route to host"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ConnectionResetError(), "ConnectionResetError"),
        (OSError("Multiple exceptions: a, b"), "Multiple exceptions: a, b"),
        (ValueError("a reply that is not HTTP"), "a reply that is not HTTP"),
        (ssl.SSLError(1, "[SSL] wrong version number"), "[SSL] wrong version number"),
    ],
)
def test_errors_are_described_in_few_words(error, text):
    assert describe(error, 1.5) == text


# ---- on real sockets


def test_connections_open_on_demand_to_limit(tmp_path):
    async def scenario():
        held = []
        server = await ScriptServer(lambda _n, transport, _data: held.append(transport)).start()
        async with World(tmp_path, {"A1": server}, delivery={"connections": 5, "timeout": 60.0}) as w:
            w.push(1)
            await until(lambda: len(held) == 1)
            assert len(server.transports) == 1
            for _ in range(30):  # while connections are on their way
                w.push(1)
                await asyncio.sleep(0)
            await until(lambda: len(held) == 5)
            await asyncio.sleep(0.1)
            assert len(server.transports) == w.peak_open == len(held) == 5
            pool = w.dispatcher.pools[0]
            assert (pool.opening, pool.open_connections, pool.waiting) == (0, 5, 26)
            for transport in held:
                transport.write(OK)
            server.on_data = lambda _n, transport, _data: transport.write(OK)
            await w.until_empty()
            assert len(server.transports) == 5

    run(scenario())


def test_connections_double_for_the_waiting(tmp_path, monkeypatch):
    """First one, and none more before packets have waited; then as many again each time."""
    opened, steps = [], []
    begin = AnalyzerPool.open_more

    def count(pool):
        before = pool.open_connections + pool.opening
        begin(pool)
        steps.append((before, pool.open_connections + pool.opening))

    monkeypatch.setattr(AnalyzerPool, "open_more", count)

    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: opened.append(transport)).start()
        delivery = {"connections": 12, "timeout": 60.0}
        async with World(tmp_path, {"A1": server}, delivery=delivery) as w:
            pool = w.dispatcher.pools[0]
            w.push(40)
            await until(lambda: steps)
            assert steps[0] == (0, 1)
            await until(lambda: pool.open_connections == 12)
            assert [after - before for before, after in steps] == [1, 1, 2, 4, 4]

    run(scenario())


def test_none_is_added_while_the_first_opens(tmp_path, monkeypatch):
    """However long that takes: a name may be looked up, and TLS shakes hands."""
    begun = []
    go_on = asyncio.Event()
    begin = AnalyzerPool._open

    async def open_late(pool):
        begun.append(pool)
        await go_on.wait()
        await begin(pool)

    monkeypatch.setattr(AnalyzerPool, "_open", open_late)

    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        async with World(tmp_path, {"A1": server}) as w:
            w.push(40)
            await until(lambda: begun)
            await asyncio.sleep(0.1)
            assert len(begun) == 1
            go_on.set()
            await w.until_empty()

    run(scenario())


def test_closing_analyzer_gets_connections(tmp_path):
    """One that closes after each reply: an ended connection is replaced, and the number grows all the same."""

    def answer(_n, transport, _data):
        transport.write(reply(200, "Connection: close"))
        transport.close()

    async def scenario():
        server = await ScriptServer(answer).start()
        async with World(tmp_path, {"A1": server}, delivery={"connections": 4, "mode": "single"}) as w:
            w.push(4000)
            await until(lambda: w.dispatcher.pools[0].allowed == 4)
            await w.until_empty()
            assert w.delivered(0) == len(server.transports) == 4000

    run(scenario())


def test_no_spinning_without_descriptors(tmp_path, monkeypatch):
    asked = []
    begin = AnalyzerPool.open_more
    monkeypatch.setattr(AnalyzerPool, "open_more", lambda pool: (asked.append(1), begin(pool)))

    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        async with World(tmp_path, {"A1": server}) as w:
            w.dispatcher.room = 0
            w.push(1)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert len(asked) <= 5
            w.dispatcher.room = 100
            await w.until_empty()

    run(scenario())


def test_one_connection_serves_a_trickle(tmp_path):
    async def scenario():
        mock = start_mock()
        async with World(tmp_path, {"A1": mock}) as w:
            for _ in range(50):
                w.push(1)
                await w.until_empty()
            assert w.peak_open == 1
            assert mock.ledger.requests == mock.ledger.acknowledged == 50

    run(scenario())


def test_connect_timeout_is_a_failure(tmp_path):
    async def scenario():
        blackhole = socket.create_server(("127.0.0.1", 0), backlog=0)
        port = blackhole.getsockname()[1]
        fillers = []
        for _ in range(4):  # its queue is full: a client that comes now is not answered
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        try:
            # Alone: on a busy machine another, which does answer, could be late as well.
            delivery = {"connect_timeout": 0.2}
            async with World(tmp_path, {"A1": endpoint(port)}, delivery=delivery, health={"fall": 2}) as w:
                w.push(40)
                await until(lambda: not w.states.is_online(0), "it is offline")
                assert w.states.error(0) == "cannot connect: no answer within 0.2 s"
                await until(lambda: w.dispatcher.pools[0].opening == 0, "every try has ended")
                assert (w.ring.undone, w.delivered(0)) == (40, 0)
        finally:
            for each in (*fillers, blackhole):
                each.close()

    run(scenario())


def test_a_refused_connection_is_a_failure(tmp_path):
    async def scenario():
        closed = start_mock("A1", refuse=True)
        mock = start_mock("A2")
        async with World(tmp_path, {"A1": closed, "A2": mock}) as w:
            w.push(40)
            await w.until_empty()
            assert not w.states.is_online(0)
            assert w.states.error(0) == "cannot connect: connection refused"
            assert (w.delivered(0), w.delivered(1)) == (0, 40)
            assert mock.ledger.duplicates == 0
            assert w.dispatcher.pools[0].opening == 0

    run(scenario())


@pytest.mark.parametrize("when", ["accepted", "requested"])
def test_server_hangup_is_failure_not_loss(tmp_path, when):
    async def scenario():
        def hang_up(_number, transport, _data=None):
            transport.close()

        server = await ScriptServer(**{"on_connect" if when == "accepted" else "on_data": hang_up}).start()
        mock = start_mock("A2")
        async with World(tmp_path, {"A1": server, "A2": mock}) as w:
            w.push(60)
            await w.until_empty()
            assert w.delivered(1) == 60
            if when == "requested":
                assert not w.states.is_online(0)
                assert w.states.error(0) == "connection closed before the reply"

    run(scenario())


def test_stale_keep_alive_is_no_failure(tmp_path):
    async def scenario():
        def answer_twice(number, transport, data):
            requests = [each for at, each in server.received if at == number]
            transport.write(OK * len(requests_in(data)))
            if len(requests) >= 2:
                transport.close()

        server = await ScriptServer(answer_twice).start()
        async with World(tmp_path, {"A1": server}, health={"fall": 1}) as w:
            for _ in range(30):
                w.push(2)
                await w.until_empty()
            assert w.states.is_online(0)
            assert w.delivered(0) == 60
            assert w.counters.get_of(0, "failed") == 0
            assert w.states.error(0) == ""

    run(scenario())


def test_requests_behind_endless_reply_retry(tmp_path):
    """The analyzer gives no length, and leaves the end of the connection to us: no more is looked at there."""

    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(b"HTTP/1.1 200 OK\r\n\r\nok")).start()
        delivery = {"pipeline": 4, "connections": 32, "timeout": 60.0}
        async with World(tmp_path, {"A1": server}, delivery=delivery, health={"fall": 1}) as w:
            w.push(32)
            await w.until_empty()
            assert w.delivered(0) == 32
            assert w.counters.get_of(0, "failed") == 0
            assert w.states.is_online(0)

    run(scenario())


def test_closing_connection_frees_its_slot(tmp_path, tls):
    """The analyzer says that it closes, leaves that to us, and does not listen any more."""

    async def scenario():
        def answer(_number, transport, _data):
            transport.write(reply(200, "Connection: close"))
            transport.pause_reading()

        server = await ScriptServer(answer).start(tls)
        async with World(tmp_path, {"A1": endpoint(server.port, tls)}, delivery={"connections": 1}) as w:
            w.push(20)
            await w.until_empty()
            assert w.delivered(0) == len(server.transports) == 20
            assert w.counters.get_of(0, "failed") == w.counters.get("retried") == 0
            assert w.peak_open == 1
            await until(lambda: w.dispatcher.pools[0].open_connections == 0)
        server.stop()

    run(scenario())


@pytest.mark.parametrize("how", ["closed by us", "left to us"])
def test_tls_end_sends_close_notify(tmp_path, trusted, how):
    """The reader is told that it was no cut (close_notify)."""

    async def scenario():
        ends = []
        server = ScriptServer(lambda _n, transport, _data: transport.write(OK if how == "closed by us" else CLOSE))
        server.on_eof = ends.append
        await server.start(trusted)
        async with World(tmp_path, {"A1": endpoint(server.port, trusted)}) as w:
            w.push(1)
            await w.until_empty()
            w.dispatcher.stop()
            await until(lambda: ends == [0])
        server.stop()

    run(scenario())


def test_early_refusal_frees_the_connection(tmp_path):
    """The analyzer refuses a body it does not read, and says that it closes, but does not."""

    async def scenario():
        def refuse(_number, transport, _data):
            if not transport.is_closing():
                transport.pause_reading()
                transport.write(reply(413, "Connection: close"))

        server = await ScriptServer(refuse).start()
        async with World(tmp_path, {"A1": server}, delivery={"connections": 1}, capacity=1 << 25) as w:
            for _ in range(3):
                w.push(1, b"x" * (12 << 20))
                await w.until_empty()
            assert w.counters.get("refused") == 3
            assert len(server.transports) == 3

    run(scenario())


def test_untrusted_certificate_is_a_failure(tmp_path, certificate):
    async def scenario():
        server = await ScriptServer().start(tls=certificate[1])
        mock = start_mock("A2")
        async with World(tmp_path, {"A1": endpoint(server.port, "tls"), "A2": mock}) as w:
            w.push(20)
            await w.until_empty()
            assert w.delivered(1) == 20
            assert not w.states.is_online(0)
            assert "certificate verify failed" in w.states.error(0)
            assert "self-signed" in w.states.error(0) or "self signed" in w.states.error(0)
            assert server.received == []
        server.stop()

    run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_packets_travel_over_tls(tmp_path, trusted, host):
    """A certificate is for the host that is in the endpoint, and for no other."""

    async def scenario():
        server = await ScriptServer(lambda _n, transport, data: transport.write(OK * data.count(b"POST"))).start(
            trusted
        )
        mock = start_mock("A2")
        servers = {"A1": endpoint(server.port, trusted, host), "A2": mock}
        async with World(tmp_path, servers, delivery={"pipeline": 4}) as w:
            w.push(40)
            await w.until_empty()
            if host == "127.0.0.1":
                assert abs(w.delivered(0) - 20) <= 2
                assert w.counters.get("retried") == 0
                assert w.states.is_online(0)
            else:
                assert (w.delivered(0), w.delivered(1)) == (0, 40)
                assert "certificate verify failed" in w.states.error(0)
        server.stop()

    run(scenario())


def test_server_without_tls_is_a_failure(tmp_path):
    async def scenario():
        plain = start_mock("A1")
        mock = start_mock("A2")
        async with World(tmp_path, {"A1": endpoint(plain.listener.port, "tls"), "A2": mock}) as w:
            w.push(20)
            await w.until_empty()
            assert w.delivered(1) == 20
            assert not w.states.is_online(0)
            assert w.states.error(0).startswith("cannot connect: ")
        plain.stop()

    run(scenario())
