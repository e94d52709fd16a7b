"""Opening a ring: what is written by that, and what is taken for safe."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from ring_disk import is_marked, pages_written_again
from support import copied_pages

from fastdist._core import PacketRing, file_size

CAPACITY = 1 << 20
HEADER_PAGES = 2
MARKS_PAGES = 4  # of a full ring, at most one more


@contextmanager
def full_ring(kind="new"):
    """Yield the file of a ring that is full, each of its pages in use."""
    fd = os.memfd_create("full-ring")
    os.ftruncate(fd, file_size(CAPACITY))
    ring = PacketRing(fd, CAPACITY)
    if kind == "moved":
        for _ in range(500):
            ring.push(bytes(450))
            ring.claim()
        while ring.tail_position < CAPACITY:
            ring.push(bytes(450))
            ring.done(ring.claim())
            ring.mark_synced(ring.tail_position)
    while ring.push(bytes(450), messages=2):
        if kind != "new":
            ring.claim()
    assert kind != "moved" or is_marked(fd, "moved")
    yield fd
    os.close(fd)


def pages_of(fd, act):
    """Return how many pages ``act`` writes to that opening the ring does not."""
    view = PacketRing(fd, private=True)
    before = copied_pages("full-ring")
    act(view)
    return copied_pages("full-ring") - before


@pytest.mark.parametrize("kind", ["new", "claimed", "moved"])
def test_opening_full_ring_writes_positions(kind):
    with full_ring(kind) as fd:
        view = PacketRing(fd, private=True)
        assert view.undone > 800
        assert copied_pages("full-ring") == 0
        before = os.pread(fd, file_size(CAPACITY), 0)
        assert PacketRing(fd).undone == view.undone
        after = os.pread(fd, file_size(CAPACITY), 0)
        assert after[4096:32768] + after[36864:] == before[4096:32768] + before[36864:], (
            "but for the header's two copies"
        )


def test_viewing_what_waits_writes_nothing():
    with full_ring("claimed") as fd:
        assert pages_of(fd, lambda view: [packet.messages for packet in view.waiting()].remove(2)) == 0


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2", reason="all memory has to be there beforehand"
)
def test_ring_may_be_larger_than_memory(tmp_path):
    """It is made in a file, so the next start is to open it too, and looks at it first."""
    capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 5 // 4
    with (tmp_path / "ring.fdq").open("w+b") as file:
        os.truncate(file.fileno(), file_size(capacity))
        PacketRing(file.fileno(), capacity).push(b"one")
        for private in (True, False):
            assert [packet.body for packet in PacketRing(file.fileno(), private=private).waiting()] == [b"one"]


def test_what_waits_is_what_would_be_claimed():
    with full_ring() as fd:
        ring = PacketRing(fd)
        for turn in range(50):
            handle = ring.claim()
            if turn % 3:
                ring.done(handle)
        view = PacketRing(fd, private=True)
        waiting = list(view.waiting())
        claimed = []
        while handle := view.claim():
            claimed.append(view.packet(handle))
        assert waiting == claimed
        assert len(waiting) == view.undone
        assert list(view.waiting()) == []


def test_only_possibly_unsynced_is_rewritten():
    with full_ring() as fd:
        ring = PacketRing(fd)
        for _ in range(20):
            ring.done(ring.claim())
        everything = CAPACITY // os.sysconf("SC_PAGE_SIZE")
        assert everything - 4 <= pages_written_again(fd) - HEADER_PAGES - MARKS_PAGES <= everything + 1
        ring.mark_synced(ring.tail_position)
        assert pages_written_again(fd) == HEADER_PAGES
        assert ring.push(bytes(5000))
        assert 2 <= pages_written_again(fd) - HEADER_PAGES <= 4
        ring.forget_synced()
        assert pages_written_again(fd) - HEADER_PAGES - MARKS_PAGES >= everything - 4
        PacketRing(fd)  # a process that was killed at once
        assert pages_written_again(fd) - HEADER_PAGES - MARKS_PAGES >= everything - 4


def test_damaged_header_claim_rewrites_all():
    with full_ring() as fd:
        ring = PacketRing(fd)
        ring.mark_synced(ring.tail_position)
        assert pages_written_again(fd) == HEADER_PAGES
        os.pwrite(fd, b"\x7f", 112 + 7)  # of one copy: far behind the tail
        assert pages_written_again(fd) > 200


def test_moved_packet_counts_old_until_sync():
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(65536))
    ring = PacketRing(fd, 65536)
    ring.push(b"held")
    ring.claim()
    while not is_marked(fd, "moved"):
        ring.push(bytes(1000))
        ring.done(ring.claim())
    successor = PacketRing(fd)
    assert successor.undone == 1
    assert successor.used == successor.tail_position, "the old place is not given up"
    successor.mark_synced(successor.tail_position)
    assert successor.used < 10_000
    assert [packet.body for packet in successor.waiting()] == [b"held"]
    os.close(fd)
