"""The end of accepting: every connection that the system has completed is served, and no other is begun."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from contextlib import contextmanager

import pytest
import trustme
import uvloop

from fastdist._core import Poller
from fastdist.worker import tls
from fastdist.worker.listener import SHARED_AT_ONCE, Acceptor

CLIENTS = 300


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as made:
        yield made


@contextmanager
def clients(listener, count=CLIENTS):
    """Connect so many; the system does it, whether accepted or not."""
    made = [socket.create_connection(listener.getsockname(), timeout=20) for _ in range(count)]
    try:
        yield made
    finally:
        for client in made:
            client.close()


def run(work):
    return uvloop.run(work())


async def until(condition):
    while not condition():  # noqa: ASYNC110  (there is no event to wait for)
        await asyncio.sleep(0.001)


async def ended(server):
    await until(lambda: not server.busy)


def test_closing_accepts_all_connected(listener):
    taken = []

    async def close_at_once():
        Acceptor(listener, lambda connection, _: taken.append(connection)).close()

    with clients(listener):
        run(close_at_once)
        assert len(taken) == CLIENTS
    for connection in taken:
        connection.close()


def test_late_client_is_refused_on_finish(listener):
    """That client is refused when the listener is closed; a connection would be made for nothing."""
    taken = []

    async def finish():
        acceptor = Acceptor(listener, lambda connection, _: taken.append(connection))
        acceptor.finish()
        coming = asyncio.get_running_loop().run_in_executor(None, socket.create_connection, address, 20)
        await ended(acceptor)
        with pytest.raises(ConnectionRefusedError):
            await coming

    address = listener.getsockname()
    with clients(listener):
        run(finish)
        assert len(taken) == CLIENTS
    for connection in taken:
        connection.close()


class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)


def server(listener):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    poller = Poller(asyncio.get_running_loop())
    return tls.TlsServer(listener, context, Echo, lambda _: True, 60.0, poller=poller), trusting


def test_handshakes_before_the_end_complete(listener):
    async def finish():
        it, trusting = server(listener)
        it.finish()

        def speak(client):
            with trusting.wrap_socket(client, server_hostname="127.0.0.1") as secure:
                secure.sendall(b"hello")
                return secure.recv(5)

        speaking = [asyncio.get_running_loop().run_in_executor(None, speak, client) for client in connected]
        await ended(it)
        assert await asyncio.gather(*speaking) == [b"hello"] * len(connected)

    with clients(listener, 20) as connected:
        run(finish)


def test_closing_ends_endless_handshakes(listener):
    async def close():
        it, _ = server(listener)
        it.finish()
        await asyncio.sleep(0)
        it.close()
        await ended(it)

    with clients(listener, 20) as connected:
        run(close)
        assert [client.recv(1) for client in connected] == [b""] * 20


# ---- a listener that is handed on


def test_listener_handed_on_is_left_as_it_is(listener):
    """What waits on it waits on, what comes is not refused, and the next that has it serves both."""
    taken = []

    def take(connection, _):
        taken.append(connection)

    async def finish():
        acceptor = Acceptor(listener.dup(), take, handed_on=True)
        acceptor.finish()
        assert not acceptor.busy
        await asyncio.get_running_loop().run_in_executor(None, connect_more)
        assert not taken

    async def serve_next():
        acceptor = Acceptor(listener.dup(), take)
        await until(lambda: len(taken) == CLIENTS + 1)
        acceptor.close()

    def connect_more():
        more.append(socket.create_connection(listener.getsockname(), timeout=20))

    more = []
    with clients(listener):
        run(finish)
        run(serve_next)
    for connection in (*taken, *more):
        connection.close()


@pytest.mark.parametrize("there", [True, False])
def test_worker_with_more_yields_but_once(listener, there):
    """To one that has fewer, if that is there and takes it."""
    taken = []

    async def serve():
        acceptors = [
            Acceptor(
                listener.dup(),
                lambda connection, _, name=name: taken.append((name, connection)),
                handed_on=True,
                has_more=lambda name=name: name == "more",
            )
            for name in (("more", "fewer") if there else ("more",))
        ]
        await until(lambda: len(taken) == 20)
        for acceptor in acceptors:
            acceptor.close()

    with clients(listener, 20):
        run(serve)
    assert {name for name, _ in taken[:SHARED_AT_ONCE]} == {"fewer" if there else "more"}
    for _, connection in taken:
        connection.close()


def test_lack_of_descriptors_is_noted(listener):
    """As a problem; one that was reset before it was accepted is no problem."""
    errors = iter([ConnectionAbortedError(errno.ECONNABORTED, ""), OSError(errno.EMFILE, "Too many open files")])

    class Listener:
        def __getattr__(self, name):
            return getattr(listener, name)

        def accept(self):
            if error := next(errors, None):
                raise error
            return listener.accept()

    async def accept():
        server = Acceptor(Listener(), lambda *_: None)
        try:
            with clients(listener, 1):
                while server.shortage.last is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            with pytest.raises(OSError, match="Too many open files"):
                server.shortage.raise_once()
            server.shortage.raise_once()
        finally:
            server.close()

    run(accept)
