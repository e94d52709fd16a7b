"""A ring's file of which not all is in memory: what has to be read from the disk."""

from __future__ import annotations

import os
import random

import pytest
from ring_disk import memfd

from fastdist._core import HEADER_SIZE, PacketRing

PAGE = 4096
SIZES = (33_000, 40_001, 50_000)


def page_behind(fd, tail, capacity):
    """Return what follows a position up to the end of its page."""
    return os.pread(fd, -tail % PAGE, HEADER_SIZE + tail % capacity)


@pytest.mark.parametrize("seed", range(5))
def test_large_records_end_their_pages(seed):
    """Else the kernel has to read the rest of the last page, which was written a lap ago."""
    rng, capacity = random.Random(seed), 1 << 20
    fd = memfd(capacity)
    ring = PacketRing(fd, capacity)

    def push(fill):
        start = ring.tail_position
        assert ring.push(fill * rng.choice(SIZES))
        ring.done(ring.claim())
        return start % capacity < ring.tail_position % capacity  # in one piece

    while ring.tail_position < capacity:
        push(b"\xff")
    for _ in range(15):
        in_one_piece = push(b"x")
        rest = page_behind(fd, ring.tail_position, capacity)
        assert not in_one_piece or rest == bytes(len(rest))
    os.close(fd)
