"""What counts as no progress of an analyzer: not that it takes a large request slowly, nor that no check ran."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from upstream_harness import (
    SECOND,
    Desk,
    ScriptServer,
    World,
    endpoint,
    reply,
    requests_in,
    run,
    shared_block,
    start_mock,
    until,
)

from fastdist.settings import Analyzer, Health
from fastdist.shm.block import AnalyzerWord
from fastdist.supervisor.health import HealthChecker
from fastdist.worker import upstream

LARGE = b"x" * (8 << 20)


# ---- a large request, and a reader that is slow or stands still


def test_a_large_request_may_take_its_time(tmp_path, tls):
    """Several times ``timeout`` in all, but never without progress; and it is sent once."""

    async def scenario():
        taken = 0

        def take(_number, transport, data):
            nonlocal taken
            taken += len(data)
            if taken > len(LARGE):
                transport.write(reply(200))
            else:
                transport.pause_reading()
                asyncio.get_running_loop().call_later(0.15 if tls else 0.05, resume, transport)

        def resume(transport):
            if not transport.is_closing():
                transport.resume_reading()

        server = await ScriptServer(take).start(tls, room=1 << 16)
        delivery = {"timeout": 1.0}
        async with World(tmp_path, {"A1": endpoint(server.port, tls)}, delivery=delivery, capacity=1 << 25) as w:
            w.push(1, LARGE)
            await until(lambda: w.ring.undone == 0, seconds=50)
            assert w.counters.get_of(0, "failed") == w.counters.get("retried") == 0
            assert len(server.transports) == 1
        server.stop()

    run(scenario())


def test_reader_that_stalls_is_a_failure(tmp_path, tls):
    """However much the system's buffers have taken by then."""

    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.pause_reading()).start(tls)
        mock = start_mock("A2")
        delivery = {"timeout": 0.5}
        servers = {"A1": endpoint(server.port, tls), "A2": mock}
        async with World(tmp_path, servers, delivery=delivery, health={"fall": 1}, capacity=1 << 26) as w:
            for _ in range(4):
                w.push(1, LARGE)
            await w.until_empty()
            assert w.delivered(1) == 4
            assert w.states.error(0) == "no reply within 0.5 s"
        server.stop()

    run(scenario())


# ---- when it is us who are late


class Late(BaseHTTPRequestHandler):
    """Answers each request in a thread of its own, when the server says so."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.ids.append(self.headers["X-Packet-Id"])
        self.server.answer.wait(60)
        self.wfile.write(reply(200))

    def do_GET(self):
        self.do_POST()

    def log_message(self, *_):
        pass


class LateServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextlib.contextmanager
def late_server(tls=None):
    server = LateServer(("127.0.0.1", 0), Late)
    server.ids, server.answer = [], threading.Event()
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.answer.set()
    server.shutdown()
    server.server_close()


async def stop_for(seconds, server):
    """Run nothing in this thread, as a process that is stopped; the server answers meanwhile.

    It is stopped where timers come next, not what has arrived.
    """
    threading.Timer(0.1, server.answer.set).start()
    asyncio.get_running_loop().call_later(0.01, time.sleep, seconds)
    await asyncio.sleep(0.02)


def test_replies_that_came_are_read_first(tmp_path, tls):
    async def scenario():
        with late_server(tls) as server:
            async with World(tmp_path, {"A1": endpoint(server.server_port, tls)}, delivery={"timeout": 1.0}) as w:
                w.push(4)
                await until(lambda: len(server.ids) == 4)
                await stop_for(1.3, server)
                await w.until_empty()
                assert w.counters.get_of(0, "failed") == w.counters.get("retried") == 0
                assert len(server.ids) == len(set(server.ids)) == 4

    run(scenario())


def test_unobserved_time_does_not_count():
    desk = Desk(timeout=5.0)
    connection = desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    now = time.monotonic_ns()
    desk.pool.check(now + SECOND // 10)
    for moment in (60.0, 61.0, 62.0, 63.0):  # it was all stopped for a minute
        desk.pool.check(now + int(moment * SECOND))
        assert connection.transport.ended is None
    desk.pool.check(now + int(64.0 * SECOND))
    desk.pool.check(now + int(65.0 * SECOND))
    assert connection.transport.ended == "abort"


def test_check_answered_meanwhile_is_good():
    async def scenario():
        with late_server() as server:
            states = shared_block().analyzers
            states.clear(0)
            states.set(0, AnalyzerWord.IN_USE, 1)
            checker = HealthChecker(states, Health(interval=0.02, timeout=1.0, fall=1), 60.0)
            checker.set_analyzers({0: Analyzer(id="A1", endpoint=endpoint(server.server_port, None), weight=1)})
            await until(lambda: server.ids)
            await stop_for(1.8, server)
            await until(lambda: states.get(0, AnalyzerWord.LAST_CHECK_NS))
            assert states.error(0) == ""
            assert states.is_online(0)
            checker.close()

    run(scenario())


# ---- replies that make progress for ever


@pytest.fixture
def short_replies(monkeypatch):
    """A reply may take one time-out, not twelve; so that is a long one: a busy machine stands still for a second."""
    monkeypatch.setattr(upstream, "MAX_REPLY", 1)


@pytest.mark.usefixtures("short_replies")
@pytest.mark.parametrize("pipeline", [1, 3])
@pytest.mark.parametrize(
    ("beginning", "more", "failed"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 1),
        (b"HTTP/1.1 102 Processing\r\nX-Slow: ", b"x", 1),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0),
    ],
    ids=["head", "interim head", "chunks", "no length"],
)
def test_endless_reply_does_not_block(tmp_path, pipeline, beginning, more, failed):
    """Every byte is progress; the first connection would never be free again, nor what is behind it delivered."""

    async def scenario():
        def drip(transport, data):
            if not transport.is_closing():
                transport.write(data)
                asyncio.get_running_loop().call_later(0.02, drip, transport, more)

        def answer(number, transport, data):
            if number:
                transport.write(reply(200) * len(requests_in(data)))
            else:
                drip(transport, beginning)

        server = await ScriptServer(answer).start()
        delivery = {"timeout": 2.0, "connections": 1, "pipeline": pipeline}
        async with World(tmp_path, {"A1": server}, delivery=delivery) as w:
            w.push(6)
            await w.until_empty()
            assert w.delivered(0) == 6
            assert w.counters.get_of(0, "failed") == failed
            assert len(server.transports) == 2
        server.stop()

    run(scenario())
