"""A worker's row of counters and histograms, word for word against a model."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdist._core import (
    ANALYZER_FIELDS,
    ANALYZER_WORDS,
    COUNTER_WORDS,
    FIELDS,
    FIRST_PROTOCOL_WORD,
    HISTOGRAM_BUCKETS,
    HISTOGRAMS_PER_ROW,
    STATUSES_COUNTED,
    WORDS_PER_HISTOGRAM,
    WORDS_PER_PROTOCOL,
    Counters,
    bucket_bounds,
    row_words,
)

SLOTS = 3
BOUNDS = bucket_bounds()

fields = st.sampled_from(sorted(FIELDS))
analyzer_fields = st.sampled_from(sorted(ANALYZER_FIELDS))
slots = st.integers(0, SLOTS - 1)
amounts = st.integers(-(2**40), 2**40)
durations = st.one_of(st.integers(0, 10_000), st.integers(-(2**40), 2**45), st.sampled_from([0, *BOUNDS]))


def row(slots=SLOTS):
    memory = bytearray(8 * row_words(slots))
    return Counters(memory, slots), memoryview(memory).cast("q")


def as_double(number):
    """Return the word that holds a number as a double."""
    return struct.unpack("q", struct.pack("d", number))[0]


class Model:
    """The row as a list of numbers, in the order: worker, ingest, queue wait, loop lag, analyzers, their deliveries."""

    def __init__(self):
        self.words = [0] * row_words(SLOTS)
        self.sums = {}  # by word

    def at(self, field):
        return FIELDS[field]

    def at_of(self, slot, field):
        return COUNTER_WORDS + HISTOGRAMS_PER_ROW * WORDS_PER_HISTOGRAM + slot * ANALYZER_WORDS + ANALYZER_FIELDS[field]

    def observe(self, start, ns):
        ns = max(0, ns)
        bucket = next((i for i, bound in enumerate(BOUNDS) if ns < bound), HISTOGRAM_BUCKETS - 1)
        self.words[start + bucket] += 1
        self.words[start + HISTOGRAM_BUCKETS] += 1
        total = self.sums[start + HISTOGRAM_BUCKETS + 1] = self.sums.get(start + HISTOGRAM_BUCKETS + 1, 0) + ns
        self.words[start + HISTOGRAM_BUCKETS + 1] = as_double(total)
        self.words[start + HISTOGRAM_BUCKETS + 2] = max(ns, self.words[start + HISTOGRAM_BUCKETS + 2])

    def apply(self, name, *args):
        if name == "add":
            self.words[self.at(args[0])] += args[1]
        elif name == "set":
            self.words[self.at(args[0])] = args[1]
        elif name == "add_to":
            self.words[self.at_of(*args[:2])] += args[2]
        elif name == "set_of":
            self.words[self.at_of(*args[:2])] = args[2]
        elif name == "observe_ingest":
            self.observe(COUNTER_WORDS, args[0])
        elif name == "observe_loop_lag":
            self.observe(COUNTER_WORDS + 2 * WORDS_PER_HISTOGRAM, args[0])
        else:
            deliveries = COUNTER_WORDS + HISTOGRAMS_PER_ROW * WORDS_PER_HISTOGRAM + SLOTS * ANALYZER_WORDS
            self.observe(deliveries + args[0] * WORDS_PER_HISTOGRAM, args[1])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["add", "set"]), fields, amounts),
            st.tuples(st.sampled_from(["add_to", "set_of"]), slots, analyzer_fields, amounts),
            st.tuples(st.sampled_from(["observe_ingest", "observe_loop_lag"]), durations),
            st.tuples(st.just("observe_delivery"), slots, durations),
        )
    )
)
def test_the_row_is_that_of_the_model(steps):
    counters, words = row()
    model = Model()
    for name, *args in steps:
        getattr(counters, name)(*args)
        model.apply(name, *args)
    assert words.tolist() == model.words
    assert all(counters.get(field) == model.words[model.at(field)] for field in FIELDS)
    for slot in range(SLOTS):
        assert all(counters.get_of(slot, field) == model.words[model.at_of(slot, field)] for field in ANALYZER_FIELDS)


def test_requests_counted_by_protocol():
    counters, words = row()
    seen = set()
    for protocol in range(8):
        for status in STATUSES_COUNTED:
            before = words.tolist()
            counters.add_request(protocol, status, 5)
            changed = {
                at: now - then for at, (then, now) in enumerate(zip(before, words.tolist(), strict=True)) if now != then
            }
            records = FIRST_PROTOCOL_WORD + protocol * WORDS_PER_PROTOCOL
            assert changed == {records: 5, records + 1 + STATUSES_COUNTED.index(status): 1}
            seen |= changed.keys()
    assert len(seen) == 8 * (len(STATUSES_COUNTED) + 1)
    assert min(seen) >= len(FIELDS)
    assert max(seen) < COUNTER_WORDS
    assert len(STATUSES_COUNTED) < WORDS_PER_PROTOCOL
    for protocol, status, error in ((8, 200, IndexError), (-1, 200, IndexError), (0, 299, ValueError)):
        with pytest.raises(error):
            counters.add_request(protocol, status)


def test_adding_without_a_number_adds_one():
    counters, _ = row()
    counters.add("accepted")
    counters.add_to(1, "delivered")
    assert (counters.get("accepted"), counters.get_of(1, "delivered")) == (1, 1)
    assert (counters.get_of(0, "delivered"), counters.get_of(2, "delivered")) == (0, 0)


def test_every_field_has_a_word_of_its_own():
    assert sorted(FIELDS.values()) == list(range(len(FIELDS)))
    assert sorted(ANALYZER_FIELDS.values()) == list(range(len(ANALYZER_FIELDS)))
    assert len(FIELDS) <= COUNTER_WORDS
    assert len(ANALYZER_FIELDS) <= ANALYZER_WORDS
    assert HISTOGRAM_BUCKETS + 3 <= WORDS_PER_HISTOGRAM  # their number, sum and maximum


@given(durations)
@example(0)
@example(255)
@example(256)
@example(2**62)
def test_value_falls_into_its_buckets_bounds(ns):
    counters, words = row()
    counters.observe_ingest(ns)
    histogram = words[COUNTER_WORDS : COUNTER_WORDS + WORDS_PER_HISTOGRAM].tolist()
    (bucket,) = [i for i in range(HISTOGRAM_BUCKETS) if histogram[i]]
    seen = max(ns, 0)
    assert bucket == 0 or BOUNDS[bucket - 1] <= seen
    assert bucket == HISTOGRAM_BUCKETS - 1 or seen < BOUNDS[bucket]
    assert histogram[bucket] == 1
    assert histogram[HISTOGRAM_BUCKETS : HISTOGRAM_BUCKETS + 3] == [1, as_double(seen), seen]


def test_bounds_grow_by_eighths_to_15_min():
    assert len(BOUNDS) == HISTOGRAM_BUCKETS
    assert BOUNDS[:9] == [256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304]
    assert all(1 < after / before <= 1.125 for before, after in itertools.pairwise(BOUNDS[7:]))
    assert all(before < after for before, after in itertools.pairwise(BOUNDS))
    assert BOUNDS[-1] > 15 * 60 * 10**9


def test_rows_are_cache_lines_grown_by_slot():
    words = [row_words(slots) for slots in range(5)]
    assert all(count % 8 == 0 for count in words)
    assert words[0] == COUNTER_WORDS + HISTOGRAMS_PER_ROW * WORDS_PER_HISTOGRAM
    assert {after - before for before, after in itertools.pairwise(words)} == {ANALYZER_WORDS + WORDS_PER_HISTOGRAM}


def test_rows_in_one_buffer_do_not_overlap():
    size = 8 * row_words(SLOTS)
    memory = memoryview(bytearray(2 * size))
    first, second = Counters(memory[:size], SLOTS), Counters(memory[size:], SLOTS)
    for field in FIELDS:
        second.set(field, -1)
    for slot in range(SLOTS):
        second.observe_delivery(slot, 10**9)
    assert not any(memory[:size])
    for slot in range(SLOTS):
        first.observe_delivery(slot, 10**18)
        first.set_of(slot, "connections", -1)
    other = memoryview(bytearray(size))
    third = Counters(other, SLOTS)
    for field in FIELDS:
        third.set(field, -1)
    for slot in range(SLOTS):
        third.observe_delivery(slot, 10**9)
    assert memory[size:] == other


def test_buffer_outlives_its_other_owners():
    counters, words = row()
    words.release()
    counters.add("accepted", 5)
    assert counters.get("accepted") == 5


@pytest.mark.parametrize("slot", [-1, SLOTS, 2**40])
def test_slots_there_are_not(slot):
    counters, words = row()
    for call in (
        lambda: counters.add_to(slot, "delivered"),
        lambda: counters.set_of(slot, "connections", 1),
        lambda: counters.get_of(slot, "failed"),
        lambda: counters.observe_delivery(slot, 1),
    ):
        with pytest.raises(IndexError, match=f"slot {slot} of 3"):
            call()
    assert not any(words)


def test_fields_there_are_not():
    counters, _ = row()
    for call in (
        lambda: counters.add("nonsense"),
        lambda: counters.set("delivered", 1),
        lambda: counters.get(""),
        lambda: counters.add_to(0, "accepted"),
        lambda: counters.set_of(0, "nonsense", 1),
        lambda: counters.get_of(0, "accepted"),
    ):
        with pytest.raises(KeyError):
            call()


def test_buffers_that_will_not_do():
    size = 8 * row_words(SLOTS)
    with pytest.raises(ValueError, match=f"takes {size} aligned bytes, got {size - 8}"):
        Counters(bytearray(size - 8), SLOTS)
    with pytest.raises(ValueError, match="aligned"):
        Counters(memoryview(bytearray(size + 8))[4:], SLOTS)
    with pytest.raises((BufferError, TypeError)):
        Counters(bytes(size), SLOTS)
    assert Counters(bytearray(size + 100), SLOTS).slots == SLOTS
