"""The supervisor: opens what must outlive a worker, starts workers, replaces those that die or hang, and checks health.

It owns one listener per worker (SO_REUSEPORT, kept open, so that what is queued on a dead worker's socket waits for its
successor), the rings' descriptors and the shared block. It carries no packet. Signal handlers only note what was asked;
one task acts on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
import uvloop

from fastdist import __version__, logs
from fastdist._core.ring import PacketRing, RingError, file_size, round_capacity
from fastdist.config import to_wire
from fastdist.errors import StartError
from fastdist.health import HealthChecker
from fastdist.shared import AnalyzerState, AnalyzerWord, HeadWord, SharedBlock, WorkerState, WorkerWord
from fastdist.snapshot import Snapshot
from fastdist.worker import Assignment, Command

if TYPE_CHECKING:
    from fastdist.config import Analyzer, Config, Loaded

BACKLOG = 4096
HANG = 10.0  # seconds without a heartbeat after which a worker is replaced
START = 30.0  # seconds a worker has to get ready
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds: back-off of restarts
STEADY = 10.0  # seconds a worker has to run for its next restart to be without delay
FALSE_STARTS = 3  # workers in a row that never got ready: the service cannot start
WATCH = 0.1  # seconds between looks at workers and analyzers
DESCRIPTORS_BESIDES = 512  # what a worker needs besides its emitters' connections and those to analyzers

log = logs.get()


class WorkerPlace:
    """One worker's place: what outlives the process that holds it."""

    def __init__(self, index: int, listener: socket.socket, ring: int) -> None:
        self.index, self.listener, self.ring = index, listener, ring
        self.process: asyncio.subprocess.Process | None = None
        self.control: asyncio.StreamWriter | None = None
        self.ready = False
        self.started = 0.0
        self.delay = 0.0
        self.false_starts = 0
        self.cpu_before = 0  # ns, of the processes that held this place before


class Supervisor:
    """Runs the service of a configuration that was checked."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.config: Config = loaded.config
        self.workers = self.config.server.workers or len(os.sched_getaffinity(0))
        slots = max(64, 2 * len(self.config.analyzers))
        self.block = SharedBlock.create(self.workers, slots)
        self.slots = {analyzer.id: slot for slot, analyzer in enumerate(self.config.analyzers)}
        self.roster: dict[int, Analyzer] = {self.slots[analyzer.id]: analyzer for analyzer in self.config.analyzers}
        self.settings = os.memfd_create("fastdist-settings")
        self.places: list[WorkerPlace] = []
        self.stopping = False
        self.exit_status = 0
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._all_ready = asyncio.Event()
        self._known_states: dict[int, int] = {}
        self._probes: dict[int, psutil.Process] = {}
        self._lock = -1

    # ---- what must be there before a worker starts

    def prepare(self) -> None:
        """Open listeners and rings and fill the shared block. Raises StartError."""
        self._raise_descriptor_limit()
        os.pwrite(self.settings, to_wire(self.config), 0)
        head = self.block.head
        head[HeadWord.STARTED_NS], head[HeadWord.SUPERVISOR] = time.time_ns(), os.getpid()
        for slot, analyzer in self.roster.items():
            self.block.analyzers.clear(slot)
            self.block.analyzers.set_weight(slot, analyzer.weight)
            self.block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
        listeners = self._listen()
        for index, listener in enumerate(listeners):
            self.places.append(WorkerPlace(index, listener, self._open_ring(index)))

    def _raise_descriptor_limit(self) -> None:
        """Make room for ``max_connections``, or lower that to what there is room for."""
        server = self.config.server
        outgoing = len(self.config.analyzers) * self.config.delivery.connections
        needed = server.max_connections + outgoing + DESCRIPTORS_BESIDES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            room = max(16, allowed - min(outgoing, allowed // 2) - DESCRIPTORS_BESIDES)
            if room < server.max_connections:
                log.warning(
                    "server.max_connections is more than the limit on open files allows; lowered",
                    wanted=server.max_connections,
                    lowered_to=room,
                    open_files=hard,
                )
                lowered = msgspec.structs.replace(server, max_connections=room)
                self.config = msgspec.structs.replace(self.config, server=lowered)

    def _listen(self) -> list[socket.socket]:
        server = self.config.server
        listeners: list[socket.socket] = []
        try:
            info = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            family, _, _, _, address = info
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # SO_REUSEPORT would let us share the port with another instance: find out first that nobody has it.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                port = probe.getsockname()[1]
            for _ in range(self.workers):
                listener = socket.socket(family, socket.SOCK_STREAM)
                listeners.append(listener)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.settimeout(0)
                listener.bind((address[0], port, *address[2:]))
            for listener in listeners:
                listener.listen(BACKLOG)
        except OSError as error:
            raise StartError(f"cannot listen on {server.host} port {server.port}: {error.strerror or error}") from error
        return listeners

    def _open_ring(self, index: int) -> int:
        queue = self.config.queue
        capacity = round_capacity(queue.capacity // self.workers)
        try:
            if queue.durability == "memory":
                ring = os.memfd_create(f"fastdist-ring-{index}")
                os.posix_fallocate(ring, 0, file_size(capacity))
                PacketRing(ring, capacity)
                return ring
            folder = Path(queue.path)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_folder(folder)
            ring = os.open(folder / f"ring-{index}.fdq", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(ring).st_size == 0:
                os.posix_fallocate(ring, 0, file_size(capacity))
                PacketRing(ring, capacity)
        except (OSError, RingError) as error:
            raise StartError(
                f"cannot allocate the queue ({queue.path}, {file_size(capacity)} bytes a worker): {error}"
            ) from error
        return ring

    def _lock_folder(self, folder: Path) -> None:
        if self._lock >= 0:
            return
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("latin-1").strip() or "unknown"
            raise StartError(f"the queue in {folder} is in use by a running fastdist (pid {holder})") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    # ---- running

    async def run(self) -> int:
        """Run until stopped; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        self.health = HealthChecker(self.block.analyzers, self.config.health)
        self.health.set_roster(self.roster)
        host, port = self.places[0].listener.getsockname()[:2]
        keepers = [loop.create_task(self._keep(place)) for place in self.places]
        helpers = [loop.create_task(self._watch()), loop.create_task(self._sample()), loop.create_task(self._act())]
        announcement = loop.create_task(self._announce(host, port))
        await asyncio.gather(*keepers)
        for task in (*helpers, announcement):
            task.cancel()
        self.health.close()
        return self.exit_status

    async def _announce(self, host: str, port: int) -> None:
        """Say when all workers are ready, and how to send a first packet."""
        await self._all_ready.wait()
        url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"  # noqa: S104
        log.info(
            "fastdist is ready",
            version=__version__,
            url=url,
            workers=self.workers,
            analyzers=len(self.roster),
            durability=self.config.queue.durability,
        )
        if sys.stderr.isatty():
            body = '{"emitterId":"me","messages":[{"message":"hello"}]}'
            print(  # noqa: T201  (for the person at the terminal, not for the log)
                f"\nSend a first packet:\n  curl -i {url}/logs -H 'Content-Type: application/json' -d '{body}'\n"
                f"See where it went:\n  curl {url}/stats\n",
                file=sys.stderr,
            )

    async def _keep(self, place: WorkerPlace) -> None:
        """Keep a place filled: start a worker, and another when it ends, with back-off."""
        words = self.block.worker(place.index)
        while not self.stopping:
            if place.delay:
                await asyncio.sleep(place.delay)
                if self.stopping:
                    break
            await self._start(place)
            process = place.process
            assert process is not None  # noqa: S101
            status = await process.wait()
            words[WorkerWord.STATE] = WorkerState.STOPPED
            self._account_cpu(place)
            if place.control is not None:
                place.control.close()
            if self.stopping:
                break
            self._after_death(place, status)
        words[WorkerWord.STATE] = WorkerState.STOPPED

    async def _start(self, place: WorkerPlace) -> None:
        ours, theirs = socket.socketpair()
        assignment = Assignment(
            index=place.index,
            shared=self.block.fd,
            listener=place.listener.fileno(),
            ring=place.ring,
            control=theirs.fileno(),
            settings=self.settings,
            roster=self.slots,
        )
        passed = (self.block.fd, place.listener.fileno(), place.ring, theirs.fileno(), self.settings)
        words = self.block.worker(place.index)
        words[WorkerWord.HEARTBEAT_NS] = 0
        words[WorkerWord.STATE] = WorkerState.STARTING
        place.ready, place.started = False, time.monotonic()
        place.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastdist.worker", msgspec.json.encode(assignment).decode(), pass_fds=passed
        )
        theirs.close()
        words[WorkerWord.PID], words[WorkerWord.STARTED_NS] = place.process.pid, time.time_ns()
        reader, place.control = await asyncio.open_connection(sock=ours)
        asyncio.get_running_loop().create_task(self._listen_to(place, reader))

    async def _listen_to(self, place: WorkerPlace, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                if msgspec.json.decode(line, type=Command).verb == "ready":
                    place.ready, place.false_starts = True, 0
                    self.block.worker(place.index)[WorkerWord.STATE] = WorkerState.RUNNING
                    if all(other.ready for other in self.places):
                        self._all_ready.set()

    def _after_death(self, place: WorkerPlace, status: int) -> None:
        """Decide how a dead worker is replaced."""
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lived = time.monotonic() - place.started
        if not place.ready:
            place.false_starts += 1
            if place.false_starts >= FALSE_STARTS:
                log.error("workers cannot start; see their error above", worker=f"w{place.index}", ended_by=how)
                self._stop(3, at_once=True)
                return
        place.delay = (
            0.0
            if place.ready and lived > STEADY and not place.delay
            else min(LAST_DELAY, max(FIRST_DELAY, (0.0 if lived > STEADY else 2 * place.delay)))
        )
        self.block.worker(place.index)[WorkerWord.RESTARTS] += 1
        log.warning("a worker ended and is replaced", worker=f"w{place.index}", ended_by=how, delay=place.delay)

    # ---- stopping

    async def _act(self) -> None:
        """Act on signals, one at a time."""
        while True:
            number = await self._signals.get()
            if number == signal.SIGHUP:
                continue
            if self.stopping:
                log.warning("a second signal: ending at once")
                self._stop(self.exit_status, at_once=True)
            else:
                log.info("draining", signal=number.name, for_at_most=self.config.server.drain_timeout)
                self._stop(0, at_once=False)

    def _stop(self, status: int, *, at_once: bool) -> None:
        self.stopping = True
        self.exit_status = status
        self.block.head[HeadWord.DRAINING] = 1
        deadline = time.monotonic() + (0.0 if at_once else self.config.server.drain_timeout)
        for place in self.places:
            place.listener.close()
            process = place.process
            if process is None or process.returncode is not None:
                continue
            if at_once or not place.ready or place.control is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            else:
                self.block.worker(place.index)[WorkerWord.STATE] = WorkerState.DRAINING
                place.control.write(msgspec.json.encode(Command("drain", deadline)) + b"\n")

    # ---- watching

    async def _watch(self) -> None:
        """Replace workers that hang, and tell of analyzers that come and go."""
        while True:
            await asyncio.sleep(WATCH)
            now = time.monotonic()
            for place in self.places:
                beat = self.block.worker(place.index)[WorkerWord.HEARTBEAT_NS] / 1e9 or place.started
                running = place.process is not None and place.process.returncode is None
                if running and now - max(beat, place.started) > (HANG if place.ready else START):
                    log.error("a worker hangs and is killed", worker=f"w{place.index}", silent_for=round(now - beat, 1))
                    place.started = now  # once
                    with contextlib.suppress(ProcessLookupError):
                        place.process.kill()  # type: ignore[union-attr]
            self._tell_of_analyzers()

    def _tell_of_analyzers(self) -> None:
        states = self.block.analyzers
        for slot, analyzer in self.roster.items():
            state = states.get(slot, AnalyzerWord.STATE)
            if state != self._known_states.get(slot, AnalyzerState.ONLINE):
                if state == AnalyzerState.OFFLINE:
                    log.warning(
                        "analyzer offline; its share goes to the others",
                        analyzer=analyzer.id,
                        endpoint=analyzer.endpoint,
                        reason=states.error(slot),
                    )
                else:
                    log.info("analyzer online; it gets its share again", analyzer=analyzer.id)
            self._known_states[slot] = state

    async def _sample(self) -> None:
        """Once a second keep the totals for the rates, and each worker's use of processor and memory."""
        while True:
            snapshot = Snapshot(self.block, self.config, self.roster, __version__)
            self.block.add_sample(time.monotonic_ns(), snapshot.accepted, snapshot.delivered)
            for place in self.places:
                self._measure(place)
            await asyncio.sleep(1.0)

    def _measure(self, place: WorkerPlace) -> None:
        if place.process is None or place.process.returncode is not None:
            return
        words = self.block.worker(place.index)
        with contextlib.suppress(psutil.Error):
            probe = self._probes.get(place.index)
            if probe is None or probe.pid != place.process.pid:
                probe = self._probes[place.index] = psutil.Process(place.process.pid)
            times = probe.cpu_times()
            words[WorkerWord.CPU_NS] = place.cpu_before + int((times.user + times.system) * 1e9)
            words[WorkerWord.CPU_PERMILLE] = int(probe.cpu_percent() * 10)
            words[WorkerWord.RSS] = probe.memory_info().rss

    def _account_cpu(self, place: WorkerPlace) -> None:
        words = self.block.worker(place.index)
        place.cpu_before = words[WorkerWord.CPU_NS]
        words[WorkerWord.CPU_PERMILLE] = words[WorkerWord.RSS] = 0
        self._probes.pop(place.index, None)


def serve(loaded: Loaded) -> int:
    """Run the service; return the exit status. Raises StartError when it cannot start."""
    logs.configure()

    async def run() -> int:
        supervisor = Supervisor(loaded)
        supervisor.prepare()
        return await supervisor.run()

    return uvloop.run(run())
