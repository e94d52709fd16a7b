"""Analyzers that deliveries took offline: good checks bring them on probation, a packet they take brings them back."""

from __future__ import annotations

import os

import pytest
from upstream_harness import Bench, reply

from fastdist._core import HEADER_SIZE, PacketRing, Rendezvous, file_size, record_bytes
from fastdist.shm.block import AnalyzerWord
from fastdist.supervisor.health import HealthChecker
from fastdist.worker import dispatch, probation

FAILED = reply(404)
HELD = probation.HOLD_NS / 1e9
CAPACITY = 1 << 17


class Ward(Bench):
    """A bench with health checks, which go well when the test says so. Failures in a row: 1, checks: 2."""

    def __init__(self, folder, weights=(1, 1), **sections):
        sections["health"] = {"fall": 1, "rise": 2} | sections.get("health", {})
        super().__init__(folder, weights, **sections)
        self.checker = HealthChecker(self.states, self.config.health, 60.0)

    def check_well(self, slot=0, times=2):
        """Have checks go well."""
        for _ in range(times):
            self.checker.record(slot, 200, "")
        self.tick()

    def fail(self, slot=0):
        """Have the deliveries of an analyzer fail until it is offline; others get all packets then."""
        self.dispatcher.set_table(dispatch.AliasTable([slot], [1.0]), None)
        self.push(b"x")
        self.answer_all(FAILED, [slot])
        assert not self.states.is_online(slot)
        while self.answer_all(slots=[other for other in self.analyzers if self.states.is_online(other)]):
            pass

    def at(self, slot=0):
        """Return how many packets the analyzer has on its list and in flight."""
        return self.pool(slot).waiting + self.pool(slot).packets_in_flight


# ---- one packet at a time


def test_checks_alone_do_not_bring_it_back(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well(times=10)
        bench.pass_time(100)
        assert not bench.states.is_online(0)
        assert bench.states.is_on_probation(0, 2)
        assert bench.dispatcher.weights == {1: 1.0}


def test_offline_by_checks_returns_at_once(tmp_path):
    with Ward(tmp_path) as bench:
        bench.go_offline(0)
        bench.check_well()
        assert bench.states.is_online(0)
        assert bench.dispatcher.weights == {0: 1.0, 1: 1.0}


def test_trial_packet_does_not_spill(tmp_path):
    """Another that takes it says nothing of the analyzer, which would be tried again at once, for ever."""
    with Ward(tmp_path, delivery={"spill_after": 0.5}) as bench:
        bench.fail()
        for connection in bench.connections(0):
            bench.lose(connection)
        bench.pool(0).open_more = lambda: None  # it goes on trying to connect
        bench.check_well()
        bench.push(b"x")
        assert bench.pool(0).waiting == 1
        bench.pass_time(0.9)
        assert bench.count("spilled") == 0
        bench.pool(0)._unreachable("no answer within 1 s")
        bench.rest()
        assert bench.states.has_failed_trials(0)
        bench.answer_all()


def test_no_packets_before_checks_are_good(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        sent = len(bench.sent(0))
        bench.check_well(times=1)
        bench.push(*[b"x"] * 20)
        bench.pass_time(40)
        assert len(bench.sent(0)) == sent
        bench.answer_all()


def test_gets_one_packet_until_it_is_taken(tmp_path):
    with Ward(tmp_path, delivery={"connections": 64}) as bench:
        bench.fail()
        bench.check_well()
        bench.push(*[b"x"] * 40)
        for _ in range(5):
            assert bench.at() == 1
            bench.tick()
            bench.push(b"x")
        bench.answer_all(slots=[0])
        assert bench.states.is_online(0)
        bench.tick()
        bench.push(*[b"x"] * 40)
        assert 15 < bench.at() < 25
        bench.answer_all()


def test_other_workers_trial_is_the_only_one(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        now = bench.clock.monotonic_ns()
        assert bench.states.begin_trial(0, 2, now, now + probation.HOLD_NS)
        bench.push(*[b"x"] * 10)
        bench.tick()
        assert bench.at() == 0
        bench.pass_time(HELD + 0.1)  # it was killed
        bench.push(b"x")
        assert bench.at() == 1
        bench.answer_all()
        assert bench.states.is_online(0)


def test_a_long_trial_is_held_on_to(tmp_path):
    with Ward(tmp_path, delivery={"timeout": 60.0}) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"x")
        for _ in range(20):
            bench.pass_time(HELD / 2)
            assert not bench.states.may_try(0, 2, bench.clock.monotonic_ns())
        bench.answer_all()
        assert bench.states.is_online(0)


def test_each_failed_trial_doubles_the_wait(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        for wait in (1, 2, 4, 8, 16, 30, 30, 30):
            bench.push(b"x")
            bench.answer_all(FAILED, [0])
            bench.answer_all(slots=[1])
            bench.pass_time(wait / 2)
            bench.push(b"x")
            assert bench.at() == 0
            bench.pass_time(wait / 2 + 0.1)
        bench.push(b"x")
        bench.answer_all()
        assert bench.states.is_online(0)
        assert bench.states.get(0, AnalyzerWord.PROBATION_WAIT_NS) == 0
        assert bench.dead_letters() == []
        bench.answer_all()
        assert bench.ring.undone == 0


def test_a_failed_check_ends_probation(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        bench.checker.record(0, 503, "health check: HTTP 503")
        bench.tick()
        bench.push(*[b"x"] * 10)
        assert bench.at() == 0
        bench.check_well()
        bench.push(b"x")
        assert bench.at() == 1
        bench.checker.record(0, 503, "health check: HTTP 503")
        bench.answer_all()
        assert not bench.states.is_online(0), "it takes packets; now its checks decide"
        bench.check_well()
        assert bench.states.is_online(0)


def test_waits_for_next_without_packets(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        for _ in range(50):
            bench.pass_time(1000)
        bench.push(b"x")
        assert bench.at() == 1
        bench.answer_all()
        assert bench.states.is_online(0)


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_trial_is_a_request_with_one_packet(tmp_path, mode):
    with Ward(tmp_path, delivery={"mode": mode}) as bench:
        bench.fail()
        bench.check_well()
        bench.push(*[b"x"] * 10)
        request = bench.sent(0)[-1]
        assert ("X-Packet-Count" in request.headers) == (mode == "batch")
        assert request.body == (b"[x]" if mode == "batch" else b"x")
        bench.answer_all()
        assert bench.states.is_online(0)
        bench.answer_all()
        bench.loop.fire()
        while bench.answer_all():
            pass


# ---- with no other analyzer


def test_packets_wait_for_trial_of_only_one(tmp_path):
    with Ward(tmp_path, (1,)) as bench:
        bench.fail()
        bench.push(*[b"x"] * 30)
        assert (bench.ring.claimed, bench.ring.undone) == (0, 31)
        bench.check_well()
        assert (bench.ring.claimed, bench.at()) == (1, 1)
        bench.answer_all(FAILED)
        assert (bench.ring.claimed, bench.ring.undone) == (0, 31)
        bench.pass_time(0.5)
        assert bench.at() == 0
        bench.pass_time(0.6)
        assert bench.at() == 1
        bench.answer_all()
        bench.tick()
        while bench.answer_all():
            pass
        assert bench.delivered == 31
        assert bench.dispatcher.retrying == {}


def test_failing_packet_spares_later_trials(tmp_path):
    """What was sent least often is tried first: else one poisonous packet would be every trial's."""
    with Ward(tmp_path, (1,)) as bench:
        bench.push(b"poison")
        bench.answer_all(reply(500))
        bench.check_well()
        bench.answer_all(reply(500))  # there is no other yet
        bench.push(*[b"good"] * 20)
        bench.pass_time(1.1)
        assert bench.sent(0)[-1].body == b"good"
        bench.answer_all()
        assert bench.states.is_online(0)


def test_all_of_several_that_fail_come_back(tmp_path):
    with Ward(tmp_path, (1, 1, 1)) as bench:
        bench.push(*[b"x"] * 30)
        while bench.answer_all(FAILED):
            pass
        assert bench.ring.claimed == 0
        for slot in range(3):
            bench.check_well(slot)
        assert [bench.at(slot) for slot in range(3)] == [1, 1, 1]
        while bench.answer_all():
            bench.tick()
        assert bench.delivered == 30


def test_loop_rests_with_nothing_to_try(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        for _ in range(10):
            bench.tick()
            assert bench.loop.ready == []
        assert bench.loop.timers == []


# ---- who may be tried


def test_weight_0_is_tried_only_in_need(tmp_path):
    with Ward(tmp_path, (1, 0)) as bench:
        bench.go_offline(0)
        bench.fail(1)
        bench.go_online(0)
        bench.answer_all()
        bench.check_well(1)
        bench.push(*[b"x"] * 10)
        assert bench.at(1) == 0
        bench.answer_all()
        bench.go_offline(0)
        bench.push(b"x")
        assert bench.at(1) == 1
        bench.answer_all()
        assert bench.states.is_online(1)


def test_weight_0_helps_out_during_probation(tmp_path):
    with Ward(tmp_path, (1, 0)) as bench:
        bench.fail()
        bench.check_well()
        bench.push(*[b"x"] * 10)
        assert (bench.at(0), bench.at(1)) == (1, 9)
        bench.answer_all()
        bench.tick()
        bench.push(*[b"x"] * 10)
        assert bench.at(0) >= 10
        assert bench.at(1) == 0
        bench.answer_all()


def test_a_draining_one_is_not_tried(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        bench.drain(0)
        bench.push(*[b"x"] * 10)
        assert bench.at() == 0
        bench.drain(0, 0)
        bench.push(b"x")
        assert bench.at() == 1
        bench.answer_all()


def test_sticky_trial_takes_its_own_packet(tmp_path):
    with Ward(tmp_path, (1, 1, 1), distribution={"strategy": "sticky"}) as bench:
        owner = Rendezvous(["A1", "A2", "A3"], [0, 1, 2], [1.0] * 3).pick
        mine = next(emitter for emitter in range(1, 1000) if owner(emitter) == 0)
        others = next(emitter for emitter in range(1, 1000) if owner(emitter) != 0)
        bench.push(b"x", emitter=mine)
        bench.answer_all(FAILED)
        bench.answer_all()
        bench.check_well()
        bench.push(*[b"y"] * 5, emitter=others)
        assert bench.at() == 0
        bench.tick()
        bench.push(b"y", emitter=others)
        bench.push(b"x", emitter=mine)
        bench.tick()
        bench.push(b"x", emitter=mine)
        assert bench.at() == 1
        bench.answer_all()
        assert bench.states.is_online(0)


def test_damage_strands_no_candidate(tmp_path):
    """Of the packets a trial is chosen from, with the strategy sticky: the others stay to be claimed."""
    with (tmp_path / "ring").open("w+b") as file:
        file.truncate(file_size(CAPACITY))
        ring = PacketRing(file.fileno(), CAPACITY)
        for _ in range(5):
            ring.push(b"x" * 100, "p")
        ring.forget_kept()
        os.pwrite(file.fileno(), b"?", HEADER_SIZE + 2 * record_bytes(1, 100) - 10)
        chosen = probation.choose(ring, 0, Rendezvous(["A1"], [0], [1.0]))
        assert ring.claimed == 1
        ring.done(chosen)
        assert ring.undone == 4


def test_a_slow_start_begins_when_it_is_back(tmp_path):
    with Ward(tmp_path, health={"slow_start": 100.0}) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"x")
        bench.answer_all()
        bench.tick()
        assert bench.dispatcher.weights[0] == pytest.approx(0.1, abs=0.01)


# ---- trials that show nothing


def test_a_pause_is_no_failed_trial(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"x")
        bench.answer_all(reply(503, "Retry-After: 10"), [0])
        bench.tick()
        assert not bench.states.has_failed_trials(0)
        bench.push(b"x")
        assert bench.at() == 0
        bench.answer_all()
        bench.pass_time(11)
        bench.push(b"x")
        assert bench.at() == 1
        bench.answer_all()
        assert bench.states.is_online(0)


def test_stale_connection_is_no_failed_trial(tmp_path):
    with Ward(tmp_path, health={"fall": 2}) as bench:
        bench.push(*[b"x"] * 10)
        bench.answer_all()
        bench.push(*[b"x"] * 8)
        for connection in bench.busy(0)[:2]:
            bench.answer(connection, FAILED)
        bench.answer_all()
        assert not bench.states.is_online(0)
        bench.check_well()
        bench.push(b"x")
        (connection,) = bench.busy(0)
        bench.lose(connection)
        assert not bench.states.has_failed_trials(0)
        bench.tick()
        bench.push(b"x")
        assert bench.at() == 1
        bench.answer_all()
        assert bench.states.is_online(0)


def test_failed_connect_is_a_failed_trial(tmp_path):
    with Ward(tmp_path) as bench:
        bench.pool(0).reachable = False
        bench.push(*[b"x"] * 9)
        bench.answer_all()
        assert bench.states.needs_trial(0)
        bench.check_well()
        bench.push(b"x")
        assert bench.states.has_failed_trials(0)
        bench.answer_all()
        assert bench.delivered == 10


def test_change_does_not_end_trial_in_flight(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        for connection in bench.connections(0):
            bench.lose(connection)
        bench.push(b"x", run=False)
        bench.dispatcher.flush()  # the connection is still to come
        assert bench.pool(0).waiting == 1
        bench.states.touch()
        bench.dispatcher.flush()
        assert bench.pool(0).waiting == 1
        bench.rest()
        bench.answer_all()
        assert bench.states.is_online(0)


def test_removed_in_trial_leaves_nothing(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"x")
        assert bench.at() == 1
        old = bench.pool(0)
        bench.add(0, 1.0, endpoint="http://elsewhere.test/")
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.loop.run()
        (connection,) = [each for each in old.connections if each.in_flight()]
        bench.answer(connection, FAILED)
        bench.tick()
        assert bench.states.is_online(0)
        assert bench.states.get(0, AnalyzerWord.PROBATION_WAIT_NS) == 0
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0
        bench.answer_all()
        assert bench.delivered == 2


# ---- refused trials


def test_refused_but_taken_elsewhere_failed(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"x")
        bench.answer_all(reply(422), [0])
        assert bench.dead_letters() == []
        bench.answer_all(slots=[1])
        assert bench.states.has_failed_trials(0)
        assert bench.states.error(0) == "HTTP 422, but A2 took the packet"
        bench.pass_time(0.5)
        bench.push(b"x")
        assert bench.at() == 0
        bench.answer_all()


def test_refused_trials_ask_in_the_mode(tmp_path):
    """With analyzers that take nothing but arrays the packet is not lost for a trial."""
    with Ward(tmp_path, delivery={"mode": "batch", "linger": 0.0}) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"good")
        bench.answer_all(reply(422), [0])
        assert bench.dead_letters() == []
        assert bench.sent(1)[-1].body == b"[good]"
        bench.answer_all(slots=[1])
        assert bench.states.has_failed_trials(0)
        bench.pass_time(1.1)
        bench.push(b"y", b"z")
        assert [request.body for request in bench.sent(0)[-1:]] == [b"[y]"]
        bench.answer_all()
        assert bench.states.is_online(0)
        while bench.answer_all():
            pass


def test_trial_refused_by_all_is_dead_letter(tmp_path):
    with Ward(tmp_path) as bench:
        bench.fail()
        bench.check_well()
        bench.push(b"bad")
        bench.answer_all(reply(422), [0])
        bench.answer_all(reply(422), [1])
        assert [dead_letter["analyzer"] for dead_letter in bench.dead_letters()] == ["A2"]
        assert not bench.states.has_failed_trials(0)
        bench.pass_time(1.1)
        bench.push(b"good")
        bench.answer_all()
        assert bench.states.is_online(0)


def test_trial_refused_alone_is_dead_letter(tmp_path):
    with Ward(tmp_path, (1,)) as bench:
        bench.fail()
        bench.push(*[b"x"] * 10)
        bench.check_well()
        bench.answer_all(reply(422))
        assert len(bench.dead_letters()) == 1
        assert bench.at() == 0
        bench.pass_time(1.1)
        bench.answer_all()
        bench.tick()
        while bench.answer_all():
            pass
        assert bench.delivered == 10
