"""Old rings: what a change of capacity or workers makes of the rings that are there, and how their packets move on."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fastdist._core import HEADER_SIZE, PacketRing, file_size
from fastdist.errors import StartError
from fastdist.shm.block import SharedBlock
from fastdist.storage import directory, files
from fastdist.storage.directory import OldRing, QueueFolder, ring_path
from fastdist.supervisor.processes import WorkerSlot
from fastdist.worker.migrate import Migration
from fastdist.worker.queue import share_of_old

MIB = 1 << 20


class Start:
    """A start with some workers and a capacity of the whole, as far as the queue's files are concerned."""

    def __init__(self, path, workers, capacity):
        self.folder = QueueFolder(path)
        self.folder.lock()
        try:
            self.fds = self.folder.rings(workers, capacity // workers)
        except StartError:
            self.end()
            raise
        self.old = self.folder.old_rings()

    def end(self):
        """End all processes."""
        for fd in (*self.folder.held, *self.folder._rings.values()):
            os.close(fd)


def names(path):
    return sorted(file.name.partition("-")[0] for file in path.glob("*.*"))


def ids(fds):
    return sorted(packet.id for fd in fds for packet in PacketRing(fd, private=True).waiting())


def allocated(path):
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """Have room for 12 MiB in all."""
    real = os.posix_fallocate

    def fallocate(fd, begin, size):
        others = sum(
            file.stat().st_size for file in tmp_path.iterdir() if not os.path.samestat(file.stat(), os.fstat(fd))
        )
        if others + begin + size > 12 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, begin, size)

    monkeypatch.setattr(directory.os, "posix_fallocate", fallocate)


@pytest.mark.usefixtures("small_disk")
def test_refused_change_can_be_undone(tmp_path):
    start = Start(tmp_path, 1, 8 * MIB)
    assert PacketRing(start.fds[0]).push(b"x", "kept")
    start.end()
    for workers, capacity in ((1, 9 * MIB), (2, 8 * MIB)):
        with pytest.raises(StartError, match="No space left on device"):
            Start(tmp_path, workers, capacity)
        assert names(tmp_path) == ["ring"]
    start = Start(tmp_path, 1, 8 * MIB)
    assert (ids(start.fds), start.old) == (["kept"], [])


@pytest.mark.usefixtures("small_disk")
def test_empty_rings_are_in_no_ones_way(tmp_path):
    Start(tmp_path, 1, 8 * MIB).end()
    assert Start(tmp_path, 2, 9 * MIB).old == []
    assert names(tmp_path) == ["ring", "ring"]


def test_fitting_old_ring_is_a_ring_again(tmp_path):
    """As after a change and back, or a start that was killed between renaming the old rings and the new ones."""
    start = Start(tmp_path, 2, 2 * MIB)
    for key, fd in zip("ab", start.fds, strict=True):
        assert PacketRing(fd).push(b"x", key)
    start.end()
    start = Start(tmp_path, 1, 2 * MIB)
    assert len(start.old) == 2
    assert PacketRing(start.fds[0]).push(b"x", "c")
    start.end()
    start = Start(tmp_path, 2, 2 * MIB)
    assert (ids(start.fds), ids(old.fd for old in start.old)) == (["a", "b"], ["c"])
    start.end()
    for path in tmp_path.glob("ring-*"):
        path.rename(tmp_path / f"adopt-{path.name}")
    start = Start(tmp_path, 2, 2 * MIB)
    assert (ids(start.fds), ids(old.fd for old in start.old)) == (["a", "b"], ["c"])


def test_half_made_rings_are_deleted(tmp_path):
    for name in ("ring-0.new", "ring-7.new", "adopt-0123.new", "mine.new"):
        (tmp_path / name).write_bytes(bytes(MIB))
    Start(tmp_path, 1, MIB)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock", "mine.new", "ring-0.fdq"]


def test_old_rings_do_not_pile_up(tmp_path):
    """Starts with other numbers of workers, and no analyzer takes anything: no more is accepted than the capacity."""
    capacity, sent = MIB, 0
    for workers in (1, 2, 3, 1, 4, 2):
        start = Start(tmp_path, workers, capacity)
        block = SharedBlock.create(workers, 4)
        rings = [PacketRing(fd) for fd in start.fds]
        moves = [[Migration(old) for old in start.old[index::workers]] for index in range(workers)]
        for move in itertools.chain(*moves):
            move.ring.free_unused()
        for _ in range(200):
            for index, ring in enumerate(rings):
                for move in moves[index]:
                    move.step(ring, block.rows[index], 64)
                    ring.mark_synced(ring.tail_position)
                old = sum(move.undone_bytes for move in moves[index])
                block.rows[index].set("old_bytes", old)
                block.rows[index].set("queue_bytes", ring.used + old)
                block.rows[index].set("queue_capacity", ring.capacity)
                ring.reserve(
                    share_of_old(block.rows, index), max((each.ring.largest_record for each in moves[index]), default=0)
                )
                sent += bool(ring.push(bytes(1000), f"p{sent}"))
                ring.mark_synced(ring.tail_position)
        for ring, theirs in zip(rings, moves, strict=True):
            for move in theirs:
                if move.settle(ring) and move.finished:
                    move.delete()
        waiting = sum(ring.undone for ring in rings) + sum(move.undone for move in itertools.chain(*moves))
        assert waiting == sent
        assert sum(ring.used for ring in rings) + sum(m.undone_bytes for m in itertools.chain(*moves)) <= capacity
        headers = HEADER_SIZE * len(list(tmp_path.glob("*.fdq")))
        assert allocated(tmp_path) <= 2 * capacity * 17 / 16 + headers + MIB / 4
        move = ring = rings = moves = None  # they have the files open
        start.end()
    assert sent > 700


def test_room_of_old_rings_is_shared_out():
    block = SharedBlock.create(3, 4)
    for row, (capacity, used, old) in zip(block.rows, ((100, 40, 90), (100, 20, 0), (100, 60, 0)), strict=True):
        row.set("queue_capacity", capacity)
        row.set("queue_bytes", used + old)
        row.set("old_bytes", old)
    # The first has room for 60 of its 90 bytes: 30 have to find room with the others, as they have it.
    assert [share_of_old(block.rows, index) for index in range(3)] == [90, 20, 10]
    block.rows[0].set("queue_bytes", 1000)
    assert share_of_old(block.rows, 1) >= 80, "all that is free"
    block.rows[0].set("old_bytes", 0)
    assert [share_of_old(block.rows, index) for index in range(3)] == [0, 0, 0]


def test_deleted_ring_gives_its_space_back(tmp_path):
    """Though a process has it open; one that another name leads to stays whole."""
    for linked in (False, True):
        fd = Start(tmp_path / str(linked), 1, MIB).fds[0]
        path = ring_path(tmp_path / str(linked), 0)
        if linked:
            path.with_name("backup").hardlink_to(path)
        move = Migration(OldRing(os.dup(fd), str(path)))
        move.delete()
        assert not path.exists()
        assert (os.fstat(fd).st_blocks == 0) is not linked


def test_successor_gets_no_deleted_ring(tmp_path):
    """Its predecessor was killed before it could tell."""
    fds = [Start(tmp_path / name, 1, MIB).fds[0] for name in ("kept", "deleted")]
    paths = [str(ring_path(tmp_path / name, 0)) for name in ("kept", "deleted")]
    olds = [OldRing(fd, path) for fd, path in zip(fds, paths, strict=True)]
    slot = WorkerSlot(SharedBlock.create(1, 4), 0, None, fds[0], olds)
    Migration(OldRing(os.dup(fds[1]), paths[1])).delete()
    slot.drop_deleted()
    assert [old.path for old in slot.old_rings] == paths[:1]


def test_emptied_ring_counts_as_damaged(tmp_path):
    """One that has its name, but nothing in it, was not deleted by us: the worker that gets it tells what is lost."""
    fd = Start(tmp_path, 1, MIB).fds[0]
    slot = WorkerSlot(SharedBlock.create(1, 4), 0, None, fd, [OldRing(fd, str(ring_path(tmp_path, 0)))])
    os.truncate(fd, 0)
    slot.drop_deleted()
    assert [old.fd for old in slot.old_rings] == [fd]


def test_old_ring_gives_unused_space_back(tmp_path):
    start = Start(tmp_path, 1, MIB)
    ring = PacketRing(start.fds[0])
    for key in ("a", "b"):
        assert ring.push(bytes(200_000), key)
    ring.done(ring.claim())
    ring.mark_synced(ring.tail_position)
    before = allocated(tmp_path)
    ring.free_unused()
    assert before - allocated(tmp_path) > MIB - 220_000
    assert ids(start.fds) == ["b"]
    del ring  # it has the file open
    start.end()
    start = Start(tmp_path, 1, MIB)
    assert allocated(tmp_path) >= before, "a ring in use has all its space"
    assert ids(start.fds) == ["b"]
    while PacketRing(start.fds[0]).push(bytes(100_000)):
        pass


# ---- the folder


def test_new_folders_are_ours_and_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", lambda path: synced.append(path.relative_to(tmp_path)))
    before = os.umask(0)
    try:
        QueueFolder(tmp_path / "a" / "b" / "c").lock()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a", *(tmp_path / "a").rglob("[bc]"))] == [0o700] * 3
    assert synced[:3] == [Path(), Path("a"), Path("a/b")]
    synced.clear()
    QueueFolder(tmp_path / "a" / "b" / "d").lock()
    assert set(synced) == {Path("a/b")}


def test_folder_of_others_is_synced_too(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "no", str(path))

    called = []
    monkeypatch.setattr(files, "sync_folder", refuse)
    monkeypatch.setattr(files.os, "sync", lambda: called.append(True))
    files.make_folder(tmp_path / "new")
    assert called == [True]


def test_unreadable_ring_is_set_aside_first(tmp_path):
    """A file that cannot be read is set aside; what is empty is deleted only when that is known of all."""
    Start(tmp_path, 2, 2 * MIB).end()
    ring_path(tmp_path, 1).write_bytes(b"x" * MIB)
    with capture_logs() as logs:
        start = Start(tmp_path, 1, 2 * MIB)
    assert [line["event"] for line in logs] == ["a queue file cannot be read and is set aside"]
    assert start.old == []
    assert PacketRing(start.fds[0]).capacity == 2 * MIB
    assert file_size(2 * MIB) == os.fstat(start.fds[0]).st_size
