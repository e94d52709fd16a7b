"""The ring: 64 packets pushed, claimed and done."""

from __future__ import annotations

import pytest
from tools import packet
from way import memory_ring

PACKETS = 64


def push(ring, body):
    for _ in range(PACKETS):
        ring.push(body)


def claim(ring):
    return [ring.claim() for _ in range(PACKETS)]


@pytest.mark.parametrize("messages", [2, 100])
def test_push_claim_done(benchmark, messages):
    ring, body = memory_ring(), packet(messages)

    def all_three():
        push(ring, body)
        for handle in claim(ring):
            ring.done(handle)

    benchmark.group = f"ring, {PACKETS} packets of {len(body)} bytes"
    benchmark(all_three)
    assert ring.undone == 0


@pytest.mark.parametrize("messages", [2, 100])
def test_push(benchmark, messages):
    ring, body = memory_ring(), packet(messages)

    def empty():
        while handle := ring.claim():
            ring.done(handle)

    benchmark.group = f"ring, {PACKETS} packets of {len(body)} bytes"
    benchmark.pedantic(push, args=(ring, body), setup=empty, rounds=2000, warmup_rounds=50)
    assert ring.undone == PACKETS


def test_done_out_of_order(benchmark):
    ring, body = memory_ring(), packet(2)

    def backwards():
        push(ring, body)
        for handle in reversed(claim(ring)):
            ring.done(handle)

    benchmark.group = f"ring, {PACKETS} packets of {len(body)} bytes"
    benchmark(backwards)
    assert ring.undone == 0


def test_push_claim_done_behind_a_backlog(benchmark):
    """The same with 100,000 packets before them that are claimed and not done."""
    ring, body = memory_ring(1 << 27), packet(2)
    for _ in range(250_000):  # once around: later laps find their pages there
        ring.push(body)
        ring.done(ring.claim())
    for _ in range(100_000):
        assert ring.push(body)
        ring.claim()

    def all_three():
        push(ring, body)
        for handle in claim(ring):
            ring.done(handle)

    benchmark.group = f"ring, {PACKETS} packets of {len(body)} bytes"
    benchmark.pedantic(all_three, rounds=200, warmup_rounds=10)
    assert ring.undone == 100_000
