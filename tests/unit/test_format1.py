"""Rings of format 1 are read as the version that wrote them would have, from files that it has written.

``tests/data/format1/make.py`` has made them, and says how.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdist._core import PacketRing, RingError, checksum, file_size
from fastdist.errors import StartError
from fastdist.storage import format1, ring_files
from fastdist.storage.directory import QueueFolder
from fastdist.storage.inspect import look

DATA = Path(__file__).parents[1] / "data" / "format1"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))
COPIES = (0, 32768)
HEADER_CHECKSUM = 12  # offset in a header
AREA = 65536  # where the records begin


class Case:
    """A file as it was written, or with some bytes changed, and what is known of it."""

    def __init__(self, name):
        self.image = gzip.decompress((DATA / f"{name}.fdq.gz").read_bytes())
        self.expected = json.loads((DATA / f"{name}.json").read_text())
        self.fd = os.memfd_create(name)
        os.pwrite(self.fd, self.image, 0)

    def patch(self, *patches):
        for offset, content in patches:
            os.pwrite(self.fd, content, offset)
        return self

    def content(self):
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)


@pytest.fixture
def case():
    made = []

    def open_case(name):
        made.append(Case(name))
        return made[-1]

    yield open_case
    for one in made:
        os.close(one.fd)


def described(packet):
    """Return a packet as the expected ones are."""
    body = {"body": hashlib.sha256(packet.body).hexdigest(), "length": len(packet.body)}
    names = ("id", "attempts", "accepted_ns", "messages", "emitter", "flags")
    return {name: getattr(packet, name) for name in names} | body


def in_order_of_ids(packets):
    return sorted(packets, key=lambda packet: packet["id"])


def damage(expected):
    return [tuple(entry) for entry in expected["damage"]]


def sealed(header, **fields):
    """Return a header with another version or capacity, and the checksum of that."""
    at = {"version": slice(8, 12), "capacity": slice(16, 24)}
    data = bytearray(header)
    for name, value in fields.items():
        where = at[name]
        data[where] = value.to_bytes(where.stop - where.start, "little", signed=True)
    data[HEADER_CHECKSUM : HEADER_CHECKSUM + 4] = bytes(4)
    data[HEADER_CHECKSUM : HEADER_CHECKSUM + 4] = checksum(bytes(data[:72])).to_bytes(4, "little")
    return bytes(data)


@pytest.fixture
def unreadable(monkeypatch):
    """Have reads of some pages of the file fail, as a damaged disk does."""
    pages, pread = set(), os.pread

    def failing(fd, size, offset):
        last = (offset + max(size, 1) - 1) // 4096
        if offset // 4096 in pages or (pages & set(range(offset // 4096, last + 1)) and failing.all_or_nothing):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        first = min((page for page in pages if page > offset // 4096), default=1 << 40)
        return pread(fd, min(size, first * 4096 - offset), offset)

    failing.all_or_nothing = False
    failing.pages = pages
    monkeypatch.setattr(os, "pread", failing)
    return failing


def test_checksum_is_crc32c():
    assert checksum(b"123456789") == 0xE3069283
    assert checksum(b"6789", checksum(b"12345")) == 0xE3069283
    assert checksum(b"") == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_its_version_recovers_is_read(case, name):
    file = case(name)
    expected = file.expected
    assert format1.is_format1(file.fd)
    ring = format1.read(file.fd)
    packets = [described(packet) for packet in ring.waiting()]
    assert in_order_of_ids(packets) == in_order_of_ids(expected["packets"])
    assert (ring.undone, ring.undone_bytes) == (expected["undone"], expected["undone_bytes"])
    assert ring.capacity == expected["capacity"]
    assert ring.corrupt == expected["corrupt"]
    cut_short = [(offset, what) for offset, what in ring.damage if what.startswith("cut short: ")]
    assert [entry for entry in ring.damage if entry not in cut_short] == damage(expected)
    assert ring.notes == [tuple(entry) for entry in expected["notes"]]
    assert bool(cut_short) == (len(file.image) < AREA + ring.capacity)
    assert ring.undone_bytes <= ring.used <= ring.capacity
    assert file.content() == file.image, "nothing is changed"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "moved-copy-damaged"])
def test_packets_come_in_order_of_the_ring(case, name):
    file = case(name)
    assert [described(packet) for packet in format1.read(file.fd).waiting()] == file.expected["packets"]


def test_packet_of_a_lost_copy_comes_last(case):
    file = case("moved-copy-damaged")
    first, *others = file.expected["packets"]
    assert [described(packet) for packet in format1.read(file.fd).waiting()] == [*others, first]


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_what_a_push_takes(case, name):
    file = case(name)
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(1 << 20))
    ring = PacketRing(fd, 1 << 20)
    for packet in format1.read(file.fd).waiting():
        assert ring.push(**packet._asdict())
    packets = [described(packet) for packet in ring.waiting()]
    os.close(fd)
    assert in_order_of_ids(packets) == in_order_of_ids(file.expected["packets"])


@pytest.mark.parametrize("window", [8, 64, 520, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_size_of_the_window_changes_nothing(case, name, window, monkeypatch):
    file = case(name)
    ring = format1.read(file.fd)
    packets = list(ring.waiting())
    monkeypatch.setattr(format1, "_WINDOW", window)
    again = format1.read(file.fd)
    assert list(again.waiting()) == packets
    assert (again.damage, again.corrupt) == (ring.damage, ring.corrupt)


# ---- what is no ring of format 1


@pytest.mark.parametrize("content", [b"", b"fdring\r\n", bytes(131072), b"\xff" * 131072])
def test_anything_else_is_no_format_1(content):
    fd = os.memfd_create("other")
    os.pwrite(fd, content, 0)
    assert not format1.is_format1(fd)
    with pytest.raises(RingError, match="no intact ring header"):
        format1.read(fd)
    os.close(fd)


@pytest.mark.parametrize("copies", [COPIES[:1], COPIES[1:], COPIES])
def test_newer_format_is_not_format_1(case, copies):
    """Though it be one copy: a newer version may have been killed while it changed them."""
    file = case("plain")
    file.patch(*((copy, sealed(file.image[copy : copy + 72], version=2)) for copy in copies))
    assert not format1.is_format1(file.fd)


@pytest.mark.parametrize("capacity", [0, -65536, 1, 65544])
def test_capacities_no_ring_has_are_refused(case, capacity):
    file = case("plain")
    file.patch(*((copy, sealed(file.image[copy : copy + 72], capacity=capacity)) for copy in COPIES))
    with pytest.raises(RingError, match=f"{capacity} bytes, which no ring has"):
        format1.read(file.fd)


@pytest.mark.parametrize("capacity", [0, -65536, 1, 65544, 1 << 46])
def test_foreign_header_has_any_capacity(case, capacity):
    file = case("foreign-header")
    file.patch((0, sealed(file.image[:72], capacity=capacity)))
    assert [described(packet) for packet in format1.read(file.fd).waiting()] == file.expected["packets"]


@pytest.mark.parametrize("size", [104, 32768, 65536, 65537])
def test_file_without_records_is_damage_only(case, size):
    file = case("plain")
    os.ftruncate(file.fd, size)
    ring = format1.read(file.fd)
    assert list(ring.waiting()) == []
    assert (size, f"cut short: {AREA + ring.capacity - size} bytes are missing") in ring.damage
    assert ring.corrupt == 1
    assert ring.damage[-1] == (AREA, f"{ring.used} bytes that are no record")


# ---- what cannot be read


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_unreadable_page_costs_its_packets(case, unreadable, all_or_nothing):
    file = case("wrapped")
    unreadable.all_or_nothing = all_or_nothing
    lost = 0
    for page in range(AREA // 4096, len(file.image) // 4096):
        unreadable.pages.clear()
        file.patch((0, file.image[:AREA]), (page * 4096, bytes(4096)))
        zeroed = format1.read(file.fd)
        expected = list(zeroed.waiting())
        file.patch((0, file.image))
        unreadable.pages.add(page)
        ring = format1.read(file.fd)
        assert list(ring.waiting()) == expected
        assert ring.corrupt == zeroed.corrupt
        entry = (page * 4096, "cannot be read: Input/output error (errno 5)")
        assert [one for one in ring.damage if one != entry] == zeroed.damage
        assert ring.damage.count(entry) == 1
        lost += len(file.expected["packets"]) - len(expected)
    assert lost >= len(file.expected["packets"])


def test_unreadable_pages_are_one_damage(case, unreadable):
    file = case("plain")
    unreadable.pages |= set(range(16, 32))
    ring = format1.read(file.fd)
    assert list(ring.waiting()) == []
    what = "cannot be read: Input/output error (errno 5)"
    assert ring.damage == [(AREA, what), (AREA, f"{ring.used} bytes that are no record")]


@pytest.mark.parametrize("copy", COPIES)
def test_unreadable_copy_costs_nothing(case, unreadable, copy):
    file = case("plain")
    unreadable.pages.add(copy // 4096)
    assert format1.is_format1(file.fd)
    ring = format1.read(file.fd)
    assert [described(packet) for packet in ring.waiting()] == file.expected["packets"]
    assert ring.damage == [(copy, "cannot be read: Input/output error (errno 5)"), (copy, "header copy")]


def test_both_headers_unreadable_is_no_ring(case, unreadable):
    file = case("plain")
    unreadable.pages |= {0, 8}
    assert not format1.is_format1(file.fd)
    with pytest.raises(RingError, match="no intact ring header"):
        format1.read(file.fd)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_start_delivers_its_packets(tmp_path, name):
    """It is rewritten in the present format and migrated; a damaged file is kept as well."""
    image = gzip.decompress((DATA / f"{name}.fdq.gz").read_bytes())
    expected = json.loads((DATA / f"{name}.json").read_text())
    path = tmp_path / "ring-0.fdq"
    path.write_bytes(image)
    report = look(path).files[0]
    assert (report.packets, report.corrupt, report.error) == (expected["undone"], expected["corrupt"], None)
    folder = QueueFolder(tmp_path)
    folder.lock()
    folder.rings(1, 1 << 20)
    (old,) = folder.old_rings()
    ring = PacketRing(old.fd)
    found = [described(ring.packet(ring.claim())) for _ in range(ring.undone)]
    wanted = [packet | {"flags": 0} for packet in expected["packets"]]
    assert in_order_of_ids(found) == in_order_of_ids(wanted)
    assert ring.damage == []
    kept = list(tmp_path.glob("*.damaged-*"))
    assert [file.read_bytes() for file in kept] == ([image] if report.damage else [])


@pytest.mark.parametrize("name", ["plain", "damaged-body"])
def test_format_1_without_room_stays(tmp_path, monkeypatch, name):
    path = tmp_path / "ring-0.fdq"
    path.write_bytes(gzip.decompress((DATA / f"{name}.fdq.gz").read_bytes()))
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    folder = QueueFolder(tmp_path)
    folder.lock()
    with pytest.raises(StartError, match="cannot allocate"):
        folder.rings(1, 1 << 20)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock", "ring-0.fdq"]


def test_packet_that_does_not_fit_ends_start(tmp_path, monkeypatch):
    path = tmp_path / "ring-0.fdq"
    path.write_bytes(gzip.decompress((DATA / "plain.fdq.gz").read_bytes()))
    before = path.read_bytes()
    full = SimpleNamespace(push=lambda **_: 0)
    monkeypatch.setattr(ring_files, "PacketRing", lambda *_: full)
    folder = QueueFolder(tmp_path)
    folder.lock()
    with pytest.raises(StartError, match="do not fit"):
        folder.rings(1, 1 << 20)
    assert path.read_bytes() == before
