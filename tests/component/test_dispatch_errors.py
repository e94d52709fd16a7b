"""Errors of the program itself, thrown wherever outcomes are dealt with: the packets go again, and it is told once."""

from __future__ import annotations

import contextlib

import pytest
from structlog.testing import capture_logs
from upstream_harness import OK, Bench, Desk, Owner, reply

from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.worker.dispatch import Dispatcher
from fastdist.worker.outcomes import Outcomes
from fastdist.worker.probation import Probation
from fastdist.worker.upstream import AnalyzerPool


class Thrower:
    """Stands in a method's place and throws, until it is taken away."""

    def __init__(self, monkeypatch, owner, name):
        self.monkeypatch, self.thrown = monkeypatch, 0
        monkeypatch.setattr(owner, name, self.throw)

    def throw(self, *_args, **_kwargs):
        self.thrown += 1
        raise RuntimeError("thrown on purpose")

    def remove(self):
        self.monkeypatch.undo()


def settle_all(bench):
    """Have all that is left delivered."""
    for _ in range(40):
        bench.pass_time(1.1)
        while bench.answer_all():
            pass
        if bench.ring.undone == 0:
            break
    assert bench.ring.undone == bench.ring.claimed == 0
    assert bench.delivered + bench.dead_lettered == bench.pushed


WAYS = [
    (Outcomes, "failed", reply(500)),
    (Outcomes, "failed", b"\0"),
    (Outcomes, "failed", reply(404)),
    (Outcomes, "paused_for", reply(429, "Retry-After: 1")),
    (Outcomes, "refused", reply(400)),
    (Outcomes, "delivered", OK),
    (Outcomes, "_count_failure", reply(500)),
    (Outcomes, "_retry", reply(500)),
    (Outcomes, "_remember", reply(500)),
    (Outcomes, "_pass_on", reply(500)),
    (Outcomes, "_exhausted", reply(500)),
    (Outcomes, "_refused_alone", reply(422)),
    (Outcomes, "_count_refusal", reply(422)),
    (Outcomes, "_dead_letter", reply(422)),
    (Outcomes, "wake", reply(500)),
    (Outcomes, "wake", reply(422)),
    (Probation, "is_trying", reply(500)),
    (Probation, "refused", reply(422)),
    (Probation, "passed", OK),
    (DeadLetterFiles, "write", reply(422)),
    (DeadLetterFiles, "settle", reply(422)),
    (Outcomes, "schedule", OK),
    (Outcomes, "wake", OK),
    (AnalyzerPool, "unasked", OK + OK + OK),
]


@pytest.mark.parametrize("mode", ["single", "batch"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0].__name__}.{way[1]} {way[2][9:12].decode('latin-1')}")
def test_whatever_is_thrown_packets_go_again(tmp_path, monkeypatch, way, mode):
    owner, name, data = way
    delivery = {"mode": mode, "connections": 2, "pipeline": 2, "batch_packets": 3, "linger": 0}  # no real time passes
    with Bench(tmp_path, (1, 1, 1), delivery=delivery, health={"fall": 10_000}) as bench, capture_logs() as lines:
        bench.push(*[b"x"] * 60)
        for slot in bench.analyzers:  # so that deliveries are told of, too
            bench.answer(bench.busy(slot)[0], reply(500))
        thrower = Thrower(monkeypatch, owner, name)
        for _ in range(3):
            for slot in bench.analyzers:
                for connection in bench.busy(slot):
                    connection.data_received(data)
                    bench.check()
            while bench.loop.ready:
                with contextlib.suppress(RuntimeError):  # as a loop does
                    bench.loop.run()
            bench.check()
        thrower.remove()
        settle_all(bench)
        told = [line for line in lines if line["log_level"] == "error" and "fastdist" in line["event"]]
        assert len(told) <= 3, "once for each place, not for each packet"


def test_waiters_settle_on_callback_error(tmp_path):
    with Bench(tmp_path, (1,), retry={"base": 0.001, "cap": 0.001}, health={"fall": 9}) as bench:
        bench.push(b"1", b"2", b"3")
        bench.answer_all(reply(500), [0])
        bench.pass_time(0.1)
        heard = []

        def settled(sequence, analyzer):
            heard.append((sequence, analyzer))
            raise RuntimeError("thrown on purpose")

        bench.dispatcher.settled = settled
        with capture_logs() as lines:
            settle_all(bench)
        assert sorted(heard) == [(1, "A1"), (2, "A1"), (3, "A1")]
        assert bench.dispatcher.retrying == {}
        assert sum(line["log_level"] == "error" for line in lines) == 1


class Throwing(Owner):
    """An owner that throws whatever it is told."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def went_wrong(self, error):
        self.errors.append(error)

    def _note(self, *_):
        raise RuntimeError("thrown on purpose")


@pytest.mark.parametrize("data", [reply(500), reply(422), reply(503, "Retry-After: 1"), b"\0"])
def test_outcome_error_closes_its_connection(data):
    desk = Desk(pipeline=3)
    desk.pool.owner = owner = Throwing()
    connection = desk.connect()
    desk.push(b"1", b"2", b"3")
    desk.pool.pump()
    connection.data_received(data)
    assert connection.transport.ended
    assert connection.in_flight() == desk.pool.requests_in_flight == 0
    assert {desk.ring.packet_id(desk.ring.claim()) for _ in range(3)} == {"p1", "p2", "p3"}
    assert owner.errors
    connection.connection_lost(None)
    assert desk.pool.open_connections == 0


@pytest.mark.parametrize("pipeline", [1, 3])
@pytest.mark.parametrize("first", [True, False], ids=["the first write", "a later one"])
def test_nothing_follows_a_failed_write(first, pipeline):
    """How much of a write that throws was sent is unknown: what follows would be taken for its rest."""
    desk = Desk(connections=1, pipeline=pipeline)
    desk.pool.owner = owner = Throwing()
    owner.failed = lambda pool, handles, *_, **__: give_back(pool, handles)
    owner.not_sent = give_back
    connection = desk.connect()
    if not first:
        desk.push(b"0")
        desk.pool.pump()

    def throw(_data):
        raise MemoryError

    connection.transport.write = throw
    desk.push(b"1", b"2")
    if first:
        desk.pool.pump()
    else:
        connection.data_received(OK)
    assert connection.transport.ended == "abort"
    assert connection.in_flight() == desk.pool.requests_in_flight == 0
    assert [type(error) for error in owner.errors] == [MemoryError]
    assert desk.ring.undone == 2
    assert desk.ring.claimed == desk.pool.waiting


def give_back(pool, handles):
    while handles:
        pool.ring.release(handles.pop())


def test_unconnected_retries_despite_error(tmp_path, monkeypatch):
    with Bench(tmp_path, (1, 1), health={"fall": 10_000}) as bench:
        for slot in range(2):
            bench.pool(slot).reachable = False
        thrower = Thrower(monkeypatch, Dispatcher, "failed")
        bench.dispatcher.loop.held_up = 20
        bench.push(*[b"x"] * 20)
        assert thrower.thrown
        thrower.remove()
        for slot in range(2):
            bench.pool(slot).reachable = True
        bench.dispatcher.loop.held_up = None
        settle_all(bench)


def test_unsent_after_an_error_is_sent_later(tmp_path):
    with Bench(tmp_path, (1,)) as bench:

        def throw():
            raise RuntimeError("thrown on purpose")

        bench.pool(0).open_more = throw
        bench.push(*[b"x"] * 30)
        del bench.pool(0).open_more
        settle_all(bench)


def test_failed_timeout_hides_no_other(tmp_path):
    with Bench(tmp_path, (1, 1, 1), delivery={"timeout": 5.0}, health={"fall": 10_000}) as bench:
        bench.push(*[b"x"] * 9)
        broken = bench.busy(0)[0]
        others = [each for slot in bench.analyzers for each in bench.busy(slot) if each is not broken]
        broken.check = None  # not callable
        bench.pass_time(5.2)
        assert all(each.transport.ended for each in others)
        del broken.check
        settle_all(bench)
