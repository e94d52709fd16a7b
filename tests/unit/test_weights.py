"""Shares: who gets packets, and how much of them, in every state an analyzer can be in."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdist.settings import Analyzer, Health
from fastdist.shm.block import AnalyzerWord, SharedBlock
from fastdist.shm.weights import effective_weights, normalised, ramp

NOW = 10**12
SECOND = 10**9
WORDS = {
    "offline": (AnalyzerWord.STATE, 1),
    "draining": (AnalyzerWord.DRAINING, 1),
    "unused": (AnalyzerWord.IN_USE, 0),
    "paused": (AnalyzerWord.PAUSED_UNTIL_NS, NOW + 1),
    "was paused": (AnalyzerWord.PAUSED_UNTIL_NS, NOW),
    "online": (AnalyzerWord.IN_USE, 1),
}


@pytest.fixture
def block():
    block = SharedBlock.create(1, 64)
    os.close(block.fd)  # the mapping stays
    return block


def by_slot(block, analyzers):
    """Put (weight, state) pairs into every third slot, and return the analyzers by slot."""
    slots = {}
    for index, (weight, state) in enumerate(analyzers):
        slot = 3 * index
        block.analyzers.clear(slot)
        block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
        block.analyzers.set_weight(slot, weight)
        block.analyzers.set(slot, *WORDS[state])
        slots[slot] = Analyzer(id=f"A{index}", endpoint="http://127.0.0.1:1/", weight=weight)
    return slots


@pytest.mark.parametrize(
    ("analyzers", "expected"),
    [
        ([(0.1, "online"), (0.4, "online")], {0: 0.1, 3: 0.4}),
        ([(0.1, "online"), (0.4, "offline")], {0: 0.1}),
        ([(0.1, "online"), (0.4, "draining")], {0: 0.1}),
        ([(0.1, "online"), (0.4, "unused")], {0: 0.1}),
        ([(0.1, "online"), (0.4, "paused")], {0: 0.1}),
        ([(0.1, "online"), (0.4, "was paused")], {0: 0.1, 3: 0.4}),
        ([(0.1, "offline"), (0.4, "draining")], {}),
        ([], {}),
        # Weight 0: only while no other is online, and then all alike.
        ([(0, "online"), (0.4, "online")], {3: 0.4}),
        ([(0, "online"), (0.4, "offline"), (0, "online")], {0: 1.0, 6: 1.0}),
        ([(0, "online"), (0.4, "draining")], {0: 1.0}),
        ([(0, "online"), (0.4, "paused")], {}),
        ([(0, "paused"), (0.4, "offline"), (0, "online")], {6: 1.0}),
    ],
)
def test_analyzers_that_get_packets(block, analyzers, expected):
    assert effective_weights(block.analyzers, by_slot(block, analyzers), Health(), NOW) == expected


def test_share_follows_the_effective_weight(block):
    slots = by_slot(block, [(0.1, "online")])
    block.analyzers.set_weight(0, 7.0)
    assert effective_weights(block.analyzers, slots, Health(), NOW) == {0: 7.0}


@pytest.mark.parametrize(
    ("online_since", "part"),
    [(0, 1.0), (NOW, 0.1), (NOW + SECOND, 0.1), (NOW - 5 * SECOND, 0.55), (NOW - 10 * SECOND, 1.0), (1, 1.0)],
)
def test_slow_start_ramps_from_a_tenth(block, online_since, part):
    slots = by_slot(block, [(2.0, "online"), (1.0, "online")])
    block.analyzers.set(0, AnalyzerWord.ONLINE_SINCE_NS, online_since)
    weights = effective_weights(block.analyzers, slots, Health(slow_start=10.0), NOW)
    assert weights == {0: pytest.approx(2.0 * part), 3: 1.0}
    assert effective_weights(block.analyzers, slots, Health(), NOW) == {0: 2.0, 3: 1.0}


def test_tiny_ramp_weight_stays_positive(block):
    slots = by_slot(block, [(5e-324, "online")])
    block.analyzers.set(0, AnalyzerWord.ONLINE_SINCE_NS, NOW)
    assert effective_weights(block.analyzers, slots, Health(slow_start=10.0), NOW) == {0: 5e-324}


def test_the_ramp_never_falls():
    parts = [ramp(NOW, 3.0, NOW + step * SECOND // 10) for step in range(-5, 40)]
    assert parts == sorted(parts)
    assert (parts[0], parts[-1]) == (0.1, 1.0)


def model(analyzers):
    """Read the rules out, one by one."""
    online = [(3 * i, weight, state) for i, (weight, state) in enumerate(analyzers) if WORDS[state] != WORDS["offline"]]
    online = [item for item in online if item[2] not in {"draining", "unused"}]
    if any(weight > 0 for _, weight, _ in online):
        return {slot: weight for slot, weight, state in online if weight > 0 and state != "paused"}
    return {slot: 1.0 for slot, _, state in online if state != "paused"}


@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)  # by_slot writes every slot again
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 3.0]), st.sampled_from(sorted(WORDS))), max_size=20))
def test_agrees_with_the_rules_read_out(block, analyzers):
    assert effective_weights(block.analyzers, by_slot(block, analyzers), Health(), NOW) == model(analyzers)


@given(st.dictionaries(st.integers(0, 63), st.floats(0, 1e12)))
def test_normalised_adds_up_to_one(weights):
    shares = normalised(weights)
    assert shares.keys() == weights.keys()
    assert sum(shares.values()) == (pytest.approx(1.0) if any(weights.values()) else 0.0)
