"""Upkeep: a step that fails keeps no other from being done, is told once, and shows."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from fastdist import upkeep
from fastdist.shared import HeadWord, SharedBlock, Step, WorkerWord
from fastdist.upkeep import Upkeep


@pytest.fixture
def words():
    return SharedBlock.create(1, 1).worker(0)


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system", "/q/x"), ZeroDivisionError("division by zero")])
def test_a_failing_step_keeps_no_other_from_work(monkeypatch, words, error):
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


def test_a_step_that_fails_now_and_then_is_told_once(words):
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
