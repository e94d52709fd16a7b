"""Connections that health checks over https keep: for how long, and that they tell nothing wrong of who is there."""

from __future__ import annotations

import asyncio
import itertools
from unittest.mock import Mock

import pytest
from upstream_harness import ScriptServer, reply, run, self_signed, shared_block, until

from fastdist.settings import Analyzer, Health
from fastdist.shm.block import AnalyzerWord
from fastdist.supervisor.health import HealthChecker, Probe

OK = reply(200)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return self_signed(tmp_path_factory.mktemp("tls"))


class Checked:
    """A server behind TLS, which does ``on_data``, and the checks of it; what is told is from ``states``."""

    def __init__(self, certificate, on_data, *, max_age=60.0, host="127.0.0.1", **settings):
        self.certificate, self.host = certificate, host
        self.server = ScriptServer(on_data)
        self.states = shared_block().analyzers
        self.states.clear(0)
        self.states.set(0, AnalyzerWord.IN_USE, 1)
        wanted = Health(**{"interval": 0.01, "timeout": 5.0, "rise": 1, "fall": 1} | settings)
        self.checker = HealthChecker(self.states, wanted, max_age)
        self.checker.tls.system.load_verify_locations(certificate[0])

    async def __aenter__(self):
        await self.server.start(self.certificate[1])
        url = f"https://{self.host}:{self.server.port}/analyze"
        self.checker.set_analyzers({0: Analyzer(id="A1", endpoint=url, weight=1)})
        return self

    async def __aexit__(self, *_error):
        self.checker.close()
        await until(lambda: self.server.open == 0, "no connection is left")
        self.server.stop()
        await asyncio.sleep(0.01)

    @property
    def connections(self):
        return len(self.server.transports)

    async def asked(self, times):
        await until(lambda: len(self.server.received) >= times, f"{times} checks")

    def is_well(self):
        """Whether no check has failed so far: one would do."""
        return self.states.is_online(0) and self.states.error(0) == ""


ANSWERS = {
    "with a length": reply(200, body=b"well"),
    "long": reply(200, body=b"x" * 60_000),
    "without a body": b"HTTP/1.1 204 No Content\r\n\r\n",
    "in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwell\r\n0\r\n\r\n",
    "after another": b"HTTP/1.1 102 Processing\r\nA: b\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_one_connection_serves_many_checks(certificate, name):
    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(ANSWERS[name])) as it:
            await it.asked(20)
            assert it.connections == 1
            assert it.is_well()

    run(scenario())


UNFIT = {
    "Connection: close": reply(200, "Connection: close"),
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n",
    "more than was asked for": OK + b"HTTP/1.1 408 Request Timeout\r\n\r\n",
    "never whole": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx",
    "too long": reply(200, body=b"x" * 200_000),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unusable_connection_is_not_kept(certificate, name):
    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(UNFIT[name])) as it:
            await it.asked(5)
            assert it.connections >= 5
            assert it.is_well()

    run(scenario())


def test_bad_response_counts_on_kept_one_too(certificate):
    answers = itertools.chain([OK, OK, OK], itertools.repeat(reply(503)))

    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(next(answers))) as it:
            await until(lambda: not it.states.is_online(0))
            assert it.states.error(0) == "health check: HTTP 503"
            assert it.connections == 1

    run(scenario())


ENDS = {
    "closed": lambda transport: transport.close(),
    "reset": lambda transport: transport.abort(),
    "silent": lambda _transport: None,
    "garbage": lambda transport: transport.write(b"\x00\n"),
}


@pytest.mark.parametrize("how", ENDS)
def test_failed_kept_connection_rechecks(certificate, how):
    """Behind its address there may be another server by now, or it closes connections soon."""
    answered = set()

    def answer(number, transport, _data):
        if number in answered:
            ENDS[how](transport)
        else:
            answered.add(number)
            transport.write(OK)

    async def scenario():
        async with Checked(certificate, answer, timeout=0.3 if how == "silent" else 5.0) as it:
            await until(lambda: len(answered) >= 4, "new connections")
            if how != "silent":  # which a machine that is busy may be on a new connection too
                assert it.is_well()

    run(scenario())


def test_closed_connection_is_replaced(certificate):
    def answer(_number, transport, _data):
        transport.write(OK)
        asyncio.get_running_loop().call_soon(transport.close)

    async def scenario():
        async with Checked(certificate, answer) as it:
            await it.asked(6)
            assert it.connections >= 6
            assert it.is_well()

    run(scenario())


def test_kept_connection_has_a_max_age(certificate):
    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(OK), max_age=0.05) as it:
            await until(lambda: it.connections >= 4, "new connections")
            assert it.is_well()

    run(scenario())


def test_checks_follow_a_moved_name(certificate):
    """The old server goes on answering."""

    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(OK)) as it:
            await it.asked(3)
            it.checker._names.current = lambda _host: frozenset({"127.0.0.9"})
            await until(lambda: it.connections >= 2, "a new connection")

    run(scenario())


def test_checks_that_end_leave_no_connection(certificate):
    """Those of an analyzer that is removed, or checked elsewhere from now on."""

    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(OK)) as it:
            await it.asked(3)
            url = f"https://127.0.0.1:{it.server.port}/analyze"
            it.checker.set_analyzers({0: Analyzer(id="A1", endpoint=url, weight=1, health="/other")})
            await until(lambda: b"GET /other" in it.server.received[-1][1])
            await until(lambda: it.server.open == 1, "that for the old path is closed")
            it.checker.set_analyzers({})
            await until(lambda: it.server.open == 0, "all are closed")

    run(scenario())


def test_kept_connections_are_limited(certificate):
    """The others are opened for each check."""

    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(OK)) as it:
            it.checker._max_connections = 2
            url = f"https://127.0.0.1:{it.server.port}/"
            analyzers = {slot: Analyzer(id=f"A{slot}", endpoint=url, weight=1, health=f"/{slot}") for slot in range(5)}
            it.checker.set_analyzers(analyzers)
            await it.asked(60)
            assert len(it.checker._kept) <= 2
            assert it.connections > 10
            assert it.is_well()

    run(scenario())


def test_same_checks_leave_nothing_open(certificate):
    async def scenario():
        async with Checked(certificate, lambda _n, transport, _data: transport.write(OK)) as it:
            url = f"https://127.0.0.1:{it.server.port}/analyze"
            it.checker.set_analyzers({slot: Analyzer(id=f"A{slot}", endpoint=url, weight=1) for slot in range(4)})
            await it.asked(40)

    run(scenario())


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (OK, True),
        (OK[:-1], False),
        (reply(200, body=b"x" * 60_000), True),
        (OK + b"x", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length:3\r\n\r\nabc", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", False),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive, Close\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Connection: close\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"", False),
    ],
)
def test_whether_a_reply_is_whole(data, whole):
    async def scenario():
        probe = Probe(60.0)
        probe.connection_made(Mock(spec=asyncio.Transport, is_closing=lambda: False))
        asking = asyncio.ensure_future(probe.ask(b""))
        await asyncio.sleep(0)
        probe.data_received(data)
        assert probe.can_be_asked_again(frozenset()) is whole
        asking.cancel()

    run(scenario())
