"""Messages claimed from a stream: given to the dispatcher, settled, taken back, whatever happens in between."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import PacketRing, file_size, round_capacity
from fastdist.shm.block import SharedBlock
from fastdist.storage.jetstream.consumer import Claim, State
from fastdist.storage.jetstream.message import StoredPacket, decode, encode
from fastdist.storage.jetstream.publisher import Outcome
from fastdist.worker.stream.claims import MIN_PACKETS, Claims


class Dispatcher:
    """Takes packets out of the ring when a test says so, and holds them."""

    def __init__(self, ring: PacketRing) -> None:
        self.ring, self.any_pickable, self.trial = ring, True, False
        self.pools, self.retired = [], []
        self.held: list[int] = []  # handles that are being sent
        self.forgotten: list[int] = []

    def schedule(self) -> None:
        pass

    def give_back(self) -> None:
        pass

    def lost(self, sequence: int) -> None:
        self.forgotten.append(sequence)

    def wants_trial(self) -> bool:
        return self.trial

    def fail(self, index: int) -> None:
        """An analyzer does not take a packet: it waits in the ring."""
        self.ring.release(self.held.pop(index))

    def send(self) -> int:
        handle = self.ring.claim()
        if handle:
            self.held.append(handle)
        return handle


class Replica:
    """Claims with a dispatcher, a consumer and a publisher that only note what is asked of them."""

    def __init__(self, capacity: int = 1 << 20, limit: int = 4096) -> None:
        fd = os.memfd_create("ring", os.MFD_CLOEXEC)
        capacity = round_capacity(capacity)
        os.ftruncate(fd, file_size(capacity))
        self.ring = PacketRing(fd, capacity, volatile=True)
        self.block = SharedBlock.create(1, 64)
        self.told: list[tuple[str, str | None]] = []
        self.counters = self.block.rows[0]
        self.claims = Claims(self.ring, self.counters, limit, lambda *word: self.told.append(word))
        self.dispatcher = Dispatcher(self.ring)
        self.acknowledged: list[int] = []
        self.given_back: list[int] = []
        self.stored: list[list[StoredPacket]] = []
        self.unsure: list[str] = []  # ids of packets of which it is not known whether they were stored again
        self.stalled = 0
        self.outcome = Outcome("yes", 1)
        self.delivered: list[str] = []
        consumer = SimpleNamespace(
            start=lambda: None, wake=lambda: None, acknowledge=self._acknowledge, give_back=self._give_back
        )
        self.claims.serve(
            consumer, SimpleNamespace(publish=self._publish), self.dispatcher, lambda: "x,1", lambda: self.stalled
        )

    def _acknowledge(self, claim: Claim) -> None:
        self.acknowledged.append(claim.sequence)
        claim.state = State.SETTLED

    def _give_back(self, claim: Claim, _delay: float = 0.0) -> None:
        if claim.state is State.HELD:
            self.given_back.append(claim.sequence)
            claim.state = State.SETTLED

    async def _publish(self, message: bytes, _message_id: str) -> Outcome:
        if self.outcome.stored == "yes":
            self.stored.append(decode(message))
        elif self.outcome.stored == "unknown":
            self.unsure += [packet.id for packet in decode(message)]
        return self.outcome

    def take(self, sequence: int, *names: str, deliveries: int = 1, inbox: str = "", size: int = 10) -> Claim:
        claim = Claim(sequence, deliveries, "reply", 0.0)
        packets = [StoredPacket(name, b"x" * size, inbox=inbox, accepted_ns=5) for name in names]
        self.claims.take(claim, encode(packets))
        return claim

    def send_all(self) -> None:
        while self.dispatcher.send():
            pass

    def settle(self, index: int = 0, analyzer: str | None = "A1") -> None:
        handle = self.dispatcher.held.pop(index)
        packet = self.ring.packet(handle)
        self.delivered.append(packet.id)
        self.ring.done(handle)
        self.claims.settled(packet.sequence, analyzer)


def test_last_packet_settles_its_message():
    it = Replica()
    it.take(7, "a", "b", "c")
    it.send_all()
    it.settle(1)
    it.settle(0)
    assert it.acknowledged == []
    it.settle(0, None)
    assert it.acknowledged == [7]
    assert it.claims.undone == 0


def test_attempts_go_on_from_earlier_claims():
    it = Replica()
    claim = Claim(3, 4, "reply", 0.0)
    it.claims.take(claim, encode([StoredPacket("a", b"x", attempts=2)]))
    assert it.ring.attempts(it.dispatcher.send()) == 5
    assert it.counters.get("redelivered") == 1


def test_waiting_emitters_are_told():
    it = Replica()
    it.take(1, "a", inbox="box.1")
    it.take(2, "b", inbox="box.2")
    it.send_all()
    it.settle()
    it.settle(0, None)
    assert it.told == [("box.1", "A1"), ("box.2", None)]


def test_more_than_the_ring_holds_waits():
    it = Replica(capacity=1 << 16)
    for sequence in range(20):
        it.take(sequence, f"p{sequence}", size=8000)
    assert it.claims.room() == 0
    while it.dispatcher.send():
        it.settle()
    assert sorted(it.acknowledged) == list(range(20))
    assert it.claims.room() > 0


def test_unreadable_message_is_given_back():
    it = Replica()
    it.claims.take(Claim(9, 1, "reply", 0.0), b"FDM\x09" + bytes(20))
    assert (it.given_back, it.counters.get("corrupt"), it.claims.undone) == ([9], 1, 0)


def test_unreadable_messages_make_few_lines(capfd):
    """They may be all those of a later version."""
    it = Replica()
    for sequence in range(100):
        it.claims.take(Claim(sequence, 1, "reply", 0.0), b"FDM\x09" + bytes(20))
    assert it.counters.get("corrupt") == 100
    assert capfd.readouterr().out.count("cannot be read") == 1


def test_what_is_too_large_is_given_back():
    it = Replica(capacity=1 << 16)
    it.take(1, "large", size=60_000)
    assert (it.given_back, it.acknowledged, it.claims.undone) == ([1], [], 0)


def test_room_without_an_analyzer():
    it = Replica()
    assert it.claims.room() == MIN_PACKETS
    it.dispatcher.any_pickable = False
    assert it.claims.room() == 0


def test_room_for_a_trial():
    """A message is claimed when nothing but a packet brings an analyzer back."""
    it = Replica()
    it.dispatcher.any_pickable, it.dispatcher.trial = False, True
    assert it.claims.room() == 1
    it.take(1, "a")
    assert it.claims.room() == 0


def test_what_is_stalled_takes_no_room():
    it = Replica(limit=100)
    for sequence in range(MIN_PACKETS):
        it.take(sequence, f"p{sequence}")
    assert it.claims.room() == 0
    it.stalled = 60
    assert it.claims.room() == 100 - MIN_PACKETS  # all that may be claimed
    it.stalled = 10
    assert it.claims.room() == 10
    for sequence in range(MIN_PACKETS, 100):
        it.take(sequence, f"p{sequence}")
    it.stalled = 100
    assert it.claims.room() == 0


def test_room_follows_what_is_settled():
    it = Replica()
    it.claims.tick(1)
    for sequence in range(300):
        it.take(sequence, f"p{sequence}")
        it.send_all()
        it.settle()
    it.claims.tick(2_000_000_000)
    assert it.claims.room() == 300
    it.claims.tick(4_000_000_000)
    assert it.claims.room() == MIN_PACKETS


def test_untouched_messages_are_given_back():
    async def run():
        it = Replica()
        it.take(1, "a", "b")
        it.take(2, "c", "d")
        it.dispatcher.send()
        it.claims.take_back()
        await asyncio.sleep(0)
        assert it.given_back == [2]
        assert [[packet.id for packet in packets] for packets in it.stored] == [["b"]]
        assert it.acknowledged == []
        it.settle()
        await asyncio.sleep(0)
        assert it.acknowledged == [1]
        assert it.claims.undone == 0

    asyncio.run(run())


def test_failures_of_a_split_message():
    """The rest of it is in the stream already, so it is not given back as a whole."""

    async def run():
        it = Replica()
        it.take(1, "a", "b", "c")
        it.dispatcher.send()
        it.claims.take_back()
        it.dispatcher.fail(0)
        it.claims.take_back()  # while the rest is being stored
        await asyncio.sleep(0.01)
        assert sorted(packet.id for packets in it.stored for packet in packets) == ["a", "b", "c"]
        assert (it.acknowledged, it.given_back, it.claims.undone) == ([1], [], 0)

    asyncio.run(run())


def test_rest_that_may_be_stored_comes_again():
    async def run():
        it = Replica()
        it.outcome = Outcome("unknown")
        it.take(1, "a", "b")
        it.dispatcher.send()
        it.claims.take_back()
        it.settle()
        await asyncio.sleep(0.01)
        assert (it.acknowledged, it.given_back, it.claims.undone) == ([], [1], 0)

    asyncio.run(run())


def test_rest_without_room_is_sent_from_here():
    async def run():
        it = Replica()
        it.outcome = Outcome("no", reason="queueFull")
        it.take(1, "a", "b", inbox="box")
        it.dispatcher.send()
        it.claims.take_back()
        it.settle()
        await asyncio.sleep(0.01)
        assert (it.acknowledged, it.given_back, it.claims.undone) == ([], [], 1)
        it.outcome = Outcome("yes", 2)
        it.claims.take_back()  # as is done all the time while there is no analyzer: not at once again
        assert (it.claims.storing, it.claims.undone) == (0, 1)
        it.dispatcher.send()
        it.settle()
        assert (it.acknowledged, it.delivered, len(it.told)) == ([1], ["a", "b"], 2)

    asyncio.run(run())


def test_room_is_used_without_traffic():
    """What waits for room goes on when a claim that had taken it all is void."""
    it = Replica(capacity=1 << 16)
    claim = it.take(1, *(f"a{number}" for number in range(7)), size=8000)
    it.take(2, "b", size=30_000)
    claim.state = State.VOID
    it.claims.void([claim])
    it.claims.tick(1)
    it.send_all()
    it.settle()
    assert (it.delivered, it.acknowledged) == (["b"], [2])


def test_packets_of_a_stream_that_is_gone():
    """They are sent from here, or stored in that which there is now; not given back to what does not exist."""

    async def run():
        it = Replica()
        claim = it.take(1, "a", "b")
        claim.era.over = True
        it.claims.take_back()
        await asyncio.sleep(0.01)
        assert ([[packet.id for packet in packets] for packets in it.stored], it.given_back) == ([["a", "b"]], [])
        assert it.claims.undone == 0

    asyncio.run(run())


def test_void_claim_is_let_go():
    it = Replica()
    claim = it.take(1, "a", "b")
    it.take(2, "c")
    it.dispatcher.send()
    claim.state = State.VOID
    it.claims.void([claim])
    assert [it.ring.packet(handle).id for handle in it.dispatcher.held] == ["a"]
    it.take(1, "a", "b", deliveries=2)  # it comes again, while one is on its way
    assert it.given_back == [1]
    it.settle()
    assert it.acknowledged == []  # of the first claim only one was delivered
    it.send_all()
    it.settle()
    assert it.acknowledged == [2]


def test_void_claims_are_let_go_together():
    """What waits is looked at once, not once for each."""
    it = Replica()
    claims = [it.take(number, f"a{number}") for number in range(1, 6)]
    looks = []
    take_back = it.claims.take_back
    it.claims.take_back = lambda *args: (looks.append(args), take_back(*args))
    for claim in claims[1:]:
        claim.state = State.VOID
    it.claims.void(claims[1:])
    assert len(looks) == 1
    it.send_all()
    it.settle()
    assert (it.delivered, it.acknowledged) == (["a1"], [1])


def test_void_claim_may_be_acknowledged():
    it = Replica()
    claim = it.take(1, "a")
    it.send_all()
    claim.state = State.VOID
    it.claims.void([claim])
    it.settle()
    assert it.acknowledged == [1]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 5)),
        st.tuples(st.sampled_from(["send", "settle", "fail", "back", "void", "store"]), st.integers(0, 9)),
    ),
    max_size=50,
)


@given(STEPS)
def test_no_packet_is_lost_or_sent_twice(steps):  # noqa: C901  (steps of all kinds)
    """A message is acknowledged only when all of it was delivered, or is in the stream again."""

    async def run():  # noqa: C901, PLR0912
        it = Replica(capacity=1 << 16)
        messages: dict[int, list[str]] = {}
        claims: dict[int, Claim] = {}
        void = set()
        for step, number in steps:
            await asyncio.sleep(0)
            if step == "take":
                sequence = len(messages) + 1
                messages[sequence] = [f"{sequence}.{each}" for each in range(number)]
                claims[sequence] = it.take(sequence, *messages[sequence], size=3000)
            elif step == "send":
                it.dispatcher.send()
            elif step == "settle" and it.dispatcher.held:
                it.settle(number % len(it.dispatcher.held))
            elif step == "fail" and it.dispatcher.held:
                it.dispatcher.fail(number % len(it.dispatcher.held))
            elif step == "back":
                it.claims.take_back()
            elif step == "store":
                it.outcome = Outcome(("yes", "no", "unknown")[number % 3])
            elif step == "void":
                held = [claim for claim in claims.values() if claim.state is State.HELD]
                if held:
                    claim = held[number % len(held)]
                    claim.state = State.VOID
                    void.add(claim.sequence)
                    it.claims.void([claim])
        while it.claims.undone:
            it.send_all()
            while it.dispatcher.held:
                it.settle()
            it.claims.tick(1)
            await asyncio.sleep(0)
        again = Counter(packet.id for packets in it.stored for packet in packets)
        for sequence, names in messages.items():
            there = [it.delivered.count(name) + again[name] for name in names]
            if sequence in it.acknowledged:
                assert set(there) == {1}
            elif sequence in it.given_back:  # all of it comes again
                assert set(there) == {0} or set(names) & set(it.unsure)
            else:
                assert sequence in void
            assert max(there) <= 1
        assert not set(it.acknowledged) & set(it.given_back)
        assert (it.ring.undone, it.claims._held, it.claims._by_packet) == (0, {}, {})

    asyncio.run(run())
