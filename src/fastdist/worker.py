"""One worker process: its event loop, and the wiring of ring, ingest, dispatcher and API.

A worker is a fresh interpreter, started by the supervisor with the descriptors it needs and an ``Assignment`` on its
command line. It takes its ring over as it finds it (its predecessor's, or the last run's), reconciles its counters with
it, and serves until it is told to drain, or until the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time

import msgspec
import uvloop

from fastdist import __version__, logs, packet
from fastdist._core.ingest import Intake
from fastdist._core.ring import PacketRing
from fastdist.api import Api
from fastdist.config import Config, from_wire
from fastdist.deadletters import DeadLetters
from fastdist.dispatch import Dispatcher
from fastdist.ingest import Emitters, IngestProtocol
from fastdist.shared import SharedBlock, WorkerWord
from fastdist.snapshot import Snapshot

TICK = 0.02  # seconds: heartbeat, time-outs of deliveries, gauges
DELIVERED_FIELDS = ("refused", "exhausted", "shutdown")

log = logs.get()


class Assignment(msgspec.Struct, frozen=True):
    """What the supervisor tells a worker when it starts it: its place, and the descriptors it inherits."""

    index: int
    shared: int
    listener: int
    ring: int
    control: int
    settings: int  # a memfd with the wire form of the configuration
    roster: dict[str, int]  # analyzer id -> slot


class Command(msgspec.Struct, frozen=True):
    """A line on the control socket. To a worker: ``drain`` (until ``deadline``). From it: ``ready``."""

    verb: str
    deadline: float = 0.0  # time.monotonic()


class Worker:
    """A worker's parts and its life."""

    def __init__(self, assignment: Assignment, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.assignment, self.config, self.loop = assignment, config, loop
        self.name = f"w{assignment.index}"
        self.block = SharedBlock.attach(assignment.shared)
        self.words = self.block.worker(assignment.index)
        self.counters = self.block.rows[assignment.index]
        durability = config.queue.durability
        self.ring = PacketRing(assignment.ring, volatile=durability == "memory")
        self.dead_letters = DeadLetters(config.queue.path, f"{self.name}-{os.getpid()}", sync=durability == "fsync")
        self.roster = {
            slot: analyzer for analyzer in config.analyzers if (slot := assignment.roster.get(analyzer.id)) is not None
        }
        self.emitters = Emitters(Api(self.snapshot))
        self.dispatcher = Dispatcher(
            loop,
            self.ring,
            self.block.analyzers,
            config,
            counters=self.counters,
            dead_letters=self.dead_letters,
            settled=self.emitters.settled,
        )
        limiter = self.block.limiter()
        limits = config.limits
        limiter.configure(limits.rate, limits.burst, limits.client_rate, limits.client_burst)
        self.intake = Intake(self.ring, self.counters, limiter, config.server, packet.check, self.dispatcher.schedule)
        self.emitters.intake = self.intake
        self.emitters.configure(config.security.tokens, config.security.cors_origins)
        self._next_sweep = 0
        self._stopped = asyncio.Event()
        self._server: asyncio.Server | None = None

    def snapshot(self) -> Snapshot:
        """Return what all processes know, as it is now."""
        self.publish()
        return Snapshot(self.block, self.config, self.roster, __version__)

    # ---- taking over

    def reconcile(self) -> None:
        """Make the counters agree with the ring, which is the truth (a predecessor may have died between the two)."""
        counters, ring = self.counters, self.ring
        for offset, what in ring.damage:
            log.warning("damage in the queue; skipped", offset=offset, what=what)
        counters.add("corrupt", ring.corrupt)
        base = counters.get("sequence_base")
        if base == 0:
            counters.set("sequence_base", ring.next_sequence_number)
            counters.add("recovered", ring.undone)
            return
        missing = ring.next_sequence_number - base - counters.get("accepted")
        if missing:
            messages, body_bytes = ring.totals_from(ring.next_sequence_number - missing)
            counters.add("accepted", missing)
            counters.add("messages_accepted", messages)
            counters.add("bytes_accepted", body_bytes)
        slots = range(counters.slots)
        for slot in slots:
            counters.set_of(slot, "connections", 0)
            counters.set_of(slot, "requests_in_flight", 0)
            counters.set_of(slot, "packets_in_flight", 0)
        gone = counters.get("accepted") + counters.get("recovered") - ring.undone
        gone -= sum(counters.get(field) for field in DELIVERED_FIELDS)
        uncounted = gone - sum(counters.get_of(slot, "delivered") for slot in slots)
        if uncounted:  # all of one request, the one being settled
            counters.add_to(max(0, counters.get("settling") - 1), "delivered", uncounted)

    # ---- serving

    async def serve(self) -> None:
        """Serve until told to stop."""
        self.reconcile()
        self.dispatcher.set_roster(self.roster)
        listener = socket.socket(fileno=self.assignment.listener)
        control = socket.socket(fileno=self.assignment.control)
        reader, self._control = await asyncio.open_connection(sock=control)
        self._server = await self.loop.create_server(
            lambda: IngestProtocol(self.intake, self.emitters), sock=listener, backlog=4096
        )
        self.tick()
        self._tell("ready")
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        commands = self.loop.create_task(self._obey(reader))
        await self._stopped.wait()
        commands.cancel()

    def _tell(self, verb: str) -> None:
        self._control.write(msgspec.json.encode(Command(verb)) + b"\n")

    async def _obey(self, reader: asyncio.StreamReader) -> None:
        """Carry out the supervisor's commands; end when it is gone."""
        while line := await reader.readline():
            command = msgspec.json.decode(line, type=Command)
            if command.verb == "drain":
                await self._drain(command.deadline)
                return
        log.warning("the supervisor is gone; ending")
        await self._drain(time.monotonic())

    async def _drain(self, deadline: float) -> None:
        """Accept nothing new, finish what is under way, deliver what is queued; all until ``deadline``."""
        self.intake.draining = True
        if self._server is not None:
            self._server.close()
        while time.monotonic() < deadline:
            for connection in tuple(self.intake.connections):
                if connection.idle() and connection.transport is not None:
                    connection.transport.close()
            if self.ring.undone == 0 and not self.intake.connections:
                break
            await asyncio.sleep(TICK)
        for connection in tuple(self.intake.connections):
            if connection.transport is not None:
                connection.transport.close()
        self._bury_the_rest()
        self.dispatcher.close()
        self.dead_letters.close()
        self.publish()
        self._stopped.set()

    def _bury_the_rest(self) -> None:
        """Queued in memory only, packets would end with this process: write them to the dead letters."""
        if self.config.queue.durability != "memory" or self.ring.undone == 0:
            return
        try:
            count = self.dispatcher.bury_all()
        except OSError as error:
            log.error("cannot write dead letters; packets are lost", error=str(error), packets=self.ring.undone)
        else:
            log.warning("packets were not delivered in time and are now dead letters", packets=count)

    # ---- upkeep

    def tick(self) -> None:
        """Run every TICK seconds."""
        self.loop.call_later(TICK, self.tick)
        now = time.monotonic_ns()
        self.words[WorkerWord.HEARTBEAT_NS] = now
        self.dispatcher.tick(now)
        self.publish()
        if now >= self._next_sweep:
            self._sweep(now)

    def _sweep(self, now_ns: int) -> None:
        """Look at the emitters' time-outs, often enough for the shortest."""
        server = self.config.server
        shortest = min(server.header_timeout, server.body_timeout, server.keepalive_timeout)
        self._next_sweep = now_ns + int(min(1.0, max(TICK, shortest / 8)) * 1e9)
        for connection in tuple(self.intake.connections):
            connection.check(now_ns)

    def publish(self) -> None:
        """Put this worker's gauges into its row."""
        counters, ring = self.counters, self.ring
        counters.set("undone", ring.undone)
        counters.set("queue_bytes", ring.used)
        counters.set("queue_capacity", ring.capacity)
        counters.set("oldest_ns", ring.oldest_ns)
        if self.intake.full and ring.undone_bytes < ring.capacity // 2:
            self.intake.full = False
        self.words[WorkerWord.FULL] = int(self.intake.full)
        self.words[WorkerWord.STORAGE_FAULT] = int(self.dispatcher.storage_failed or self.intake.broken_storage)


def main() -> int:
    """Run a worker; the supervisor calls ``python -m fastdist.worker ASSIGNMENT``."""
    assignment = msgspec.json.decode(sys.argv[1], type=Assignment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.configure(worker=f"w{assignment.index}")
    # pread: the descriptor's position is shared with the other workers
    config = from_wire(os.pread(assignment.settings, os.fstat(assignment.settings).st_size, 0))

    async def run() -> None:
        await Worker(assignment, config, asyncio.get_running_loop()).serve()

    uvloop.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
