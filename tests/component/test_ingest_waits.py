"""No wait is without end: for a delivery, the disk, a change, for an emitter that is gone or reads nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest
import uvloop
from ingest_harness import BODY, CONTINUE, SECOND, Service, head, keyed, post, read_answers
from support import files_end_at
from upstream_harness import until

from fastdist._core import HEADER_SIZE, Poller, Stream

DAY = 86400


# ---- emitters that have sent their end


def test_half_closed_wait_ends_in_seconds():
    service = Service()
    with service.timers():
        first, last = keyed("a", BODY, f"Prefer: wait={DAY}"), keyed("c", BODY, "Prefer: wait=9")
        connection = service.ask(first + keyed("b") + last)
        connection.wait(DAY - 1)
        connection.end()
        connection.wait(4)
        assert connection.open
        assert connection.written == b""
        connection.wait(5.1)
    assert [(answer.status, answer.id) for answer in connection.answers()] == [(202, "a"), (202, "b"), (202, "c")]
    assert connection.transport.closed
    assert not connection.transport.aborted
    assert not service.emitters.waiting


def test_end_counts_behind_the_last_request():
    service = Service()
    with service.timers():
        connection = service.ask(keyed("a", BODY, f"Prefer: wait={DAY}", "Connection: close"))
        connection.wait(DAY - 1)
        assert connection.open
        connection.end()
        connection.wait(5.1)
    assert connection.answer().id == "a"
    assert connection.transport.closed


def test_unwritten_packet_has_no_wait():
    """The next packet gets its sequence, and is waited for by another connection."""
    service = Service(disk=True)
    with service.timers():
        with files_end_at(HEADER_SIZE):
            first = service.ask(keyed("a", BODY, "Prefer: wait=5"))
        assert first.statuses == [503]
        assert not service.emitters.waiting
        second = service.ask(keyed("b", BODY, f"Prefer: wait={DAY}"))
        first.lose()
        second.wait(6)
        assert second.written == b""
        service.emitters.settled(1, "A1")
    assert second.statuses == [200]


def test_lost_connection_ends_its_waits():
    service = Service()
    with service.timers():
        connection = service.ask(keyed("a", BODY, f"Prefer: wait={DAY}"))
        assert len(service.emitters.waiting) == 1
        connection.lose()
    assert not service.emitters.waiting
    assert not service.intake.connections


@pytest.mark.parametrize("lines", [[], ["Prefer: wait=9"]])
def test_half_closed_wait_for_a_sync_expires(lines):
    """Nothing can be said: the packet may yet be stored, or not."""
    service = Service(fsync=True)
    with service.timers():
        connection = service.ask(keyed("a", BODY, *lines))
        connection.end()
        connection.wait(4)
        assert connection.open
        connection.wait(5.1)
    assert connection.transport.aborted
    assert connection.written == b""


def test_half_closed_change_wait_expires():
    service = Service()
    connection = service.connect("127.0.0.1").send(head("POST /admin/reload"))
    connection.end()
    connection.wait(4)
    assert connection.open
    connection.wait(5.1)
    assert connection.transport.aborted


# ---- emitters that are there


@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("asked", [0, 1000, 2 * DAY])
def test_no_answer_is_waited_for_without_end(fsync, asked):
    """Beyond what an emitter has asked for it is minutes, in which a disk or the supervisor should have spoken."""
    service = Service(fsync=fsync)
    with service.timers():
        connection = service.connect("127.0.0.1").send(
            post(BODY, *([f"Prefer: wait={asked}"] if asked else [])), head("POST /admin/reload")
        )
        connection.wait(min(asked, DAY) + 299)
        assert connection.open
        connection.wait(min(asked, DAY) + 301)
    assert connection.transport.aborted


def test_body_behind_a_wait_is_bounded():
    service = Service()
    with service.timers():
        connection = service.ask(keyed("a", BODY, f"Prefer: wait={DAY}"), post()[:-1])
        assert service.intake.bodies
        connection.wait(29)
        assert service.intake.bodies
        connection.wait(30.1)
        assert service.intake.bodies == 0
        service.deliver()
    assert connection.statuses == [200, 408]
    assert not connection.open


def test_body_is_awaited_from_100_continue():
    service = Service()
    with service.timers():
        connection = service.ask(keyed("a", BODY, f"Prefer: wait={DAY}"))
        connection.send(head("POST /logs", "Expect: 100-continue", f"Content-Length: {len(BODY)}"))
        connection.wait(DAY)
        assert connection.open
        service.deliver()
        assert connection.written.endswith(CONTINUE)
        connection.age(-1000)
        connection.wait(1029)
        assert connection.open
        connection.wait(1031)
    assert connection.statuses == [200, 408]


def test_unawaited_invitation_is_not_sent():
    service = Service()
    with service.timers():
        connection = service.ask(keyed("a", BODY, f"Prefer: wait={DAY}"))
        connection.send(head("POST /logs", "Expect: 100-continue", f"Content-Length: {len(BODY)}"), BODY[:9])
        connection.wait(30.1)
        service.deliver()
    assert [answer.status for answer in connection.answers()] == [200, 408]


def test_head_is_not_late_while_not_read():
    connection = Service().ask(head("POST /logs")[:-2])
    connection.protocol.pause_writing()
    connection.age(20)
    connection.protocol.resume_writing()
    connection.wait(9)
    assert connection.open
    connection.wait(11)
    assert connection.statuses == [408]


def test_waits_ending_together_end_in_parts():
    service = Service()
    service.emitters.part_ns = 0
    with service.timers() as loop:
        connections = [service.ask(post(BODY, f"Prefer: wait={seconds}")) for seconds in (9, 5, 7) for _ in range(10)]
        assert loop.timers == 1
        loop.now += 9
        for ended in range(31):
            assert sum(len(connection.statuses) for connection in connections) == ended
            if ended < 30:
                loop.next()
        assert loop.timers == 0
    assert {connection.answer().status for connection in connections} == {202}
    assert not service.emitters.waiting


def test_failing_wait_lets_the_others_end():
    service = Service()
    with service.timers() as loop:
        broken, whole = (service.ask(post(BODY, "Prefer: wait=5")) for _ in range(2))
        first = min(service.emitters.waiting)
        service.emitters.waiting[first].packet_id = object()
        with pytest.raises(TypeError):
            loop.advance(5)
        loop.advance(0)
    assert broken.written == b""
    assert whole.statuses == [202]


def test_ended_waits_are_forgotten_early():
    service = Service()
    with service.timers():
        connection = service.connect()
        for _ in range(5000):
            connection.send(post(BODY, f"Prefer: wait={DAY}"))
            service.deliver()
        assert connection.statuses == [200] * 5000
        assert len(service.emitters._ends) <= 1001


# ---- answers that are read slowly, or not at all: over real sockets, for the kernel has most of them


def test_few_unread_responses_are_too_many():
    """Less than what has us pause, which no check has seen before."""
    connection = Service().ask(head("GET /health"))
    connection.transport.unwritten = 1000
    connection.wait(0)
    connection.wait(29)
    connection.send(head("GET /health"))  # to send is not to read
    assert connection.open
    connection.wait(31)
    assert connection.transport.aborted


class Emitter:
    """An emitter with a small buffer on a real connection; seconds pass for it only when told to.

    ``room``: bytes of what it sends that our system keeps unread.
    """

    def __init__(self, poller, service, room):
        self.service, self.passed, self.read = service, 0, bytearray()
        service.intake.later = poller.loop.call_soon
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
            self.socket = socket.socket()
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            self.socket.connect(server.getsockname())
            ours, peer = server.accept()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        self.socket.setblocking(False)
        self.protocol = service.protocol(service.intake, service.emitters)
        Stream(poller, ours, peer, self.protocol)

    @property
    def open(self):
        return self.protocol.transport is not None

    async def send(self, data):
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def take(self, most):
        """Read so many bytes, unless the end comes first; say whether it does."""
        left = most
        while left:
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, left), 60)
            if not data:
                return True
            self.read += data
            left -= len(data)
        return False

    async def wait(self, seconds):
        """Let all that has happened have happened so much earlier, and look at what is due."""
        await asyncio.sleep(0.01)
        self.passed += seconds
        if self.open:
            now = time.monotonic_ns()
            self.protocol.excuse(now, -seconds * SECOND)
            self.protocol.check(now)
        await asyncio.sleep(0)


def with_emitter(scenario, room=8192, **settings):
    """Run a scenario with an emitter on a connection of its own."""

    async def whole():
        service, poller = Service(**settings), Poller(asyncio.get_running_loop())
        poller.after = service.intake
        with contextlib.closing(poller), contextlib.closing(emitter := Emitter(poller, service, room)):
            await scenario(emitter)

    Emitter.close = lambda self: self.socket.close()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


VIEW = head("GET /openapi.json")


def test_steady_reader_is_not_cut_off():
    async def scenario(emitter):
        await emitter.send(VIEW * 4 + head("GET /openapi.json", "Connection: close"))
        await until(lambda: emitter.protocol.transport.get_write_buffer_size() > 0, "more than the kernel takes")
        while not await emitter.take(50_000):
            await emitter.wait(25)
        assert emitter.passed > 300
        assert [answer.status for answer in read_answers(bytes(emitter.read))] == [200] * 5

    with_emitter(scenario)


def test_slowly_reading_client_is_cut_off():
    async def scenario(emitter):
        await emitter.send(VIEW * 5)
        await until(lambda: emitter.protocol.transport.get_write_buffer_size() > 0, "more than the kernel takes")
        while emitter.open and emitter.passed < 10_000:
            with contextlib.suppress(ConnectionError):
                await emitter.take(100)
            await emitter.wait(5)
        assert not emitter.open

    with_emitter(scenario)


def test_stopped_reader_is_cut_off():
    async def scenario(emitter):
        await emitter.send(VIEW * 5)
        await until(lambda: emitter.protocol.transport.get_write_buffer_size() > 0, "more than the kernel takes")
        await emitter.take(50_000)
        for _ in range(4):
            assert emitter.open
            await emitter.wait(9)
        await emitter.wait(9)
        await until(lambda: not emitter.open, "cut off")

    with_emitter(scenario)


@pytest.mark.parametrize("reads", [False, True])
def test_end_is_noticed_without_reading(reads):
    """So many answers wait that nothing is read, not the end either."""

    async def scenario(emitter):
        await emitter.send(b"".join(keyed(f"k{number}", BODY, f"Prefer: wait={DAY}") for number in range(600)))
        await until(lambda: len(emitter.protocol.responses or ()) > 512, "as many as are read")
        if reads:
            emitter.socket.shutdown(socket.SHUT_WR)
        else:
            emitter.socket.close()
        for _ in range(10):
            await emitter.wait(3)
        if reads:
            await emitter.take(10**6)
            answers = read_answers(bytes(emitter.read))
            assert [(answer.status, answer.id) for answer in answers] == [(202, f"k{number}") for number in range(600)]
        await until(lambda: not emitter.open, "closed")
        assert not emitter.service.emitters.waiting

    with_emitter(scenario)


def test_packets_before_end_outlast_syncs():
    """So much that it is read by and by, as answers leave: each of its syncs takes a while, but none hangs."""

    async def scenario(emitter):
        service, count = emitter.service, 1600
        await emitter.send(b"".join(keyed(f"k{number}") for number in range(count)))
        await until(lambda: not emitter.protocol.transport.is_reading(), "as many as are read")
        emitter.socket.shutdown(socket.SHUT_WR)
        reading = asyncio.create_task(emitter.take(10**7))
        while not reading.done():
            await emitter.wait(3)
            service.sync()
        assert await reading, "to the end"
        answers = read_answers(bytes(emitter.read))
        assert [(answer.status, answer.id) for answer in answers] == [(202, f"k{number}") for number in range(count)]
        await until(lambda: not emitter.open, "closed")

    with_emitter(scenario, room=2**20, fsync=True)
