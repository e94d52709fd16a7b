"""The packet ring where writes, syncs and reads fail, where its file changes under it, and after power cuts."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from textwrap import dedent

import pytest
from ring_disk import (
    BODY_LENGTH,
    CAPACITY,
    COPIES,
    HEADER,
    MARK,
    MARKS,
    RECORD,
    SMALLEST,
    Disk,
    assert_in_order,
    drain,
    memfd,
    redirect,
)
from support import files_end_at

from fastdist._core import HEADER_SIZE, DamagedError, PacketRing, file_size

SIZE = file_size(CAPACITY)
PAGE = 4096
EIO = f"Input/output error (errno {errno.EIO})"
# An error of the disk: pread of what overlaps a range that FAULTS names ("first-last,...") fails, and to touch its
# pages in a mapping ends the process.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static int is_faulty(off_t offset, size_t n) {
    const char *at = getenv("FAULTS");
    long first, last;
    int used;
    while (at && sscanf(at, "%ld-%ld%n", &first, &last, &used) == 2) {
        if (offset <= last && offset + (off_t)n > first)
            return 1;
        at += used;
        if (*at == ',')
            at++;
    }
    return 0;
}

ssize_t pread(int fd, void *room, size_t n, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "pread");
    if (is_faulty(offset, n))
        return errno = EIO, -1;
    return real(fd, room, n, offset);
}

void *mmap(void *place, size_t n, int protection, int flags, int fd, off_t offset) {
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "mmap");
    char *mapped = real(place, n, protection, flags, fd, offset);
    if (fd < 0 || mapped == MAP_FAILED || !getenv("FAULTS"))
        return mapped;
    for (size_t at = 0; at < n; at += 4096)
        if (is_faulty(offset + at, 4096) && mprotect(mapped + at, 4096, PROT_NONE))
            abort();
    return mapped;
}

void *mmap64(void *place, size_t n, int protection, int flags, int fd, off64_t offset) {
    return mmap(place, n, protection, flags, fd, offset);
}

ssize_t pread64(int fd, void *room, size_t n, off64_t offset) { return pread(fd, room, n, offset); }
"""


# ---- power cuts that take the newest header


def age(disk, headers, count, size=500):
    """Let the ring go on, with the header on the disk as it was: what was written since is there all the same."""
    for _ in range(count):
        assert disk.ring.push(bytes(size), f"later-{disk.ring.next_sequence_number}")
        disk.ring.done(disk.ring.claim())
    disk.save()
    disk.image = headers + disk.image[HEADER_SIZE:]


@pytest.mark.parametrize("count", [0, 1, 30, 90, 105, 112, 200, 250])
def test_old_header_with_newer_data_is_sound(disk, count):
    """Of laps that a later one has overwritten nothing counts any more, and nothing of it is missed."""
    disk.fill()
    for handle, place in zip(disk.handles, disk.places, strict=True):
        if not place.done:
            disk.ring.done(handle)
    disk.ring.mark_synced(disk.ring.tail_position)
    age(disk, disk.save().image[:HEADER_SIZE], count)
    ring = disk.open()
    assert (ring.corrupt, ring.damage, ring.notes) == (0, [], [])
    drain(ring)
    assert_in_order(disk.reopen(), drain(disk.reopen()))


@pytest.mark.parametrize("seed", range(20))
def test_leftovers_of_a_power_cut_are_unseen(seed):
    """Records and marks that the header does not know of lie where the successor's records come to lie."""
    disk = Disk(os.memfd_create("ring"))
    rng = random.Random(seed)
    headers = disk.save().image[:HEADER_SIZE]
    first = disk.image[:PAGE]
    age(disk, headers, rng.randrange(20, 100), size=rng.choice([50, 500]))
    lost = HEADER_SIZE  # the page that the first records were on
    ring = disk.open((lost, bytes(PAGE)))
    assert first[:HEADER] == headers[:HEADER]
    drain(ring)
    for handle in range(1, ring.claimed + 1):
        ring.done(handle)
    bodies = []
    for number in range(rng.randrange(1, 60)):
        bodies.append(b"%d" % number * rng.choice([1, 50, 100]))
        assert ring.push(bodies[-1])
        successor = PacketRing(disk.fd, private=True)  # had the process been killed here
        assert (successor.corrupt, successor.damage) == (0, [])
        assert [packet.body for packet in drain(successor)] == bodies


@pytest.mark.parametrize("state", ["done", "attempted"])
def test_left_over_mark_counts_for_no_other(state):
    """The same place in the file, the same place in the lap: but the record is another."""
    disk = Disk(os.memfd_create("ring"))
    empty = disk.save().image
    disk.push(b"lost in a power cut")
    handle = disk.ring.claim()
    disk.ring.count_attempt(handle)
    if state == "done":
        disk.ring.done(handle)
    marks = disk.save().image[MARKS:]
    assert any(marks)
    ring = disk.image = empty
    ring = disk.open((MARKS, marks))
    ring.push(b"accepted by the successor")
    (packet,) = drain(PacketRing(disk.fd))
    assert (packet.body, packet.attempts) == (b"accepted by the successor", 0)


# ---- writes that fail


@pytest.mark.parametrize("size", [100, 3000, 32_000])
def test_unwritten_packet_was_never_there(tmp_path, size):
    disk = Disk(os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600))
    disk.push(b"before")
    sequence, used = disk.ring.next_sequence_number, disk.ring.used
    for cut in (0, 40, RECORD, RECORD + 60, RECORD + size - 1):
        with files_end_at(HEADER_SIZE + used + cut), pytest.raises(OSError, match=r"large|output"):
            disk.ring.push(b"x" * size, "refused")
        assert (disk.ring.next_sequence_number, disk.ring.used, disk.ring.undone) == (sequence, used, 1)
        successor = PacketRing(disk.fd, private=True)
        assert (successor.damage, successor.notes) == ([], [])
        assert [packet.body for packet in drain(successor)] == [b"before"]
    for number in range(20):
        disk.push(b"after %d" % number)
        successor = PacketRing(disk.fd, private=True)
        assert successor.damage == []
        assert_in_order(successor, disk.packets())


def test_one_writable_header_is_enough(tmp_path):
    disk = Disk(os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600))
    disk.fill()
    with files_end_at(COPIES[1]):
        disk.ring.mark_synced(disk.ring.tail_position)
    assert_in_order(PacketRing(disk.fd), disk.packets())


def test_unwritten_mark_is_written_later():
    disk = Disk(os.memfd_create("ring"))
    disk.push(b"delivered while the disk failed")
    with files_end_at(MARKS):
        disk.ring.done(disk.ring.claim())
    assert PacketRing(disk.fd, private=True).undone == 1
    disk.ring.write_out()
    assert PacketRing(disk.fd, private=True).undone == 0


# ---- syncs that fail


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("known", [True, False])
def test_failed_sync_writes_all_again(seed, known):
    """The kernel takes pages for written that are not: the disk (here another file) has any of them as before."""
    rng = random.Random(seed)
    disk = Disk(os.memfd_create("ring"))
    blocks = [slice(at, at + PAGE) for at in range(0, SIZE, PAGE)]
    states = [disk.save().image]
    disk.fill(packets=40, sizes=(0, 100, 500, 900), start=CAPACITY - 20_000, known=known)
    states.append(disk.image)
    for handle, place in zip(disk.handles, list(disk.places), strict=True):
        if not place.done and rng.random() < 0.3:
            disk.ring.done(handle)
            disk.places.remove(place)
    for _ in range(5):
        disk.push(rng.randbytes(300))
    disk.save()
    other = os.memfd_create("disk")
    old = [rng.choice(states) if rng.random() < 0.7 else disk.image for _ in blocks]
    os.pwrite(other, b"".join(image[block] for image, block in zip(old, blocks, strict=True)), 0)
    cache = redirect(disk.fd, other)  # it is written there now, and read from the page cache still
    disk.ring.forget_synced()
    disk.ring.write_again()
    found = PacketRing(other, private=True)
    assert found.damage == []
    assert_in_order(found, disk.packets())
    os.close(redirect(disk.fd, cache))
    os.close(cache)
    os.close(other)


# ---- memory that changes under a ring in use


def damaged(disk):
    """Return the list to which the ring's ``on_damage`` adds what it is told."""
    heard = []
    disk.ring.on_damage = lambda offset, what, lost, _sequence: heard.append((offset, what, lost))
    return heard


def in_use(disk, count=12):
    """Push packets, and have the first three claimed."""
    for number in range(count):
        disk.push(bytes([65 + number]) * 200)
    return damaged(disk), [disk.ring.claim() for _ in range(3)]


def change(disk, offset, data=b"\xee"):
    """Damage what was written so long ago that it is not in memory any more."""
    disk.ring.forget_kept()
    os.pwrite(disk.fd, data, offset)


def test_damage_hides_nothing_kept_in_memory():
    """Large packets are not kept in memory: between them lie small ones that can still be delivered."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(1 << 20))
    ring, heard = PacketRing(fd, 1 << 20), []
    ring.on_damage = lambda offset, what, lost, _sequence: heard.append((offset, what, lost))
    sizes = [40_000, *[200] * 5, 40_000, *[200] * 7]
    assert all(ring.push(bytes([size % 251]) * size) for size in sizes)
    os.pwrite(fd, bytes(1 << 20), HEADER_SIZE)
    assert [len(packet.body) for packet in drain(ring)] == [200] * 12
    assert sum(lost for _, _, lost in heard) == 2
    assert ring.undone == 12
    os.close(fd)


def test_damage_is_searched_only_once(disk):
    """It may be very much, and is in the way whenever it is asked for the oldest packet while nothing is claimed."""
    for number in range(12):
        disk.push(bytes([65 + number]) * 200)
    disk.save()
    first, last = disk.places[0].offset, disk.places[9].offset
    change(disk, first, bytes(last - first))
    oldest = disk.ring.oldest_ns
    assert oldest == disk.places[9].packet.accepted_ns
    again = disk.places[5]
    os.pwrite(disk.fd, disk.image[again.offset : again.offset + again.size], again.offset)  # a search would find it
    assert disk.ring.oldest_ns == oldest
    heard = damaged(disk)
    assert drain(disk.ring) == disk.packets()[9:]
    assert heard == [(first, f"{last - first} bytes that are no record", 9)]


@pytest.mark.parametrize("copies", [COPIES[:1], COPIES[1:], COPIES])
def test_lost_headers_are_written_again(disk, copies):
    """With the next sync at the latest: else what was accepted since could not be read by a successor."""
    disk.push(b"before")
    for copy in copies:
        os.pwrite(disk.fd, bytes(HEADER), copy)
    disk.push(b"after")
    disk.ring.mark_synced(disk.ring.tail_position)
    found = PacketRing(disk.fd, private=True)
    assert found.damage == []
    assert_in_order(found, disk.packets())


def test_damaged_packet_is_known_by_claim(disk):
    disk.push(b"claimed " * 100)
    handle = disk.ring.claim()
    before = disk.ring.sequence(handle), disk.ring.oldest_ns
    change(disk, disk.places[0].offset, b"\xff" * RECORD)
    assert (disk.ring.sequence(handle), disk.ring.oldest_ns) == before


def test_what_was_written_last_is_undamaged(disk):
    """It is delivered from memory, whatever happens to the file."""
    for number in range(20):
        disk.push(bytes([65 + number]) * (200 if number % 2 else 3000))
    claimed = [disk.ring.claim() for _ in range(10)]
    for place in disk.places:
        os.pwrite(disk.fd, b"\xee" * place.size, place.offset)
    found = [disk.ring.packet(handle) for handle in claimed] + drain(disk.ring)
    assert found == disk.packets()


@pytest.mark.parametrize("relative", [0, 4, 8, 16, 24, BODY_LENGTH, RECORD - 1])
def test_damaged_heads_are_reported(disk, relative):
    heard, handles = in_use(disk)
    hurt = disk.places[3], disk.places[4], disk.places[8]
    for place in hurt:
        change(disk, place.byte(relative), bytes([os.pread(disk.fd, 1, place.byte(relative))[0] ^ 0x55]))
    found = [disk.ring.packet(handle) for handle in handles] + drain(disk.ring)
    assert found == disk.packets(without=hurt)
    assert [(offset, what) for offset, what, _ in heard] == [
        (hurt[0].offset, f"{hurt[0].size + hurt[1].size} bytes that are no record"),
        (hurt[2].offset, f"{hurt[2].size} bytes that are no record"),
    ]
    assert sum(lost for _, _, lost in heard) == 3
    assert (disk.ring.undone, disk.ring.corrupt) == (9, 2)
    for handle in range(1, disk.ring.claimed + 1):
        disk.ring.done(handle)
    assert (disk.ring.undone, disk.ring.undone_bytes, disk.ring.used) == (0, 0, 0)
    successor = PacketRing(disk.fd)
    assert (successor.damage, successor.undone) == ([], 0)


def test_page_of_zeros_costs_only_itself(disk):
    heard, handles = in_use(disk, count=60)
    change(disk, HEADER_SIZE + PAGE, bytes(PAGE))
    hurt = [place for place in disk.places if place.offset + place.size > HEADER_SIZE + PAGE]
    hurt = [place for place in hurt if place.offset < HEADER_SIZE + 2 * PAGE]
    found = []
    for handle in [*handles, *iter(disk.ring.claim, 0)]:
        try:
            found.append(disk.ring.packet(handle))
        except DamagedError:  # its head is on the page before
            disk.ring.discard(handle)
    assert found == disk.packets(without=hurt)
    assert sum(lost for _, _, lost in heard) == len(hurt)
    disk.push(b"behind it")
    assert disk.ring.packet(disk.ring.claim()).body == b"behind it"


def test_all_damage_is_counted_at_once():
    """To count is to go through the queue: that is done once, not for each of many places."""
    fd = memfd(1 << 20)
    ring, heard = PacketRing(fd, 1 << 20), []
    ring.on_damage = lambda offset, what, lost, _sequence: heard.append((offset, what, lost))
    assert all(ring.push(b"%d" % number) for number in range(6000))
    ring.forget_kept()
    hurt = set(random.Random(1).sample(range(10, 6000), 900))
    for number in hurt:
        os.pwrite(fd, b"\xee", HEADER_SIZE + number * SMALLEST)
    places = [number for number in sorted(hurt) if number - 1 not in hurt]
    assert [ring.packet(ring.claim()).body for _ in range(min(hurt))] == [b"%d" % number for number in range(min(hurt))]
    assert heard == []
    assert ring.claim()
    assert [offset for offset, _, _ in heard] == [HEADER_SIZE + number * SMALLEST for number in places]
    assert [lost for _, _, lost in heard] == [900] + [0] * (len(places) - 1)
    assert (ring.undone, ring.undone_bytes) == (5100, 5100 * SMALLEST)
    heard.clear()
    assert len(drain(ring)) == 5100 - min(hurt) - 1
    assert heard == []
    os.close(fd)


@pytest.mark.parametrize("relative", [0, BODY_LENGTH, RECORD, RECORD + 199])
def test_damaged_packet_is_never_claimed(disk, relative):
    heard, handles = in_use(disk)
    hurt = disk.places[1]
    change(disk, hurt.byte(relative))
    with pytest.raises(DamagedError):
        disk.ring.packet(handles[1])
    disk.ring.count_attempt(handles[1])
    disk.ring.discard(handles[1])
    assert heard == [(hurt.offset, "a damaged packet", 1)]
    assert disk.ring.undone == 11
    assert [disk.ring.packet(handle) for handle in (handles[0], handles[2])] + drain(disk.ring) == disk.packets(
        without=[hurt]
    )
    assert_in_order(PacketRing(disk.fd), disk.packets(without=[hurt]))


def test_lost_packets_are_named(disk):
    _, handles = in_use(disk)
    disk.ring.on_damage = lambda *found: sequences.append(found[3])
    everything, sequences = {place.packet.sequence for place in disk.places}, []
    assert disk.ring.missing(everything) == set()
    hurt = [disk.places[number] for number in (1, 6, 7)]
    for place in hurt:
        change(disk, place.byte(0))
    disk.ring.discard(handles[1])
    assert sequences == [hurt[0].packet.sequence]
    drain(disk.ring)
    assert sequences[1:] == [0], "these were not claimed"
    assert disk.ring.missing(everything) == {place.packet.sequence for place in hurt}
    disk.ring.done(handles[0])
    assert disk.ring.missing(everything) == {place.packet.sequence for place in (disk.places[0], *hurt)}


def test_damage_leaves_claimed_copies_alone(disk):
    """A claimed packet was moved behind unclaimed ones, and all between is damaged."""
    heard = damaged(disk)
    disk.push(b"moved", "held")
    held = disk.ring.claim()
    while (tail := disk.ring.tail_position) + SMALLEST == (disk.ring.push(bytes(1)), disk.ring.tail_position)[1]:
        disk.ring.done(disk.ring.claim())
    disk.ring.push(b"last", "last")
    change(disk, HEADER_SIZE + (tail + SMALLEST) % CAPACITY, bytes(40))
    assert [packet.id for packet in drain(disk.ring)] == ["last"]
    assert disk.ring.packet(held).body == b"moved"
    assert sum(lost for _, _, lost in heard) == 1
    assert disk.ring.undone == 2


def test_damaged_packet_is_not_migrated(disk):
    _, handles = in_use(disk)
    own = Disk(os.memfd_create("own"))
    change(disk, disk.places[0].byte(RECORD))
    with pytest.raises(DamagedError):
        own.ring.push_copy(disk.ring, handles[0])
    assert own.ring.push_copy(disk.ring, handles[1])
    assert [packet.body for packet in drain(own.ring)] == [disk.places[1].packet.body]


@pytest.mark.parametrize("content", [b"\0", b"\xff", b"\x51"])
def test_damaged_marks_in_use_cost_nothing(disk, content):
    """They are in memory, and written whole pages at a time."""
    disk.fill()
    ring = disk.open()
    change(disk, MARKS, content * (CAPACITY // SMALLEST * MARK))
    assert drain(ring) == disk.packets()
    for handle in range(1, ring.claimed + 1):
        ring.done(handle)
    assert ring.claim() == 0
    assert (ring.undone, ring.undone_bytes, ring.used) == (0, 0, 0)
    assert_in_order(PacketRing(disk.fd), [])


# ---- what cannot be read


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


def read_with_faults(shim, path, pages, act="", *, private=False):
    """Open the ring where these pages cannot be read; return what is said of it, and the names of the packets."""
    script = f"""
        import os
        from fastdist._core import PacketRing
        file = open({str(path)!r}, "r+b")
        ring = PacketRing(file.fileno(), private={private})
        names = []
        while handle := ring.claim():
            names.append(ring.packet(handle).sequence)
        print((ring.unreadable, ring.damage, names))
        {act}
    """
    faults = ",".join(f"{page}-{page + PAGE - 1}" for page in pages)
    environ = os.environ | {"LD_PRELOAD": str(shim), "FAULTS": faults}
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ring.fdq"


@pytest.fixture
def stored(path):
    return Disk(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)).fill(
        packets=64, sizes=(100, 300, 700), start=CAPACITY - 20_000
    )


@pytest.mark.processes
@pytest.mark.parametrize("private", [False, True])
def test_unreadable_pages_cost_what_is_there(shim, path, stored, private):
    pages = [HEADER_SIZE, HEADER_SIZE + PAGE, HEADER_SIZE + CAPACITY - 2 * PAGE]
    touched = [
        place for place in stored.places if any(place.byte(i) // PAGE * PAGE in pages for i in range(0, place.size, 8))
    ]
    assert len(touched) > 10
    image = path.read_bytes()
    unreadable, damage, names = read_with_faults(shim, path, pages, private=private)
    assert sorted(unreadable) == [(page, PAGE, errno.EIO) for page in pages]
    assert damage
    assert names == [packet.sequence for packet in stored.packets(without=touched)]
    if private:
        assert path.read_bytes() == image


@pytest.mark.processes
def test_unreadable_marks_repeat_at_most(shim, path, stored):
    unreadable, damage, names = read_with_faults(shim, path, [MARKS])
    assert unreadable == [(MARKS, PAGE, errno.EIO)]
    assert damage == [(MARKS, f"{PAGE} bytes that cannot be read: {EIO}")]
    assert names == [place.packet.sequence for place in stored.places]


@pytest.mark.processes
@pytest.mark.parametrize("copy", COPIES)
def test_unreadable_copy_costs_nothing(shim, path, stored, copy):
    unreadable, damage, names = read_with_faults(shim, path, [copy])
    assert unreadable == [(copy, PAGE, errno.EIO)]
    assert damage == [(copy, f"header copy that cannot be read: {EIO}")]
    assert names == [packet.sequence for packet in stored.packets()]


@pytest.mark.processes
def test_unreadable_ring_takes_nothing(shim, path, stored):
    """What was written there could not be read again."""
    assert stored.places
    act = dedent("""
        try:
            ring.push(b"x")
        except OSError:
            pass
        else:
            raise AssertionError
        for handle in range(1, ring.claimed + 1):
            ring.done(handle)
        assert ring.undone == 0, ring.undone
    """).replace("\n", "\n        ")
    read_with_faults(shim, path, [HEADER_SIZE + PAGE], act)
