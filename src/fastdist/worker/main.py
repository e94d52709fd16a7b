"""One worker process: its event loop, and the wiring of ring, ingest, dispatcher and API.

A worker is a fresh interpreter, started by the supervisor with the descriptors it needs and an ``Assignment`` on its
command line. It opens its ring as its predecessor left it, and serves until the supervisor asks it to drain or is gone.
"""

from __future__ import annotations

import gc
import signal

if __name__ == "__main__":  # before the other imports, which take a while
    gc.disable()  # until all is there: none of it is garbage
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C and a hangup reach the whole group; the supervisor decides

import asyncio
import errno
import os
import socket
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import uvloop

from fastdist import __version__, ipc, logs, packet
from fastdist._core import Intake, Poller
from fastdist.errors import StartError
from fastdist.http.api import Api
from fastdist.http.responses import problem
from fastdist.ipc import Assignment, Message
from fastdist.net import tls
from fastdist.net.connect import Shortage
from fastdist.retry_after import retry_after
from fastdist.shm.block import SharedBlock, Step, WorkerState, WorkerWord
from fastdist.shm.examples import Examples
from fastdist.shm.snapshot import CONNECTIONS, Snapshot
from fastdist.shm.upkeep import Upkeep
from fastdist.storage.dead_letter_bounds import Bounds
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import folder_of
from fastdist.worker.admin import AdminRequests
from fastdist.worker.dispatch import Dispatcher
from fastdist.worker.drain import Drain
from fastdist.worker.ingest import Emitters, IngestProtocol
from fastdist.worker.listener import serve
from fastdist.worker.queue import OWN, Queue
from fastdist.worker.tls import TlsServer
from fastdist.worker.upkeep import TICK, EmitterTimeouts, LoopLag, Schedule, Task
from fastdist.worker.upstream import max_in_flight
from fastdist.worker.views import Views

if TYPE_CHECKING:
    from fastdist.worker.listener import Acceptor, Options
    from fastdist.worker.stream.queue import StreamQueue

LOOK = 0.1  # seconds between two looks at the names of the rings' files, dead-letter files and lack of descriptors
ROOM_NS = 100_000_000  # that an estimate of when there will be room holds
CANNOT_START = 3  # exit status
SEVERAL = 8  # connections that a worker may have more than another before it leaves new ones to that
MIN_MIGRATED = 64  # packets of an old ring that are moved at once, at least

log = logs.get()


class Worker:
    """A worker's parts and its life. ``control`` leads to the supervisor."""

    def __init__(self, assignment: Assignment, loop: asyncio.AbstractEventLoop, control: asyncio.StreamWriter) -> None:
        self.assignment, self.loop, self.control = assignment, loop, control
        self.block = SharedBlock.attach(assignment.shared)
        self.words = self.block.worker(assignment.index)
        self.upkeep = Upkeep(self.words, WorkerWord.FAILING)
        self.counters = self.block.rows[assignment.index]
        self.examples = Examples(self.block.examples(assignment.index))
        logs.limit_lines(self.block.line_limit())
        self._use(ipc.read_settings(assignment.settings))
        config = self.config
        self.fsync = config.queue.durability == "fsync"
        self.poller = Poller(loop)
        self.stream: StreamQueue | None = None
        self.bounds: Bounds | None = None  # of dead letters in files
        self.queue = self._open_queue()
        syncer, stream = self.queue.syncer, self.stream
        self.dispatcher = Dispatcher(
            loop,
            self.queue.claimed,
            self.block.analyzers,
            config,
            counters=self.counters,
            dead_letters=self._dead_letters() if stream is None else stream.dead_letter_writer,
            settled=self._settled if stream is None else stream.claims.settled,
            poller=self.poller,
            run_in_thread=syncer.run if syncer is not None else None,
            given_up=self.examples.note,
        )
        self.dead_letter_writer = self.dispatcher.dead_letter_writer
        self.limiter = self.block.limiter()
        self.intake = Intake(
            self.queue.ring,
            self.counters,
            self.limiter,
            config.server,
            packet.check,
            self.dispatcher.schedule if stream is None else stream.want_sync,
            self.queue.want_sync,
            self._not_written,
            responds_after_sync=self.queue.responds_after_sync,
            remembers_keys=stream is not None,
        )
        self.poller.after = self.intake
        api = Api(self.snapshot, at="packets" if config.admin.listen else "all")
        self.admin = AdminRequests(control, api)
        self.emitters = Emitters(
            api,
            self.intake,
            self.admin.send,
            config.server,
            self._found_full,
            shared=stream is not None,
            on_rejected=self._rejected,
        )
        self.views = Views(
            self.queue.ring, self.counters, self.block.limiter(), config.server, self.snapshot, self.admin.send
        )
        self.accepting = Shortage()  # that keeps emitters' connections from being accepted
        self.schedule = Schedule(loop, self.upkeep, self._tasks())
        self.lag = LoopLag(self.counters, (self.poller, self.intake, self.schedule))
        self._note_fault()
        self.tls = tls.server_context(self.pair, config.security)
        self._put_in_force()
        self._retry_after = (0, 1)  # monotonic ns until which it holds; seconds
        self._stopped = asyncio.Event()
        self._server: Acceptor  # set by ``serve``

    def _open_queue(self) -> Queue | StreamQueue:
        if self.config.queue.backend == "ring":
            return Queue(
                self.assignment,
                self.config,
                self.block,
                synced=self._synced,
                not_synced=self._not_synced,
                damaged=self._damaged,
            )
        from fastdist.worker.stream.queue import StreamQueue  # noqa: PLC0415  (its library may not be installed)

        self.stream = StreamQueue(self.loop, self.config, self.block, self.assignment.index, self._found_full)
        return self.stream

    def _dead_letters(self) -> DeadLetterFiles:
        queue, settings, assignment = self.config.queue, self.config.dead_letters, self.assignment
        folder = folder_of(queue.path, settings.path)
        self.bounds = Bounds(folder, settings, self.block.workers, lambda n: self.counters.add("discarded", n))
        owner = f"w{assignment.index}-{os.getpid()}"
        return DeadLetterFiles(queue.path, owner, assignment.ring, path=settings.path, bounds=self.bounds)

    # ---- settings

    def _use(self, settings: ipc.Settings) -> None:
        self.generation, self.config, self.pair = settings.generation, settings.config, settings.pair
        self.analyzers = {settings.slots[analyzer.id]: analyzer for analyzer in self.config.analyzers}

    def _put_in_force(self) -> None:
        """Apply the settings that may change while running."""
        limits, security = self.config.limits, self.config.security
        self.limiter.configure(limits.rate, limits.burst, limits.client_rate, limits.client_burst)
        self.emitters.configure(security.tokens, security.cors_origins)
        self.views.configure(security, self.tls)
        if self.bounds is not None:
            self.bounds.use(self.config.dead_letters)

    def _reload(self) -> None:
        """Apply the settings as they are now: all of them or, after reporting that to the supervisor, none."""
        settings = ipc.read_settings(self.assignment.settings)
        try:
            context = self.tls
            if settings.pair != self.pair:
                context = tls.server_context(settings.pair, settings.config.security)
            for analyzer in settings.config.analyzers:
                self.dispatcher.tls.make(analyzer)
        except StartError as error:  # the supervisor could use them: this process lacks something
            log.error("the new settings cannot be used; the old ones stay", error=str(error))
            ipc.send(self.control, Message("reloaded", id=settings.generation, body=str(error)))
            return
        self.tls = context
        self._server.use(context)
        self._use(settings)
        self._put_in_force()
        self.dispatcher.config = self.config
        self.dispatcher.set_analyzers(self.analyzers)
        ipc.send(self.control, Message("reloaded", id=self.generation))

    def snapshot(self) -> Snapshot:
        """Return what all processes know now."""
        self.publish()
        return Snapshot(self.block, self.config, self.analyzers, __version__)

    # ---- serving

    async def serve(self, commands: asyncio.StreamReader) -> None:
        """Serve until the supervisor, whose ``commands`` are read, says stop or is gone."""
        self.queue.reconcile(self.counters, renewed=self.assignment.renewed)
        self.dispatcher.set_analyzers(self.analyzers)
        if self.stream is not None:
            await self.stream.serve(self.intake, self.emitters, self.dispatcher)
            self._note_fault()
        self._server = self._listen(socket.socket(fileno=self.assignment.listener))
        if self.assignment.views >= 0:
            context = self.tls if self.config.admin.tls == "on" else None
            self.views.listen(socket.socket(fileno=self.assignment.views), self.poller, context)
        gc.freeze()
        gc.set_threshold(10_000, 100, 100)  # of the youngest so few that a collection is short
        gc.enable()
        self.upkeep.run(Step.GAUGES, self.publish)
        self.upkeep.run(Step.OLD_RINGS, self._tend_old_rings)
        self.schedule.start()
        ipc.send(self.control, Message("ready", body=self.generation))
        obeying = self.loop.create_task(self._obey(commands))
        obeying.add_done_callback(lambda _: self._stopped.set())
        await self._stopped.wait()
        if obeying.done():
            obeying.result()  # an error there ends this worker: another replaces it
        obeying.cancel()

    def _listen(self, listener: socket.socket) -> Acceptor:
        def protocol() -> IngestProtocol:
            return IngestProtocol(self.intake, self.emitters)

        options: Options = {
            "handed_on": self.assignment.handed_on,
            "has_more": self._has_more,
            "shortage": self.accepting,
        }
        # Until its handshake is over a connection is like one whose head is not whole.
        room, patience = self.emitters.has_room_besides, self.config.server.header_timeout
        server = (
            serve(listener, self.poller, protocol, **options)
            if self.tls is None
            else TlsServer(listener, self.tls, protocol, room, patience, poller=self.poller, **options)
        )
        if self.config.server.proxy_protocol == "on":
            server.read_headers(self.emitters.proxies, room, patience)
        return server

    async def _obey(self, commands: asyncio.StreamReader) -> None:
        """Carry out the supervisor's commands; end when it is gone."""
        draining: asyncio.Task[None] | None = None
        async for message in ipc.receive(commands):
            if message.verb == "drain" and draining is None:
                draining = self.loop.create_task(self._drain(message.deadline))
            elif message.verb == "reload":
                self._reload()
            elif message.verb == "reply":
                self.admin.replied(message)
        log.warning("lost supervisor, shutting down")
        if draining is not None:
            draining.cancel()
        await self._drain(time.monotonic())

    async def _drain(self, deadline: float) -> None:
        drain = Drain(self._server, self.emitters, self.dispatcher, self.queue, self._left)
        await drain.run(deadline, self._show_progress)
        self.views.close()
        self.publish()
        self._stopped.set()

    def _show_progress(self) -> None:
        """Give a heartbeat and say how many packets are left: the supervisor ends workers that do not get on."""
        self._beat(time.monotonic_ns())
        self.publish()

    def _left(self) -> int:
        self.publish()
        return sum(row.get("undone") for row in self.block.rows)

    def _has_more(self) -> bool:
        """Whether another worker that runs has several connections fewer."""
        ours, others = self.counters.get("emitters"), enumerate(self.block.rows)
        return any(
            row.get("emitters") < ours - SEVERAL and self.block.worker(index)[WorkerWord.STATE] == WorkerState.RUNNING
            for index, row in others
        )

    # ---- upkeep

    def _tasks(self) -> tuple[Task, ...]:
        timeouts = EmitterTimeouts(self.intake, self.config.server)
        of_views = EmitterTimeouts(self.views.intake, self.config.server)
        return (
            Task(Step.GAUGES, TICK, self._beat),
            *self.dispatcher.tasks,
            Task(Step.CONNECTIONS, LOOK, lambda _now_ns: self.dispatcher.shortage.raise_once()),
            Task(Step.ACCEPTING, LOOK, lambda _now_ns: self.accepting.raise_once()),
            Task(Step.DEAD_LETTERS, TICK, self._write_dead_letters),
            Task(Step.DEAD_LETTERS, LOOK, self.dead_letter_writer.look),
            Task(Step.GAUGES, TICK, self.publish),
            Task(Step.OLD_RINGS, TICK, self._tend_old_rings),
            Task(Step.QUEUE_FILES, LOOK, self._look_for_files),
            Task(Step.SYNC, self.queue.sync_interval, self.queue.sync),
            Task(Step.TIMEOUTS, TICK, lambda _now_ns: self.intake.look_for_room()),
            Task(Step.TIMEOUTS, timeouts.interval, timeouts.go_on),
            Task(Step.TIMEOUTS, of_views.interval, of_views.go_on),
        )

    def _beat(self, now_ns: int) -> None:
        self.words[WorkerWord.HEARTBEAT_NS] = now_ns
        self.lag.observe(now_ns)

    def _look_for_files(self, _now_ns: int = 0) -> None:
        try:
            self.queue.look()
        finally:
            self._note_fault()

    def _note_fault(self) -> None:
        self.intake.broken_storage = self.queue.fault

    def _write_dead_letters(self, now_ns: int) -> None:
        if self.intake.draining:
            self.dead_letter_writer.sync_soon()  # so that no packet waits for more of them
        self.dead_letter_writer.tick(now_ns)

    def _tend_old_rings(self, _now_ns: int = 0) -> None:
        self.queue.reserve(self.block.rows, self.assignment.index)
        self._migrate()

    def _migrate(self) -> None:
        """Move some packets of old rings: of each, at a time, as many as may be in flight."""
        if isinstance(self.queue, Queue) and self.queue.migrations:
            delivery = self.config.delivery
            limit = max(MIN_MIGRATED, sum(max_in_flight(each.delivery(delivery)) for each in self.analyzers.values()))
            tail = self.queue.ring.tail_position
            try:
                self.queue.migrate(limit, self.dead_letter_writer, self._report_deleted)
            finally:
                if self.queue.ring.tail_position != tail:
                    self.dispatcher.schedule()

    def _report_deleted(self, path: str) -> None:
        ipc.send(self.control, Message("migrated", body=path))

    def publish(self, _now_ns: int = 0) -> None:
        """Put this worker's gauges into its row."""
        counters, ring, old_bytes = self.counters, self.queue.ring, self.queue.old_bytes
        counters.set("undone", self.queue.undone)
        counters.set("old_bytes", old_bytes)
        counters.set("queue_bytes", ring.used + old_bytes)
        counters.set("queue_capacity", ring.capacity)
        counters.set("oldest_ns", self.queue.oldest_ns)
        self.words[WorkerWord.LACKING] = self.queue.lacking
        if ring.wants_sync and self.queue.syncer is not None:
            self.queue.syncer.want()
        self.words[WorkerWord.STORAGE_FAULT] = self.intake.broken_storage
        self.words[WorkerWord.DEAD_LETTERS_FAULT] = self.dead_letter_writer.failed

    def _rejected(self, kind: str, client: str, pointer: str) -> None:
        """Note an example for the log; connections are counted here."""
        if kind == CONNECTIONS:
            self.words[WorkerWord.REJECTED_CONNECTIONS] += 1
        self.examples.note(kind, client=client, pointer=pointer)

    def _found_full(self) -> int:
        """Tell all workers that this one is full; return in how many seconds a client may try again."""
        self.words[WorkerWord.LACKING] = self.queue.lacking
        now = time.monotonic_ns()
        if now >= self._retry_after[0]:
            self._retry_after = (now + ROOM_NS, self.snapshot().retry_after)
        return self._retry_after[1]

    # ---- called by the syncer

    def _synced(self, _position: int) -> None:
        self._note_fault()
        self.intake.synced()
        self.dispatcher.schedule()
        self.upkeep.run(Step.OLD_RINGS, self._migrate)

    def _not_synced(self, error: OSError) -> None:
        """Accept nothing until a sync succeeds; with fsync, withdraw what was not confirmed to any emitter."""
        self.loop.call_soon(self.upkeep.run, Step.QUEUE_FILES, self._look_for_files)
        # Of a file whose name is gone a sync may succeed: then only that look makes it a fault of the queue.
        self.intake.broken_storage = error.errno or errno.EIO
        if not self.fsync:
            return
        ring, waiting = self.queue.ring, set(self.emitters.waiting)
        damaged = ring.missing(waiting)  # whose emitters are told of that
        packets, _, _ = ring.withdraw_unsynced()
        self.counters.add("withdrawn", packets)
        for sequence in ring.missing(waiting - damaged):
            self.emitters.forget_wait(sequence)
        self.emitters.forget_from(ring.next_sequence_number)  # what could not even be written
        self._reject_behind(self.queue.ring.synced_position, error)

    # ---- called by the core

    def _settled(self, sequence: int, analyzer: str | None) -> None:
        self.emitters.settled(sequence, analyzer)

    def _not_written(self, code: int) -> None:
        """Reject what was accepted in this event-loop iteration: it could not be written, and is withdrawn."""
        error = OSError(code, os.strerror(code))
        assert isinstance(self.queue, Queue)  # noqa: S101  (memory can be written to)
        self.queue.not_written(error)
        self._note_fault()
        self._reject_behind(self.queue.ring.tail_position, error)
        self.emitters.forget_from(self.queue.ring.next_sequence_number)

    def _reject_behind(self, position: int, error: OSError) -> None:
        response = problem(503, f"the packet could not be written to disk: {error.strerror}", headers=retry_after())
        self.counters.add("storage", self.intake.not_stored(position, *response.parts))

    def _damaged(self, ring: str, offset: int, what: str, lost: int, sequence: int) -> None:
        """Count packets that were damaged in one of the queue's files while they waited."""
        log.error("damage in the queue; skipped", ring=ring, offset=offset, what=what, packets=lost)
        self.counters.add("corrupt", max(1, lost))
        self.counters.add("lost", lost)
        if ring == OWN and lost:
            self.loop.call_soon(self._lost, sequence)  # the core is in the midst of claiming or sending

    def _lost(self, sequence: int) -> None:
        """Forget a packet that was lost; 0: those of which no record is left. Emitters that wait for one are told."""
        lost = {sequence} if sequence else self.queue.ring.missing(set(self.emitters.waiting))
        for each in lost:
            self.dispatcher.lost(each)
            self.emitters.lost(each)


def main() -> int:
    """Run a worker; the supervisor calls ``python -m fastdist.worker.main ASSIGNMENT``."""
    assignment = msgspec.json.decode(sys.argv[1], type=Assignment)
    logs.configure(worker=str(assignment.index))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        logs.take_errors(loop)
        commands, control = await ipc.connect(socket.socket(fileno=assignment.control))
        await Worker(assignment, loop, control).serve(commands)

    try:
        uvloop.run(run())
    except StartError as error:
        log.error("this worker cannot start", error=str(error))
        return CANNOT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
