"""Metrics: a ``Snapshot`` in the text formats that Prometheus scrapes.

- Base units (seconds, bytes), and the names that the API promises; labels only where there is a sensible sum over them.
- Nothing is kept between scrapes: the shared block is the one place where things are counted.
- A scrape is answered in a worker's event loop, and nothing else is answered meanwhile. With a thousand analyzers it
  has 36,000 lines; each is one formatting here. (prometheus_client, whose parsers read in the tests what is written
  here, would take up to ten times as long.)
- A bucket's ``le`` is always an exact bound of the histograms in shared memory. Every octave of those is one bucket
  here, from 16 µs to 137 s; the eight steps of an octave would cost scrapers more than they show.
"""

from __future__ import annotations

import platform
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fastdist.shm.histograms import BOUNDS
from fastdist.shm.problems import KINDS, problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from fastdist.shm.histograms import Histogram
    from fastdist.shm.snapshot import Snapshot
    from fastdist.stream_figures import StreamFigures

    Sample = tuple[Mapping[str, str], float]  # labels and value

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# (a bound in seconds, how many of the buckets in shared memory are below it)
_BUCKETS = [(repr(2**octave / 1e9), BOUNDS.index(2**octave) + 1) for octave in range(14, 38)]
PUBLISH_RETRIES = {"noResponder": "no_responder", "unconfirmed": "unconfirmed", "refused": "refused"}
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
    for name, kind, help_text, samples in _families(snapshot):
        full = f"fastdist_{name}{_SUFFIXES.get(kind, '')}"
        parts.append(f"# HELP {full} {help_text}\n# TYPE {full} {'gauge' if kind == 'info' else kind}\n{samples}")
    return "".join(parts).encode()


def openmetrics(snapshot: Snapshot) -> bytes:
    """Return all metrics in the OpenMetrics format 1.0.0."""
    parts = []
    for name, kind, help_text, samples in _families(snapshot):
        parts.append(f"# HELP fastdist_{name} {help_text}\n# TYPE fastdist_{name} {kind}\n{samples}")
    return "".join([*parts, "# EOF\n"]).encode()


def _families(it: Snapshot) -> Iterator[Family]:
    """Yield all metric families, in the order they are written."""
    build = {"version": it.version, "python": platform.python_version()}
    yield _family("build", "info", "What is running; always 1.", [(build, 1)])
    yield _gauge("uptime_seconds", "How long the service has been running.", it.uptime)
    yield _gauge("ready", "Whether packets are taken (1) or not (0).", not it.obstacle)
    state = it.report.configuration
    help_text = "Whether the last reload, or else the start, has succeeded (1) or not (0)."
    yield _gauge("config_last_reload_successful", help_text, not state.faults)
    help_text = "When the configuration in force was read, as a Unix time."
    yield _gauge("config_last_reload_success_timestamp_seconds", help_text, state.success_ns / 1e9)
    counts = Counter(problem.code for problem in problems(it))
    help_text = "Problems that GET /health lists at present, by their code."
    yield _gauge("problems", help_text, {code: counts[code] for code in KINDS}, by="code")
    yield from _packets(it)
    yield from _dead_letters(it)
    yield from _queue(it)
    if it.stream is not None:
        yield from _stream(it, it.stream)
    yield from _analyzers(it)
    yield from _durations(it)
    yield from _workers(it)


def _packets(it: Snapshot) -> Iterator[Family]:
    yield _counter("packets_received", "Packets that emitters sent: accepted or rejected.", it.received)
    yield _counter("packets_accepted", "Packets that were stored and acknowledged.", it.accepted)
    yield _counter("packets_rejected", "Packets that were rejected.", it.rejected, by="reason")
    yield _counter("packets_recovered", "Packets found in the queue at the start.", it.total("recovered"))
    yield _counter("packets_spilled", "Packets that left a busy analyzer for another.", it.total("spilled"))
    yield _counter("packets_corrupt", "Damaged records found in the queue and skipped.", it.total("corrupt"))
    yield _counter("packets_lost", "Packets that were damaged in the queue while they waited.", it.total("lost"))
    yield _counter("packets_dead_lettered", "Packets given up and kept in a file.", it.dead_lettered, by="reason")
    requests = (
        ({"protocol": name, "code": str(status)}, count)
        for name, figures in it.protocols.items()
        for status, count in figures.statuses.items()
    )
    yield _family("requests", "counter", "Requests of log agents, by protocol and status.", requests)
    records = {name: figures.records for name, figures in it.protocols.items()}
    yield _counter("records", "Records of log agents that were accepted.", records, by="protocol")
    for unit, what in (("messages", "Log messages"), ("bytes", "Bytes of packet bodies")):
        accepted, delivered = it.total(f"{unit}_accepted"), it.total_of_analyzers(f"{unit}_delivered")
        yield _counter(f"{unit}_accepted", f"{what} in accepted packets.", accepted)
        yield _counter(f"{unit}_delivered", f"{what} in delivered packets.", delivered)


def _dead_letters(it: Snapshot) -> Iterator[Family]:
    report = it.dead_letters
    counts = dict.fromkeys([(reason, "") for reason in it.dead_lettered], 0)  # so that there is a 0 before the first
    counts |= {(each.reason, each.analyzer): each.packets for each in report.counts}
    samples = (({"reason": reason, "analyzer": analyzer}, packets) for (reason, analyzer), packets in counts.items())
    help_text = "Dead letters that are there now, by reason and by the analyzer that had them last."
    yield _family("dead_letter_packets", "gauge", help_text, samples)
    yield _gauge("dead_letter_bytes", "Bytes of the files of dead letters.", report.bytes)
    help_text = "Dead letters that were discarded because they were over a bound."
    yield _counter("dead_letter_packets_discarded", help_text, it.discarded, by="reason")
    for name, value, what in (("size", report.size, "can hold"), ("available", report.available, "has room for")):
        help_text = f"Bytes that the file system of the dead letters {what}."
        yield _gauge(f"dead_letter_filesystem_{name}_bytes", help_text, value)


def _queue(it: Snapshot) -> Iterator[Family]:
    yield _gauge("queue_packets", "Packets that wait to be sent.", it.queued)
    yield _gauge("queue_bytes", "Bytes of the queue in use, old rings included.", it.queue_bytes)
    yield _gauge("queue_capacity_bytes", "Bytes the queue can hold.", it.queue_capacity)
    yield _gauge("queue_oldest_age_seconds", "Age of the oldest packet; 0 when the queue is empty.", it.oldest_age)


def _stream(it: Snapshot, stream: StreamFigures) -> Iterator[Family]:
    packets = it.packets_per_message
    yield _gauge("stream_connected", "Whether a NATS server is connected (1) or not (0).", stream.connected)
    yield _gauge("stream_packets", "Packets in the stream, claimed or not.", round(stream.messages * packets))
    yield _gauge("stream_bytes", "Bytes of the stream in use.", stream.bytes)
    yield _gauge("stream_capacity_bytes", "Bytes that the stream can hold.", stream.capacity)
    unacknowledged = round(stream.in_flight * packets)
    yield _gauge("stream_unacknowledged_packets", "Packets claimed by any replica.", unacknowledged)
    yield _gauge("stream_dead_letters", "Dead letters in their stream.", stream.dead_letters)
    yield _gauge("stream_replicas_current", "Copies of the stream that have all of it.", stream.replicas_current)
    stored = _samples(stream.stored, "") if stream.at else []  # a jump from 0 would look like so many at a time
    yield _family("stream_stored", "counter", "Messages that were ever stored in the stream.", stored)
    yield _counter(
        "stream_redelivered", "Messages that were claimed here after another claim.", it.total("redelivered")
    )
    yield _counter("stream_reconnects", "Connections to NATS servers that were lost.", it.total("reconnects"))
    retries = {reason: it.total(f"publish_{field}") for reason, field in PUBLISH_RETRIES.items()}
    yield _counter("stream_publish_retries", "Messages that were sent again, by reason.", retries, by="reason")
    yield _counter("packets_duplicate", "Packets whose Idempotency-Key was known.", it.total("duplicates"))
    help_text = "Time from the sending of a message to the stream until its acknowledgement."
    yield _histograms("stream_publish_duration_seconds", help_text, [({}, it.publish)])


def _analyzers(it: Snapshot) -> Iterator[Family]:
    def values(attribute: str) -> dict[str, float]:
        return {figures.analyzer.id: getattr(figures, attribute) for figures in it.analyzers}

    for name, help_text in (
        ("delivered", "Packets that the analyzer has taken."),
        ("failed", "Packets that the analyzer did not take when they were sent."),
        ("retried", "Packets that were sent again after the analyzer did not take them."),
    ):
        yield _counter(f"packets_{name}", help_text, values(name), by="analyzer")
    for name, attribute, help_text in (
        ("inflight_packets", "in_flight", "Packets sent to the analyzer and not answered yet."),
        ("analyzer_up", "online", "Whether the analyzer is online (1) or offline (0)."),
        ("analyzer_probation", "on_probation", "Whether it gets one packet at a time (1) until it takes one."),
        ("analyzer_draining", "draining", "Whether the analyzer is set to drain (1): it gets no new packets."),
        ("analyzer_connections", "connections", "Open connections to the analyzer."),
        ("analyzer_target_share", "target_share", "The share (0 to 1) that its weight gives the analyzer."),
        ("analyzer_effective_share", "effective_share", "The share (0 to 1) of new packets it gets right now."),
        ("analyzer_actual_share", "actual_share", "The share (0 to 1) of all deliveries that it has taken."),
    ):
        yield _gauge(name, help_text, values(attribute), by="analyzer")
    yield _family(
        "tls_certificate_not_after_timestamp_seconds",
        "gauge",
        "When a certificate expires: own (shown to emitters), client (shown to the analyzer), analyzer (last seen).",
        (
            ({"certificate": kind} | ({"analyzer": analyzer} if analyzer else {}), ends)
            for kind, analyzer, ends in it.certificates
        ),
    )


def _durations(it: Snapshot) -> Iterator[Family]:
    yield _histograms(
        "ingest_duration_seconds",
        "Time from the end of a request's reading until its packet is safe and its response written.",
        [({}, it.ingest)],
    )
    help_text = "Time from a packet's acceptance to its first attempt."
    yield _histograms("queue_wait_duration_seconds", help_text, [({}, it.queue_wait)])
    yield _histograms(
        "delivery_duration_seconds",
        "Time from an attempt to the analyzer's response, for delivered packets.",
        (({"analyzer": figures.analyzer.id}, it.delivery([figures.slot])) for figures in it.analyzers),
    )


def _workers(it: Snapshot) -> Iterator[Family]:
    workers = {str(worker.id): worker for worker in it.workers}
    running = {label: worker.running for label, worker in workers.items()}
    yield _gauge("worker_up", "Whether the worker is running (1) or not (0).", running, by="worker")
    restarts = {label: worker.restarts for label, worker in workers.items()}
    yield _counter("worker_restarts", "How often the worker was replaced.", restarts, by="worker")
    seconds = {label: worker.cpu_ns / 1e9 for label, worker in workers.items()}
    yield _counter("worker_cpu_seconds", "Processor time used, its predecessors' included.", seconds, by="worker")
    resident = {label: worker.rss_bytes for label, worker in workers.items()}
    yield _gauge("worker_resident_memory_bytes", "Resident memory of the worker.", resident, by="worker")
    yield _histograms(
        "worker_loop_lag_seconds",
        "Longest time in each 20 ms for which the worker's event loop was busy with one thing.",
        (({"worker": label}, it.loop_lag(worker.id)) for label, worker in workers.items()),
    )


def _counter(name: str, help_text: str, values: float | Mapping[str, float], by: str = "") -> Family:
    return _family(name, "counter", help_text, _samples(values, by))


def _gauge(name: str, help_text: str, values: float | Mapping[str, float], by: str = "") -> Family:
    return _family(name, "gauge", help_text, _samples(values, by))


def _samples(values: float | Mapping[str, float], label: str) -> list[Sample]:
    """Return one sample, or one for each value of a label."""
    if isinstance(values, (int, float)):
        return [({}, values)]
    return [({label: key}, value) for key, value in values.items()]


def _family(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> Family:
    full = name + _SUFFIXES.get(kind, "")
    return Family(name, kind, help_text, "".join([_sample(full, labels, value) for labels, value in samples]))


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
