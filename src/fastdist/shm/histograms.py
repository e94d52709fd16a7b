"""Histograms of the shared block: durations by bucket, and their percentiles.

The buckets are those of ``fastdist._core``: eight an octave, so that a percentile is off by an eighth at most.
A histogram in shared memory is 248 words: the buckets, then their count, the sum and the longest, in nanoseconds;
the sum is a double.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from msgspec import Struct

from fastdist._core import add_histograms, bucket_bounds

if TYPE_CHECKING:
    from collections.abc import Iterable

BOUNDS: list[int] = bucket_bounds()  # exclusive upper ones, nanoseconds
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


class Histogram(Struct, frozen=True):
    """Durations: how many fell into each bucket of ``BOUNDS``, their sum and the longest."""

    buckets: list[int]
    sum_ns: float
    max_ns: int

    def since(self, earlier: Histogram) -> Histogram:
        """Return what was added since ``earlier``; of the longest only its bucket is known then."""
        if not any(earlier.buckets):
            return self
        buckets = [max(now - then, 0) for now, then in zip(self.buckets, earlier.buckets, strict=True)]
        highest = max((bucket for bucket, count in enumerate(buckets) if count), default=None)
        bounds = (*BOUNDS[:-1], self.max_ns)  # the last bucket has none
        longest = 0 if highest is None else min(self.max_ns, bounds[highest])
        return Histogram(buckets, max(self.sum_ns - earlier.sum_ns, 0), longest)

    def cumulative(self) -> list[int]:
        """Return, for every bucket, how many are in it and in those below: the last is how many there are."""
        return list(accumulate(self.buckets))

    def percentiles(self, *fractions: float) -> list[float | None]:
        """Return the nanoseconds that each of ``fractions`` (0..1) of all stay under; None without durations.

        Within a bucket durations are taken to be spread evenly.
        """
        cumulative = self.cumulative()
        return [self._at(fraction * cumulative[-1], cumulative) if cumulative[-1] else None for fraction in fractions]

    def _at(self, rank: float, cumulative: list[int]) -> float:
        bucket = bisect_left(cumulative, max(rank, 1e-9))  # a rank of 0 is in the first bucket that holds anything
        below = cumulative[bucket - 1] if bucket else 0
        lower, upper = BOUNDS[bucket - 1] if bucket else 0, BOUNDS[bucket]
        if bucket == len(BOUNDS) - 1:  # it has no upper bound
            upper = max(upper, self.max_ns)
        within = (rank - below) / self.buckets[bucket]
        return min(lower + within * (upper - lower), max(self.max_ns, lower))

    def milliseconds(self) -> dict[str, float | None]:
        """Return what the views show: p50, p90, p99, p999 and max."""
        figures = dict(zip(PERCENTILES, self.percentiles(*PERCENTILES.values()), strict=True))
        figures["max"] = self.max_ns if any(self.buckets) else None
        return {name: None if ns is None else round(ns / 1e6, 3) for name, ns in figures.items()}


def merge(histograms: Iterable[memoryview]) -> Histogram:
    """Return the sum of histograms given as their words in shared memory."""
    return Histogram(*add_histograms(histograms))
