"""What concerns very many packets or connections at once is done in parts, whatever happens in between."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from upstream_harness import OK, SECOND, Bench, World, reply, run

from fastdist.shm.block import AnalyzerWord
from fastdist.worker import dispatch, upkeep
from fastdist.worker.upstream import AnalyzerPool

MANY = 8  # analyzers


def crowd(tmp_path, packets=240, **sections):
    """Return a bench of many analyzers with everything in flight, whose parts are as small as can be."""
    sections = {"delivery": {"connections": 60}, "health": {"fall": 10_000}} | sections
    bench = Bench(tmp_path, (1,) * MANY, **sections)
    bench.push(*[b"x"] * packets)
    bench.dispatcher.part_ns = 0
    return bench


def turns(bench, figure):
    """Run the loop to its rest; return how the figure was before and after each turn."""
    figures = [figure()]
    while bench.loop.ready:
        bench.loop.turn()
        bench.check()
        figures.append(figure())
    return figures


def steps(figures):
    return [abs(after - before) for before, after in pairwise(figures)]


def in_flight(bench):
    return sum(pool.requests_in_flight for pool in bench.pools)


def to_place(bench):
    return sum(len(returned.handles) for returned in bench.dispatcher.returned)


def fail_all(bench, data=None):
    for slot in bench.analyzers:
        for connection in bench.busy(slot):
            connection.data_received(data or reply(500))


def test_many_time_outs_are_seen_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "PART_NS", 0)
    monkeypatch.setattr(upkeep, "MAX_PART_NS", 0)
    with crowd(tmp_path, delivery={"connections": 60, "timeout": 5.0}) as bench:
        bench.clock.ahead += 5.2
        checks, closed, unfinished = bench.dispatcher.tasks[0], [], True
        while unfinished:
            before = [each for pool in bench.pools for each in pool.connections if not each.transport.ended]
            unfinished = checks.work(bench.clock.monotonic_ns())
            closed.append(sum(each.transport.ended is not None for each in before))
            assert in_flight(bench) == 240 - sum(closed)
        assert closed == [0, *[1] * 240]
        bench.rest()
        bench.answer_all()
        assert bench.delivered == 240


def test_failed_packets_are_placed_in_parts(tmp_path):
    with crowd(tmp_path) as bench:
        fail_all(bench)
        assert in_flight(bench) == 0
        assert to_place(bench) == 240
        assert max(steps(turns(bench, lambda: to_place(bench)))) == 1
        assert to_place(bench) == 0
        bench.answer_all()
        assert bench.delivered == 240
        assert bench.count("retried") == 240


def test_back_offs_ending_together_in_parts(tmp_path):
    with crowd(tmp_path, retry={"base": 100.0, "cap": 100.0}) as bench:
        while bench.answer_all(reply(500)):
            pass
        assert len(bench.dispatcher.backing_off) == 240
        bench.loop.held_up = 0
        bench.states.clear(0)
        bench.states.set(0, AnalyzerWord.IN_USE, 1)
        bench.states.set_weight(0, 1.0)
        bench.states.go_offline(0)
        bench.tick()
        bench.loop.turn()
        bench.states.go_online(0)
        bench.tick()

        def backing_off():
            return sum(map(len, [bench.dispatcher.backing_off, *bench.dispatcher.backed_off]))

        assert max(steps(turns(bench, backing_off))) == 1
        assert backing_off() == 0
        bench.loop.held_up = None
        bench.answer_all()
        assert bench.delivered == 240


def test_candidates_are_not_built_per_packet(tmp_path):
    class Counted(dict):
        looks = 0

        def items(self):
            self.looks += 1
            return super().items()

        def __iter__(self):
            self.looks += 1
            return super().__iter__()

    with crowd(tmp_path) as bench:
        bench.dispatcher.weights, bench.dispatcher.analyzers = weights, analyzers = (
            Counted(bench.dispatcher.weights),
            Counted(bench.dispatcher.analyzers),
        )
        for _ in range(MANY):  # the last finds no other left
            bench.answer_all(reply(500))
        assert bench.count("retried") == 240 * MANY
        assert weights.looks + analyzers.looks < 240


@pytest.mark.parametrize("strategy", ["even", "random", "sticky"])
def test_alternative_is_never_a_failed_one(tmp_path, strategy):
    for_ever = {"base": 1e7, "cap": 1e7}
    with crowd(tmp_path, distribution={"strategy": strategy}, retry=for_ever) as bench:
        while bench.answer_all(reply(500)):
            pass
        tried = {}
        for slot in bench.analyzers:
            for name in bench.sent_ids(slot):
                tried.setdefault(name, []).append(slot)
        assert all(sorted(slots) == list(range(MANY)) for slots in tried.values()), "each once"
        assert len(bench.dispatcher.backing_off) == 240


def test_released_list_keeps_its_order(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 1}) as bench:
        bench.push(*[b"x"] * 60)
        waiting = [f"p{n}" for n in range(1, 61) if f"p{n}" not in bench.sent_ids(0) + bench.sent_ids(1)]
        for slot in range(2):
            bench.states.go_offline(slot)
        bench.tick()
        assert bench.ring.claimed == 2
        left = []
        while handle := bench.ring.claim():
            left.append(handle)
        names = [bench.ring.packet_id(handle) for handle in left]
        assert sorted(names) == sorted(waiting)
        assert sum(int(one[1:]) > int(other[1:]) for one, other in pairwise(names)) == 1, "one list behind the other"
        for handle in left:
            bench.ring.release(handle)


def change(bench, slot, what):
    if what in {"removed", "moved"}:
        bench.states.set(slot, AnalyzerWord.IN_USE, 0)
        del bench.analyzers[slot]
        if what == "moved":
            bench.add(slot, 1.0, endpoint="http://elsewhere.test/")
    elif what == "draining":
        bench.states.set(slot, AnalyzerWord.DRAINING, 1)
        bench.states.touch()
    else:
        bench.states.go_offline(slot)


@pytest.mark.parametrize("what", ["removed", "moved", "offline", "draining", "none left"])
def test_events_between_parts_lose_nothing(tmp_path, what):
    with crowd(tmp_path) as bench:
        fail_all(bench)
        bench.loop.held_up = 30
        bench.rest()
        assert 0 < to_place(bench) < 240
        for slot in range(MANY if what == "none left" else 3):
            change(bench, slot, what)
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.tick()
        bench.loop.held_up = None
        bench.rest()
        assert to_place(bench) == 0
        for pool in bench.dispatcher.retired:
            for connection in tuple(pool.connections):
                connection.data_received(OK)
        if what == "none left":
            while bench.answer_all(reply(500)):
                pass
            assert bench.ring.claimed == 0
            for slot in range(MANY):
                bench.go_online(slot)
        while bench.answer_all():
            pass
        assert bench.delivered == 240
        assert bench.dispatcher.retrying == {}


def test_unplaced_packets_are_among_the_rest(tmp_path):
    with crowd(tmp_path) as bench:
        fail_all(bench)
        bench.loop.held_up = 30
        bench.rest()
        assert to_place(bench) > 0
        assert bench.dispatcher.dead_letter_all() == 240
        assert len({dead_letter["id"] for dead_letter in bench.dead_letters()}) == 240
        assert bench.ring.undone == bench.ring.claimed == 0
        bench.loop.held_up = None


def test_failed_trial_counts_before_placing(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1, "rise": 1}) as bench:
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(b"x")
        bench.answer_all(reply(500))
        bench.answer_all()
        bench.states.set(0, AnalyzerWord.CHECK_SUCCESSES, 1)
        bench.push(b"y")
        bench.tick()
        bench.push(b"z")
        assert bench.busy(0)
        bench.loop.held_up = 0
        bench.answer_all(reply(500), [0])
        assert bench.states.has_failed_trials(0)
        bench.dispatcher.tick(bench.clock.monotonic_ns())
        bench.loop.held_up = None
        bench.rest()
        bench.answer_all()
        assert bench.ring.undone == 0


def test_connections_are_opened_in_portions(tmp_path, monkeypatch):
    begun, most = [], []

    async def open_nothing(pool):
        begun.append(pool)
        await asyncio.sleep(60)

    monkeypatch.setattr(AnalyzerPool, "_open", open_nothing)

    async def scenario():
        endpoints = {f"A{n}": f"http://127.0.0.1:{n}/" for n in range(1, 9)}
        async with World(tmp_path, endpoints, delivery={"connections": 32}) as w:
            for pool in w.pools:
                pool.growth_ns = 0
            w.push(1000)
            while len(begun) < 8 * 32:
                before = len(begun)
                await asyncio.sleep(0)
                most.append(len(begun) - before)

    run(scenario())
    assert 0 < max(most) <= 16


def test_spill_targets_are_found_in_portions(tmp_path):
    delivery = {"connections": 30, "spill_after": 1.0, "timeout": 1000.0}
    with Bench(tmp_path, (1, 1, 1), delivery=delivery) as bench:
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"x"] * 90)
        assert bench.pool(0).waiting == 60
        bench.dispatcher.refresh()
        bench.dispatcher.part_ns = 0
        bench.loop.held_up = 0
        for _ in range(16):
            bench.pass_time(0.1)
        bench.dispatcher.spill_at(bench.clock.monotonic_ns() + 2 * SECOND)
        figures = turns(bench, lambda: bench.count("spilled"))
        assert max(steps(figures)) < 20
        bench.loop.held_up = None
        while bench.answer_all(OK):
            pass
        assert bench.delivered == 90
