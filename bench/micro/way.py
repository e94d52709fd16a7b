"""One worker's hot path without sockets: emitters' connections, ring, dispatcher and analyzers' connections are real.

Transports keep nothing but a count, and the loop runs what it was given when told to. What is measured with it is
fastdist's own work and a little of this file's, never the kernel's.
"""

from __future__ import annotations

import os
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest import mock

from msgspec.structs import replace
from tools import packet, weight_of

from fastdist import packet as packets
from fastdist._core import Intake, PacketRing, file_size
from fastdist.settings import Analyzer, Config
from fastdist.shm.block import AnalyzerWord, SharedBlock
from fastdist.worker import dispatch
from fastdist.worker.dispatch import Dispatcher
from fastdist.worker.ingest import Emitters, IngestProtocol
from fastdist.worker.upstream import AnalyzerConnection, AnalyzerPool

if TYPE_CHECKING:
    from collections.abc import Callable

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def memory_ring(capacity: int = 1 << 24) -> PacketRing:
    """Return a ring as durability memory has it."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(capacity))
    ring = PacketRing(fd, capacity, volatile=True)
    os.close(fd)  # the mapping stays
    return ring


def post(messages: int) -> bytes:
    """Return a request as wrk sends it."""
    body = packet(messages)
    head = (
        f"POST /logs HTTP/1.1\r\nHost: 127.0.0.1:3000\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


class Transport:
    """Notes which connections have written, in ``written``, and keeps nothing."""

    def __init__(self, connection: object, written: list[object] | deque[object]) -> None:
        self.connection, self.written = connection, written

    def write(self, _data: bytes) -> None:
        self.written.append(self.connection)

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 50000) if name == "peername" else None

    def is_closing(self) -> bool:
        return False


class Loop:
    """Callbacks, run when told to. Timers never go off."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []
        self.busy: list[AnalyzerConnection] = []

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        self.ready.append(partial(callback, *args) if args else callback)

    def call_later(self, _delay: float, _callback: Callable[..., object], *_args: object) -> object:
        return SimpleNamespace(cancel=lambda: None)

    def run(self) -> None:
        """Run what is ready, and what that makes ready."""
        while self.ready:
            ready, self.ready = self.ready, []
            for callback in ready:
                callback()


class Pool(AnalyzerPool):
    """A pool whose connections are there at once; those that have something in flight are in ``owner.loop.busy``."""

    def open_more(self) -> None:
        while self.open_connections < self.connection_limit:
            self.opening += 1
            connection = AnalyzerConnection(self)
            connection.connection_made(Transport(connection, self.owner.loop.busy))


class Way:
    """All of it; ``delivery`` as in the configuration. ``emitters`` connections send a packet each in every turn."""

    def __init__(self, emitters: int, analyzers: int = 4, messages: int = 2, **delivery: object) -> None:
        config = Config()
        # Timers never go off here: what a turn brings is sent in that turn.
        config = replace(config, delivery=replace(config.delivery, linger=0.0, **delivery))
        self.request, self.loop, self.ring = post(messages), Loop(), memory_ring()
        self.block = SharedBlock.create(1, analyzers)
        os.close(self.block.fd)
        self.counters = self.block.rows[0]
        with mock.patch.object(dispatch, "AnalyzerPool", Pool):
            self.dispatcher = Dispatcher(
                self.loop,
                self.ring,
                self.block.analyzers,
                config,
                counters=self.counters,
                dead_letters=SimpleNamespace(),
                settled=lambda *_: None,
                poller=None,
            )
            self.dispatcher.set_analyzers(self._make_analyzers(analyzers))
            self.loop.run()
        for pool in self.dispatcher.pools[:analyzers]:
            pool.open_more()
        schedule = self.dispatcher.schedule
        limiter = self.block.limiter()
        limiter.configure(0, 0, 0, 0)
        intake = Intake(self.ring, self.counters, limiter, config.server, packets.check, schedule, None)
        intake.slice_ns = intake.loop_ns = 10**18  # there is no event loop that would go on in its next turn
        intake.go_on()
        shared_emitters = Emitters(SimpleNamespace(), intake, lambda *_: None, config.server)
        shared_emitters.configure((), ())
        self.emitters = [IngestProtocol(intake, shared_emitters) for _ in range(emitters)]
        answered: deque[object] = deque(maxlen=1)
        for emitter in self.emitters:
            emitter.connection_made(Transport(emitter, answered))
        self.turn()

    def _make_analyzers(self, count: int) -> dict[int, Analyzer]:
        analyzers = {}
        for slot in range(count):
            self.block.analyzers.clear(slot)
            self.block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
            self.block.analyzers.set_weight(slot, weight_of(slot))
            endpoint = f"http://127.0.0.1:{4000 + slot}/analyze"
            analyzers[slot] = Analyzer(id=f"A{slot + 1}", endpoint=endpoint, weight=weight_of(slot))
        return analyzers

    def accept(self) -> None:
        """Let every emitter's packet arrive: read, checked, stored, answered."""
        request = self.request
        for emitter in self.emitters:
            emitter.data_received(request)

    def answer(self) -> None:
        """Have analyzers answer 200 until nothing is in flight."""
        loop = self.loop
        while loop.busy:
            busy, loop.busy[:] = loop.busy.copy(), []
            for connection in busy:
                requests = connection.in_flight()
                if requests:
                    connection.data_received(OK * requests)
            loop.run()

    def turn(self) -> None:
        """Do one event-loop iteration with all that follows from it: nothing is left."""
        self.accept()
        self.loop.run()
        self.answer()
        if self.ring.undone:
            raise RuntimeError(f"{self.ring.undone} packets are left")
