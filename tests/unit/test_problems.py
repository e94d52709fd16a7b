"""What is wrong is in one list: /health, ``top``, the service manager and the log show the same of every trouble."""

from __future__ import annotations

import io
import os
import re
import time
from datetime import UTC, datetime

import msgspec
import pytest
from rich.console import Console
from structlog.testing import capture_logs
from troubles import OPERATIONS, STOPPING, TROUBLES, WHOLE, World, draining, every_worker, nearly_full, offline, table

from fastdist.client.top_view import Frame, Responses, render
from fastdist.http import models, stats
from fastdist.shm import problems
from fastdist.shm.block import REPORT_WORDS, AnalyzerWord, SharedBlock, WorkerState, WorkerWord
from fastdist.shm.problems import KINDS, LEVELS, Problem
from fastdist.shm.supervisor_report import MAX_OWN, MAX_SINCE, Configuration, Own, Report, decode, encode
from fastdist.supervisor import problems as following
from fastdist.supervisor.problems import CALM, COUNTED, LATELY, MAX_STATUS, Follower, Growth, status_line


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def details(health):
    return [problem["detail"] for problem in health["problems"]]


def codes(health):
    return [problem["code"] for problem in health["problems"]]


def shown_by_top(world):
    """Return what stands at the top of ``fastdist top``, without levels and ages."""
    snapshot = world.snapshot()
    documents = [
        msgspec.json.decode(msgspec.json.encode(view(snapshot)), type=kind)
        for view, kind in ((stats.health, models.Health), (stats.stats, models.Stats), (stats.queue, models.Queue))
    ]
    answers = Responses(*documents, stats.analyzers(snapshot).analyzers)
    out = io.StringIO()
    frame = Frame("http://h:3000", datetime.now(UTC), answers, datetime.now(UTC))
    Console(file=out, width=500, color_system=None).print(render(frame, 500))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    lines = [line for line in lines if line.startswith(tuple(level.upper() + ":" for level in LEVELS))]
    return [re.sub(r" \(\d+ (s|min|h|d)\)$", "", line).partition(": ")[2] for line in lines]


# ---- every trouble, in every view


@pytest.mark.parametrize("code", TROUBLES)
def test_all_views_show_the_same_list(world, code):
    assert details(world.look()) == []
    with capture_logs() as lines:
        TROUBLES[code](world)
        health = world.look()
    assert code in codes(health)
    assert shown_by_top(world) == details(health)
    assert world.manager.line.split("; ")[1:] == "; ".join(details(health)).split("; ")
    logged = [line for line in lines if "problem" in line]
    told = [problem for problem in health["problems"] if problem["code"] not in COUNTED]  # the others with counts
    told = [problem for problem in health["problems"] if problem["code"] not in COUNTED]  # others by the event log
    assert [(line["problem"], line["subject"], line["detail"]) for line in logged] == [
        (problem["code"], problem["subject"], problem["detail"]) for problem in told
    ]
    levels = {"error": "error", "warning": "warning", "info": "notice"}
    assert [levels[line["log_level"]] for line in logged] == [problem["level"] for problem in told]
    assert world.look()["problems"] == health["problems"], "since when it lasts stays, too"


@pytest.mark.parametrize("code", TROUBLES)
def test_ready_agrees_with_the_list(world, code):
    TROUBLES[code](world)
    health, obstacle = world.look(), world.snapshot().obstacle
    stopping = [problem for problem in health["problems"] if problem["code"] in STOPPING]
    assert [problem["detail"] for problem in stopping] == ([obstacle] if obstacle else [])
    assert (health["storage"] == "failing") == ("storage_failing" in codes(health))


@pytest.mark.parametrize("code", TROUBLES)
def test_status_is_of_the_list(world, code):
    TROUBLES[code](world)
    health = world.look()
    bad = any(problem["level"] != "notice" for problem in health["problems"])
    expected = "unavailable" if code == "no_analyzer" else "degraded" if bad else "ok"
    assert health["status"] == expected


def test_every_kind_is_documented_and_tested():
    assert table() == {code: kind.level for code, kind in KINDS.items()}
    assert list(TROUBLES) == list(KINDS), "in the order they are shown in"


def test_links_of_the_table_lead_somewhere():
    text = OPERATIONS.read_text()
    section = text.partition("\n## Problems\n")[2].partition("\n## ")[0]
    headings = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#([\w-]+)\)", section)) <= headings


# ---- the list


def test_the_worst_comes_first(world):
    for code, happens in TROUBLES.items():
        if code != "settings_not_applied":  # which takes a reload that succeeds
            happens(world)
    health = world.look()
    levels = [LEVELS.index(problem["level"]) for problem in health["problems"]]
    assert levels == sorted(levels)
    assert len(levels) > len(KINDS) / 2


def test_accepted_is_said_only_if_it_is_so(world):
    offline(0, 1)(world)
    (first, *_) = details(world.look())
    assert first == "no analyzer is online: packets are accepted, and wait until one comes back"
    every_worker(WorkerWord.LACKING, 5)(world)
    assert details(world.look())[:2] == ["the queue is full", "no analyzer is online: nothing is delivered"]


@pytest.mark.parametrize(
    ("word", "value", "detail"),
    [
        (WorkerWord.STORAGE_FAULT, 5, "packets cannot be stored: Input/output error (worker 1)"),
        (WorkerWord.LACKING, 5, "the queue is full (worker 1)"),
    ],
)
def test_the_workers_concerned_are_named(world, word, value, detail):
    world.block.worker(1)[word] = value
    assert details(world.look()) == [detail]
    assert detail.startswith(world.snapshot().obstacle)


def test_failing_dead_letters_stop_no_packet(world):
    TROUBLES["dead_letters_failing"](world)
    health = world.look()
    assert (health["storage"], world.snapshot().obstacle) == ("ok", "")
    assert details(health) == ["dead letters cannot be written: No space left on device; the packets stay queued"]


@pytest.mark.parametrize("part", [0.79, 0.8])
def test_nearly_full_is_from_four_fifths(world, part):
    world.block.rows[0].set("queue_bytes", int(part * WHOLE) + 1)
    found = details(world.look())
    assert found == ([] if part < 0.8 else ["the queue is nearly full: over 80% of the part of worker 0"])
    world.block.rows[1].set("queue_bytes", WHOLE)
    assert details(world.look())[-1].endswith("of it" if part >= 0.8 else "of the part of worker 1")


def test_offline_analyzer_has_its_own_time(world):
    offline(1)(world)
    since = 1_700_000_000_123_000_000
    world.block.analyzers.set(1, AnalyzerWord.SINCE_NS, since)
    (problem,) = world.look()["problems"]
    assert problem["since"] == "2023-11-14T22:13:20.123Z"
    assert problem["detail"] == "A2 is offline: health check: HTTP 503"


def test_problem_lasts_since_its_log_line(world):
    """An analyzer on probation that fails again has another time of its own; it has been offline all along."""
    offline(1)(world)
    (before,) = world.look()["problems"]
    world.block.analyzers.set(1, AnalyzerWord.SINCE_NS, time.time_ns() + 10**12)
    (after,) = world.look()["problems"]
    assert after["since"] == before["since"]


def test_draining_analyzer_has_one_problem(world):
    offline(1)(world)
    world.block.analyzers.set(1, AnalyzerWord.DRAINING, 1)
    assert codes(world.look()) == ["analyzer_draining"]


def test_refusals_end_with_a_packet_taken(world):
    TROUBLES["analyzer_refusing"](world)
    assert codes(world.look()) == ["analyzer_refusing"]
    world.block.analyzers.set(1, AnalyzerWord.REFUSALS, 0)
    assert codes(world.look()) == []


@pytest.mark.parametrize("state", WorkerState)
def test_worker_is_missing_unless_it_serves(world, state):
    world.block.worker(0)[WorkerWord.STATE] = state
    expected = [] if state in {WorkerState.RUNNING, WorkerState.DRAINING} else [f"worker 0 is {state.name.lower()}"]
    assert details(world.look()) == expected


def test_workers_start_without_a_log_line(world):
    world.supervisor.processes.all_ready.clear()
    world.block.worker(0)[WorkerWord.STATE] = WorkerState.STARTING
    with capture_logs() as lines:
        assert codes(world.look()) == ["worker_missing"]
    assert lines == []
    world.block.head[4] -= 11 * 10**9  # STARTED_NS: it takes long
    with capture_logs() as lines:
        world.look()
    assert [line["problem"] for line in lines] == ["worker_missing"]


def test_workers_that_end_at_a_stop_are_fine(world):
    draining(world)
    world.supervisor.processes.stopping = True
    world.block.worker(0)[WorkerWord.STATE] = WorkerState.STOPPED
    with capture_logs() as lines:
        assert codes(world.look()) == ["worker_missing", "service_draining"]
    assert lines == []
    assert world.manager.line == "", "it shows how long draining may take"


def test_problem_not_reported_yet_begins_now(world):
    """A worker may see it before the supervisor has."""
    world.look()
    nearly_full(world)
    (problem,) = world.health()["problems"]
    age = datetime.now(UTC) - datetime.fromisoformat(problem["since"])
    assert abs(age.total_seconds()) < 60


def test_unknown_code_is_passed_over(world):
    report = Report(own=[Own("of_another_version", "x", "y")])
    assert problems.problems(world.snapshot(), report) == []


# ---- the log


def some(code="queue_full", subject="queue"):
    return Problem(code, subject, "it is so", 1_000_000_000)


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 61.0  # it was set


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(following, "time", clock)
    return clock


@pytest.mark.parametrize("code", sorted(KINDS.keys() - COUNTED))
def test_log_says_begin_and_end_once(clock, code):
    it, first = Follower(), clock.now
    with capture_logs() as lines:
        for _ in range(3):
            it.follow([some(code)])
            clock.now += 1
        clock.now += KINDS[code].settles
        ended = clock.now
        for _ in range(3):
            it.follow([])
            clock.now += KINDS[code].settles + 1
    begin, end = lines
    assert (begin["event"], begin["problem"], begin["subject"]) == (KINDS[code].title, code, "queue")
    assert (end["event"], end["problem"]) == (f"resolved: {KINDS[code].title}", code)
    assert (end["lasted_seconds"], end["log_level"]) == (ended - first, "info")
    assert it.since == {}


@pytest.mark.parametrize("code", sorted(COUNTED))
def test_what_is_counted_is_logged_elsewhere(clock, code):
    it = Follower()
    with capture_logs() as lines:
        it.follow([some(code)])
        assert it.since
        clock.now += KINDS[code].settles + 1
        it.follow([])
    assert (lines, it.since) == ([], {})


def test_flapping_makes_two_lines(clock):
    it, kind = Follower(), KINDS["queue_nearly_full"]
    with capture_logs() as lines:
        for turn in range(600):
            it.follow([some("queue_nearly_full")] if turn % 4 == 0 else [])
            clock.now += kind.settles / 5
        assert len(lines) == 1
        for _ in range(6):
            it.follow([])
            clock.now += kind.settles / 5
    assert [line["event"] for line in lines] == ["queue nearly full", "resolved: queue nearly full"]


def test_often_offline_is_told_a_few_times(clock):
    it = Follower()
    with capture_logs() as lines:
        for _ in range(40):
            it.follow([some("analyzer_offline", "A1"), some("analyzer_offline", "A2")])
            clock.now += 1
            it.follow([some("analyzer_offline", "A2")])
            clock.now += 1
        assert [line["event"] for line in lines if line["subject"] == "A1"] == [
            *["analyzer offline", "resolved: analyzer offline"] * 2,
            "analyzer offline",
        ]
        clock.now += CALM
        it.follow([])
        assert it.since == {}
        clock.now += 60
        lines.clear()
        it.follow([some("analyzer_offline", "A1")])
        clock.now += 1
        it.follow([])
    assert [line["event"] for line in lines] == ["analyzer offline", "resolved: analyzer offline"]


def test_each_subject_has_lines_of_its_own(clock):
    it = Follower()
    with capture_logs() as lines:
        it.follow([some("analyzer_offline", "A1"), some("analyzer_offline", "A2")])
        clock.now += 1
        it.follow([some("analyzer_offline", "A2")])
    assert [(line["event"], line["subject"]) for line in lines] == [
        ("analyzer offline", "A1"),
        ("analyzer offline", "A2"),
        ("resolved: analyzer offline", "A1"),
    ]


def test_counts_that_grew_lately(clock):
    it = Growth()
    assert it.lately({"refused": 0, "exhausted": 3}) == ["exhausted"]
    clock.now += LATELY - 1
    assert it.lately({"refused": 1, "exhausted": 3}) == ["exhausted", "refused"]
    clock.now += 2
    assert it.lately({"refused": 1, "exhausted": 3}) == ["refused"]
    clock.now += LATELY
    assert it.lately({"refused": 1, "exhausted": 3}) == []


def test_status_fits_into_a_message(world):
    found = [some("analyzer_offline", f"A{number}")._replace(detail="é" * 90) for number in range(1000)]
    line = status_line(world.snapshot(), found)
    assert len(line.encode()) < 4000
    shown = line.count("é" * 90)
    assert shown > 10
    assert line.endswith(f"; and {1000 - shown} more problems")
    assert len(line) < MAX_STATUS + 100


# ---- the report


def test_a_report_is_read_as_it_was_written(world):
    configuration = Configuration(file="f", needs_restart=["a"])
    report = Report(configuration, [Own("lock_lost", "é", "x")], {"lock_lost é": 5})
    world.block.set_report(encode(report))
    assert decode(world.block.report()) == report
    assert decode(SharedBlock.create(1, 1).report()) == Report()


def test_torn_report_is_not_believed(world):
    world.block.set_report(encode(Report(since={"a": 1})))
    world.block._report._part[20] ^= 1
    assert world.block.report() == b""


def test_longest_report_fits(world):
    own = [Own("queue_file_set_aside", "x" * 200, "y" * 300)] * 1000
    report = encode(Report(own=own, since={f"analyzer_refusing {'A' * 60}{number}": 2**62 for number in range(3000)}))
    world.block.set_report(report)
    read = decode(world.block.report())
    assert (len(read.own), len(read.since)) == (MAX_OWN, MAX_SINCE)
    world.block.set_report(b"x" * (8 * REPORT_WORDS))
    assert world.block.report() == report, "one that is too long is dropped"
    assert os.fstat(world.block.fd).st_size == SharedBlock.size(2, 64)


def test_failing_list_stops_nothing_else(world, monkeypatch):
    def fails(_folder):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(following, "set_aside", fails)
    with capture_logs() as lines:
        world.supervisor.problems.look()
        world.supervisor.problems.look()
    assert [line["step"] for line in lines] == ["analyzers"], "logged once"
    assert codes(world.health()) == ["upkeep_failing"]


def test_changed_analyzer_is_listed_at_once(world, monkeypatch):
    listed = []
    it = world.supervisor.problems
    it.look()
    monkeypatch.setattr(it, "_list", lambda: listed.append(1))
    it.look_if_changed()
    assert listed == [], "nothing has changed"
    world.block.analyzers.go_offline(1)
    it._next = time.monotonic() + 3600
    it.look_if_changed()
    assert listed == [], "the last time took long"
    it._next = 0.0
    it.look_if_changed()
    assert listed == [1]
