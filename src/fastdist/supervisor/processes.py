"""Keeping workers: starting them, replacing those that die or hang, measuring what they use.

A slot outlives its processes: the listener, the ring, the row in the shared block. A dead worker is replaced with
back-off (``FIRST_DELAY`` doubling to ``LAST_DELAY``). When no worker ever got ready, ``FALSE_STARTS`` in a row end the
service, also those for which no process could be started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec
import psutil

from fastdist import ipc, logs
from fastdist.ipc import Assignment, Message
from fastdist.shm.block import HUNG, SharedBlock, WorkerState, WorkerWord
from fastdist.shm.figures import signal_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fastdist.storage.directory import OldRing

HANG = 10.0  # seconds without a heartbeat after which a worker is replaced
START = 60.0  # seconds a worker has to get ready, or to give a heartbeat before it is
READ_RATE = 16 * 2**20  # bytes a second at which a worker must be able to read its rings, beyond that
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds
STEADY = 10.0  # seconds a worker has to live for the back-off to be reset
FALSE_STARTS = 3
PAUSED = 2.0  # seconds between two checks, beyond which the whole machine was paused
SPAN = 0.5  # seconds at least over which the use of the processor is measured: the kernel counts it in hundredths
CRASHES, CRASH_WINDOW = 3, 900.0  # that many unasked ends of a worker within so many seconds are a problem
LATE = 10.0  # seconds for workers to exit after the drain timeout, or to have fewer packets left

log = logs.get()


class WorkerSlot:
    """What outlives a worker's process, and its present process. ``views``: the listener of ``admin.listen``."""

    def __init__(  # noqa: PLR0913  (what a worker is given)
        self,
        block: SharedBlock,
        index: int,
        listener: socket.socket,
        ring: int,
        old_rings: Sequence[OldRing],
        *,
        views: socket.socket | None = None,
    ) -> None:
        self.index, self.listener, self.ring, self.old_rings, self.views = index, listener, ring, list(old_rings), views
        self.words = block.worker(index)
        self.process: asyncio.subprocess.Process | None = None
        self.usage: _Usage | None = None  # of the process
        self.control: asyncio.StreamWriter | None = None
        self.ready = self.ever_ready = False
        self.started = 0.0
        rings = sum(os.fstat(fd).st_size for fd in (ring, *(old.fd for old in old_rings)))
        self.time_to_start = START + rings / READ_RATE
        self.delay = 0.0
        self.false_starts = 0
        self.deaths: deque[float] = deque(maxlen=CRASHES)  # the last ones, time.monotonic()
        self.renewed = self.irreplaceable = False  # see ipc.Assignment
        self.hung = False  # the process was killed because it gave no heartbeat
        self.cpu_before = 0  # ns, of earlier processes in this slot

    @property
    def name(self) -> str:
        """What the log calls the worker: its number, as everywhere."""
        return str(self.index)

    @property
    def crashes(self) -> bool:
        """Whether its processes end again and again."""
        return len(self.deaths) == CRASHES and time.monotonic() - self.deaths[0] < CRASH_WINDOW

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.returncode is None

    def kill(self) -> None:
        """Kill -9."""
        if self.process is not None and self.alive:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    def back_off(self) -> None:
        """Double the delay before the next process."""
        self.delay = min(LAST_DELAY, max(FIRST_DELAY, 2 * self.delay))

    def migrated(self, path: str) -> None:
        """Close an old ring that was deleted: its space on the disk is free once no process has it open."""
        for old in [old for old in self.old_rings if old.path == path]:
            self.old_rings.remove(old)
            os.close(old.fd)

    def drop_deleted(self) -> None:
        """Do the same for those of which a worker that was killed could not tell."""
        for old in tuple(self.old_rings):
            state = os.fstat(old.fd)
            if state.st_size == state.st_nlink == 0:  # one that was cut short, and has a name, is damaged
                self.migrated(old.path)

    def send(self, message: Message) -> bool:
        """Send a message to the worker; False if it is not running."""
        if not (self.alive and self.ready) or self.control is None or self.control.is_closing():
            return False
        ipc.send(self.control, message)
        return True

    def measure(self) -> None:
        """Write the process's use of processor and memory into the block."""
        if not self.alive or self.process is None:
            return
        with contextlib.suppress(psutil.Error, OSError):
            if self.usage is None:
                self.usage = _Usage(psutil.Process(self.process.pid), self.started)
            used, permille = self.usage.processor(time.monotonic())
            self.words[WorkerWord.CPU_NS] = self.cpu_before + used
            self.words[WorkerWord.CPU_PERMILLE] = permille
            self.words[WorkerWord.RSS] = self.usage.process.memory_info().rss

    def ended(self) -> None:
        """Note that the process has ended."""
        self.words[WorkerWord.STATE] = WorkerState.STOPPED
        self.cpu_before = self.words[WorkerWord.CPU_NS]
        self.words[WorkerWord.CPU_PERMILLE] = self.words[WorkerWord.RSS] = self.words[WorkerWord.PID] = 0
        self.usage = None
        if self.control is not None:
            self.control.close()


class _Usage:
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


class Processes:
    """A process for each slot. ``heard(slot, message)`` gets workers' messages; ``gave_up``: they cannot start.

    ``renew(slot)`` sees to it that a slot has a ring with which a worker can start: after FALSE_STARTS in a row.
    ``held()``: descriptors that workers only have to keep open. ``handed_on``: see ``ipc.Assignment.handed_on``.
    """

    def __init__(  # noqa: PLR0913  (what all workers are given)
        self,
        block: SharedBlock,
        settings: int,
        heard: Callable[[WorkerSlot, Message], None],
        renew: Callable[[WorkerSlot], Awaitable[None]],
        *,
        held: Callable[[], tuple[int, ...]] = tuple,
        handed_on: bool = False,
    ) -> None:
        self.block, self.settings, self.heard, self._renew = block, settings, heard, renew
        self._held, self._handed_on = held, handed_on
        self.slots: list[WorkerSlot] = []
        self.stopping = self.gave_up = False
        self.gets_on = False  # whether a worker had fewer packets left at the last look after the drain timeout
        self._spawning = 0  # processes that are being started: their ids are not known yet
        self._looked = time.monotonic()
        self._resumed = 0.0
        self.all_ready = asyncio.Event()
        self._listeners: set[asyncio.Task[None]] = set()

    # ---- one slot

    async def keep(self, slot: WorkerSlot) -> None:
        """Keep a process in a slot until the service stops."""
        while not self.stopping:
            if slot.delay:
                await asyncio.sleep(slot.delay)
                if self.stopping:
                    break
            try:
                await self._start(slot)
            except OSError as error:  # a process or descriptor is lacking: the others go on
                if self._gives_up(slot, str(error)):
                    break
                log.error("worker cannot be started, trying again", worker=slot.name, error=str(error))
                slot.back_off()
                continue
            assert slot.process is not None  # noqa: S101  (_start made it)
            status = await slot.process.wait()
            slot.ended()
            if self.stopping and slot.views is not None:
                slot.views.close()  # else connections would wait on it in vain
            if not self.stopping:
                self._after_death(slot, status)
            if not self.stopping and slot.false_starts and slot.false_starts % FALSE_STARTS == 0:
                await self._renew(slot)

    async def _start(self, slot: WorkerSlot) -> None:
        """Start a process. That is the last step: when another fails, no process is left that holds the ring."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            reader, writer = await ipc.connect(ours)
            undo.pop_all()  # it is the writer's now
            undo.callback(writer.close)
            await self._spawn(slot, theirs)
            undo.pop_all()
        slot.control = writer
        task = asyncio.get_running_loop().create_task(self._listen(slot, reader, writer))
        self._listeners.add(task)
        task.add_done_callback(self._listeners.discard)

    async def _spawn(self, slot: WorkerSlot, theirs: socket.socket) -> None:
        slot.drop_deleted()
        old_rings = {ring.path: ring.fd for ring in slot.old_rings}
        fds = {
            "shared": self.block.fd,
            "listener": slot.listener.fileno(),
            "ring": slot.ring,
            "control": theirs.fileno(),
            "settings": self.settings,
        }
        if slot.views:
            fds["views"] = slot.views.fileno()
        assignment = Assignment(
            index=slot.index,
            old_rings=old_rings,
            renewed=slot.renewed,
            irreplaceable=slot.irreplaceable,
            handed_on=self._handed_on,
            **fds,
        )
        passed = (*fds.values(), *old_rings.values(), *self._held())
        slot.words[WorkerWord.HEARTBEAT_NS] = 0
        slot.words[WorkerWord.STATE] = WorkerState.STARTING
        slot.ready, slot.hung, slot.started = False, False, time.monotonic()
        # -P: nothing in the working directory is imported instead of what is installed.
        self._spawning += 1
        try:
            argument = msgspec.json.encode(assignment).decode()
            slot.process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "fastdist.worker.main", argument, pass_fds=passed
            )
        finally:
            self._spawning -= 1
        if self.stopping:  # since the last check: it would not be ended otherwise
            slot.kill()
        slot.words[WorkerWord.PID], slot.words[WorkerWord.STARTED_NS] = slot.process.pid, time.time_ns()
        slot.measure()

    async def _listen(self, slot: WorkerSlot, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for message in ipc.receive(reader):
            if message.verb == "ready":
                slot.ready = slot.ever_ready = True
                slot.false_starts = 0
                slot.renewed = slot.irreplaceable = False
                slot.measure()  # so that its figures are not those of its start
                slot.words[WorkerWord.STATE] = WorkerState.RUNNING
                if all(other.ready for other in self.slots):
                    self.all_ready.set()
            self.heard(slot, message)
        writer.close()  # before the process has ended: it is sent nothing any more
        self.heard(slot, Message("gone"))

    def _after_death(self, slot: WorkerSlot, status: int) -> None:
        """Decide how a dead worker is replaced."""
        how = f"signal {signal_name(-status)}" if status < 0 else f"exit status {status}"
        if not slot.ready and self._gives_up(slot, how):
            return
        if time.monotonic() - slot.started > STEADY:
            slot.delay = 0.0
        slot.back_off()
        slot.words[WorkerWord.RESTARTS] += 1
        slot.words[WorkerWord.END_STATUS] = HUNG if slot.hung else status
        slot.words[WorkerWord.END_NS] = time.time_ns()
        slot.deaths.append(time.monotonic())
        log.warning("worker exited, restarting", worker=slot.name, ended_by=how, delay=slot.delay)

    def _gives_up(self, slot: WorkerSlot, why: str) -> bool:
        """Count a failed start; end the service after too many if no worker ever got ready."""
        slot.false_starts += 1
        if slot.false_starts < FALSE_STARTS or any(other.ever_ready for other in self.slots):
            return False
        log.error("workers cannot start; see their error above", worker=slot.name, ended_by=why)
        self.gave_up = True
        self.stop(0.0)
        return True

    # ---- all of them

    def stop(self, deadline: float) -> None:
        """Drain workers until ``deadline`` (time.monotonic()), and kill those that cannot; 0: kill all at once."""
        self.stopping = True
        for slot in self.slots:
            slot.listener.close()
            if slot.views is not None and not slot.alive:
                slot.views.close()
            if deadline and slot.send(Message("drain", deadline=deadline)):
                slot.words[WorkerWord.STATE] = WorkerState.DRAINING
            else:
                slot.kill()
        if deadline:
            asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._kill_late, {})

    def _kill_late(self, before: dict[WorkerSlot, int]) -> None:
        """Kill workers that have no fewer packets left than ``before``: the others write theirs to the dead letters."""
        left = {slot: self.block.rows[slot.index].get("undone") for slot in self.slots if slot.alive}
        late = [slot for slot, packets in left.items() if packets >= before.get(slot, packets + 1)]
        self.gets_on = bool(before) and len(late) < len(left)
        for slot in late:
            log.error("worker exceeded drain timeout, sending SIGKILL", worker=slot.name)
            slot.kill()
        if left:
            asyncio.get_running_loop().call_later(LATE, self._kill_late, left)

    def serving(self) -> bool:
        """Whether a worker got ready and does not hang."""
        since = (time.monotonic() - HANG) * 1e9
        running = (slot for slot in self.slots if slot.alive and slot.ready)
        return any(slot.words[WorkerWord.HEARTBEAT_NS] >= since for slot in running)

    def replace_hanging(self) -> None:
        """Kill workers whose event loop has given no heartbeat for too long; they are restarted."""
        now = time.monotonic()
        slept, self._looked = now - self._looked, now
        if slept > PAUSED:  # the machine was paused, it seems: workers get their whole time again
            self._resumed = now
        for slot in self.slots:
            heard = slot.words[WorkerWord.HEARTBEAT_NS] / 1e9
            beat = max(heard, slot.started, self._resumed)
            if slot.alive and now - beat > (HANG if slot.ready else slot.time_to_start):
                log.error("worker hung, sending SIGKILL", worker=slot.name, silent_for=round(now - beat, 1))
                slot.started = now  # once
                slot.hung = True
                slot.kill()

    def reap_orphans(self) -> None:
        """Reap children that have ended and are no workers: orphans that process 1 inherits."""
        workers = {slot.process.pid for slot in self.slots if slot.process is not None and slot.alive}
        with contextlib.suppress(ChildProcessError):
            while not self._spawning:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_pid in workers:  # that one the event loop waits for
                    return
                os.waitpid(ended.si_pid, os.WNOHANG)
