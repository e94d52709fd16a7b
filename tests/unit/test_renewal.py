"""Rings with which no worker can start: what is done about them while the service runs."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace

import pytest

from fastdist._core import Counters, PacketRing, file_size, row_words
from fastdist.errors import StartError
from fastdist.storage import ring_files
from fastdist.storage.directory import QueueFolder
from fastdist.supervisor.renewal import renew

CAPACITY = 1 << 17


class Site:
    """A queue's folder with one worker's ring, and an old one; packets are in both."""

    def __init__(self, path):
        self.path = path
        made = QueueFolder(path)
        made.lock()
        (fd,) = made.rings(1, 1 << 16)
        PacketRing(fd).push(b"old")
        os.close(made.held[0])
        os.close(fd)
        self.folder = QueueFolder(path)
        self.folder.lock()
        (self.fd,) = self.folder.rings(1, CAPACITY)
        PacketRing(self.fd).push(b"own")
        old_rings = self.folder.old_rings()
        self.slot = SimpleNamespace(
            index=0, name="w0", ring=self.fd, old_rings=old_rings, renewed=False, irreplaceable=False
        )
        self.row = Counters(bytearray(8 * row_words(1)), 1)
        for name, value in {"sequence_base": 1, "accepted": 5, "withdrawn": 2, "migrated": 3}.items():
            self.row.set(name, value)

    def renew(self):
        asyncio.run(renew(self.slot, self.folder, self.row))
        return self.slot.renewed, self.slot.irreplaceable

    def names(self):
        return sorted(path.name.split(".damaged")[0] for path in self.path.iterdir() if path.name != "lock")


def lose_headers(fd):
    for copy in (0, 32768):
        os.pwrite(fd, bytes(128), copy)


def bodies(fd):
    ring = PacketRing(fd, private=True)
    return [packet.body for packet in ring.waiting()]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_sound_rings_stay(site):
    before = site.names()
    assert site.renew() == (False, False)
    assert (site.slot.ring, site.names()) == (site.fd, before)
    assert bodies(site.fd) == [b"own"]
    assert bodies(site.slot.old_rings[0].fd) == [b"old"]


def test_ring_cut_short_gets_its_length(site):
    os.truncate(site.fd, file_size(CAPACITY) // 2)
    assert site.renew() == (False, False)
    assert os.fstat(site.fd).st_size == file_size(CAPACITY)
    assert bodies(site.slot.ring) == [b"own"]


def test_ring_without_header_is_replaced(site):
    """Sequences go on, so that what the worker had counted stays right."""
    lose_headers(site.fd)
    assert site.renew() == (True, False)
    ring = PacketRing(site.slot.ring)
    assert (ring.undone, ring.capacity, ring.next_sequence_number) == (0, CAPACITY, 1 + 5 + 2 + 3)
    assert os.path.samestat(os.fstat(site.slot.ring), (site.path / "ring-0.fdq").stat())
    assert len(site.slot.old_rings) == 1
    (aside,) = site.path.glob("*.damaged-*")
    assert b"own" in aside.read_bytes()
    assert site.slot.ring != site.fd


def test_old_ring_without_header_goes(site):
    (old,) = site.slot.old_rings
    lose_headers(old.fd)
    assert site.renew() == (True, False)
    assert (site.slot.old_rings, site.slot.ring) == ([], site.fd)
    (aside,) = site.path.glob("adopt-*.damaged-*")
    assert b"old" in aside.read_bytes()


def test_irreplaceable_ring_stays(site, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lose_headers(site.fd)
    before = site.names()
    monkeypatch.setattr(os, "posix_fallocate", full)
    for _ in range(2):
        assert site.renew() == (False, True)
        assert (site.slot.ring, site.names()) == (site.fd, before)
    monkeypatch.undo()
    assert site.renew() == (True, True)
    assert PacketRing(site.slot.ring).undone == 0


def test_renamed_ring_is_left_alone(site):
    lose_headers(site.fd)
    (site.path / "ring-0.fdq").rename(site.path / "elsewhere")
    assert site.renew() == (False, False)
    assert site.slot.ring == site.fd


def test_conversion_drops_no_packet(site, monkeypatch):
    """What does not fit into the new ring, against all expectation, ends the conversion."""

    class Broken:
        damage = ()

        def __init__(self):
            self.left = [1, 2]

        def waiting(self):
            return [SimpleNamespace(body=b"x" * 1000)] * 2

        def claim(self):
            return self.left.pop() if self.left else 0

    class Full:
        def __init__(self, *_):
            pass

        def push_copy(self, *_):
            return 0

    path = site.path / "ring-0.fdq"
    monkeypatch.setattr(ring_files, "PacketRing", Full)
    with pytest.raises((OSError, StartError), match="do not fit"):
        ring_files._keep_readable(path, Broken(), {path: site.fd})
    assert os.path.samestat(os.fstat(site.fd), path.stat())
    assert not list(site.path.glob("*.damaged-*"))
