"""One worker process: its event loop, and the wiring of ring, ingest, dispatcher and API.

A worker is a fresh interpreter, started by the supervisor with the descriptors it needs and an ``Assignment`` on its
command line. It takes its ring over as it finds it, and serves until it is told to drain, or until the supervisor is
gone.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before the other imports, which take a while
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C and a hangup reach the whole group; the supervisor decides

import asyncio
import contextlib
import gc
import itertools
import os
import socket
import sys
import threading
import time
from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
import uvloop

from fastdist import __version__, ipc, logs, packet
from fastdist._core import Intake, PacketRing, Poller
from fastdist.errors import StartError
from fastdist.http import stats
from fastdist.http.api import Api, json_response, problem, reason
from fastdist.http.models import Reloaded
from fastdist.ipc import Action, Assignment, Message
from fastdist.net import tls
from fastdist.shm.block import HeadWord, SharedBlock, Step, WorkerWord
from fastdist.shm.snapshot import Snapshot
from fastdist.shm.upkeep import Upkeep
from fastdist.storage.dead_letter_writer import Letter
from fastdist.storage.dead_letters import DeadLetters
from fastdist.storage.directory import Adoption, OldRing, RingNames, ring_path
from fastdist.storage.group_commit import Syncer, make_safe
from fastdist.storage.locks import is_nameless
from fastdist.worker.dispatch import Dispatcher
from fastdist.worker.ingest import Emitters, IngestProtocol
from fastdist.worker.listener import Acceptor, serve
from fastdist.worker.reconcile import begin_adopting, end_adopting, take_over
from fastdist.worker.tls import TlsServer
from fastdist.worker.upkeep import TICK, LoopLag, Sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastdist.http.api import Response

LOOK_NS = 100_000_000  # between two looks at the names of the rings' files
LEAST_ADOPTED = 64  # packets of an old ring that are moved at once, at least
BEAT, BEATS_TILL_TOLD = 0.5, 20  # seconds between signs of life before there is an event loop; when it is told
LAST_LOOKS = 50  # TICK apart: what a last request has to come once we drain; time that we could not read in is none
LAST_ANSWERS = 1.0  # seconds at most for telling those who come too late that nothing is accepted any more
LAST_LINGER_NS = 1_000_000_000  # that an emitter has to read its last answer once nothing else keeps us from ending
CHANGE_SECONDS = 15.0  # the supervisor has to carry out a change

log = logs.get()


class Worker:
    """A worker's parts and its life."""

    def __init__(self, assignment: Assignment, loop: asyncio.AbstractEventLoop) -> None:
        self.assignment, self.loop = assignment, loop
        self.block = SharedBlock.attach(assignment.shared)
        self.words = self.block.worker(assignment.index)
        self.upkeep = Upkeep(self.words, WorkerWord.FAILING)
        self.counters = self.block.rows[assignment.index]
        self._go_by(ipc.read_settings(assignment.settings))
        self.durability = self.config.queue.durability
        self.ring = PacketRing(
            assignment.ring, volatile=self.durability == "memory", claims_wait_for_sync=self.durability == "fsync"
        )
        self.ring.clock_offset = self.block.head[HeadWord.CLOCK_OFFSET_NS]
        self.adoptions = [Adoption(OldRing(fd, path)) for path, fd in assignment.old_rings.items()]
        safe = self._make_safe()
        self.names = RingNames(self.ring, assignment.ring)
        self.syncer = None
        if self.durability != "memory":
            self.names.path = ring_path(self.config.queue.path, assignment.index)
            self.syncer = Syncer(self.ring, assignment.ring, self._synced, self._sync_failed)
            self.syncer.failing = not safe
            if self.durability == "fsync":
                self.syncer.path = self.names.path
        self.dead_letters = DeadLetters(self.config.queue.path, f"w{assignment.index}-{os.getpid()}", assignment.ring)
        self.limiter = self.block.limiter()
        self.poller = Poller(loop)
        self.emitters = Emitters(Api(self.snapshot))
        self.emitters.carry_out = self._ask_for
        self.dispatcher = Dispatcher(
            loop,
            self.ring,
            self.block.analyzers,
            self.config,
            counters=self.counters,
            dead_letters=self.dead_letters,
            settled=self.emitters.settled,
            poller=self.poller,
        )
        self.letters = self.dispatcher.letters
        if self.syncer is not None:
            self.letters.sync_with(
                self.syncer.run, 0.0 if self.durability == "fsync" else self.config.queue.sync_interval
            )
        self.intake = Intake(
            self.ring,
            self.counters,
            self.limiter,
            self.config.server,
            packet.check,
            self.dispatcher.schedule,
            self.syncer.want if self.syncer is not None and self.durability == "fsync" else None,
        )
        self.sweep = Sweep(self.intake, self.config.server)
        self.lag = LoopLag(self.counters, self.poller, self.intake)
        self.intake.broken_storage = self._sync_fails = not safe
        self.emitters.intake = self.intake
        self.tls = tls.server_context(self.pair, self.config.security)
        self._put_in_force()
        self._next_sync = self._next_look = 0
        self._stopped = asyncio.Event()
        self._server: Acceptor | TlsServer  # set by ``serve``
        self._changes: dict[int, Callable[[Message], None]] = {}  # asked for and not answered, by id
        self._numbers = itertools.count(1)

    def _make_safe(self) -> bool:
        """Sync what was found in files, whatever becomes of one; say whether all of it is safe."""
        if self.durability == "memory":
            return True
        rings = [(self.ring, self.assignment.ring), *((each.ring, each.old.fd) for each in self.adoptions)]
        with _signs_of_life(self.words):
            return all([make_safe(ring, fd) for ring, fd in rings])  # noqa: C419

    # ---- settings

    def _go_by(self, settings: ipc.Settings) -> None:
        self.generation, self.config, self.pair = settings.generation, settings.config, settings.pair
        self.roster = {settings.roster[analyzer.id]: analyzer for analyzer in self.config.analyzers}

    def _put_in_force(self) -> None:
        """Apply the settings that may change while running."""
        limits, security = self.config.limits, self.config.security
        self.limiter.configure(limits.rate, limits.burst, limits.client_rate, limits.client_burst)
        self.emitters.configure(security.tokens, security.cors_origins)

    def _reload(self) -> None:
        """Go by the settings as they are now: by all of them or, told to the supervisor, by none."""
        settings = ipc.read_settings(self.assignment.settings)
        try:
            context = self.tls
            if settings.pair != self.pair:
                context = tls.server_context(settings.pair, settings.config.security)
        except StartError as error:  # what the supervisor could use: this process lacks something
            log.error("the new settings cannot be used; the old ones stay", error=str(error))
            ipc.send(self._control, Message("reloaded", id=settings.generation, body=str(error)))
            return
        self.tls = context
        if isinstance(self._server, TlsServer) and context is not None:
            self._server.context = context  # of connections from now on
        self._go_by(settings)
        self._put_in_force()
        self.dispatcher.config = self.config
        self.dispatcher.set_roster(self.roster)
        ipc.send(self._control, Message("reloaded", id=self.generation))

    def _ask_for(self, action: Action, done: Callable[[Response], None]) -> None:
        """Have the supervisor carry out a change; ``done`` gets the answer for whoever asked."""
        number = next(self._numbers)
        timer = self.loop.call_later(CHANGE_SECONDS, self._changed, Message("reply", id=number, status=504))

        def answer(reply: Message) -> None:
            timer.cancel()
            try:
                response = self._describe(action, reply)
            except Exception as error:  # noqa: BLE001  (whoever asked gets an answer)
                response = self.emitters.api.faults.answer(error)
            done(response)

        self._changes[number] = answer
        ipc.send(self._control, Message("request", id=number, action=action))

    def _changed(self, reply: Message) -> None:
        answer = self._changes.pop(reply.id, None)
        if answer is not None:
            answer(reply)

    def _describe(self, action: Action, reply: Message) -> Response:
        if reply.status == HTTPStatus.OK and action.name == "reload":
            return json_response(Reloaded(needs_restart=reply.body))
        if reply.status == HTTPStatus.OK:
            return json_response(stats.analyzer(self.snapshot(), action.analyzer))
        if reply.status == HTTPStatus.GATEWAY_TIMEOUT:
            return problem(503, "the supervisor has not answered in time")
        if isinstance(reply.body, list):
            errors = [{"pointer": "", "detail": str(each)} for each in reply.body]
            return problem(reply.status, "the new configuration cannot be used; the old one stays", errors=errors)
        return problem(reply.status, str(reply.body))

    def snapshot(self) -> Snapshot:
        """Return what all processes know, as it is now."""
        self.publish()
        return Snapshot(self.block, self.config, self.roster, __version__)

    # ---- serving

    async def serve(self) -> None:
        """Serve until told to stop."""
        take_over(self.ring, self.adoptions, self.counters)
        self.dispatcher.set_roster(self.roster)
        listener = socket.socket(fileno=self.assignment.listener)
        commands = socket.socket(fileno=self.assignment.control)
        reader, self._control = await ipc.connect(commands)
        self._server = self._listen(listener)
        self.tick()
        ipc.send(self._control, Message("ready", body=self.generation))
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 100, 100)  # of the youngest so few that a collection holds nobody up
        obeying = self.loop.create_task(self._obey(reader))
        obeying.add_done_callback(lambda _: self._stopped.set())
        await self._stopped.wait()
        if obeying.done():
            obeying.result()  # whatever went wrong there ends this worker: another takes over
        obeying.cancel()

    def _listen(self, listener: socket.socket) -> Acceptor | TlsServer:
        def protocol() -> IngestProtocol:
            return IngestProtocol(self.intake, self.emitters)

        if self.tls is None:
            return serve(listener, self.poller, protocol)
        # Until its handshake is over a connection is like one whose head is not whole.
        return TlsServer(
            listener,
            self.tls,
            protocol,
            self.emitters.has_room_besides,
            self.config.server.header_timeout,
            poller=self.poller,
        )

    async def _obey(self, reader: asyncio.StreamReader) -> None:
        """Carry out the supervisor's commands; end when it is gone."""
        draining: asyncio.Task[None] | None = None
        async for message in ipc.receive(reader):
            if message.verb == "drain" and draining is None:
                draining = self.loop.create_task(self._drain(message.deadline))
            elif message.verb == "reload":
                self._reload()
            elif message.verb == "reply":
                self._changed(message)
        log.warning("the supervisor is gone; ending")
        if draining is not None:
            draining.cancel()
        await self._drain(time.monotonic())

    # ---- draining

    async def _drain(self, deadline: float) -> None:
        """Take no new connections, finish what is under way, deliver what is queued; all until ``deadline``.

        Connections that the system has made already are served. What comes on a connection meanwhile is accepted, and
        is the last there: the emitter could not know yet.
        """
        self.intake.draining = True
        self._server.finish()
        idle = Counter[IngestProtocol]()  # looks at a connection that has nothing under way
        for look in itertools.count():
            self._close_what_is_over(idle)
            done = not (self.undone or self.intake.connections or self._server.busy)
            if done or time.monotonic() >= deadline:
                break
            if look == LAST_LOOKS:
                self._server.close()  # handshakes, too, have had their time
            await asyncio.sleep(TICK)
        self._server.close()
        self.intake.closed = True
        self._turn_away()
        self._stop_delivering()
        while self.letters.syncing:  # noqa: ASYNC110  (an event would have to be set for this alone)
            await asyncio.sleep(TICK)
        if self.ring.undone and is_nameless(self.assignment.ring):
            self._bury_the_rest()
        else:
            self.letters.finish()
        self.emitters.end_waiting()
        if self.syncer is not None:
            self.syncer.close()
            self.intake.synced(self.ring.synced_position)
        for connection in tuple(self.intake.connections):
            if connection.transport is not None:
                connection.transport.close()
        self.dead_letters.close()
        self.publish()
        for adoption in () if self.names.misplaced else self.adoptions:
            adoption.settle(self.ring)
        self._stopped.set()

    def _close_what_is_over(self, idle: Counter[IngestProtocol]) -> None:
        """Close connections whose last answer is read, or had time to be, and those ``idle`` at enough looks."""
        whole = self.poller.turn()  # a request that is there already is no longer to come
        for connection in tuple(self.intake.connections):
            if connection.transport is None:
                continue
            if connection.idle():
                idle[connection] += whole
                if idle[connection] > LAST_LOOKS:
                    connection.transport.close()
            elif self.undone == 0 and connection.lingered(time.monotonic_ns()) > LAST_LINGER_NS:
                connection.transport.abort()

    def _turn_away(self) -> None:
        """Tell those whose requests are there by now that nothing is accepted any more."""
        end = time.monotonic() + LAST_ANSWERS
        while (not self.poller.turn() or self.intake.holds_back) and time.monotonic() < end:
            self.intake.go_on()

    def _stop_delivering(self) -> None:
        """Send nothing from here on; what is in flight is back in the ring."""
        self.dispatcher.set_roster({})
        for pool in self.dispatcher.retired:
            pool.close()

    def _bury_the_rest(self) -> None:
        """Write what would end with this service to the dead letters; the supervisor tries what cannot be written."""
        try:
            count = self.dispatcher.bury_all()
        except OSError as error:
            log.error(
                "cannot write dead letters; what is left is lost unless the supervisor can",
                error=str(error),
                packets=self.ring.undone,
            )
        else:
            log.warning("packets were not delivered in time and are now dead letters", packets=count)

    # ---- upkeep

    @property
    def undone(self) -> int:
        """Packets in the worker's own ring and in those it adopts."""
        return int(self.ring.undone + sum(adoption.undone for adoption in self.adoptions))

    def tick(self) -> None:
        """Run every TICK seconds."""
        self.loop.call_later(TICK, self.tick)
        now = time.monotonic_ns()
        self.words[WorkerWord.HEARTBEAT_NS] = now
        self.lag.begin(now)
        run = self.upkeep.run
        if now >= self._next_look:
            self._next_look = now + LOOK_NS
            run(Step.QUEUE_FILES, self._look_for_files)
        run(Step.DELIVERIES, self.dispatcher.tick, now)
        run(Step.DEAD_LETTERS, self.letters.tick, now)
        run(Step.CONNECTIONS, self.dispatcher.raise_shortage)
        run(Step.DEAD_LETTERS, self.dead_letters.tick, now)
        run(Step.OLD_RINGS, self._adopt)
        if now >= self._next_sync:
            self._next_sync = now + int(self.config.queue.sync_interval * 1e9)
            run(Step.SYNC, self._sync)
        if self.intake.draining:
            self.letters.sync_soon()  # nobody is to wait for more of them
        run(Step.GAUGES, self.publish)
        run(Step.TIMEOUTS, self.sweep.go_on, now)
        self.lag.end(now)

    def _sync(self) -> None:
        if self.syncer is not None:
            self.syncer.want_if_changed()

    def _look_for_files(self) -> None:
        """Accept nothing while a ring's file is not under its name: the next start would not find what is in it."""
        self.names.look(self.adoptions)
        self._judge_storage()

    def _judge_storage(self) -> None:
        self.intake.broken_storage = self._sync_fails or self.names.misplaced or self.names.misplaced_old

    def _adopt(self) -> None:
        """Move packets of old rings into this worker's own, of each whatever becomes of the others."""
        failure = None
        for adoption in () if self._sync_fails or self.names.misplaced else tuple(self.adoptions):
            try:
                self._adopt_from(adoption)
            except Exception as error:  # noqa: BLE001
                failure = error
        if failure is not None:
            raise failure

    def _adopt_from(self, adoption: Adoption) -> None:
        """Move some packets of an old ring: at a time, as many as may be in flight. Delete it when it is empty."""
        delivery = self.config.delivery
        requests = delivery.connections * delivery.pipeline * len(self.roster)
        most = max(LEAST_ADOPTED, requests * (delivery.batch_packets if delivery.mode == "batch" else 1))
        begin_adopting(self.ring, self.counters)
        try:
            moved, oversized = adoption.step(self.ring, most)
        finally:
            end_adopting(self.ring, self.counters)
        if oversized:
            reason = "larger than the queue takes now"
            letters = [Letter(adoption.ring, each, "oversized", None, None, reason) for each in oversized]
            self.letters.add(*letters)
        if moved:
            if self.syncer is not None:
                self.syncer.want()
            self.dispatcher.schedule()
        if adoption.finished and time.monotonic() >= adoption.next_deletion:
            adoption.delete()
            self.adoptions.remove(adoption)
            os.close(adoption.old.fd)
            ipc.send(self._control, Message("adopted", body=adoption.old.path))
            log.info("an old ring was taken over whole and is deleted", ring=adoption.old.path)

    def publish(self) -> None:
        """Put this worker's gauges into its row."""
        counters, ring = self.counters, self.ring
        counters.set("undone", self.undone)
        counters.set("queue_bytes", ring.used)
        counters.set("queue_capacity", ring.capacity)
        counters.set("oldest_ns", ring.oldest_ns)
        if self.intake.full and ring.undone_bytes < ring.capacity // 2:
            self.intake.full = False
        self.words[WorkerWord.FULL] = int(self.intake.full)
        self.words[WorkerWord.STORAGE_FAULT] = int(self.dispatcher.storage_failed or self.intake.broken_storage)

    # ---- what the syncer tells

    def _synced(self, position: int) -> None:
        self._sync_fails = False
        self._judge_storage()
        self.intake.synced(position)
        self.dispatcher.schedule()
        self.upkeep.run(Step.OLD_RINGS, self._adopt)

    def _sync_failed(self, error: OSError) -> None:
        """Accept nothing until a sync succeeds; with fsync, take back what nobody was told is safe."""
        self._sync_fails = not isinstance(error, FileNotFoundError)
        self._next_look = 0
        self.intake.broken_storage = True  # the next look at the file, or the next sync, judges anew
        if self.durability != "fsync":
            return
        packets, _, _ = self.ring.withdraw_unsynced()
        self.counters.add("withdrawn", packets)
        self.counters.add("storage", packets)
        response = problem(
            503, f"the packet could not be written to disk: {error.strerror}", headers=b"Retry-After: 1\r\n"
        )
        self.intake.sync_failed(response.status, reason(response.status), response.headers, response.body)


@contextlib.contextmanager
def _signs_of_life(words: memoryview) -> Iterator[None]:
    """Give the event loop's sign in its place while the disk is waited for; a kill would not end that wait sooner."""
    done = threading.Event()

    def beat() -> None:
        beats = 0
        while not done.wait(BEAT):
            words[WorkerWord.HEARTBEAT_NS] = time.monotonic_ns()
            beats += 1
            if beats == BEATS_TILL_TOLD:
                log.warning("the disk takes long to write what the last run has left in the queue; waiting for it")

    thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        words[WorkerWord.HEARTBEAT_NS] = time.monotonic_ns()


def main() -> int:
    """Run a worker; the supervisor calls ``python -m fastdist.worker.main ASSIGNMENT``."""
    assignment = msgspec.json.decode(sys.argv[1], type=Assignment)
    logs.configure(worker=f"w{assignment.index}")

    async def run() -> None:
        await Worker(assignment, asyncio.get_running_loop()).serve()

    uvloop.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
