"""The dead-letter writer: when packets leave their ring, how much is written at once, what a failing disk does."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from fastdist._core import PacketRing, file_size
from fastdist.shm.block import SharedBlock
from fastdist.storage import dead_letter_writer
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import FOLDER
from fastdist.storage.dead_letter_writer import MANY, DeadLetterWriter, PendingDeadLetter, what_is_left

EIO = OSError(errno.EIO, "Input/output error")
SECOND = 10**9


class Site:
    """A writer with a ring; with ``syncs`` the test says when a sync ends, and how."""

    def __init__(self, folder, *, syncs, delay=0.0):
        self.folder = folder
        fd = os.memfd_create("ring")
        os.ftruncate(fd, file_size(1 << 20))
        self.ring = PacketRing(fd, 1 << 20, volatile=True)
        block = SharedBlock.create(1, 4)
        os.close(block.fd)
        self.counters = block.rows[0]
        self.files = DeadLetterFiles(folder, "w0")
        self.gone = []
        self.writer = DeadLetterWriter(
            self.files,
            self.counters,
            lambda _ring, sequence: self.gone.append(sequence),
            self._run if syncs else None,
            delay,
        )
        self.syncs = []
        self.pushed = 0

    def _run(self, work, done):
        assert not self.syncs, "one at a time"
        self.syncs.append((work, done))

    def end_sync(self, error=None):
        work, done = self.syncs.pop()
        if error is None:
            work()
        done(error)

    def dead_letter(self, size=10):
        self.pushed += 1
        assert self.ring.push(bytes(size), f"p{self.pushed}")
        return PendingDeadLetter(self.ring, self.ring.claim(), "refused", "A1", 400, "HTTP 400")

    def add(self, count=1, size=10):
        for _ in range(count):
            self.writer.add(self.dead_letter(size))

    def later(self):
        self.writer.tick(1 << 62)

    def written(self):
        return [
            json.loads(line)["id"]
            for path in sorted((self.folder / FOLDER).glob("*.ndjson"))
            for line in path.read_bytes().splitlines()
        ]

    def remove(self, how="delete"):
        """Do to the files what a person may do."""
        for path in (self.folder / FOLDER).glob("*.ndjson"):
            if how == "delete":
                path.unlink()
            elif how == "rename":
                path.rename(path.with_suffix(".1"))
            elif how == "cut short":
                os.truncate(path, 0)
        if how == "exchange the folder":
            (self.folder / FOLDER).rename(self.folder / "kept")
            (self.folder / FOLDER).mkdir()

    def check(self):
        assert self.ring.undone == self.ring.claimed == self.pushed - len(self.gone)
        assert self.counters.get("refused") == len(self.gone)


@pytest.fixture(autouse=True)
def parts_without_end(monkeypatch):
    """However slow the machine: what is written in one part is not what is tested here."""
    monkeypatch.setattr(dead_letter_writer, "PART_NS", 3600 * 10**9)


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, syncs=True)
    yield made
    made.check()
    made.files.close()


def names(first, last):
    return [f"p{number}" for number in range(first, last + 1)]


def test_without_syncs_written_is_enough(tmp_path):
    site = Site(tmp_path, syncs=False)
    site.add(3)
    assert site.gone == [1, 2, 3]
    assert site.written() == names(1, 3)
    site.check()


# ---- syncs


def test_with_syncs_ring_keeps_until_synced(site):
    site.add()
    assert site.written() == ["p1"]
    assert site.gone == []
    site.check()
    site.end_sync()
    assert site.gone == [1]


def test_a_sync_covers_all_that_gathered(site):
    site.add(100)
    assert site.written() == ["p1"]
    site.end_sync()
    assert site.gone == [1]
    assert len(site.written()) == 100
    site.end_sync()
    assert site.gone == list(range(1, 101))
    assert site.syncs == []


def test_with_delay_dead_letters_stay_queued(tmp_path):
    site = Site(tmp_path, syncs=True, delay=0.5)
    site.add(10)
    site.writer.tick(0)
    assert site.written() == names(1, 10)
    assert site.syncs == []
    site.check()
    site.later()
    assert site.gone == []
    site.end_sync()
    assert site.gone == list(range(1, 11))
    site.check()


@pytest.mark.parametrize(("count", "size"), [(MANY, 10), (1, 200_000)])
def test_much_ring_space_triggers_a_sync(tmp_path, count, size):
    site = Site(tmp_path, syncs=True, delay=3600.0)
    site.add(count, size)
    assert len(site.syncs) == 1


def test_part_failing_its_sync_is_rewritten(site):
    site.add()
    site.end_sync()
    site.add(5)
    site.end_sync(EIO)
    assert site.writer.failed
    assert site.gone == [1]
    assert site.written() == ["p1"]
    assert site.syncs == [], "not tried again at once"
    site.writer.tick(0)
    assert site.syncs == []
    site.later()
    assert site.writer.failed, "until it is known to be well"
    site.end_sync()
    assert not site.writer.failed
    assert site.gone == [1, 2, 3, 4, 5, 6]
    assert site.written() == names(1, 6)


def test_syncs_go_on_after_failed_deletion(site):
    site.add()
    site.end_sync(EIO)
    site.remove()
    site.later()
    site.end_sync()
    site.later()
    site.end_sync()
    assert site.gone == [1]
    assert site.written() == ["p1"]
    assert not site.writer.failed


def test_written_before_disk_full_is_synced(site, monkeypatch):
    site.add()
    real = DeadLetterFiles.write

    def write(dead_letters, line):
        if b'"id":"p4"' in line:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(dead_letters, line)

    monkeypatch.setattr(DeadLetterFiles, "write", write)
    site.add(4)
    site.end_sync()
    site.end_sync()
    assert site.writer.failed
    assert site.gone == [1, 2, 3]
    monkeypatch.undo()
    site.later()
    site.end_sync()
    assert site.gone == [1, 2, 3, 4, 5]
    assert not site.writer.failed


def test_shutdown_syncs_pending_dead_letters(tmp_path, monkeypatch):
    site = Site(tmp_path, syncs=True, delay=3600.0)
    site.add(3)
    with monkeypatch.context() as disk:
        disk.setattr("fastdist.storage.dead_letter_files.os.fdatasync", lambda _fd: (_ for _ in ()).throw(EIO))
        site.writer.finish()
    assert site.gone == []
    site.later()
    site.writer.finish()
    assert site.gone == [1, 2, 3]
    assert site.written() == names(1, 3)
    site.check()


@pytest.mark.parametrize("syncs", [True, False])
def test_remaining_in_memory_is_written(tmp_path, monkeypatch, syncs):
    site = Site(tmp_path, syncs=syncs, delay=3600.0)
    site.add(2)
    for number in (3, 4):
        site.ring.push(b"x", f"p{number}")
    monkeypatch.setattr("fastdist.storage.dead_letter_files.os.fdatasync", lambda _fd: (_ for _ in ()).throw(EIO))
    site.writer.write_all(what_is_left(site.ring))
    assert site.gone == [1, 2, 3, 4]
    assert site.written() == names(1, 4)


@pytest.mark.parametrize("syncs", [True, False])
def test_remaining_leaves_ring_when_synced(tmp_path, monkeypatch, syncs):
    """Also where no syncs were set up: it may be the supervisor, and a ring that was deleted from the disk."""
    site = Site(tmp_path, syncs=syncs)
    site.ring.push(b"x", "p1")
    gone_before = []
    monkeypatch.setattr(
        "fastdist.storage.dead_letter_files.os.fdatasync", lambda _fd: gone_before.append(list(site.gone))
    )
    site.writer.write_all(what_is_left(site.ring))
    assert gone_before == [[]]
    assert site.gone == [1]


def test_each_part_of_the_rest_is_told(tmp_path, monkeypatch):
    """So that a worker is not taken for hung, and claims no millions of packets at once."""
    monkeypatch.setattr(dead_letter_writer, "AT_ONCE", 2)
    site, told = Site(tmp_path, syncs=True), []
    assert all(site.ring.push(b"x") for _ in range(5))
    site.writer.write_all(what_is_left(site.ring), lambda: told.append((site.ring.undone, site.ring.claimed)))
    assert told == [(5, 2), (3, 0), (3, 2), (1, 0), (1, 1), (0, 0)]


def test_each_part_of_the_rest_is_small(tmp_path, monkeypatch):
    """So that a sync on a slow disk takes no longer than one that gets on may."""
    monkeypatch.setattr(dead_letter_writer, "LAST_PART_BYTES", 1)
    site, told = Site(tmp_path, syncs=True), []
    assert all(site.ring.push(b"x") for _ in range(3))
    site.writer.write_all(what_is_left(site.ring), lambda: told.append(site.ring.undone))
    assert told == [3, 2, 2, 1, 1, 0]


# ---- files that are taken away


@pytest.mark.parametrize("how", ["delete", "rename", "cut short", "exchange the folder"])
@pytest.mark.parametrize("syncs", [True, False])
def test_removed_file_is_not_written_again(tmp_path, syncs, how):
    """What was written since its packets could leave the ring is in a file of its name when they do."""
    site = Site(tmp_path, syncs=syncs)
    site.add()
    site.end_sync() if syncs else None
    assert site.gone == [1]
    site.remove(how)
    site.add(3)
    while len(site.gone) < 4:
        assert site.gone == [1] or set(names(2, 1 + len(site.gone[1:]))) <= set(site.written())
        site.end_sync() if site.syncs else site.later()
    assert sorted(set(site.written())) == names(2, 4)
    assert not site.writer.failed
    site.check()


def test_file_deleted_in_sync_is_rewritten(site):
    site.add(1)
    site.remove()
    site.end_sync()
    assert site.gone == []
    assert site.written() == ["p1"]
    site.end_sync()
    assert site.gone == [1]


# ---- how much at once


@pytest.mark.parametrize("syncs", [True, False])
def test_no_turn_writes_for_long(tmp_path, monkeypatch, syncs):
    site = Site(tmp_path, syncs=syncs)
    now = [SECOND]

    def monotonic_ns():
        now[0] += 10_000_000  # a dead letter takes 10 ms
        return now[0]

    monkeypatch.setattr(dead_letter_writer, "time", SimpleNamespace(monotonic_ns=monotonic_ns))
    monkeypatch.setattr(dead_letter_writer, "PART_NS", 8_000_000)
    site.writer.add(*[site.dead_letter() for _ in range(33)])
    turns = 1
    while len(site.gone) < 33:
        assert len(site.written()) <= 6 * turns
        site.end_sync() if syncs else site.writer.tick(now[0])
        turns += 1
    assert turns >= 33 // 6
    assert site.written() == names(1, 33)
    site.check()


# ---- bounds of the files


class Limits:
    """Bounds that a test opens and closes."""

    file_size, file_age, gives_way = 1000, float("inf"), False

    def __init__(self):
        self.open = True

    @contextmanager
    def room(self, _size):
        if not (self.open or self.gives_way):
            raise BlockingIOError
        yield


@pytest.fixture
def limits(site):
    site.files.bounds = Limits()
    return site.files.bounds


def test_without_room_it_stays_queued(site, limits):
    """That is no fault: nothing is logged, and packets are accepted."""
    limits.open = False
    with capture_logs() as lines:
        site.add(3)
        site.later()
    assert (site.written(), site.gone, site.writer.failed) == ([], [], 0)
    assert len(site.writer.unwritten) == 3
    assert lines == []
    site.check()
    limits.open = True
    site.later()
    site.end_sync()
    assert site.gone == [1, 2, 3]


def test_it_syncs_before_it_fills_the_bound(tmp_path, monkeypatch):
    """Long before the time for it: what is not synced may not be discarded."""
    monkeypatch.setattr(dead_letter_writer, "MAX_DELAY", 3600.0)
    site = Site(tmp_path, syncs=True, delay=3600.0)
    site.files.bounds = Limits()
    for _ in range(40):
        site.add(size=200)
        assert site.files.unsettled < 3 * Limits.file_size
        if site.syncs:
            site.end_sync()
    assert len(site.gone) >= 35
    site.check()
    site.files.close()


def test_at_the_end_the_bound_gives_way(tmp_path):
    site = Site(tmp_path, syncs=False)
    site.files.bounds = Limits()
    site.files.bounds.open = False
    site.writer.write_all([site.dead_letter() for _ in range(3)])
    assert site.gone == [1, 2, 3]
    assert site.written() == names(1, 3)


def test_it_keeps_the_response(site):
    dead_letter = site.dead_letter()._replace(response=b"it says no")
    site.writer.add(dead_letter)
    (path,) = (site.folder / FOLDER).glob("*.ndjson")
    assert json.loads(path.read_bytes())["response"] == "it says no"
    site.end_sync()
