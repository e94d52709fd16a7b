"""TLS with emitters, on streams: its bytes, its ends, and that it takes its turn like the others."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import time

import pytest
import trustme
import uvloop
from test_streams import Noted
from upstream_harness import until

from fastdist._core import Poller
from fastdist.net import timeouts
from fastdist.worker import tls

AUTHORITY = trustme.CA()
CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
AUTHORITY.issue_cert("127.0.0.1").configure_cert(CONTEXT)
TRUSTING = ssl.create_default_context()
AUTHORITY.configure_trust(TRUSTING)


class Server:
    """A TLS server on a loop of its own, and the protocols of its connections."""

    def __init__(self, patience):
        self.made = []
        self.poller = Poller(asyncio.get_running_loop())
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = listener.getsockname()
        self.server = tls.TlsServer(listener, CONTEXT, self._make, lambda _: True, patience, poller=self.poller)

    def _make(self):
        self.made.append(Noted())
        return self.made[-1]

    async def connect(self, **more):
        """Return a client's streams, and the protocol at the other end."""
        count = len(self.made)
        streams = await asyncio.open_connection(*self.address, ssl=TRUSTING, server_hostname="127.0.0.1", **more)
        await until(lambda: len(self.made) > count, "it is taken in")
        return *streams, self.made[-1]

    async def connect_blocking(self):
        """Return a client's socket, and the protocol at the other end."""
        raw = socket.create_connection(self.address)
        client = await asyncio.to_thread(TRUSTING.wrap_socket, raw, server_hostname="127.0.0.1")
        await until(lambda: self.made, "it is taken in")
        return client, self.made[-1]

    def close(self):
        self.server.close()
        self.poller.close()


def run(scenario, patience=60.0):
    async def whole():
        with contextlib.closing(Server(patience)) as server:
            await scenario(server)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


def read_all(client):
    return b"".join(iter(lambda: client.recv(65536), b""))


def hello():
    """Return what a client says first."""
    outgoing = ssl.MemoryBIO()
    client = TRUSTING.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@contextlib.contextmanager
def clients(server, count):
    """Connect so many, that have said nothing yet."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(server.address)) for _ in range(count)]


def readable(client):
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return bool(client.recv(1, socket.MSG_PEEK))
    return False


@pytest.mark.parametrize("cut", range(1, 12))
def test_plain_request_may_come_in_pieces(cut):
    async def scenario(server):
        reader, writer = await asyncio.open_connection(*server.address)
        data = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(data[:cut])
        await until(lambda: server.poller.streams, "accepted")
        await asyncio.sleep(0.01)
        writer.write(data[cut:])
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        writer.close()
        await until(lambda: not server.poller.streams, "closed")
        assert not server.server._handshakes
        assert server.made == []

    run(scenario)


def test_plain_client_that_stays_is_closed():
    async def scenario(server):
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        await until(lambda: not server.poller.streams, "closed, although the client does not close")
        writer.close()

    run(scenario, patience=0.2)


def test_pause_aborts_no_handshakes(monkeypatch):
    """The event loop runs timers before it reads: what came during a pause of the machine came in time."""
    monkeypatch.setattr(timeouts, "LATE", 0.1)

    async def scenario(server):
        taken = server.server.taken

        def pause(*connection):
            taken(*connection)
            time.sleep(0.6)  # as a process that is stopped

        server.server.taken = pause
        with clients(server, 1) as (client,):
            client.sendall(hello())
            await until(lambda: readable(client), "it is answered")

    run(scenario, patience=0.2)


def test_handshakes_share_iterations():
    """Each costs a millisecond or more; a thousand in one event-loop iteration would hold up all others."""

    async def scenario(server):
        with clients(server, 40) as connected:
            await until(lambda: len(server.poller.streams) == 40, "accepted")
            server.server.handshakes_ns = 0
            for client in connected:
                client.sendall(hello())
            while not server.poller.run_once():
                pass
            server.server._give_turns()
            assert sum(map(readable, connected)) == 1
            await until(lambda: sum(map(readable, connected)) == 40, "all are answered in the end")

    run(scenario)


def test_no_handshake_with_a_gone_client(monkeypatch):
    steps = []
    shake_hands = tls.TlsConnection._go_on
    monkeypatch.setattr(tls.TlsConnection, "_go_on", lambda self: (steps.append(self), shake_hands(self)))

    async def scenario(server):
        with clients(server, 20) as connected:
            await until(lambda: len(server.poller.streams) == 20, "accepted")
            for client in connected:
                client.sendall(hello())
        with clients(server, 1) as (last,):
            last.sendall(hello())
            await until(lambda: readable(last), "it is answered")
            await until(lambda: len(server.poller.streams) == 1, "the others are closed")
            assert len(steps) == 1

    run(scenario)


@pytest.mark.parametrize("size", [1, 16384, 16385, 3_000_000])
def test_what_is_sent_arrives_both_ways(size):
    async def scenario(server):
        reader, writer, protocol = await server.connect()
        data = random.Random(size).randbytes(size)
        writer.write(data)
        await until(lambda: len(protocol.received) == size, "received")
        assert protocol.received == data
        protocol.transport.write(data)
        assert await asyncio.wait_for(reader.readexactly(size), 60) == data
        assert protocol.told[0] == "made"
        writer.close()

    run(scenario)


def test_a_pause_in_reading_loses_nothing():
    async def scenario(server):
        _, writer, protocol = await server.connect()
        loop, transport = asyncio.get_running_loop(), protocol.transport

        def pause(_data):
            transport.pause_reading()
            loop.call_later(0.001, transport.resume_reading)

        protocol.on_data = pause
        data = random.Random(1).randbytes(1_000_000)
        writer.write(data)
        await until(lambda: len(protocol.received) == len(data), "received")
        assert protocol.received == data
        writer.close()

    run(scenario)


def test_unread_output_pauses_and_is_kept():
    async def scenario(server):
        client, protocol = await server.connect_blocking()
        data = random.Random(2).randbytes(20_000_000)
        protocol.transport.write(data)
        assert protocol.told == ["made", "pause"]
        assert protocol.transport.get_write_buffer_size() > 65536
        protocol.transport.close()
        protocol.transport.write(b"not any more")
        assert await asyncio.to_thread(read_all, client) == data
        await until(lambda: protocol.told[-1] == "lost", "closed")
        assert protocol.told == ["made", "pause", "resume", "lost"]
        client.close()

    run(scenario)


def test_client_ending_tls_is_read_to_end():
    async def scenario(server):
        _, writer, protocol = await server.connect()
        writer.write(b"last words")
        writer.close()
        await until(lambda: protocol.told[-1] == "lost", "closed")
        assert protocol.received == b"last words"
        assert protocol.told == ["made", "eof", "lost"]

    run(scenario)


def test_silent_close_is_read_to_its_end():
    async def scenario(server):
        _, writer, protocol = await server.connect()
        writer.write(b"last words")
        await until(lambda: protocol.received, "heard")
        writer.transport.abort()
        await until(lambda: protocol.told[-1] == "lost", "closed")
        assert protocol.told == ["made", "eof", "lost"]

    run(scenario)


def test_silent_client_delays_no_end():
    """It does not answer the end of TLS."""

    async def scenario(server):
        silent, protocol = await server.connect_blocking()
        protocol.transport.close()
        await until(lambda: protocol.told == ["made", "lost"], "closed")
        assert silent.recv(1) == b""
        silent.close()

    run(scenario)


def test_input_behind_our_end_is_dropped():
    async def scenario(server):
        reader, writer, protocol = await server.connect()
        protocol.on_data = lambda _data: (protocol.transport.write(b"no"), protocol.transport.write_eof())
        writer.write(b"first")
        assert await asyncio.wait_for(reader.read(-1), 60) == b"no"
        await until(lambda: protocol.told[-1] == "lost", "closed")
        assert protocol.received == b"first"
        writer.close()

    run(scenario)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x00\x05hello", bytes(5000)])
def test_client_without_tls_is_closed(data):
    async def scenario(server):
        with clients(server, 1) as (client,):
            client.sendall(data)
            await until(lambda: not server.server._handshakes, "it is over")
            await until(lambda: not server.poller.streams, "closed")
            assert not server.made

    run(scenario)


def test_handshakes_that_do_not_come_end():
    async def scenario(server):
        with clients(server, 150) as connected:
            await until(lambda: len(server.poller.streams) == 150, "accepted")
            await until(lambda: not server.server._handshakes and not server.poller.streams, "all are ended")
            assert [client.recv(1) for client in connected] == [b""] * 150

    run(scenario, patience=0.5)
