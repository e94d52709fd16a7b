"""Room in a ring: whether there is some, what is kept free for packets of other rings, and rings of any size."""

from __future__ import annotations

import os
import random

import pytest
from ring_disk import CAPACITY, COPIES, FIXED, HEADER, POSITIONS, RECORD, SMALLEST, drain, memfd

from fastdist._core import HEADER_SIZE, PacketRing, file_size
from fastdist.storage.format1 import checksum


@pytest.fixture
def fd():
    made = memfd()
    yield made
    os.close(made)


@pytest.mark.parametrize("volatile", [True, False])
def test_next_push_finds_room_as_told(fd, volatile):
    """Whatever was pushed, claimed, delivered and synced before, and is kept free for old rings."""
    ring, rng, size = PacketRing(fd, CAPACITY, volatile=volatile), random.Random(5), 1000
    claimed, told, refused = [], [], False
    for _ in range(20_000):
        match rng.randrange(20):
            case 0:
                size = rng.choice([0, 100, 1000, 5000, 20_000])
                refused = ring.push(bytes(size)) == 0  # then the next is to be like it
            case 1:
                ring.reserve(rng.choice([0, 1000, CAPACITY // 2]), rng.choice([SMALLEST, 2000, CAPACITY]))
            case 2 | 3:
                claimed += iter(ring.claim, 0)
            case 4:
                ring.mark_synced(ring.tail_position)
            case 5 | 6 | 7:
                for _ in range(len(claimed) * 3 // 4):
                    ring.done(claimed.pop(rng.randrange(len(claimed))))
            case _:
                lacking, usual = ring.room_lacking(), refused or size + RECORD <= CAPACITY // 16
                refused = ring.push(bytes(size)) == 0
                assert refused is (lacking > 0) or not usual
                told.append(lacking)
    assert 1000 < told.count(0) < len(told) - 1000


@pytest.mark.parametrize("volatile", [True, False])
def test_room_stays_until_a_push(fd, volatile):
    """Whatever is claimed, delivered, given back and synced meanwhile, and moved for it."""
    ring, rng = PacketRing(fd, CAPACITY, volatile=volatile), random.Random(7)
    claimed, free, looks = [], False, 0
    for _ in range(40_000):
        match rng.randrange(12):
            case 0:
                ring.push(bytes(rng.choice([100, 1000, 5000])))
                free = False
            case 1 | 2:
                claimed += [handle for _ in range(rng.randrange(8)) if (handle := ring.claim())]
            case 3:
                ring.mark_synced(ring.tail_position)
            case 4 if claimed:
                ring.done(claimed.pop(rng.randrange(len(claimed))))
            case 5 if claimed:
                ring.release(claimed.pop(rng.randrange(len(claimed))))
            case _:
                lacking = ring.room_lacking()
                assert not (free and lacking)
                looks += free
                free = lacking == 0
    assert looks > 1000


def test_one_large_packet_fills_no_ring(fd):
    """Others have room beside it; only when one like it is refused the ring is full, until a smaller one is taken."""
    ring = PacketRing(fd, CAPACITY, volatile=True)
    assert ring.push(bytes(25_000))
    assert ring.room_lacking() == 0
    assert ring.push(bytes(25_000)) == 0
    assert ring.room_lacking() > 0
    assert ring.push(bytes(500))
    assert ring.room_lacking() == 0


def test_room_kept_is_for_copies_only(fd):
    other = PacketRing(old := memfd(), CAPACITY)
    while other.push(bytes(5000)):
        pass
    ring = PacketRing(fd, CAPACITY)
    ring.reserve(other.undone_bytes, other.largest_record)
    accepted = copied = 0
    for _ in range(100):  # more comes in than leaves
        while ring.push(bytes(100)):
            accepted += 1
        if (old_packet := other.claim()) and ring.push_copy(other, old_packet):
            other.done(old_packet)
            copied += 1
            ring.reserve(other.undone_bytes, other.largest_record)
        elif old_packet:
            other.release(old_packet)
        ring.mark_synced(ring.tail_position)
        ring.done(ring.claim())
    assert other.undone == 0
    assert copied > 10
    assert accepted > 100
    os.close(old)


# ---- a large ring


def at_position(fd, position):
    """Have the ring begin at a position: as if that many bytes had gone through it. Return it, opened again."""
    header = os.pread(fd, HEADER, 0)
    _, _, _, sequence, number, _ = POSITIONS.unpack_from(header, FIXED.size)
    saved = POSITIONS.pack(position, position, position, sequence, number, position)
    for copy in COPIES:
        os.pwrite(fd, saved + checksum(saved, checksum(header[24:32])).to_bytes(4, "little"), copy + FIXED.size)
    return PacketRing(fd)


def test_ring_over_32_gib(tmp_path):
    """Records that wait, are lost and done behind 32 GiB of a sparse file, and what the next process finds."""
    capacity = 40 << 30
    with (tmp_path / "ring.fdq").open("w+b") as file:
        fd = file.fileno()
        os.truncate(fd, file_size(capacity))
        PacketRing(fd, capacity)
        for start in ((36 << 30) - 1000, 5 * capacity - 1000):  # the latter goes over the end, laps later
            ring = at_position(fd, start)
            for key in ("sent", "lost", "done", "left"):
                assert ring.push(bytes(3000), key)
            sent, lost, done, _ = iter(ring.claim, 0)
            ring.count_attempt(sent)
            ring.done(done)
            ring.discard(lost)
            ring.mark_synced(ring.tail_position)
            ring = PacketRing(fd)
            assert [(packet.id, packet.attempts) for packet in drain(ring)] == [("sent", 1), ("left", 0)]
            assert (ring.corrupt, ring.damage, ring.tail_position) == (0, [], start + 4 * 3088)


@pytest.mark.parametrize("synced", [True, False])
def test_packet_moved_beyond_32_gib(fd, synced):
    """It counts once, in its copy, or where it was if the power fails before the copy is synced."""
    PacketRing(fd, CAPACITY)
    ring = at_position(fd, (1 << 35) - 5000)
    assert ring.push(b"held", "held")
    held = ring.claim()
    ring.count_attempt(held)
    before, tail = os.pread(fd, file_size(CAPACITY), 0), 0
    while ring.tail_position - tail != 1080 + 128:  # until it is moved
        ring.mark_synced(ring.tail_position)
        before, tail = os.pread(fd, file_size(CAPACITY), 0), ring.tail_position
        assert ring.push(bytes(1000))
        ring.done(ring.claim())
    if not synced:  # of all pages only those of the marks were written since
        marks = HEADER_SIZE + CAPACITY
        os.pwrite(fd, before[:marks], 0)
    for successor in (PacketRing(fd, private=True), PacketRing(fd)):
        assert [(packet.id, packet.attempts) for packet in successor.waiting()] == [("held", 1)]
        assert (successor.corrupt, successor.damage) == (0, [])
