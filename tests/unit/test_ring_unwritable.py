"""A packet ring whose file takes no writes: it is opened and emptied all the same, and afterwards all is well."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from textwrap import dedent

import pytest
from ring_disk import CAPACITY, MARK, MARKS, NUMBER, RECORD, SMALLEST, Disk, assert_in_order, drain, redirect
from support import files_end_at

from fastdist._core import HEADER_SIZE, DamagedError, PacketRing, file_size

PAGE = 4096


def made(capacity=CAPACITY):
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(capacity))
    return fd, PacketRing(fd, capacity)


def test_ring_opens_while_writes_fail(disk):
    """What is in it is delivered, nothing is pushed, and it takes packets when it can be written to again."""
    disk.fill()
    with files_end_at(0):
        ring = disk.reopen()
        assert [packet.body for packet in drain(ring)] == [packet.body for packet in disk.packets()]
        with pytest.raises(OSError, match="File too large"):
            ring.push(b"refused")
        with pytest.raises(OSError, match="File too large"):
            ring.try_to_write()
        for handle in range(1, ring.claimed + 1):
            ring.done(handle)
        assert (ring.undone, ring.corrupt) == (0, 0)
    ring.try_to_write()
    assert_in_order(PacketRing(disk.fd), [])


@pytest.mark.parametrize("relative", [0, 90])
def test_unwritten_gaps_are_kept_in_mind(disk, relative):
    """A damaged packet is lost and counted once, also if that cannot be written down."""
    disk.fill()
    hurt = [place for place in disk.places if not place.done and place.payload > relative - RECORD][1::3]
    for place in hurt:
        os.pwrite(disk.fd, b"\xee", place.byte(relative))
    heard = []
    with files_end_at(0):
        ring = disk.reopen()
        ring.on_damage = lambda *found: heard.append(found)
        assert ring.corrupt == len(hurt) > 2
        assert drain(ring) == disk.packets(without=hurt)
        for handle in range(1, ring.claimed + 1):
            ring.done(handle)
    assert (ring.undone, ring.undone_bytes, ring.corrupt, heard) == (0, 0, len(hurt), [])
    ring.write_out()
    ring.push(b"later")
    found = PacketRing(disk.fd, private=True)
    assert (found.corrupt, found.damage) == (0, [])
    assert [packet.body for packet in drain(found)] == [b"later"]


def test_damage_found_while_writes_fail(disk):
    for number in range(12):
        disk.push(bytes([65 + number]) * 200)
    handles = [disk.ring.claim() for _ in range(4)]
    disk.ring.forget_kept()
    for place in (disk.places[1], disk.places[8]):
        os.pwrite(disk.fd, b"\xee", place.byte(0))
    with files_end_at(0):
        with pytest.raises(DamagedError):
            disk.ring.packet(handles[1])
        disk.ring.discard(handles[1])
        rest = drain(disk.ring)
    hurt = (disk.places[1], disk.places[8])
    assert [disk.ring.packet(handle) for handle in (handles[0], *handles[2:])] + rest == disk.packets(without=hurt)
    disk.ring.try_to_write()
    found = PacketRing(disk.fd, private=True)
    assert (found.damage, found.undone) == ([], 10)


@pytest.mark.parametrize("count", [5000, 8000])
def test_no_mark_is_given_up(count):
    """More than could be listed one by one: neither is one delivered again, nor one lost."""
    capacity = 1 << 20
    fd, ring = made(capacity)
    for number in range(count):
        assert ring.push(b"%d" % number)
    handles = [ring.claim() for _ in range(count)]
    rng = random.Random(count)
    kept = set(rng.sample(range(count), count // 3))
    with files_end_at(HEADER_SIZE + capacity):  # the marks are behind it
        for number, handle in enumerate(handles):
            ring.count_attempt(handle)
            if number not in kept:
                ring.done(handle)
        assert PacketRing(fd, private=True).undone == count
    ring.write_out()
    found = drain(PacketRing(fd, private=True))
    assert [packet.body for packet in found] == [b"%d" % number for number in sorted(kept)]
    assert {packet.attempts for packet in found} == {1}
    os.close(fd)


@pytest.mark.parametrize("size", [100, 20_000, 32_600])
def test_push_tells_what_is_wrong(tmp_path, size):
    disk = Disk(os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600))
    disk.go_round(CAPACITY - 10_000)

    def push_until_refused():
        while True:
            disk.ring.push(b"x" * size)
            disk.ring.done(disk.ring.claim())

    for cut in (0, HEADER_SIZE + 100):  # not even the header can be written
        with files_end_at(cut), pytest.raises(OSError, match="large") as caught:
            push_until_refused()
        assert caught.value.errno == errno.EFBIG


def test_lost_marks_end_no_process(tmp_path):
    """The file was cut: to touch its marks in a mapping would be a SIGBUS, as with a page that the disk cannot read."""
    script = f"""
        import os
        from fastdist._core import PacketRing
        file = open({str(tmp_path / "ring.fdq")!r}, "r+b")
        ring = PacketRing(file.fileno())
        handles = [ring.claim() for _ in range(2)]
        os.truncate(file.fileno(), {MARKS})
        ring.done(handles[0])
        ring.push_copy(ring, handles[1])
        ring.write_out()
    """
    disk = Disk(os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600))
    for body in (b"done", b"copied"):
        disk.push(body)
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)
    os.truncate(disk.fd, file_size(CAPACITY))
    assert [packet.body for packet in drain(PacketRing(disk.fd))] == [b"copied"] * 2


@pytest.mark.processes
def test_old_packets_take_bounded_memory():
    """Those of another ring, older than what came meanwhile, of which there is always one that waits."""
    script = """
        import os
        from pathlib import Path
        from fastdist._core import PacketRing, file_size
        fd = os.memfd_create("ring")
        os.ftruncate(fd, file_size(1 << 20))
        ring = PacketRing(fd, 1 << 20)
        newest = 10**18
        ring.push(b"", accepted_ns=newest)
        ring.done(ring.claim())
        ring.push(b"", accepted_ns=1)
        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        for turn in range(2, 200_000):
            if turn == 20_000:
                before = resident()
            ring.push(b"", accepted_ns=turn)
            ring.done(ring.claim())
        assert ring.oldest_ns == turn, ring.oldest_ns
        print(resident() - before)
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 750_000


# ---- after a sync that failed


class Traffic:
    """Packets that are pushed, sent, and done in any order; ``waiting`` are those that are not done."""

    def __init__(self, ring, seed):
        self.ring, self.rng = ring, random.Random(seed)
        self.waiting, self.claimed = {}, {}

    def push(self):
        body = self.rng.randbytes(self.rng.choice([0, 100, 900, 5000]))
        try:
            sequence = self.ring.push(body)
        except OSError as error:
            if error.errno != errno.EBUSY:  # it would be where is being written
                raise
        else:
            self.waiting |= {sequence: body} if sequence else {}

    def go_on(self):
        self.push()
        for _ in range(self.rng.randrange(3)):
            if handle := self.ring.claim():
                self.claimed[handle] = self.ring.packet(handle)
        while len(self.claimed) > 20:
            handle = self.rng.choice(sorted(self.claimed))
            packet = self.claimed.pop(handle)
            assert self.waiting.pop(packet.sequence) == packet.body
            self.ring.done(handle)


@pytest.mark.parametrize("seed", range(10))
def test_ring_is_used_while_written_again(tmp_path, seed):
    """In another thread, again and again. The file has it all afterwards."""
    capacity = 1 << 19
    fd = os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, file_size(capacity))
    ring = PacketRing(fd, capacity)
    traffic = Traffic(ring, seed)
    for _ in range(8):
        enough = threading.Event()

        def write(span, enough=enough):
            while not enough.is_set():
                ring.go_on_writing_again(span)

        thread = threading.Thread(target=write, args=(ring.begin_writing_again(),))
        thread.start()
        for _ in range(400):
            traffic.go_on()
        enough.set()
        thread.join()
        ring.end_writing_again()
        for _ in range(200):
            traffic.go_on()
        found = PacketRing(fd, private=True)
        assert found.damage == []
        assert {packet.sequence: packet.body for packet in drain(found)} == traffic.waiting
    os.close(fd)


@pytest.mark.parametrize("seed", range(5))
def test_marks_made_meanwhile_are_written(seed):
    """The kernel had taken all for written that is not on the disk, which is another file here."""
    rng = random.Random(seed)
    disk = Disk(os.memfd_create("ring"))
    disk.fill(packets=40, sizes=(0, 100, 500, 900), start=CAPACITY - 20_000)
    other = os.memfd_create("disk")
    os.pwrite(other, bytes(HEADER_SIZE) + disk.save().image[HEADER_SIZE:MARKS] + bytes(CAPACITY // SMALLEST * 8), 0)
    cache = redirect(disk.fd, other)
    disk.ring.forget_synced()
    span = disk.ring.begin_writing_again()
    before, after = threading.Thread(target=disk.ring.go_on_writing_again, args=(span,)), []
    before.start()
    for handle, place in zip(disk.handles, list(disk.places), strict=True):
        if not place.done and rng.random() < 0.5:
            disk.ring.done(handle)
            after.append(place)
    before.join()
    disk.ring.end_writing_again()
    header = os.pread(cache, HEADER_SIZE, 0)
    os.pwrite(other, header[:72], 0)  # what never changes was not lost
    os.pwrite(other, header[:72], 32768)
    assert_in_order(PacketRing(other, private=True), disk.packets(without=after))
    os.close(redirect(disk.fd, cache))
    os.close(cache)
    os.close(other)


def test_pages_of_marks_are_rewritten_whole():
    """Where the disk cannot read a page the kernel can write no part of it: no sync would succeed any more."""
    capacity, count = 1 << 20, 1500
    fd, ring = made(capacity)
    start, end = HEADER_SIZE + capacity, file_size(capacity)
    for number in range(count):
        assert ring.push(b"%d" % number)
        if number == count // 2:
            ring.mark_synced(ring.tail_position)
    for _ in range(count):
        ring.count_attempt(ring.claim())
    marks = os.pread(fd, end - start, start)
    other = os.memfd_create("disk")
    os.ftruncate(other, end)
    cache = redirect(fd, other)
    ring.write_again()
    again = os.pread(other, end - start, start)
    written = [page for page in range(0, len(again), PAGE) if any(again[page : page + PAGE])]
    assert 2 <= len(written) < len(again) // PAGE
    assert [again[page : page + PAGE] for page in written] == [marks[page : page + PAGE] for page in written]
    os.close(redirect(fd, cache))
    os.close(cache)
    os.close(other)


def mark_in(table, number):
    at = number * MARK % len(table)
    return table[at : at + MARK]


@pytest.mark.parametrize("cut", ["killed", "power"])
def test_torn_runs_of_marks_lose_nothing(cut):
    """What could not be written for a time is written in runs of pages, and of these only a part."""
    capacity, count = 8 << 20, 40_000
    fd, ring = made(capacity)
    start, end, rng = HEADER_SIZE + capacity, file_size(capacity), random.Random(1)
    for number in range(count):
        assert ring.push(b"%d" % number)
    ring.mark_synced(ring.tail_position)
    first = int.from_bytes(os.pread(fd, 8, HEADER_SIZE + NUMBER), "little")
    before = os.pread(fd, end - start, start)
    sent = {number: ring.claim() for number in range(count)}
    sent = {number: sent[number] for number in rng.sample(range(count), 2000)}
    done = set(rng.sample(sorted(sent), 1000))
    with files_end_at(start):
        for number, handle in sent.items():
            ring.count_attempt(handle)
            if number in done:
                ring.done(handle)
    ring.write_out()
    after = os.pread(fd, end - start, start)
    for _ in range(5):
        if cut == "killed":  # within a page, and within a mark
            torn = rng.randrange(len(after))
            table = after[:torn] + before[torn:]
        else:
            pages = range(0, len(after), PAGE)
            table = b"".join(rng.choice([before, after])[page : page + PAGE] for page in pages)
        os.pwrite(fd, table, start)
        found = {int(packet.body): packet.attempts for packet in drain(PacketRing(fd, private=True))}
        written = {number for number in sent if mark_in(table, first + number) == mark_in(after, first + number)}
        assert found.keys() == set(range(count)) - (done & written)
        assert {number for number, attempts in found.items() if attempts} == written - done
    os.close(fd)
