"""One packet from ``data_received`` to the analyzer's reply, everything real but the sockets."""

from __future__ import annotations

import pytest
from way import Way

DELIVERIES = {
    "single": {"mode": "single"},
    "single, pipeline 8": {"mode": "single", "pipeline": 8},
    "batch": {"mode": "batch"},
}


@pytest.mark.parametrize("name", DELIVERIES)
@pytest.mark.parametrize(("emitters", "messages"), [(1, 2), (64, 2), (64, 100)])
def test_the_whole_way(benchmark, name, emitters, messages):
    way = Way(emitters, messages=messages, **DELIVERIES[name])
    before = way.counters.get("accepted")
    benchmark.group = f"whole way, {emitters} packets a turn, {messages} messages each"
    benchmark.extra_info["packets"] = emitters
    benchmark(way.turn)
    accepted = way.counters.get("accepted") - before
    assert accepted
    assert accepted % emitters == 0
    assert accepted == sum(way.counters.get_of(slot, "delivered") for slot in range(4)) - emitters


@pytest.mark.parametrize("analyzers", [4, 64, 1000])
@pytest.mark.parametrize("mode", ["single", "batch"])
def test_the_whole_way_with_many_analyzers(benchmark, mode, analyzers):
    way = Way(64, analyzers=analyzers, mode=mode, connections=2)
    benchmark.group = f"whole way, {mode}, many analyzers"
    benchmark.extra_info["packets"] = 64
    benchmark(way.turn)


@pytest.mark.parametrize("messages", [2, 100])
def test_accepting(benchmark, messages):
    """Read, check, store and answer, and no more: what is behind it is emptied between."""
    way = Way(64, messages=messages, mode="batch")

    def empty():
        way.loop.run()
        way.answer()

    benchmark.group = f"accepting 64 packets, {messages} messages each"
    benchmark.pedantic(way.accept, setup=empty, rounds=1000, warmup_rounds=50)
