"""Histograms: merging loses nothing, and percentiles agree with a sorted list to within a bucket."""

from __future__ import annotations

import math
from bisect import bisect_right

from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import COUNTER_WORDS, WORDS_PER_HISTOGRAM, Counters, row_words
from fastdist.shm.histograms import BOUNDS, PERCENTILES, merge

DURATIONS = st.integers(0, 2**42) | st.integers(0, 5000) | st.sampled_from(BOUNDS)


def words_of(durations):
    """Return the words of a histogram that has counted ``durations`` (nanoseconds)."""
    row = memoryview(bytearray(8 * row_words(1)))
    counters = Counters(row, 1)
    for ns in durations:
        counters.observe_ingest(ns)
    return row.cast("q")[COUNTER_WORDS : COUNTER_WORDS + WORDS_PER_HISTOGRAM]


@given(st.lists(st.lists(DURATIONS, max_size=30), max_size=5))
def test_merging_is_counting_all_in_one(parts):
    merged = merge(map(words_of, parts))
    durations = [ns for part in parts for ns in part]
    whole = words_of(durations)
    assert merged.buckets == whole[: len(BOUNDS)].tolist()
    assert merged.cumulative()[-1] == len(durations)
    assert merged.sum_ns == sum(durations)
    assert merged.max_ns == max(durations, default=0)


def test_sums_have_no_end():
    assert merge([words_of([2**62] * 5)] * 3).sum_ns == 15 * 2**62


def test_merging_carries_not_between_words():
    words = memoryview(bytearray(8 * WORDS_PER_HISTOGRAM)).cast("q")
    for index in range(len(words)):
        words[index] = 2**60 + index
    merged = merge([words] * 7)
    assert merged.buckets == [7 * (2**60 + index) for index in range(len(BOUNDS))]


@given(st.lists(DURATIONS, min_size=1, max_size=200), st.sampled_from([*PERCENTILES.values(), 0.0, 0.1, 1.0]))
def test_percentiles_are_within_one_bucket(durations, fraction):
    truth = sorted(durations)[max(math.ceil(fraction * len(durations)), 1) - 1]
    (estimate,) = merge([words_of(durations)]).percentiles(fraction)
    bucket = min(bisect_right(BOUNDS, truth), len(BOUNDS) - 1)
    lower = BOUNDS[bucket - 1] if bucket else 0
    upper = max(BOUNDS[bucket], *durations) if bucket == len(BOUNDS) - 1 else BOUNDS[bucket]
    assert lower <= estimate <= upper
    assert estimate <= max(durations)


@given(st.lists(DURATIONS, min_size=1, max_size=200))
def test_percentiles_never_fall(durations):
    figures = list(merge([words_of(durations)]).milliseconds().values())
    assert figures == sorted(figures)


def test_interpolates_within_a_bucket():
    # All of these are in the bucket from 2**20 to 2**20 + 2**17.
    histogram = merge([words_of([2**20 + 2**17 - 1] * 100)])
    assert histogram.percentiles(0.5, 0.25) == [2**20 + 2**16, 2**20 + 2**15]


def test_nothing_has_no_percentiles():
    nothing = {"p50": None, "p90": None, "p99": None, "p999": None, "max": None}
    assert merge([]).milliseconds() == merge([words_of([])]).milliseconds() == nothing


def test_milliseconds_round_to_a_microsecond():
    assert merge([words_of([123_456_789])]).milliseconds()["max"] == 123.457


@given(st.lists(DURATIONS, min_size=1, max_size=30), st.lists(DURATIONS, max_size=30))
def test_difference_is_what_counted_since(before, after):
    earlier, now = merge([words_of(before)]), merge([words_of(before + after)])
    added, alone = now.since(earlier), merge([words_of(after)])
    assert (added.buckets, added.sum_ns) == (alone.buckets, alone.sum_ns)
    assert alone.max_ns <= added.max_ns <= max([alone.max_ns * 1.15 + 256, *(ns for ns in before if ns >= BOUNDS[-2])])
