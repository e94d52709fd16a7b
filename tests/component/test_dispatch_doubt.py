"""Analyzers that refuse packet after packet: what they refuse is tried elsewhere before it is a dead letter."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs
from upstream_harness import SECOND, Bench, reply

from fastdist.shm.block import AnalyzerWord
from fastdist.worker import dispatch

REFUSED = reply(422)


def send_all_to(bench, slot):
    """Have the table name one analyzer only, until it is rebuilt."""
    bench.dispatcher.set_table(dispatch.AliasTable([slot], [1.0]), None)


def refuse(bench, slot, count=1):
    """Have an analyzer refuse this many packets, one after another."""
    for _ in range(count):
        send_all_to(bench, slot)
        bench.push(b"x")
        bench.answer(bench.busy(slot)[0], REFUSED)


def test_doubtful_refusal_is_tried_elsewhere(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 3}) as bench:
        refuse(bench, 0, 3)
        assert len(bench.dead_letters()) == 3
        refuse(bench, 0)
        assert bench.sent_ids(1) == ["p4"]
        assert len(bench.dead_letters()) == 3
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0, "which one was at fault is not known yet"
        bench.answer_all()
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 1
        assert bench.states.error(0) == "HTTP 422, but A2 took the packet"
        assert bench.settled[-1] == (4, "A2")
        assert (bench.count("refused"), bench.count("retried"), bench.delivered) == (3, 1, 1)


def test_refusing_alone_takes_it_offline(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 3}) as bench:
        refuse(bench, 0, 3)
        for _ in range(3):
            assert bench.states.is_online(0)
            refuse(bench, 0)
            bench.answer_all(slots=[1])
        assert not bench.states.is_online(0)
        assert bench.states.needs_trial(0)
        assert bench.states.error(0) == "HTTP 422, but A2 took the packet"
        assert bench.count("refused") == 3


def test_backlog_of_a_refusing_one_is_saved(tmp_path):
    """Of what waits for it and what is under way there, only the first few are dead letters."""
    with Bench(tmp_path, (1, 1, 1), health={"fall": 3}, delivery={"connections": 4}) as bench:
        bench.push(*[b"x"] * 300)
        for _ in range(300):
            bench.answer_all(REFUSED, [0])
            bench.answer_all(slots=[1, 2])
        assert not bench.states.is_online(0)
        assert len(bench.dead_letters()) == 3
        assert bench.delivered == 297
        assert bench.dispatcher.retrying == {}


def test_refused_by_another_is_a_dead_letter(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        refuse(bench, 0)
        for number in range(2, 8):
            refuse(bench, 0)
            assert bench.sent_ids(1)[-1] == f"p{number}"
            bench.answer_all(reply(400), [1])
            assert bench.states.is_online(0), "it was right"
            bench.states.set(1, AnalyzerWord.REFUSALS, 0)  # it takes others
        dead_letters = [(row["id"], row["reason"], row["analyzer"], row["status"]) for row in bench.dead_letters()]
        assert dead_letters == [("p1", "refused", "A1", 422), *((f"p{n}", "refused", "A2", 400) for n in range(2, 8))]
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0
        assert bench.dispatcher.retrying == {}


@pytest.mark.parametrize("mode", ["batch", "single"])
def test_refusal_keeps_reason_of_failures(tmp_path, mode):
    with Bench(tmp_path, (1,), health={"fall": 3}, delivery={"mode": mode, "connections": 1}) as bench:
        for _ in range(4):
            bench.states.delivery_refused(0)  # it is in doubt
        bench.states.delivery_failed(0, "HTTP 422, but A2 took the packet")
        bench.push(b"x", b"x", b"x")
        while bench.busy(0):
            bench.answer_all(REFUSED)
        assert len(bench.dead_letters()) == 3, "no other analyzer is left to ask"
        assert bench.states.error(0) == "HTTP 422, but A2 took the packet"


def test_a_2xx_ends_the_doubt(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 2}) as bench:
        for _ in range(3):
            refuse(bench, 0, 2)
            send_all_to(bench, 0)
            bench.push(b"good")
            bench.answer_all()
        assert bench.sent(1) == []
        assert len(bench.dead_letters()) == 6


def test_refusals_in_other_workers_count_too(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 3}) as bench:
        for _ in range(3):
            bench.states.delivery_refused(0)
        refuse(bench, 0)
        assert bench.sent_ids(1) == ["p1"]
        bench.answer_all()


def test_doubted_failures_stay_in_a_row(tmp_path):
    """Its refusals do not reset the count of failures once it is in doubt."""
    with Bench(tmp_path, (1, 1), health={"fall": 2}) as bench:
        refuse(bench, 0, 2)
        refuse(bench, 0)
        bench.answer_all(slots=[1])
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 1
        refuse(bench, 0)
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 1
        bench.answer_all(slots=[1])
        assert not bench.states.is_online(0)


def test_refusal_holds_with_no_other_online(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        bench.go_offline(1)
        for _ in range(5):
            bench.push(b"x")
            bench.answer(bench.busy(0)[0], REFUSED)
        assert len(bench.dead_letters()) == 5
        assert bench.states.is_online(0)


def test_last_attempt_is_not_tried_elsewhere(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}, retry={"max_attempts": 1}) as bench:
        refuse(bench, 0, 3)
        assert [dead_letter["reason"] for dead_letter in bench.dead_letters()] == ["refused"] * 3
        assert bench.sent(1) == []


def test_weight_0_is_asked_without_another(tmp_path):
    with Bench(tmp_path, (1, 0), health={"fall": 2}) as bench:
        for _ in range(2):
            bench.push(b"x")
            bench.answer_all(REFUSED)
        for number in (3, 4):
            bench.push(b"x")
            bench.answer(bench.busy(0)[0], REFUSED)
            assert bench.sent_ids(1)[-1] == f"p{number}"
            bench.answer_all(slots=[1])
        assert not bench.states.is_online(0)
        assert len(bench.dead_letters()) == 2


def test_undoubted_analyzer_is_asked_first(tmp_path):
    with Bench(tmp_path, (1, 50, 1), health={"fall": 1}) as bench:
        refuse(bench, 1)
        bench.states.delivery_refused(1)  # and one more: in doubt itself
        refuse(bench, 0)
        for _ in range(20):
            bench.states.delivery_succeeded(0)
            refuse(bench, 0)
            assert bench.sent_ids(2)[-1] == f"p{bench.pushed}"
            bench.answer_all(reply(422), [2])
            bench.states.set(2, AnalyzerWord.REFUSALS, 0)


def test_paused_one_is_tried_after_its_pause(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}, retry={"base": 0.01, "cap": 0.01}) as bench:
        refuse(bench, 0)
        bench.states.pause(1, bench.clock.monotonic_ns() + 5 * SECOND)
        bench.tick()
        refuse(bench, 0)
        assert len(bench.dead_letters()) == 1
        assert len(bench.dispatcher.backing_off) == 1
        bench.pass_time(6)
        while bench.busy(0):
            bench.answer(bench.busy(0)[0], REFUSED)
        assert bench.sent_ids(1) == ["p2"]
        bench.answer_all()
        assert bench.settled[-1] == (2, "A2")


def test_failure_elsewhere_decides_nothing(tmp_path):
    with Bench(tmp_path, (1, 1, 1), health={"fall": 2}) as bench:
        refuse(bench, 0, 3)
        (asked,) = (slot for slot in (1, 2) if bench.busy(slot))
        bench.answer_all(reply(500), [asked])
        bench.answer_all(slots=[3 - asked])
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 1
        assert bench.states.error(0) == f"HTTP 422, but A{4 - asked} took the packet"


def test_refused_batch_is_tried_one_by_one(tmp_path):
    delivery = {"mode": "batch", "connections": 1, "linger": 0}
    with Bench(tmp_path, (1, 1), delivery=delivery, health={"fall": 2}) as bench:
        send_all_to(bench, 0)
        bench.push(b"1", b"2", b"3", b"4")
        for _ in range(5):  # the batch, then each on its own
            bench.answer(bench.busy(0)[0], REFUSED)
        assert [dead_letter["id"] for dead_letter in bench.dead_letters()] == ["p1", "p2"]
        while bench.answer_all(slots=[1]):
            pass
        assert sorted(bench.sent_ids(1)) == ["p3", "p4"]
        assert all("X-Packet-Id" in request.headers for request in bench.sent(1))
        assert not bench.states.is_online(0)


def test_sticky_packets_try_next_in_order(tmp_path):
    with Bench(tmp_path, (1, 1, 1), distribution={"strategy": "sticky"}, health={"fall": 10}) as bench:
        asked = set()
        for _ in range(19):
            bench.push(b"x", emitter=7)
            (first,) = (slot for slot in range(3) if bench.busy(slot))
            bench.answer_all(REFUSED)
            asked |= {(first, slot) for slot in range(3) if bench.busy(slot)}
            bench.answer_all()
        assert len(asked) == 1


def test_workers_log_no_doubtful_analyzer(tmp_path):
    """It is a problem (``analyzer_refusing``), of which the supervisor logs one line for all workers."""
    with Bench(tmp_path, (1,), health={"fall": 2}) as bench, capture_logs() as lines:
        refuse(bench, 0, 12)
        assert bench.states.refusals(0) > 2
    assert lines == []


def test_former_endpoint_is_not_judged(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        refuse(bench, 0, 2)
        bench.add(0, 1.0, endpoint="http://elsewhere.test/")
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.loop.run()
        bench.answer_all()
        assert bench.states.is_online(0)
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0
        assert bench.states.error(0) == ""


def test_refusal_of_one_replaced_is_doubted(tmp_path):
    """What is under way when an endpoint that refuses everything is put right."""
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        refuse(bench, 0)
        send_all_to(bench, 0)
        bench.push(b"x")
        (connection,) = bench.busy(0)
        bench.add(0, 1.0, endpoint="http://elsewhere.test/")
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.answer(connection, REFUSED)
        bench.loop.run()
        assert len(bench.dead_letters()) == 1
        assert bench.sent_ids(1) == ["p2"]
        bench.answer_all()
        assert bench.delivered == 1
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0


@pytest.mark.parametrize("state", ["draining", "offline"])
def test_late_refusal_of_removed_one_counts(tmp_path, state):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        send_all_to(bench, 0)
        bench.push(b"1", b"2")
        if state == "draining":
            bench.drain(0)
        else:
            bench.states.go_offline(0, by_deliveries=True)
            bench.tick()
        bench.answer_all(REFUSED, [0])
        bench.answer_all(slots=[1])
        assert len(bench.dead_letters()) == (1 if state == "draining" else 0), (
            "deliveries took it offline: not believed"
        )
        assert bench.delivered == 2 - len(bench.dead_letters())
