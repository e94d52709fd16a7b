"""Analyzers that go and come: failures in a row, offline, online, draining, weight 0, changed analyzers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from upstream_harness import SECOND, Bench, reply

from fastdist.settings import Analyzer
from fastdist.shm.block import AnalyzerWord
from fastdist.worker import dispatch


def send_all_to(bench, slot):
    """Have the table name one analyzer only, until it is rebuilt."""
    bench.dispatcher.set_table(dispatch.AliasTable([slot], [1.0]), None)


def in_flight(bench, slot):
    return bench.pool(slot).packets_in_flight


# ---- failures in a row


@pytest.mark.parametrize("fall", [1, 3, 7])
@pytest.mark.parametrize("how", ["500", "garbage", "reset", "unreachable"])
def test_consecutive_failures_mean_offline(tmp_path, fall, how):
    with Bench(tmp_path, (1, 1), health={"fall": fall}, delivery={"connections": 20}) as bench:
        bench.pool(0).reachable = how != "unreachable"
        send_all_to(bench, 0)
        bench.push(*[b"x"] * 60, run=how == "unreachable")
        bench.loop.run(turns=3) if how == "unreachable" else bench.loop.run()
        for _ in range(fall - 1 if how != "unreachable" else 0):
            connection = bench.busy(0)[0]
            if how == "reset":
                bench.lose(connection, OSError("reset"))
            else:
                bench.answer(connection, b"\0" if how == "garbage" else reply(500))
            assert bench.states.is_online(0)
        if how == "reset":
            bench.lose(bench.busy(0)[0], OSError("reset"))
        elif how != "unreachable":
            bench.answer(bench.busy(0)[0], b"\0" if how == "garbage" else reply(500))
        assert not bench.states.is_online(0)
        # Its waiting list has moved; only what is under way there is left.
        assert bench.pool(0).waiting == 0
        sent = len(bench.sent(0))
        if how == "500":  # the first 20, and one for each reply but the last
            assert sent == 20 + fall - 1
        while bench.busy(0):
            bench.answer(bench.busy(0)[0], reply(500))
        assert len(bench.sent(0)) == sent
        while bench.answer_all(slots=[1]):
            pass
        assert bench.delivered == 60
        assert bench.count_of(1, "delivered") == 60


def test_success_restarts_the_failure_row(tmp_path):
    with Bench(tmp_path, (1,), health={"fall": 3}, retry={"base": 0.01, "cap": 0.01}) as bench:
        for _ in range(5):
            bench.push(b"1", b"2", b"3")
            one, two, three = bench.busy(0)
            bench.answer(one, reply(500))
            bench.answer(two, reply(500))
            bench.answer(three)
            bench.pass_time(0.02)
            bench.answer_all()
        assert bench.states.is_online(0)
        assert bench.delivered == 15


def test_a_refusal_ends_the_row_too(tmp_path):
    with Bench(tmp_path, (1,), health={"fall": 2}) as bench:
        bench.push(b"1", b"2", b"3")
        one, two, three = bench.busy(0)
        bench.answer(one, reply(500))
        bench.answer(two, reply(422))
        bench.answer(three, reply(500))
        assert bench.states.is_online(0)


def test_failures_of_other_workers_count_too(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 3}) as bench:
        bench.states.delivery_failed(0, "elsewhere")
        bench.states.delivery_failed(0, "elsewhere")
        send_all_to(bench, 0)
        bench.push(b"1")
        bench.answer(bench.busy(0)[0], reply(500))
        assert not bench.states.is_online(0)


def test_other_worker_or_check_sets_offline(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 2}) as bench:
        send_all_to(bench, 0)
        bench.push(*[b"x"] * 10)
        bench.go_offline(0)
        assert bench.pool(0).waiting == 0
        assert bench.pool(1).waiting + in_flight(bench, 1) == 8
        bench.answer_all()  # what was under way may still be delivered
        while bench.answer_all():
            pass
        assert bench.count_of(0, "delivered") == 2
        assert bench.delivered == 10


# ---- no analyzer is online


@pytest.mark.parametrize("strategy", ["even", "random", "sticky"])
def test_no_claims_while_all_are_offline(tmp_path, strategy):
    with Bench(tmp_path, (1, 1), distribution={"strategy": strategy}, delivery={"connections": 2}) as bench:
        bench.push(*[b"x"] * 20, emitter=5)
        for slot in range(2):
            bench.go_offline(slot)
        bench.push(*[b"y"] * 20, emitter=7)
        while bench.answer_all(reply(500)):
            pass
        assert bench.ring.claimed == 0
        assert bench.ring.undone == 40
        bench.pass_time(100)
        sent = len(bench.sent(0)) + len(bench.sent(1))
        assert bench.ring.claimed == 0
        assert bench.delivered == 0
        bench.go_online(1)
        while bench.answer_all():
            pass
        assert bench.delivered == bench.count_of(1, "delivered") == 40
        assert len(bench.sent(0)) + len(bench.sent(1)) == sent + 40
        assert bench.dispatcher.retrying == {}


def test_last_failure_leaves_packets_in_ring(tmp_path):
    with Bench(tmp_path, (1,), health={"fall": 3}) as bench:
        bench.push(b"1", b"2", b"3", b"4")
        while bench.answer_all(reply(500)):
            pass
        assert not bench.states.is_online(0)
        assert bench.ring.undone == 4
        bench.pass_time(30)  # what had backed off before is back as well
        assert bench.ring.claimed == 0
        bench.go_online(0)
        bench.answer_all()
        assert bench.delivered == 4


def test_new_analyzer_ends_the_back_off(tmp_path):
    with Bench(tmp_path, (1, 1), retry={"base": 3600.0, "cap": 3600.0}, health={"fall": 100}) as bench:
        bench.go_offline(1)
        bench.push(*[b"x"] * 5)
        bench.answer_all(reply(500))
        assert len(bench.dispatcher.backing_off) == 5
        bench.go_online(1)
        assert bench.dispatcher.backing_off == []
        bench.answer_all()
        assert bench.delivered == 5


# ---- weight 0


def test_weight_0_is_for_no_other_online(tmp_path):
    with Bench(tmp_path, (1, 0, 0), health={"fall": 2}) as bench:
        bench.push(*[b"x"] * 6)
        assert [in_flight(bench, slot) for slot in range(3)] == [6, 0, 0]
        bench.answer(bench.busy(0)[0], reply(500))  # retries included
        assert [in_flight(bench, slot) for slot in range(3)] == [5, 0, 0]
        assert len(bench.dispatcher.backing_off) == 1
        bench.answer(bench.busy(0)[0], reply(500))
        assert not bench.states.is_online(0)
        bench.push(*[b"x"] * 20)
        assert in_flight(bench, 0) == 4
        assert in_flight(bench, 1) > 5 < in_flight(bench, 2)
        bench.answer_all()
        bench.push(*[b"x"] * 80)
        assert bench.pool(1).waiting > 0 < bench.pool(2).waiting
        bench.go_online(0)
        assert bench.pool(1).waiting == bench.pool(2).waiting == 0  # it is its own again
        while bench.answer_all():
            pass
        before = [len(bench.sent(slot)) for slot in (1, 2)]
        bench.push(*[b"x"] * 20)
        assert [len(bench.sent(slot)) for slot in (1, 2)] == before


def test_a_pause_does_not_call_for_weight_0(tmp_path):
    with Bench(tmp_path, (1, 0)) as bench:
        bench.push(b"x")
        bench.answer(bench.busy(0)[0], reply(503, "Retry-After: 5"))
        bench.push(b"y")
        assert in_flight(bench, 1) == 0
        bench.pass_time(6)
        assert in_flight(bench, 0) + len(bench.dispatcher.backing_off) == 2


# ---- draining


def test_draining_analyzer_gets_nothing_new(tmp_path):
    with Bench(tmp_path, (1, 1, 1), delivery={"connections": 2}) as bench:
        bench.push(*[b"x"] * 30)
        assert bench.pool(0).waiting
        bench.drain(0)
        assert bench.pool(0).waiting == 0
        assert in_flight(bench, 0) == 2
        send_all_to(bench, 1)
        for connection in bench.busy(1):
            bench.answer(connection, reply(500))
        assert len(bench.sent(0)) == 2  # retries neither
        while bench.answer_all():
            pass
        assert bench.count_of(0, "delivered") == 2
        assert bench.delivered == 30
        bench.drain(0, 0)
        bench.push(*[b"x"] * 9)
        assert in_flight(bench, 0) > 0


def test_draining_stale_one_moves_its_packet(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 1}) as bench:
        send_all_to(bench, 0)
        bench.push(b"x")
        bench.answer_all()
        bench.push(b"y")
        bench.drain(0)
        bench.lose(bench.busy(0)[0])
        assert bench.sent_ids(1) == ["p2"]


@pytest.mark.parametrize("state", ["draining", "offline", "paused"])
def test_refused_batch_avoids_ineligible(tmp_path, state):
    with Bench(tmp_path, (1, 1), delivery={"mode": "batch", "connections": 2}) as bench:
        send_all_to(bench, 0)
        bench.push(b"1", b"2", b"3")
        if state == "paused":
            bench.states.pause(0, bench.clock.monotonic_ns() + 50 * SECOND)
            bench.tick()
        else:
            (bench.drain if state == "draining" else bench.go_offline)(0)
        bench.answer(bench.busy(0)[0], reply(422))
        assert len(bench.sent(0)) == 1
        while bench.answer_all():
            pass
        assert bench.count_of(1, "delivered") == 3
        assert sorted(request.ids for request in bench.sent(1)) == [["p1"], ["p2"], ["p3"]]  # each alone


# ---- changed analyzers


def test_a_new_analyzer_gets_its_share(tmp_path):
    with Bench(tmp_path, (1,)) as bench:
        bench.push(*[b"x"] * 10)
        bench.add(1, 1.0)
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.push(*[b"x"] * 10)
        assert 4 <= in_flight(bench, 1) <= 6
        bench.answer_all()


def test_removal_requeues_all_but_in_flight(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 2}) as bench:
        send_all_to(bench, 0)
        bench.push(*[b"x"] * 10)
        old = bench.pool(0)
        one, two = bench.busy(0)
        del bench.analyzers[0]
        bench.states.set(0, AnalyzerWord.IN_USE, 0)
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.loop.run()
        bench.check()
        assert (old.waiting, old.packets_in_flight) == (0, 2)
        bench.answer(one)
        bench.answer(two, reply(500))
        bench.pass_time(0.2)
        assert old.open_connections == 0
        bench.pass_time(0.2)
        assert bench.dispatcher.retired == []
        while bench.answer_all():
            pass
        assert (bench.count_of(0, "delivered"), bench.count_of(1, "delivered")) == (1, 9)


def test_former_endpoint_failures_are_void(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        send_all_to(bench, 0)
        bench.push(b"1", b"2", b"3")
        one, two, three = bench.busy(0)
        bench.add(0, 1.0, endpoint="http://elsewhere.test/")
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.loop.run()
        for connection, data in ((one, reply(500)), (two, reply(503, "Retry-After: 9")), (three, b"\0")):
            bench.answer(connection, data)
        assert bench.states.is_online(0)
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0
        assert bench.states.get(0, AnalyzerWord.PAUSED_UNTIL_NS) == 0
        bench.answer_all()
        assert bench.delivered == 3


@pytest.mark.parametrize("how", ["refused batch", "stale"])
def test_former_endpoint_retries_pick_again(tmp_path, how):
    with Bench(tmp_path, (1, 1), delivery={"mode": "batch", "connections": 1, "linger": 0}) as bench:
        send_all_to(bench, 0)
        bench.push(b"0")
        bench.answer_all()
        bench.push(b"1", b"2")
        (connection,) = bench.busy(0)
        old = bench.pool(0)
        bench.add(0, 1.0, endpoint="http://elsewhere.test/")
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.loop.run()
        bench.answer(connection, reply(400)) if how == "refused batch" else bench.lose(connection)
        assert (old.waiting, old.opening, old.packets_in_flight) == (0, 0, 0)
        while bench.answer_all():
            pass
        assert bench.delivered == 3


def test_new_weight_or_id_keeps_connections(tmp_path):
    with Bench(tmp_path, (1, 1)) as bench:
        bench.push(*[b"x"] * 10)
        pools, endpoint = list(bench.dispatcher.pools), bench.analyzers[0].endpoint
        bench.analyzers[0] = Analyzer(id="renamed", endpoint=endpoint, weight=0.5, health="/other")
        bench.states.set_weight(0, 0.5)
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.loop.run()
        assert bench.dispatcher.pools == pools
        assert bench.pool(0).analyzer.id == "renamed"
        bench.answer_all()
        assert bench.delivered == 10


# ---- slow start


def test_recovery_ramps_from_a_tenth_to_all(tmp_path):
    with Bench(tmp_path, (1, 1), health={"slow_start": 100.0}, capacity=1 << 22) as bench:
        bench.go_offline(0)
        bench.push(b"x")
        bench.answer_all()
        bench.go_online(0)
        shares = []
        for _ in range(12):
            before = bench.count_of(0, "delivered")
            for _ in range(10):
                bench.push(*[b"x"] * 40)
                while bench.answer_all():
                    pass
            shares.append((bench.count_of(0, "delivered") - before) / 400)
            bench.pass_time(10)
        assert shares[0] == pytest.approx(0.1 / 1.1, abs=0.02)
        assert shares[5] == pytest.approx(0.55 / 1.55, abs=0.02)
        assert shares[10] == pytest.approx(0.5, abs=0.02)
        assert shares[11] == pytest.approx(0.5, abs=0.02)
        assert max(before - after for before, after in pairwise(shares)) < 0.02


@pytest.mark.parametrize("late", [0.1, 1, 1000])
def test_late_ramp_step_ends_at_full_weight(tmp_path, late):
    """A loop that was held up at its last step left the analyzer with what it had, for good."""
    with Bench(tmp_path, (1, 1), health={"slow_start": 100.0}) as bench:
        bench.go_offline(0)
        bench.push(b"x")
        bench.answer_all()
        bench.go_online(0)
        bench.pass_time(50)
        assert bench.dispatcher.weights[0] == pytest.approx(0.55, abs=0.02)
        bench.pass_time(50 + late)
        assert bench.dispatcher.weights == {0: 1.0, 1: 1.0}
        epoch = bench.dispatcher.seen_epoch
        bench.pass_time(1)
        assert bench.dispatcher.seen_epoch == epoch


def test_ramp_does_not_change_other_weights(tmp_path):
    with Bench(tmp_path, (1, 3), health={"slow_start": 100.0}) as bench:
        assert bench.dispatcher.weights == {0: 1.0, 1: 3.0}
        epoch = bench.dispatcher.seen_epoch
        bench.pass_time(1)
        assert bench.dispatcher.seen_epoch == epoch
