"""Metrics: a ``Snapshot`` as Prometheus text, written by prometheus_client.

- Base units (seconds, bytes), and the names that the API promises; labels only where there is a sensible sum over them.
- Nothing is kept between scrapes: the shared block is the one place where things are counted, so prometheus_client's
  registry and its multi-process mode have no part in this.
- A bucket's ``le`` is always an exact bound of the histograms in shared memory. Every octave of those is one bucket
  here, from 16 µs to 137 s; the eight steps of an octave would cost scrapers more than they tell.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector

from fastdist.histograms import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastdist.histograms import Histogram
    from fastdist.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# (a bound in seconds, how many of the buckets in shared memory are below it)
_BUCKETS = [(repr(2**octave / 1e9), BOUNDS.index(2**octave) + 1) for octave in range(14, 38)]


def text(snapshot: Snapshot) -> bytes:
    """Return all metrics in the text format 0.0.4, which every scraper reads."""
    return generate_latest(_Metrics(snapshot))


def openmetrics(snapshot: Snapshot) -> bytes:
    """Return all metrics in the OpenMetrics format 1.0.0."""
    exposition: bytes = openmetrics_exposition.generate_latest(_Metrics(snapshot))  # type: ignore[no-untyped-call]
    return exposition


class _Metrics(Collector):
    """The metric families of one snapshot, in the order they are written."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        build = InfoMetricFamily("fastdist_build", "What is running; always 1.")
        build.add_metric([], {"version": self.snapshot.version, "python": platform.python_version()})
        yield build
        yield _gauge("uptime_seconds", "How long the service has been running.", self.snapshot.uptime)
        yield _gauge("ready", "Whether packets are taken (1) or not (0).", not self.snapshot.obstacle)
        yield from self.packets()
        yield from self.queue()
        yield from self.analyzers()
        yield from self.durations()
        yield from self.workers()

    def packets(self) -> Iterator[Metric]:
        """Yield what came in and what became of it."""
        it = self.snapshot
        yield _counter("packets_received", "Packets that emitters sent: accepted or rejected.", it.received)
        yield _counter("packets_accepted", "Packets that were stored and acknowledged.", it.accepted)
        yield _counters("packets_rejected", "Packets that were turned away.", "reason", it.rejected)
        yield _counter("packets_recovered", "Packets found in the queue at the start.", it.total("recovered"))
        yield _counter("packets_spilled", "Packets that left a busy analyzer for another.", it.total("spilled"))
        yield _counter("packets_corrupt", "Damaged records found in the queue and skipped.", it.total("corrupt"))
        yield _counters("packets_dead_lettered", "Packets given up and kept in a file.", "reason", it.dead_lettered)
        for unit, what in (("messages", "Log messages"), ("bytes", "Bytes of packet bodies")):
            accepted, delivered = it.total(f"{unit}_accepted"), it.total_of_analyzers(f"{unit}_delivered")
            yield _counter(f"{unit}_accepted", f"{what} in accepted packets.", accepted)
            yield _counter(f"{unit}_delivered", f"{what} in delivered packets.", delivered)

    def queue(self) -> Iterator[Metric]:
        """Yield what waits."""
        it = self.snapshot
        yield _gauge("queue_packets", "Packets that wait to be sent.", it.queued)
        yield _gauge("queue_bytes", "Bytes of the queue in use.", it.total("queue_bytes"))
        yield _gauge("queue_capacity_bytes", "Bytes the queue can hold.", it.total("queue_capacity"))
        yield _gauge("queue_oldest_age_seconds", "Age of the oldest packet; 0 when there is none.", it.oldest_age)

    def analyzers(self) -> Iterator[Metric]:
        """Yield what each analyzer does, and what it should do."""
        figures = {it.analyzer.id: it for it in self.snapshot.analyzers}
        for name, help_text in (
            ("delivered", "Packets that the analyzer has taken."),
            ("failed", "Packets that the analyzer did not take when they were sent."),
            ("retried", "Packets that were sent again after the analyzer did not take them."),
        ):
            values = {label: getattr(it, name) for label, it in figures.items()}
            yield _counters(f"packets_{name}", help_text, "analyzer", values)
        for name, attribute, help_text in (
            ("inflight_packets", "in_flight", "Packets sent to the analyzer and not answered yet."),
            ("analyzer_up", "online", "Whether the analyzer is online (1) or offline (0)."),
            ("analyzer_connections", "connections", "Open connections to the analyzer."),
            ("analyzer_target_share", "target_share", "The share (0 to 1) that its weight gives the analyzer."),
            ("analyzer_effective_share", "effective_share", "The share (0 to 1) of new packets it gets right now."),
            ("analyzer_actual_share", "actual_share", "The share (0 to 1) of all deliveries that it has taken."),
        ):
            values = {label: getattr(it, attribute) for label, it in figures.items()}
            yield _gauges(name, help_text, "analyzer", values)

    def durations(self) -> Iterator[Metric]:
        """Yield the histograms."""
        ingest = HistogramMetricFamily(
            "fastdist_ingest_duration_seconds",
            "Time from the end of a request's reading until its packet is safe and its answer written.",
        )
        _add(ingest, [], self.snapshot.ingest)
        yield ingest
        wait = HistogramMetricFamily(
            "fastdist_queue_wait_duration_seconds", "Time from a packet's acceptance to its first sending."
        )
        _add(wait, [], self.snapshot.queue_wait)
        yield wait
        delivery = HistogramMetricFamily(
            "fastdist_delivery_duration_seconds",
            "Time from a packet's sending to the analyzer's answer, for delivered packets.",
            labels=["analyzer"],
        )
        for it in self.snapshot.analyzers:
            _add(delivery, [it.analyzer.id], self.snapshot.delivery([it.slot]))
        yield delivery

    def workers(self) -> Iterator[Metric]:
        """Yield what each worker costs."""
        workers = {str(it.id): it for it in self.snapshot.workers}
        running = {label: it.running for label, it in workers.items()}
        yield _gauges("worker_up", "Whether the worker is running (1) or not (0).", "worker", running)
        restarts = {label: it.restarts for label, it in workers.items()}
        yield _counters("worker_restarts", "How often the worker was replaced.", "worker", restarts)
        seconds = {label: it.cpu_ns / 1e9 for label, it in workers.items()}
        yield _counters("worker_cpu_seconds", "Processor time used, its predecessors' included.", "worker", seconds)
        resident = {label: it.rss_bytes for label, it in workers.items()}
        yield _gauges("worker_resident_memory_bytes", "Resident memory of the worker.", "worker", resident)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"fastdist_{name}", help_text, value=value)


def _counters(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"fastdist_{name}", help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fastdist_{name}", help_text, value=value)


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"fastdist_{name}", help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    cumulative = histogram.cumulative()
    buckets = [(bound, cumulative[count - 1]) for bound, count in _BUCKETS]
    # Counted from the buckets, not read beside them: a scrape is never at odds with itself.
    family.add_metric(labels, [*buckets, ("+Inf", cumulative[-1])], histogram.sum_ns / 1e9)
