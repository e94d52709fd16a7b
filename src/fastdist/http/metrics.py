"""Metrics: a ``Snapshot`` in the text formats that Prometheus scrapes.

- Base units (seconds, bytes), and the names that the API promises; labels only where there is a sensible sum over them.
- Nothing is kept between scrapes: the shared block is the one place where things are counted.
- A scrape is answered in a worker's event loop, and nothing else is answered meanwhile. With a thousand analyzers it
  has 36,000 lines; each is one formatting here. (prometheus_client, whose parsers read in the tests what is written
  here, would take up to ten times as long.)
- A bucket's ``le`` is always an exact bound of the histograms in shared memory. Every octave of those is one bucket
  here, from 16 µs to 137 s; the eight steps of an octave would cost scrapers more than they tell.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fastdist.shm.histograms import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from fastdist.shm.histograms import Histogram
    from fastdist.shm.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# (a bound in seconds, how many of the buckets in shared memory are below it)
_BUCKETS = [(repr(2**octave / 1e9), BOUNDS.index(2**octave) + 1) for octave in range(14, 38)]
_SUFFIXES = {"counter": "_total", "info": "_info"}  # which a family's samples have, and in 0.0.4 the family as well
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class Family(NamedTuple):
    """A metric family: its name without "fastdist_", its kind as OpenMetrics has it, and its samples as text."""

    name: str
    kind: str
    help_text: str
    samples: str


def text(snapshot: Snapshot) -> bytes:
    """Return all metrics in the text format 0.0.4, which every scraper reads."""
    parts = []
    for name, kind, help_text, samples in _Metrics(snapshot).collect():
        full = f"fastdist_{name}{_SUFFIXES.get(kind, '')}"
        parts.append(f"# HELP {full} {help_text}\n# TYPE {full} {'gauge' if kind == 'info' else kind}\n{samples}")
    return "".join(parts).encode()


def openmetrics(snapshot: Snapshot) -> bytes:
    """Return all metrics in the OpenMetrics format 1.0.0."""
    parts = []
    for name, kind, help_text, samples in _Metrics(snapshot).collect():
        parts.append(f"# HELP fastdist_{name} {help_text}\n# TYPE fastdist_{name} {kind}\n{samples}")
    return "".join([*parts, "# EOF\n"]).encode()


class _Metrics:
    """The metric families of one snapshot, in the order they are written."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def collect(self) -> Iterator[Family]:
        """Yield every family."""
        build = {"version": self.snapshot.version, "python": platform.python_version()}
        yield Family("build", "info", "What is running; always 1.", _sample("build_info", build, 1))
        yield _gauge("uptime_seconds", "How long the service has been running.", self.snapshot.uptime)
        yield _gauge("ready", "Whether packets are taken (1) or not (0).", not self.snapshot.obstacle)
        yield from self.packets()
        yield from self.queue()
        yield from self.analyzers()
        yield from self.durations()
        yield from self.workers()

    def packets(self) -> Iterator[Family]:
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

    def queue(self) -> Iterator[Family]:
        """Yield what waits."""
        it = self.snapshot
        yield _gauge("queue_packets", "Packets that wait to be sent.", it.queued)
        yield _gauge("queue_bytes", "Bytes of the queue in use.", it.total("queue_bytes"))
        yield _gauge("queue_capacity_bytes", "Bytes the queue can hold.", it.total("queue_capacity"))
        yield _gauge("queue_oldest_age_seconds", "Age of the oldest packet; 0 when there is none.", it.oldest_age)

    def analyzers(self) -> Iterator[Family]:
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
            (
                "analyzer_probation",
                "on_probation",
                "Whether the analyzer gets one packet at a time (1) until it takes one.",
            ),
            ("analyzer_draining", "draining", "Whether the analyzer is told to drain (1): it gets no new packets."),
            ("analyzer_connections", "connections", "Open connections to the analyzer."),
            ("analyzer_target_share", "target_share", "The share (0 to 1) that its weight gives the analyzer."),
            ("analyzer_effective_share", "effective_share", "The share (0 to 1) of new packets it gets right now."),
            ("analyzer_actual_share", "actual_share", "The share (0 to 1) of all deliveries that it has taken."),
        ):
            values = {label: getattr(it, attribute) for label, it in figures.items()}
            yield _gauges(name, help_text, "analyzer", values)

    def durations(self) -> Iterator[Family]:
        """Yield the histograms."""
        yield _histograms(
            "ingest_duration_seconds",
            "Time from the end of a request's reading until its packet is safe and its answer written.",
            [({}, self.snapshot.ingest)],
        )
        yield _histograms(
            "queue_wait_duration_seconds",
            "Time from a packet's acceptance to its first sending.",
            [({}, self.snapshot.queue_wait)],
        )
        yield _histograms(
            "delivery_duration_seconds",
            "Time from a packet's sending to the analyzer's answer, for delivered packets.",
            (({"analyzer": it.analyzer.id}, self.snapshot.delivery([it.slot])) for it in self.snapshot.analyzers),
        )

    def workers(self) -> Iterator[Family]:
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
        yield _histograms(
            "worker_loop_lag_seconds",
            "Longest time in each 20 ms for which the worker's event loop let nothing else have its turn.",
            (({"worker": label}, self.snapshot.loop_lag(it.id)) for label, it in workers.items()),
        )


def _counter(name: str, help_text: str, value: float) -> Family:
    return Family(name, "counter", help_text, _sample(f"{name}_total", {}, value))


def _counters(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Family:
    samples = (_sample(f"{name}_total", {label: key}, value) for key, value in values.items())
    return Family(name, "counter", help_text, "".join(samples))


def _gauge(name: str, help_text: str, value: float) -> Family:
    return Family(name, "gauge", help_text, _sample(name, {}, value))


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Family:
    return Family(
        name, "gauge", help_text, "".join(_sample(name, {label: key}, value) for key, value in values.items())
    )


def _histograms(name: str, help_text: str, histograms: Iterable[tuple[Mapping[str, str], Histogram]]) -> Family:
    return Family(name, "histogram", help_text, "".join(_histogram(name, *each) for each in histograms))


def _histogram(name: str, labels: Mapping[str, str], histogram: Histogram) -> str:
    cumulative = histogram.cumulative()
    count = cumulative[-1]  # counted from the buckets, not read beside them: a scrape is never at odds with itself
    bucket = f"fastdist_{name}_bucket{{{_labels(labels)}{',' if labels else ''}le="
    lines = [f'{bucket}"{bound}"}} {cumulative[below - 1]}\n' for bound, below in _BUCKETS]
    lines.append(f'{bucket}"+Inf"}} {count}\n')
    lines.append(_sample(f"{name}_count", labels, count))
    lines.append(_sample(f"{name}_sum", labels, histogram.sum_ns / 1e9))
    return "".join(lines)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    in_braces = f"{{{_labels(labels)}}}" if labels else ""
    return f"fastdist_{name}{in_braces} {+value}\n"  # +: of a bool, the number


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in labels.items()])


@lru_cache(4096)
def _escaped(value: str) -> str:
    return value.translate(_ESCAPES)
