"""The analyzers' states in shared memory, and that both sides mean the same words by the same numbers."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import AnalyzerStates
from fastdist.shm.block import AnalyzerState, AnalyzerWord, HeadWord, SharedBlock

SLOTS = 3
ROW = AnalyzerWord.ANALYZER_WORDS
ERROR_BYTES = 8 * (ROW - AnalyzerWord.ERROR)


class Fixture:
    """States, and the words below them."""

    def __init__(self):
        rows, head = bytearray(8 * ROW * SLOTS), bytearray(8 * HeadWord.HEAD_WORDS)
        self.states = AnalyzerStates(rows, head)
        self.bytes, self.rows, self.head = rows, memoryview(rows).cast("q"), memoryview(head).cast("q")

    def word(self, slot, word):
        return self.rows[slot * ROW + word]

    def put(self, slot, word, value):
        self.rows[slot * ROW + word] = value

    def row(self, slot):
        return self.rows[slot * ROW : (slot + 1) * ROW].tolist()


@pytest.fixture
def block():
    return Fixture()


def wall_and_monotonic(call):
    """Return what ``call`` returns, and the clocks' ranges while it ran."""
    wall, monotonic = time.time_ns(), time.monotonic_ns()
    result = call()
    return result, range(wall, time.time_ns() + 1), range(monotonic, time.monotonic_ns() + 1)


# ---- the words


def test_there_are_as_many_slots_as_rows(block):
    assert block.states.slots == SLOTS


@given(st.integers(0, SLOTS - 1), st.sampled_from(list(AnalyzerWord)[:-1]), st.integers(-(2**63), 2**63 - 1))
def test_get_and_set_use_enumeration_words(slot, word, value):
    block = Fixture()
    block.states.set(slot, word, value)
    expected = [0] * (ROW * SLOTS)
    expected[slot * ROW + word] = value
    assert block.rows.tolist() == expected
    assert block.states.get(slot, word) == value


def test_offline_sets_since_and_successes(block):
    block.put(1, AnalyzerWord.CHECK_SUCCESSES, 5)
    went, wall, _ = wall_and_monotonic(lambda: block.states.go_offline(1))
    assert went
    expected = [0] * ROW
    expected[AnalyzerWord.STATE] = AnalyzerState.OFFLINE
    expected[AnalyzerWord.SINCE_NS] = block.word(1, AnalyzerWord.SINCE_NS)
    assert block.row(1) == expected
    assert block.word(1, AnalyzerWord.SINCE_NS) in wall
    assert block.row(0) == block.row(2) == [0] * ROW


def test_online_resets_failures_pause_since(block):
    for word in (
        AnalyzerWord.DELIVERY_FAILURES,
        AnalyzerWord.CHECK_FAILURES,
        AnalyzerWord.CHECK_SUCCESSES,
        AnalyzerWord.PAUSED_UNTIL_NS,
        AnalyzerWord.PROBATION_WAIT_NS,
        AnalyzerWord.REFUSALS,
        AnalyzerWord.LAST_STATUS,
    ):
        block.put(1, word, 7)
    block.put(1, AnalyzerWord.STATE, AnalyzerState.OFFLINE)
    went, wall, monotonic = wall_and_monotonic(lambda: block.states.go_online(1))
    assert went
    expected = [0] * ROW
    expected[AnalyzerWord.STATE] = AnalyzerState.ONLINE
    expected[AnalyzerWord.CHECK_SUCCESSES] = expected[AnalyzerWord.LAST_STATUS] = 7
    expected[AnalyzerWord.REFUSALS] = 7  # only a 2xx ends those
    expected[AnalyzerWord.SINCE_NS] = block.word(1, AnalyzerWord.SINCE_NS)
    expected[AnalyzerWord.ONLINE_SINCE_NS] = block.word(1, AnalyzerWord.ONLINE_SINCE_NS)
    assert block.row(1) == expected
    assert block.word(1, AnalyzerWord.SINCE_NS) in wall
    assert block.word(1, AnalyzerWord.ONLINE_SINCE_NS) in monotonic


def test_the_weight_is_a_double_in_its_word(block):
    block.states.set_weight(2, 0.3)
    at = 8 * (2 * ROW + AnalyzerWord.WEIGHT)
    assert struct.unpack_from("d", block.bytes, at) == (0.3,)
    struct.pack_into("d", block.bytes, at, 1e-300)
    assert block.states.weight(2) == 1e-300
    assert block.states.weight(1) == 0.0


def test_failed_deliveries_have_error_words(block):
    (first, wall, _), second = wall_and_monotonic(lambda: block.states.delivery_failed(0, "boom")), block.states
    assert first == 1
    assert second.delivery_failed(0, "boom again") == 2
    assert block.word(0, AnalyzerWord.DELIVERY_FAILURES) == 2
    assert block.word(0, AnalyzerWord.ERROR_NS) >= wall.start
    start = 8 * AnalyzerWord.ERROR
    assert block.bytes[start : start + ERROR_BYTES] == b"boom again".ljust(ERROR_BYTES, b"\0")
    block.bytes[start : start + 4] = b"room"
    assert block.states.error(0) == "room again"
    block.states.delivery_succeeded(0)
    assert block.word(0, AnalyzerWord.DELIVERY_FAILURES) == 0
    assert block.states.error(0) == "room again"
    assert block.states.error(1) == ""


def test_refusals_are_counted_in_their_word(block):
    assert [block.states.delivery_refused(2) for _ in range(3)] == [1, 2, 3]
    assert block.word(2, AnalyzerWord.REFUSALS) == block.states.refusals(2) == 3
    assert block.row(2) == [3 if word == AnalyzerWord.REFUSALS else 0 for word in range(ROW)]


def test_pause_and_epoch_have_their_words(block):
    block.states.pause(1, 123)
    assert block.word(1, AnalyzerWord.PAUSED_UNTIL_NS) == 123
    assert block.head.tolist() == [int(word == HeadWord.EPOCH) for word in range(HeadWord.HEAD_WORDS)]
    block.head[HeadWord.EPOCH] = 41
    block.states.touch()
    assert block.states.epoch == block.head[HeadWord.EPOCH] == 42


def test_shared_block_uses_the_same_words():
    block = SharedBlock.create(workers=2, slots=SLOTS)
    other = SharedBlock.attach(block.fd)
    block.analyzers.set_weight(1, 0.25)
    assert block.analyzers.delivery_failed(2, "no route to host") == 1
    assert other.analyzers.weight(1) == 0.25
    assert other.analyzers.get(2, AnalyzerWord.DELIVERY_FAILURES) == 1
    assert other.analyzers.error(2) == "no route to host"
    assert other.analyzers.go_offline(2)
    assert other.head[HeadWord.EPOCH] == block.analyzers.epoch == 1
    assert not block.analyzers.is_online(2)
    assert (other.head[HeadWord.WORKERS], other.head[HeadWord.SLOTS]) == (2, SLOTS)


# ---- what they do


@pytest.mark.parametrize("in_use", [0, 1])
@pytest.mark.parametrize("state", AnalyzerState)
@pytest.mark.parametrize("draining", [0, 1])
def test_pickable_is_online_and_not_draining(block, in_use, state, draining):
    block.put(1, AnalyzerWord.IN_USE, in_use)
    block.put(1, AnalyzerWord.STATE, state)
    block.put(1, AnalyzerWord.DRAINING, draining)
    assert block.states.is_pickable(1) is (in_use == 1 and state == AnalyzerState.ONLINE and draining == 0)
    assert block.states.is_online(1) is (state == AnalyzerState.ONLINE)
    assert not block.states.is_pickable(0)


def test_one_caller_changes_and_notifies(block):
    states = block.states
    assert states.is_online(0)
    assert [states.go_offline(0), states.go_offline(0)] == [True, False]
    assert states.epoch == 1
    assert [states.go_online(0), states.go_online(0)] == [True, False]
    assert states.epoch == 2
    assert states.is_online(0)


def test_online_is_no_change_when_online(block):
    block.states.pause(1, 10**18)
    block.states.delivery_failed(1, "")
    before = block.row(1)
    assert not block.states.go_online(1)
    assert block.row(1) == before
    assert block.states.epoch == 1  # of the pause


# ---- probation

RISE, NOW = 2, 10**15


def on_probation(checks=RISE):
    """Return states whose first analyzer was taken offline by deliveries and has passed so many checks."""
    block = Fixture()
    block.put(0, AnalyzerWord.IN_USE, 1)
    assert block.states.go_offline(0, by_deliveries=True)
    block.put(0, AnalyzerWord.CHECK_SUCCESSES, checks)
    return block


def test_offline_by_deliveries_needs_a_trial():
    block = on_probation(checks=0)
    assert block.states.needs_trial(0)
    assert not block.states.is_on_probation(0, RISE)
    block.put(0, AnalyzerWord.CHECK_SUCCESSES, RISE)
    assert block.states.is_on_probation(0, RISE)
    block.states.go_online(0)
    assert not block.states.needs_trial(0)
    block.states.go_offline(0)
    assert not block.states.needs_trial(0), "checks did it this time"
    assert not block.states.go_offline(0, by_deliveries=True)
    assert not block.states.needs_trial(0), "it was offline already"


def test_only_one_begins_a_trial_at_a_time():
    states = on_probation().states
    assert [states.begin_trial(0, RISE, NOW, NOW + 5), states.begin_trial(0, RISE, NOW, NOW + 5)] == [True, False]
    assert not states.begin_trial(0, RISE, NOW + 4, NOW + 9)
    assert states.begin_trial(0, RISE, NOW + 5, NOW + 9), "who began it gives no sign any more"
    states.hold_trial(0, NOW + 100)
    assert not states.may_try(0, RISE, NOW + 99)
    states.end_trial(0)
    assert states.may_try(0, RISE, NOW)


@pytest.mark.parametrize("word", [AnalyzerWord.IN_USE, AnalyzerWord.DRAINING, AnalyzerWord.CHECK_SUCCESSES])
def test_ineligible_analyzer_has_no_trial(word):
    block = on_probation()
    block.put(0, word, int(word == AnalyzerWord.DRAINING))
    assert not block.states.may_try(0, RISE, NOW)
    assert not block.states.begin_trial(0, RISE, NOW, NOW + 5)


def test_failed_trials_double_wait_to_30_s():
    states, now, waits = on_probation().states, NOW, []
    for _ in range(7):
        states.fail_trial(0, now)
        waits.append((states.get(0, AnalyzerWord.NEXT_TRIAL_NS) - now) / 1e9)
        assert not states.may_try(0, RISE, now)
        now = states.get(0, AnalyzerWord.NEXT_TRIAL_NS)
        assert states.may_try(0, RISE, now)
        assert states.has_failed_trials(0)
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_a_trial_put_off_has_not_failed():
    states = on_probation().states
    states.postpone_trial(0, NOW)
    assert not states.has_failed_trials(0)
    assert not states.may_try(0, RISE, NOW + 10**9 - 1)
    assert states.may_try(0, RISE, NOW + 10**9)


@pytest.mark.parametrize("checks", [0, RISE])
def test_passed_trial_leaves_rest_to_checks(checks):
    states = on_probation(checks).states
    epoch = states.epoch
    states.pass_trial(0, RISE)
    assert not states.needs_trial(0)
    assert states.is_online(0) is (checks == RISE)
    assert states.epoch == epoch + (checks == RISE)


def test_offline_again_forgets_old_trials():
    states = on_probation().states
    states.fail_trial(0, NOW)
    states.go_online(0)
    states.go_offline(0, by_deliveries=True)
    assert not states.has_failed_trials(0)
    states.set(0, AnalyzerWord.CHECK_SUCCESSES, RISE)
    assert states.may_try(0, RISE, 0)


@given(st.lists(st.integers(0, 2**62), max_size=20))
def test_a_pause_is_never_shortened(ends):
    block, longest, changes = Fixture(), 0, 0
    for end in ends:
        block.states.pause(0, end)
        changes += end > longest
        longest = max(longest, end)
        assert block.word(0, AnalyzerWord.PAUSED_UNTIL_NS) == longest
        assert block.states.epoch == changes


@given(st.text(max_size=500))
def test_errors_are_cut_to_their_room(text):
    block = Fixture()
    block.put(2, AnalyzerWord.STATE, 9)
    block.states.set_error(1, "x" * 1000)
    block.states.set_error(1, text)
    kept = text.encode("utf-8", "replace")[: ERROR_BYTES - 1].split(b"\0")[0].decode("utf-8", "replace")
    assert block.states.error(1) == kept
    assert block.row(2) == [9] + [0] * (ROW - 1)  # the next row is out of its reach


def test_torn_error_text_is_read_to_limit(block):
    start = 8 * AnalyzerWord.ERROR
    block.bytes[start : 8 * ROW] = b"\xff" * ERROR_BYTES
    block.put(1, AnalyzerWord.STATE, 0x4141414141414141)
    assert block.states.error(0) == "\N{REPLACEMENT CHARACTER}" * ERROR_BYTES


def test_cleared_row_is_as_of_a_new_analyzer(block):
    for word in range(ROW):
        block.put(1, word, 5)
    block.put(0, AnalyzerWord.STATE, 3)
    block.put(2, AnalyzerWord.STATE, 4)
    _, wall, _ = wall_and_monotonic(lambda: block.states.clear(1))
    since = block.word(1, AnalyzerWord.SINCE_NS)
    assert since in wall
    assert block.row(1) == [since if word == AnalyzerWord.SINCE_NS else 0 for word in range(ROW)]
    assert (block.word(0, AnalyzerWord.STATE), block.word(2, AnalyzerWord.STATE)) == (3, 4)


@pytest.mark.parametrize("slot", [-1, SLOTS, 2**40])
def test_slots_there_are_not(block, slot):
    states = block.states
    for call in (
        lambda: states.get(slot, 0),
        lambda: states.set(slot, 0, 1),
        lambda: states.weight(slot),
        lambda: states.set_weight(slot, 1.0),
        lambda: states.is_online(slot),
        lambda: states.is_pickable(slot),
        lambda: states.go_offline(slot),
        lambda: states.go_online(slot),
        lambda: states.delivery_failed(slot, ""),
        lambda: states.delivery_succeeded(slot),
        lambda: states.delivery_refused(slot),
        lambda: states.refusals(slot),
        lambda: states.needs_trial(slot),
        lambda: states.is_on_probation(slot, 1),
        lambda: states.has_failed_trials(slot),
        lambda: states.may_try(slot, 1, 1),
        lambda: states.begin_trial(slot, 1, 1, 1),
        lambda: states.hold_trial(slot, 1),
        lambda: states.end_trial(slot),
        lambda: states.postpone_trial(slot, 1),
        lambda: states.fail_trial(slot, 1),
        lambda: states.pass_trial(slot, 1),
        lambda: states.pause(slot, 1),
        lambda: states.error(slot),
        lambda: states.set_error(slot, ""),
        lambda: states.clear(slot),
    ):
        with pytest.raises(IndexError, match=f"slot {slot} of 3"):
            call()
    assert not any(block.bytes)


def test_read_only_memory_is_refused():
    with pytest.raises((BufferError, TypeError)):
        AnalyzerStates(bytes(8 * ROW), bytearray(8 * HeadWord.HEAD_WORDS))
    with pytest.raises((BufferError, TypeError)):
        AnalyzerStates(bytearray(8 * ROW), bytes(8 * HeadWord.HEAD_WORDS))
