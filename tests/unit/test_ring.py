"""The packet ring in daily use: a model in a dictionary, and what the model does not see."""

from __future__ import annotations

import contextlib
import os
import random
import time
import uuid
from collections import deque

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ring_disk import memfd
from support import files_end_at

from fastdist._core import FLAG_WAITED, HEADER_SIZE, Packet, PacketRing, file_size, round_capacity

CAPACITY = 65536  # the smallest there is
RECORD = 80  # bytes of a record besides key and body
SMALLEST = 128  # bytes a record takes at least
DAY_NS = 86_400 * 10**9


@pytest.fixture
def fd():
    made = memfd()
    yield made
    os.close(made)


def record_size(packet, key):
    return max(SMALLEST, (RECORD + len(key or "") + len(packet.body) + 7) // 8 * 8)


def body_of(sequence, size):
    return random.Random(sequence).randbytes(size)


def drain(ring):
    """Claim and return everything, without marking it done."""
    packets = []
    while handle := ring.claim():
        packets.append(ring.packet(handle))
    return packets


def image_of(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)


keys = st.one_of(st.none(), st.text("abcXYZ019-_.~/", min_size=1, max_size=64))
sizes = st.one_of(st.integers(0, 40), st.integers(0, 2000), st.integers(2000, 20_000), st.just(CAPACITY // 2 - RECORD))


class RingAgainstModel(RuleBasedStateMachine):
    """Packets by sequence, as the emitter gave them; which side has claimed them; in what order the others come."""

    def __init__(self):
        super().__init__()
        self.fd = memfd()
        self.packets = {}
        self.bytes = {}  # sequence -> size of the record
        self.ends = {}  # sequence -> position a sync has to reach
        self.claimed = {}  # handle -> sequence
        self.given_back = deque()
        self.unclaimed = deque()
        self.pushed, self.clock = 0, 10**18
        self.largest = 0  # bytes of a record since the ring was empty
        self.synced, self.tails = 0, [0]
        self.moving = False  # whether records may have moved: their order in the ring is then its own affair

    def teardown(self):
        self.look_at_what_a_successor_would_find()
        os.close(self.fd)

    @initialize(volatile=st.booleans(), waits=st.booleans())
    def create(self, volatile, waits):
        self.options = {"volatile": volatile, "claims_wait_for_sync": waits}
        self.waits = waits and not volatile
        self.ring = PacketRing(self.fd, CAPACITY, **self.options)

    def nth_claimed(self, n):
        return sorted(self.claimed)[n % len(self.claimed)]

    # ---- steps

    @rule(size=sizes, key=keys, attempts=st.integers(0, 3), waited=st.booleans(), tick=st.integers(0, 5))
    def push(self, size, key, attempts, waited, tick):
        self.clock += tick
        sequence = self.pushed + 1
        packet = Packet(
            sequence=sequence,
            id=key or str(uuid.UUID(int=sequence << 64 | 0xABCDEF)),
            body=body_of(sequence, size),
            attempts=attempts,
            accepted_ns=self.clock,
            messages=sequence % 7,
            emitter=2**64 - sequence,
            flags=FLAG_WAITED if waited else 0,
        )
        options = {
            "packet_id": (sequence << 64 | 0xABCDEF).to_bytes(16, "big"),
            "messages": packet.messages,
            "emitter": packet.emitter,
            "accepted_ns": packet.accepted_ns,
            "attempts": attempts,
            "flags": packet.flags,
        }
        need = record_size(packet, key)
        if 2 * need > CAPACITY:
            with pytest.raises(ValueError, match="over half"):
                self.ring.push(packet.body, key, **options)
            return
        if (self.claimed or self.given_back) and CAPACITY - self.ring.used < need + CAPACITY // 2:
            self.moving = True
        place = self.ring.tail_position
        result = self.ring.push(packet.body, key, **options)
        event(f"moved: {self.ring.tail_position - place > need}")
        event(f"full: {result == 0}")
        if result == 0:
            assert CAPACITY - self.ring.used < need + max(need, self.largest)
            return
        assert result == sequence
        self.pushed = sequence
        self.largest = max(need, self.largest if len(self.packets) else 0)
        self.packets[sequence], self.bytes[sequence] = packet, need
        self.ends[sequence] = self.ring.tail_position
        self.unclaimed.append(sequence)
        self.tails.append(self.ring.tail_position)

    @rule()
    def claim(self):
        if self.given_back:
            expected = self.given_back.popleft()
        elif self.unclaimed and (not self.waits or self.ends[self.unclaimed[0]] <= self.synced):
            expected = self.unclaimed.popleft()
        else:
            expected = None
        handle = self.ring.claim()
        assert bool(handle) == (expected is not None)
        if handle:
            assert handle not in self.claimed
            self.claimed[handle] = expected
            self.check(handle)

    def check(self, handle):
        packet = self.packets[self.claimed[handle]]
        assert self.ring.packet(handle) == packet
        assert self.ring.packet_id(handle) == packet.id
        assert self.ring.attempts(handle) == packet.attempts
        assert self.ring.sequence(handle) == packet.sequence

    @precondition(lambda self: self.claimed)
    @rule(n=st.integers(0, 1000))
    def done(self, n):
        handle = self.nth_claimed(n)
        self.check(handle)
        self.ring.done(handle)
        sequence = self.claimed.pop(handle)
        del self.packets[sequence], self.bytes[sequence], self.ends[sequence]
        with pytest.raises(ValueError, match="no handle"):
            self.ring.done(handle)
        if not self.packets:
            self.moving = False

    @precondition(lambda self: self.claimed)
    @rule(n=st.integers(0, 1000))
    def release(self, n):
        handle = self.nth_claimed(n)
        self.ring.release(handle)
        self.given_back.append(self.claimed.pop(handle))

    @precondition(lambda self: self.claimed)
    @rule(n=st.integers(0, 1000))
    def count_attempt(self, n):
        handle = self.nth_claimed(n)
        packet = self.packets[self.claimed[handle]]
        assert self.ring.count_attempt(handle) == packet.attempts + 1
        self.packets[packet.sequence] = packet._replace(attempts=packet.attempts + 1)

    @rule(back=st.sampled_from([0, 0, 0, 1, 2, 5]))
    def sync(self, back):
        position = self.tails[-1 - min(back, len(self.tails) - 1)] if back else self.ring.tail_position
        self.ring.mark_synced(position)
        self.synced = max(self.synced, position)

    @rule(packets=st.integers(1, 40), size=st.sampled_from([0, 100, 1000, 5000]), sync_every=st.integers(1, 9))
    def let_some_pass(self, packets, size, sync_every):
        """Claim all there is and hold it; push, claim and deliver others, so that the ring goes round."""
        self.sync(0)
        while self.ring.has_more and len(self.claimed) < len(self.packets):
            self.claim()
        for i in range(packets):
            self.push(size, None, 0, waited=False, tick=1)
            if self.waits or i % sync_every == 0:
                self.sync(0)
            before = set(self.claimed)
            self.claim()
            for handle in set(self.claimed) - before:
                self.done(sorted(self.claimed).index(handle))

    @precondition(lambda self: not self.options["volatile"])
    @rule(count=st.integers(0, 20), reopen=st.booleans())
    def go_on_without_writing(self, count, reopen):
        """Nothing can be written for a time: what is sent and done meanwhile is known afterwards."""
        order = self.look_at_what_a_successor_would_find() if reopen else None
        with files_end_at(0):
            if order is not None:
                self.succeed(order)
            for _ in range(count):
                self.claim()
                with contextlib.suppress(OSError):
                    assert self.ring.push(b"refused") == 0, "it is full"
                if self.claimed:
                    self.count_attempt(count)
                    self.done(count)
        self.ring.try_to_write()

    @precondition(lambda self: not self.options["volatile"])
    @rule(claims=st.integers(0, 20))
    def write_again(self, claims):
        """As after a sync that failed, in parts, while packets are sent and done."""
        span = self.ring.begin_writing_again()
        for _ in range(claims):
            self.claim()
            if self.claimed:
                self.done(claims)
        self.ring.go_on_writing_again(span)
        for _ in range(claims // 2):
            self.claim()
        self.ring.end_writing_again()

    @precondition(lambda self: not self.options["volatile"])
    @rule(seed=st.integers(0, 1000), most=st.integers(1, 20), byte=st.integers(0, RECORD - 1))
    def damage_heads(self, seed, most, byte):
        """Some records are none any more when they are to be claimed: just those are lost."""
        for _ in range(seed % 20):
            self.push(seed, None, 0, waited=False, tick=1)
        self.sync(0)
        self.ring.forget_kept()
        known = [sequence for sequence in self.unclaimed if self.ends[sequence]]
        hurt = random.Random(seed).sample(known, min(most, len(known)))
        heard = []
        self.ring.on_damage = lambda _offset, _what, lost, _sequence: heard.append(lost)
        for sequence in hurt:
            offset = HEADER_SIZE + (self.ends[sequence] - self.bytes[sequence] + byte) % CAPACITY
            os.pwrite(self.fd, bytes([os.pread(self.fd, 1, offset)[0] ^ 0x55]), offset)
            self.unclaimed.remove(sequence)
            del self.packets[sequence], self.bytes[sequence], self.ends[sequence]
        while self.ring.has_more:
            self.claim()
        self.claim()
        event(f"places of damage: {min(len(heard), 3)}")
        assert sum(heard) == len(hurt)
        assert len(heard) <= len(hurt)

    @rule()
    def reopen(self):
        self.succeed(self.look_at_what_a_successor_would_find())

    def succeed(self, order):
        self.ring = PacketRing(self.fd, **self.options)
        assert (self.ring.claimed, self.ring.corrupt, self.ring.damage) == (0, 0, [])
        for handle in self.claimed:
            with pytest.raises(ValueError, match="no handle"):
                self.ring.packet(handle)
        self.claimed.clear()
        self.given_back.clear()
        self.unclaimed = deque(order)
        self.synced, self.tails = 0, [self.ring.tail_position]
        self.ends = dict.fromkeys(order, 0)

    def look_at_what_a_successor_would_find(self):
        """Open a copy of what is there now; return the sequences in the order of their claims."""
        copy = memfd()
        os.pwrite(copy, image_of(self.fd), 0)
        successor = PacketRing(copy)
        found = drain(successor)
        os.close(copy)
        assert (successor.undone, successor.corrupt, successor.damage) == (len(found), 0, [])
        assert successor.next_sequence_number == self.pushed + 1
        order = [packet.sequence for packet in found]
        if not self.moving:
            assert order == sorted(order)
        assert {packet.sequence: packet for packet in found} == self.packets
        assert len(found) == len(self.packets)
        return order

    # ---- what always holds

    @invariant()
    def the_books_agree(self):
        ring = self.ring
        assert ring.capacity == CAPACITY
        assert ring.undone == len(self.packets)
        assert ring.undone_bytes == sum(self.bytes.values())
        assert ring.undone_bytes <= ring.used <= CAPACITY
        assert ring.claimed == len(self.claimed)
        assert ring.next_sequence_number == self.pushed + 1
        pushed = set(range(1, self.pushed + 1))
        assert ring.missing(pushed | {self.pushed + 1}) == pushed - self.packets.keys()
        assert ring.oldest_ns == min((packet.accepted_ns for packet in self.packets.values()), default=0)

    @invariant()
    def a_claimed_packet_is_still_what_it_was(self):
        if self.claimed:
            self.check(min(self.claimed, key=lambda handle: self.claimed[handle]))


RingAgainstModel.TestCase.settings = settings(
    max_examples=2 * settings().max_examples, stateful_step_count=50, deadline=None
)
test_any_life_of_a_ring_is_that_of_the_model = RingAgainstModel.TestCase


# ---- sizes and forms


@pytest.mark.parametrize(
    ("asked", "rounded"),
    [(-1, 65536), (0, 65536), (1, 65536), (65536, 65536), (65537, 131072), (2**30 + 1, 2**30 + 65536)],
)
def test_capacity_is_whole_largest_pages(asked, rounded):
    assert round_capacity(asked) == rounded
    assert file_size(asked) == HEADER_SIZE + rounded + rounded // SMALLEST * 8


@pytest.mark.parametrize("key_length", [0, 1, 7, 8, 9, 63, 64])
def test_any_alignment_of_body_and_key_works(fd, key_length):
    ring, key = PacketRing(fd, CAPACITY, volatile=True), "k" * key_length or None
    for size in [*range(18), 4095, 4096, 4097]:
        body, before = body_of(size, size), ring.tail_position
        assert ring.push(body, key)
        assert ring.tail_position - before == max(SMALLEST, (RECORD + key_length + size + 7) // 8 * 8)
        handle = ring.claim()
        packet = ring.packet(handle)
        assert (packet.body, packet.id) == (body, key or str(uuid.UUID(int=0)))
        ring.done(handle)


def test_largest_packet_is_half_the_ring(fd):
    ring = PacketRing(fd, CAPACITY, volatile=True)
    largest = CAPACITY // 2 - RECORD
    for key in (None, "key"):
        room = largest - len(key or "")
        with pytest.raises(ValueError, match=f"a packet of {room + 1} bytes is over half of a ring of 65536"):
            ring.push(bytes(room + 1), key)
    assert (ring.used, ring.undone, ring.next_sequence_number) == (0, 0, 1)
    assert [ring.push(bytes(size)) for size in (largest, largest, 0)] == [1, 0, 0]  # room for its copy is kept free
    assert ring.used == CAPACITY // 2
    assert [len(packet.body) for packet in drain(ring)] == [largest]


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((b"x", "k" * 65), {}, ValueError),
        ((b"x", "schlüssel"), {}, ValueError),
        ((b"x",), {"packet_id": bytes(15)}, ValueError),
        ((b"x",), {"packet_id": bytes(17)}, ValueError),
        ((b"x",), {"messages": -1}, OverflowError),
        (("text",), {}, TypeError),
        ((None,), {}, TypeError),
    ],
)
def test_failed_push_changes_nothing(fd, arguments, options, error):
    ring = PacketRing(fd, CAPACITY)
    before = image_of(fd)
    with pytest.raises(error):
        ring.push(*arguments, **options)
    assert image_of(fd) == before


def test_missing_values_get_time_and_message(fd):
    ring = PacketRing(fd, CAPACITY)
    ring.push(b"body")
    packet = ring.packet(ring.claim())
    assert packet._replace(accepted_ns=0) == (1, str(uuid.UUID(int=0)), b"body", 0, 0, 1, 0, 0)
    assert packet.accepted_ns == ring.oldest_ns > 1_700_000_000 * 10**9


@pytest.mark.parametrize("days", [-1, 1])
def test_packet_time_follows_current_clock(fd, days):
    """Its stamp stays on the clock of the run, which ``clock_offset`` makes of the monotonic one."""
    ring = PacketRing(fd, CAPACITY)
    ring.clock_offset += days * DAY_NS  # the clock was set by as much since the run has begun, the other way
    before = time.time_ns()
    ring.push(b"body")
    assert abs(ring.packet(ring.claim()).accepted_ns - before) < DAY_NS // 24
    assert abs(ring.oldest_ns - before - days * DAY_NS) < DAY_NS // 24


@pytest.mark.parametrize("handle", [0, 1, 1023, 1024, 2**32 - 1])
def test_invalid_handles_are_refused(fd, handle):
    ring = PacketRing(fd, CAPACITY)
    ring.push(b"unclaimed")
    for call in (
        ring.done,
        ring.release,
        ring.packet,
        ring.packet_id,
        ring.attempts,
        ring.count_attempt,
        ring.sequence,
    ):
        with pytest.raises(ValueError, match=f"{handle} is no handle"):
            call(handle)
    assert ring.undone == 1


def test_tens_of_thousands_claimed_at_once():
    fd = memfd(4 << 20)
    ring = PacketRing(fd, 4 << 20)
    for i in range(20_000):
        assert ring.push(b"%d" % i, emitter=i)
    handles = [ring.claim() for _ in range(20_000)]
    assert len(set(handles)) == 20_000
    assert ring.claim() == 0
    random.Random(1).shuffle(handles)
    for handle in handles:
        packet = ring.packet(handle)
        assert packet.body == b"%d" % packet.emitter
        ring.done(handle)
    assert (ring.undone, ring.claimed, ring.used) == (0, 0, 0)
    os.close(fd)


def test_totals_are_of_the_latest_packets(fd):
    ring = PacketRing(fd, CAPACITY)
    for i in range(1, 11):
        ring.push(bytes(i), "key", messages=100 + i)
    for _ in range(9):
        ring.done(ring.claim())  # the head passes them, they are gone
    ring.push(bytes(11), messages=111)
    assert ring.totals_of_latest(2) == ring.totals_of_latest(10) == (110 + 111, 10 + 11)
    assert ring.totals_of_latest(1) == (111, 11)
    assert ring.totals_of_latest(0) == (0, 0)


# ---- a full ring


@pytest.mark.parametrize("volatile", [True, False])
def test_full_ring_refuses_and_is_unchanged(fd, volatile):
    ring = PacketRing(fd, CAPACITY, volatile=volatile)
    pushed = 0
    while ring.push(body_of(pushed, 1000)):
        pushed += 1
    assert pushed == CAPACITY // 1088 - 1, "there is room left for the copy of one"
    before, books = image_of(fd), (ring.used, ring.undone, ring.undone_bytes, ring.next_sequence_number)
    assert [ring.push(bytes(size)) for size in (1000, 20_000, CAPACITY // 2 - RECORD)] == [0, 0, 0]
    assert (ring.used, ring.undone, ring.undone_bytes, ring.next_sequence_number) == books
    assert image_of(fd) == before
    ring.done(ring.claim())  # one goes, one has room
    assert ring.push(bytes(1000)) == pushed + 1
    assert ring.push(bytes(1000)) == 0


@pytest.mark.parametrize("volatile", [True, False])
@pytest.mark.parametrize("first", [0, 1000, CAPACITY // 8 - RECORD, CAPACITY // 5, CAPACITY // 8 * 3])
@pytest.mark.parametrize("opened_anew", [False, True])
def test_unclaimed_packet_pins_no_full_ring(fd, volatile, first, opened_anew):
    """After an outage: what waits is claimed only now, and all is taken but the first."""
    ring = PacketRing(fd, CAPACITY, volatile=volatile)
    assert ring.push(bytes(first), "first")
    for size in (CAPACITY // 2 - RECORD, 1000, 0):
        while ring.push(bytes(size)):
            pass
    if opened_anew:
        ring = PacketRing(fd, volatile=volatile)
    pinned, *others = iter(ring.claim, 0)
    for handle in others:
        ring.done(handle)
    assert ring.used > CAPACITY - max(first + RECORD, 1088) - 1088
    passed = 0
    for _ in range(200):
        if ring.push(bytes(1000)):
            passed += 1
            ring.mark_synced(ring.tail_position)
            ring.done(ring.claim())
        ring.mark_synced(ring.tail_position)
    assert passed > (190 if first < CAPACITY // 4 else 180)
    assert ring.packet(pinned).id == "first"


def test_countless_laps_keep_packets_whole(fd):
    ring, rng, queue = PacketRing(fd, CAPACITY, volatile=True), random.Random(7), deque()
    sequence = 0
    while ring.tail_position < 300 * CAPACITY:
        size = rng.choice([0, 1, 500, 3000, 20_000])
        if ring.push(body_of(sequence, size), emitter=size) == 0:
            assert queue
        else:
            sequence += 1
            queue.append((sequence, size))
        while queue and rng.random() < 0.6:
            expected, length = queue.popleft()
            packet = ring.packet(handle := ring.claim())
            assert (packet.sequence, packet.body) == (expected, body_of(expected - 1, length))
            ring.done(handle)
    assert ring.undone == len(queue)


# ---- a packet that stays behind


@pytest.mark.parametrize("volatile", [True, False])
@pytest.mark.parametrize("size", [0, 100, 5000, 15_000, 20_000, 26_000])
def test_unclaimed_packet_lets_others_pass(fd, volatile, size):
    ring = PacketRing(fd, CAPACITY, volatile=volatile)
    ring.push(body_of(0, size), "the-old-one", accepted_ns=5, messages=3, emitter=9, attempts=2, flags=FLAG_WAITED)
    old = ring.claim()
    expected, moves = ring.packet(old), 0
    for i in range(2, 4000):
        ring.mark_synced(ring.tail_position)
        before = ring.tail_position
        if not ring.push(body_of(i, 500), accepted_ns=10 + i):
            assert not volatile  # the move took the room, until it is synced
            assert size > CAPACITY // 4
            ring.mark_synced(ring.tail_position)
            assert ring.push(body_of(i, 500), accepted_ns=10 + i) == i
        moves += ring.tail_position - before > 592
        passing = ring.claim()
        assert ring.packet(passing).sequence == i
        ring.done(passing)
        if i % 100 == 0:
            ring.release(old)
            assert ring.claim() == old
            assert ring.count_attempt(old) == expected.attempts + 1
            expected = expected._replace(attempts=expected.attempts + 1)
        assert ring.packet(old) == expected
        assert (ring.undone, ring.oldest_ns) == (1, 5)
    assert moves >= 4000 * 592 // CAPACITY
    assert drain(PacketRing(fd)) == [expected]
    ring.done(old)
    ring.mark_synced(ring.tail_position)
    assert (ring.undone, ring.undone_bytes, ring.used, ring.oldest_ns) == (0, 0, 0, 0)


def test_many_left_behind_are_moved_together(fd):
    ring = PacketRing(fd, CAPACITY, volatile=True)
    held = {}
    for i in range(1, 101):
        ring.push(body_of(i, 100), accepted_ns=i)
        held[ring.claim()] = i
    for i in range(101, 3000):
        assert ring.push(body_of(i, 1000), accepted_ns=i) == i
        ring.done(ring.claim())
        assert ring.oldest_ns == 1
    for handle, i in random.Random(3).sample(sorted(held.items()), 100):
        assert ring.packet(handle).body == body_of(i, 100)
        ring.done(handle)
        del held[handle]
        assert ring.oldest_ns == min(held.values(), default=0)
    assert ring.used == 0


def test_moved_packet_is_oldest_on_recovery(fd):
    ring = PacketRing(fd, CAPACITY, volatile=True)
    ring.push(b"oldest", accepted_ns=5)
    ring.claim()
    for i in range(40):
        ring.push(bytes(500), accepted_ns=10 + i)
        ring.done(ring.claim())
    ring.push(b"older", accepted_ns=60)  # half way round: it need not move when the oldest does
    ring.claim()
    while (place := ring.tail_position) + 584 == (ring.push(bytes(500), accepted_ns=100), ring.tail_position)[1]:
        ring.done(ring.claim())
    assert place > CAPACITY // 2
    successor = PacketRing(fd, volatile=True)
    packets = []
    while handle := successor.claim():
        packets.append((successor.packet(handle).body[:6], successor.oldest_ns))
        successor.done(handle)
    assert packets == [(b"older", 5), (b"oldest", 5), (bytes(6), 100)]


@pytest.mark.parametrize("volatile", [True, False])
def test_passing_many_moved_needs_few_syncs(fd, volatile):
    ring = PacketRing(fd, CAPACITY, volatile=volatile)
    held, passed = {}, 0
    for i in range(40):
        ring.push(body_of(i, 50), accepted_ns=i + 1)
        held[ring.claim()] = i
    for i in range(3000):
        if i % 8 == 0:
            ring.mark_synced(ring.tail_position)
        if ring.push(bytes(800)):
            passed += 1
            ring.done(ring.claim())
    assert passed == 3000
    assert {handle: ring.packet(handle).body for handle in held} == {
        handle: body_of(i, 50) for handle, i in held.items()
    }
    assert sorted(packet.body for packet in drain(PacketRing(fd))) == sorted(body_of(i, 50) for i in range(40))


def test_old_copy_stays_until_new_is_synced(fd):
    ring = PacketRing(fd, CAPACITY)
    ring.push(body_of(0, 1000))
    old = ring.claim()
    while ring.used < CAPACITY // 2:
        ring.push(bytes(1000))
        ring.done(ring.claim())
    before = image_of(fd)
    while ring.push(bytes(1000)):
        ring.done(ring.claim())
    after = image_of(fd)
    assert CAPACITY - ring.used < 2 * 1088
    first = slice(HEADER_SIZE, HEADER_SIZE + 72)  # what is sealed of the first record
    assert before[first] == after[first]
    assert ring.packet(old).body == body_of(0, 1000)
    ring.mark_synced(ring.tail_position)
    assert ring.push(bytes(1000))
    assert ring.packet(old).body == body_of(0, 1000)
    assert image_of(fd)[first] != before[first] or ring.used < CAPACITY


# ---- packets that wait for a sync


def test_waiting_claims_take_synced_packets(fd):
    ring = PacketRing(fd, CAPACITY, claims_wait_for_sync=True)
    assert ring.push(b"one") == 1
    first = ring.tail_position
    assert ring.push(b"two") == 2
    assert ring.claim() == 0
    ring.mark_synced(first)
    handle = ring.claim()
    assert ring.packet(handle).body == b"one"
    assert ring.claim() == 0
    ring.release(handle)  # once claimable, always
    assert ring.claim() == handle
    ring.mark_synced(first - 8)  # an older sync takes nothing back
    ring.mark_synced(ring.tail_position)
    assert ring.packet(ring.claim()).body == b"two"
    assert ring.push(b"three") == 3
    assert ring.claim() == 0


def test_recovered_packet_can_be_claimed(fd):
    ring = PacketRing(fd, CAPACITY, claims_wait_for_sync=True)
    ring.push(b"one")
    ring.push(b"two")
    successor = PacketRing(fd, claims_wait_for_sync=True)
    successor.push(b"three")
    assert successor.withdraw_unsynced() == (1, 1, 5)
    assert [packet.body for packet in drain(successor)] == [b"one", b"two"]


@pytest.mark.parametrize("moved", [False, True])
def test_only_unsynced_pushes_are_withdrawn(fd, moved):
    ring = PacketRing(fd, CAPACITY, claims_wait_for_sync=True)
    ring.push(b"old")
    ring.mark_synced(ring.tail_position)
    old, used = ring.claim(), ring.used
    while moved and ring.tail_position < CAPACITY:
        ring.push(bytes(1000))
        ring.mark_synced(ring.tail_position)
        ring.done(ring.claim())
    ring.push(b"synced")
    ring.mark_synced(ring.tail_position)
    assert ring.withdraw_unsynced() == (0, 0, 0)
    for i in range(1, 6):
        ring.push(bytes(i), "key", messages=10 * i)
    assert ring.synced_position < ring.tail_position
    assert ring.withdraw_unsynced() == (5, 150, 15)
    assert ring.withdraw_unsynced() == (0, 0, 0)
    assert (ring.undone, ring.undone_bytes) == (2, 2 * used)
    ring.mark_synced(ring.tail_position)
    assert [packet.body for packet in drain(ring)] == [b"synced"]
    assert ring.packet(old).body == b"old"
    ring.write_again()
    assert sorted(packet.body for packet in drain(PacketRing(fd))) == [b"old", b"synced"]


def test_claimable_packets_are_shown(fd):
    ring = PacketRing(fd, CAPACITY, claims_wait_for_sync=True)
    assert not ring.has_more
    ring.push(b"one")
    assert not ring.has_more
    ring.mark_synced(ring.tail_position)
    assert ring.has_more
    handle = ring.claim()
    assert not ring.has_more
    ring.release(handle)
    assert ring.has_more


def test_volatile_rings_wait_for_nothing(fd):
    ring = PacketRing(fd, CAPACITY, claims_wait_for_sync=True, volatile=True)
    ring.push(b"one")
    assert ring.packet(ring.claim()).body == b"one"
