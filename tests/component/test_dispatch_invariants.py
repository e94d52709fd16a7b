"""Whatever happens, in whatever order: every packet is in one place, and is delivered in the end."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from upstream_harness import OK, SECOND, Bench, reply

from fastdist.shm.block import AnalyzerWord

REPLIES = [
    OK,
    OK,
    OK,
    reply(200, "Connection: close"),
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    b"HTTP/1.0 200 OK\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    reply(404),
    reply(302, "Location: /"),
    reply(422),
    reply(500),
    reply(500, "Connection: close"),
    reply(503, "Retry-After: 2"),
    reply(503, "Retry-After: \xb2"),
    reply(429),
    OK + reply(500) + OK,
    b"\0",
]
FALLIBLE = ["failed", "refused", "not_sent", "paused_for", "settled", "_retry", "_exhausted", "another", "_dead_letter"]
SLOTS = range(4)
WEIGHTS = (3, 2, 1, 0)
MODES = [
    {"delivery": {"connections": 2}},
    {"delivery": {"connections": 1, "pipeline": 4}},
    {"delivery": {"connections": 2, "mode": "batch", "batch_packets": 3, "linger": 0}},
    {"delivery": {"connections": 2, "pipeline": 2, "mode": "batch", "batch_packets": 5, "linger": 0.0001}},
    {"delivery": {"connections": 2, "spill_after": 0.5}},
    {"delivery": {"connections": 2}, "distribution": {"strategy": "sticky"}},
    {"delivery": {"connections": 3}, "distribution": {"strategy": "random", "by": "bytes"}},
    {"delivery": {"connections": 2}, "retry": {"base": 0.1, "cap": 1.0, "max_attempts": 3}},
]


class Happenings(RuleBasedStateMachine):
    """A bench to which everything happens; ``Bench.check`` runs after every step."""

    folder = None

    @initialize(mode=st.sampled_from(MODES), part_ns=st.sampled_from([0, SECOND]))
    def open(self, mode, part_ns):
        sections = {"health": {"fall": 3}, "retry": {"base": 0.1, "cap": 1.0}} | mode
        self.bench = Bench(self.folder, WEIGHTS, **sections)
        self.bench.dispatcher.part_ns = part_ns  # 0: whatever is done in parts takes as many turns as it can
        self.dead_letters_before = len(self.bench.dead_letters())

    def teardown(self):
        bench = self.bench
        self.hold_up(None)
        bench.rest()
        for slot in SLOTS:  # what stands half read is over
            for connection in bench.connections(slot):
                bench.lose(connection)
        for _ in range(50):
            for slot in SLOTS:  # all is well again, and everything is delivered
                bench.pool(slot).reachable = True
                bench.states.set(slot, AnalyzerWord.DRAINING, 0)
                bench.states.go_online(slot)
                bench.states.touch()
            bench.pass_time(10)
            bench.loop.fire()
            while bench.answer_all():
                pass
            if bench.ring.undone == 0:
                break
        assert bench.ring.undone == bench.ring.claimed == 0
        assert bench.delivered + bench.dead_lettered == bench.pushed
        assert bench.dispatcher.retrying == {}
        assert len(bench.dead_letters()) - self.dead_letters_before == bench.dead_lettered
        bench.__exit__(None, None, None)

    @invariant()
    def every_packet_is_in_one_place(self):
        if hasattr(self, "bench"):
            self.bench.check()

    @rule(count=st.integers(1, 12), size=st.integers(0, 60), emitter=st.integers(0, 5))
    def push(self, count, size, emitter):
        self.bench.push(*[b"7" * size] * count, emitter=emitter)

    def some_connection(self, slot, number):
        connections = [each for each in self.bench.connections(slot) if not each.transport.ended]
        return connections[number % len(connections)] if connections else None

    @rule(slot=st.sampled_from(SLOTS), number=st.integers(0, 5), data=st.sampled_from(REPLIES))
    def answer(self, slot, number, data):
        if connection := self.some_connection(slot, number):
            self.bench.answer(connection, data)

    @rule(data=st.sampled_from(REPLIES))
    def answer_everything(self, data):
        self.bench.answer_all(data)

    @rule(slot=st.sampled_from(SLOTS), number=st.integers(0, 5), error=st.sampled_from([None, OSError("reset")]))
    def lose(self, slot, number, error):
        if connection := self.some_connection(slot, number):
            self.bench.lose(connection, error)

    @rule(slot=st.sampled_from(SLOTS))
    def go_offline(self, slot):
        self.bench.go_offline(slot)

    @rule(slot=st.sampled_from(SLOTS))
    def go_online(self, slot):
        self.bench.go_online(slot)

    @rule(slot=st.sampled_from(SLOTS))
    def check_well(self, slot):
        """Its health checks succeed: one that deliveries took offline is on probation."""
        self.bench.states.set(slot, AnalyzerWord.CHECK_SUCCESSES, self.bench.config.health.rise)
        self.bench.tick()

    @rule(slot=st.sampled_from(SLOTS), draining=st.integers(0, 1))
    def drain(self, slot, draining):
        self.bench.drain(slot, draining)

    @rule(slot=st.sampled_from(SLOTS), seconds=st.integers(1, 3))
    def pause(self, slot, seconds):
        self.bench.states.pause(slot, self.bench.clock.monotonic_ns() + seconds * SECOND)
        self.bench.tick()

    @rule(slot=st.sampled_from(SLOTS), reachable=st.booleans())
    def network(self, slot, reachable):
        self.bench.pool(slot).reachable = reachable

    @rule(seconds=st.sampled_from([0.001, 0.15, 0.6, 1.5, 6.0, 70.0]))
    def wait(self, seconds):
        self.bench.pass_time(seconds)
        self.bench.loop.fire()

    @rule(slot=st.sampled_from(SLOTS), weight=st.sampled_from([0, 1, 5]))
    def reweigh(self, slot, weight):
        self.bench.states.set_weight(slot, weight)
        self.bench.states.touch()
        self.bench.tick()

    @rule(load=st.sampled_from([0.0, 1.0]))
    def load(self, load):
        self.bench.dispatcher._load.measure = lambda _now: load

    @rule(turns=st.sampled_from([0, 1, 2, 5, None]))
    def hold_up(self, turns):
        """What is done in parts is not over when the next thing happens."""
        self.bench.loop.held_up = turns

    @rule(method=st.sampled_from(FALLIBLE))
    def go_wrong(self, method):
        """The next call of this method throws something."""
        dispatcher = self.bench.dispatcher
        real = getattr(dispatcher, method)

        def throw(*_args, **_kwargs):
            setattr(dispatcher, method, real)
            raise RuntimeError(f"thrown by {method}")

        setattr(dispatcher, method, throw)

    @rule(slot=st.sampled_from(SLOTS), number=st.integers(1, 3))
    def move_endpoint(self, slot, number):
        self.bench.add(slot, WEIGHTS[slot], endpoint=f"http://host{number}.test/")
        self.bench.dispatcher.set_analyzers(self.bench.analyzers)
        self.bench.loop.run()


def test_packet_is_in_one_place_until_sent(tmp_path):
    machine = type("HappeningsHere", (Happenings,), {"folder": tmp_path})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=3 * settings().max_examples // 2, stateful_step_count=40, deadline=None)
    )


STEPS = {  # how often each comes
    "push": 20,
    "answer": 40,
    "answer everything": 3,
    "lose": 5,
    "go offline": 3,
    "go online": 6,
    "check well": 10,
    "drain": 3,
    "pause": 2,
    "network": 3,
    "wait": 6,
    "hold up": 6,
    "go wrong": 1,
    "move endpoint": 1,
}


def do(machine, step, source):  # noqa: C901  (each a line)
    slot, number = source.choice(SLOTS), source.randint(0, 5)
    match step:
        case "push":
            machine.push(source.randint(1, 12), source.randint(0, 60), number)
        case "answer":
            machine.answer(slot, number, source.choice(REPLIES))
        case "answer everything":
            machine.answer_everything(OK)
        case "lose":
            machine.lose(slot, number, source.choice([None, OSError("reset")]))
        case "drain":
            machine.drain(slot, number % 2)
        case "pause":
            machine.pause(slot, 1)
        case "network":
            machine.network(slot, number > 1)
        case "wait":
            machine.wait(source.choice([0.001, 0.15, 0.6, 1.5]))
        case "hold up":
            machine.hold_up(source.choice([0, 1, 2, 5, None, None]))
        case "go wrong":
            machine.go_wrong(source.choice(FALLIBLE))
        case "move endpoint":
            machine.move_endpoint(slot, number)
        case _:
            getattr(machine, step.replace(" ", "_"))(slot)


@pytest.mark.parametrize("seed", range(24))
def test_long_random_runs_keep_invariants(tmp_path, seed):
    """The same, longer and without shrinking."""
    source = random.Random(seed)
    machine = type("HappeningsHere", (Happenings,), {"folder": tmp_path})()
    machine.open(MODES[seed % len(MODES)], seed % 3 % 2 * SECOND)
    for step in source.choices(list(STEPS), list(STEPS.values()), k=1000):
        do(machine, step, source)
        machine.bench.check()
    machine.teardown()
