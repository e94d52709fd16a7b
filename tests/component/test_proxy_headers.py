"""Headers of the PROXY protocol on connections: read to the byte, whatever comes in one piece, and within bounds."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import uvloop
from proxying import BAD, GOOD
from structlog.testing import capture_logs

from fastdist.net import timeouts
from fastdist.net.proxies import TrustedProxies
from fastdist.worker.proxy_headers import ProxyHeaders

PROXY = ("10.0.0.1", 40000)
REST = b"POST /logs HTTP/1.1\r\n"


class Headers(ProxyHeaders):
    """What reads them, and what became of the connections."""

    def __init__(self, *, room=100, patience=60.0):
        self.passed_on = []
        trusted = TrustedProxies(["10.0.0.0/8", "127.0.0.1"])
        super().__init__(lambda *taken: self.passed_on.append(taken), trusted, lambda waiting: waiting < room, patience)

    def connect(self, peer=PROXY):
        """Return the other end of a connection that was just accepted."""
        ours, theirs = socket.socketpair()
        self(ours, peer)
        return theirs

    async def settle(self, condition):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  (what is awaited is elsewhere)
                await asyncio.sleep(0)


def unread(connection):
    try:
        return connection.recv(65536, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def is_closed(connection):
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def run(test):
    async def within():
        await test(asyncio.get_running_loop())

    asyncio.run(within())


@pytest.mark.parametrize("kind", GOOD)
def test_header_in_two_pieces_is_one(kind):
    """Cut at every byte; what follows it is left to be read, be it in the same piece or not."""
    data, client = GOOD[kind]

    async def cut_at_each(_):
        headers = Headers()
        for end in range(1, len(data)):
            theirs = headers.connect()
            theirs.sendall(data[:end])
            (waiting,) = headers._waiting
            await headers.settle(lambda: unread_size(waiting) == 0)  # noqa: B023
            assert not headers.passed_on
            theirs.sendall(data[end:] + REST)
            await headers.settle(lambda: headers.passed_on)
            connection, address = headers.passed_on.pop()
            assert address == (client or PROXY)
            assert unread(connection) == REST
            assert not headers.busy
            connection.close()
            theirs.close()

    run(cut_at_each)


def unread_size(connection):
    try:
        return len(connection.recv(65536, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("kind", GOOD)
def test_header_byte_by_byte(kind):
    data, client = GOOD[kind]

    async def each_by_itself(_):
        headers = Headers()
        theirs = headers.connect()
        (waiting,) = headers._waiting
        for place in range(len(data)):
            theirs.sendall(data[place : place + 1])
            await headers.settle(lambda: headers.passed_on or unread_size(waiting) == 0)
        theirs.sendall(REST)
        ((connection, address),) = headers.passed_on
        assert (address, unread(connection)) == (client or PROXY, REST)

    run(each_by_itself)


def test_header_that_is_there_is_read():
    async def at_once(_):
        headers, (ours, theirs) = Headers(), socket.socketpair()
        theirs.sendall(GOOD["IPv4"][0] + REST)
        headers(ours, PROXY)
        ((connection, address),) = headers.passed_on
        assert (address, unread(connection)) == (GOOD["IPv4"][1], REST)

    run(at_once)


@pytest.mark.parametrize("kind", BAD)
def test_connection_without_one_is_closed(kind):
    async def refused(_):
        headers = Headers()
        theirs = headers.connect()
        with capture_logs() as lines:
            theirs.sendall(BAD[kind])
            await headers.settle(lambda: is_closed(theirs))
        assert [line["proxy"] for line in lines] == ["10.0.0.1"]
        assert not headers.busy
        assert not headers.passed_on

    run(refused)


def test_many_refusals_are_logged_once():
    async def refused(_):
        headers = Headers()
        with capture_logs() as lines:
            for _ in range(20):
                theirs = headers.connect()
                theirs.sendall(BAD["HTTP"])
                await headers.settle(lambda: is_closed(theirs))  # noqa: B023
        assert len(lines) == 1

    run(refused)


def test_refusals_share_the_limit_of_lines(monkeypatch):
    async def refused(_):
        headers = Headers()
        with capture_logs() as lines:
            theirs = headers.connect()
            theirs.sendall(BAD["HTTP"])
            await headers.settle(lambda: is_closed(theirs))
        assert lines == []

    monkeypatch.setattr("fastdist.logs.may_log", lambda: False)
    run(refused)


def test_others_have_no_header():
    async def passed(_):
        headers = Headers()
        theirs = headers.connect(("192.0.2.1", 7))
        theirs.sendall(GOOD["TCP4"][0])
        ((connection, address),) = headers.passed_on
        assert address == ("192.0.2.1", 7)
        assert unread(connection) == GOOD["TCP4"][0], "which is no HTTP"

    run(passed)


def test_local_client_is_a_local_proxys_only():
    async def named(_):
        for peer, expected in ((PROXY, "10.0.0.1"), (("127.0.0.1", 5), "127.0.0.9")):
            headers = Headers()
            theirs = headers.connect(peer)
            theirs.sendall(b"PROXY TCP4 127.0.0.9 10.0.0.1 1 2\r\n")
            await headers.settle(lambda: headers.passed_on)  # noqa: B023
            assert headers.passed_on[0][1][0] == expected

    run(named)


def test_slow_header_is_given_up():
    async def slow(_):
        headers = Headers(patience=0.01)
        theirs = headers.connect()
        theirs.sendall(b"PROXY TCP4 ")
        with capture_logs() as lines:
            await headers.settle(lambda: is_closed(theirs))
        assert lines[0]["error"] == "none came in time"
        assert not headers.busy

    run(slow)


def test_header_during_a_pause_is_in_time(monkeypatch):
    """The event loop runs timers before it reads: a pause of the machine is no fault of the proxy's."""
    monkeypatch.setattr(timeouts, "LATE", 0.1)

    async def paused():
        headers, (ours, other) = Headers(patience=0.1), socket.socketpair()
        theirs = headers.connect()

        def pause():
            ours.recv(1)
            theirs.sendall(GOOD["TCP4"][0])
            time.sleep(0.6)  # as a process that is stopped

        asyncio.get_running_loop().add_reader(ours, pause)  # which is called where the loop reads
        other.send(b"x")
        await headers.settle(lambda: headers.passed_on or is_closed(theirs))
        assert headers.passed_on

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(paused())


def test_waiting_connections_are_bounded():
    async def bounded(_):
        headers = Headers(room=2)
        first, second, third = (headers.connect() for _ in range(3))
        assert is_closed(third)
        assert not is_closed(first)
        first.sendall(GOOD["TCP4"][0])
        await headers.settle(lambda: headers.passed_on)
        assert not is_closed(headers.connect())
        headers.close()
        assert is_closed(second)
        assert not headers.busy

    run(bounded)


@pytest.mark.parametrize("sent", [b"", b"PROXY"])
def test_client_that_leaves_is_forgotten(sent):
    async def leaves(_):
        headers = Headers()
        theirs = headers.connect()
        theirs.sendall(sent)
        theirs.close()
        with capture_logs() as lines:
            await headers.settle(lambda: not headers.busy)
        assert not headers.passed_on
        assert not lines, "a check whether the port is open is no fault"

    run(leaves)
