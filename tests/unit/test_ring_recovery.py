"""The packet ring after crashes and on damaged disks: what is intact is delivered, what is not is reported."""

from __future__ import annotations

import os
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_disk import (
    BODY_LENGTH,
    CAPACITY,
    COPIES,
    FIXED,
    HEADER,
    MARK,
    MARKS,
    NUMBER,
    POSITIONS,
    RECORD,
    SAVED,
    SMALLEST,
    Disk,
    assert_in_order,
    drain,
    record_at,
)

from fastdist._core import (
    FLAG_WAITED,
    FORMAT_VERSION,
    HEADER_SIZE,
    NewerFormatError,
    OtherFormatError,
    PacketRing,
    RingError,
    file_size,
)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# ---- crashes


def test_successor_finds_all_packets(disk):
    ring = disk.fill().open()
    assert (ring.corrupt, ring.damage, ring.claimed) == (0, [], 0)
    assert ring.next_sequence_number == disk.ring.next_sequence_number
    assert ring.used == disk.ring.used
    assert ring.oldest_ns == disk.places[0].packet.accepted_ns
    assert_in_order(ring, disk.packets())


def changes(before, after):
    """Return the offset from which on the two differ, and the bytes of the second up to the last that does."""
    differ = [at for at in range(len(before)) if before[at] != after[at]]
    return (differ[0], after[differ[0] : differ[-1] + 1]) if differ else (0, b"")


def same(image, other, offset, size):
    return image[offset : offset + size] == other[offset : offset + size]


@pytest.mark.parametrize("known", [True, False])
def test_death_in_a_write_leaves_the_written(disk, known):
    """What is pushed in an iteration is one ``pwrite``, of which a kill leaves the beginning."""
    before = disk.fill(known=known).image
    first = len(disk.places)
    for size in (250, 0, 40, 700):
        disk.push(bytes(range(200, 250)) * (size // 50), "one of the last")
    written = disk.places[first:]
    start, end = written[0].offset, written[-1].byte(written[-1].size)
    assert start < end, "they do not cross the end of the memory"
    after = disk.save().image
    disk.image = before
    for cut in range(start, end + 1):
        ring = disk.open((start, after[start:cut]))
        image = before[:start] + after[start:cut] + before[cut:]  # the byte that is missing may be there by chance
        heads = [place for place in written if same(image, after, place.offset, RECORD)]
        there = [place for place in heads if same(image, after, place.offset, RECORD + place.payload)]
        torn = [place for place in heads if place not in there]
        assert (ring.corrupt, ring.damage) == (0, []), "an ordinary death is no damage"
        assert ring.notes == [(place.offset, "a packet that was not written to its end") for place in torn]
        assert ring.next_sequence_number == written[0].packet.sequence + len(there)
        again = disk.reopen()
        assert again.damage == again.notes == []
        assert_in_order(again, disk.packets(without=[place for place in written if place not in there]))


def test_death_in_a_header_costs_nothing(disk):
    before = disk.fill(known=False).image
    disk.ring.mark_synced(disk.ring.tail_position)
    after = disk.save().image
    for copy, length in product(COPIES, range(SAVED + 1)):
        disk.image = before
        start = copy + FIXED.size
        patches = [(start, after[start : start + length])]
        if copy:
            patches.append((COPIES[0], after[:HEADER]))
        ring = disk.open(*patches)
        assert ring.damage == []
        assert all(note == (copy, "positions in a header copy") for note in ring.notes)
        assert len(ring.notes) <= 1
        assert_in_order(ring, disk.packets())


def test_death_before_marks_repeats_at_most(disk):
    """Also in the midst of the marks: a run of them is written by one ``pwrite``."""
    disk.fill()
    before = disk.image
    for index, (place, handle) in enumerate(zip(disk.places, disk.handles, strict=True)):
        if not place.done and index % 2:
            disk.ring.count_attempt(handle)
        elif not place.done:
            disk.ring.done(handle)
    after = disk.save().image
    start, run = changes(before[MARKS:], after[MARKS:])
    disk.image = before
    for length in range(len(run) + 1):
        ring = disk.open((MARKS + start, run[:length]))
        assert ring.damage == ring.notes == []
        found = {packet.sequence: packet for packet in drain(ring)}
        for index, place in enumerate(disk.places):
            if place.done or (place.mark + MARK <= MARKS + start + length and index % 2 == 0):
                assert place.packet.sequence not in found
            elif place.mark >= MARKS + start + length:
                assert found[place.packet.sequence] == place.packet
            elif index % 2:
                assert found[place.packet.sequence].attempts in (0, place.packet.attempts, place.packet.attempts + 1)


# ---- damage


def expected_after(place, relative):
    """Return (packet delivered or None, what is reported) when one byte of a record changes."""
    if relative < RECORD:
        return None, f"{place.size} bytes that are no record"
    if relative < RECORD + place.payload and not place.done:
        return None, "checksum of packet "
    return place.packet if not place.done else None, None  # padding, or of one that is done


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_changed_byte_costs_only_its_packet(disk, mask):
    disk.fill()
    for place in disk.places:
        for relative in range(place.size):
            ring = disk.open(disk.flip(place.byte(relative), mask))
            delivered, report = expected_after(place, relative)
            assert drain(ring) == disk.packets(without=() if delivered else [place])
            assert ring.corrupt == len(ring.damage) == bool(report)
            for offset, what in ring.damage:
                assert offset == place.offset
                assert what.startswith(report)


def test_changed_last_record_is_the_end(disk):
    """What a kill leaves of a write cannot be told from that."""
    last = disk.fill(known=False).places[-1]
    for relative in range(RECORD):
        ring = disk.open(disk.flip(last.byte(relative)))
        assert ring.damage == ring.notes == []
        assert ring.used == disk.ring.used - last.size
        assert_in_order(ring, disk.packets(without=[last]))


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_changed_mark_repeats_at_most(disk, mask):
    disk.fill()
    for index, place in enumerate(disk.places):
        for relative in range(MARK):
            ring = disk.open(disk.flip(place.mark + relative, mask))
            expected = [other.packet for other in disk.places[:index] if not other.done]
            expected += [place.packet._replace(attempts=0)]
            expected += [other.packet for other in disk.places[index + 1 :] if not other.done]
            assert (ring.damage, ring.undone) == ([], len(expected))
            assert drain(ring) == expected


@pytest.mark.parametrize("content", ["zeros", "ones", "noise", "those of others"])
def test_lost_marks_cost_no_packet(disk, content):
    disk.fill(packets=64)
    size = CAPACITY // SMALLEST * MARK
    marks = disk.image[MARKS:]
    assert len(marks) == size
    lost = {"zeros": bytes(size), "ones": b"\xff" * size, "noise": random.Random(3).randbytes(size)}
    lost["those of others"] = marks[MARK:] + marks[:MARK]
    ring = disk.open((MARKS, lost[content]))
    assert ring.damage == []
    assert drain(ring) == [place.packet._replace(attempts=0) for place in disk.places]


def test_damage_is_reported_only_once(disk):
    disk.fill()
    hurt = disk.places[3], disk.places[4], disk.places[10]
    ring = disk.open(disk.flip(hurt[0].byte(BODY_LENGTH)), disk.flip(hurt[1].byte(9)), disk.flip(hurt[2].byte(RECORD)))
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
        ring = disk.open(*((hurt.byte(BODY_LENGTH + i), length.to_bytes(4, "little")[i : i + 1]) for i in range(4)))
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


@pytest.fixture(scope="module")
def many():
    """Return a disk with 120 packets, and whose each byte of its file is that belongs to one of them."""
    disk = Disk(os.memfd_create("ring")).fill(packets=120, sizes=(0, 40, 300, 1000), start=CAPACITY - 20_000)
    whose = {place.byte(relative): place for place in disk.places for relative in range(place.size)}
    whose |= {place.mark + relative: place for place in disk.places for relative in range(MARK)}
    return disk, whose


@given(damages, st.integers(0, 2**32))
@settings(max_examples=2 * settings().max_examples, deadline=None)
def test_damage_alters_nothing_else(many, patches, seed):
    disk, whose = many
    spoilt = list(spoil(patches, seed))
    hit = set().union(*(range(offset, offset + len(data)) for offset, data in spoilt))
    touched = {whose[offset] for offset in hit & whose.keys()}
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
        in_header, in_positions = relative < FIXED.size, FIXED.size <= relative < FIXED.size + SAVED
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
    for garbage in (bytes(SAVED), b"\xff" * SAVED, POSITIONS.pack(8, 16, 99, 9, 9, 8)):
        ring = disk.open(*((copy + FIXED.size, garbage) for copy in COPIES))
        assert ring.damage == [(copy, "positions in a header copy") for copy in COPIES]
        assert ring.corrupt == 0
        assert ring.next_sequence_number == disk.ring.next_sequence_number
        assert_in_order(ring, disk.packets())
    empty = Disk(os.memfd_create("empty")).save()
    assert_in_order(empty.open(*((copy + FIXED.size, b"\xff" * SAVED) for copy in COPIES)), [])


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
    patches = reheaded(disk.image, version=FORMAT_VERSION + 40)
    with pytest.raises(NewerFormatError, match=r"format 42 by a newer version; this one reads format 2"):
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


def test_older_format_is_named_and_left(disk):
    disk.fill()
    patches = reheaded(disk.image, version=FORMAT_VERSION - 1)
    with pytest.raises(OtherFormatError, match="written in format 1 by an older version") as raised:
        disk.open(*patches)
    assert raised.value.format == 1
    assert not isinstance(raised.value, NewerFormatError)
    assert os.pread(disk.fd, file_size(CAPACITY), 0)[HEADER_SIZE:] == disk.image[HEADER_SIZE:]


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
    disk.ring.mark_synced(disk.ring.tail_position)
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
    disk.ring.mark_synced(disk.ring.tail_position)
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
    disk.ring.mark_synced(disk.ring.tail_position)
    disk.save()
    assert record_at(disk, place) == old
    ring = disk.open(disk.flip(disk.places[0].byte(BODY_LENGTH)))
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
    number = int.from_bytes(os.pread(disk.fd, 8, HEADER_SIZE + tail % CAPACITY + NUMBER), "little")
    mark = MARKS + number % (CAPACITY // SMALLEST) * MARK
    copy = original._replace(offset=HEADER_SIZE + tail % CAPACITY, mark=mark)
    assert disk.ring.packet(handle) == packet
    disk.save()
    return packet, original, copy


def test_moved_packet_comes_once_from_either(disk):
    packet, original, copy = moved(disk)
    assert record_at(disk, original)[RECORD:] == record_at(disk, copy)[RECORD:]
    assert_in_order(disk.open(), [packet])
    for place, relative in product((original, copy), range(original.size)):
        ring = disk.open(disk.flip(place.byte(relative)))
        assert drain(ring) == [packet]
        assert ring.corrupt == (relative < RECORD + place.payload)
    for relative in range(MARK):
        assert drain(disk.open(disk.flip(copy.mark + relative))) == [packet._replace(attempts=0)]
        # rather twice than never
        assert drain(disk.open(disk.flip(original.mark + relative))) == [packet._replace(attempts=0), packet]


def test_death_in_a_move_leaves_one_of_both(disk):
    """First the marks are written, then the copy: its body, and at last its head."""
    packet, original, copy = moved(disk)
    after, stages = disk.image, []
    unmoved = [(copy.byte(i), b"\0") for i in range(original.size)]
    for place in (original, copy):
        stages.append([(original.mark, after[original.mark :][:MARK]), *unmoved])
        stages += [[*unmoved[i:]] for i in range(RECORD, original.size, 50)]
        stages += [[*unmoved[i:RECORD]] for i in range(RECORD)]
        assert place
    for patches in stages:
        ring = disk.open(*patches)
        assert drain(ring) == [packet]


def test_damaged_copy_replaces_no_original(disk):
    """The power fails once more before it reaches the disk that the original counts again."""
    packet, original, copy = moved(disk)
    assert drain(disk.open(disk.flip(copy.byte(RECORD)))) == [packet]
    assert drain(disk.reopen((original.mark, disk.image[original.mark :][:MARK]))) == [packet]


def test_finished_copy_ends_its_packet(disk):
    """Though it may have counted again after a power cut, and was moved once more."""
    packet, original, copy = moved(disk)
    disk.ring.done(1)
    done = os.pread(disk.fd, MARK, copy.mark)
    assert drain(disk.open((copy.mark, done))) == []
    disk.ring = disk.open((copy.mark, done), (original.mark, bytes(MARK)))
    handle = disk.ring.claim()
    assert disk.ring.packet(handle) == packet._replace(attempts=0)
    tail = disk.ring.tail_position
    while (end := disk.ring.push(bytes(1000)) and disk.ring.tail_position) == tail + RECORD + 1000:
        disk.ring.done(disk.ring.claim())
        tail = end
    disk.ring.done(disk.ring.claim())
    later = original._replace(offset=HEADER_SIZE + tail % CAPACITY)
    disk.save()
    assert record_at(disk, later)[RECORD:] == record_at(disk, original)[RECORD:], "it has moved"
    assert [each.id for each in drain(disk.open())] == [packet.id]
    assert drain(disk.open(disk.flip(later.byte(RECORD)))) == [], "it was delivered"


# ---- one ring's packets in another


def test_migration_changes_only_sequence(disk):
    source = Disk(os.memfd_create("other"))
    other = source.ring
    for i, key in enumerate([None, "key", "k" * 64]):
        options = {"messages": i, "emitter": 2**64 - 1 - i, "accepted_ns": 50 - i, "attempts": i, "flags": FLAG_WAITED}
        other.push(bytes(1000 * i), key, packet_id=bytes([i] * 16), **options)
    ring, copied = PacketRing(disk.fd, CAPACITY, volatile=True), []
    ring.push(b"first", accepted_ns=100)
    while handle := other.claim():
        copied.append(other.packet(handle))
        assert ring.push_copy(other, handle) == len(copied) + 1
        assert other.packet(handle) == copied[-1]
        assert ring.oldest_ns == 51 - len(copied)
    expected = [packet._replace(sequence=packet.sequence + 1, flags=0) for packet in copied]
    assert (ring.undone, other.undone) == (4, 3)
    assert drain(ring)[1:] == drain(PacketRing(disk.fd))[1:] == expected
    with pytest.raises(ValueError, match="no handle"):
        ring.push_copy(other, 99)


def test_oversized_packet_is_not_migrated(disk):
    large = os.memfd_create("large")
    os.ftruncate(large, file_size(2 * CAPACITY))
    other = PacketRing(large, 2 * CAPACITY)
    other.push(bytes(CAPACITY // 2))
    other.push(bytes(CAPACITY // 4))
    ring = PacketRing(disk.fd, CAPACITY)
    with pytest.raises(ValueError, match=f"a packet of {CAPACITY // 2} bytes is over half of a ring of {CAPACITY}"):
        ring.push_copy(other, other.claim())
    second = other.claim()
    assert [ring.push_copy(other, second) for _ in range(3)] == [1, 2, 0]  # room for a copy is kept
    assert (ring.undone, other.undone) == (2, 2)


def test_migrated_packet_is_not_withdrawn(disk):
    another = Disk(os.memfd_create("other"))
    other = another.ring
    other.push(b"migrated")
    ring = PacketRing(disk.fd, CAPACITY, claims_wait_for_sync=True)
    ring.push(b"new")
    assert ring.push_copy(other, other.claim()) == 2
    assert ring.withdraw_unsynced() == (1, 1, 3)
    ring.mark_synced(ring.tail_position)
    assert [packet.body for packet in drain(ring)] == [b"migrated"]


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
