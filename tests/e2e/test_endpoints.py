"""What the service says of itself: the same whichever worker answers, and in agreement with what was done."""

from __future__ import annotations

import http.client
import json
import re
import time
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from support import BODY, WEIGHTS, Distributor, Emitter, Mocks, get_json, kill_worker, request, running, wait_until

CHANGING = ("uptimeSeconds", "rates", "workers")  # between two requests, without a packet
PERCENTILES = ("p50", "p90", "p99", "p999", "max")


def connection_to(port, pid):
    """Return an open connection that this worker serves."""
    for _ in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/health")
        connection.getresponse().read()
        if any(each.raddr == connection.sock.getsockname() for each in psutil.Process(pid).net_connections("tcp")):
            return connection
        connection.close()
    raise AssertionError(f"of 200 connections none came to worker {pid}")


def samples_of(text, parse=text_string_to_metric_families):
    """Return {(name, labels): value}; the parser raises on whatever is not the text format."""
    families = list(parse(text))
    assert all(family.documentation for family in families)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A distributor at rest that has seen traffic of every kind; what it must say of it is known."""
    mocks = Mocks()
    with running(mocks):
        # However many packets an analyzer refuses in a row: none of them is tried elsewhere.
        fastdist = Distributor(tmp_path_factory.mktemp("busy"), mocks, {"health": {"fall": 10_000}})
        with running(fastdist):
            Emitter(fastdist.port, connections=16).send(2000)
            assert fastdist.post(b"{")[0] == 400
            assert fastdist.post(b'{"emitterId":"e","messages":[]}')[0] == 400
            assert request(fastdist.port, "POST", "/logs", BODY, {"Content-Type": "text/plain"})[0] == 415
            fastdist.wait_at_rest()
            mocks.set_all(status=400)
            assert [fastdist.post()[0] for _ in range(5)] == [202] * 5
            fastdist.stats_at_rest = fastdist.wait_at_rest()
            yield fastdist
            assert fastdist.wait_at_rest()["packets"] == fastdist.stats_at_rest["packets"], "looking changes nothing"


def test_every_worker_says_the_same(busy):
    """But for what has just become known, or old, between two questions."""
    for _ in range(10):
        first, second = (said_by(busy, pid) for pid in busy.worker_pids())
        if first == second:
            break
        time.sleep(1)
    assert first == second


def said_by(fastdist, pid):
    """Return what a worker says, without what changes by itself."""
    connection = connection_to(fastdist.port, pid)
    documents = {}
    for path in ("/stats", "/queue", "/analyzers", "/health"):
        connection.request("GET", path)
        documents[path] = json.loads(connection.getresponse().read())
    connection.close()
    for key in CHANGING:
        documents["/stats"].pop(key)
    for key in ("drainRatePerSecond", "estimatedDrainSeconds"):
        documents["/queue"].pop(key)
    documents["/health"].pop("uptimeSeconds")
    for row in documents["/analyzers"]["analyzers"]:
        row.pop("health")
        row.pop("connections")
    return documents


def test_stats_count_what_was_done(busy):
    stats = busy.stats_at_rest
    assert stats["packets"] == {
        "received": 2008,
        "accepted": 2005,
        "rejected": 3,
        "delivered": 2000,
        "queued": 0,
        "inFlight": 0,
        "retried": 0,
        "spilled": stats["packets"]["spilled"],
        "deadLettered": 5,
        "recovered": 0,
        "corrupt": 0,
        "lost": 0,
    }
    assert {reason: count for reason, count in stats["rejected"].items() if count} == {
        "malformed": 1,
        "invalid": 1,
        "unsupportedMediaType": 1,
    }
    assert stats["messages"] == {"accepted": 4010, "delivered": 4000}
    assert stats["bytes"] == {"accepted": 2005 * len(BODY), "delivered": 2000 * len(BODY)}
    assert stats["rates"]["acceptedPerSecond"] > 0
    assert stats["rates"]["deliveredPerSecond"] > 0
    assert stats["supervisor"]["pid"] == busy.process.pid
    assert sum(row["accepted"] for row in stats["workers"]) == 2005
    assert sum(row["delivered"] for row in stats["workers"]) == 2000
    assert sum(row["actualShare"] for row in stats["analyzers"]) == pytest.approx(1, abs=1e-5)
    assert 0 < stats["uptimeSeconds"] < 600


def test_latencies_are_sensible(busy):
    latencies = busy.stats_at_rest["latencyMs"]
    assert latencies.keys() == {"ingest", "queueWait", "delivery"}
    each = [row["latencyMs"] for row in busy.analyzers().values()]
    for latency in [*latencies.values(), *each]:
        values = [latency[name] for name in PERCENTILES]
        assert values == sorted(values)
        assert values[0] > 0
        assert values[-1] < 20_000


def test_workers_are_measured(busy):
    def measured():
        rows = busy.stats()["workers"]
        return rows if all(row["rssBytes"] > 0 for row in rows) else None

    rows = wait_until(measured, "every worker's memory is known")
    assert [row["id"] for row in rows] == [0, 1]
    assert {row["state"] for row in rows} == {"running"}
    assert {row["restarts"] for row in rows} == {0}
    for row in rows:
        assert row["rssBytes"] == pytest.approx(psutil.Process(row["pid"]).memory_info().rss, rel=0.5)


def test_the_use_of_processors_is_measured(mocks, serve):
    fastdist = serve(mocks)
    emitter = Emitter(fastdist.port).start()
    wait_until(lambda: all(row["cpuPercent"] > 0 for row in fastdist.stats()["workers"]), "processor time is measured")
    emitter.stop()


def test_analyzers_show_their_state(busy):
    rows = busy.analyzers()
    assert list(rows) == list(WEIGHTS)
    for name, row in rows.items():
        assert row["weight"] == row["targetShare"] == row["effectiveShare"] == WEIGHTS[name]
        assert (row["state"], row["inFlight"]) == ("online", 0)
        assert row["endpoint"].endswith("/analyze")
        assert row["health"]["lastStatus"] == 200
        assert row["health"]["consecutiveSuccesses"] > 0
        checked = datetime.fromisoformat(row["health"]["lastCheck"])
        assert timedelta(0) <= datetime.now(UTC) - checked < timedelta(seconds=30)
        assert datetime.fromisoformat(row["since"]) <= datetime.now(UTC)
    stats = {row["id"]: row for row in busy.stats_at_rest["analyzers"]}
    for name, row in rows.items():
        assert (row["delivered"], row["failed"]) == (stats[name]["delivered"], stats[name]["failed"])


def test_metrics_agree_with_stats(busy):
    stats = busy.stats_at_rest
    status, headers, text = request(busy.port, "GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples_of(text.decode())
    for name in ("received", "accepted", "recovered", "spilled", "corrupt", "lost"):
        assert found[f"fastdist_packets_{name}_total",] == stats["packets"][name]
    for reason, count in stats["rejected"].items():
        snake = re.sub("[A-Z]", lambda upper: f"_{upper[0].lower()}", reason)
        assert found["fastdist_packets_rejected_total", snake] == count
    for unit in ("messages", "bytes"):
        for what in ("accepted", "delivered"):
            assert found[f"fastdist_{unit}_{what}_total",] == stats[unit][what]
    for row in stats["analyzers"]:
        for name in ("delivered", "failed", "retried"):
            assert found[f"fastdist_packets_{name}_total", row["id"]] == row[name]
        assert found["fastdist_analyzer_up", row["id"]] == 1
        assert found["fastdist_analyzer_target_share", row["id"]] == pytest.approx(row["targetShare"])
        assert found["fastdist_analyzer_actual_share", row["id"]] == pytest.approx(row["actualShare"], abs=1e-5)
        assert found["fastdist_inflight_packets", row["id"]] == 0
        assert found["fastdist_delivery_duration_seconds_count", row["id"]] == row["delivered"]
        assert found["fastdist_delivery_duration_seconds_bucket", *sorted((row["id"], "+Inf"))] == row["delivered"]
    assert found["fastdist_packets_dead_lettered_total", "refused"] == 5
    assert found["fastdist_ingest_duration_seconds_count",] == stats["packets"]["accepted"]
    assert found["fastdist_queue_wait_duration_seconds_count",] == stats["packets"]["accepted"]
    assert found["fastdist_queue_packets",] == found["fastdist_queue_oldest_age_seconds",] == 0
    assert found["fastdist_queue_capacity_bytes",] == get_json(busy.port, "/queue")["capacityBytes"] > 60 << 20
    for row in stats["workers"]:
        assert found["fastdist_worker_restarts_total", str(row["id"])] == 0
        assert ("fastdist_worker_cpu_seconds_total", str(row["id"])) in found
        assert ("fastdist_worker_resident_memory_bytes", str(row["id"])) in found
    assert any(key[0] == "fastdist_build_info" for key in found)
    wanted = {"Accept": "application/openmetrics-text; version=1.0.0"}
    status, headers, text = request(busy.port, "GET", "/metrics", headers=wanted)
    assert headers["content-type"].startswith("application/openmetrics-text")
    same = samples_of(text.decode(), parse_openmetrics)
    assert same["fastdist_packets_accepted_total",] == stats["packets"]["accepted"]


def test_health_names_what_is_missing(mocks, serve):
    fastdist = serve(mocks)

    def health():
        return get_json(fastdist.port, "/health")

    assert health()["status"] == "ok"
    assert health()["workers"] == {"running": 2, "configured": 2}
    assert health()["analyzers"] == {"online": 4, "total": 4}
    mocks.set("A2", unhealthy=True)
    wait_until(lambda: health()["status"] == "degraded", "an analyzer is missing")
    assert health()["analyzers"] == {"online": 3, "total": 4}
    mocks.set_all(unhealthy=True)
    wait_until(lambda: health()["status"] == "unavailable", "no analyzer is there")
    assert request(fastdist.port, "GET", "/ready")[0] == 200, "packets are still taken"
    mocks.set_all(unhealthy=False)
    wait_until(lambda: health()["status"] == "ok", "all are there again")
    victim, survivor = fastdist.worker_pids()
    connection = connection_to(fastdist.port, survivor)
    kill_worker(victim)

    def seen_by_the_survivor():
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())

    found = wait_until(lambda: h if (h := seen_by_the_survivor())["status"] == "degraded" else None, "a worker is gone")
    assert found["workers"] == {"running": 1, "configured": 2}
    wait_until(lambda: seen_by_the_survivor()["status"] == "ok", "a successor is there")
    connection.close()


def test_the_queue_can_be_watched(mocks, serve):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks)
    fastdist.wait_for_states("offline")
    Emitter(fastdist.port).send(300)
    wait_until(lambda: get_json(fastdist.port, "/queue")["packets"] == 300, "all are counted")
    queue = get_json(fastdist.port, "/queue")
    assert queue["durability"] == "memory"
    assert queue["capacityBytes"] == sum(row["capacityBytes"] for row in queue["workers"])
    assert queue["packets"] == sum(row["packets"] for row in queue["workers"])
    assert 300 * len(BODY) < queue["bytes"] == sum(row["bytes"] for row in queue["workers"]) < 300 * (len(BODY) + 200)
    assert queue["estimatedDrainSeconds"] is None
    first = queue["oldestAgeSeconds"]
    wait_until(lambda: get_json(fastdist.port, "/queue")["oldestAgeSeconds"] > first + 0.2, "the oldest gets older")
    mocks.set_all(refuse=False)
    fastdist.wait_at_rest()
    queue = get_json(fastdist.port, "/queue")
    assert (queue["packets"], queue["bytes"], queue["oldestAgeSeconds"], queue["estimatedDrainSeconds"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/stats"), ("GET", "/nothing"), ("DELETE", "/logs"), ("PUT", "/stats"), ("HEAD", "/health")],
)
def test_every_response_suits_an_api(busy, method, path):
    status, headers, body = request(busy.port, method, path)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers
    assert headers["date"].endswith(" GMT")
    if status >= 400:
        document = json.loads(body)
        assert headers["content-type"] == "application/problem+json"
        assert document["status"] == status
        assert document.keys() >= {"type", "title", "detail"}
    assert ("allow" in headers) == (status == 405)
    if method == "HEAD":
        assert body == b""
        assert int(headers["content-length"]) > 0
