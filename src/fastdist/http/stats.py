"""What GET /health, /stats, /queue and /analyzers show, made from a ``Snapshot``: see ``models`` for what it means.

Times are ISO 8601 in UTC, latencies milliseconds, shares fractions of 1. None stands for "never", and for percentiles
of nothing; a count, an age or a rate of nothing is 0.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from fastdist.http import models
from fastdist.shm.block import AnalyzerWord, HeadWord
from fastdist.shm.problems import problems, status

if TYPE_CHECKING:
    from msgspec import UnsetType

    from fastdist.shm.figures import AnalyzerFigures, WorkerFigures
    from fastdist.shm.histograms import Histogram
    from fastdist.shm.snapshot import Snapshot


def health(snapshot: Snapshot) -> models.Health:
    """Return GET /health."""
    workers, analyzers = snapshot.workers, snapshot.analyzers
    running = sum(worker.running for worker in workers)
    online = sum(figures.state == "online" for figures in analyzers)
    storage_error, found = snapshot.storage_error, problems(snapshot)
    return models.Health(
        status=status(found),
        version=snapshot.version,
        uptime_seconds=round(snapshot.uptime, 3),
        workers=models.RunningWorkers(running=running, configured=len(workers)),
        analyzers=models.OnlineAnalyzers(online=online, total=len(analyzers)),
        storage="failing" if storage_error else "ok",
        storage_error=storage_error or UNSET,
        durability=_durability(snapshot),
        sync_interval_seconds=snapshot.config.queue.sync_interval,
        failing=snapshot.failing,
        problems=[
            models.ListedProblem(
                code=each.code,
                level=each.level,
                since=_iso(each.since_ns) or "",
                subject=each.subject,
                detail=each.detail,
            )
            for each in found
        ],
        dead_letters=_dead_letters_in_short(snapshot),
    )


def _durability(snapshot: Snapshot) -> str:
    return snapshot.config.queue.durability if snapshot.stream is None else "replicated"


def _dead_letters_in_short(snapshot: Snapshot) -> models.DeadLettersInShort:
    report = snapshot.dead_letters
    return models.DeadLettersInShort(
        packets=report.packets,
        bytes=report.bytes,
        file_system_used=round(report.used, 3) if report.size else None,
        warning=report.warning or UNSET,
    )


def dead_letters(snapshot: Snapshot) -> models.LastDeadLetters:
    """Return GET /dead-letters."""
    last = [models.DescribedDeadLetter(**msgspec.structs.asdict(each)) for each in snapshot.dead_letters.last]
    return models.LastDeadLetters(**_dead_letters(snapshot), last=last)


def _dead_letters(snapshot: Snapshot) -> dict[str, Any]:
    """Return the members of ``DeadLetters``."""
    report = snapshot.dead_letters
    return {
        "packets": report.packets,
        "bytes": report.bytes,
        "files": report.files,
        "counts": [
            models.DeadLetterCount(reason=each.reason, analyzer=each.analyzer or None, packets=each.packets)
            for each in report.counts
        ],
        "discarded": models.Discarded(**snapshot.discarded),
    }


def stats(snapshot: Snapshot) -> models.Stats:
    """Return GET /stats."""
    return models.Stats(
        uptime_seconds=round(snapshot.uptime, 3),
        packets=models.Packets(
            received=snapshot.received,
            accepted=snapshot.accepted,
            rejected=sum(snapshot.rejected.values()),
            delivered=snapshot.delivered,
            queued=snapshot.queued,
            in_flight=snapshot.in_flight,
            retried=snapshot.total("retried"),
            spilled=snapshot.total("spilled"),
            dead_lettered=sum(snapshot.dead_lettered.values()),
            recovered=snapshot.total("recovered"),
            corrupt=snapshot.total("corrupt"),
            lost=snapshot.total("lost"),
            duplicates=snapshot.total("duplicates") if snapshot.stream is not None else UNSET,
        ),
        stream=_stream(snapshot),
        messages=_in_and_out(snapshot, "messages"),
        bytes=_in_and_out(snapshot, "bytes"),
        rejected=models.Rejected(**snapshot.rejected),
        protocols={
            name: models.ProtocolCounts(requests=counts.requests, records=counts.records, refused=counts.refused)
            for name, counts in snapshot.protocols.items()
        },
        dead_letters=models.DeadLetters(**_dead_letters(snapshot)),
        rates=models.Rates(
            accepted_per_second=round(snapshot.rates.accepted, 3),
            delivered_per_second=round(snapshot.rates.delivered, 3),
        ),
        latency_ms=models.Latencies(
            ingest=_percentiles(snapshot.ingest),
            queue_wait=_percentiles(snapshot.queue_wait),
            delivery=_percentiles(snapshot.delivery()),
        ),
        analyzers=[models.AnalyzerInShort(**_in_short(figures)) for figures in snapshot.analyzers],
        workers=[_worker(snapshot, worker) for worker in snapshot.workers],
        supervisor=models.Supervisor(pid=snapshot.block.head[HeadWord.SUPERVISOR]),
        configuration=_configuration(snapshot),
    )


def _stream(snapshot: Snapshot) -> models.Stream | UnsetType:
    it = snapshot.stream
    if it is None:
        return UNSET
    return models.Stream(
        name=snapshot.config.jetstream.stream,
        connected=it.connected,
        stored=it.stored,
        queued=it.queued,
        in_flight=it.in_flight,
        bytes=it.bytes,
        capacity_bytes=it.capacity,
        dead_letters=it.dead_letters,
        server=it.server or None,
        leader=it.leader or None,
        replicas=models.Replicas(current=it.replicas_current, total=it.replicas_total),
    )


def queue(snapshot: Snapshot) -> models.Queue:
    """Return GET /queue."""
    packets, rate, config = snapshot.queued, snapshot.drain_rate, snapshot.config.queue
    drained_in = round(packets / rate, 3) if rate else None
    return models.Queue(
        backend=config.backend,
        packets=packets,
        bytes=snapshot.queue_bytes,
        capacity_bytes=snapshot.queue_capacity,
        full=any(worker.lacking for worker in snapshot.workers),
        in_flight=snapshot.in_flight,
        oldest_age_seconds=round(snapshot.oldest_age, 3),
        durability=_durability(snapshot),
        sync_interval_seconds=config.sync_interval,
        drain_rate_per_second=round(rate, 3),
        estimated_drain_seconds=drained_in if packets else 0.0,
        workers=[
            models.WorkerQueue(
                id=worker.id,
                packets=worker.queued,
                bytes=worker.queue_bytes,
                capacity_bytes=worker.capacity_bytes,
                full=bool(worker.lacking),
                oldest_age_seconds=round(snapshot.age(worker.oldest_ns), 3),
            )
            for worker in snapshot.workers
        ]
        if snapshot.stream is None
        else [],
    )


def analyzers(snapshot: Snapshot) -> models.Analyzers:
    """Return GET /analyzers."""
    return models.Analyzers(analyzers=[_analyzer(snapshot, figures) for figures in snapshot.analyzers])


def analyzer(snapshot: Snapshot, name: str) -> models.Analyzer | None:
    """Return all that is known of the analyzer with that id; None if it does not exist."""
    found = (_analyzer(snapshot, figures) for figures in snapshot.analyzers if figures.analyzer.id == name)
    return next(found, None)


def _configuration(snapshot: Snapshot) -> models.ConfigurationState:
    state = snapshot.report.configuration
    return models.ConfigurationState(
        file=state.file or None,
        last_reload_at=_iso(state.attempt_ns),
        last_reload_successful=not state.faults,
        last_success_at=_iso(state.success_ns),
        errors=[
            models.FieldError(
                pointer=each.pointer, detail=each.detail, file=each.file or UNSET, line=each.line or UNSET
            )
            for each in state.faults
        ],
        needs_restart=state.needs_restart,
        masked=state.masked,
    )


def _in_and_out(snapshot: Snapshot, unit: str) -> models.InAndOut:
    return models.InAndOut(
        accepted=snapshot.total(f"{unit}_accepted"),
        delivered=snapshot.total_of_analyzers(f"{unit}_delivered"),
    )


def _percentiles(histogram: Histogram) -> models.Percentiles:
    return models.Percentiles(**histogram.milliseconds())


def _worker(snapshot: Snapshot, worker: WorkerFigures) -> models.Worker:
    return models.Worker(
        id=worker.id,
        pid=worker.pid or None,
        state=worker.state.name.lower(),
        restarts=worker.restarts,
        cpu_percent=worker.cpu_percent,
        rss_bytes=worker.rss_bytes,
        accepted=worker.accepted,
        delivered=worker.delivered,
        loop_lag_ms=_percentiles(snapshot.loop_lag(worker.id)),
        last_error=worker.ended or None,
        last_error_at=_iso(worker.end_ns),
    )


def _in_short(figures: AnalyzerFigures) -> dict[str, Any]:
    """Return the members of an ``AnalyzerInShort``."""
    return {
        "id": figures.analyzer.id,
        "state": figures.state,
        "target_share": round(figures.target_share, 6),
        "actual_share": round(figures.actual_share, 6),
        "delivered": figures.delivered,
        "failed": figures.failed,
        "retried": figures.retried,
        "in_flight": figures.in_flight,
    }


def _analyzer(snapshot: Snapshot, figures: AnalyzerFigures) -> models.Analyzer:
    def word(name: AnalyzerWord) -> int:
        return int(snapshot.block.analyzers.get(figures.slot, name))

    pause_ns = word(AnalyzerWord.PAUSED_UNTIL_NS) - snapshot.at
    trial_ns = word(AnalyzerWord.NEXT_TRIAL_NS) - snapshot.at
    probation = models.Probation(next_packet_in_seconds=round(max(trial_ns, 0) / 1e9, 3))
    return models.Analyzer(
        **_in_short(figures),
        endpoint=figures.analyzer.shown_endpoint,
        weight=figures.weight,
        override=_override(figures),
        effective_share=round(figures.effective_share, 6),
        since=_iso(word(AnalyzerWord.SINCE_NS)),
        paused_for_seconds=round(pause_ns / 1e9, 3) if pause_ns > 0 else None,
        probation=probation if figures.on_probation else None,
        health=models.Checks(
            last_check=_iso(word(AnalyzerWord.LAST_CHECK_NS)),
            last_status=word(AnalyzerWord.LAST_STATUS) or None,
            # Checks and deliveries are counted apart, and either row takes it offline: the longer one is shown.
            consecutive_failures=max(word(AnalyzerWord.CHECK_FAILURES), word(AnalyzerWord.DELIVERY_FAILURES)),
            consecutive_successes=word(AnalyzerWord.CHECK_SUCCESSES),
        ),
        connections=figures.connections,
        last_error=snapshot.block.analyzers.error(figures.slot) or None,
        last_error_at=_iso(word(AnalyzerWord.ERROR_NS)),
        latency_ms=_percentiles(snapshot.delivery([figures.slot])),
    )


def _override(figures: AnalyzerFigures) -> models.Override | None:
    if not (figures.weight_overridden or figures.draining):
        return None
    return models.Override(
        weight=figures.weight if figures.weight_overridden else UNSET,
        state="draining" if figures.draining else UNSET,
    )


def _iso(wall_ns: int) -> str | None:
    if wall_ns == 0:
        return None
    return datetime.fromtimestamp(wall_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
