"""Choosing an analyzer, a hundred times: the alias table beside what else one might use.

All three are called from Python here; in fastdist the table is called from compiled code, which costs less.
"""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from tools import weight_of

from fastdist._core import GOLDEN_RATIO_STEP, AliasTable, Rendezvous

PICKS = 100
SIZES = [4, 64, 10_000]


class SmoothWeighted:
    """Smooth weighted round robin, as nginx does it: the most indebted is next, and pays."""

    def __init__(self, weights):
        self.weights, self.total = list(weights), sum(weights)
        self.credit = [0] * len(self.weights)

    def pick(self):
        credit = self.credit = [have + weight for have, weight in zip(self.credit, self.weights, strict=True)]
        best = max(credit)
        place = credit.index(best)
        credit[place] = best - self.total
        return place


def weights(size):
    return [weight_of(slot) for slot in range(size)]


def fractions():
    return [(1 + step) * GOLDEN_RATIO_STEP % 2**64 for step in range(PICKS)]


def check(counts, size):
    """Every picked slot exists."""
    assert len(counts) == PICKS
    assert all(0 <= slot < size for slot in counts)


@pytest.mark.parametrize("size", SIZES)
def test_alias_table(benchmark, size):
    pick, each = AliasTable(range(size), weights(size)).pick, fractions()
    benchmark.group = f"{PICKS} picks of {size}"
    check(benchmark(lambda: [pick(u) for u in each]), size)


@pytest.mark.parametrize("size", SIZES)
def test_random_choices(benchmark, size):
    population, cumulated = range(size), list(accumulate(weights(size)))
    benchmark.group = f"{PICKS} picks of {size}"
    check(benchmark(lambda: [random.choices(population, cum_weights=cumulated)[0] for _ in range(PICKS)]), size)


@pytest.mark.parametrize("size", SIZES)
def test_smooth_weighted_round_robin(benchmark, size):
    robin = SmoothWeighted(weights(size))
    benchmark.group = f"{PICKS} picks of {size}"
    check(benchmark(lambda: [robin.pick() for _ in range(PICKS)]), size)


@pytest.mark.parametrize("size", SIZES)
def test_rendezvous(benchmark, size):
    """Sticky: the choice for emitters seen before is remembered, for a hundred others it is computed."""
    table = Rendezvous([f"A{slot}" for slot in range(size)], range(size), weights(size))
    keys = [random.getrandbits(64) for _ in range(PICKS)]
    benchmark.group = f"{PICKS} picks of {size}"
    check(benchmark(lambda: [table.pick(key) for key in keys]), size)


@pytest.mark.parametrize("size", SIZES)
def test_building_the_table(benchmark, size):
    """What a change of health or weights costs."""
    slots, each = list(range(size)), weights(size)
    benchmark.group = "building a table"
    assert benchmark(AliasTable, slots, each).size == size


def test_smooth_weighted_round_robin_is_what_it_is_called():
    robin = SmoothWeighted([5, 1, 1])
    assert "".join("abc"[robin.pick()] for _ in range(7)) == "aabacaa"
