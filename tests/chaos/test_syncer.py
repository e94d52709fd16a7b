"""Group commit with a disk that fails: what is told to whom, and when it is tried again."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest
from ring_disk import pages_written_again
from support import sync_address

from fastdist._core import PacketRing, SyncThread, file_size
from fastdist.storage import group_commit
from fastdist.storage.group_commit import Syncer, make_safe

CAPACITY = 65536
PAGE = 4096
HEADER_PAGES = 2


class Disk:
    """In place of fdatasync, in the thread and at the end: fails while ``broken``, waits while ``held``, counts."""

    def __init__(self, monkeypatch) -> None:
        self.broken = self.held = False
        self.begun, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self.syncs = 0
        self.threads: list[SyncThread] = []
        self._address = sync_address(self.sync)
        monkeypatch.setattr(group_commit, "SyncThread", self.thread)
        monkeypatch.setattr(group_commit.os, "fdatasync", self.sync_here)

    def thread(self, fd: int) -> SyncThread:
        self.threads.append(SyncThread(fd, self._address))
        return self.threads[-1]

    def sync(self, fd: int) -> int:
        assert fd > 2
        self.syncs += 1
        self.begun.release()
        assert not self.held or self._permits.acquire(timeout=10)
        return errno.EIO if self.broken else 0

    def sync_here(self, fd: int) -> None:
        if error := self.sync(fd):
            raise OSError(error, os.strerror(error))

    def let_one_end(self) -> None:
        self._permits.release()

    def let_go(self) -> None:
        self.held = False
        self._permits.release()


class Watched:
    """A ring, and after how many syncs it was written again."""

    def __init__(self, ring: PacketRing, disk: Disk) -> None:
        self.written_again: list[int] = []
        self._ring, self._disk = ring, disk

    def __getattr__(self, name):
        return getattr(self._ring, name)

    def begin_writing_again(self):
        self.written_again.append(self._disk.syncs)
        return self._ring.begin_writing_again()

    def write_again(self) -> None:
        self.written_again.append(self._disk.syncs)
        self._ring.write_again()


class Slow(Watched):
    """A ring that is written again when it is told to, or fails to be."""

    def __init__(self, ring: PacketRing, disk: Disk) -> None:
        super().__init__(ring, disk)
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.error: OSError | None = None

    def go_on_writing_again(self, span) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.begun.release()
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        self._ring.go_on_writing_again(span)


class Bench:
    """A syncer on a ring in memory (or in the file ``path``), and what it tells."""

    def __init__(self, path=None, on_failed=None) -> None:
        ring_fd = os.memfd_create("ring") if path is None else os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(ring_fd, file_size(CAPACITY))
        PacketRing(ring_fd, CAPACITY)
        self.ring = PacketRing(ring_fd, claims_wait_for_sync=True)
        self.fd = os.dup(ring_fd)
        self.told: list[object] = []
        on_failed = on_failed or (lambda error: self.told.append(error.errno))
        self.syncer = Syncer(self.ring, self.fd, self.told.append, on_failed, path=path)

    def push(self, size: int = 100) -> int:
        assert self.ring.push(bytes(size))
        self.syncer.want()
        return self.ring.tail_position

    async def until(self, told: int) -> None:
        async with asyncio.timeout(10):
            while len(self.told) < told:  # noqa: ASYNC110  (what it waits for knows nothing of the test)
                await asyncio.sleep(0.005)


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.setattr(group_commit, "RETRY_SECONDS", 0.05)
    disk = Disk(monkeypatch)
    yield disk
    disk.let_go()
    for thread in disk.threads:
        thread.close()


def test_one_sync_covers_one_iteration(disk):
    async def run() -> None:
        bench = Bench()
        bench.push()
        end = [bench.push() for _ in range(10)][-1]
        assert bench.ring.claim() == 0
        await bench.until(1)
        assert bench.told == [end]
        assert bench.ring.synced_position == end
        assert bench.ring.claim()
        assert disk.syncs == 1

    asyncio.run(run())


def test_unfinished_batch_is_not_synced(disk):
    class Unfinished(Watched):
        sync_position = 0

    async def run() -> None:
        bench = Bench()
        bench.syncer.ring = Unfinished(bench.ring, disk)
        bench.push()
        await bench.until(1)
        assert (bench.told, bench.ring.synced_position, disk.syncs) == ([0], 0, 1)
        assert make_safe(bench.syncer.ring, bench.fd) is None
        assert bench.ring.synced_position == 0

    asyncio.run(run())


def test_arrivals_during_sync_wait_for_next(disk):
    async def run() -> None:
        bench = Bench()
        disk.held = True
        first = bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        second = [bench.push() for _ in range(5)][-1]
        assert bench.ring.synced_position < first
        disk.let_one_end()
        await bench.until(1)
        disk.let_one_end()
        await bench.until(2)
        assert bench.told == [first, second]
        assert disk.syncs == 2

    asyncio.run(run())


def test_next_sync_begins_without_the_loop(disk):
    """However long the loop is busy; it then gets the results of both syncs at once."""

    async def run() -> None:
        bench = Bench()
        disk.held = True
        bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        end = bench.push()
        await asyncio.sleep(0)
        disk.let_one_end()
        assert disk.begun.acquire(timeout=10), "the loop does nothing meanwhile"
        disk.let_one_end()
        disk.threads[0].close()
        await bench.until(1)
        assert (bench.told, bench.ring.synced_position, disk.syncs) == ([end], end, 2)

    asyncio.run(run())


def test_no_sync_before_a_failure_is_known(disk, monkeypatch):
    """Not even what was requested already: everything has to be written again before."""
    monkeypatch.setattr(group_commit, "RETRY_SECONDS", 1.5)

    async def run() -> None:
        bench = Bench()
        disk.held = True
        bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        disk.broken = True
        bench.push()
        await asyncio.sleep(0)
        disk.let_one_end()
        await bench.until(1)
        bench.syncer.want()  # this waits for the retry, too
        await asyncio.sleep(0.05)
        assert (bench.told, disk.syncs, bench.syncer.failing) == ([errno.EIO], 1, True)
        disk.broken = False
        disk.let_go()
        await bench.until(2)
        assert (bench.told[1], disk.syncs) == (bench.ring.tail_position, 2)

    asyncio.run(run())


def test_failed_sync_retries_until_success(disk):
    async def run() -> None:
        bench = Bench()
        disk.broken = True
        end = bench.push()
        await bench.until(3)
        assert bench.told == [errno.EIO] * 3
        assert bench.syncer.failing
        assert bench.ring.synced_position == 0
        assert bench.ring.claim() == 0, "what is not synced is not delivered"
        disk.broken = False
        await bench.until(4)
        assert bench.told[3] == end
        assert not bench.syncer.failing
        assert bench.ring.claim()
        await asyncio.sleep(0.2)
        assert disk.syncs == 4, "it goes on trying although all is well"

    asyncio.run(run())


def test_failure_retries_once_for_all(disk):
    """With durability disk a sync is asked for every sync_interval in which something has changed."""

    async def run() -> None:
        bench = Bench()
        disk.broken = True
        bench.push()
        for turn in range(1, 6):
            await bench.until(turn)
            bench.ring.push(b"more")
            bench.syncer.want_if_changed()
        await asyncio.sleep(0.05)
        before = disk.syncs
        await asyncio.sleep(0.5)
        assert disk.syncs - before <= 11

    asyncio.run(run())


def test_all_is_written_again_after_failure(disk):
    """The kernel may take pages for clean that it could not write."""

    async def run() -> None:
        bench = Bench()
        bench.syncer.ring = ring = Watched(bench.ring, disk)
        bench.push()
        await bench.until(1)
        assert ring.written_again == []
        disk.broken = True
        bench.push()
        await bench.until(2)
        disk.broken = False
        await bench.until(3)
        assert ring.written_again == [2], "before the third sync, the first after the one that failed"

    asyncio.run(run())


def test_loop_goes_on_while_written_again(disk):
    """However long that takes; what is pushed and done meanwhile is synced with it."""

    async def run() -> None:
        bench = Bench()
        bench.syncer.ring = ring = Slow(bench.ring, disk)
        bench.push()
        await bench.until(1)
        disk.broken = True
        bench.push()
        await bench.until(2)
        disk.broken = False
        await asyncio.to_thread(ring.begun.acquire)
        bench.ring.done(bench.ring.claim())
        end = bench.push()
        bench.syncer.want()
        await asyncio.sleep(0.2)
        assert (len(bench.told), disk.syncs, bench.syncer.failing) == (2, 2, True)
        ring.go.set()
        await bench.until(3)
        assert (bench.told[2], disk.syncs) == (end, 3)
        found = PacketRing(bench.fd, private=True)
        assert (found.undone, found.damage) == (2, [])

    asyncio.run(run())


def test_failed_writing_again_is_retried(disk):
    async def run() -> None:
        bench = Bench()
        bench.syncer.ring = ring = Slow(bench.ring, disk)
        disk.broken = True
        bench.push()
        await bench.until(1)
        disk.broken, ring.error = False, OSError(errno.ENOSPC, "No space left on device")
        ring.go.set()
        await bench.until(2)
        assert (bench.told[1], bench.syncer.error.errno) == (errno.ENOSPC, errno.ENOSPC)
        ring.error = None
        await bench.until(3)
        assert (bench.told[2], bench.syncer.failing) == (bench.ring.tail_position, False)

    asyncio.run(run())


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "Input/output error")])
def test_other_work_is_done_beside_syncs(disk, error):
    async def run() -> None:
        bench = Bench()
        go = threading.Event()

        def work() -> None:
            assert threading.current_thread() is not threading.main_thread()
            assert go.wait(10)
            if error is not None:
                raise error

        bench.syncer.run(work, lambda problem: bench.told.append(("work", problem)))
        end = bench.push()
        await bench.until(1)
        go.set()
        await bench.until(2)
        assert bench.told == [end, ("work", error)]
        assert disk.syncs == 1
        assert not bench.syncer.failing, "that is about the ring"
        bench.syncer.close()
        bench.syncer.run(work, bench.told.append)
        await asyncio.sleep(0.05)
        assert len(bench.told) == 2

    asyncio.run(run())


def test_real_descriptor_that_cannot_sync():
    """A pipe: the kernel itself refuses."""

    async def run() -> None:
        bench = Bench()
        ring, (reading, writing) = os.dup(bench.fd), os.pipe()
        os.dup2(writing, bench.fd)
        end = bench.push()
        await bench.until(1)
        assert bench.told == [errno.EINVAL]
        os.dup2(ring, bench.fd)
        await bench.until(2)
        assert bench.told[1] == end
        for fd in (ring, reading, writing):
            os.close(fd)
        bench.syncer.close()

    asyncio.run(run())


def test_migrated_is_safe_only_once_synced(disk):
    async def run() -> None:
        bench = Bench()
        bench.ring.push(b"x")
        successor = PacketRing(bench.fd, claims_wait_for_sync=True)
        disk.broken = True
        assert make_safe(successor, bench.fd).errno == errno.EIO
        assert successor.synced_position == 0
        disk.broken = False
        assert make_safe(successor, bench.fd) is None
        assert successor.synced_position == successor.tail_position

    asyncio.run(run())


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_open_after_failed_sync_rewrites_all(disk, end):
    """The kernel tells of the failure once: the predecessor has heard of it, and its successor's sync succeeds."""

    async def run() -> None:
        bench = Bench()
        for _ in range(20):
            bench.push(1000)
        await bench.until(1)
        assert pages_written_again(bench.fd) == HEADER_PAGES
        disk.broken = True
        bench.push(1000)
        await bench.until(2)
        if end == "closed":
            bench.syncer.close()
        assert pages_written_again(bench.fd) == HEADER_PAGES + 21 * 1080 // PAGE + 1 + 1, "the marks too"
        disk.broken = False
        assert make_safe(PacketRing(bench.fd), bench.fd) is None
        assert pages_written_again(bench.fd) == HEADER_PAGES

    asyncio.run(run())


@pytest.mark.parametrize("broken", [False, True])
def test_closing_syncs_once_and_never_again(disk, broken):
    async def run() -> None:
        bench = Bench()
        bench.push()
        await bench.until(1)
        end = bench.push()
        disk.broken = broken
        bench.syncer.close()
        assert (bench.ring.synced_position == end) is not broken
        before = disk.syncs
        bench.syncer.want()
        await asyncio.sleep(0.1)
        assert disk.syncs == before

    asyncio.run(run())


def test_sync_without_name_does_not_count(disk, tmp_path):
    """What waits for it is to be taken back; nothing is wrong with the disk, so nothing is tried again."""

    async def run() -> None:
        path = tmp_path / "ring"
        bench = Bench(path, lambda error: bench.told.append((error.errno, bench.ring.withdraw_unsynced()[0])))
        stays = bench.push()
        await bench.until(1)
        path.rename(tmp_path / "elsewhere")
        bench.push()
        await bench.until(2)
        (tmp_path / "elsewhere").rename(path)
        counts = bench.push()
        await bench.until(3)
        path.unlink()
        goes = bench.push()
        await bench.until(4)
        assert bench.told == [stays, (errno.ENOENT, 1), counts, (errno.ENOENT, 1)]
        assert (bench.syncer.failing, bench.ring.synced_position) == (False, goes)
        assert bench.ring.undone == 2
        assert disk.syncs == 4

    asyncio.run(run())


def test_closing_waits_for_a_running_sync(disk):
    async def run() -> None:
        bench = Bench()
        disk.held = True
        bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        end = bench.push()
        threading.Timer(0.1, disk.let_go).start()
        bench.syncer.close()
        assert bench.ring.synced_position == end
        await bench.until(1)

    asyncio.run(run())


def test_closing_in_a_failed_sync_rewrites(disk):
    """The kernel has told of the failure: the last sync would succeed without what was not written."""

    async def run() -> None:
        bench = Bench()
        bench.syncer.ring = ring = Watched(bench.ring, disk)
        disk.held = disk.broken = True
        bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        end = bench.push()

        def heal() -> None:
            disk.let_one_end()
            disk.begun.acquire(timeout=10)  # by the last sync
            disk.broken = False
            disk.let_go()

        healing = threading.Thread(target=heal)
        healing.start()
        bench.syncer.close()
        healing.join()
        assert (bench.told, ring.written_again) == ([errno.EIO], [1])
        assert bench.ring.synced_position == end

    asyncio.run(run())
