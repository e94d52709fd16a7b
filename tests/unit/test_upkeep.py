"""Upkeep: a step that fails keeps no other from being done, is told once, and shows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from fastdist.settings import Server
from fastdist.shm import upkeep
from fastdist.shm.block import HeadWord, SharedBlock, Step, WorkerWord
from fastdist.shm.upkeep import Upkeep
from fastdist.worker.upkeep import SWEEP_NS, TICK_NS, LoopLag, Sweep


@pytest.fixture
def words():
    return SharedBlock.create(1, 1).worker(0)


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system", "/q/x"), ZeroDivisionError("division by zero")])
def test_failing_step_stops_no_other(monkeypatch, words, error):
    monkeypatch.setattr(upkeep, "QUIET", 0.0)
    it, done, broken = Upkeep(words, WorkerWord.FAILING), [], True

    def work(number):
        done.append(number)
        if broken:
            raise error

    with capture_logs() as logs:
        for number in range(100):
            it.run(Step.OLD_RINGS, work, number)
            it.run(Step.SYNC, done.append, "sync")
        assert words[WorkerWord.FAILING] == Step.OLD_RINGS
        (line,) = logs
        assert (line["step"], line["error"], line["log_level"]) == ("oldRings", str(error), "error")
        expected = isinstance(error, OSError)
        assert ("advice" in line, line["exc_info"]) == (expected, None if expected else error)
        broken = False
        for _ in range(3):
            it.run(Step.OLD_RINGS, work, 0)
        assert words[WorkerWord.FAILING] == 0
        assert [each["step"] for each in logs] == ["oldRings"] * 2
        assert "works again" in logs[1]["event"]
    assert done.count("sync") == 100
    assert len(done) == 203


def test_recurring_step_failure_logs_once(words):
    it = Upkeep(words, WorkerWord.FAILING)

    def fails():
        raise OSError(5, "Input/output error")

    with capture_logs() as logs:
        for _ in range(100):
            it.run(Step.TIMEOUTS, fails)
            it.run(Step.TIMEOUTS, dict)
    assert len(logs) == 1
    assert words[WorkerWord.FAILING] == Step.TIMEOUTS


def test_a_successor_begins_without_failures(words):
    words[WorkerWord.FAILING] = int(Step.SYNC)
    Upkeep(words, WorkerWord.FAILING)
    assert words[WorkerWord.FAILING] == 0


def test_each_step_has_a_bit_and_a_word():
    assert all(0 < step < 1 << 62 for step in Step)
    assert HeadWord.FAILING < HeadWord.HEAD_WORDS
    assert [Step.OLD_RINGS.word, Step.SYNC.word] == ["oldRings", "sync"]


# ---- the event loop's lag


@pytest.mark.parametrize(
    ("late", "parts", "took", "lag"),
    [(7, (1, 2), 3, 7), (0, (8, 2), 3, 8), (-5, (1, 9), 3, 9), (0, (1, 2), 6, 6), (-5, (0, 0), 0, 0)],
    ids=["late", "streams", "held back", "the tick before", "early"],
)
def test_loop_lag_is_its_longest_part(monkeypatch, late, parts, took, lag):
    seen = []
    counters = SimpleNamespace(observe_loop_lag=seen.append)
    poller, intake = SimpleNamespace(longest_ns=0), SimpleNamespace(longest_ns=0)
    clock = [1000]
    monkeypatch.setattr(upkeep.time, "monotonic_ns", lambda: clock[0])
    it = LoopLag(counters, poller, intake)
    it.begin(clock[0])
    clock[0] += took
    it.end(1000)
    poller.longest_ns, intake.longest_ns = parts
    it.begin(1000 + TICK_NS + late)
    assert seen == [0, lag]
    assert (poller.longest_ns, intake.longest_ns) == (0, 0)


# ---- time-outs of emitters


class Connections:
    """Connections that note what a sweep does with them; the clock goes on by 1 ms with each."""

    def __init__(self, monkeypatch, count):
        self.now, self.checked, self.excused = 10**12, [], []
        monkeypatch.setattr(upkeep.time, "monotonic_ns", lambda: self.now)
        self.intake = SimpleNamespace(connections={Connection(self) for _ in range(count)})


class Connection:
    def __init__(self, notes):
        self.transport, self.notes = object(), notes

    def check(self, _now_ns):
        self.notes.now += 1_000_000
        self.notes.checked.append(self)

    def excuse(self, _now_ns, late):
        self.notes.excused.append((self, late))


def test_many_timeouts_are_checked_in_parts(monkeypatch):
    them = Connections(monkeypatch, 10)
    sweep = Sweep(them.intake, Server())
    parts = []
    while len(them.checked) < 10:
        before = len(them.checked)
        sweep.go_on(them.now)
        parts.append(len(them.checked) - before)
        assert parts[-1] <= SWEEP_NS // 1_000_000 + 1
    assert set(them.checked) == them.intake.connections
    assert len(parts) > 1
    sweep.go_on(them.now)  # the next is not due yet
    assert len(them.checked) == 10


def test_late_sweep_ends_no_connection(monkeypatch):
    them = Connections(monkeypatch, 2)
    sweep = Sweep(them.intake, Server())
    them.now += 5 * 10**9
    sweep.go_on(them.now)
    assert not them.checked
    assert {late for _, late in them.excused} == {5 * 10**9}
    assert len(them.excused) == 2


def test_closed_connection_is_not_checked(monkeypatch):
    them = Connections(monkeypatch, 3)
    next(iter(them.intake.connections)).transport = None
    sweep = Sweep(them.intake, Server())
    for _ in range(5):
        sweep.go_on(them.now)
    assert len(them.checked) == 2
