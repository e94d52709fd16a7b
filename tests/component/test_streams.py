"""The transport of the compiled core, over real sockets: what asyncio promises protocols, it keeps."""

import asyncio
import contextlib
import gc
import os
import random
import resource
import socket
import weakref
from functools import partial
from pathlib import Path

import pytest
import uvloop
from upstream_harness import reset, reset_behind, until

from fastdist._core import Poller, Receiver, Stream
from fastdist.worker.listener import serve


class Noted(Receiver):
    """A protocol that notes what it is told; ``keep_open``: what it answers to the peer's end."""

    def __init__(self, *, keep_open=False):
        self.keep_open, self.received, self.told = keep_open, bytearray(), []
        self.transport, self.error = None, None
        self.on_data = lambda _data: None

    def connection_made(self, transport):
        self.transport = transport
        self.told.append("made")

    def data_received(self, data):
        self.received += data
        self.on_data(data)

    def eof_received(self):
        self.told.append("eof")
        return self.keep_open

    def pause_writing(self):
        self.told.append("pause")

    def resume_writing(self):
        self.told.append("resume")

    def connection_lost(self, error):
        self.error = error
        self.told.append("lost")


def pair(poller, *, keep_open=False, room=None):
    """Return a protocol on a stream, and the socket at its other end; ``room``: of the kernel's buffers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if room:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        other = socket.create_connection(server.getsockname())
        ours, peer = server.accept()
    if room:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    other.setblocking(False)
    protocol = Noted(keep_open=keep_open)
    Stream(poller, ours, peer, protocol)
    return protocol, other


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def run(scenario):
    """Run a coroutine function that takes a poller, on uvloop; nothing may be left open."""

    async def whole():
        poller = Poller(asyncio.get_running_loop())
        descriptors = open_descriptors()
        try:
            with contextlib.closing(poller):
                await scenario(poller)
                poller.close()
                await asyncio.sleep(0)
                assert not poller.streams
                gc.collect()
                assert open_descriptors() <= descriptors
        finally:
            gc.collect()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


async def all_of(other):
    """Read what comes from the stream until its end."""
    loop, data = asyncio.get_running_loop(), bytearray()
    while piece := await asyncio.wait_for(loop.sock_recv(other, 65536), 30):
        data += piece
    return bytes(data)


@pytest.mark.parametrize("size", [1, 65535, 262144, 262145, 3_000_000])
def test_what_is_sent_is_received(size):
    async def scenario(poller):
        protocol, other = pair(poller)
        data = random.Random(size).randbytes(size)
        await asyncio.get_running_loop().sock_sendall(other, data)
        await until(lambda: len(protocol.received) == size, "all received")
        assert protocol.received == data
        other.close()

    run(scenario)


@pytest.mark.parametrize("piece", [1000, 70_000, 400_000])
def test_writes_arrive_in_order_with_pauses(piece):
    async def scenario(poller):
        protocol, other = pair(poller, room=65536)
        data = random.Random(piece).randbytes(2_000_000)
        for at in range(0, len(data), piece):
            protocol.transport.write(data[at : at + piece])
        assert protocol.told == ["made", "pause"]
        assert protocol.transport.get_write_buffer_size() > 65536
        protocol.transport.close()
        protocol.transport.write(b"not any more")
        assert await all_of(other) == data
        await until(lambda: protocol.told[-1] == "lost", "closed")
        assert protocol.told == ["made", "pause", "resume", "lost"]
        assert protocol.error is None
        other.close()

    run(scenario)


def test_protocol_may_write_in_resume():
    async def scenario(poller):
        protocol, other = pair(poller, room=65536)
        resumed = protocol.resume_writing
        rounds = iter(range(3))

        class Again(Noted):
            def resume_writing(self):
                resumed()
                if next(rounds, None) is not None:
                    self.transport.write(b"b" * 300_000)
                else:
                    self.transport.close()

        other.close()
        with socket.create_server(("127.0.0.1", 0)) as server:
            other = socket.create_connection(server.getsockname())
            ours, peer = server.accept()
        other.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        again = Again()
        Stream(poller, ours, peer, again)
        again.transport.write(b"a" * 8_000_000)
        data = await all_of(other)
        assert data == b"a" * 8_000_000 + b"b" * 900_000
        other.close()

    run(scenario)


def test_end_follows_all_and_input_is_read():
    async def scenario(poller):
        protocol, other = pair(poller, room=65536)
        protocol.transport.write(b"x" * 500_000)
        assert protocol.transport.can_write_eof()
        protocol.transport.write_eof()
        protocol.transport.write_eof()
        assert await all_of(other) == b"x" * 500_000
        await asyncio.get_running_loop().sock_sendall(other, b"still heard")
        await until(lambda: protocol.received == b"still heard", "heard")
        other.close()
        await until(lambda: protocol.told[-1] == "lost", "closed")
        assert protocol.told == ["made", "pause", "resume", "eof", "lost"]

    run(scenario)


def test_peers_end_closes_unless_kept_open():
    async def scenario(poller):
        going, first = pair(poller)
        staying, second = pair(poller, keep_open=True)
        for other in (first, second):
            other.sendall(b"last words")
            other.shutdown(socket.SHUT_WR)
        await until(lambda: going.told == ["made", "eof", "lost"], "closed")
        await until(lambda: staying.told == ["made", "eof"], "kept open")
        assert going.received == staying.received == b"last words"
        assert await all_of(first) == b""
        for _ in range(5):
            await asyncio.sleep(0.001)
        assert staying.told == ["made", "eof"]
        staying.transport.write(b"answer")
        staying.transport.close()
        assert await all_of(second) == b"answer"
        await until(lambda: staying.told[-1] == "lost", "closed")
        first.close()
        second.close()

    run(scenario)


def test_nothing_is_read_while_paused():
    async def scenario(poller):
        protocol, other = pair(poller)
        protocol.transport.pause_reading()
        assert not protocol.transport.is_reading()
        other.sendall(b"early")
        for _ in range(5):
            await asyncio.sleep(0.002)
        assert not protocol.received
        protocol.transport.resume_reading()
        await until(lambda: protocol.received == b"early", "read")
        protocol.on_data = lambda _data: protocol.transport.pause_reading()
        other.sendall(b" one")
        await until(lambda: protocol.received == b"early one", "read")
        other.sendall(b" two")
        await asyncio.sleep(0.01)
        assert protocol.received == b"early one"
        other.close()

    run(scenario)


@pytest.mark.parametrize("paused", [False, True])
def test_reset_is_noticed_while_paused(paused):
    async def scenario(poller):
        protocol, other = pair(poller)
        if paused:
            protocol.transport.pause_reading()
        reset(other)
        await until(lambda: protocol.told[-1] == "lost", "lost")
        assert isinstance(protocol.error, OSError)
        assert protocol.transport.is_closing()
        protocol.transport.write(b"nowhere to go")
        protocol.transport.close()
        protocol.transport.abort()
        await asyncio.sleep(0.002)
        assert protocol.told == ["made", "lost"]

    run(scenario)


def test_reset_with_unwritten_ends_stream():
    async def scenario(poller):
        protocol, other = pair(poller, room=65536)
        protocol.transport.write(b"x" * 5_000_000)
        protocol.transport.close()
        reset(other)
        await until(lambda: protocol.told[-1] == "lost", "lost")
        assert isinstance(protocol.error, OSError)
        assert protocol.transport.get_write_buffer_size() == 0

    run(scenario)


def test_reset_with_unwritten_is_read_first():
    async def scenario(poller):
        protocol, other = pair(poller)
        protocol.transport.write(b"x" * 20_000_000)
        reset_behind(b"y" * 80_000, other, protocol.transport)  # more than one read brings
        await until(lambda: protocol.told[-1] == "lost", "lost")
        assert len(protocol.received) == 80_000
        assert isinstance(protocol.error, ConnectionResetError)

    run(scenario)


def test_abort_drops_unwritten_calls_later():
    async def scenario(poller):
        protocol, other = pair(poller, room=65536)
        protocol.transport.write(b"x" * 5_000_000)
        protocol.transport.abort()
        assert protocol.told == ["made", "pause"]
        assert protocol.transport.is_closing()
        await asyncio.sleep(0)
        assert protocol.told == ["made", "pause", "lost"]
        with contextlib.suppress(ConnectionError):
            assert len(await all_of(other)) < 5_000_000
        other.close()

    run(scenario)


def test_protocol_error_closes_own_stream():
    async def scenario(poller):
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))
        broken, first = pair(poller)
        sound, second = pair(poller)

        def fail(_data):
            raise ZeroDivisionError

        broken.on_data = fail
        first.sendall(b"x")
        second.sendall(b"y")
        await until(lambda: broken.told[-1] == "lost" and sound.received == b"y", "dealt with")
        assert [type(error) for error in told] == [ZeroDivisionError]
        assert sound.told == ["made"]
        first.close()
        second.close()

    run(scenario)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_ended_streams_are_not_read(how):
    async def scenario(poller):
        pairs = [pair(poller) for _ in range(40)]

        def end_all_others(me):
            def end(_data):
                for protocol, _ in pairs:
                    if protocol is not me:
                        getattr(protocol.transport, how)()

            return end

        for protocol, _ in pairs:
            protocol.on_data = end_all_others(protocol)
        for _, other in pairs:  # before the loop looks: all are there in one turn
            other.sendall(b"x")
        await until(lambda: sum(protocol.told[-1] == "lost" for protocol, _ in pairs) == 39, "39 ended")
        assert sum(bytes(protocol.received) == b"x" for protocol, _ in pairs) == 1
        for _, other in pairs:
            other.close()

    run(scenario)


def test_streams_alternate_under_any_load():
    async def scenario(poller):
        pairs = [pair(poller) for _ in range(200)]
        flood, _ = pairs[0]
        for number, (_, other) in enumerate(pairs):
            other.sendall(b"%d" % number)
        await until(lambda: all(protocol.received for protocol, _ in pairs), "all read")
        assert [bytes(protocol.received) for protocol, _ in pairs] == [b"%d" % n for n in range(200)]
        assert flood.transport.get_extra_info("peername") == pairs[0][1].getsockname()
        assert flood.transport.get_extra_info("socket", "none") == "none"
        for _, other in pairs:
            other.close()
        await until(lambda: all(protocol.told[-1] == "lost" for protocol, _ in pairs), "all closed")

    run(scenario)


def test_turn_ends_in_time_and_next_rotates():
    async def scenario(poller):
        pairs = [pair(poller) for _ in range(40)]
        poller.run_ns = 1
        for turn in range(120):
            for _, other in pairs:
                other.send(b"x")
            assert not poller.run_once()
            assert sum(protocol.received.count(b".") for protocol, _ in pairs) == turn
            for protocol, _ in pairs:  # however much it was, it was read once
                if protocol.received.endswith(b"x"):
                    protocol.received[:] = protocol.received.rstrip(b"x") + b"."
        assert {bytes(protocol.received) for protocol, _ in pairs} == {b"..."}
        assert poller.peak_ns > 0
        poller.run_ns = 10**10
        assert poller.run_once()
        for _, other in pairs:
            other.close()

    run(scenario)


def test_what_is_not_read_yet_is_known():
    async def scenario(poller):
        protocol, other = pair(poller)
        assert not protocol.transport.has_unread()
        other.send(b"x")
        await until(protocol.transport.has_unread, "it has come")
        poller.run_once()
        assert not protocol.transport.has_unread()
        other.close()

    run(scenario)


def test_lost_stream_and_protocol_are_freed():
    async def scenario(poller):
        protocol, other = pair(poller)
        gone, told = weakref.ref(protocol), protocol.told
        other.close()
        await until(lambda: told[-1] == "lost", "closed")
        protocol.transport = None
        gc.collect()
        gc.disable()
        try:
            del protocol
            assert gone() is None
        finally:
            gc.enable()

    run(scenario)


def test_streams_act_as_a_pipe():
    """Random writes, pauses and reads on both sides, next to what was written."""

    async def scenario(poller):
        for seed in range(30):
            chance = random.Random(seed)
            protocol, other = pair(poller, room=chance.choice([None, 65536]))
            written, got, sent = bytearray(), bytearray(), bytearray()
            for _ in range(200):
                action = chance.randrange(5)
                if action == 0:
                    data = chance.randbytes(chance.choice([1, 100, 10_000, 100_000]))
                    protocol.transport.write(data)
                    written += data
                elif action == 1:
                    with contextlib.suppress(BlockingIOError):
                        got += other.recv(chance.choice([1, 1000, 100_000]))
                elif action == 2:
                    data = chance.randbytes(chance.choice([1, 100, 10_000]))
                    with contextlib.suppress(BlockingIOError):
                        sent += data[: other.send(data)]
                elif action == 3:
                    (protocol.transport.pause_reading if chance.random() < 0.5 else protocol.transport.resume_reading)()
                else:
                    await asyncio.sleep(0)
            protocol.transport.resume_reading()
            await until(lambda: protocol.received == sent, "all received")  # noqa: B023
            protocol.transport.close()
            got += await all_of(other)
            assert got == written
            await until(lambda: protocol.told[-1] == "lost", "closed")  # noqa: B023
            told = [word for word in protocol.told if word in ("pause", "resume")]
            assert told == ["pause", "resume"] * (len(told) // 2)
            other.close()

    run(scenario)


# ---- listening


def noted_in(protocols):
    protocols.append(Noted())
    return protocols[-1]


def test_closed_listener_takes_waiting_only():
    async def scenario(poller):
        listener, protocols = socket.create_server(("127.0.0.1", 0)), []
        address = listener.getsockname()
        acceptor = serve(listener, poller, partial(noted_in, protocols))
        early = socket.create_connection(address)
        acceptor.close()
        assert [protocol.told for protocol in protocols] == [["made"]]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        early.close()
        await until(lambda: protocols[0].told[-1] == "lost", "closed")

    run(scenario)


def test_no_descriptor_rejects_then_recovers():
    async def scenario(poller):
        listener, protocols = socket.create_server(("127.0.0.1", 0)), []
        acceptor = serve(listener, poller, partial(noted_in, protocols))
        others = [socket.create_connection(listener.getsockname()) for _ in range(4)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            for other in others:
                other.setblocking(False)
                assert await all_of(other) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not protocols
        with socket.create_connection(listener.getsockname()) as late:
            await until(lambda: protocols, "taken")
            late.sendall(b"x")
            await until(lambda: protocols[0].received == b"x", "read")
        await until(lambda: protocols[0].told[-1] == "lost", "closed")
        acceptor.close()
        for other in others:
            other.close()

    run(scenario)
