"""What this machine lacks (descriptors, threads, ports) is held against no analyzer, and is told."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import os
import resource
import socket
import threading
from pathlib import Path

import pytest
from upstream_harness import ScriptServer, World, reply, requests_in, run, shared_block, until

from fastdist.net.connect import connect, shortage
from fastdist.net.names import Names
from fastdist.settings import Analyzer, Health
from fastdist.shm.block import AnalyzerWord
from fastdist.supervisor import health
from fastdist.supervisor.health import HealthChecker
from fastdist.units import parse_endpoint

OK = reply(200)


def open_files():
    """Return what the descriptors of this process are of."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the look itself
            links.append(str(descriptor.readlink()))
    return links


def open_sockets():
    return sum(link.startswith("socket:") for link in open_files())


@contextlib.contextmanager
def descriptors(number):
    """Have no more than so many descriptors, in this process, until the end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def none_left():
    """Have no descriptor left."""
    with descriptors(3):
        yield


def checks_of(*endpoints, **settings):
    """Return a checker of these, to be started, its states and its analyzers by slot."""
    states = shared_block(slots=max(4, len(endpoints))).analyzers
    analyzers = {}
    for slot, endpoint in enumerate(endpoints):
        states.clear(slot)
        states.set(slot, AnalyzerWord.IN_USE, 1)
        analyzers[slot] = Analyzer(id=f"A{slot}", endpoint=endpoint, weight=1)
    wanted = Health(**{"interval": 0.01, "timeout": 5.0, "rise": 1, "fall": 1} | settings)
    return HealthChecker(states, wanted, 60.0), states, analyzers


async def lacks(told):
    """Wait until ``told`` (of what is missing) raises; return its error number."""

    def look():
        try:
            told()
        except OSError as error:
            return error.errno
        return 0

    return await until(look, "it is told")


def test_no_descriptor_is_no_check_outcome():
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        checker, states, analyzers = checks_of(server.endpoint)
        with none_left():
            checker.set_analyzers(analyzers)
            for _ in range(3):
                assert await lacks(checker.shortage.raise_once) == errno.EMFILE
            assert states.is_online(0)
            assert (states.get(0, AnalyzerWord.LAST_CHECK_NS), states.error(0)) == (0, "")
        await until(lambda: states.get(0, AnalyzerWord.LAST_STATUS) == 200, "it is checked")
        checker.close()
        server.stop()

    run(scenario())


def test_packets_wait_without_a_descriptor(tmp_path):
    def answer(_number, transport, data):
        transport.write(OK * len(requests_in(data)))

    async def scenario():
        server = await ScriptServer(answer).start()
        async with World(tmp_path, {"A1": server}, health={"fall": 1}, retry={"max_attempts": 1}) as w:
            with none_left():
                w.push(20)
                for _ in range(3):
                    assert await lacks(w.dispatcher.shortage.raise_once) == errno.EMFILE
                assert w.states.is_online(0)
                assert (w.counters.get_of(0, "failed"), w.states.error(0), w.ring.undone) == (0, "", 20)
            await w.until_empty()
            assert w.delivered(0) == 20
            assert w.counters.get_of(0, "failed") == 0

    run(scenario())


def test_analyzers_spare_client_descriptors(tmp_path):
    """And those there may be serve all analyzers in turn."""

    def answer(_number, transport, data):
        transport.write(OK * len(requests_in(data)))

    async def scenario():
        servers = {f"A{number}": await ScriptServer(answer).start() for number in range(6)}
        async with World(tmp_path, servers, health={"fall": 1}, delivery={"spill_after": math.inf}) as w:
            w.dispatcher._max_connections = w.dispatcher.room = 2
            w.push(60)
            most = 0

            def empty():
                nonlocal most
                most = max(most, sum(pool.open_connections + pool.opening for pool in w.pools))
                return w.ring.undone == 0

            await until(empty, "all delivered")
            assert most == 2
            assert all(w.delivered(slot) for slot in w.analyzers)
            assert sum(w.counters.get_of(slot, "failed") for slot in w.analyzers) == 0

    run(scenario())


def test_checks_leave_descriptors_to_others(monkeypatch):
    """However many analyzers there are, and however slow: here they accept every connection and say nothing."""
    monkeypatch.setattr(health, "descriptors", lambda: 100)

    async def scenario():
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            gc.collect()  # sockets of tests before
            before = open_sockets()
            checker, states, analyzers = checks_of(*[endpoint] * 400, timeout=0.2, fall=2)
            checker.set_analyzers(analyzers)
            most = 0

            def all_checked():
                nonlocal most
                most = max(most, open_sockets() - before)
                return all(states.get(slot, AnalyzerWord.CHECK_FAILURES) for slot in analyzers)

            await until(all_checked, "each is checked")
            # A quarter, and as many whose checks have just ended: they are closed an event-loop iteration later.
            assert 1 < most <= 50
            checker.close()

    run(scenario())


# ---- what is a shortage


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_local_errors_are_distinguished(number):
    error = OSError(number, os.strerror(number))
    assert shortage(error) is error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        TimeoutError(),
        OSError(errno.EADDRNOTAVAIL, "no address"),
        OSError("several addresses, several errors"),
        ZeroDivisionError(),
    ],
)
def test_errors_of_the_peer_are_no_shortage(error):
    assert shortage(error) is None


def test_error_without_number_is_examined():
    with none_left():
        assert shortage(OSError("several addresses, several errors")).errno == errno.EMFILE
        assert shortage(TimeoutError()) is None


def test_missing_thread_is_a_shortage(monkeypatch):
    def no_thread(_thread):
        raise RuntimeError("can't start new thread")

    async def scenario():
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OSError, match="can't start new thread") as caught:
            await Names().infos("analyzer.test", 80, 5.0)
        assert shortage(caught.value)

    run(scenario())


@pytest.mark.parametrize(("host", "is_ours"), [("127.0.0.1", True), ("255.255.255.255", False)])
def test_ports_used_up_are_a_shortage(monkeypatch, host, is_ours):
    """Nothing is said of an address that there is no way to, which has the same error."""
    ask = socket.socket.connect

    def no_port(self, address):
        if self.type == socket.SOCK_STREAM:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        ask(self, address)

    async def scenario():
        monkeypatch.setattr(socket.socket, "connect", no_port)
        with pytest.raises(OSError) as caught:  # noqa: PT011  (which, is asked below)
            await connect(asyncio.Protocol(), Names(), parse_endpoint(f"http://{host}:9/"), 1.0)
        assert bool(shortage(caught.value)) is is_ours

    run(scenario())
