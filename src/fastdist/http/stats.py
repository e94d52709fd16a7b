"""What GET /health, /ready, /stats, /queue and /analyzers show, as plain dicts made from a ``Snapshot``.

Names are camelCase. Times are ISO 8601 in UTC, latencies milliseconds, shares fractions of 1. None stands for "never",
and for percentiles of nothing; a count, an age or a rate of nothing is 0.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastdist.shm.block import HUNG, AnalyzerWord, HeadWord
from fastdist.shm.snapshot import Snapshot

if TYPE_CHECKING:
    from fastdist.shm.snapshot import AnalyzerFigures, WorkerFigures

__all__ = ["Snapshot", "analyzers", "health", "queue", "ready", "stats"]


def health(snapshot: Snapshot) -> dict[str, Any]:
    """Return GET /health: whether all is there that should be."""
    workers, analyzers = snapshot.workers, snapshot.analyzers
    running = sum(worker.running for worker in workers)
    online = sum(figures.state == "online" for figures in analyzers)
    storing, failing = not any(worker.cannot_store for worker in workers), snapshot.failing
    complete = running == len(workers) and not any(figures.state == "offline" for figures in analyzers)
    return {
        "status": "unavailable" if online == 0 else "ok" if complete and storing and not failing else "degraded",
        "version": snapshot.version,
        "uptimeSeconds": round(snapshot.uptime, 3),
        "workers": {"running": running, "configured": len(workers)},
        "analyzers": {"online": online, "total": len(analyzers)},
        "storage": "ok" if storing else "failing",
        "failing": failing,
    }


def ready(snapshot: Snapshot) -> dict[str, Any]:
    """Return GET /ready: ``status``, and if it is not "ready", the ``detail`` that says why."""
    return {"status": "unready", "detail": snapshot.obstacle} if snapshot.obstacle else {"status": "ready"}


def stats(snapshot: Snapshot) -> dict[str, Any]:
    """Return GET /stats: what came in, what became of it, how fast, and who did it."""
    return {
        "uptimeSeconds": round(snapshot.uptime, 3),
        "packets": {
            "received": snapshot.received,
            "accepted": snapshot.accepted,
            "rejected": sum(snapshot.rejected.values()),
            "delivered": snapshot.delivered,
            "queued": snapshot.queued,
            "inFlight": snapshot.in_flight,
            "retried": snapshot.total("retried"),
            "spilled": snapshot.total("spilled"),
            "deadLettered": sum(snapshot.dead_lettered.values()),
            "recovered": snapshot.total("recovered"),
            "corrupt": snapshot.total("corrupt"),
        },
        "messages": _accepted_and_delivered(snapshot, "messages"),
        "bytes": _accepted_and_delivered(snapshot, "bytes"),
        "rejected": {_camel(reason): count for reason, count in snapshot.rejected.items()},
        "rates": {
            "acceptedPerSecond": round(snapshot.rates.accepted, 3),
            "deliveredPerSecond": round(snapshot.rates.delivered, 3),
        },
        "latencyMs": {
            "ingest": snapshot.ingest.milliseconds(),
            "queueWait": snapshot.queue_wait.milliseconds(),
            "delivery": snapshot.delivery().milliseconds(),
        },
        "analyzers": [_analyzer_in_short(figures) for figures in snapshot.analyzers],
        "workers": [_worker(snapshot, worker) for worker in snapshot.workers],
        "supervisor": {"pid": snapshot.block.head[HeadWord.SUPERVISOR]},
    }


def queue(snapshot: Snapshot) -> dict[str, Any]:
    """Return GET /queue: what waits, and when it will have gone if nothing more comes."""
    packets, rate = snapshot.queued, snapshot.rates.delivered
    drained_in = round(packets / rate, 3) if rate else None
    return {
        "packets": packets,
        "bytes": snapshot.total("queue_bytes"),
        "capacityBytes": snapshot.total("queue_capacity"),
        "inFlight": snapshot.in_flight,
        "oldestAgeSeconds": round(snapshot.oldest_age, 3),
        "durability": snapshot.config.queue.durability,
        "syncIntervalSeconds": snapshot.config.queue.sync_interval,
        "drainRatePerSecond": round(rate, 3),
        "estimatedDrainSeconds": drained_in if packets else 0.0,
        "workers": [
            {
                "id": worker.id,
                "packets": worker.queued,
                "bytes": worker.queue_bytes,
                "capacityBytes": worker.capacity_bytes,
                "oldestAgeSeconds": round(snapshot.age(worker.oldest_ns), 3),
            }
            for worker in snapshot.workers
        ],
    }


def analyzers(snapshot: Snapshot) -> dict[str, Any]:
    """Return GET /analyzers: all that is known of each."""
    return {"analyzers": [_analyzer(snapshot, figures) for figures in snapshot.analyzers]}


def analyzer(snapshot: Snapshot, name: str) -> dict[str, Any]:
    """Return all that is known of the analyzer with that id."""
    return next(_analyzer(snapshot, figures) for figures in snapshot.analyzers if figures.analyzer.id == name)


def _accepted_and_delivered(snapshot: Snapshot, unit: str) -> dict[str, int]:
    return {
        "accepted": snapshot.total(f"{unit}_accepted"),
        "delivered": snapshot.total_of_analyzers(f"{unit}_delivered"),
    }


def _worker(snapshot: Snapshot, worker: WorkerFigures) -> dict[str, Any]:
    return {
        "id": worker.id,
        "pid": worker.pid or None,
        "state": worker.state.name.lower(),
        "restarts": worker.restarts,
        "cpuPercent": worker.cpu_percent,
        "rssBytes": worker.rss_bytes,
        "accepted": worker.accepted,
        "delivered": worker.delivered,
        "loopLagMs": snapshot.loop_lag(worker.id).milliseconds(),
        "lastError": _end(worker.end_status) if worker.end_ns else None,
        "lastErrorAt": _iso(worker.end_ns),
    }


def _end(status: int) -> str:
    """Return how the process before a worker's present one ended."""
    if status == HUNG:
        return "it hung and was killed"
    if status < 0:
        names = {int(each): each.name for each in signal.Signals}
        return f"ended by signal {names.get(-status, -status)}"
    return f"ended with exit status {status}"


def _analyzer_in_short(figures: AnalyzerFigures) -> dict[str, Any]:
    return {
        "id": figures.analyzer.id,
        "state": figures.state,
        "targetShare": round(figures.target_share, 6),
        "actualShare": round(figures.actual_share, 6),
        "delivered": figures.delivered,
        "failed": figures.failed,
        "retried": figures.retried,
        "inFlight": figures.in_flight,
    }


def _analyzer(snapshot: Snapshot, figures: AnalyzerFigures) -> dict[str, Any]:
    def word(name: AnalyzerWord) -> int:
        return int(snapshot.block.analyzers.get(figures.slot, name))

    pause_ns = word(AnalyzerWord.PAUSED_UNTIL_NS) - snapshot.at
    trial_ns = word(AnalyzerWord.NEXT_TRIAL_NS) - snapshot.at
    return _analyzer_in_short(figures) | {
        "endpoint": figures.analyzer.endpoint,
        "weight": figures.weight,
        "override": _override(figures),
        "effectiveShare": round(figures.effective_share, 6),
        "since": _iso(word(AnalyzerWord.SINCE_NS)),
        "pausedForSeconds": round(pause_ns / 1e9, 3) if pause_ns > 0 else None,
        "probation": {"nextPacketInSeconds": round(max(trial_ns, 0) / 1e9, 3)} if figures.on_probation else None,
        "health": {
            "lastCheck": _iso(word(AnalyzerWord.LAST_CHECK_NS)),
            "lastStatus": word(AnalyzerWord.LAST_STATUS) or None,
            # Checks and deliveries are counted apart, and either row takes it offline: the longer one tells.
            "consecutiveFailures": max(word(AnalyzerWord.CHECK_FAILURES), word(AnalyzerWord.DELIVERY_FAILURES)),
            "consecutiveSuccesses": word(AnalyzerWord.CHECK_SUCCESSES),
        },
        "connections": figures.connections,
        "lastError": snapshot.block.analyzers.error(figures.slot) or None,
        "lastErrorAt": _iso(word(AnalyzerWord.ERROR_NS)),
        "latencyMs": snapshot.delivery([figures.slot]).milliseconds(),
    }


def _override(figures: AnalyzerFigures) -> dict[str, Any] | None:
    """Return what differs from the configuration because somebody said so while the service ran."""
    changed: dict[str, Any] = {"weight": figures.weight} if figures.weight_overridden else {}
    return changed | ({"state": "draining"} if figures.draining else {}) or None


def _iso(wall_ns: int) -> str | None:
    if wall_ns == 0:
        return None
    return datetime.fromtimestamp(wall_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))
