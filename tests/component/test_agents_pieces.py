"""A large batch is pushed in pieces, between which others are served, and yet stored whole or not at all."""

from __future__ import annotations

import collections
from unittest import mock

import orjson
import pytest
from agents_harness import Sent, ask, connect
from hypothesis import given
from hypothesis import strategies as st
from ingest_harness import Service, keyed, post
from msgspec.structs import replace
from support import files_end_at

from fastdist._core import HEADER_SIZE, PacketRing
from fastdist.http.responses import problem
from fastdist.protocols import base
from fastdist.worker.ingest import IngestProtocol

DURABILITIES = pytest.mark.parametrize("durability", ["memory", "disk", "fsync"])
CAPACITY = 2**20


@pytest.fixture(autouse=True, scope="module")
def one_slice():
    """A conversion takes one slice, however busy the machine is: what is here goes by turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdist.protocols.base.SLICE_NS", 10**18)
        yield


class Pieces:
    """A service that pushes batches in pieces of some bytes, what emitters sent to it, and what was claimed of that."""

    def __init__(self, durability: str, piece: int = 1, capacity: int = CAPACITY) -> None:
        self.durability = durability
        self.service = Service(capacity=capacity, disk=durability == "disk", fsync=durability == "fsync")
        self.service.intake.piece_bytes = piece
        self.intake, self.ring = self.service.intake, self.service.ring
        self.batches, self.packets = [], []  # (connection, texts of the records or None), a packet each of the others
        self.claimed = collections.Counter()
        self.handles = {}

    def batch(self, count: int, size: int = 0, *headers: str):
        """Send a batch of so many packets, which is converted at once; the loop has no turn."""
        number = len(self.batches)
        names = [f"b{number}r{each}" for each in range(count)]
        body = b"\n".join(orjson.dumps({"host": name, "message": "x" * size}) for name in names)
        request = Sent("/ingest", body, ("Content-Type: application/x-ndjson",), 200).request(*headers)
        connection = connect(self.service)
        self.batches.append((connection, names))
        with mock.patch.object(base, "SLICE_NS", 10**15):
            connection.protocol.data_received(request)
        return connection

    def packet(self):
        """Send a packet of another emitter."""
        key = f"p{len(self.packets)}"
        connection = connect(self.service)
        self.packets.append((connection, key))
        connection.protocol.data_received(keyed(key))
        return connection

    def claim(self) -> None:
        """Claim all there is, and keep it."""
        while handle := self.ring.claim():
            packet = self.ring.packet(handle)
            name = packet.id if len(packet.id) < 36 else orjson.loads(packet.body)["emitterId"]
            self.claimed[name] += 1
            self.handles[handle] = name
        for _, names in self.batches:
            assert len({self.claimed[name] for name in names}) <= 1, "a part of a batch was claimed"

    def settle(self) -> None:
        for handle in self.handles:
            self.ring.done(handle)
        self.handles.clear()

    def sync(self) -> None:
        self.ring.mark_synced(self.ring.sync_position)
        self.intake.synced()

    def fail_to_sync(self) -> None:
        packets, _, _ = self.ring.withdraw_unsynced()
        self.service.counters.add("withdrawn", packets)
        fault = problem(503, "the packet could not be written to disk", headers=b"Retry-After: 1\r\n")
        answer = fault.status, "Service Unavailable", fault.headers, fault.body
        rejected = self.intake.not_stored(self.ring.synced_position, *answer)
        self.service.counters.add("storage", rejected)

    def turn(self) -> None:
        self.service.turn()

    def finish(self) -> None:
        """Let all that is under way come to its end, and compare what was answered with what can be claimed."""
        while self.service.turns:
            self.turn()
        self.sync()
        self.claim()
        self.settle()
        accepted = 0
        for connection, names in self.batches:
            stored = connection.statuses == [200]
            assert stored or connection.statuses == [503]
            assert [self.claimed[name] for name in names] == [int(stored)] * len(names)
            accepted += len(names) if stored else 0
        for connection, key in self.packets:
            stored = connection.statuses == [202]
            assert stored or connection.statuses == [503]
            assert self.claimed[key] == int(stored)
            accepted += stored
        assert self.service.accepted == accepted
        assert (self.ring.undone, self.ring.undone_bytes, self.intake.bodies, self.intake.held) == (0, 0, 0, 0)
        assert self.ring.used == 0
        withdrawn = self.service.counters.get("withdrawn")
        assert self.ring.next_sequence_number == 1 + accepted + withdrawn
        answered = [connection.statuses for connection, _ in [*self.batches, *self.packets]]
        assert self.service.rejected.get("storage", 0) == answered.count([503])


STEPS = st.one_of(
    st.tuples(st.just("batch"), st.integers(1, 9), st.integers(0, 2000)),
    st.sampled_from([("turn",), ("turn",), ("turn",), ("packet",), ("claim",), ("settle",), ("sync",)]),
    st.tuples(st.just("fail"), st.integers(0, 40_000)),
)


@DURABILITIES
@given(st.lists(STEPS, max_size=25), st.sampled_from([1, 700, 5000]))
def test_batch_is_stored_whole_or_not_at_all(durability, steps, piece):
    pieces = Pieces(durability, piece)
    for step in steps:
        if step[0] != "fail":
            getattr(pieces, step[0])(*step[1:])
        elif durability == "disk":  # in a write of the next turn, or of a packet
            with files_end_at(HEADER_SIZE + step[1]):
                pieces.turn()
                pieces.packet()
        elif durability == "fsync":
            pieces.fail_to_sync()
    pieces.finish()


@DURABILITIES
def test_others_are_accepted_between_pieces(durability):
    pieces = Pieces(durability)
    batch = pieces.batch(5)
    for _ in range(4):
        pieces.turn()
        pieces.packet()
        pieces.sync()
        pieces.claim()
    assert [connection.statuses for connection, _ in pieces.packets][:1] == ([[]] if durability == "fsync" else [[202]])
    assert not pieces.claimed
    assert batch.written == b""
    pieces.turn()
    pieces.finish()
    assert batch.statuses == [200]


def test_one_piece_a_turn():
    pieces = Pieces("memory")
    pieces.batch(9)
    pushed = []
    while pieces.service.turns:
        pushed.append(pieces.ring.undone)
        pieces.turn()
    assert pushed == list(range(9))


def test_large_batches_take_turns():
    pieces = Pieces("memory")
    batches = [pieces.batch(5) for _ in range(3)]
    done = [0]
    while done[-1] < 3:
        pieces.turn()
        done.append(sum(batch.written != b"" for batch in batches))
    assert min(map(done.count, (1, 2))) >= 5, "one at a time"
    pieces.finish()


def test_waiting_batch_is_counted_once():
    """It may have very many packets: to go through them each turn would take longer than all else."""
    batches = []

    class Counted(tuple):  # noqa: SLOT001  (which has an attribute)
        def __new__(cls, packets):
            batches.append(super().__new__(cls, packets))
            batches[-1].times = 0
            return batches[-1]

        def __iter__(self):
            self.times += 1
            return super().__iter__()

    class Protocol(IngestProtocol):
        def conversion_of(self, body):
            batch = yield from super().conversion_of(body)
            return replace(batch, packets=Counted(batch.packets))

    pieces = Pieces("memory")
    pieces.service.protocol = Protocol
    for _ in range(2):
        pieces.batch(9)
    while pieces.service.turns:
        pieces.turn()
    assert [batch.times for batch in batches] == [2, 2], "to add up their sizes, and to push them"
    pieces.finish()


def test_waiting_batches_take_memory():
    pieces = Pieces("memory")
    first, second = (pieces.batch(5, 1000) for _ in range(2))
    pieces.turn()
    assert pieces.intake.bodies >= 5000
    pieces.intake.max_bodies = 5000
    third = pieces.batch(5, 1000)
    while pieces.service.turns:
        pieces.turn()
    assert [each.statuses for each in (first, second, third)].count([503]) >= 1
    assert first.statuses == [200], "what is being stored goes on"
    assert pieces.intake.bodies == 0


def test_room_is_kept_for_the_rest():
    """Whatever others send meanwhile: what was begun finds its room."""
    pieces = Pieces("memory", 20_000, 2**18)
    batch = pieces.batch(6, 20_000)
    pieces.turn()
    statuses = set()
    while statuses != {202, 503}:
        statuses |= {*pieces.packet().statuses}
    while pieces.service.turns:
        pieces.turn()
    assert batch.statuses == [200]
    pieces.claim()
    assert sum(pieces.claimed[name] for name in pieces.batches[0][1]) == 6


def stored(pieces, size):
    body = b'{"emitterId":"e","messages":[{"message":"%b"}]}' % (b"x" * size)
    return ask(pieces.service, post(body)).statuses == [202]


def test_no_more_room_is_kept_than_it_needs():
    pieces = Pieces("memory", 20_000, 2**18)
    pieces.batch(6, 20_000)
    while pieces.ring.undone < 5:
        pieces.turn()
    pieces.service.turns.clear()
    assert stored(pieces, 30_000)


def test_withdrawn_batch_keeps_no_room():
    pieces = Pieces("disk", 20_000, 2**18)
    batch = pieces.batch(6, 20_000)
    pieces.turn()
    pieces.intake.broken_storage = 5
    pieces.turn()
    assert batch.statuses == [503]
    pieces.intake.broken_storage = 0
    assert [stored(pieces, 50_000) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("durability", ["disk", "fsync"])
def test_broken_storage_ends_a_batch(durability):
    pieces = Pieces(durability)
    batch = pieces.batch(5)
    pieces.turn()
    pieces.intake.broken_storage = 5
    pieces.turn()
    assert batch.statuses == [503]
    pieces.intake.broken_storage = 0
    pieces.packet()
    pieces.finish()


def test_batch_is_finished_while_closing():
    pieces = Pieces("memory")
    batch = pieces.batch(5)
    pieces.turn()
    pieces.intake.closed = True
    assert pieces.intake.holds_back
    pieces.finish()
    assert batch.statuses == [200]
    assert not pieces.intake.holds_back


def test_others_are_told_when_it_is_whole():
    """Who claims packets had none to claim before; also where nothing is pushed any more."""
    pieces = Pieces("memory")
    pieces.batch(5)
    pieces.packet()
    while pieces.ring.undone < 5:
        pieces.turn()
    before = pieces.service.accepts
    while pieces.service.turns:
        pieces.turn()
    assert pieces.service.accepts > before
    pieces.finish()


def test_lost_batch_is_whole_after_closing():
    pieces = Pieces("memory")
    pieces.batch(5).lose()
    while pieces.intake.holds_back:
        pieces.turn()
    pieces.claim()
    assert sum(pieces.claimed.values()) == 5


def test_lost_connection_ends_no_batch():
    """It may have sent all it had to and be gone; others must not wait for it."""
    pieces = Pieces("memory")
    batch = pieces.batch(5, 0, "Prefer: wait=5")
    pieces.turn()
    batch.lose()
    other = pieces.packet()
    while pieces.service.turns:
        pieces.turn()
    assert other.statuses == [202]
    pieces.claim()
    assert sum(pieces.claimed.values()) == 6
    assert not pieces.service.emitters.waiting


def test_pieces_wait_for_delivery():
    pieces = Pieces("memory")
    with pieces.service.timers():
        connection = pieces.batch(3, 0, "Prefer: wait=5")
        pieces.turn()
        pieces.packet()
        while pieces.service.turns:
            pieces.turn()
        assert connection.written == b""
        waits = pieces.service.emitters.waiting.values()
        assert [wait.batch.packets for wait in waits] == [()] * 3, "their memory is free"
        pieces.service.deliver()
        assert connection.statuses == [200]
    assert not pieces.service.emitters.waiting


def test_emitter_that_does_not_read():
    """What it has sent is stored, and others do not wait for it."""
    pieces = Pieces("memory")
    batch = pieces.batch(5)
    pieces.turn()
    batch.protocol.pause_writing()
    other = pieces.packet()
    for _ in range(9):
        pieces.turn()
    pieces.claim()
    assert sum(pieces.claimed.values()) == 6
    assert other.statuses == [202]
    batch.protocol.resume_writing()
    pieces.finish()


def test_pipelined_behind_a_large_batch():
    pieces = Pieces("disk")
    body = b'{"message":"m","host":"%d"}\n'
    sent = Sent("/ingest", b"".join(body % n for n in range(5)), ("Content-Type: application/x-ndjson",), 200)
    connection = ask(pieces.service, keyed("a") + sent.request() + keyed("b") + sent.request("Connection: close"))
    assert connection.statuses == [202, 200, 202, 200]
    assert not connection.open
    ids = [packet.id for packet in pieces.service.packets()]
    assert (ids[0], ids[6], len(ids)) == ("a", "b", 12)


@pytest.mark.parametrize("after", range(5))
def test_killed_between_pieces(after):
    """Who is not answered may find a part of what it sent delivered; what was accepted beside it is there."""
    pieces = Pieces("disk")
    pieces.batch(5)
    for _ in range(after):
        pieces.turn()
        pieces.packet()
    recovered = PacketRing(pieces.service.fd, private=True)
    assert recovered.undone == 2 * after
    assert not recovered.damage
