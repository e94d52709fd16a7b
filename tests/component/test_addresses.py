"""Analyzers by name: with several addresses, some of which are dead; with a name that hangs, or that moves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading

import pytest
from upstream_harness import OK, ScriptServer, World, endpoint, requests_in, run, shared_block, until

from fastdist.net import connect, names
from fastdist.settings import Analyzer, Health
from fastdist.shm.block import AnalyzerWord
from fastdist.supervisor.health import HealthChecker

NAME = "analyzer.test"
FIRST, SECOND = "127.0.0.2", "127.0.0.1"


class Resolver:
    """Stands for the system's: ``addresses`` of NAME, in this order; any other name hangs until ``over``."""

    def __init__(self):
        self.real, self.addresses, self.over = socket.getaddrinfo, [SECOND], threading.Event()

    def getaddrinfo(self, host, *args, flags=0, **options):
        if flags & socket.AI_NUMERICHOST:
            return self.real(host, *args, flags=flags, **options)
        if host != NAME:
            self.over.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.addresses]


@pytest.fixture
def resolver(monkeypatch):
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    yield resolver
    resolver.over.set()


@contextlib.contextmanager
def dead(how, port):
    """Have FIRST's port refuse connections, leave them unanswered, or take them and say nothing."""
    with contextlib.ExitStack() as stack:
        if how != "refuses":
            listener = stack.enter_context(socket.create_server((FIRST, port), backlog=0 if how == "swallows" else 100))
            for _ in range(4 if how == "swallows" else 0):  # its backlog is full: new connections are not completed
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
        yield


def ids(server):
    """Return the ids of all requests a server got, in order; each came in one piece."""
    return [name for _, data in server.received for request in requests_in(data) for name in request.ids]


async def answering(tls=None, host=SECOND, port=0):
    return await ScriptServer(lambda _n, transport, data: transport.write(OK * data.count(b"HTTP/1.1\r\n"))).start(
        tls, host, port
    )


async def passed(server, tls, **health):
    """Have NAME checked until three checks in a row were good, and it is online; return the states."""
    states = shared_block().analyzers
    states.clear(0)
    states.set(0, AnalyzerWord.IN_USE, 1)
    checker = HealthChecker(states, Health(interval=0.02, **health), 60.0)
    checker.set_analyzers({0: Analyzer(id="A1", endpoint=endpoint(server.port, tls, NAME), weight=1)})
    await until(lambda: states.get(0, AnalyzerWord.CHECK_SUCCESSES) >= 3)
    assert states.is_online(0)
    checker.close()
    return states


@pytest.mark.parametrize("how", ["refuses", "swallows"])
def test_packets_reach_next_address_of_name(tmp_path, resolver, tls, how):
    resolver.addresses = [FIRST, SECOND]

    async def scenario():
        server = await answering(tls)
        with dead(how, server.port):
            async with World(tmp_path, {"A1": endpoint(server.port, tls, NAME)}, health={"fall": 1}) as w:
                w.push(20)
                await w.until_empty()
                assert w.delivered(0) == 20
                assert w.counters.get_of(0, "failed") == 0
                assert w.states.is_online(0)
        server.stop()

    run(scenario())


@pytest.mark.parametrize("how", ["refuses", "swallows"])
def test_checks_reach_next_address_of_name(resolver, tls, how):
    resolver.addresses = [FIRST, SECOND]

    async def scenario():
        server = await answering(tls)
        with dead(how, server.port):
            states = await passed(server, tls, timeout=5.0, fall=1)
            assert states.error(0) == ""
        server.stop()

    run(scenario())


def test_dead_address_leaves_checks_time(resolver, monkeypatch, tls):
    """Where the time-out is over before the next address is tried."""
    monkeypatch.setattr(connect, "NEXT_ADDRESS", 2.0)
    resolver.addresses = [FIRST, SECOND]

    async def scenario():
        server = await answering(tls)
        with dead("swallows", server.port):
            states = await passed(server, tls, timeout=2.0, fall=1)
            assert states.error(0) == ""
        server.stop()

    run(scenario())


@pytest.mark.parametrize("tls", ["tls"], indirect=True)
def test_checks_learn_of_a_silent_address(resolver, tls):
    """It takes connections and leaves the handshake unanswered: that fails once, not each time."""
    resolver.addresses = [FIRST, SECOND]

    async def scenario():
        server = await answering(tls)
        with dead("says nothing", server.port):
            await passed(server, tls, timeout=1.0, fall=2)
        server.stop()

    run(scenario())


@pytest.mark.parametrize("tls", ["tls"], indirect=True)  # without, only the reply that does not come tells
def test_silent_address_is_tried_last(tmp_path, resolver, tls):
    """It takes connections and leaves the handshake unanswered: that fails once, not each time."""
    resolver.addresses = [FIRST, SECOND]

    async def scenario():
        server = await answering(tls)
        with dead("says nothing", server.port):
            delivery = {"connect_timeout": 1.0, "connections": 1}
            async with World(tmp_path, {"A1": endpoint(server.port, tls, NAME)}, delivery=delivery) as w:
                w.push(20)
                await w.until_empty()
                assert w.delivered(0) == 20
                assert w.counters.get_of(0, "failed") == 1
        server.stop()

    run(scenario())


@pytest.mark.usefixtures("resolver")
def test_name_that_hangs_delays_no_other(tmp_path):
    """As many of them as the loop has threads for all of its look-ups, and more."""

    async def scenario():
        server = await answering()
        hanging = {f"B{number}": endpoint(9, None, f"slow{number}.test") for number in range(7)}
        async with World(tmp_path, {"A1": endpoint(server.port, None, NAME), **hanging}, health={"fall": 1}) as w:
            checker = HealthChecker(w.states, Health(interval=0.02, timeout=5.0, fall=1), 60.0)
            checker.set_analyzers(w.analyzers)
            w.push(400)
            await w.until_empty()
            assert w.delivered(0) == 400
            await until(lambda: w.states.get(0, AnalyzerWord.CHECK_SUCCESSES) >= 5)
            assert w.states.is_online(0)
            assert "the name slow0.test cannot be looked up" in w.states.error(1)
            checker.close()
        server.stop()

    run(scenario())


def test_kept_connections_follow_moved_name(tmp_path, resolver, monkeypatch, tls):
    """Blue-green: the old address would still answer. No packet is cut off, or sent twice."""
    monkeypatch.setattr(names, "FRESH", 0.02)

    async def scenario():
        old = await answering(tls)
        new = await answering(tls, FIRST, old.port)
        async with World(tmp_path, {"A1": endpoint(old.port, tls, NAME)}, delivery={"connections": 4}) as w:
            for _ in range(10):
                w.push(20)
                await w.until_empty()
            assert not new.received
            resolver.addresses = [FIRST]

            async with asyncio.timeout(20):
                while old.open:
                    w.push(20)
                    await w.until_empty()
            before = len(old.received)
            w.push(20)
            await w.until_empty()
            assert len(old.received) == before
            assert new.received
            delivered = ids(old) + ids(new)
            assert len(set(delivered)) == len(delivered) == w.pushed
            assert w.counters.get("retried") == w.counters.get_of(0, "failed") == 0
        old.stop()
        new.stop()

    run(scenario())


@pytest.mark.parametrize("pipeline", [1, 4])
def test_connections_change_between_requests(tmp_path, pipeline):
    """However busy they are: each request that was sent on one is answered on it."""

    async def scenario():
        slow = asyncio.get_running_loop().call_later

        def answer(_number, transport, data):
            for order in range(len(requests_in(data))):
                slow(0.005 * (order + 1), transport.write, OK)

        server = await ScriptServer(answer).start()
        delivery = {"connections": 2, "pipeline": pipeline, "max_age": 0.1}
        async with World(tmp_path, {"A1": server}, delivery=delivery) as w:
            for _ in itertools.takewhile(lambda _: len(server.transports) < 10, itertools.count()):
                w.push(4 * pipeline)  # so that none is ever without a request
                await until(lambda: w.ring.undone < 4 * pipeline)
            await w.until_empty()
            delivered = ids(server)
            assert len(set(delivered)) == len(delivered) == w.pushed
            assert w.counters.get("retried") == w.counters.get_of(0, "failed") == 0
            assert w.peak_open <= 2

    run(scenario())
