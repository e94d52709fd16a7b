"""The dashboard's scripts by themselves: how figures are written, what lines are drawn, what the banner says when."""

from __future__ import annotations

import re

import pytest
from selenium_page import watched
from troubles import TROUBLES, World

GOOD = {
    "health": {
        "status": "ok",
        "version": "1",
        "workers": {"running": 2, "configured": 2},
        "analyzers": {"online": 2, "total": 2},
        "storage": "ok",
        "failing": [],
        "problems": [],
    },
    "stats": {
        "uptimeSeconds": 100.0,
        "packets": {"accepted": 0, "delivered": 0, "queued": 0, "deadLettered": 0, "corrupt": 0},
        "rejected": {"queueFull": 0, "tooLarge": 0},
        "protocols": {"json": {"requests": 0, "records": 0, "refused": 0}},
        "analyzers": [{"id": "A1", "delivered": 0}, {"id": "A2", "delivered": 0}],
        "workers": [{"id": 0, "state": "running"}, {"id": 1, "state": "running"}],
    },
    "queue": {"oldestAgeSeconds": 0, "workers": [{"bytes": 0, "capacityBytes": 100}]},
    "analyzers": [{"id": "A1", "state": "online"}, {"id": "A2", "state": "online"}],
}
CONDITIONS = "return m.conditions(a[0]).map(({level, title, text}) => [level, `${title} ${text}`.trim()])"
SINCE = "2020-01-02T03:04:05Z"


@pytest.fixture(scope="module")
def scripts(driver, lasting_fastdist):
    """Return a dashboard whose scripts can be called, one for all: none of them changes it."""
    with watched(driver) as page:
        yield page.open(lasting_fastdist.port)


def changed(document=None, **members):
    """Return GOOD with these members ("stats__packets__corrupt") set to other values."""
    document = _copy(GOOD if document is None else document)
    for path, value in members.items():
        *outer, last = path.split("__")
        place = document
        for key in outer:
            place = place[key]
        place[last] = value
    return document


def _copy(value):
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def conditions(scripts, document):
    return [tuple(each) for each in scripts.run_module("conditions", CONDITIONS, document)]


def problem(detail, level="warning", code="analyzer_offline"):
    return {"code": code, "level": level, "since": SINCE, "subject": "x", "detail": detail}


# ---- figures


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("count", {0: "0", 999: "999", 1234567: "1,234,567"}),
        ("rate", {0: "0", 0.04: "0.04", 0.999: "1.0", 12.34: "12.3", 99.96: "100", 12345.6: "12,346"}),
        (
            "bytes",
            {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1048575: "1.0 MiB", 268435456: "256 MiB", 2**50: "1,024 TiB"},
        ),
        (
            "milliseconds",
            {
                0.0004: "0 µs",
                0.012: "12 µs",
                0.9996: "1.00 ms",
                9.614: "9.61 ms",
                47.25: "47.3 ms",
                127: "127 ms",
                65432: "1 min 5 s",
            },
        ),
        (
            "duration",
            {
                0: "0 s",
                0.0123: "12 ms",
                0.9996: "1.0 s",
                9.94: "9.9 s",
                59.4: "59 s",
                59.6: "1 min",
                200: "3 min 20 s",
                3600: "1 h",
                90061: "1 d 1 h",
            },
        ),
        ("percent", {0: "0 %", 0.0004: "0.04 %", 0.4: "40.0 %", 1: "100.0 %"}),
        ("points", {0: "±0.0", 0.0004: "±0.0", 0.012: "+1.2", -0.0666: "−6.7"}),
        ("weight", {0: "0", 0.1: "0.1", 0.30000000000000004: "0.3", 1e100: "1e+100"}),
        ("brief", {0: "0", 0.25: "0.25", 0.5: "0.5", 2.5: "2.5", 2500: "2.5K", 1000000: "1M"}),
        ("words", {"queueFull": "queue full", "malformed": "malformed"}),
    ],
)
def test_figures_are_written_for_people(scripts, name, cases):
    shown = scripts.run_module("format", f"return a[0].map(m.{name})", list(cases))
    assert dict(zip(cases, shown, strict=True)) == cases


@pytest.mark.parametrize(
    "name", ["count", "rate", "bytes", "milliseconds", "duration", "percent", "weight", "clock", "text"]
)
def test_what_is_not_known_is_a_dash(scripts, name):
    assert scripts.run_module("format", f"return [m.{name}(null), m.{name}(undefined)]") == ["–", "–"]


def test_a_time_of_another_day_has_its_date(scripts):
    today, before = scripts.run_module("format", "return [m.clock(new Date()), m.clock(new Date(2020, 0, 2, 3, 4, 5))]")
    assert len(today) == len("03:04:05")
    assert before == "2020-01-02 03:04:05"


# ---- lines


@pytest.mark.parametrize("most", [0, 0.4, 1, 3, 4, 7, 99, 100, 101, 12345, 10**9])
def test_an_axis_has_few_round_figures(scripts, most):
    step = scripts.run_module("chart", "return m.gridStep(a[0])", most)
    lines = -(-max(most, 1) // step)
    assert 2 <= lines <= 4
    assert float(f"{step:.0e}"[0] + "e0") in (1, 2, 3, 5), "1, 2, 2.5 or 5"


def sample(at, accepted=0, delivered=0, queued=0, each=(0, 0)):
    rows = [{"id": name, "delivered": number} for name, number in zip(("A1", "A2"), each, strict=True)]
    packets = {"accepted": accepted, "delivered": delivered, "queued": queued}
    document = changed(stats__uptimeSeconds=at, stats__analyzers=rows)
    document["stats"]["packets"] |= packets
    return document


def history(scripts, body, *documents):
    return scripts.run_module(
        "history", f"const h = new m.History(); for (const each of a) h.add(each); {body}", *documents
    )


def test_rates_use_the_clock_of_the_service(scripts):
    samples = (sample(10), sample(11, 100, 80), sample(13, 300, 90, queued=7), sample(13, 300, 90))
    points = history(scripts, "return [h.throughput(), h.depth().at(-1)]", *samples)
    assert points[0] == [{"ago": 2, "values": [100, 80]}, {"ago": 0, "values": [100, 5]}]
    assert points[1] == {"ago": 0, "values": [7, 0]}


def test_no_line_is_drawn_over_a_gap(scripts):
    samples = (sample(10), sample(11, 5), sample(60, 500), sample(61, 505))
    points, depth = history(scripts, "return [h.throughput(), h.depth()]", *samples)
    assert [point["values"] for point in points] == [[5, 0], None, [5, 0]]
    assert [point["values"] is None for point in depth] == [False, False, True, False, False]


def test_restarted_service_resets_figures(scripts):
    assert history(scripts, "return h.throughput()", sample(500, 1000, 1000), sample(2, 3), sample(3, 4)) == [
        {"ago": 0, "values": [1, 0]}
    ]


def test_five_minutes_are_kept(scripts):
    kept = history(scripts, "return h.samples.map((each) => each.at)", *(sample(at) for at in range(0, 1000, 4)))
    assert kept == list(range(696, 1000, 4))


def test_analyzer_rate_is_of_last_seconds(scripts):
    samples = [sample(at, each=(0 if at < 20 else 10 * (at - 20), 3)) for at in range(41)]
    body = "return [h.rateOf('A1'), h.rateOf('A2'), h.rateOf('new')]"
    assert history(scripts, body, *samples) == [10, 0, None]
    assert history(scripts, body, sample(1)) == [None, None, None]


def test_records_rate_is_of_last_seconds(scripts):
    counts = {"requests": 1, "refused": 0}
    samples = [
        changed(stats__uptimeSeconds=at, stats__protocols={"otlp": counts | {"records": 30 * max(0, at - 20)}})
        for at in range(41)
    ]
    assert history(scripts, "return h.recordsOf('otlp')", *samples) == 30
    assert history(scripts, "return h.recordsOf('otlp')", samples[0]) is None


# ---- the banner


def test_all_well_is_the_only_condition(scripts):
    assert conditions(scripts, GOOD) == [
        ("ok", "All well. 2 of 2 analyzers online, 2 of 2 workers running, packets are taken.")
    ]


@pytest.mark.parametrize("code", TROUBLES)
def test_banner_is_the_services_list(scripts, tmp_path, code):
    """Of every trouble in docs/operations.md, as the service lists it."""
    world = World(tmp_path)
    try:
        TROUBLES[code](world)
        health = world.look()
    finally:
        world.close()
    found = conditions(scripts, changed(health=health))
    if found[0][1].startswith("All well."):
        assert health["status"] == "ok"
        found = found[1:]
    levels = {"error": "error", "warning": "warning", "info": "notice"}
    assert [levels[level] for level, _ in found] == [problem["level"] for problem in health["problems"]]
    for (_, text), listed in zip(found, health["problems"], strict=True):
        what, _, more = listed["detail"].partition(": ")
        assert text.lower().startswith(f"{what}. {more}".lower().rstrip()), text
        assert re.search(r"\. Since [\d:-]+( [\d:]+)?\.$", text), text


@pytest.mark.parametrize(
    ("problems", "shown"),
    [
        ([problem("A1 is offline: HTTP 503")], [("warning", "A1 is offline. HTTP 503. Since 2020-01-02 03:04:05.")]),
        ([problem("the queue is full", "error")], [("error", "The queue is full. Since 2020-01-02 03:04:05.")]),
        (
            [problem("the last reload failed: analyzers[1].weight: must be >= 0")],
            [("warning", "The last reload failed. analyzers[1].weight: must be >= 0. Since 2020-01-02 03:04:05.")],
        ),
        (
            [problem("settings wait for a restart: queue.capacity")],
            [("warning", "Settings wait for a restart. queue.capacity. Since 2020-01-02 03:04:05.")],
        ),
        ([problem("x: y!", "odd")], [("warning", "X. Y! Since 2020-01-02 03:04:05.")]),
        (
            [*(problem(f"A{n} is offline") for n in range(6)), problem("sync fails", code="upkeep_failing")],
            [
                *(("warning", f"A{n} is offline. Since 2020-01-02 03:04:05.") for n in range(2)),
                ("warning", "A2 is offline. Since 2020-01-02 03:04:05. And 3 more problems of this kind."),
                ("warning", "Sync fails. Since 2020-01-02 03:04:05."),
            ],
        ),
    ],
)
def test_problems_are_written_for_people(scripts, problems, shown):
    assert conditions(scripts, changed(health__problems=problems, health__status="degraded")) == shown


def test_notices_stand_below_all_well(scripts):
    found = conditions(scripts, changed(health__problems=[problem("A1 is draining: it gets no new packets", "notice")]))
    assert [level for level, _ in found] == ["ok", "info"]


def test_four_of_a_kind_are_all_named(scripts):
    found = conditions(scripts, changed(health__problems=[problem(f"A{n} is offline") for n in range(4)]))
    assert [text.split(" ")[0] for _, text in found] == ["A0", "A1", "A2", "A3"]


def test_without_a_list_the_status_shows(scripts):
    assert conditions(scripts, changed(health__status="degraded")) == [("warning", "The service is degraded.")]
