"""Metrics: the names the API promises, the figures of the shared block, and text that scrapers can read."""

from __future__ import annotations

import os

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fastdist.errors import Fault
from fastdist.http import metrics
from fastdist.settings import PROTOCOLS, Analyzer, Config, Queue
from fastdist.shm.block import AnalyzerState, AnalyzerWord, HeadWord, SharedBlock, WorkerState, WorkerWord
from fastdist.shm.histograms import BOUNDS
from fastdist.shm.problems import KINDS
from fastdist.shm.snapshot import DEAD_LETTERS, REJECTIONS, Snapshot
from fastdist.shm.supervisor_report import Configuration, Report, encode
from fastdist.stream_figures import StreamFigures

SECOND = 10**9
AT, WALL = 500 * SECOND, 1_700_000_000 * SECOND  # one moment, on the monotonic clock and on the wall clock
ANALYZERS = {
    3: Analyzer(id="A1", endpoint="http://127.0.0.1:1/", weight=1.0),
    0: Analyzer(id="a-2_x.y", endpoint="http://127.0.0.1:2/", weight=3.0),
}


@pytest.fixture
def block():
    block = SharedBlock.create(2, 64)
    os.close(block.fd)  # the mapping stays
    block.head[HeadWord.STARTED_NS] = AT - 90 * SECOND
    block.head[HeadWord.CLOCK_OFFSET_NS] = WALL - AT
    for slot, analyzer in ANALYZERS.items():
        block.analyzers.clear(slot)
        block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
        block.analyzers.set_weight(slot, analyzer.weight)
    return block


def scrape(block):
    """Return {family: (type, help)} and {(sample, label value): value}."""
    text = metrics.text(Snapshot(block, Config(), ANALYZERS, "1.2.3", AT)).decode()
    families = list(text_string_to_metric_families(text))
    kinds = {family.name: (family.type, family.documentation) for family in families}
    samples = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, *sample.labels.values())
            assert key not in samples
            samples[key] = sample.value
    return kinds, samples


COUNTERS = (
    "packets_received",
    "packets_accepted",
    "packets_recovered",
    "packets_spilled",
    "packets_corrupt",
    "packets_lost",
    "packets_rejected",
    "packets_delivered",
    "packets_failed",
    "packets_retried",
    "packets_dead_lettered",
    "dead_letter_packets_discarded",
    "requests",
    "records",
    "messages_accepted",
    "messages_delivered",
    "bytes_accepted",
    "bytes_delivered",
    "worker_restarts",
    "worker_cpu_seconds",
)
GAUGES = (
    "problems",
    "config_last_reload_successful",
    "config_last_reload_success_timestamp_seconds",
    "dead_letter_packets",
    "dead_letter_bytes",
    "dead_letter_filesystem_size_bytes",
    "dead_letter_filesystem_available_bytes",
    "queue_packets",
    "queue_bytes",
    "queue_capacity_bytes",
    "queue_oldest_age_seconds",
    "inflight_packets",
    "analyzer_up",
    "analyzer_probation",
    "analyzer_draining",
    "analyzer_connections",
    "analyzer_target_share",
    "analyzer_effective_share",
    "analyzer_actual_share",
    "worker_resident_memory_bytes",
    "worker_up",
    "tls_certificate_not_after_timestamp_seconds",
    "ready",
    "uptime_seconds",
    "build_info",
)
HISTOGRAMS = (
    "ingest_duration_seconds",
    "queue_wait_duration_seconds",
    "delivery_duration_seconds",
    "worker_loop_lag_seconds",
)


def test_families_have_documented_types(block):
    kinds, _ = scrape(block)
    expected = dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge")
    expected |= dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name: kind for name, (kind, _) in kinds.items()} == {f"fastdist_{k}": v for k, v in expected.items()}
    assert all(text.endswith(".") for _, text in kinds.values())


def test_counters_end_in_total_not_created(block):
    text = metrics.text(Snapshot(block, Config(), ANALYZERS, "1.2.3", AT)).decode()
    assert "_created" not in text
    for name in COUNTERS:
        assert f"\n# TYPE fastdist_{name}_total counter\n" in text


def test_figures_are_sums_over_all_workers(block):
    for index, row in enumerate(block.rows, 1):
        for number, field in enumerate((*REJECTIONS, *DEAD_LETTERS), 1):
            row.add(field, 10 * number)
        for field in ("accepted", "recovered", "spilled", "corrupt", "messages_accepted", "bytes_accepted"):
            row.add(field, index)
        for field in ("delivered", "failed", "retries", "messages_delivered", "bytes_delivered", "connections"):
            row.add_to(3, field, 100 * index)
        row.add_to(0, "delivered", 300 * index)
        row.set_of(0, "packets_in_flight", index)
        row.set("undone", 5 * index)
        row.set("queue_bytes", 64 * index)
        row.set("queue_capacity", 1024)
        row.set("oldest_ns", WALL - index * SECOND)
    block.analyzers.set(3, AnalyzerWord.STATE, AnalyzerState.OFFLINE)
    block.analyzers.set(3, AnalyzerWord.DRAINING, 1)
    _, it = scrape(block)
    rejected = {reason: 20 * number for number, reason in enumerate(REJECTIONS, 1)}
    assert {key[1]: value for key, value in it.items() if key[0] == "fastdist_packets_rejected_total"} == rejected
    assert it["fastdist_packets_received_total",] == 3 + sum(rejected.values())
    for name in ("packets_accepted", "packets_recovered", "packets_spilled", "packets_corrupt"):
        assert it[f"fastdist_{name}_total",] == 3
    dead = {key[1]: value for key, value in it.items() if key[0] == "fastdist_packets_dead_lettered_total"}
    assert dead == {reason: 20 * number for number, reason in enumerate(DEAD_LETTERS, 1 + len(REJECTIONS))}
    for name in ("delivered", "failed", "retried"):
        assert it[f"fastdist_packets_{name}_total", "A1"] == 300
    assert it["fastdist_packets_delivered_total", "a-2_x.y"] == 900
    assert (it["fastdist_messages_accepted_total",], it["fastdist_bytes_accepted_total",]) == (3, 3)
    assert (it["fastdist_messages_delivered_total",], it["fastdist_bytes_delivered_total",]) == (300, 300)
    assert (it["fastdist_queue_packets",], it["fastdist_queue_bytes",]) == (12, 192)
    assert (it["fastdist_queue_capacity_bytes",], it["fastdist_queue_oldest_age_seconds",]) == (2048, 2)
    assert (it["fastdist_inflight_packets", "A1"], it["fastdist_inflight_packets", "a-2_x.y"]) == (0, 3)
    assert (it["fastdist_analyzer_up", "A1"], it["fastdist_analyzer_up", "a-2_x.y"]) == (0, 1)
    assert (it["fastdist_analyzer_draining", "A1"], it["fastdist_analyzer_draining", "a-2_x.y"]) == (1, 0)
    assert it["fastdist_analyzer_connections", "A1"] == 300
    for name, shares in (("target", (0.25, 0.75)), ("effective", (0, 1)), ("actual", (0.25, 0.75))):
        assert tuple(it[f"fastdist_analyzer_{name}_share", label] for label in ("A1", "a-2_x.y")) == shares


def test_agents_requests_by_protocol(block):
    for index, row in enumerate(block.rows, 1):
        row.add_request(0, 200, 10 * index)
        row.add_request(2, 204, 5)
        row.add_request(2, 503)
    _, it = scrape(block)
    records = {key[1]: value for key, value in it.items() if key[0] == "fastdist_records_total"}
    assert records == dict.fromkeys(PROTOCOLS, 0) | {"json": 30, "loki": 10}
    requests = {key[1:]: value for key, value in it.items() if key[0] == "fastdist_requests_total"}
    assert requests == {("json", "200"): 2, ("loki", "204"): 2, ("loki", "503"): 2}


def test_workers_and_build(block):
    words = block.worker(1)
    words[WorkerWord.RESTARTS], words[WorkerWord.CPU_NS], words[WorkerWord.RSS] = 2, 1_500_000_000, 4096
    block.rows[1].observe_loop_lag(20_000_000)
    kinds, it = scrape(block)
    assert it["fastdist_worker_restarts_total", "0"] == 0
    assert it["fastdist_worker_restarts_total", "1"] == 2
    assert it["fastdist_worker_cpu_seconds_total", "1"] == 1.5
    assert it["fastdist_worker_resident_memory_bytes", "1"] == 4096
    assert it["fastdist_worker_loop_lag_seconds_sum", "1"] == 0.02
    assert [it["fastdist_worker_loop_lag_seconds_count", worker] for worker in "01"] == [0, 1]
    assert it["fastdist_uptime_seconds",] == 90
    ((build, value),) = [(key, value) for key, value in it.items() if key[0] == "fastdist_build_info"]
    assert "1.2.3" in build
    assert value == 1
    assert "fastdist_build_info" in kinds


def test_reasons_for_refusing_packets_show(block):
    block.worker(0)[WorkerWord.STATE] = WorkerState.RUNNING
    _, it = scrape(block)
    assert (it["fastdist_worker_up", "0"], it["fastdist_worker_up", "1"], it["fastdist_ready",]) == (1, 0, 1)
    block.worker(0)[WorkerWord.STORAGE_FAULT] = 1
    _, it = scrape(block)
    assert it["fastdist_ready",] == 0


def test_problems_are_counted_by_code(block):
    for index in range(2):
        block.worker(index)[WorkerWord.STATE] = WorkerState.RUNNING
    _, it = scrape(block)
    counts = {key[1]: value for key, value in it.items() if key[0] == "fastdist_problems"}
    assert counts == dict.fromkeys(KINDS, 0)
    for slot in ANALYZERS:
        block.analyzers.set(slot, AnalyzerWord.STATE, AnalyzerState.OFFLINE)
    _, it = scrape(block)
    counts = {key[1]: value for key, value in it.items() if key[0] == "fastdist_problems" and value}
    assert counts == {"no_analyzer": 1, "analyzer_offline": 2}


def test_state_of_the_configuration_shows(block):
    state = Configuration(success_ns=1_700_000_000_500_000_000)
    block.set_report(encode(Report(state)))
    _, it = scrape(block)
    assert it["fastdist_config_last_reload_successful",] == 1
    assert it["fastdist_config_last_reload_success_timestamp_seconds",] == 1_700_000_000.5
    state.faults = [Fault("server.port: must be >= 0")]
    block.set_report(encode(Report(state)))
    _, it = scrape(block)
    assert it["fastdist_config_last_reload_successful",] == 0
    assert it["fastdist_config_last_reload_success_timestamp_seconds",] == 1_700_000_000.5


def test_histograms_are_exact_at_every_bound(block):
    durations = [10**exponent + step for exponent in range(1, 14) for step in range(3)]
    for index, ns in enumerate(durations):
        block.rows[index % 2].observe_ingest(ns)
        block.rows[index % 2].observe_delivery(3, ns)
    _, it = scrape(block)
    for name, *labels in (("ingest",), ("delivery", "A1")):
        prefix = f"fastdist_{name}_duration_seconds"
        assert it[f"{prefix}_count", *labels] == it[f"{prefix}_bucket", *labels, "+Inf"] == len(durations)
        assert it[f"{prefix}_sum", *labels] == pytest.approx(sum(durations) / 1e9)
        buckets = [
            key[-1] for key in it if key[0] == f"{prefix}_bucket" and key[-1] != "+Inf" and [*key[1:-1]] == labels
        ]
        assert len(buckets) == 24
        for bound in buckets:
            assert float(bound) in {ns / 1e9 for ns in BOUNDS}
            assert it[f"{prefix}_bucket", *labels, bound] == sum(ns < float(bound) * 1e9 for ns in durations)
    assert it["fastdist_delivery_duration_seconds_count", "a-2_x.y"] == 0
    assert it["fastdist_queue_wait_duration_seconds_count",] == 0


def test_unknown_stream_has_no_stored_total(block):
    """A service that has not heard of its stream yet would show a jump when it does."""
    config, name = Config(queue=Queue(backend="jetstream")), "fastdist_stream_stored_total"

    def stored():
        families = text_string_to_metric_families(metrics.text(Snapshot(block, config, ANALYZERS, "1", AT)).decode())
        return [sample.value for family in families for sample in family.samples if sample.name == name]

    assert stored() == []
    block.stream = StreamFigures(error="no server can be used")
    assert stored() == []
    block.stream = StreamFigures(at=1.0, stored=1000)
    assert stored() == [1000]


def test_any_text_may_stand_in_a_label(block):
    odd = 'a"b\\c\nd,e="f"}'
    analyzers = {3: Analyzer(id=odd, endpoint="http://127.0.0.1:1/", weight=1.0)}
    for write, read in ((metrics.text, text_string_to_metric_families), (metrics.openmetrics, parse_openmetrics)):
        text = write(Snapshot(block, Config(), analyzers, odd, AT)).decode()
        labels = {value for family in read(text) for sample in family.samples for value in sample.labels.values()}
        assert odd in labels
        assert {label for label in labels - KINDS.keys() if label.startswith("a")} == {odd}


def test_the_same_figures_as_openmetrics(block):
    block.rows[0].add("accepted", 7)
    block.rows[0].observe_ingest(10**6)
    text = metrics.openmetrics(Snapshot(block, Config(), ANALYZERS, "1.2.3", AT)).decode()
    families = {family.name: family for family in parse_openmetrics(text)}
    assert families["fastdist_packets_accepted"].samples[0].value == 7
    assert families["fastdist_ingest_duration_seconds"].type == "histogram"
    assert families["fastdist_build"].type == "info"
    assert "_created" not in text
    _, plain = scrape(block)
    assert {sample.name for family in families.values() for sample in family.samples} == {key[0] for key in plain}


def test_ends_of_certificates_are_shown(block):
    """Of those that there are: no certificate is no sample."""
    name = "fastdist_tls_certificate_not_after_timestamp_seconds"
    _, samples = scrape(block)
    assert not [key for key in samples if key[0] == name]
    block.head[HeadWord.NOT_AFTER] = 1_900_000_000
    block.analyzers.set(3, AnalyzerWord.NOT_AFTER, 1_900_000_001)
    block.analyzers.set(0, AnalyzerWord.CLIENT_NOT_AFTER, 1_900_000_002)
    _, samples = scrape(block)
    assert {key[1:]: value for key, value in samples.items() if key[0] == name} == {
        ("own",): 1_900_000_000,
        ("analyzer", "A1"): 1_900_000_001,
        ("client", "a-2_x.y"): 1_900_000_002,
    }
