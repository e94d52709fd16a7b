"""Weights under load: packets wait for the analyzer they were picked for, and when they go to another after all."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import pytest
from forward_harness import OK, Bench, reply
from hypothesis import given
from hypothesis import strategies as st

from fastdist import dispatch
from fastdist.dispatch import CLAIMS_AHEAD, LoadMeter, median_of_others


def stuck(tmp_path, slots=(0,), weights=(1, 1, 1), count=30, **delivery):
    """Return a bench where these analyzers do not answer, and all others have."""
    delivery = {"connections": 1, "spill_after": 1.0, "timeout": 1000.0} | delivery
    bench = Bench(tmp_path, weights, delivery=delivery, retry={"base": 0.01, "cap": 0.01})
    bench.push(*[b"x"] * count)
    others = [slot for slot in bench.roster if slot not in slots]
    while bench.answer_all(slots=others):
        pass
    return bench


def pass_time(bench, seconds, step=0.1):
    """Let time pass a tick at a time, without anybody answering."""
    for _ in range(round(seconds / step)):
        bench.pass_time(step)


def test_packets_wait_for_their_analyzer_in_order(tmp_path):
    with stuck(tmp_path) as bench:
        assert 8 <= bench.pool(0).waiting <= 10
        mine = set(bench.sent_ids(0)) | {f"p{n}" for n in range(1, 31)} - set(bench.sent_ids(1) + bench.sent_ids(2))
        while bench.answer_all():
            pass
        assert bench.sent_ids(0) == sorted(mine, key=lambda name: int(name[1:]))
        assert bench.count("spilled") == 0


def test_what_has_waited_for_a_slow_analyzer_goes_to_those_with_room(tmp_path):
    with stuck(tmp_path) as bench:
        waiting = bench.pool(0).waiting
        pass_time(bench, 0.9)
        assert bench.count("spilled") == 0
        pass_time(bench, 0.3)
        assert bench.count("spilled") == 2  # each of the others has room for one
        assert bench.pool(0).waiting == waiting - 2
        pass_time(bench, 0.3)
        assert bench.count("spilled") == 2
        for _ in range(10):
            bench.answer_all(slots=[1, 2])
            bench.pass_time(0.1)
        assert bench.pool(0).waiting == 0
        assert bench.count("spilled") == waiting
        assert bench.count("retried") == 0
        bench.answer_all(slots=[1, 2])
        assert len(bench.sent(0)) == 1
        assert bench.ring.undone == 1
        bench.answer_all()
        assert bench.delivered == 30


def test_spilled_packets_go_to_all_that_have_room(tmp_path):
    with stuck(tmp_path, weights=(4, 1, 3), count=400, connections=64, pipeline=1) as bench:
        waiting = bench.pool(0).waiting
        before = [len(bench.sent(slot)) for slot in (1, 2)]
        for _ in range(100):
            bench.pass_time(0.1)
            bench.answer_all(slots=[1, 2])
        one, two = (len(bench.sent(slot)) - before[slot - 1] for slot in (1, 2))
        assert one + two == waiting
        assert one > 5 < two


def test_only_what_has_waited_long_enough_is_spilled(tmp_path):
    with stuck(tmp_path) as bench:
        pass_time(bench, 0.9)
        time.sleep(0.01)
        # The compiled half's clock stands still: what comes now has waited as long as the clock is ahead.
        old = bench.pool(0).waiting
        pass_time(bench, 0.3)
        assert bench.pool(0).waiting == old - 2


def test_a_hiccup_does_not_make_an_analyzer_slow(tmp_path):
    with stuck(tmp_path, spill_after=0.1) as bench:
        waiting = bench.pool(0).waiting
        pass_time(bench, 0.3)
        assert bench.count("spilled") == 0  # it has to be slow for a while
        bench.answer(bench.busy(0)[0])
        assert bench.pool(0).waiting == waiting - 1
        pass_time(bench, 0.3)  # not yet: the stretch began anew
        assert bench.pool(0).waiting >= waiting - 3


def test_with_never_nothing_spills(tmp_path):
    with stuck(tmp_path, spill_after=math.inf) as bench:
        waiting = bench.pool(0).waiting
        for _ in range(50):
            bench.pass_time(10)
        assert bench.pool(0).waiting == waiting
        assert bench.count("spilled") == 0


def test_sticky_never_spills(tmp_path):
    sticky = {"strategy": "sticky"}
    with Bench(
        tmp_path, (1, 1), distribution=sticky, delivery={"connections": 1, "spill_after": 0.1, "timeout": 99.0}
    ) as b:
        for emitter in range(40):
            b.push(b"x", emitter=emitter * 7919 + 1)
        while b.answer_all(slots=[1]):
            pass
        waiting = b.pool(0).waiting
        assert waiting > 3
        pass_time(b, 5)
        assert (b.pool(0).waiting, b.count("spilled")) == (waiting, 0)


def test_nothing_spills_to_one_without_room(tmp_path):
    with stuck(tmp_path, slots=(0, 1, 2)) as bench:
        pass_time(bench, 10)
        assert bench.count("spilled") == 0
        bench.answer_all(slots=[1])  # sends the next of its own
        pass_time(bench, 1)
        assert bench.count("spilled") == 0


@pytest.mark.parametrize("state", ["offline", "draining", "paused"])
def test_nothing_spills_to_one_that_gets_nothing(tmp_path, state):
    with stuck(tmp_path, weights=(1, 1, 1)) as bench:
        if state == "offline":
            bench.go_offline(1)
        elif state == "draining":
            bench.drain(1)
        else:
            bench.states.pause(1, bench.clock.monotonic_ns() + 10**15)
            bench.tick()
        before = len(bench.sent(1))
        pass_time(bench, 2)
        assert bench.count("spilled") == 1
        assert len(bench.sent(1)) == before


def test_packets_wait_longer_for_one_that_is_as_fast_as_the_others(tmp_path):
    """Where none is slower than the others, it is mostly the machine that is busy."""
    with Bench(tmp_path, (1, 1, 1), delivery={"connections": 4, "spill_after": 1.0, "timeout": 1000.0}) as bench:
        bench.push(*[b"x"] * 6)  # two each, and none of them is answered
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"y"] * 8)
        waiting = bench.pool(0).waiting
        assert waiting >= 5
        pass_time(bench, 3.5)
        assert bench.count("spilled") == 0
        pass_time(bench, 0.8)
        assert bench.count("spilled") > 0


def test_the_only_analyzer_is_never_slow(tmp_path):
    with stuck(tmp_path, weights=(1,), count=5) as bench:
        pass_time(bench, 10)
        assert bench.pool(0).waiting == 4
        assert bench.count("spilled") == 0


# ---- while this process is the bottleneck


def overload(bench, load=1.0):
    bench.dispatcher._load.measure = lambda _now: load


def test_while_overloaded_only_so_much_is_claimed(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 2, "pipeline": 3, "spill_after": 1.0}) as bench:
        overload(bench)
        pass_time(bench, 0.2)
        bench.push(*[b"x"] * 500)
        limit = CLAIMS_AHEAD * 6 * 2
        assert bench.ring.claimed == limit
        for _ in range(20):  # as some are done, others are claimed
            bench.answer_all()
            assert bench.ring.claimed == min(limit, bench.ring.undone)
        overload(bench, 0.5)
        pass_time(bench, 0.8)  # not at once
        assert bench.ring.claimed == limit
        pass_time(bench, 0.5)
        assert bench.ring.claimed == bench.ring.undone > limit
        while bench.answer_all():
            pass
        assert bench.delivered == 500


def test_while_overloaded_packets_wait_for_one_that_is_as_fast_as_the_others(tmp_path):
    with Bench(tmp_path, (1, 1, 1), delivery={"connections": 4, "spill_after": 1.0, "timeout": 1000.0}) as bench:
        bench.push(*[b"x"] * 6)
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"y"] * 8)
        overload(bench)
        pass_time(bench, 20)
        assert bench.count("spilled") == 0


def test_a_slow_analyzer_spills_and_holds_up_nobody_while_overloaded(tmp_path):
    with stuck(tmp_path, count=60) as bench:
        overload(bench)
        pass_time(bench, 0.3)
        assert bench.dispatcher.claim_limit == CLAIMS_AHEAD * 3
        pass_time(bench, 0.5)
        assert bench.dispatcher.claim_limit > 10**9
        pass_time(bench, 0.4)
        assert bench.count("spilled") == 2


def test_the_claim_limit_never_strands_packets(tmp_path):
    """The limit falls below what is claimed, and everything is delivered all the same."""
    with Bench(tmp_path, (1, 1), delivery={"connections": 1, "spill_after": 1.0}, health={"fall": 3}) as bench:
        bench.push(*[b"x"] * 200)
        overload(bench)
        pass_time(bench, 0.2)
        assert bench.ring.claimed == 200 > bench.dispatcher.claim_limit
        for connection in bench.busy(0):
            bench.answer(connection, reply(500))
        bench.go_offline(0)  # a hundred go back to the ring
        for _ in range(250):
            for connection in bench.busy(1):
                bench.answer(connection, OK)
        pass_time(bench, 0.3)
        while bench.answer_all():
            pass
        assert bench.delivered == 200


# ---- the meter


def measure(work, seconds=0.15):
    meter = LoadMeter()
    assert meter.measure(time.monotonic_ns()) == 0.0  # nothing to compare with yet
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        work()
    return meter.measure(time.monotonic_ns())


@pytest.mark.parametrize("schedstat", [True, False])
def test_the_load_is_the_part_of_the_time_that_was_used(monkeypatch, schedstat):
    if not schedstat:
        monkeypatch.setattr(Path, "read_bytes", lambda _path: (_ for _ in ()).throw(FileNotFoundError))
    busy, idle = measure(lambda: sum(range(1000))), measure(lambda: time.sleep(0.03))
    assert 0 <= idle < busy < 1.5  # no figures: other processes want the processor too


@pytest.mark.parametrize("text", [b"", b"1 2", b"1 2 3 4", b"a b c"])
def test_a_schedstat_that_makes_no_sense_is_not_used(monkeypatch, text):
    monkeypatch.setattr(Path, "read_bytes", lambda _path: text)
    assert 0 <= measure(lambda: time.sleep(0.01), 0.03) < 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_the_median_of_the_others(values, data):
    one = data.draw(st.sampled_from(values))
    others = values.copy()
    others.remove(one)
    assert median_of_others(sorted(values), None) == statistics.median(values)
    assert median_of_others(sorted(values), one) == (statistics.median(others) if others else math.inf)
