"""A ring's file (format 2) that is filled, saved, damaged and opened again and again, and where its parts are."""

from __future__ import annotations

import os
import random
import struct
import uuid
from pathlib import Path
from typing import NamedTuple

from fastdist._core import FLAG_WAITED, HEADER_SIZE, STATES, Packet, PacketRing, file_size

CAPACITY = 65536
COPIES = (0, 32768)  # where the header's copies are in the file
FIXED = struct.Struct("<8sIIqQ16s16sq")  # magic, version, checksum, capacity, salt, ring, boot, time
# head, tail, limit, next sequence and number, trusted; a checksum and four bytes more follow
POSITIONS = struct.Struct("<qqqQQq")
SAVED = POSITIONS.size + 4  # what is written each time
HEADER = FIXED.size + SAVED + 4
RECORD = 80  # bytes of a record before key and body, protected by its first checksum
SMALLEST = 128  # bytes of a record at least
NUMBER, BODY_LENGTH = 16, 64  # where they are in it
MARKS = HEADER_SIZE + CAPACITY
MARK = 8  # bytes: state, attempts, checksum


def memfd(capacity: int = CAPACITY) -> int:
    """Return a file in memory, open, with room for a ring."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(capacity))
    return fd


def drain(ring):
    packets = []
    while handle := ring.claim():
        packets.append(ring.packet(handle))
    return packets


class Place(NamedTuple):
    """A packet in the ring: where its record is (offset in the file), and how much of it is what."""

    packet: Packet
    offset: int
    size: int
    payload: int  # bytes of key and body
    mark: int  # offset in the file
    done: bool

    def byte(self, relative):
        """Return the offset in the file of one of its bytes."""
        return HEADER_SIZE + (self.offset - HEADER_SIZE + relative) % CAPACITY


class Disk:
    """A ring's file, which is saved, damaged and opened again and again."""

    def __init__(self, fd):
        self.fd = fd
        os.ftruncate(fd, file_size(CAPACITY))
        self.ring = PacketRing(fd, CAPACITY)
        self.places, self.handles, self.image = [], [], b""

    def __del__(self):
        os.close(self.fd)

    def push(self, body, key=None):
        start, sequence = self.ring.tail_position, self.ring.next_sequence_number
        packet_id = uuid.UUID(int=sequence)
        options = {"messages": 2, "emitter": sequence, "accepted_ns": 10**18 + sequence, "flags": FLAG_WAITED}
        assert self.ring.push(body, key, packet_id=packet_id.bytes, **options) == sequence
        packet = Packet(sequence, key or str(packet_id), body, 0, 10**18 + sequence, 2, sequence, FLAG_WAITED)
        size, payload = self.ring.tail_position - start, len(key or "") + len(body)
        offset = HEADER_SIZE + start % CAPACITY
        number = int.from_bytes(os.pread(self.fd, 8, offset + NUMBER), "little")
        mark = MARKS + number % (CAPACITY // SMALLEST) * MARK
        self.places.append(Place(packet, offset, size, payload, mark, done=False))

    def go_round(self, size):
        """Move head and tail on by ``size`` bytes."""
        while size:
            step = size if size <= 8192 else min(8192, size - SMALLEST)
            self.ring.push(bytes(step - RECORD))
            self.ring.done(self.ring.claim())
            size -= step

    def fill(self, packets=30, sizes=(0, 1, 7, 8, 40, 100, 250), start=CAPACITY - 1504, *, known=True):
        """Push packets of all sorts, across the end of the memory; some are sent once or twice, some are done.

        ``known``: the header says where they end, so whatever is missing of them is damage.
        """
        rng = random.Random(packets)
        self.go_round(start - self.ring.tail_position)
        for i in range(packets):
            self.push(rng.randbytes(rng.choice(sizes)), None if i % 3 else f"key-{i}" * (1 + i % 4))
        for i, place in enumerate(self.places):
            handle = self.ring.claim()
            for _ in range(i % 4):
                self.ring.count_attempt(handle)
            packet = place.packet._replace(attempts=i % 4)
            self.places[i] = place._replace(packet=packet, done=i % 5 == 2)
            self.handles.append(handle)
            if i % 5 == 2:
                self.ring.done(handle)
        if known:
            self.ring.mark_synced(self.ring.tail_position)
        return self.save()

    def save(self):
        self.image = os.pread(self.fd, file_size(CAPACITY), 0)
        return self

    def packets(self, *, without=()):
        return [place.packet for place in self.places if not place.done and place not in without]

    def open(self, *patches):
        """Open the ring as it was saved, but for ``patches``: (offset in the file, bytes)."""
        os.pwrite(self.fd, self.image, 0)
        return self.reopen(*patches)

    def reopen(self, *patches):
        """Open the ring as it is now, but for ``patches``."""
        for offset, data in patches:
            os.pwrite(self.fd, data, offset)
        return PacketRing(self.fd)

    def flip(self, offset, mask=0xFF):
        return offset, bytes([self.image[offset] ^ mask])


def assert_in_order(ring, packets):
    """Check that just these are delivered, and that the ring is as good as new."""
    assert ring.undone == len(packets)
    found = drain(ring)
    assert found == packets
    assert ring.push(b"and one more")
    assert ring.packet(ring.claim()).body == b"and one more"


def is_marked(fd, state):
    """Whether there is a record that became this ("done", "moved") in the ring's file."""
    size = os.fstat(fd).st_size
    capacity = PacketRing(fd, private=True).capacity
    table = os.pread(fd, size, HEADER_SIZE + capacity)
    return any(STATES.get(word) == state for (word,) in struct.iter_unpack("<H6x", table))


def redirect(fd, other):
    """Have all descriptors of a file be those of another (a ring has one of its own); return one of what it was."""
    descriptors = [int(path.name) for path in Path("/proc/self/fd").iterdir() if _is_same(int(path.name), fd)]
    kept = os.dup(fd)
    for descriptor in descriptors:
        os.dup2(other, descriptor)
    return kept


def _is_same(fd, other):
    try:
        return os.path.sameopenfile(fd, other)
    except OSError:  # the one that listed them
        return False


def pages_written_again(fd):
    """Return how many pages are written again when the ring is opened: to another file, while a copy of it is read."""
    size = os.fstat(fd).st_size
    copy, disk = os.memfd_create("copy"), os.memfd_create("disk")
    os.pwrite(copy, os.pread(fd, size, 0), 0)
    os.ftruncate(disk, size)
    ring = PacketRing(copy)
    os.close(redirect(copy, disk))
    ring.write_again()
    pages = os.fstat(disk).st_blocks * 512 // os.sysconf("SC_PAGE_SIZE")
    os.close(copy)
    os.close(disk)
    return pages


def record_at(disk, place):
    return b"".join(disk.image[place.byte(i) : place.byte(i) + 1] for i in range(place.size))
