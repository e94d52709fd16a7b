"""Group commit with a disk that fails: what is told to whom, and when it is tried again."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest
from support import copied_pages

from fastdist._core import PacketRing, file_size
from fastdist.storage import group_commit
from fastdist.storage.group_commit import Syncer, make_safe

CAPACITY = 65536
PAGE = 4096
HEADER_PAGES = 16


def pages_written_again(fd: int) -> int:
    """Return how many pages are written again when the ring is opened: those of a private view get copied."""
    ring = PacketRing(fd, private=True)
    ring.write_again()
    return copied_pages("memfd:ring")


class Disk:
    """``os.fdatasync`` for the syncer: fails while ``broken``, takes until ``go`` is set, counts."""

    def __init__(self, monkeypatch) -> None:
        self.broken = False
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)
        self.syncs = 0
        monkeypatch.setattr(group_commit.os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        assert fd > 2
        self.syncs += 1
        self.begun.release()
        assert self.go.wait(10)
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")


class Bench:
    """A syncer on a ring in memory, and what it tells."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, file_size(CAPACITY))
        PacketRing(self.fd, CAPACITY)
        self.ring = PacketRing(self.fd, claims_wait_for_sync=True)
        self.told: list[object] = []
        self.syncer = Syncer(self.ring, self.fd, self.told.append, lambda error: self.told.append(error.errno))

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
    return Disk(monkeypatch)


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


def test_arrivals_during_sync_wait_for_next(disk):
    async def run() -> None:
        bench = Bench()
        disk.go.clear()
        first = bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        second = [bench.push() for _ in range(5)][-1]
        assert bench.ring.synced_position < first
        disk.go.set()
        await bench.until(2)
        assert bench.told == [first, second]
        assert disk.syncs == 2

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
        written = []
        original = PacketRing.write_again

        class Watched:
            """The ring, watched."""

            def __getattr__(self, name):
                if name == "write_again":
                    return lambda: (written.append(disk.syncs), original(bench.ring))
                return getattr(bench.ring, name)

        bench.syncer.ring = Watched()
        bench.push()
        await bench.until(1)
        assert written == []
        disk.broken = True
        bench.push()
        await bench.until(2)
        disk.broken = False
        await bench.until(3)
        assert written == [2], "before the third sync, the first after the one that failed"

    asyncio.run(run())


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "Input/output error")])
def test_other_work_precedes_the_next_sync(error):
    async def run() -> None:
        bench = Bench()

        def work() -> None:
            assert threading.current_thread() is not threading.main_thread()
            if error is not None:
                raise error

        bench.syncer.run(work, lambda problem: bench.told.append(("work", problem)))
        end = bench.push()
        await bench.until(2)
        assert bench.told == [("work", error), end]
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
        reading, writing = os.pipe()
        bench.syncer.fd = writing
        end = bench.push()
        await bench.until(1)
        assert bench.told == [errno.EINVAL]
        bench.syncer.fd = bench.fd
        await bench.until(2)
        assert bench.told[1] == end
        os.close(reading)
        os.close(writing)

    asyncio.run(run())


def test_migrated_is_safe_only_once_synced(disk):
    bench = Bench()
    bench.ring.push(b"x")
    successor = PacketRing(bench.fd, claims_wait_for_sync=True)
    disk.broken = True
    assert not make_safe(successor, bench.fd)
    assert successor.synced_position == 0
    disk.broken = False
    assert make_safe(successor, bench.fd)
    assert successor.synced_position == successor.tail_position


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
        assert pages_written_again(bench.fd) == HEADER_PAGES + 21 * 1088 // PAGE + 1
        disk.broken = False
        assert make_safe(PacketRing(bench.fd), bench.fd)
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
        bench = Bench()
        path = tmp_path / "ring"
        bench.syncer.fd, bench.syncer.path = os.open(path, os.O_RDWR | os.O_CREAT), path
        bench.syncer._on_failed = lambda error: bench.told.append((error.errno, bench.ring.withdraw_unsynced()[0]))
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
        disk.go.clear()
        bench.push()
        await asyncio.to_thread(disk.begun.acquire)
        end = bench.push()
        threading.Timer(0.1, disk.go.set).start()
        bench.syncer.close()
        assert bench.ring.synced_position == end
        await bench.until(1)

    asyncio.run(run())
