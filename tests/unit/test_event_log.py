"""The log of what is turned away and given up: few lines whatever comes, whose counts add up, and no content."""

from __future__ import annotations

import errno
import os
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fastdist.settings import Config
from fastdist.shm.block import EXAMPLE_WORDS, LINES, AnalyzerState, AnalyzerWord, SharedBlock, WorkerState, WorkerWord
from fastdist.shm.examples import KINDS, PLACE, Examples, latest_example
from fastdist.shm.snapshot import CONNECTIONS, DEAD_LETTERS, REJECTIONS, Snapshot
from fastdist.supervisor import event_log
from fastdist.supervisor.event_log import KINDS_OF_LINES, EventLog

SECOND = 10**9
ANALYZERS = dict(enumerate(Config().analyzers))


class Service:
    """A shared block of three workers, and the log of it, by a clock of its own."""

    def __init__(self):
        self.block = SharedBlock.create(3, 8)
        os.close(self.block.fd)
        for slot, analyzer in ANALYZERS.items():
            self.block.analyzers.clear(slot)
            self.block.analyzers.set_weight(slot, analyzer.weight)
        for index in range(3):
            self.block.worker(index)[WorkerWord.STATE] = WorkerState.RUNNING
        limiter = self.block.limiter()  # like that of the lines
        limiter.configure(LINES / 2 / 60, LINES / 2, 0, 0)
        self.now = 1000.0
        self.events = EventLog(lambda: limiter.check("", int(self.now * SECOND)) == 0.0)
        self.lines = []  # (when, line)
        self.look()

    def look(self, *, last=False):
        with capture_logs() as lines:
            self.events.look(Snapshot(self.block, Config(), ANALYZERS, "1"), now=self.now, last=last)
        self.lines += [(self.now, line) for line in lines]

    def go_on(self, seconds, each_second=lambda: None):
        for _ in range(seconds):
            each_second()
            self.now += 1.0
            self.look()

    def reject(self, reason, count=1, worker=0):
        self.block.rows[worker].add(reason, count)

    def said(self):
        return [line["event"] for _, line in self.lines]

    def counted(self):
        counts = Counter()
        for _, line in self.lines:
            if line["event"].startswith("and before"):
                counts.update({name: n for name, n in line.items() if name not in ("event", "log_level")})
            elif "reason" in line:
                counts[line["reason"]] += next(
                    line[key] for key in ("requests", "packets", "connections") if key in line
                )
        return +counts


@pytest.fixture
def service():
    return Service()


# ---- what is said, and when


def test_a_burst_is_one_line(service):
    """As 50 invalid packets are."""
    for _ in range(50):
        service.reject("invalid")
    service.go_on(200)
    ((_, line),) = service.lines
    assert line == {"event": "requests rejected", "reason": "invalid", "requests": 50, "log_level": "warning"}


@pytest.mark.parametrize(("seconds", "lines"), [(60, 2), (100, 3), (200, 5)])
def test_a_full_queue_is_few_lines(service, seconds, lines):
    def full():
        service.reject("queue_full", 100)
        service.block.worker(1)[WorkerWord.LACKING] = 1000

    service.go_on(seconds, full)
    service.block.worker(1)[WorkerWord.LACKING] = 0
    service.go_on(100)
    assert service.said() == [
        "queue full; packets are rejected",
        *["queue still full; packets are rejected"] * (lines - 2),
        "queue has room",
    ]
    assert service.counted() == {"queue_full": 100 * seconds}
    assert [line["log_level"] for _, line in service.lines] == ["warning"] * (lines - 1) + ["info"]


def test_a_full_queue_for_a_moment(service):
    service.reject("queue_full", 7)
    service.go_on(100)
    assert service.said() == ["queue full; packets are rejected", "queue has room"]
    assert service.counted() == {"queue_full": 7}


def test_what_goes_on_is_said_once_a_minute(service):
    service.go_on(600, lambda: service.reject("malformed", 10))
    service.go_on(60)
    times = [when for when, _ in service.lines]
    assert len(times) in (11, 12)
    assert all(after - before >= 60 for before, after in pairwise(times[:-1]))
    assert set(service.said()[1:-1]) == {"requests still rejected"}
    assert service.said()[-1] == "requests no longer rejected"
    assert service.counted() == {"malformed": 6000}


def test_what_is_rare_is_said_once_a_minute(service):
    for _ in range(20):
        service.reject("unauthorized")
        service.go_on(15)
    service.go_on(60)
    assert len(service.lines) <= 6
    assert service.counted() == {"unauthorized": 20}


def test_other_faults_are_no_connections(service):
    """Dead letters that could not be written had the same word once: 28 connections turned away, then -28."""
    service.block.worker(0)[WorkerWord.DEAD_LETTERS_FAULT] = errno.ENOSPC
    service.go_on(70)
    service.block.worker(0)[WorkerWord.DEAD_LETTERS_FAULT] = 0
    service.go_on(70)
    assert service.lines == []


def test_nothing_is_said_of_nothing(service):
    service.go_on(300)
    assert service.lines == []


def test_no_analyzer_is_an_event(service):
    service.block.rows[0].set("undone", 5)
    for slot in ANALYZERS:
        service.block.analyzers.set(slot, AnalyzerWord.STATE, AnalyzerState.OFFLINE)
    service.go_on(70)
    service.block.analyzers.set(0, AnalyzerWord.STATE, AnalyzerState.ONLINE)
    service.go_on(5)
    assert service.said() == [
        "no analyzer is online; packets wait in the queue",
        "still no analyzer is online; packets wait in the queue",
        "an analyzer is online again",
    ]
    assert service.lines[0][1]["queued"] == 5


def test_storage_is_an_event(service):
    """Also while there are no requests that it could reject."""
    service.block.worker(2)[WorkerWord.STORAGE_FAULT] = 28
    service.go_on(5)
    service.reject("storage", 3)
    service.block.worker(2)[WorkerWord.STORAGE_FAULT] = 0
    service.go_on(5)
    assert service.said() == ["storage fails; packets are rejected", "storage works again"]
    assert service.lines[0][1]["error"] == "No space left on device"
    assert service.counted() == {"storage": 3}


def test_flapping_is_said_once_a_minute(service):
    def flap():
        service.block.worker(2)[WorkerWord.STORAGE_FAULT] = 28 if int(service.now) % 8 < 4 else 0

    service.go_on(600, flap)
    assert len(service.lines) <= 2 * 11


def test_the_last_look_tells_what_is_left(service):
    for number, reason in enumerate((*REJECTIONS, *DEAD_LETTERS), 1):
        service.reject(reason, number)
    service.look(last=True)
    assert service.said()[-1] == "and before the end, by reason"
    assert len(service.lines) <= 6
    assert service.counted() == {reason: number for number, reason in enumerate((*REJECTIONS, *DEAD_LETTERS), 1)}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([*REJECTIONS, *DEAD_LETTERS, "fault", "offline", "pause"]),
        st.integers(0, 2),
        st.integers(1, 90),
    ),
    max_size=60,
)


@settings(max_examples=settings().max_examples // 2)
@given(EVENTS)
def test_ten_lines_a_minute_whatever_comes(happenings):
    service, happened = Service(), Counter()
    for what, worker, number in happenings:
        if what == "pause":
            service.go_on(number)
        elif what == "fault":
            service.block.worker(worker)[WorkerWord.STORAGE_FAULT] = 28 * (number % 2)
        elif what == "offline":
            for slot in ANALYZERS:
                service.block.analyzers.set(slot, AnalyzerWord.STATE, number % 2)
        else:
            service.reject(what, number, worker)
            happened[what] += number
        service.go_on(number % 4)
    service.look(last=True)
    times = [when for when, _ in service.lines[:-1]]  # the last may be one more
    for at, first in enumerate(times):
        assert sum(when < first + 60 for when in times[at:]) <= LINES
    assert service.counted() == happened


def test_all_processes_share_the_limit():
    block = SharedBlock.create(2, 4)
    others = [SharedBlock.attach(block.fd).line_limit() for _ in range(4)]
    assert sum(allow() for _ in range(10) for allow in others) == LINES // 2
    assert not block.line_limit()()
    os.close(block.fd)


# ---- examples


def test_an_example_is_shown(service):
    examples = Examples(service.block.examples(1))
    examples.note("invalid", client="192.0.2.7", pointer="/messages/0/message")
    service.reject("invalid", 3)
    service.now = event_log.time.monotonic()
    service.go_on(2)
    ((_, line),) = service.lines
    assert (line["client"], line["pointer"], line["requests"]) == ("192.0.2.7", "/messages/0/message", 3)


def test_the_latest_example_counts(service):
    for index in range(3):
        Examples(service.block.examples(index)).note("refused", analyzer=f"A{index}", status=422)
    assert latest_example(service.block, "refused", 0) == {"analyzer": "A2", "status": 422}
    assert latest_example(service.block, "refused", 1 << 62) == {}
    assert latest_example(service.block, "exhausted", 0) == {}


def test_examples_are_noted_once_a_second(service):
    examples = Examples(service.block.examples(0))
    for number in range(100):
        examples.note("invalid", client=f"c{number}")
        examples.note("malformed", client=f"m{number}", pointer="")
    assert latest_example(service.block, "invalid", 0) == {"client": "c0"}
    assert latest_example(service.block, "malformed", 0) == {"client": "m0"}


def test_an_example_too_long_is_left_out(service):
    Examples(service.block.examples(0)).note("invalid", client="x" * 300)
    assert latest_example(service.block, "invalid", 0) == {}


def test_half_an_example_is_left_out(service):
    Examples(service.block.examples(0)).note("invalid", client="192.0.2.7")
    service.block.examples(0)[KINDS.index("invalid") * PLACE + 15] = 0
    assert latest_example(service.block, "invalid", 0) == {}


def test_there_is_room_for_all_kinds():
    assert len(KINDS) * PLACE <= 8 * EXAMPLE_WORDS
    assert set(KINDS) | {"max_bytes", "max_age", "no_analyzer"} == set(KINDS_OF_LINES)
    assert CONNECTIONS in KINDS
