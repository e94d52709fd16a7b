"""Reconciling: what a killed predecessor had changed in its rings without counting it is counted."""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest import mock

import pytest

from fastdist._core import HEADER_SIZE, PacketRing, file_size
from fastdist.shm.block import SharedBlock
from fastdist.storage.directory import OldRing
from fastdist.worker import migrate
from fastdist.worker.migrate import Migration
from fastdist.worker.reconcile import reconcile

CAPACITY = 65536


def killed_before_counting():
    return mock.patch.object(migrate, "end_migrating")


class Site:
    """A worker's ring and counters, with an old ring of some packets that it migrates; ``start`` is a fresh process."""

    def __init__(self, old_packets=0):
        block = SharedBlock.create(1, 4)
        os.close(block.fd)
        self.counters = block.rows[0]
        self.fd, self.old_fd = (os.memfd_create(name) for name in ("own", "old"))
        for fd in (self.fd, self.old_fd):
            os.ftruncate(fd, file_size(CAPACITY))
            made = PacketRing(fd, CAPACITY)
        for number in range(old_packets):
            assert made.push(b"old", f"o{number}", messages=5)
        self.start()

    def start(self):
        self.ring = PacketRing(self.fd)
        self.migration = Migration(OldRing(self.old_fd, "old"))
        reconcile(self.ring, [self.migration], self.counters)

    def accept(self, *, counted=True):
        assert self.ring.push(b"{}", messages=2)
        if counted:
            self.counters.add("accepted")
            self.counters.add("messages_accepted", 2)
            self.counters.add("bytes_accepted", 2)

    def copy(self, limit, *, counted=True):
        with nullcontext() if counted else killed_before_counting():
            moved, oversized = self.migration.step(self.ring, self.counters, limit)
        assert not oversized
        return moved

    def figures(self):
        names = ("accepted", "messages_accepted", "bytes_accepted", "migrated", "recovered")
        return {name: self.counters.get(name) for name in names}

    def assert_accounts(self):
        gone = sum(self.counters.get_of(slot, "delivered") for slot in range(self.counters.slots))
        undone = self.ring.undone + self.migration.undone
        gone += self.counters.get("lost")
        assert self.counters.get("accepted") + self.counters.get("recovered") == undone + gone


@pytest.fixture
def site():
    made = Site(old_packets=10)
    yield made
    os.close(made.fd)
    os.close(made.old_fd)


def test_pushed_uncounted_packet_is_counted(site):
    site.accept()
    site.accept(counted=False)
    site.start()
    assert site.figures() == {
        "accepted": 2,
        "messages_accepted": 4,
        "bytes_accepted": 4,
        "migrated": 0,
        "recovered": 10,
    }
    site.assert_accounts()


@pytest.mark.parametrize("counted", [True, False])
def test_old_ring_copies_are_never_accepted(site, counted):
    """The death may come between the copies and their being counted. They are copied once more, and delivered twice."""
    site.accept()
    assert site.copy(4, counted=counted) == 4
    site.start()
    figures = site.figures()
    assert (figures["accepted"], figures["messages_accepted"], figures["bytes_accepted"]) == (1, 2, 2)
    assert (figures["migrated"], figures["recovered"]) == (4, 14)
    site.assert_accounts()


@pytest.mark.parametrize("counted", [True, False])
def test_unsynced_packets_are_no_copies(site, counted):
    """With fsync packets are counted when they are synced; copies come before them, among them and after them."""
    site.copy(2)
    site.accept(counted=False)
    site.ring.mark_synced(site.ring.tail_position)
    site.copy(3)
    site.accept(counted=False)
    site.ring.mark_synced(site.ring.tail_position)
    site.copy(1, counted=counted)
    site.start()
    figures = site.figures()
    assert (figures["accepted"], figures["messages_accepted"], figures["bytes_accepted"]) == (2, 4, 4)
    assert (figures["migrated"], figures["recovered"]) == (6, 11)
    site.assert_accounts()


@pytest.mark.parametrize("ring", ["own", "old"])
def test_damaged_meanwhile_is_lost(site, ring):
    for _ in range(3):
        site.accept()
    fd = site.fd if ring == "own" else site.old_fd
    os.pwrite(fd, b"?", HEADER_SIZE + 128 + 80)  # the second record's body
    site.start()
    assert [site.counters.get(name) for name in ("lost", "corrupt", "accepted", "recovered")] == [1, 1, 3, 10]
    site.assert_accounts()
    site.start()
    assert [site.counters.get(name) for name in ("lost", "corrupt")] == [1, 1]
    site.assert_accounts()


def test_damage_found_at_start_is_not_lost(site):
    for _ in range(2):
        site.accept()
    os.pwrite(site.fd, b"?", HEADER_SIZE + 80)
    site.counters = SharedBlock.create(1, 4).rows[0]
    site.start()
    assert [site.counters.get(name) for name in ("lost", "corrupt", "recovered")] == [0, 1, 11]
    site.assert_accounts()


def test_death_during_copy_changes_nothing(site):
    site.accept()
    copied = iter([True, True, False])

    class Killed(BaseException):
        pass

    class Dying:
        """The worker's ring until the process is killed."""

        def __getattr__(self, name):
            return getattr(site.ring, name)

        def push_copy(self, other, handle):
            if not next(copied):
                raise Killed
            return site.ring.push_copy(other, handle)

    with pytest.raises(Killed), killed_before_counting():
        site.migration.step(Dying(), site.counters, 5)
    site.start()
    figures = site.figures()
    assert (figures["accepted"], figures["migrated"], figures["recovered"]) == (1, 2, 12)
    site.assert_accounts()
