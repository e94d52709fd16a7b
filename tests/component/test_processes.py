"""Keeping workers: when there is no process or descriptor to be had for them, and how long they may be silent."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from types import SimpleNamespace

import pytest

from fastdist import ipc
from fastdist.shm.block import SharedBlock, WorkerWord
from fastdist.supervisor import processes
from fastdist.supervisor.processes import FALSE_STARTS, HANG, READ_RATE, START, Processes, WorkerSlot

SECONDS = 60.0
LARGE = int(START) * READ_RATE  # bytes of a ring that takes as long to read as a worker has anyway


class Worker:
    """A process as ``Processes`` sees it, that lives until it is killed."""

    pid = os.getpid()  # of one that can be measured

    def __init__(self):
        self.returncode = None
        self._ended = asyncio.Event()

    def kill(self):
        self.returncode = -9
        self._ended.set()

    async def wait(self):
        await self._ended.wait()
        return self.returncode


class Bench:
    """``Processes`` with one slot, whose next connections and processes fail with what stands in the lists."""

    def __init__(self, monkeypatch):
        self.workers: list[Worker] = []
        self.alive_before: list[int] = []  # at each start: earlier processes that still run
        self.spawn_failures: list[OSError] = []
        self.connect_failures: list[OSError] = []
        self.started = asyncio.Event()
        self.renewed: list[WorkerSlot] = []
        self.processes = Processes(SharedBlock.create(1, 8), os.memfd_create("test"), lambda *_: None, self.renew)
        self.slot = WorkerSlot(
            self.processes.block, 0, socket.create_server(("127.0.0.1", 0)), os.memfd_create("test"), []
        )
        self.processes.slots.append(self.slot)
        connect = ipc.connect

        async def connect_or_fail(sock):
            if self.connect_failures:
                raise self.connect_failures.pop()
            return await connect(sock)

        async def spawn_or_fail(*_, **__):
            self.alive_before.append(sum(worker.returncode is None for worker in self.workers))
            if self.spawn_failures:
                raise self.spawn_failures.pop()
            self.workers.append(Worker())
            if not self.connect_failures:
                self.started.set()
            return self.workers[-1]

        monkeypatch.setattr(ipc, "connect", connect_or_fail)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn_or_fail)
        monkeypatch.setattr(processes, "FIRST_DELAY", 0.001)

    async def renew(self, slot):
        self.renewed.append(slot)

    async def run_until(self, event):
        """Keep the slot until ``event`` is set, then stop."""
        keeping = asyncio.ensure_future(self.processes.keep(self.slot))
        await asyncio.wait_for(event.wait(), SECONDS)
        self.processes.stop(0.0)
        await asyncio.wait_for(keeping, SECONDS)


@pytest.fixture
def under(monkeypatch):
    """Return ``under(scenario)``: run ``scenario(bench)``."""

    def under(scenario):
        async def run():
            await scenario(Bench(monkeypatch))

        asyncio.run(run())

    return under


def test_no_two_processes_ever_have_one_ring(under):
    """Whatever fails between the socket pair and the process that is running."""

    async def scenario(bench):
        bench.connect_failures = [OSError(errno.EMFILE, "no descriptor")]
        bench.spawn_failures = [OSError(errno.EAGAIN, "no process")]
        await bench.run_until(bench.started)
        assert bench.alive_before == [0, 0]
        assert len(bench.workers) == 1

    under(scenario)


def test_service_without_workers_ends(under):
    async def scenario(bench):
        bench.spawn_failures = [OSError(errno.E2BIG, "Argument list too long")] * 100
        await asyncio.wait_for(bench.processes.keep(bench.slot), SECONDS)
        assert bench.processes.gave_up
        assert len(bench.alive_before) == FALSE_STARTS

    under(scenario)


def test_workers_restart_for_ever_once_ready(under):
    async def scenario(bench):
        bench.slot.ever_ready = True
        bench.spawn_failures = [OSError(errno.EAGAIN, "no process")] * (2 * FALSE_STARTS)
        await bench.run_until(bench.started)
        assert not bench.processes.gave_up
        assert len(bench.alive_before) == 2 * FALSE_STARTS + 1
        assert bench.renewed == []

    under(scenario)


def test_false_starts_have_rings_renewed(under):
    """Of a worker that has run before: its ring may have been damaged since."""

    async def scenario(bench):
        bench.slot.ever_ready = True
        keeping = asyncio.ensure_future(bench.processes.keep(bench.slot))
        for start in range(1, 2 * FALSE_STARTS + 1):
            await asyncio.wait_for(bench.started.wait(), SECONDS)
            bench.started.clear()
            assert len(bench.renewed) == (start - 1) // FALSE_STARTS
            bench.workers[-1].kill()
        await asyncio.wait_for(bench.started.wait(), SECONDS)
        assert bench.renewed == [bench.slot] * 2
        bench.processes.stop(0.0)
        await asyncio.wait_for(keeping, SECONDS)

    under(scenario)


def test_a_worker_is_measured_from_its_start(under):
    async def scenario(bench):
        words = bench.processes.block.worker(0)
        keeping = asyncio.ensure_future(bench.processes.keep(bench.slot))
        async with asyncio.timeout(SECONDS):
            while not words[WorkerWord.RSS]:  # noqa: ASYNC110  (``measure`` is not called)
                await asyncio.sleep(0.001)
        bench.processes.stop(0.0)
        await asyncio.wait_for(keeping, SECONDS)

    under(scenario)


def test_first_figures_cover_workers_life():
    class Process:
        used = 0.0

        def cpu_times(self):
            return SimpleNamespace(user=self.used / 2, system=self.used / 2)

    process = Process()
    probe = processes._Usage(process, 100.0)
    for at, used, permille in [
        (100.2, 0.1, 500),
        (100.4, 0.2, 500),  # too soon to forget what was before
        (101.4, 0.7, 500),
        (101.5, 0.8, 1000),
        (102.4, 0.8, 100),
        (103.4, 0.8, 0),
    ]:
        process.used = used
        ns, shown = probe.processor(at)
        assert ns == pytest.approx(used * 1e9, abs=2)
        assert shown == pytest.approx(permille, abs=1)


@pytest.mark.parametrize(
    ("ready", "ring", "limit"),
    [(True, 0, HANG), (True, LARGE, HANG), (False, 0, START), (False, LARGE, 2 * START)],
)
@pytest.mark.parametrize("signs", [True, False], ids=["since its last sign", "since it was started"])
def test_time_a_worker_may_send_no_heartbeat(under, ready, ring, limit, signs):
    async def scenario(bench):
        file = os.memfd_create("ring")
        os.truncate(file, ring)  # sparse
        slot = WorkerSlot(bench.processes.block, 0, bench.slot.listener, file, [])
        bench.processes.slots[:] = [slot]
        slot.process, slot.ready = Worker(), ready
        for silent, alive in ((0.8 * limit, True), (1.2 * limit, False)):
            now = time.monotonic()
            slot.started = now - (100 * START if signs else silent)
            bench.processes.block.worker(0)[WorkerWord.HEARTBEAT_NS] = int((now - silent) * 1e9) if signs else 0
            bench.processes.replace_hanging()
            assert slot.alive is alive

    under(scenario)


def test_late_worker_that_gets_on_is_kept(under, monkeypatch):
    """It writes dead letters of a large queue, which takes as long as it takes."""
    monkeypatch.setattr(processes, "LATE", 3600.0)

    async def scenario(bench):
        slot, row = bench.slot, bench.processes.block.rows[0]
        slot.process = Worker()
        for before, left, alive in ((None, 9, True), (9, 8, True), (8, 8, False)):
            row.set("undone", left)
            bench.processes._kill_late({} if before is None else {slot: before})
            assert slot.alive is alive
            assert bench.processes.gets_on is (before == 9), "else the service manager does not wait longer"

    under(scenario)


def test_late_worker_without_progress_ends(under, monkeypatch):
    monkeypatch.setattr(processes, "LATE", 0.01)

    async def scenario(bench):
        slot = bench.slot
        slot.process, slot.ready = Worker(), True
        slot.control = SimpleNamespace(is_closing=lambda: False, write=lambda _: None)
        bench.processes.stop(time.monotonic())
        assert slot.alive
        assert await asyncio.wait_for(slot.process.wait(), SECONDS) == -9

    under(scenario)


def test_pause_of_the_whole_hangs_no_worker(under, monkeypatch):
    """After a pause of the machine, or a frozen container, workers have their whole time again, however long it was."""

    async def scenario(bench):
        clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
        monkeypatch.setattr(processes, "time", clock)
        slot = bench.slot
        slot.process, slot.ready = Worker(), True

        def look(seconds):
            """Let time pass in which the supervisor looks as often as it does."""
            for _ in range(int(seconds)):
                clock.now += 1.0
                bench.processes.replace_hanging()

        bench.processes._looked = clock.now
        bench.processes.block.worker(0)[WorkerWord.HEARTBEAT_NS] = int(clock.now * 1e9)
        look(0.5 * HANG)
        clock.now += 3600.0
        look(0.8 * HANG)
        assert slot.alive
        look(0.4 * HANG)
        assert not slot.alive

    under(scenario)


@pytest.mark.parametrize("status", [-9, -35, 1], ids=["signal", "signal without a name", "exit"])
def test_worker_is_replaced_however_it_ends(under, status):
    async def scenario(bench):
        words = bench.processes.block.worker(0)
        keeping = asyncio.ensure_future(bench.processes.keep(bench.slot))
        await asyncio.wait_for(bench.started.wait(), SECONDS)
        bench.started.clear()
        bench.workers[0].returncode = status
        bench.workers[0]._ended.set()
        await asyncio.wait_for(bench.started.wait(), SECONDS)
        assert (words[WorkerWord.END_STATUS], words[WorkerWord.RESTARTS]) == (status, 1)
        bench.processes.stop(0.0)
        await asyncio.wait_for(keeping, SECONDS)
        assert words[WorkerWord.PID] == 0

    under(scenario)


def test_stop_closes_listeners_of_no_worker(under):
    """While a worker waits to be replaced: connections would wait there in vain."""

    async def scenario(bench):
        bench.slot.views, bench.slot.delay = socket.create_server(("127.0.0.1", 0)), 3600.0
        keeping = asyncio.ensure_future(bench.processes.keep(bench.slot))
        await asyncio.sleep(0)
        bench.processes.stop(time.monotonic() + 3600)
        assert (bench.slot.listener.fileno(), bench.slot.views.fileno()) == (-1, -1)
        keeping.cancel()

    under(scenario)


def test_unmeasured_workers_are_kept(under, monkeypatch):
    def fail(_pid):
        raise OSError(errno.EMFILE, "no descriptor")

    async def scenario(bench):
        monkeypatch.setattr(processes.psutil, "Process", fail)
        keeping = asyncio.ensure_future(bench.processes.keep(bench.slot))
        async with asyncio.timeout(SECONDS):
            while bench.slot.control is None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert bench.alive_before == [0]
        bench.processes.stop(0.0)
        await asyncio.wait_for(keeping, SECONDS)

    under(scenario)
