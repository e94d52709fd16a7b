"""The end of accepting: every connection that the system has completed is served, and no other is begun."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import contextmanager

import pytest
import trustme
import uvloop

from fastdist._core import Poller
from fastdist.worker import tls
from fastdist.worker.listener import Acceptor

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


async def ended(server):
    while server.busy:  # noqa: ASYNC110  (it has no event to wait for)
        await asyncio.sleep(0.01)


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
