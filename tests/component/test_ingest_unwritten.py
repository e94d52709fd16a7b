"""Packets that cannot be written to the queue's file: 503 for those, 202 for all that were written before."""

from __future__ import annotations

import pytest
from ingest_harness import BODY, Service, keyed
from support import files_end_at

from fastdist._core import HEADER_SIZE, record_bytes

PAGE = 4096  # is written to its end
SMALL_RECORD = record_bytes(1, len(BODY))


def large(size: int) -> bytes:
    return b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * size)


# Is written by itself, and behind a small one ends with a page.
LARGE = large(40_000 + -(SMALL_RECORD + record_bytes(1, len(large(40_000)))) % PAGE)
LARGE_RECORD = record_bytes(1, len(LARGE))
DURABILITIES = pytest.mark.parametrize("fsync", [False, True], ids=["disk", "fsync"])


def service_of(fsync, **options) -> Service:
    return Service(fsync=fsync, disk=not fsync, **options)


@DURABILITIES
@pytest.mark.parametrize("fits", [0, 100, SMALL_RECORD, PAGE, PAGE + 100])
def test_read_that_is_written_in_part(fsync, fits):
    """The large packet has the small ones before it written, each is there or not, and answered so."""
    service = service_of(fsync)
    with files_end_at(HEADER_SIZE + fits):
        connection = service.ask(keyed("a") + keyed("b") + keyed("c", LARGE) + keyed("d"))
    written = ["a", "b", "d"] if fits >= PAGE else []
    service.sync()
    assert connection.statuses == [202 if key in written else 503 for key in "abcd"]
    assert (service.accepted, service.ring.undone, service.intake.held) == (len(written), len(written), 0)
    assert service.ring.next_sequence_number == len(written) + 1
    assert [packet.id for packet in service.packets()] == written


@DURABILITIES
def test_packets_written_before_are_accepted(fsync):
    service = service_of(fsync)
    with files_end_at(HEADER_SIZE + SMALL_RECORD + LARGE_RECORD):
        connection = service.ask(keyed("a") + keyed("b", LARGE) + keyed("c") + keyed("d"))
    service.sync()
    assert connection.statuses == [202, 202, 503, 503]
    assert service.accepted == 2
    assert [packet.id for packet in service.packets()] == ["a", "b"]


def test_failed_write_rejects_no_earlier_one():
    service = Service(fsync=True)
    connection = service.ask(keyed("a"))
    with files_end_at(HEADER_SIZE + SMALL_RECORD):
        connection.send(keyed("b"))
        other = service.ask(keyed("c"))
    assert other.statuses == [503]
    connection.send(keyed("d"))
    assert connection.written == b""
    service.sync()
    assert (connection.statuses, other.statuses) == ([202, 503, 202], [503])
    assert service.accepted == 2
    assert [packet.id for packet in service.packets()] == ["a", "d"]


def test_rejection_waits_for_no_others():
    """What cannot be written is known at once; only what comes before it on its connection has to wait for the sync."""
    service = Service(fsync=True)
    first, behind = service.ask(keyed("a")), service.ask(keyed("b"))
    with files_end_at(HEADER_SIZE + service.ring.used):
        free = service.ask(keyed("c") + keyed("d"))
        behind.send(keyed("e"))
    assert free.statuses == [503, 503]
    assert (first.written, behind.written) == (b"", b"")
    free.send(keyed("g"))
    service.sync()
    assert (first.statuses, behind.statuses, free.statuses) == ([202], [202, 503], [503, 503, 202])
    assert [packet.id for packet in service.packets()] == ["a", "b", "g"]
    assert service.intake.held == 0


def test_done_stays_done_without_marks():
    """A packet that was withdrawn, or delivered from a copy, is behind the cursor: its mark has to be known."""
    service = Service(fsync=True)
    connection = service.ask(keyed("a") + keyed("b"))
    with files_end_at(HEADER_SIZE + service.ring.capacity):  # the marks are behind it
        service.ring.withdraw_unsynced()
        connection.send(keyed("c"))
        service.sync()
        assert [packet.id for packet in service.packets()] == ["c"]
    assert service.ring.undone == 0


@pytest.mark.parametrize("filled", range(200, 490, 2))
def test_failed_move_rejects_unwritten_ones(filled):
    """To make room for a packet, one at the head is to be copied behind those of the same read: these come first."""
    service = Service(disk=True, capacity=65536)
    for _ in range(filled):
        service.ring.push(b"", packet_id=bytes(16))
    handles = [service.ring.claim() for _ in range(filled)]
    for handle in handles[1:]:
        service.ring.done(handle)
    with files_end_at(HEADER_SIZE):
        connection = service.ask(b"".join(keyed(f"k{number}") for number in range(20)))
    assert set(connection.statuses) == {503}
    assert len(connection.statuses) == 20
    assert (service.accepted, service.ring.undone) == (0, 1)
    connection.send(keyed("later"))
    assert [packet.id for packet in service.packets()] == ["later"] * (connection.statuses[-1] == 202)
