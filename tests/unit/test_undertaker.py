"""Burying: when packets leave their ring, how much is written at once, and what a disk that fails does to it."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import pytest

from fastdist import undertaker
from fastdist._core.ring import PacketRing, file_size
from fastdist.deadletters import FOLDER, DeadLetters
from fastdist.shared import SharedBlock
from fastdist.undertaker import Letter, Undertaker

EIO = OSError(errno.EIO, "Input/output error")
SECOND = 10**9


class Grave:
    """An undertaker with a ring; with ``syncs`` the test says when a sync ends, and how."""

    def __init__(self, folder, *, syncs):
        self.folder = folder
        fd = os.memfd_create("ring")
        os.ftruncate(fd, file_size(1 << 20))
        self.ring = PacketRing(fd, 1 << 20, volatile=True)
        os.close(fd)
        block = SharedBlock.create(1, 4)
        os.close(block.fd)
        self.counters = block.rows[0]
        self.letters = DeadLetters(folder, "w0", sync=syncs)
        self.buried = []
        self.undertaker = Undertaker(self.letters, self.counters, lambda _ring, sequence: self.buried.append(sequence))
        self.syncs = []
        if syncs:
            self.undertaker.sync = self._sync
        self.pushed = 0

    def _sync(self, done):
        assert not self.syncs, "one at a time"
        self.syncs.append((self.letters.begin_sync(), done))

    def end_sync(self, error=None):
        work, done = self.syncs.pop()
        if error is None:
            work()
        self.letters.end_sync(error)
        done(error)

    def letter(self, size=10):
        self.pushed += 1
        assert self.ring.push(bytes(size), f"p{self.pushed}")
        return Letter(self.ring, self.ring.claim(), "refused", "A1", 400, "HTTP 400")

    def bury(self, count=1):
        for _ in range(count):
            self.undertaker.bury(self.letter())

    def written(self):
        return [
            json.loads(line)["id"]
            for path in sorted((self.folder / FOLDER).glob("*.ndjson"))
            for line in path.read_bytes().splitlines()
        ]

    def check(self):
        assert self.ring.undone == self.ring.claimed == self.pushed - len(self.buried)
        assert self.counters.get("refused") == len(self.buried)


@pytest.fixture
def grave(tmp_path):
    made = Grave(tmp_path, syncs=True)
    yield made
    made.check()
    made.letters.close()


def test_without_syncs_a_packet_leaves_the_ring_when_its_letter_is_written(tmp_path):
    grave = Grave(tmp_path, syncs=False)
    grave.bury(3)
    assert grave.buried == [1, 2, 3]
    assert grave.written() == ["p1", "p2", "p3"]
    grave.check()


def test_with_syncs_a_packet_stays_in_the_ring_until_its_letter_is_synced(grave):
    grave.bury()
    assert grave.written() == ["p1"]
    assert grave.buried == []
    grave.check()
    grave.end_sync()
    assert grave.buried == [1]


def test_letters_gather_while_a_sync_runs_and_the_next_covers_them_all(grave):
    grave.bury(100)
    assert grave.written() == ["p1"]
    grave.end_sync()
    assert grave.buried == [1]
    assert len(grave.written()) == 100
    grave.end_sync()
    assert grave.buried == list(range(1, 101))
    assert grave.syncs == []


def test_a_part_whose_sync_fails_is_taken_back_and_written_later(grave):
    grave.bury()
    grave.end_sync()
    grave.bury(5)
    grave.end_sync(EIO)
    assert grave.undertaker.failed
    assert grave.buried == [1]
    assert grave.written() == ["p1"]
    assert grave.syncs == [], "not tried again at once"
    grave.undertaker.tick(0)
    assert grave.syncs == []
    grave.undertaker.tick(1 << 62)
    assert grave.undertaker.failed, "until it is known to be well"
    grave.end_sync()
    assert not grave.undertaker.failed
    assert grave.buried == [1, 2, 3, 4, 5, 6]
    assert grave.written() == [f"p{number}" for number in range(1, 7)]


def test_what_was_written_before_the_disk_was_full_is_synced_and_buried(grave, monkeypatch):
    grave.bury()
    real = DeadLetters.write

    def write(letters, packet, *why):
        if packet.id == "p4":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(letters, packet, *why)

    monkeypatch.setattr(DeadLetters, "write", write)
    grave.bury(4)
    grave.end_sync()
    grave.end_sync()
    assert grave.undertaker.failed
    assert grave.buried == [1, 2, 3]
    monkeypatch.undo()
    grave.undertaker.tick(1 << 62)
    grave.end_sync()
    assert grave.buried == [1, 2, 3, 4, 5]
    assert not grave.undertaker.failed


@pytest.mark.parametrize("syncs", [True, False])
def test_no_turn_writes_for_long(tmp_path, monkeypatch, syncs):
    grave = Grave(tmp_path, syncs=syncs)
    now = [SECOND]

    def monotonic_ns():
        now[0] += 10_000_000  # a letter takes 10 ms
        return now[0]

    monkeypatch.setattr(undertaker, "time", SimpleNamespace(monotonic_ns=monotonic_ns))
    grave.undertaker.bury(*[grave.letter() for _ in range(33)])
    turns = 1
    while len(grave.buried) < 33:
        assert len(grave.written()) <= 6 * turns
        grave.end_sync() if syncs else grave.undertaker.tick(now[0])
        turns += 1
    assert turns >= 33 // 6
    assert grave.written() == [f"p{number}" for number in range(1, 34)]
    grave.check()
