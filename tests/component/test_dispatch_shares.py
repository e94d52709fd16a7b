"""Distribution: who is picked, through the whole way from the ring to the analyzers' lists."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from upstream_harness import Loop, memory_ring, settings, shared_block

from fastdist._core import GOLDEN_RATIO_STEP, AliasTable, DispatchBase, PoolBase, Rendezvous

WEIGHTS = (0.1, 0.4, 0.2, 0.3)
NAMES = ("A1", "A2", "A3", "A4")


class ListPool(PoolBase):
    """Lets packets wait, and opens no connection."""

    def open_more(self):
        pass


class Router:
    """A dispatcher's hot half, with a list for each analyzer."""

    def __init__(self, strategy="even", by="packets", weights=WEIGHTS, phase=None):
        self.ring, self.block, self.loop = memory_ring(1 << 24), shared_block(len(weights)), Loop()
        config = settings(distribution={"strategy": strategy, "by": by})
        self.dispatcher = DispatchBase(self.loop, self.ring, self.block.analyzers, config)
        self.dispatcher.seen_epoch = self.block.analyzers.epoch
        for slot in range(len(weights)):
            pool = ListPool(self.ring, self.block.rows[0], self.block.analyzers, slot, None)
            pool.configure(b"", 1, 1, False, 1, 1, 0.0)
            self.dispatcher.pools[slot] = pool
        if phase is not None:
            self.dispatcher.phase = phase
        self.strategy = strategy
        self.set(dict(enumerate(weights)))

    def set(self, weights):
        slots, values = list(weights), list(weights.values())
        if self.strategy == "sticky":
            self.dispatcher.set_table(None, Rendezvous([f"A{slot + 1}" for slot in slots], slots, values))
        else:
            self.dispatcher.set_table(AliasTable(slots, values), None)

    def route(self, packets):
        """Route (bytes, messages, emitter) and return the slots they went to, in order."""
        slots = {}
        first = self.ring.next_sequence_number
        for start in range(0, len(packets), 1000):
            for size, messages, emitter in packets[start : start + 1000]:
                assert self.ring.push(b"x" * size, "k", messages=messages, emitter=emitter)
            self.dispatcher.schedule()
            self.loop.run()
            for pool in self.dispatcher.pools:
                while handles := pool.take_request():
                    slots[self.ring.sequence(handles[0])] = pool.slot
                    self.ring.done(handles[0])
        return [slots[first + index] for index in range(len(packets))]


def plain(count):
    return [(1, 1, 0)] * count


# ---- even


@pytest.mark.parametrize("phase", [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("weights", [WEIGHTS, (1, 1, 1, 1), (0.97, 0.01, 0.01, 0.01), (1, 2, 3, 4), (5, 3)])
def test_every_window_is_split_evenly(phase, weights):
    slots = Router(weights=weights, phase=phase).route(plain(20_000))
    total = sum(weights)
    for slot, weight in enumerate(weights):
        so_far = [0]
        for each in slots:
            so_far.append(so_far[-1] + (each == slot))
        ahead = [got - index * weight / total for index, got in enumerate(so_far)]
        # Of 20,000 packets none has gained or lost more than this at any time, nor over any window.
        assert max(ahead) - min(ahead) < 8, slot
        assert abs(so_far[-1] / 20_000 - weight / total) < 0.001


def test_short_windows_are_nearly_exact():
    slots = Router(phase=7).route(plain(5000))
    for length in (10, 50, 200):
        for start in range(0, 5000 - length, 17):
            got = Counter(slots[start : start + length])
            assert all(abs(got[slot] - WEIGHTS[slot] * length) <= 3.5 for slot in range(4))


def test_dispatchers_start_at_other_points():
    starts = {Router().dispatcher.phase for _ in range(5)}
    assert len(starts) == 5


def test_a_backlog_is_split_as_a_trickle_is():
    """Claimed by the thousand or one by one: the sequence is the same."""
    once, one_by_one = Router(phase=99), Router(phase=99)
    slots = once.route(plain(500))
    assert [one_by_one.route(plain(1))[0] for _ in range(500)] == slots


def test_a_long_backlog_is_claimed_in_parts():
    router = Router()
    for _ in range(20_000):
        router.ring.push(b"x", "k")
    router.dispatcher.flush()
    assert 0 < router.ring.claimed < 20_000
    router.loop.run()
    assert router.ring.claimed == 20_000


def test_claim_limit_leaves_the_rest_in_ring():
    router = Router()
    router.dispatcher.claim_limit = 30
    for _ in range(100):
        router.ring.push(b"x", "k")
    router.dispatcher.flush()
    router.loop.run()
    assert (router.ring.claimed, router.ring.has_more) == (30, True)


def test_without_a_table_nothing_is_claimed():
    router = Router()
    router.dispatcher.set_table(None, None)
    router.ring.push(b"x", "k")
    router.dispatcher.flush()
    router.loop.run()
    assert router.ring.claimed == 0
    router.set({2: 1.0})
    assert router.route(plain(1)) == [2]


# ---- random


@pytest.mark.parametrize("weights", [WEIGHTS, (1, 1, 1, 1), (1, 2, 3, 4)])
def test_random_picks_follow_the_weights(weights):
    count = 40_000
    slots = Router("random", weights=weights, phase=2024).route(plain(count))
    shares = [weight / sum(weights) for weight in weights]
    got = Counter(slots)
    chi_square = sum((got[slot] - share * count) ** 2 / (share * count) for slot, share in enumerate(shares))
    assert chi_square < 24  # 3 degrees of freedom: 1 in 40,000
    pairs = Counter(zip(slots[::2], slots[1::2], strict=True))
    expected = {(a, b): shares[a] * shares[b] * count / 2 for a in range(4) for b in range(4)}
    assert sum((pairs[pair] - mean) ** 2 / mean for pair, mean in expected.items()) < 50  # 15: 1 in 80,000
    # Not too even either: the long run of a sequence that spreads itself would be exact.
    assert chi_square > 0.01


# ---- sticky


SOURCE = random.Random(5)
EMITTERS = [SOURCE.getrandbits(64) for _ in range(4000)]


def test_an_emitter_stays_with_its_analyzer():
    router = Router("sticky")
    source = random.Random(6)
    first = dict(zip(EMITTERS, router.route([(1, 1, emitter) for emitter in EMITTERS]), strict=True))
    for _ in range(3):
        emitters = source.sample(EMITTERS, k=3000)
        assert router.route([(1, 1, emitter) for emitter in emitters]) == [first[emitter] for emitter in emitters]
    got = Counter(first.values())
    for slot, weight in enumerate(WEIGHTS):
        spread = math.sqrt(4000 * weight * (1 - weight))
        assert abs(got[slot] - 4000 * weight) < 5 * spread


@pytest.mark.parametrize("gone", range(4))
def test_leaving_moves_only_its_own_emitters(gone):
    router = Router("sticky")
    packets = [(1, 1, emitter) for emitter in EMITTERS]
    before = router.route(packets)
    left = {slot: weight for slot, weight in enumerate(WEIGHTS) if slot != gone}
    router.set(left)
    without = router.route(packets)
    assert all(now == then for now, then in zip(without, before, strict=True) if then != gone)
    moved = Counter(now for now, then in zip(without, before, strict=True) if then == gone)
    assert gone not in moved
    total = moved.total()
    for slot, weight in left.items():  # its share goes to the rest in proportion to their weights
        share = weight / sum(left.values())
        assert abs(moved[slot] - total * share) < 5 * math.sqrt(total * share * (1 - share))
    router.set(dict(enumerate(WEIGHTS)))
    assert router.route(packets) == before


def test_grown_weight_only_takes_emitters():
    router = Router("sticky")
    packets = [(1, 1, emitter) for emitter in EMITTERS]
    before = router.route(packets)
    router.set({0: 0.3, 1: 0.4, 2: 0.2, 3: 0.3})
    after = router.route(packets)
    assert all(now in (then, 0) for now, then in zip(after, before, strict=True))
    assert after.count(0) > 1.5 * before.count(0)


# ---- by messages and by bytes

COUNT = 5000
PERIODS = (2, 3, 5, 8, 13, 21, 34)  # the golden ratio's own


def golden(index):
    """The sequence that drives the table, from 0 to 1."""
    return (index * GOLDEN_RATIO_STEP % 2**64) / 2**64


SIZES = {
    "equal": lambda _index: 100,
    "alternating": lambda index: 1000 if index % 2 else 1,
    "sorted up": lambda index: 1 + index // 8,
    "sorted down": lambda index: 1 + (COUNT - index) // 8,
    "the golden ratio's": lambda index: 1 + int(999 * golden(index)),
    "the golden ratio's, backwards": lambda index: 1000 - int(999 * golden(index)),
    "large in the first tenth of the sequence": lambda index: 1000 if golden(index) < 0.1 else 1,
    "large in the middle of the sequence": lambda index: 1000 if 0.3 < golden(index) < 0.5 else 1,
    "rarely huge": lambda index: 1000 if index % 100 == 0 else 3,
    "rarely tiny": lambda index: 1 if index % 50 == 0 else 700,
    "random": lambda index: random.Random(index).randint(1, 1000),
    "heavy tail": lambda index: min(1000, int(random.Random(index).paretovariate(0.8))),
    "zeros": lambda index: 1000 if index % 3 else 0,
} | {f"every {period}th": lambda index, period=period: 1000 if index % period == 0 else 1 for period in PERIODS}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("strategy", "by", "weights"),
    [
        ("even", "messages", WEIGHTS),
        ("even", "bytes", WEIGHTS),
        ("even", "bytes", (0.94, 0.02, 0.02, 0.02)),
        ("random", "bytes", WEIGHTS),
    ],
)
def test_unit_shares_ignore_the_order(sizes, strategy, by, weights):
    units = [SIZES[sizes](index) for index in range(COUNT)]
    packets = [(1, size, 0) if by == "messages" else (size, 1, 0) for size in units]
    phase = 0 if strategy == "even" else 77
    slots = Router(strategy, by, weights, phase=phase).route(packets)
    largest, total, got = max(units), 0, [0.0] * 4
    most = least = 0.0  # ahead of its share, of any analyzer at any time
    for slot, size in zip(slots, units, strict=True):
        got[slot] += size
        total += size
        ahead = [got[each] - weights[each] * total for each in range(4)]
        most, least = max(most, *ahead), min(least, *ahead)
    assert most <= 1.01 * largest
    assert least >= -3.01 * largest


def test_phase_does_not_change_the_shares():
    units = [SIZES["the golden ratio's"](index) for index in range(3000)]
    for phase in range(0, 2**64, 2**64 // 23):
        slots = Router(by="bytes", phase=phase).route([(size, 1, 0) for size in units])
        total = sum(units)
        for slot, weight in enumerate(WEIGHTS):
            got = sum(size for size, each in zip(units, slots, strict=True) if each == slot)
            assert abs(got - weight * total) < 3.01 * 1000


def test_packets_without_units_spread_too():
    slots = Router(by="messages").route([(1, 0, 0)] * 1000)
    got = Counter(slots)
    assert all(abs(got[slot] / 1000 - weight) < 0.05 for slot, weight in enumerate(WEIGHTS))


def test_new_table_forgets_former_credit():
    router = Router(by="bytes", weights=(1, 1), phase=0)
    router.route([(100_000, 1, 0)])
    router.set({0: 1.0, 1: 1.0})
    slots = router.route([(100, 1, 0)] * 100)
    assert abs(slots.count(0) - 50) <= 3
