"""The supervisor: opens what must outlive a worker, keeps workers running, checks health, and carries out changes.

It owns the workers' listeners, the rings' descriptors and the shared block. It carries no packet. Signal handlers only
queue the signal; one task acts on it. Until that runs, ``before_imports`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import uvloop

from fastdist import __version__, before_imports, logs
from fastdist._core import PacketRing
from fastdist.config import warnings, without_effect
from fastdist.config_rules import MIN_PART, usable_cores
from fastdist.errors import INTERNAL_ERROR, ConfigError, Fault, StartError, printable
from fastdist.ipc import Message, Pair, Settings, shorten_faults, write_settings
from fastdist.net import tls
from fastdist.net.connect import DESCRIPTORS_BESIDES
from fastdist.net.named_files import read_files
from fastdist.shm.block import HeadWord, SharedBlock, Step
from fastdist.shm.snapshot import Snapshot
from fastdist.shm.upkeep import Upkeep
from fastdist.storage import jetstream
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_writer import DeadLetterWriter, what_is_left
from fastdist.storage.directory import QueueFolder, ring_path
from fastdist.storage.files import has_name, is_nameless, present_path
from fastdist.supervisor import activation, listeners
from fastdist.supervisor.dead_letters import DeadLetterWatch, check_folder
from fastdist.supervisor.differences import Difference, differences
from fastdist.supervisor.event_log import EventLog
from fastdist.supervisor.health import HealthChecker
from fastdist.supervisor.problems import ProblemList
from fastdist.supervisor.processes import LATE, Processes, WorkerSlot
from fastdist.supervisor.reload import Changes
from fastdist.supervisor.renewal import renew
from fastdist.supervisor.systemd import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from fastdist.config import Loaded
    from fastdist.ipc import Action
    from fastdist.settings import Config
    from fastdist.supervisor.stream import SharedStream

WATCH = 0.1  # seconds between checks of workers and analyzers
REAP = 1.0  # seconds between reaping orphaned processes
APPLIED = 5.0  # seconds for workers to report that they have applied new settings
CANNOT_START = 3  # exit status: workers cannot start
LOST = 1  # exit status: packets that were in memory only could not be written to the dead letters

log = logs.get()


class Reloaded(msgspec.Struct, frozen=True):
    """What a reload has done: settings that are in force now, wait for a restart, or are masked by an override."""

    changed: list[Difference]
    needs_restart: list[str]
    masked: list[str]


class Supervisor:
    """Runs the service of a configuration that was checked, with the certificate and key it names."""

    def __init__(self, loaded: Loaded, pair: Pair | None = None) -> None:
        self.loaded = loaded
        self.workers = loaded.config.server.workers or usable_cores()
        self.block = SharedBlock.create(self.workers, max(64, 2 * len(loaded.config.analyzers)))
        self.settings = os.memfd_create("fastdist-settings")
        self.folder = QueueFolder(loaded.config.queue.path)
        self.changes = Changes(loaded.config, self.block, self.folder.path, pair)
        self.changes.state.file = printable(str(loaded.path or ""))
        self.inherited = activation.inherited()
        self.processes = Processes(
            self.block,
            self.settings,
            self._heard,
            lambda slot: renew(slot, self.folder, self.block.rows[slot.index]),
            held=lambda: self.folder.held,
            handed_on=bool(self.inherited.get("")),
        )
        self.manager = ServiceManager()
        self.upkeep = Upkeep(self.block.head, HeadWord.FAILING)
        self.events = EventLog(self.block.line_limit())
        self.dead_letters = DeadLetterWatch(loaded.config, self.block, self.upkeep)
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self.problems = ProblemList(self)
        self._applying: dict[WorkerSlot, asyncio.Future[str]] = {}  # workers that have yet to apply the settings
        self._behind: set[WorkerSlot] = set()  # those that have taken too long, or cannot
        self._tasks: set[asyncio.Task[object]] = set()
        self._changing = asyncio.Lock()
        self.stream: SharedStream | None = None  # the queue, if it is one
        self._reload_by: list[str] = []  # clients that have asked for it
        self._next_reload: asyncio.Task[tuple[int, object]] | None = None  # that has not begun to read

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.changes.config

    @property
    def is_shared(self) -> bool:
        """Whether the queue is a stream that other replicas share."""
        return self.config.queue.backend == "jetstream"

    # ---- what must be there before a worker starts

    def prepare(self) -> None:
        """Open listeners and rings and fill the shared block. Raises StartError."""
        given, dates = without_effect(self.loaded), tls.date_warnings(self.changes.pair, self.config)
        for warning in (*warnings(self.config), *given, *dates):
            log.warning(warning)
        self._fit_descriptor_limit()
        head = self.block.head
        head[HeadWord.STARTED_NS], head[HeadWord.SUPERVISOR] = time.monotonic_ns(), os.getpid()
        head[HeadWord.CLOCK_OFFSET_NS] = time.time_ns() - time.monotonic_ns()
        self._lock()
        check_folder(self.config)
        rings = self._open_rings()
        old_rings = self.folder.old_rings() if not self.is_shared and self.folder.has_rings() else []
        self.changes.begin()
        self._write_settings()
        for_packets = listeners.for_packets(self.config, self.inherited, self.workers)
        for_views = listeners.for_views(self.config, self.inherited, self.workers)
        for index in range(self.workers):
            mine = old_rings[index :: self.workers]
            listener = for_packets[index % len(for_packets)]
            views = for_views[index % len(for_views)] if for_views else None
            self.processes.slots.append(WorkerSlot(self.block, index, listener, rings[index], mine, views=views))
        if old_rings:
            log.info("migrating packets of an earlier run", rings=len(old_rings))

    def _lock(self) -> None:
        """Lock the queue's folder if anything in it is needed. Raises StartError."""
        if self.is_shared:
            with contextlib.suppress(StartError):  # nothing in it is needed
                if self.folder.has_rings():
                    log.warning(
                        'the queue\'s folder has files of a queue of backend "ring"; only a start with that delivers '
                        "what is in them",
                        path=str(self.folder.path),
                    )
        elif self.config.queue.durability != "memory" or self.folder.has_rings():
            self.folder.lock()

    def _open_rings(self) -> list[int]:
        queue = self.config.queue
        if self.is_shared:  # workers make their own
            return self.folder.memory_rings(self.workers, MIN_PART)
        capacity = queue.capacity // self.workers // MIN_PART * MIN_PART  # the sum is never above the setting
        if queue.durability == "memory":
            if self.folder.has_rings():
                self.folder.retire_all()
            return self.folder.memory_rings(self.workers, capacity)
        return self.folder.rings(self.workers, capacity)

    def _write_settings(self) -> None:
        changes = self.changes
        settings = Settings(changes.generation, changes.slots_in_use(), changes.config, changes.pair)
        write_settings(self.settings, settings)

    def _fit_descriptor_limit(self) -> None:
        """Raise the descriptor limit for ``max_connections``, or lower that to what the limit allows."""
        server = self.config.server
        outgoing = sum(each.delivery(self.config.delivery).connections for each in self.config.analyzers)
        needed = server.max_connections + outgoing + DESCRIPTORS_BESIDES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        room = max(16, allowed - min(outgoing, allowed // 2) - DESCRIPTORS_BESIDES)
        if allowed < needed and room < server.max_connections:
            log.warning(
                "server.max_connections is more than the limit on open files allows; lowered",
                wanted=server.max_connections,
                lowered_to=room,
                open_files=hard,
            )
            self.changes.lower_connections(room)

    # ---- running

    async def run(self) -> int:
        """Run until stopped; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        if before_imports.asked_to_reload():
            self._signals.put_nowait(signal.SIGHUP)
        if self.is_shared:
            from fastdist.supervisor.stream import SharedStream  # noqa: PLC0415  (its library may not be installed)

            self.stream = SharedStream(self.config, self.block, self.changes)
            await self.stream.start()
        self.health = HealthChecker(self.block.analyzers, self.config.health, self.config.delivery.max_age)
        self.health.set_analyzers(self.changes.analyzers)
        slots = self.processes.slots
        helpers = [
            loop.create_task(each)
            for each in (
                self._announce(slots[0]),
                self._watch(),
                self._sample(),
                self._act_on_signals(),
                self.dead_letters.run(),
            )
        ]
        if os.getpid() == 1:
            helpers.append(loop.create_task(self._reap()))
        await asyncio.gather(*(self.processes.keep(slot) for slot in slots))
        for task in helpers:
            task.cancel()
        self.health.close()
        if self.stream is not None:
            await self.stream.close()
        saved = self.is_shared or self._dead_letter_rest()
        self.events.look(self.snapshot(), last=True)
        return CANNOT_START if self.processes.gave_up else 0 if saved else LOST

    async def _announce(self, slot: WorkerSlot) -> None:
        """Log when all workers are ready, and how to send a first packet."""
        secure = bool(self.config.security.tls_cert)
        url = listeners.url(slot.listener, secure=secure)
        admin = listeners.url(slot.views, secure=secure and self.config.admin.tls == "on") if slot.views else None
        await self.processes.all_ready.wait()
        log.info(
            "fastdist is ready",
            version=__version__,
            url=url,
            workers=self.workers,
            analyzers=len(self.config.analyzers),
            durability="replicated" if self.is_shared else self.config.queue.durability,
            **({"admin": admin} if admin else {}),
        )
        self.problems.look()
        self.manager.ready()
        if sys.stderr.isatty():
            body = '{"emitterId":"me","messages":[{"message":"hello"}]}'
            print(  # noqa: T201  (for the person at the terminal, not for the log)
                f"\nSend a first packet:\n  curl -i {url}/logs -H 'Content-Type: application/json' -d '{body}'\n"
                f"See where it went:\n  curl {admin or url}/stats\n",
                file=sys.stderr,
            )

    # ---- stopping

    async def _act_on_signals(self) -> None:
        """Act on signals, one at a time."""
        while True:
            number = await self._signals.get()
            if number == signal.SIGHUP:
                self._begin(self._reload("SIGHUP"))  # so that a signal to end does not wait for it
            elif self.processes.stopping:
                log.warning("second signal received, exiting now", signal=number.name)
                self.processes.stop(0.0)
            else:
                seconds = self.config.server.drain_timeout
                log.info("signal received, shutting down", signal=number.name, for_at_most=seconds)
                self.block.head[HeadWord.DRAINING] = 1
                self.problems.look()
                self.manager.stopping(seconds + 2 * LATE)
                self.manager.status(f"Draining for at most {seconds:g} s")
                self.processes.stop(time.monotonic() + seconds)

    def _dead_letter_rest(self) -> bool:
        """Log what stays queued; make dead letters of what dead workers have left in memory.

        Return whether all of that could be written.
        """
        for slot in self.processes.slots:
            slot.drop_deleted()
        rows = {
            fd: self.block.rows[slot.index]
            for slot in self.processes.slots
            for fd in (slot.ring, *(old.fd for old in slot.old_rings))
        }
        nameless = {fd: row for fd, row in rows.items() if is_nameless(fd)}
        lasting = [slot for slot in self.processes.slots if slot.ring not in nameless]
        queued = sum(rows[slot.ring].get("undone") for slot in lasting)
        if queued and (renamed := self._renamed_rings(lasting)):
            log.error("packets stay in queue files that were renamed; the next start has to find them", files=renamed)
        elif queued:
            log.warning(
                "packets stay queued, for the next start to deliver", packets=queued, path=str(self.folder.path)
            )
        config, bounds = self.config, self.dead_letters.bounds
        files = DeadLetterFiles(config.queue.path, f"s-{os.getpid()}", path=config.dead_letters.path, bounds=bounds)
        count, saved = 0, True
        for fd, row in nameless.items():
            ring = PacketRing(fd, volatile=True, clock_offset=self.block.head[HeadWord.CLOCK_OFFSET_NS])
            queued = ring.undone
            try:
                DeadLetterWriter(files, row, lambda *_: None).write_all(what_is_left(ring), self._extend)
            except OSError as error:
                log.error("cannot write dead letters; packets are lost", error=str(error), packets=ring.undone)
                saved = False
            count += queued - ring.undone
        files.close()
        if count:
            log.warning("packets that workers have left are now dead letters", packets=count)
        return saved

    def _extend(self) -> None:
        """Have the service manager wait on: dead letters are being written, by workers or by this process."""
        self.manager.extend(2 * LATE)

    def _renamed_rings(self, slots: list[WorkerSlot]) -> dict[str, str | None]:
        """Return the workers' rings that were renamed: {old path: new path}."""
        rings = [(str(ring_path(self.folder.path, slot.index)), slot.ring) for slot in slots]
        return {path: present_path(fd) for path, fd in rings if not has_name(fd, path)}

    # ---- changes

    def _heard(self, slot: WorkerSlot, message: Message) -> None:
        if message.verb == "ready" and message.body != self.changes.generation:
            slot.send(Message("reload"))  # settings were changed while it started
        elif message.verb == "reloaded" and message.id == self.changes.generation:
            self._applied(slot, f"worker {slot.name}: {message.body}" if message.body else "")
        elif message.verb == "gone":  # its successor starts with the settings in force then
            self._applied(slot, "")
        elif message.verb == "migrated":
            slot.migrated(message.body)
        elif message.verb == "request" and message.action is not None:
            self._begin(self._carry_out(slot, message.id, message.action))

    def _applied(self, slot: WorkerSlot, fault: str) -> None:
        (self._behind.add if fault else self._behind.discard)(slot)
        if awaited := self._applying.pop(slot, None):
            awaited.set_result(fault)

    def _begin(self, work: Coroutine[Any, Any, object]) -> None:
        """Run work in a task of its own; its errors are logged."""

        def done(task: asyncio.Task[object]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                log.error("a change has failed", exc_info=task.exception())

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(done)

    async def _carry_out(self, slot: WorkerSlot, request: int, action: Action) -> None:
        try:
            if action.name == "reload":
                status, body = await self._reload(action.by)
            else:
                status, body = await self.stream.apply(action) if self.stream else self.changes.apply(action)
        except Exception:
            slot.send(Message("reply", id=request, status=500, body=INTERNAL_ERROR))
            raise  # which is logged
        slot.send(Message("reply", id=request, status=status, body=body))

    async def _reload(self, by: str) -> tuple[int, object]:
        """Read the configuration again; return 200 and what has changed, or 422 and the faults.

        All requests made during a reload share the next one.
        """
        self._reload_by.append(by)
        if self._next_reload is None:
            self._next_reload = asyncio.get_running_loop().create_task(self._reload_now())
        return await asyncio.shield(self._next_reload)

    async def _reload_now(self) -> tuple[int, object]:
        async with self._changing, self.manager.reloading():
            self._next_reload = None
            by, self._reload_by = list(dict.fromkeys(self._reload_by)), []
            before = self.changes.config, self.changes.pair
            try:
                loaded, pair = await asyncio.to_thread(self._read_again)  # which may wait until the file is written
                need_restart = self.changes.reload(loaded.config, pair)
                faults = [Fault(each) for each in await self._apply_settings()]
                if faults:
                    self.changes.put_in_force(*before)
                    await self._apply_settings()
            except (ConfigError, StartError) as error:
                faults = getattr(error, "faults", [Fault(str(error))])
            if faults:
                few = shorten_faults(faults)
                what = "the new configuration cannot be used; the old one stays"
                log.error(what, by=by, problems=[str(fault) for fault in few])
                self.changes.failed(few)
                self.problems.look()
                return 422, few
            self.loaded = loaded
            self.dead_letters.use(self.config.dead_letters)  # not before: what it discards does not come back
            self.changes.succeeded(need_restart)
            self.problems.look()
            changed = differences(before[0], self.changes.config, (before[1], self.changes.pair))
            done = Reloaded(changed, need_restart, self.changes.masked)
            log.info("configuration reloaded", by=by, **msgspec.to_builtins(done))
            return 200, done

    def _read_again(self) -> tuple[Loaded, Pair | None]:
        loaded = self.loaded.reload()
        config, pair = read_files(loaded.config)
        return dataclasses.replace(loaded, config=config), pair

    async def _apply_settings(self) -> list[str]:
        """Apply the settings in force to workers and checks; return the workers' errors."""
        self._write_settings()
        self.health.set_analyzers(self.changes.analyzers)
        loop = asyncio.get_running_loop()
        self._behind = set()
        self._applying = {slot: loop.create_future() for slot in self.processes.slots if slot.send(Message("reload"))}
        if not self._applying:
            return []
        done, _ = await asyncio.wait(self._applying.values(), timeout=APPLIED)
        if self._applying:
            self._behind.update(self._applying)
            self._applying = {}
            log.warning("not all workers have applied the new settings yet", workers=self.late_workers())
        return sorted(filter(None, (each.result() for each in done)))

    # ---- watching

    async def _watch(self) -> None:
        """Replace workers that hang, log analyzers that change state, and send the watchdog's heartbeat."""
        while True:
            await asyncio.sleep(WATCH)
            run = self.upkeep.run
            run(Step.WORKERS, self.processes.replace_hanging)
            self.problems.look_if_changed()
            run(Step.CONNECTIONS, self.health.shortage.raise_once)
            run(Step.SERVICE_MANAGER, self._send_heartbeat)

    def _send_heartbeat(self) -> None:
        if self.processes.serving():
            self.manager.heartbeat()
        if self.processes.gets_on:
            self._extend()

    async def _reap(self) -> None:
        """As process 1: reap orphaned processes that have ended."""
        while True:
            await asyncio.sleep(REAP)
            self.processes.reap_orphans()

    def late_workers(self) -> list[str]:
        """Return the workers that have not applied new settings in time, and not since."""
        return [slot.name for slot in self.processes.slots if slot in self._behind]

    def snapshot(self) -> Snapshot:
        """Return what all processes know now."""
        return Snapshot(self.block, self.config, self.changes.analyzers, __version__)

    async def _sample(self) -> None:
        """Once a second sample totals and each worker's use of processor and memory, and check our files."""
        while True:
            run = self.upkeep.run
            run(Step.FIGURES, self._keep_figures)
            self.problems.look()
            run(Step.QUEUE_FILES, self.folder.renew_lock)
            run(Step.OVERRIDES, self.changes.overrides.check_file)
            await asyncio.sleep(1.0)

    def _keep_figures(self) -> None:
        snapshot = self.snapshot()
        self.block.add_sample(time.monotonic_ns(), snapshot.accepted, snapshot.delivered)
        self.events.look(snapshot)
        for slot in self.processes.slots:
            slot.measure()


def serve(loaded: Loaded, pair: Pair | None = None) -> int:
    """Run the service, with certificate and key if it has some; return the exit status.

    Raises StartError when it cannot start.
    """
    logs.configure()
    if loaded.config.queue.backend == "jetstream":
        jetstream.require_client()

    async def run() -> int:
        logs.take_errors(asyncio.get_running_loop())
        supervisor = Supervisor(loaded, pair)
        supervisor.prepare()
        return await supervisor.run()

    return uvloop.run(run())
