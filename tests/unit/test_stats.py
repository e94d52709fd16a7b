"""Snapshots and their JSON views: that the figures add up, mean what the API says, and have its names."""

from __future__ import annotations

import errno
import os

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fastdist.dead_letter_report import Count, Described, Report
from fastdist.http import stats
from fastdist.settings import Config, Distribution, Queue
from fastdist.shm.block import HUNG, AnalyzerState, AnalyzerWord, HeadWord, SharedBlock, Step, WorkerState, WorkerWord
from fastdist.shm.snapshot import DEAD_LETTERS, REJECTIONS, Snapshot

SECOND = 10**9
AT, WALL = 500 * SECOND, 1_700_000_000 * SECOND  # one moment, on the monotonic clock and on the wall clock
CONFIG = Config()
ANALYZERS = dict(zip((2, 0, 1, 5), CONFIG.analyzers, strict=True))  # slots are not in the configuration's order
A1, A2, A3, A4 = ANALYZERS
LEFT = 9  # the slot of an analyzer that has left the configuration


def new_block():
    block = SharedBlock.create(2, 64)
    os.close(block.fd)  # the mapping stays
    block.head[HeadWord.STARTED_NS] = AT - 90 * SECOND
    block.head[HeadWord.CLOCK_OFFSET_NS] = WALL - AT
    block.head[HeadWord.SUPERVISOR] = 4711
    for index in range(2):
        block.worker(index)[WorkerWord.STATE] = WorkerState.RUNNING
        block.rows[index].set("queue_capacity", 2**20)
    for slot, analyzer in ANALYZERS.items():
        block.analyzers.clear(slot)
        block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
        block.analyzers.set_weight(slot, analyzer.weight)
    return block


@pytest.fixture
def block():
    return new_block()


def snapshot_of(block, config=CONFIG):
    return Snapshot(block, config, ANALYZERS, "1.2.3", AT)


def shown(view, block, config=CONFIG):
    """Return what a view's JSON says."""
    return orjson.loads(msgspec.json.encode(view(snapshot_of(block, config))))


def analyzer(block, slot, config=CONFIG):
    views = {view["id"]: view for view in shown(stats.analyzers, block, config)["analyzers"]}
    return views[ANALYZERS[slot].id]


def packets(block):
    return shown(stats.stats, block)["packets"]


# ---- accounting

OUTCOMES = st.sampled_from(["queued", "in_flight", "delivered", *DEAD_LETTERS, *REJECTIONS])
EVENTS = st.lists(
    st.tuples(st.integers(0, 1), OUTCOMES, st.booleans(), st.sampled_from([A1, A2, A3, A4, LEFT])), max_size=60
)


def count(block, worker, outcome, slot, *, recovered):
    """Write what a worker would about one packet."""
    row = block.rows[worker]
    if outcome in REJECTIONS:
        row.add(outcome)
        return
    row.add("recovered" if recovered else "accepted")
    if outcome in {"queued", "in_flight"}:
        row.add("undone")
        row.add_to(slot, "packets_in_flight", int(outcome == "in_flight"))
    elif outcome == "delivered":
        row.add_to(slot, "delivered")
    else:
        row.add(outcome)


@given(EVENTS)
def test_packets_at_rest_are_counted_once(events):
    block = new_block()
    for worker, outcome, recovered, slot in events:
        count(block, worker, outcome, slot, recovered=recovered)
    outcomes = [outcome for _, outcome, _, _ in events]
    it = packets(block)
    assert it["accepted"] + it["recovered"] == it["delivered"] + it["queued"] + it["inFlight"] + it["deadLettered"]
    assert it["received"] == it["accepted"] + it["rejected"]
    assert it["rejected"] == sum(outcome in REJECTIONS for outcome in outcomes)
    assert it["deadLettered"] == sum(outcome in DEAD_LETTERS for outcome in outcomes)
    assert it["queued"] == shown(stats.queue, block)["packets"] == outcomes.count("queued")
    assert it["inFlight"] == shown(stats.queue, block)["inFlight"] == outcomes.count("in_flight")


def test_every_rejection_kind_has_its_name(block):
    for number, reason in enumerate(REJECTIONS, 1):
        block.rows[0].add(reason, number)
        block.rows[1].add(reason, 100)
    assert shown(stats.stats, block)["rejected"] == {
        "malformed": 101,
        "invalid": 102,
        "tooLarge": 103,
        "headTooLarge": 104,
        "unsupportedMediaType": 105,
        "unauthorized": 106,
        "rateLimited": 107,
        "queueFull": 108,
        "draining": 109,
        "storage": 110,
        "timeout": 111,
    }


def test_queued_is_never_negative(block):
    block.rows[0].add_to(A1, "packets_in_flight", 3)  # the gauge of what is undone is published a little later
    block.rows[1].set("undone", 2)
    assert packets(block)["queued"] == 2


def test_totals_count_analyzers_that_left(block):
    for slot in (A1, LEFT):
        block.rows[0].add_to(slot, "delivered", 5)
        block.rows[1].add_to(slot, "messages_delivered", 6)
        block.rows[1].add_to(slot, "bytes_delivered", 7)
        block.rows[1].observe_delivery(slot, 10**6)
    view = shown(stats.stats, block)
    assert view["packets"]["delivered"] == 10
    assert view["messages"]["delivered"] == 12
    assert view["bytes"]["delivered"] == 14
    assert snapshot_of(block).delivery().cumulative()[-1] == 2
    assert snapshot_of(block).delivery([A1]).cumulative()[-1] == 1


def test_nothing_read_is_written_to(block):
    before = [bytes(block.row(index)) for index in range(2)]
    for view in (stats.health, stats.stats, stats.queue, stats.analyzers):
        view(snapshot_of(block))
    assert before == [bytes(block.row(index)) for index in range(2)]


# ---- /stats


def test_stats_has_the_names_of_the_api(block):
    view = shown(stats.stats, block)
    assert set(view) == {
        "uptimeSeconds",
        "packets",
        "messages",
        "bytes",
        "rejected",
        "protocols",
        "deadLetters",
        "rates",
        "latencyMs",
        "analyzers",
        "workers",
        "supervisor",
        "configuration",
    }
    assert set(view["packets"]) == {
        "received",
        "accepted",
        "rejected",
        "delivered",
        "queued",
        "inFlight",
        "retried",
        "spilled",
        "deadLettered",
        "recovered",
        "corrupt",
        "lost",
    }
    assert view["uptimeSeconds"] == 90.0
    assert view["supervisor"] == {"pid": 4711}
    assert view["messages"] == view["bytes"] == {"accepted": 0, "delivered": 0}
    nothing = {"p50": None, "p90": None, "p99": None, "p999": None, "max": None}
    assert view["latencyMs"] == {"ingest": nothing, "queueWait": nothing, "delivery": nothing}
    assert [it["id"] for it in view["analyzers"]] == ["A1", "A2", "A3", "A4"]


def test_latencies_are_over_all_workers(block):
    for index in range(2):
        block.rows[index].observe_ingest((index + 1) * 10**6)
        block.rows[index].observe_delivery(A2, (index + 3) * 10**6)
    latencies = shown(stats.stats, block)["latencyMs"]
    assert latencies["ingest"]["max"] == 2.0
    assert 1.0 <= latencies["ingest"]["p50"] <= 1.1
    assert latencies["delivery"]["max"] == 4.0
    assert analyzer(block, A2)["latencyMs"] == latencies["delivery"]


def test_workers_show_their_own_figures(block):
    words = block.worker(1)
    words[WorkerWord.PID], words[WorkerWord.STATE], words[WorkerWord.RESTARTS] = 77, WorkerState.DRAINING, 3
    words[WorkerWord.CPU_PERMILLE], words[WorkerWord.RSS] = 425, 12345678
    block.rows[1].add("accepted", 11)
    block.rows[1].observe_loop_lag(7_000_000)
    block.rows[1].add_to(A1, "delivered", 4)
    block.rows[1].add_to(LEFT, "delivered", 5)
    block.worker(0)[WorkerWord.STATE] = WorkerState.STARTING
    first, second = shown(stats.stats, block)["workers"]
    assert second == {
        "id": 1,
        "pid": 77,
        "state": "draining",
        "restarts": 3,
        "cpuPercent": 42.5,
        "rssBytes": 12345678,
        "accepted": 11,
        "delivered": 9,
        "loopLagMs": {"p50": 7.0, "p90": 7.0, "p99": 7.0, "p999": 7.0, "max": 7.0},
        "lastError": None,
        "lastErrorAt": None,
    }
    assert (first["pid"], first["state"]) == (None, "starting")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (-9, "ended by signal SIGKILL"),
        (-35, "ended by signal 35"),  # one of those for real time, which has no name
        (3, "ended with exit status 3"),
        (0, "ended with exit status 0"),
        (HUNG, "it hung and was killed"),
    ],
)
def test_worker_shows_its_predecessors_exit(block, status, error):
    block.worker(1)[WorkerWord.END_STATUS], block.worker(1)[WorkerWord.END_NS] = status, WALL - SECOND
    first, second = shown(stats.stats, block)["workers"]
    assert (first["lastError"], first["lastErrorAt"]) == (None, None)
    assert (second["lastError"], second["lastErrorAt"]) == (error, "2023-11-14T22:13:19.000Z")


@pytest.mark.parametrize(
    ("samples", "accepted", "delivered", "rates"),
    [
        ([], 50, 40, (0.0, 0.0)),
        ([(8, 10, 0)], 50, 40, (5.0, 5.0)),
        ([(30, 0, 0), (10, 10, 0), (5, 30, 20)], 50, 40, (4.0, 4.0)),  # the oldest within ten seconds
        ([(30, 0, 0), (20, 10, 0)], 50, 40, (2.0, 2.0)),  # none is: the latest
        ([(0.001, 49, 39)], 50, 40, (1.0, 1.0)),  # too short a time to tell a rate from
        ([(5, 60, 70)], 50, 40, (0.0, 0.0)),
        ([(age, 0, 0) for age in range(30, 0, -1)], 50, 40, (5.0, 4.0)),
    ],
)
def test_rates_are_of_the_last_samples(block, samples, accepted, delivered, rates):
    for age, *totals in samples:
        block.add_sample(AT - int(age * SECOND), *totals)
    block.rows[0].add("accepted", accepted)
    block.rows[1].add_to(A1, "delivered", delivered)
    view = shown(stats.stats, block)["rates"]
    assert (view["acceptedPerSecond"], view["deliveredPerSecond"]) == rates


# ---- /health and /ready


@pytest.mark.parametrize(
    ("offline", "draining", "workers", "expected"),
    [
        ((), (), "RR", ("ok", 4)),
        ((), (), "RD", ("ok", 4)),
        ((A2,), (), "RR", ("degraded", 3)),
        ((), (A2,), "RR", ("ok", 3)),
        ((A2,), (A2,), "RR", ("ok", 3)),
        ((A2,), (A1,), "RR", ("degraded", 2)),
        ((), (), "RS", ("degraded", 4)),
        ((), (), "RX", ("degraded", 4)),
        ((A1, A2, A3, A4), (), "RR", ("unavailable", 0)),
        ((A1, A2, A3), (A4,), "RS", ("unavailable", 0)),
    ],
)
def test_health_is_of_analyzers_and_workers(block, offline, draining, workers, expected):
    status, online = expected
    for slot in offline:
        block.analyzers.set(slot, AnalyzerWord.STATE, AnalyzerState.OFFLINE)
    for slot in draining:
        block.analyzers.set(slot, AnalyzerWord.DRAINING, 1)
    states = dict(zip("SRDX", WorkerState, strict=True))
    for index, code in enumerate(workers):
        block.worker(index)[WorkerWord.STATE] = states[code]
    health = shown(stats.health, block)
    assert bool(health.pop("problems")) == bool(offline or draining or set(workers) & {"S", "X"})
    assert health == {
        "status": status,
        "version": "1.2.3",
        "uptimeSeconds": 90.0,
        "workers": {"running": sum(code in "RD" for code in workers), "configured": 2},
        "analyzers": {"online": online, "total": 4},
        "storage": "ok",
        "durability": "disk",
        "syncIntervalSeconds": 0.5,
        "failing": [],
        "deadLetters": {"packets": 0, "bytes": 0, "fileSystemUsed": None},
    }


def test_dead_letters_are_as_reported(block):
    last = Described("p1", "refused", "A1", 422, "HTTP 422", 1, 2, "2026-01-02T03:04:05Z", "2026-01-02T03:04:06Z", 10)
    report = Report((Count("refused", "A1", 3), Count("shutdown", "", 2)), 1000, 2, (last,), 10_000, 1000)
    block.dead_letters = report
    block.rows[0].add("discarded", 4)
    block.rows[1].add("discarded", 5)
    block.head[HeadWord.DISCARDED_FOR_SIZE], block.head[HeadWord.DISCARDED_FOR_AGE] = 6, 7
    counts = [
        {"reason": "refused", "analyzer": "A1", "packets": 3},
        {"reason": "shutdown", "analyzer": None, "packets": 2},
    ]
    expected = {
        "packets": 5,
        "bytes": 1000,
        "files": 2,
        "counts": counts,
        "discarded": {"maxBytes": 15, "maxAge": 7},
    }
    assert shown(stats.stats, block)["deadLetters"] == expected
    described = {
        "id": "p1",
        "reason": "refused",
        "analyzer": "A1",
        "status": 422,
        "error": "HTTP 422",
        "attempts": 1,
        "messages": 2,
        "acceptedAt": "2026-01-02T03:04:05Z",
        "deadLetteredAt": "2026-01-02T03:04:06Z",
        "bytes": 10,
    }
    assert shown(stats.dead_letters, block) == expected | {"last": [described]}
    health = shown(stats.health, block)["deadLetters"]
    assert health.pop("warning").endswith("is over 80% full")
    assert health == {"packets": 5, "bytes": 1000, "fileSystemUsed": 0.9}


def test_health_shows_failing_upkeep(block):
    for index in range(2):
        block.worker(index)[WorkerWord.STATE] = WorkerState.RUNNING
        block.worker(index)[WorkerWord.FAILING] = int(Step.OLD_RINGS)
    block.head[HeadWord.FAILING] = int(Step.QUEUE_FILES)
    health = shown(stats.health, block)
    assert (health["status"], health["failing"]) == ("degraded", ["oldRings", "queueFiles"])


def test_health_shows_that_the_disk_fails(block):
    assert "storageError" not in shown(stats.health, block)
    block.worker(1)[WorkerWord.STORAGE_FAULT] = errno.ENOSPC
    assert shown(stats.health, block)["status"] == "degraded"
    assert shown(stats.health, block)["storage"] == "failing"
    assert shown(stats.health, block)["storageError"] == "No space left on device"
    assert snapshot_of(block).obstacle == "packets cannot be stored: No space left on device"
    block.worker(1)[WorkerWord.STORAGE_FAULT] = errno.ENOENT
    assert "renamed" in shown(stats.health, block)["storageError"]


def test_draining_is_not_ready(block):
    assert snapshot_of(block).obstacle == ""
    block.head[HeadWord.DRAINING] = 1
    assert "draining" in snapshot_of(block).obstacle


@pytest.mark.parametrize("lacking", [0, 1, 2**20])
def test_full_queue_is_said_alike_everywhere(block, lacking):
    block.worker(1)[WorkerWord.LACKING] = lacking
    assert snapshot_of(block).obstacle == ("the queue is full" if lacking else "")
    queue = shown(stats.queue, block)
    assert [queue["full"], *(worker["full"] for worker in queue["workers"])] == [lacking > 0, False, lacking > 0]


@pytest.mark.parametrize(
    ("delivered", "undone", "seconds"),
    [(1000, 20, 1), (100, 20, 1), (10, 20, 4), (2, 20, 20), (1, 20, 30), (0, 20, 30), (0, 0, 1)],
)
def test_full_queue_says_when_there_is_room(block, delivered, undone, seconds):
    """20 records of 50 bytes wait; two of them have to go. Each of two workers delivers half of it all, in 10 s."""
    block.worker(1)[WorkerWord.LACKING] = 100
    block.rows[1].set("undone", undone)
    block.rows[1].set("queue_bytes", 1000)
    block.add_sample(AT - 10 * SECOND, 0, 0)
    block.rows[1].add_to(A1, "delivered", delivered)
    assert snapshot_of(block).retry_after == seconds


# ---- /queue


def test_queue_shows_packets_bytes_and_age(block):
    block.rows[0].set("undone", 30)
    block.rows[0].add_to(A1, "packets_in_flight", 4)
    block.rows[0].add_to(LEFT, "packets_in_flight", 1)
    block.rows[0].set("queue_bytes", 4096)
    block.rows[0].set("oldest_ns", WALL - 2_500_000_000)
    block.add_sample(AT - 10 * SECOND, 0, 0)
    block.rows[1].add_to(A1, "delivered", 50)
    assert shown(stats.queue, block, Config(queue=Queue(durability="fsync"))) == {
        "backend": "ring",
        "packets": 25,
        "bytes": 4096,
        "capacityBytes": 2**21,
        "full": False,
        "inFlight": 5,
        "oldestAgeSeconds": 2.5,
        "durability": "fsync",
        "syncIntervalSeconds": 0.5,
        "drainRatePerSecond": 5.0,
        "estimatedDrainSeconds": 5.0,
        "workers": [
            {"id": 0, "packets": 25, "bytes": 4096, "capacityBytes": 2**20, "full": False, "oldestAgeSeconds": 2.5},
            {"id": 1, "packets": 0, "bytes": 0, "capacityBytes": 2**20, "full": False, "oldestAgeSeconds": 0.0},
        ],
    }


def test_when_the_queue_will_be_drained(block):
    assert shown(stats.queue, block)["estimatedDrainSeconds"] == 0.0
    block.rows[0].set("undone", 3)
    assert shown(stats.queue, block)["estimatedDrainSeconds"] is None


def test_age_across_runs_is_not_negative(block):
    block.rows[0].set("oldest_ns", WALL + SECOND)
    assert shown(stats.queue, block)["oldestAgeSeconds"] == 0.0


# ---- /analyzers


def test_new_analyzer_has_no_events(block):
    block.analyzers.set(A2, AnalyzerWord.SINCE_NS, 0)
    assert analyzer(block, A2) == {
        "id": "A2",
        "endpoint": "http://127.0.0.1:3002/analyze",
        "weight": 0.4,
        "override": None,
        "targetShare": 0.4,
        "effectiveShare": 0.4,
        "actualShare": 0.0,
        "state": "online",
        "since": None,
        "pausedForSeconds": None,
        "probation": None,
        "health": {"lastCheck": None, "lastStatus": None, "consecutiveFailures": 0, "consecutiveSuccesses": 0},
        "inFlight": 0,
        "connections": 0,
        "delivered": 0,
        "failed": 0,
        "retried": 0,
        "lastError": None,
        "lastErrorAt": None,
        "latencyMs": {"p50": None, "p90": None, "p99": None, "p999": None, "max": None},
    }


def test_an_analyzer_in_trouble(block):
    for field, value in (
        (AnalyzerWord.STATE, AnalyzerState.OFFLINE),
        (AnalyzerWord.SINCE_NS, WALL - 1_500_000_000),
        (AnalyzerWord.LAST_CHECK_NS, WALL),
        (AnalyzerWord.LAST_STATUS, 503),
        (AnalyzerWord.CHECK_FAILURES, 2),
        (AnalyzerWord.DELIVERY_FAILURES, 5),
        (AnalyzerWord.PAUSED_UNTIL_NS, AT + 1_250_000_000),
    ):
        block.analyzers.set(A3, field, value)
    block.analyzers.set_error(A3, "cannot connect: verbindung verweigert ✗")
    block.analyzers.set(A3, AnalyzerWord.ERROR_NS, WALL + 7_000_000)
    for index, row in enumerate(block.rows, 1):
        row.add_to(A3, "delivered", 10 * index)
        row.add_to(A3, "failed", 2 * index)
        row.add_to(A3, "retries", index)
        row.set_of(A3, "packets_in_flight", 4 * index)
        row.set_of(A3, "connections", index)
    view = analyzer(block, A3)
    assert view["state"] == "offline"
    assert view["since"] == "2023-11-14T22:13:18.500Z"
    assert view["health"] == {
        "lastCheck": "2023-11-14T22:13:20.000Z",
        "lastStatus": 503,
        "consecutiveFailures": 5,
        "consecutiveSuccesses": 0,
    }
    assert (view["lastError"], view["lastErrorAt"]) == (
        "cannot connect: verbindung verweigert ✗",
        "2023-11-14T22:13:20.007Z",
    )
    assert view["pausedForSeconds"] == 1.25
    assert (view["targetShare"], view["effectiveShare"]) == (0.2, 0.0)
    assert [view[name] for name in ("delivered", "failed", "retried", "inFlight", "connections")] == [30, 6, 3, 12, 3]
    assert analyzer(block, A2)["effectiveShare"] == 0.5  # of what is left, 0.4 of 0.8


def test_probation_is_online_until_failure(block):
    states = block.analyzers
    assert states.go_offline(A2, by_deliveries=True)
    assert (analyzer(block, A2)["state"], analyzer(block, A2)["probation"]) == ("offline", None)
    states.set(A2, AnalyzerWord.CHECK_SUCCESSES, 2)
    view = analyzer(block, A2)
    assert (view["state"], view["effectiveShare"]) == ("online", 0.0)
    assert view["probation"] == {"nextPacketInSeconds": 0.0}
    assert shown(stats.health, block)["status"] == "ok"
    states.fail_trial(A2, AT)
    view = analyzer(block, A2)
    assert (view["state"], view["probation"]) == ("offline", {"nextPacketInSeconds": 1.0})
    assert shown(stats.health, block)["status"] == "degraded"


def test_runtime_change_shows_as_an_override(block):
    block.analyzers.set_weight(A2, 1.4)
    block.analyzers.set(A2, AnalyzerWord.WEIGHT_OVERRIDDEN, 1)
    block.analyzers.set(A4, AnalyzerWord.DRAINING, 1)
    changed = analyzer(block, A2)
    assert (changed["weight"], changed["override"], changed["targetShare"]) == (1.4, {"weight": 1.4}, 0.7)
    assert analyzer(block, A1)["override"] is None
    assert analyzer(block, A4)["override"] == {"state": "draining"}
    assert analyzer(block, A4)["state"] == "draining"
    assert analyzer(block, A4)["effectiveShare"] == 0.0
    assert analyzer(block, A4)["targetShare"] == 0.15


def test_offline_draining_one_is_draining(block):
    block.analyzers.set(A4, AnalyzerWord.DRAINING, 1)
    block.analyzers.set(A4, AnalyzerWord.STATE, AnalyzerState.OFFLINE)
    assert analyzer(block, A4)["state"] == "draining"


@pytest.mark.parametrize(
    ("unit", "field"), [("packets", "delivered"), ("messages", "messages_delivered"), ("bytes", "bytes_delivered")]
)
def test_actual_shares_are_of_the_split_unit(block, unit, field):
    config = replace(CONFIG, distribution=Distribution(by=unit))
    assert analyzer(block, A1, config)["actualShare"] == 0.0
    for other in ("delivered", "messages_delivered", "bytes_delivered"):
        block.rows[0].add_to(A1, other, 1)
    block.rows[1].add_to(A2, field, 3)
    block.rows[1].add_to(LEFT, field, 1000)
    assert analyzer(block, A1, config)["actualShare"] == 0.25
    assert analyzer(block, A2, config)["actualShare"] == 0.75


def test_shares_add_up_to_one(block):
    for view in ("targetShare", "effectiveShare"):
        assert sum(analyzer(block, slot)[view] for slot in ANALYZERS) == pytest.approx(1.0)


def test_short_stats_agree_with_long_form(block):
    block.rows[0].add_to(A1, "delivered", 3)
    short = shown(stats.stats, block)["analyzers"][0]
    assert set(short) == {
        "id",
        "state",
        "targetShare",
        "actualShare",
        "delivered",
        "failed",
        "retried",
        "inFlight",
    }
    assert short.items() <= {k: v for k, v in analyzer(block, A1).items() if k in short}.items()
