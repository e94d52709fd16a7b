"""Weights under load: packets wait for the analyzer they were picked for, and when they go to another after all."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from upstream_harness import OK, SECOND, Bench, reply

from fastdist._core import busy_ns
from fastdist.worker import dispatch
from fastdist.worker.dispatch import CLAIMS_AHEAD, LoadMeter, median_of_others


def stuck(tmp_path, slots=(0,), weights=(1, 1, 1), count=30, **delivery):
    """Return a bench where these analyzers do not answer, and all others have."""
    delivery = {"connections": 1, "spill_after": 1.0, "timeout": 1000.0} | delivery
    bench = Bench(tmp_path, weights, delivery=delivery, retry={"base": 0.01, "cap": 0.01})
    bench.push(*[b"x"] * count)
    others = [slot for slot in bench.analyzers if slot not in slots]
    while bench.answer_all(slots=others):
        pass
    return bench


def pass_time(bench, seconds, step=0.1):
    """Let time pass a tick at a time, without any response."""
    for _ in range(round(seconds / step)):
        bench.pass_time(step)


def test_packets_wait_for_analyzer_in_order(tmp_path):
    with stuck(tmp_path) as bench:
        assert 8 <= bench.pool(0).waiting <= 10
        mine = set(bench.sent_ids(0)) | {f"p{n}" for n in range(1, 31)} - set(bench.sent_ids(1) + bench.sent_ids(2))
        while bench.answer_all():
            pass
        assert bench.sent_ids(0) == sorted(mine, key=lambda name: int(name[1:]))
        assert bench.count("spilled") == 0


def test_long_waiting_spill_to_those_free(tmp_path):
    with stuck(tmp_path) as bench:
        waiting = bench.pool(0).waiting
        pass_time(bench, 0.3)
        assert bench.count("spilled") == 0
        pass_time(bench, 0.9)
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


def test_spilled_go_to_all_with_room(tmp_path):
    with stuck(tmp_path, weights=(4, 1, 3), count=400, connections=64, pipeline=1) as bench:
        waiting = bench.pool(0).waiting
        before = [len(bench.sent(slot)) for slot in (1, 2)]
        for _ in range(100):
            bench.pass_time(0.1)
            bench.answer_all(slots=[1, 2])
        one, two = (len(bench.sent(slot)) - before[slot - 1] for slot in (1, 2))
        assert one + two == waiting
        assert one > 5 < two


def test_only_long_waiting_packets_spill(tmp_path):
    with stuck(tmp_path) as bench:
        pass_time(bench, 0.3)
        time.sleep(0.01)
        # The compiled half's clock stands still: what comes now has waited as long as the clock is ahead.
        old = bench.pool(0).waiting
        pass_time(bench, 0.9)
        assert bench.pool(0).waiting == old - 2


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
def test_nothing_spills_to_ineligible_ones(tmp_path, state):
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


def test_packets_wait_longer_for_a_fast_one(tmp_path):
    """Where none is slower than the others, it is mostly the machine that is busy."""
    with Bench(tmp_path, (8, 1, 1), delivery={"connections": 4, "spill_after": 1.0, "timeout": 1000.0}) as bench:
        bench.push(*[b"x"] * 20)  # none of them is answered
        assert bench.pool(0).waiting >= 10
        assert all(bench.pool(slot).requests_in_flight <= 3 for slot in (1, 2))  # they have room
        pass_time(bench, 3)
        assert bench.count("spilled") == 0
        pass_time(bench, 1.3)
        assert bench.count("spilled") > 0


def test_hiccup_makes_no_analyzer_slow(tmp_path, monkeypatch):
    # All times are ten times as long: the real clock runs too, and a busy machine may stand still for a second.
    monkeypatch.setattr(dispatch, "SLOW_FOR_NS", 10 * dispatch.SLOW_FOR_NS)
    with stuck(tmp_path, spill_after=3.0) as bench:  # twelve seconds for one that is not slow
        pass_time(bench, 3, 1)
        assert bench.count("spilled") == 0  # it has to be slow for a while
        while bench.answer_all():
            pass
        pass_time(bench, 0.1)  # nothing waits for it
        bench.push(*[b"x"] * 30)
        while bench.answer_all(slots=[1, 2]):
            pass
        waiting = bench.pool(0).waiting
        pass_time(bench, 3, 1)  # not yet: the stretch began again
        assert (bench.pool(0).waiting, bench.count("spilled")) == (waiting, 0)
        pass_time(bench, 3, 1)
        assert bench.count("spilled") > 0


def test_unreachable_one_is_not_waited_for(tmp_path):
    with stuck(tmp_path) as bench:
        for connection in bench.connections(0):
            connection.transport.lose()
        bench.pool(0).open_more = lambda: None  # it goes on trying to connect
        bench.pass_time(1.2)
        while bench.answer_all(slots=[1, 2]):
            bench.pass_time(1.2)
        assert bench.delivered == 30


def test_reply_making_room_sends_the_next(tmp_path):
    with stuck(tmp_path, spill_after=0.002) as bench:
        waiting = bench.pool(0).waiting
        time.sleep(0.01)  # the compiled half's own clock
        bench.tick()
        for spilled in range(2, waiting):
            assert bench.count("spilled") == spilled
            bench.answer(bench.busy(1 + spilled % 2)[0])  # no tick


def test_the_only_analyzer_keeps_its_packets(tmp_path):
    with stuck(tmp_path, weights=(1,), count=5) as bench:
        pass_time(bench, 10)
        assert bench.pool(0).waiting == 4
        assert bench.count("spilled") == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([(0,), (1,), (0, 1), ()])), min_size=5, max_size=40))
@settings(max_examples=30)
def test_no_old_packet_waits_beside_room(steps):
    """Whichever analyzers are stuck: the others, which reply at once, get what is older than ``spill_after``."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Bench(Path(folder), (2, 1, 1), delivery={"connections": 2, "spill_after": 0.5, "timeout": 1e6}) as bench,
    ):
        pushed_at = {}
        for count, held in steps:
            answering = [slot for slot in bench.analyzers if slot not in held]
            bench.push(*[b"x"] * count)
            pushed_at.update({f"p{bench.pushed - n}": bench.clock.ahead for n in range(count)})
            while bench.answer_all(slots=answering):
                pass
            bench.pass_time(0.1)
            while bench.answer_all(slots=answering):
                bench.tick()
            gone = {name for slot in bench.analyzers for name in bench.sent_ids(slot)}
            old = {name for name, then in pushed_at.items() if bench.clock.ahead - then > 1.05}
            assert old <= gone


@pytest.mark.parametrize("by", ["packets", "messages", "bytes"])
def test_spill_is_split_by_others_weights(tmp_path, by):
    """In the unit whose shares follow the weights, though every fourth packet is a large one."""
    units = Counter()
    with Bench(
        tmp_path,
        (5, 1, 3),
        distribution={"by": by},
        delivery={"connections": 64, "spill_after": 1.0, "timeout": 1e6},
    ) as bench:
        for _ in range(50):
            for number in range(16):
                bench.push(b"x" * (400 if number % 4 == 0 else 40), messages=10 if number % 4 == 0 else 1)
            while bench.answer_all(slots=[1, 2]):
                pass
            before = {slot: set(bench.sent_ids(slot)) for slot in (1, 2)}
            bench.pass_time(1.2)
            for slot in (1, 2):
                for request in bench.sent(slot):
                    if request.ids[0] not in before[slot]:
                        messages = 10 if len(request.body) == 400 else 1
                        units[slot] += {"packets": 1, "messages": messages, "bytes": len(request.body)}[by]
        assert bench.count("spilled") > 300
    largest = {"packets": 1, "messages": 10, "bytes": 400}[by]
    assert abs(units[1] - (units[1] + units[2]) / 4) <= 2 * largest


def test_full_pools_are_asked_while_any_old(tmp_path):
    def spill():
        bench.dispatcher.spill_at(time.monotonic_ns() + 2 * SECOND)
        bench.rest()

    with stuck(tmp_path, count=300) as bench:
        assert not bench.pool(1).wanted
        bench.pool(0).slow = True
        bench.dispatcher.judge(True)
        spill()
        assert bench.count("spilled") == 2
        assert bench.pool(1).wanted  # its next reply makes room
        while bench.pool(0).waiting:
            bench.answer_all(slots=[1, 2])
            spill()
        assert not bench.pool(1).wanted


def test_retries_in_front_hide_nothing_old(tmp_path):
    with stuck(tmp_path, weights=(1, 1), spill_after=3.0) as bench:
        old, then = bench.pool(0).waiting, time.monotonic_ns()
        while bench.pool(0).waiting == old or not bench.busy(1):
            bench.push(b"x")
        bench.answer_all(reply(500), slots=[1])  # goes to the other analyzer, before all that wait there
        while bench.answer_all(slots=[1]):
            pass
        bench.pool(0).slow = True
        bench.dispatcher.judge(True)
        bench.dispatcher.spill_at(then + 3 * SECOND)
        bench.rest()
        while bench.answer_all(slots=[1]):
            bench.dispatcher.spill_at(then + 3 * SECOND)
            bench.rest()
        assert bench.count("spilled") == old
        assert "p1" in bench.sent_ids(0) + bench.sent_ids(1)


def failed_by_the_first(tmp_path, weights):
    """Return a bench where each analyzer was sent a packet, and the first has failed its own; return that as well."""
    delivery = {"connections": 1, "spill_after": 0.5, "timeout": 1000.0}
    bench = Bench(tmp_path, weights, delivery=delivery, health={"fall": 9})
    bench.dispatcher.phase = 0  # so that each gets one
    bench.push(*[b"x"] * len(weights))
    (failed,) = bench.sent_ids(0)
    bench.answer_all(reply(500), [0])
    return bench, failed


def test_retry_spills_to_one_not_failed(tmp_path):
    bench, failed = failed_by_the_first(tmp_path, (1, 1, 1))
    with bench:
        (holder,) = [slot for slot in (1, 2) if bench.pool(slot).waiting]
        bench.answer_all(slots=[3 - holder])
        assert [bench.pool(slot).room() for slot in (0, 3 - holder)] == [1, 1]
        pass_time(bench, 5)
        assert bench.count("spilled") == 1
        assert bench.sent_ids(0) == [failed]
        assert failed in bench.sent_ids(3 - holder)
        bench.answer_all()


def test_retry_spills_to_failed_one_at_last(tmp_path):
    bench, failed = failed_by_the_first(tmp_path, (1, 1))
    with bench:
        pass_time(bench, 5)
        assert bench.sent_ids(0) == [failed, failed]
        bench.answer_all()


def test_lingering_packets_do_not_spill(tmp_path):
    batches = {"mode": "batch", "linger": 10.0, "spill_after": 0.0, "connections": 4}
    with Bench(tmp_path, (1, 1), delivery=batches) as bench:
        while not all(bench.busy(slot) for slot in (0, 1)):
            bench.push(b"x")
        before = bench.count("spilled")  # while connections were opened
        for _ in range(20):
            bench.push(b"x")
        assert bench.pool(0).waiting > 5 < bench.pool(1).waiting
        assert bench.count("spilled") == before


def test_room_is_counted_in_bytes_as_well(tmp_path):
    batches = {"mode": "batch", "linger": 0.0, "batch_bytes": 1000}
    with stuck(tmp_path, weights=(1, 1), **batches) as bench:
        bench.push(*[b"x" * 900] * 60)
        while bench.answer_all(slots=[1]):
            pass
        pass_time(bench, 2)
        assert bench.count("spilled") == 2
        assert bench.pool(1).waiting <= 1


def test_error_in_one_pool_spares_the_others(tmp_path):
    def no_memory():
        raise MemoryError

    with Bench(tmp_path, (1, 1, 1)) as bench, capture_logs() as lines:
        bench.pool(0).open_more = bench.pool(1).open_more = no_memory
        for _ in range(2):
            bench.push(b"x", b"x", b"x")
        assert bench.busy(2)
        assert len(lines) == 1, "told once"
        del bench.pool(0).open_more, bench.pool(1).open_more
        bench.push(b"x", b"x", b"x")
        bench.pass_time(0.2)
        while bench.answer_all():
            pass
        assert bench.delivered == 9


# ---- while this process is the bottleneck


def overload(bench, load=1.0):
    bench.dispatcher._load.measure = lambda _now: load


def test_overload_limits_what_is_claimed(tmp_path):
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
        pass_time(bench, 0.1)  # not at once
        assert bench.ring.claimed == limit
        pass_time(bench, 1.0)
        assert bench.ring.claimed == bench.ring.undone > limit
        while bench.answer_all():
            pass
        assert bench.delivered == 500


def test_overload_still_waits_for_a_fast_one(tmp_path):
    with Bench(tmp_path, (8, 1, 1), delivery={"connections": 4, "spill_after": 1.0, "timeout": 1000.0}) as bench:
        bench.push(*[b"x"] * 20)
        overload(bench)
        pass_time(bench, 20)
        assert bench.count("spilled") == 0


def test_overloaded_slow_one_delays_no_other(tmp_path):
    with stuck(tmp_path, count=60) as bench:
        overload(bench)
        pass_time(bench, 0.1)
        assert bench.dispatcher.claim_limit == CLAIMS_AHEAD * 3
        pass_time(bench, 0.7)
        assert bench.dispatcher.claim_limit > 10**9
        pass_time(bench, 0.4)
        assert bench.count("spilled") == 2


def test_claim_limit_strands_no_packets(tmp_path):
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
def test_load_is_the_used_part_of_the_time(monkeypatch, schedstat):
    if not schedstat:
        monkeypatch.setattr(dispatch, "SCHEDSTAT", "/nowhere")
    busy, idle = measure(lambda: sum(range(1000))), measure(lambda: time.sleep(0.03))
    assert 0 <= idle < busy < 1.5  # no figures: other processes want the processor too


@pytest.mark.parametrize("text", [b"", b"1", b"1 b 3", b"a b c"])
def test_invalid_schedstat_is_not_used(monkeypatch, tmp_path, text):
    (tmp_path / "schedstat").write_bytes(text)
    monkeypatch.setattr(dispatch, "SCHEDSTAT", str(tmp_path / "schedstat"))
    assert 0 <= measure(lambda: time.sleep(0.01), 0.03) < 2


def test_schedstat_counts_waiting_too(tmp_path):
    (tmp_path / "schedstat").write_bytes(b"1000 234 7\n")
    with (tmp_path / "schedstat").open() as file:
        assert [busy_ns(file.fileno()) for _ in range(2)] == [1234] * 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_the_median_of_the_others(values, data):
    one = data.draw(st.sampled_from(values))
    others = values.copy()
    others.remove(one)
    assert median_of_others(sorted(values), None) == statistics.median(values)
    assert median_of_others(sorted(values), one) == (statistics.median(others) if others else math.inf)
