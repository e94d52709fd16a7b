"""Upkeep: a step that fails keeps no other from being done, is told once, and shows."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from fastdist.settings import Server
from fastdist.shm import upkeep
from fastdist.shm.block import HeadWord, SharedBlock, Step, WorkerWord
from fastdist.shm.upkeep import Upkeep
from fastdist.worker.upkeep import (
    LATE_NS,
    MAX_PART_NS,
    PART_NS,
    SHARE,
    TICK,
    TICK_NS,
    TOGETHER_NS,
    EmitterTimeouts,
    LoopLag,
    Schedule,
    Sweep,
    Task,
)


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


# ---- tasks


class Loop:
    """An event loop whose clock goes on only by ``spend`` and while it has nothing to do."""

    def __init__(self, monkeypatch):
        self.now, self.soon, self.timers = 10**12, [], []
        monkeypatch.setattr(upkeep.time, "monotonic_ns", lambda: self.now)

    def call_soon(self, callback):
        self.soon.append(callback)

    def call_later(self, seconds, callback):
        self.timers.append((self.now + round(seconds * 1000) * 1_000_000, callback))  # as the event loop counts

    def spend(self, ns):
        self.now += ns

    def iterate(self, busy_ns=0):
        """Run an iteration that takes ``busy_ns`` besides."""
        if not self.soon:
            self.now = max(self.now, min(due for due, _ in self.timers))
        self.spend(busy_ns)
        ready = [*self.soon, *(callback for due, callback in self.timers if due <= self.now)]
        self.soon, self.timers = [], [each for each in self.timers if each[0] > self.now]
        for callback in ready:
            callback()


class Clockwork:
    """A schedule of tasks that take 1 ms each and note when they run: (iteration, name, ns)."""

    takes_ns = 1_000_000

    def __init__(self, monkeypatch, words, **intervals):
        self.loop, self.ran, self.iteration = Loop(monkeypatch), [], 0
        self.unfinished = dict.fromkeys(intervals, 0)  # how often the task says so
        tasks = [Task(Step.GAUGES, seconds, self._task(name)) for name, seconds in intervals.items()]
        self.schedule = Schedule(self.loop, Upkeep(words, WorkerWord.FAILING), tasks)
        self.schedule.start()

    def _task(self, name):
        def work(now_ns):
            self.ran.append((self.iteration, name, now_ns))
            self.loop.spend(self.takes_ns)
            self.unfinished[name] -= 1
            return self.unfinished[name] >= 0

        return work

    def run(self, seconds, busy_ns=0):
        end = self.loop.now + seconds * 1e9
        while self.loop.now < end:
            self.iteration += 1
            self.loop.iterate(busy_ns)

    def of(self, name):
        return [now for _, each, now in self.ran if each == name]


FIVE = {"a": TICK, "b": TICK, "c": TICK, "d": 0.1, "e": 0.1}


def test_long_tasks_share_no_iteration(monkeypatch, words):
    it = Clockwork(monkeypatch, words, **FIVE)
    it.run(5)
    iterations = [iteration for iteration, _, _ in it.ran]
    assert len(set(iterations)) == len(iterations)
    assert it.schedule.peak_ns == 1_000_000


def test_short_tasks_share_iterations(monkeypatch, words):
    monkeypatch.setattr(Clockwork, "takes_ns", TOGETHER_NS // 4)
    it = Clockwork(monkeypatch, words, **FIVE)
    it.run(5)
    assert it.iteration < len(it.ran) / 2
    assert it.schedule.peak_ns <= TOGETHER_NS + it.takes_ns


def test_no_task_runs_twice_in_an_iteration(monkeypatch, words):
    monkeypatch.setattr(Clockwork, "takes_ns", 1000)
    it = Clockwork(monkeypatch, words, a=0.001, b=TICK)
    it.run(1)
    turns = [iteration for iteration, name, _ in it.ran if name == "a"]
    assert len(set(turns)) == len(turns) > 400
    assert it.iteration < 1.1 * len(it.ran)


def test_idle_loop_is_not_kept_spinning(monkeypatch, words):
    it = Clockwork(monkeypatch, words, **FIVE)
    it.run(5)
    assert it.iteration <= 1.1 * len(it.ran)


@pytest.mark.parametrize("busy_ns", [0, 100_000, 5_000_000, 40_000_000], ids=lambda ns: f"{ns / 1e6:g} ms")
def test_no_task_is_late_for_the_others(monkeypatch, words, busy_ns):
    """However long iterations take, a task is due one of them late at most, and what an iteration's share allows."""
    it = Clockwork(monkeypatch, words, **FIVE)
    it.run(5, busy_ns)
    allowed = busy_ns + LATE_NS + len(FIVE) * 1_000_000
    for name, interval in FIVE.items():
        runs = it.of(name)
        gaps = [after - before for before, after in pairwise(runs)]
        assert gaps
        assert max(gaps) <= interval * 1e9 + 2 * allowed
        assert min(gaps) >= interval * 1e9 - 2_000_000


def test_unfinished_task_goes_on_soon(monkeypatch, words):
    it = Clockwork(monkeypatch, words, a=TICK, b=1.0)
    it.run(0.5)
    it.ran.clear()
    it.unfinished["b"] = 100
    it.run(1.2)
    turns = [iteration for iteration, name, _ in it.ran if name == "b"]
    assert len(turns) == 101
    assert len(set(turns)) == 101
    assert max(after - before for before, after in pairwise(turns)) <= 3, "beside the other task only"
    gaps = [after - before for before, after in pairwise(it.of("a"))]
    assert max(gaps) <= TICK_NS + 3_000_000


def test_failing_task_stops_no_other(monkeypatch, words):
    it = Clockwork(monkeypatch, words, **FIVE)
    monkeypatch.setattr(it.loop, "spend", lambda _ns: 1 / 0)
    with capture_logs() as logs:
        for _ in range(100):
            it.loop.now += 1_000_000
            for callback in (*it.loop.soon, *(callback for _, callback in it.loop.timers)):
                it.loop.soon, it.loop.timers = [], []
                callback()
    assert {name for _, name, _ in it.ran} == set(FIVE)
    assert words[WorkerWord.FAILING] == Step.GAUGES
    assert len(logs) == 1


# ---- sweeps


class Things:
    """What a sweep goes through; each check takes ``cost`` ns."""

    def __init__(self, monkeypatch, count, cost):
        self.loop, self.count, self.checked, self.failing = Loop(monkeypatch), count, [], set()
        self.sweep = Sweep(lambda _now: range(count), self._check)
        self.cost = cost

    def _check(self, thing, _now_ns):
        self.loop.spend(self.cost)
        self.checked.append(thing)
        if thing in self.failing:
            raise OSError(5, str(thing))

    def parts(self, pause_ns=0):
        """Return how many things the parts of a sweep check, with so much time between the parts."""
        parts, unfinished = [], True
        while unfinished:
            before = len(self.checked)
            unfinished = self.sweep.go_on(self.loop.now)
            parts.append(len(self.checked) - before)
            self.loop.spend(pause_ns)
        return parts


def test_parts_of_a_sweep_are_short(monkeypatch):
    them = Things(monkeypatch, 1000, 1000)
    assert them.parts() == [0, *[PART_NS // 1000] * (1_000_000 // PART_NS)]
    assert sorted(them.checked) == list(range(1000))


@pytest.mark.parametrize("pause_ns", [1_000_000, 5_000_000, 60_000_000])
def test_busy_loop_makes_no_sweep_endless(monkeypatch, pause_ns):
    """Parts are longer where iterations are."""
    them = Things(monkeypatch, 10_000, 1000)
    assert max(them.parts(pause_ns)) <= min(MAX_PART_NS, 2 * pause_ns // SHARE) // 1000
    assert them.loop.now - 10**12 <= 10_000_000 + pause_ns * (2 + 10_000_000 / min(MAX_PART_NS, pause_ns // SHARE))


def test_sweep_checks_all_despite_errors(monkeypatch):
    them = Things(monkeypatch, 100, 1000)
    them.failing = {3, 50}
    with pytest.raises(OSError, match=r"3|50"):
        them.parts()
    assert sorted(them.checked) == list(range(100))
    them.failing = set()
    them.parts()
    assert len(them.checked) == 200


def test_empty_sweep_is_finished(monkeypatch):
    assert Things(monkeypatch, 0, 1).sweep.go_on(1) is False


# ---- the event loop's lag


@pytest.mark.parametrize(
    ("late", "parts", "lag"),
    [(7, (1, 2, 3), 7), (0, (8, 2, 3), 8), (-5, (1, 9, 3), 9), (0, (1, 2, 6), 6), (-5, (0, 0, 0), 0)],
    ids=["late", "streams", "held back", "the upkeep", "early"],
)
def test_loop_lag_is_its_longest_part(late, parts, lag):
    seen = []
    them = [SimpleNamespace(peak_ns=0) for _ in parts]
    it = LoopLag(SimpleNamespace(observe_loop_lag=seen.append), them)
    it.observe(1000)
    for part, ns in zip(them, parts, strict=True):
        part.peak_ns = ns
    it.observe(1000 + TICK_NS + late)
    assert seen == [0, lag]
    assert [part.peak_ns for part in them] == [0, 0, 0]


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
    timeouts = EmitterTimeouts(them.intake, Server())
    parts, unfinished = [], True
    while unfinished:
        before = len(them.checked)
        unfinished = timeouts.go_on(them.now)
        parts.append(len(them.checked) - before)
    assert set(them.checked) == them.intake.connections
    assert parts == [0, *[1] * 10]
    assert not them.excused


def test_late_sweep_ends_no_connection(monkeypatch):
    them = Connections(monkeypatch, 2)
    timeouts = EmitterTimeouts(them.intake, Server())
    them.now += 5 * 10**9
    while timeouts.go_on(them.now):
        pass
    assert not them.checked
    assert {late for _, late in them.excused} == {5 * 10**9}
    assert len(them.excused) == 2


def test_closed_connection_is_not_checked(monkeypatch):
    them = Connections(monkeypatch, 3)
    next(iter(them.intake.connections)).transport = None
    timeouts = EmitterTimeouts(them.intake, Server())
    while timeouts.go_on(them.now):
        pass
    assert len(them.checked) == 2
