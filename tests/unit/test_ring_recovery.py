"""The packet ring after crashes and on damaged disks: what is intact is delivered, what is not is reported."""

from __future__ import annotations

import os
import random
import struct
import uuid
from itertools import product
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdist._core import (
    FLAG_WAITED,
    FORMAT_VERSION,
    HEADER_SIZE,
    STATES,
    Packet,
    PacketRing,
    RingError,
    file_size,
)

CAPACITY = 65536
COPIES = (0, 32768)  # where the header's copies are in the file
FIXED = struct.Struct("<8sIIqQ16s16sq")  # magic, version, checksum, capacity, salt, ring, boot, time
POSITIONS = struct.Struct("<qqQ")  # head, tail, next sequence; their checksum and four bytes more follow
HEADER = FIXED.size + POSITIONS.size + 8
SEALED = 72  # bytes of a record that its first checksum protects, itself included
STATE, ATTEMPTS, RECORD = 72, 76, 88  # where they are, and where key and body begin


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


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
        self.places, self.image = [], b""

    def __del__(self):
        os.close(self.fd)

    def push(self, body, key=None):
        start, sequence = self.ring.tail_position, self.ring.next_sequence_number
        packet_id = uuid.UUID(int=sequence)
        options = {"messages": 2, "emitter": sequence, "accepted_ns": 10**18 + sequence, "flags": FLAG_WAITED}
        assert self.ring.push(body, key, packet_id=packet_id.bytes, **options) == sequence
        packet = Packet(sequence, key or str(packet_id), body, 0, 10**18 + sequence, 2, sequence, FLAG_WAITED)
        size, payload = self.ring.tail_position - start, len(key or "") + len(body)
        self.places.append(Place(packet, HEADER_SIZE + start % CAPACITY, size, payload, done=False))

    def go_round(self, size):
        """Move head and tail on by ``size`` bytes."""
        while size:
            step = size if size <= 8192 else min(8192, size - RECORD)
            self.ring.push(bytes(step - RECORD))
            self.ring.done(self.ring.claim())
            size -= step

    def fill(self, packets=30, sizes=(0, 1, 7, 8, 40, 100, 250), start=CAPACITY - 1504):
        """Push packets of all sorts, across the end of the memory; some are sent once or twice, some are done."""
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
            if i % 5 == 2:
                self.ring.done(handle)
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


@pytest.fixture(params=["memfd", "file"])
def disk(request, tmp_path):
    if request.param == "memfd":
        return Disk(os.memfd_create("ring"))
    return Disk(os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600))


def assert_in_order(ring, packets):
    """Check that just these are delivered, and that the ring is as good as new."""
    assert ring.undone == len(packets)
    found = drain(ring)
    assert found == packets
    assert ring.push(b"and one more")
    assert ring.packet(ring.claim()).body == b"and one more"


def record_at(disk, place):
    return b"".join(disk.image[place.byte(i) : place.byte(i) + 1] for i in range(place.size))


# ---- crashes


def test_successor_finds_all_packets(disk):
    ring = disk.fill().open()
    assert (ring.corrupt, ring.damage, ring.claimed) == (0, [], 0)
    assert ring.next_sequence_number == disk.ring.next_sequence_number
    assert ring.used == disk.ring.used
    assert ring.oldest_ns == disk.places[0].packet.accepted_ns
    assert_in_order(ring, disk.packets())


def test_death_in_push_leaves_all_or_nothing(disk):
    before = disk.fill().image
    disk.push(bytes(range(250)), "the last one")
    disk.save()
    after, last = disk.image, disk.places[-1]
    record = record_at(disk, last)

    def stages():
        """Yield (patches to the file before, whether the packet is there) for what a push writes, in its order."""
        for length in range(0, last.size, 5):
            yield [(last.byte(i), record[i : i + 1]) for i in range(length)], False
        whole = [(last.byte(i), record[i : i + 1]) for i in range(last.size)]
        # Of one copy of the header any words may have arrived, before anything of the other is written.
        words = [slice(FIXED.size + 8 * i, FIXED.size + 8 * i + 8) for i in range(4)]
        first, second = ([(copy + word.start, after[copy:][word]) for word in words] for copy in COPIES)
        for arrived in product([False, True], repeat=4):
            some = [patch for patch, there in zip(first, arrived, strict=True) if there]
            yield whole + some, all(arrived[1:])  # the head stays where it is
            yield whole + first + [(offset + COPIES[1], data) for offset, data in some], True
        yield whole + first + second, True

    assert last.byte(last.size - 1) > last.offset  # it does not cross the end of the memory
    disk.image = before
    for patches, there in stages():
        ring = disk.open(*patches)
        assert ring.corrupt == 0
        assert ring.damage == [], "an ordinary death is no damage"
        assert all(what == "positions in a header copy" for _, what in ring.notes)
        assert ring.next_sequence_number == last.packet.sequence + there
        assert_in_order(ring, disk.packets(without=() if there else [last]))


# ---- damage


def expected_after(place, relative):
    """Return (packet delivered or None, what is reported) when one byte of a record changes."""
    if relative < SEALED:
        return None, f"{place.size} bytes that are no record"
    if relative < RECORD:  # the state, which counts as not done then, attempts, and what dies with the process
        return place.packet, None
    if relative < RECORD + place.payload and not place.done:
        return None, "checksum of packet "
    return place.packet if not place.done else None, None  # padding, or of one that is done


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_changed_byte_costs_only_its_packet(disk, mask):
    disk.fill()
    for index, place in enumerate(disk.places):
        for relative in range(place.size):
            ring = disk.open(disk.flip(place.byte(relative), mask))
            delivered, report = expected_after(place, relative)
            if place.done and relative >= STATE + 4:
                delivered = None
            expected = [other.packet for other in disk.places[:index] if not other.done]
            expected += [delivered] if delivered else []
            expected += [other.packet for other in disk.places[index + 1 :] if not other.done]
            found = drain(ring)
            if ATTEMPTS <= relative < ATTEMPTS + 4 and delivered:
                at = expected.index(delivered)
                assert found[at].attempts == delivered.attempts ^ mask << 8 * (relative - ATTEMPTS)
                found[at] = delivered
            assert found == expected
            assert ring.corrupt == len(ring.damage) == bool(report)
            for offset, what in ring.damage:
                assert offset == place.offset
                assert what.startswith(report)


def test_damage_is_reported_only_once(disk):
    disk.fill()
    hurt = disk.places[3], disk.places[4], disk.places[10]
    ring = disk.open(disk.flip(hurt[0].byte(56)), disk.flip(hurt[1].byte(9)), disk.flip(hurt[2].byte(RECORD)))
    assert ring.damage == [
        (hurt[0].offset, f"{hurt[0].size + hurt[1].size} bytes that are no record"),
        (hurt[2].offset, f"checksum of packet {hurt[2].packet.id}"),
    ]
    assert ring.corrupt == 2
    again = disk.reopen()
    assert (again.corrupt, again.damage) == (0, [])
    assert_in_order(again, disk.packets(without=hurt))
    for handle in range(1, again.claimed + 1):  # the gaps are passed like any record that is done
        again.done(handle)
    assert (again.undone, again.used) == (0, 0)


def test_gap_of_damaged_length_loses_nothing(disk):
    disk.fill()
    hurt = disk.places[5]
    disk.open(disk.flip(hurt.byte(0)))
    disk.save()
    for relative, mask in product(range(8), (1, 2, 16, 128, 255)):
        ring = disk.open(disk.flip(hurt.byte(relative), mask))
        assert ring.corrupt == 1
        assert_in_order(ring, disk.packets(without=[hurt]))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_damaged_length_hides_no_later_one(disk, length):
    disk.fill()
    for hurt in (place for place in disk.places if len(place.packet.body) != length):
        ring = disk.open(*((hurt.byte(56 + i), length.to_bytes(4, "little")[i : i + 1]) for i in range(4)))
        assert ring.damage == [(hurt.offset, f"{hurt.size} bytes that are no record")]
        assert_in_order(ring, disk.packets(without=[hurt]))


def assert_only_the_hurt_are_missing(ring, places, touched):
    """Check that all packets come but those touched, and that of these none comes altered."""
    known = {place.packet.sequence: place for place in places}
    found = drain(ring)
    for packet in found:
        place = known[packet.sequence]
        assert packet._replace(attempts=0) == place.packet._replace(attempts=0)
        assert packet == place.packet or place in touched
        assert not place.done or place in touched
    sequences = [packet.sequence for packet in found]
    assert sequences == sorted(set(sequences))
    missing = {place for place in places if not place.done} - {known[sequence] for sequence in sequences}
    assert missing <= touched
    assert ring.corrupt == sum(offset >= HEADER_SIZE for offset, _ in ring.damage)
    assert bool(ring.corrupt) >= bool(missing)


@pytest.mark.parametrize("content", ["zeros", "ones", "noise", "the lap before"])
def test_lost_page_costs_only_packets_on_it(disk, content):
    lost = {"zeros": bytes(CAPACITY), "ones": b"\xff" * CAPACITY, "noise": random.Random(1).randbytes(CAPACITY)}
    if content == "the lap before":  # the write of the page never reached the disk
        for size in random.Random(1).choices((300, 700), k=100):
            disk.ring.push(bytes(size))
            disk.ring.done(disk.ring.claim())
        lost[content] = disk.save().image[HEADER_SIZE:]
        disk.fill(packets=64, sizes=(300, 700), start=CAPACITY + 400)
    else:
        disk.fill(packets=64, sizes=(300, 700), start=CAPACITY - 5000)
    hurt = 0
    for page in range(0, CAPACITY, 4096):
        offsets = range(HEADER_SIZE + page, HEADER_SIZE + page + 4096)
        touched = {place for place in disk.places if any(place.byte(i) in offsets for i in range(0, place.size, 8))}
        ring = disk.open((offsets.start, lost[content][page : page + 4096]))
        assert_only_the_hurt_are_missing(ring, disk.places, touched)
        hurt += bool(ring.corrupt)
    assert hurt > 5


damages = st.lists(
    st.tuples(st.integers(0, file_size(CAPACITY) - 1), st.integers(1, 5000), st.sampled_from([None, 0, 0xFF])),
    min_size=1,
    max_size=8,
)


def spoil(patches, seed=0):
    """Turn (offset, length, byte or None for noise) into what is written."""
    rng = random.Random(seed)
    for offset, length, fill in patches:
        size = min(length, file_size(CAPACITY) - offset)
        yield offset, rng.randbytes(size) if fill is None else bytes([fill]) * size


@given(damages, st.integers(0, 2**32))
@settings(max_examples=2 * settings().max_examples, deadline=None)
def test_damage_alters_nothing_else(patches, seed):
    disk = Disk(os.memfd_create("ring")).fill(packets=120, sizes=(0, 40, 300, 1000), start=CAPACITY - 20_000)
    spoilt = list(spoil(patches, seed))
    hit = set().union(*(range(offset, offset + len(data)) for offset, data in spoilt))
    touched = {place for place in disk.places if any(place.byte(i) in hit for i in range(place.size))}
    unreadable = all(hit.intersection(range(copy, copy + HEADER)) for copy in COPIES)
    try:
        ring = disk.open(*spoilt)
    except RingError:
        assert unreadable
    else:
        if not unreadable:
            assert_only_the_hurt_are_missing(ring, disk.places, touched)


# ---- the header


def test_changed_header_byte_costs_nothing(disk):
    disk.fill()
    for copy, relative in product(COPIES, range(HEADER)):
        ring = disk.open(disk.flip(copy + relative))
        in_header, in_positions = relative < FIXED.size, FIXED.size <= relative < HEADER - 4
        assert ring.damage == ([(copy, "header copy")] if in_header else [])
        assert ring.notes == ([(copy, "positions in a header copy")] if in_positions else [])
        assert ring.corrupt == 0
        assert_in_order(ring, disk.packets())
        again = disk.reopen()
        assert again.damage == again.notes == []


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("content", [bytes(32768), b"\xff" * 32768, random.Random(2).randbytes(32768)])
def test_either_copy_of_the_header_is_enough(disk, copy, content):
    ring = disk.fill().open((copy, content))
    assert ring.damage == [(copy, "header copy")]
    assert ring.next_sequence_number == disk.ring.next_sequence_number
    assert_in_order(ring, disk.packets())
    other = COPIES[1] - copy  # the first is whole again
    assert drain(disk.reopen((other, content)))[:-1] == disk.packets()


def test_missing_positions_scan_everything(disk):
    disk.fill()
    for garbage in (bytes(24), b"\xff" * 24, POSITIONS.pack(8, 16, 99)):
        ring = disk.open(*((copy + FIXED.size, garbage) for copy in COPIES))
        assert ring.damage == [(copy, "positions in a header copy") for copy in COPIES]
        assert ring.corrupt == 0
        assert ring.next_sequence_number == disk.ring.next_sequence_number
        assert_in_order(ring, disk.packets())
    empty = Disk(os.memfd_create("empty")).save()
    assert_in_order(empty.open(*((copy + FIXED.size, b"\xff" * 24) for copy in COPIES)), [])


@pytest.mark.parametrize("content", [bytes(104), b"\xff" * 104, b"fdring\r\n" + bytes(96)])
def test_without_a_header_it_is_no_ring(disk, content):
    disk.fill()
    with pytest.raises(RingError, match="no intact ring header"):
        disk.open(*((copy, content) for copy in COPIES))


def reheaded(image, **changes):
    """Return patches that change fields of the fixed part of both copies, with the right checksum."""
    names = ("magic", "version", "crc", "capacity", "salt", "ring", "boot", "time")
    fields = dict(zip(names, FIXED.unpack_from(image), strict=True))
    fields.update(changes, crc=0)
    fields["crc"] = crc32c(FIXED.pack(*fields.values()))
    return [(copy, FIXED.pack(*fields.values())) for copy in COPIES]


def test_newer_format_is_named_and_left(disk):
    disk.fill()
    patches = reheaded(disk.image, version=FORMAT_VERSION + 41)
    with pytest.raises(RingError, match=r"format 42 by a newer version; this one reads format 1"):
        disk.open(*patches)
    left = os.pread(disk.fd, file_size(CAPACITY), 0)
    assert [left[copy : copy + FIXED.size] for copy in COPIES] == [data for _, data in patches]
    assert left[HEADER_SIZE:] == disk.image[HEADER_SIZE:]


@pytest.mark.parametrize("copy", [0, 1])
def test_newer_format_copy_leaves_ring_alone(disk, copy):
    """A newer version may have been killed between the two."""
    disk.fill()
    patch = reheaded(disk.image, version=FORMAT_VERSION + 1)[copy]
    with pytest.raises(RingError, match="newer version"):
        disk.open(patch)
    offset, data = patch
    assert os.pread(disk.fd, file_size(CAPACITY), 0) == disk.image[:offset] + data + disk.image[offset + len(data) :]


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("capacity", [CAPACITY, 2 * CAPACITY])
def test_foreign_header_copy_costs_nothing(disk, copy, capacity):
    """Sound in itself, and with more packets behind it: a disk has written it to the wrong place."""
    disk.fill()
    fd = os.memfd_create("other")
    os.ftruncate(fd, file_size(capacity))
    other = PacketRing(fd, capacity)
    for _ in range(100):
        assert other.push(bytes(300))
    foreign = os.pread(fd, 4096, 0)
    os.close(fd)
    ring = disk.open((copy, foreign))
    assert ring.damage == [(copy, "header copy of another ring")]
    assert (ring.capacity, ring.corrupt) == (CAPACITY, 0)
    assert_in_order(ring, disk.packets())
    assert PacketRing(disk.fd).damage == [], "it is mended"


@pytest.mark.parametrize("capacity", [0, -65536, 1, 65535, 65544])
def test_capacities_no_ring_has_are_refused(disk, capacity):
    disk.fill()
    with pytest.raises(RingError, match=f"{capacity} bytes, which no ring has"):
        disk.open(*reheaded(disk.image, capacity=capacity))


@pytest.mark.parametrize("size", [0, 1, HEADER_SIZE - 1, HEADER_SIZE, file_size(CAPACITY) - 1])
def test_file_cut_short_is_refused(disk, size):
    del disk.fill().ring
    os.ftruncate(disk.fd, size)
    what = "a ring's header" if size < HEADER_SIZE else f"the {CAPACITY} bytes its header speaks of"
    with pytest.raises(RingError, match=f"shorter than {what}"):
        PacketRing(disk.fd)


@given(st.integers(0, 3 * HEADER_SIZE), st.integers(0, 2**32), damages, st.booleans())
@settings(max_examples=2 * settings().max_examples, deadline=None)
def test_garbage_is_refused_or_yields_none(size, seed, patches, real_header):
    disk = Disk(os.memfd_create("ring"))
    spoilt = list(spoil(patches, seed))
    if real_header:
        ring = disk.save().open(*((max(HEADER_SIZE, offset), data) for offset, data in spoilt))
        assert drain(ring) == []
    else:
        os.ftruncate(disk.fd, size)
        disk.image = random.Random(seed).randbytes(size)
        with pytest.raises(RingError):
            disk.open(*((offset, data) for offset, data in spoilt if offset + len(data) <= size))


# ---- bodies that look like records


def container_for(position, record):
    """Return a body that has ``record`` at ``position`` of the ring when its own record starts a lap."""
    return bytes(position - RECORD) + record + bytes(64)


def test_foreign_record_in_a_body_is_ignored(disk):
    twin = Disk(os.memfd_create("twin"))
    twin.push(bytes(400))
    twin.push(b"a packet of another ring")
    forged = record_at(twin.save(), twin.places[1])
    disk.push(container_for(twin.places[1].offset - HEADER_SIZE, forged))
    disk.push(b"behind it")
    disk.save()
    assert forged in disk.image
    assert_in_order(disk.open(), disk.packets())
    ring = disk.open(disk.flip(disk.places[0].byte(0)))
    assert ring.damage == [(HEADER_SIZE, f"{disk.places[0].size} bytes that are no record")]
    assert_in_order(ring, disk.packets()[1:])


def test_forging_a_record_needs_the_salt(disk):
    """The same with the ring's own seal and place, which no emitter can make: this is all that keeps the two apart."""
    empty = disk.save().image
    disk.push(bytes(400))
    disk.push(b"forged")
    place = disk.places[1]
    forged = record_at(disk.save(), place)
    disk.image = empty
    disk.ring, disk.places = disk.open(), []
    disk.push(container_for(place.offset - HEADER_SIZE, forged))
    ring = disk.save().open(disk.flip(HEADER_SIZE))
    assert [packet.body for packet in drain(ring)] == [b"forged"]


def test_earlier_own_record_is_no_packet(disk):
    disk.push(b"the first")
    first = record_at(disk.save(), disk.places[0])
    disk.push(b"x" * 8 + first + b"y" * 8)
    disk.push(b"the last")
    ring = disk.save().open(disk.flip(disk.places[1].byte(3)))
    assert ring.corrupt == 1
    assert_in_order(ring, disk.packets(without=[disk.places[1]]))


def test_earlier_lap_record_is_no_packet(disk):
    disk.go_round(1000)
    disk.push(b"of the lap before")
    old, place = record_at(disk.save(), disk.places[0]), disk.places[0]
    disk.ring.done(disk.ring.claim())
    disk.go_round(CAPACITY - disk.ring.tail_position)
    disk.places = []
    disk.push(container_for(place.offset - HEADER_SIZE, old))
    disk.push(b"behind it")
    disk.save()
    assert record_at(disk, place) == old
    ring = disk.open(disk.flip(disk.places[0].byte(60)))
    assert ring.damage == [(HEADER_SIZE, f"{disk.places[0].size} bytes that are no record")]
    assert_in_order(ring, disk.packets()[1:])


# ---- records that moved


def moved(disk):
    """Return a ring whose first record has a copy further on, not synced yet; the places of both."""
    disk.push(bytes(range(250)) * 8, "moved")
    handle = disk.ring.claim()
    disk.ring.count_attempt(handle)
    tail = disk.ring.tail_position
    while (end := disk.ring.push(bytes(1000)) and disk.ring.tail_position) == tail + RECORD + 1000:
        disk.ring.done(disk.ring.claim())
        tail = end
    disk.ring.done(disk.ring.claim())
    packet = disk.places[0].packet._replace(attempts=1)
    original = disk.places[0]._replace(packet=packet)
    copy = original._replace(offset=HEADER_SIZE + tail % CAPACITY)
    assert disk.ring.packet(handle) == packet
    disk.save()
    return packet, original, copy


def test_moved_packet_comes_once_from_either(disk):
    packet, original, copy = moved(disk)
    assert record_at(disk, original)[RECORD:] == record_at(disk, copy)[RECORD:]
    assert_in_order(disk.open(), [packet])
    for place, relative in product((original, copy), range(original.size)):
        ring = disk.open(disk.flip(place.byte(relative)))
        found = drain(ring)
        if ATTEMPTS <= relative < ATTEMPTS + 4:
            assert [one._replace(attempts=1) for one in found] == [packet]
        elif place is original and STATE <= relative < STATE + 4:
            assert found == [packet, packet]  # rather twice than never
        else:
            assert found == [packet]
        hurt = relative < SEALED or RECORD <= relative < RECORD + place.payload
        assert ring.corrupt == hurt


def test_damaged_copy_replaces_no_original(disk):
    """The power fails once more before it reaches the disk that the original counts again."""
    packet, original, copy = moved(disk)
    assert drain(disk.open(disk.flip(copy.byte(RECORD)))) == [packet]
    state = original.byte(STATE)
    assert drain(disk.reopen((state, disk.image[state : state + 4]))) == [packet]


def test_finished_copy_replaces_no_later_one(disk):
    """Of a packet that counts again after a power cut, and is moved again."""
    packet, original, copy = moved(disk)
    words = {name: struct.pack("<I", word) for word, name in STATES.items()}
    disk.ring = disk.open((copy.byte(STATE), words["done"]), (original.byte(STATE), words["queued"]))
    handle = disk.ring.claim()
    assert disk.ring.packet(handle) == packet
    tail = disk.ring.tail_position
    while (end := disk.ring.push(bytes(1000)) and disk.ring.tail_position) == tail + RECORD + 1000:
        disk.ring.done(disk.ring.claim())
        tail = end
    later = original._replace(offset=HEADER_SIZE + tail % CAPACITY)
    disk.save()
    assert record_at(disk, later)[RECORD:] == record_at(disk, original)[RECORD:], "it has moved"
    ring = disk.open(disk.flip(later.byte(RECORD)))
    assert packet in drain(ring)


# ---- one ring's packets in another


def test_migration_changes_only_sequence(disk):
    source = Disk(os.memfd_create("other"))
    other = source.ring
    for i, key in enumerate([None, "key", "k" * 64]):
        options = {"messages": i, "emitter": 2**64 - 1 - i, "accepted_ns": 50 - i, "attempts": i, "flags": FLAG_WAITED}
        other.push(bytes(1000 * i), key, packet_id=bytes([i] * 16), **options)
    ring, adopted = PacketRing(disk.fd, CAPACITY, volatile=True), []
    ring.push(b"first", accepted_ns=100)
    while handle := other.claim():
        adopted.append(other.packet(handle))
        assert ring.adopt(other, handle) == len(adopted) + 1
        assert other.packet(handle) == adopted[-1]
        assert ring.oldest_ns == 51 - len(adopted)
    expected = [packet._replace(sequence=packet.sequence + 1, flags=0) for packet in adopted]
    assert (ring.undone, other.undone) == (4, 3)
    assert drain(ring)[1:] == drain(PacketRing(disk.fd))[1:] == expected
    with pytest.raises(ValueError, match="no handle"):
        ring.adopt(other, 99)


def test_oversized_packet_is_not_migrated(disk):
    large = os.memfd_create("large")
    os.ftruncate(large, file_size(2 * CAPACITY))
    other = PacketRing(large, 2 * CAPACITY)
    other.push(bytes(CAPACITY // 2))
    other.push(bytes(CAPACITY // 4))
    ring = PacketRing(disk.fd, CAPACITY)
    with pytest.raises(ValueError, match=f"a packet of {CAPACITY // 2} bytes is over half of a ring of {CAPACITY}"):
        ring.adopt(other, other.claim())
    second = other.claim()
    assert [ring.adopt(other, second) for _ in range(4)] == [1, 2, 3, 0]
    assert (ring.undone, other.undone) == (3, 2)


def test_migrated_packet_is_not_withdrawn(disk):
    other = Disk(os.memfd_create("other")).ring
    other.push(b"adopted")
    ring = PacketRing(disk.fd, CAPACITY, claims_wait_for_sync=True)
    ring.push(b"new")
    assert ring.adopt(other, other.claim()) == 2
    assert ring.withdraw_unsynced() == (1, 1, 3)
    ring.mark_synced(ring.tail_position)
    assert [packet.body for packet in drain(ring)] == [b"adopted"]


# ---- looking at a ring


def test_private_recovery_writes_nothing(tmp_path):
    path = tmp_path / "ring.fdq"
    disk = Disk(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)).fill()
    hurt = disk.places[0], disk.places[3]
    for place in hurt:
        offset, data = disk.flip(place.byte(RECORD))
        os.pwrite(disk.fd, data, offset)
    image = path.read_bytes()
    path.chmod(0o400)
    with path.open("rb") as file:
        view = PacketRing(file.fileno(), private=True)
        assert view.corrupt == len(view.damage) == 2
        for packet in disk.packets(without=hurt):
            handle = view.claim()
            assert view.packet(handle) == packet
            view.count_attempt(handle)
            view.done(handle)
        assert (view.undone, view.used) == (0, 0)
    assert path.read_bytes() == image
