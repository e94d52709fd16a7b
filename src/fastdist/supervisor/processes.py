"""Keeping workers: starting them, replacing those that die or hang, measuring what they use.

A place is what outlives the process that fills it: the listener, the ring, the row in the shared block. A dead worker
is replaced with back-off (``FIRST_DELAY`` doubling to ``LAST_DELAY``); workers that never once got ready,
``FALSE_STARTS`` in a row, end the service, also when there was no process to be had for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import psutil

from fastdist import ipc, logs
from fastdist.ipc import Assignment, Message
from fastdist.shm.block import HUNG, SharedBlock, WorkerState, WorkerWord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastdist.storage.directory import OldRing

HANG = 10.0  # seconds without a heartbeat after which a worker is replaced
START = 60.0  # seconds a worker has to get ready, or to give a sign before it is
READ_RATE = 16 * 2**20  # bytes a second at which a worker must be able to read its rings, beyond that
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds
STEADY = 10.0  # seconds a worker has to live for the back-off to begin anew
FALSE_STARTS = 3
PAUSED = 2.0  # seconds between two looks that tell of a pause of the whole
SPAN = 0.5  # seconds at least over which the use of the processor is measured: it is told in hundredths
LATE = 10.0  # seconds that workers have to end after the time they had to drain

log = logs.get()


class Place:
    """One worker's place, and the process that fills it at present."""

    def __init__(self, index: int, listener: socket.socket, ring: int, old_rings: Sequence[OldRing]) -> None:
        self.index, self.listener, self.ring, self.old_rings = index, listener, ring, list(old_rings)
        self.process: asyncio.subprocess.Process | None = None
        self.control: asyncio.StreamWriter | None = None
        self.ready = self.ever_ready = False
        self.started = 0.0
        rings = sum(os.fstat(fd).st_size for fd in (ring, *(old.fd for old in old_rings)))
        self.time_to_start = START + rings / READ_RATE
        self.delay = 0.0
        self.false_starts = 0
        self.hung = False  # the process was killed because it gave no sign of life
        self.cpu_before = 0  # ns, of the processes that filled this place before

    @property
    def name(self) -> str:
        """What the log calls the worker."""
        return f"w{self.index}"

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.returncode is None

    def kill(self) -> None:
        """Kill -9."""
        if self.process is not None and self.alive:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    def adopted(self, path: str) -> None:
        """Close an old ring that was deleted: its room on the disk is free once nobody has it open."""
        for old in [old for old in self.old_rings if old.path == path]:
            self.old_rings.remove(old)
            os.close(old.fd)

    def send(self, message: Message) -> bool:
        """Send a message to the worker; False if there is none that listens."""
        if not (self.alive and self.ready) or self.control is None or self.control.is_closing():
            return False
        ipc.send(self.control, message)
        return True


class _Probe:
    """What a process uses. Its first figures are over its life so far, the others over ``SPAN`` or longer."""

    def __init__(self, process: psutil.Process, started: float) -> None:
        self.process = process
        self._since, self._used = started, 0  # monotonic; ns

    def processor(self, now: float) -> tuple[int, int]:
        """Return ns of processor time so far, and how many thousandths of a core it uses."""
        times = self.process.cpu_times()
        used = int((times.user + times.system) * 1e9)
        span = max(now - self._since, 0.01)
        permille = int((used - self._used) / span / 1e6)
        if span >= SPAN:
            self._since, self._used = now, used
        return used, permille


class Keeper:
    """Fills the places. ``heard(place, message)`` gets what workers say; ``hopeless()``: none of them can start."""

    def __init__(
        self,
        block: SharedBlock,
        settings: int,
        heard: Callable[[Place, Message], None],
        hopeless: Callable[[], None],
    ) -> None:
        self.block, self.settings, self.heard, self.hopeless = block, settings, heard, hopeless
        self.places: list[Place] = []
        self.held: tuple[int, ...] = ()  # descriptors that workers only have to keep open
        self.stopping = False
        self._spawning = 0  # processes that are being made: nobody knows their numbers yet
        self._looked = time.monotonic()
        self._resumed = 0.0
        self.all_ready = asyncio.Event()
        self._listeners: set[asyncio.Task[None]] = set()
        self._probes: dict[int, _Probe] = {}

    # ---- one place

    async def keep(self, place: Place) -> None:
        """Keep a place filled until the service stops."""
        words = self.block.worker(place.index)
        while not self.stopping:
            if place.delay:
                await asyncio.sleep(place.delay)
                if self.stopping:
                    break
            try:
                await self._start(place)
            except OSError as error:  # no process or descriptor to be had now: the others go on
                if self._is_hopeless(place, str(error)):
                    break
                log.error("a worker cannot be started; trying again", worker=place.name, error=str(error))
                place.delay = min(LAST_DELAY, max(FIRST_DELAY, 2 * place.delay))
                continue
            assert place.process is not None  # noqa: S101  (_start made it)
            status = await place.process.wait()
            words[WorkerWord.STATE] = WorkerState.STOPPED
            self._account_cpu(place)
            if place.control is not None:
                place.control.close()
            if not self.stopping:
                self._after_death(place, status)

    async def _start(self, place: Place) -> None:
        """Start a process. The process comes last: when anything fails here, there is none that would hold the ring."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            reader, writer = await ipc.connect(ours)
            undo.pop_all()  # it is the writer's now
            undo.callback(writer.close)
            await self._spawn(place, theirs)
            undo.pop_all()
        place.control = writer
        task = asyncio.get_running_loop().create_task(self._listen(place, reader, writer))
        self._listeners.add(task)
        task.add_done_callback(self._listeners.discard)

    async def _spawn(self, place: Place, theirs: socket.socket) -> None:
        old_rings = {ring.path: ring.fd for ring in place.old_rings}
        assignment = Assignment(
            index=place.index,
            shared=self.block.fd,
            listener=place.listener.fileno(),
            ring=place.ring,
            control=theirs.fileno(),
            settings=self.settings,
            old_rings=old_rings,
        )
        passed = (
            self.block.fd,
            place.listener.fileno(),
            place.ring,
            theirs.fileno(),
            self.settings,
            *old_rings.values(),
            *self.held,
        )
        words = self.block.worker(place.index)
        words[WorkerWord.HEARTBEAT_NS] = 0
        words[WorkerWord.STATE] = WorkerState.STARTING
        place.ready, place.hung, place.started = False, False, time.monotonic()
        # -P: nothing that happens to lie in the working directory is imported in place of what is installed.
        self._spawning += 1
        try:
            argument = msgspec.json.encode(assignment).decode()
            place.process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "fastdist.worker.main", argument, pass_fds=passed
            )
        finally:
            self._spawning -= 1
        if self.stopping:  # since the last look: nobody else will end it
            place.kill()
        words[WorkerWord.PID], words[WorkerWord.STARTED_NS] = place.process.pid, time.time_ns()
        self._measure(place)

    async def _listen(self, place: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for message in ipc.receive(reader):
            if message.verb == "ready":
                place.ready = place.ever_ready = True
                place.false_starts = 0
                self._measure(place)  # what is shown of it from now on is not the nothing it began with
                self.block.worker(place.index)[WorkerWord.STATE] = WorkerState.RUNNING
                if all(other.ready for other in self.places):
                    self.all_ready.set()
            self.heard(place, message)
        writer.close()  # before its end is known as that of a process: it is sent nothing any more
        self.heard(place, Message("gone"))

    def _after_death(self, place: Place, status: int) -> None:
        """Decide how a dead worker is replaced."""
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if not place.ready and self._is_hopeless(place, how):
            return
        steady = time.monotonic() - place.started > STEADY
        place.delay = FIRST_DELAY if steady else min(LAST_DELAY, max(FIRST_DELAY, 2 * place.delay))
        words = self.block.worker(place.index)
        words[WorkerWord.RESTARTS] += 1
        words[WorkerWord.END_STATUS] = HUNG if place.hung else status
        words[WorkerWord.END_NS] = time.time_ns()
        log.warning("a worker ended and is replaced", worker=place.name, ended_by=how, delay=place.delay)

    def _is_hopeless(self, place: Place, why: str) -> bool:
        """Count a start that failed; end the service when there were too many and no worker ever got ready."""
        place.false_starts += 1
        if place.false_starts < FALSE_STARTS or any(other.ever_ready for other in self.places):
            return False
        log.error("workers cannot start; see their error above", worker=place.name, ended_by=why)
        self.hopeless()
        return True

    # ---- all of them

    def stop(self, deadline: float) -> None:
        """Have workers drain until ``deadline`` (time.monotonic()), and end those that cannot; 0: all at once."""
        self.stopping = True
        for place in self.places:
            place.listener.close()
            if deadline and place.send(Message("drain", deadline=deadline)):
                self.block.worker(place.index)[WorkerWord.STATE] = WorkerState.DRAINING
            else:
                place.kill()
        if deadline:
            late = max(0.0, deadline - time.monotonic()) + LATE
            asyncio.get_running_loop().call_later(late, self._end_the_late)

    def _end_the_late(self) -> None:
        for place in self.places:
            if place.alive:
                log.error("a worker has not ended in time and is killed", worker=place.name)
                place.kill()

    def serving(self) -> bool:
        """Whether there is a worker that got ready and does not hang."""
        since = (time.monotonic() - HANG) * 1e9
        running = (place for place in self.places if place.alive and place.ready)
        return any(self.block.worker(place.index)[WorkerWord.HEARTBEAT_NS] >= since for place in running)

    def replace_hanging(self) -> None:
        """Kill workers whose event loop has not given a sign for too long; their places are filled anew."""
        now = time.monotonic()
        slept, self._looked = now - self._looked, now
        if slept > PAUSED:  # all of us were stopped, it seems: workers get their whole time anew
            self._resumed = now
        for place in self.places:
            heard = self.block.worker(place.index)[WorkerWord.HEARTBEAT_NS] / 1e9
            beat = max(heard, place.started, self._resumed)
            if place.alive and now - beat > (HANG if place.ready else place.time_to_start):
                log.error("a worker hangs and is killed", worker=place.name, silent_for=round(now - beat, 1))
                place.started = now  # once
                place.hung = True
                place.kill()

    def reap_orphans(self) -> None:
        """Let go of children that have ended and are no workers: processes whose parent left them to process 1."""
        workers = {place.process.pid for place in self.places if place.process is not None and place.alive}
        with contextlib.suppress(ChildProcessError):
            while not self._spawning:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_pid in workers:  # that one the event loop waits for
                    return
                os.waitpid(ended.si_pid, os.WNOHANG)

    def measure(self) -> None:
        """Write each worker's use of processor and memory into its row."""
        for place in self.places:
            self._measure(place)

    def _measure(self, place: Place) -> None:
        if not place.alive or place.process is None:
            return
        words = self.block.worker(place.index)
        with contextlib.suppress(psutil.Error):
            probe = self._probes.get(place.index)
            if probe is None or probe.process.pid != place.process.pid:
                probe = self._probes[place.index] = _Probe(psutil.Process(place.process.pid), place.started)
            used, permille = probe.processor(time.monotonic())
            words[WorkerWord.CPU_NS] = place.cpu_before + used
            words[WorkerWord.CPU_PERMILLE] = permille
            words[WorkerWord.RSS] = probe.process.memory_info().rss

    def _account_cpu(self, place: Place) -> None:
        words = self.block.worker(place.index)
        place.cpu_before = words[WorkerWord.CPU_NS]
        words[WorkerWord.CPU_PERMILLE] = words[WorkerWord.RSS] = 0
        self._probes.pop(place.index, None)
