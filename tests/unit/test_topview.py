"""What ``fastdist top`` shows: the figures it was given, what is wrong on top, and no more than fits."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastdist.client.top_view import (
    BLOCKS,
    COUNTERS,
    GAP,
    MARK,
    Frame,
    History,
    Responses,
    render,
    share_bar,
    sparkline,
)
from fastdist.http.models import Analyzer, Health, Packets, Queue, Stats

NOON = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
NONE_YET = dict.fromkeys(("p50", "p90", "p99", "p999", "max"))
SOME = {"p50": 0.1234, "p90": 1.5, "p99": 12.34, "p999": 123.4, "max": 12345.6}


def analyzer(name, target, actual, **members):
    plain = {
        "state": "online",
        "effectiveShare": target,
        "delivered": 1234567,
        "failed": 2,
        "retried": 3,
        "inFlight": 4,
    }
    shares = {"id": name, "targetShare": target, "actualShare": actual, "lastError": None, "latencyMs": SOME}
    return plain | shares | members


def worker(number, **members):
    plain = {"pid": 4000 + number, "state": "running", "restarts": 0, "cpuPercent": 12.3, "rssBytes": 50 << 20}
    return {"id": number, "accepted": 10 + number, "delivered": 20 + number} | plain | members


def answers(*, analyzers=None, workers=None, **changes):
    """Return what a server says; ``changes`` are those to its documents."""
    analyzers = analyzers or [analyzer("A1", 0.25, 0.3), analyzer("A2", 0.75, 0.7)]
    workers = workers or [worker(0), worker(1)]
    health = {
        "status": "ok",
        "version": "1.2.3",
        "uptimeSeconds": 7205.0,
        "workers": {"running": len(workers), "configured": len(workers)},
        "analyzers": {"online": 2, "total": 2},
        "storage": "ok",
        "failing": [],
        "problems": [],
    }
    stats = {
        "packets": msgspec.to_builtins(
            Packets(**{name: 1000 * number for number, name in enumerate(COUNTERS, 1)} | {"rejected": 0, "corrupt": 0})
        ),
        "rejected": {"malformed": 0, "queueFull": 0},
        "uptimeSeconds": 7205.0,
        "protocols": {name: {"requests": 0, "records": 0, "refused": 0} for name in ("json", "otlp")},
        "rates": {"acceptedPerSecond": 1234.56, "deliveredPerSecond": 99.94},
        "latencyMs": {"ingest": SOME, "queueWait": NONE_YET, "delivery": SOME},
        "workers": workers,
    }
    queue = {
        "packets": 0,
        "bytes": 1 << 20,
        "capacityBytes": 1 << 28,
        "inFlight": 17,
        "oldestAgeSeconds": 0.0,
        "durability": "disk",
        "estimatedDrainSeconds": 0.0,
    }
    for document in (health, stats, queue):
        document.update((key, value) for key, value in changes.items() if key in document)
    return Responses(
        msgspec.convert(health, Health),
        msgspec.convert(stats, Stats),
        msgspec.convert(queue | changes.get("queue", {}), Queue),
        [msgspec.convert(row, Analyzer) for row in analyzers],
    )


def shown(frame, width=160, lines=None, history=None):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, color_system=None).print(render(frame, width, lines, history))
    return out.getvalue()


def frame(**changes):
    return Frame("http://h:3000", NOON, answers(**changes), NOON)


def line_with(text, start):
    return next(line.strip() for line in text.splitlines() if line.strip().startswith(start))


def squeezed(line):
    return " ".join(line.split())


def test_all_figures_are_there():
    text = shown(frame())
    first = text.splitlines()[0]
    assert squeezed(first) == "fastdist top http://h:3000 ok version 1.2.3 up 2 h workers 2/2 analyzers 2/2 12:00:00Z"
    for number, (key, name) in enumerate(COUNTERS.items(), 1):
        assert f"{name} {0 if key in ('rejected', 'corrupt') else 1000 * number:,}" in text
    assert "accepted 1,234.6/s" in text
    assert "delivered 99.9/s" in text
    assert "waiting 0  in flight 17  oldest 0 s" in text
    assert "1.0 MiB of 256.0 MiB  disk" in text
    row = squeezed(line_with(text, "A1"))
    assert row.startswith("A1 online ")
    assert row.endswith(" 30.0 % 25.0 % 25.0 % 1,234,567 2 3 4 0.123 12.3 -")
    assert squeezed(line_with(text, "ingest")) == "ingest 0.123 1.5 12.3 123 12,346"
    assert squeezed(line_with(text, "queue wait")) == "queue wait - - - - -"
    assert squeezed(line_with(text, "1 ")) == "1 running 4001 0 12.3 % 50.0 MiB 11 21 -"


def test_healthy_frame_shows_no_problem():
    text = shown(frame())
    for word in ("DEGRADED", "UNAVAILABLE", "UNREACHABLE", "WARNING", "ERROR", "NOTICE"):
        assert word not in text


def problem(code="analyzer_offline", level="warning", detail="A1 is offline: connection refused", **members):
    since = "2026-01-02T11:50:00.000Z"
    return {"code": code, "level": level, "since": since, "subject": "A1", "detail": detail} | members


@pytest.mark.parametrize(
    ("changes", "banner"),
    [
        ({"problems": [problem()]}, "WARNING: A1 is offline: connection refused (10 min)"),
        ({"problems": [problem(level="error", detail="the queue is full")]}, "ERROR: the queue is full (10 min)"),
        ({"problems": [problem(level="notice", detail="A1 is draining")]}, "NOTICE: A1 is draining (10 min)"),
        ({"problems": [problem(since="soon")]}, "WARNING: A1 is offline: connection refused"),
        ({"problems": [problem(code="of_another_version", level="odd")]}, "ODD: A1 is offline"),
        ({"status": "degraded"}, "DEGRADED"),  # by a server that has no list
        ({"workers": [worker(0)] * 2}, None),
    ],
)
def test_what_is_wrong_stands_at_the_top(changes, banner):
    second = shown(frame(**changes)).splitlines()[1].strip()
    assert second.startswith(banner) if banner else second == ""


def test_many_problems_of_a_kind_are_counted():
    listed = [problem(detail=f"A{number} is offline") for number in range(9)]
    text = shown(frame(problems=[*listed, problem(code="upkeep_failing", detail="sync fails")]))
    assert [line.strip() for line in text.splitlines()[1:6]] == [
        "WARNING: A0 is offline (10 min)",
        "WARNING: A1 is offline (10 min)",
        "WARNING: A2 is offline (10 min)",
        "WARNING: 6 more like the last one",
        "WARNING: sync fails (10 min)",
    ]


def test_errors_have_their_age():
    rows = [analyzer("A1", 1, 1, lastError="HTTP 503", lastErrorAt="2026-01-02T11:59:15.000Z")]
    workers = [worker(0, lastError="ended by signal SIGKILL", lastErrorAt="2026-01-01T11:00:00.000Z")]
    text = shown(frame(analyzers=rows, workers=workers))
    assert line_with(text, "A1").endswith(" 45 s ago: HTTP 503")
    assert line_with(text, "0 ").endswith(" 1 d ago: ended by signal SIGKILL")


def test_overrides_are_shown_if_there_are():
    assert "override" not in shown(frame())
    rows = [
        analyzer("A1", 0.25, 0.3, override={"weight": 0.25}),
        analyzer("A2", 0.5, 0.4, override={"weight": 3, "state": "draining"}),
        analyzer("A3", 0.25, 0.3, override=None),
    ]
    for width in (80, 160):
        text = shown(frame(analyzers=rows), width)
        assert "override" in text
        assert "weight 0.25" in line_with(text, "A1")
        assert "weight 3, draining" in line_with(text, "A2")
        assert " - " in line_with(text, "A3") + " "


def test_the_last_error_of_a_worker_is_shown():
    text = shown(frame(workers=[worker(0, state="starting", lastError="killed by SIGKILL")]))
    assert line_with(text, "0 ").endswith(" killed by SIGKILL")


def test_last_figures_stay_without_server():
    gone = frame()._replace(trouble="Connection refused", at=NOON.replace(minute=5))
    text = shown(gone)
    assert "unreachable" in text.splitlines()[0]
    assert text.splitlines()[1].strip() == "UNREACHABLE: Connection refused; the figures are of 12:00:00Z"
    assert "1,234,567" in text


def test_there_may_be_no_figures_yet():
    assert "connecting" in shown(Frame("http://h", NOON))
    text = shown(Frame("http://h", NOON, trouble="Connection refused"))
    assert text.splitlines()[1].strip() == "UNREACHABLE: Connection refused"
    assert len(text.splitlines()) == 2


def test_rejections_are_shown_by_reason():
    text = shown(frame(rejected={"malformed": 0, "queueFull": 1234, "rateLimited": 5}))
    assert squeezed(line_with(text, "rejected")) == "rejected rate limited 5 queue full 1,234"


def of_agents(**records):
    """Return what came by protocol; three requests each, of which one of otlp was refused."""
    counts = {
        name: {"requests": 3, "records": number, "refused": int(name == "otlp")} for name, number in records.items()
    }
    return {name: counts.get(name, {"requests": 0, "records": 0, "refused": 0}) for name in ("json", "otlp", "loki")}


def test_agents_without_requests_are_hidden():
    assert "agents" not in shown(frame())
    text = shown(frame(protocols=of_agents(json=1234, otlp=0)))
    assert squeezed(line_with(text, "agents")) == "agents json 1,234 records otlp 0 records otlp refused 1"


def test_agents_rate_is_of_the_last_seconds():
    history = History()
    for second in range(30):
        history.add(answers(uptimeSeconds=7000.0 + second, protocols=of_agents(json=50 * max(0, second - 19), loki=7)))
    text = shown(frame(protocols=of_agents(json=500, loki=7)), history=history)
    assert squeezed(line_with(text, "agents")) == "agents json 500 records 50.0/s loki 7 records 0.0/s"
    history.add(answers(uptimeSeconds=1.0, protocols=of_agents(json=2)))  # restarted
    assert history.records_per_second("json") is None
    history.add(answers(uptimeSeconds=61.0, protocols=of_agents(json=122)))  # with a long interval
    assert history.records_per_second("json") == 2


def test_a_queue_that_does_not_drain_says_so():
    assert "nothing is delivered" in shown(frame(queue={"packets": 5, "estimatedDrainSeconds": None}))
    assert "drained in 2 min" in shown(frame(queue={"packets": 5, "estimatedDrainSeconds": 120.0}))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 300])
def test_view_fits_and_keeps_what_matters(width):
    text = shown(frame(analyzers=[analyzer("A1", 1, 1, lastError="x" * 500)]), width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("A1", "online", "100.0 %") if width >= 80 else ("A1",):
        assert word in text


@pytest.mark.parametrize("width", [46, 50, 60, 70, 72, 79, 80, 99])
def test_narrow_terminal_drops_whole_columns(width):
    rows = [analyzer("A1", 0.25, 0.25), analyzer("A2", 0.75, 0.75, state="draining", lastError="x" * 500)]
    table = shown(frame(analyzers=rows), width).split("rates")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "25.0 %" in table
    assert "draining" in table
    assert "…" not in table


@pytest.mark.parametrize("width", [100, 120, 160])
def test_wide_terminal_shows_the_last_error(width):
    text = shown(frame(analyzers=[analyzer("A" * 64, 1, 1, state="offline", lastError="connection refused")]), width)
    (row,) = [line for line in text.splitlines() if line.startswith(" AAA")]
    assert "connection" in row


@pytest.mark.parametrize("lines", [10, 30, 40, 60])
def test_workers_that_do_not_fit_are_counted(lines):
    rejected, protocols = {"malformed": 1}, of_agents(json=1)
    workers = [worker(number) for number in range(40)]
    text = shown(frame(workers=workers, rejected=rejected, protocols=protocols), 160, lines)
    rows = [line for line in text.splitlines() if " running " in line]
    if lines >= 30:
        assert len(text.splitlines()) <= lines
    assert len(rows) >= 1
    if len(rows) < 40:
        assert f"… and {40 - len(rows)} more" in text


def test_unknown_members_pass_missing_named():
    row = msgspec.convert(analyzer("A1", 1, 1, new=[1], state="resting"), Analyzer)
    assert row.state == "resting"
    with pytest.raises(msgspec.ValidationError, match="targetShare"):
        msgspec.convert({"id": "A1", "state": "online"}, Analyzer)


# ----------------------------------------------------------------------------------------------------------------- bars


@given(st.floats(0, 1), st.floats(0, 1), st.integers(4, 40))
def test_a_bar_is_as_long_as_the_share(actual, target, width):
    bar = share_bar(actual, target, 1.0, width).plain
    assert len(bar) == width
    assert bar.count(MARK) == (target > 0)
    filled = [cell for cell in bar if cell in BLOCKS[1:]]
    assert abs(len(filled) + bar.count(MARK) * (bar.find(MARK) < actual * width) - actual * width) <= 1
    assert bar.count(GAP) <= max(0, (target - actual) * width) + 1


def test_share_bar_shows_the_gap():
    assert share_bar(0.25, 0.75, 1.0, 8).plain == f"██{GAP * 4}{MARK} "
    assert share_bar(0.75, 0.25, 1.0, 8).plain == f"██{MARK}███  "
    assert share_bar(0.5, 0.5, 1.0, 8).plain == f"████{MARK}   "
    assert share_bar(0.53125, 0, 1.0, 8).plain == "████▎   "
    assert share_bar(0, 0, 0, 4).plain == "    "


def test_sparklines_scale_to_their_highest():
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0, 50, 100]) == "▁▅█"


def test_the_history_keeps_the_last_rates():
    history = History(3)
    for rate in range(5):
        history.add(answers(rates={"acceptedPerSecond": rate, "deliveredPerSecond": 0}))
    assert history.accepted == [2, 3, 4]
    assert f"accepted 1,234.6/s {sparkline([2, 3, 4])}" in shown(frame(), history=history)
