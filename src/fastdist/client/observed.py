"""What a distributor says of itself, as far as ``fastdist top`` shows it: /health, /stats, /queue and /analyzers.

Members that are not shown are passed over, so that servers of another version can be watched as well; one that is
missing is an error that names it.
"""

from __future__ import annotations

import msgspec


class _Answer(msgspec.Struct, frozen=True, rename="camel"):
    """Members are camelCase, attributes are not."""


class Running(_Answer, frozen=True):
    """Workers there are, and should be."""

    running: int
    configured: int


class Online(_Answer, frozen=True):
    """Analyzers that are online, and all."""

    online: int
    total: int


class Health(_Answer, frozen=True):
    """GET /health."""

    status: str
    version: str
    uptime_seconds: float
    workers: Running
    analyzers: Online
    storage: str = "ok"
    failing: list[str] = []


class Rates(_Answer, frozen=True):
    """Packets a second, over the last seconds."""

    accepted_per_second: float
    delivered_per_second: float


class Percentiles(_Answer, frozen=True):
    """Of durations, in milliseconds; None where there was none."""

    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None


class Latencies(_Answer, frozen=True):
    """Of accepting, waiting and delivering."""

    ingest: Percentiles
    queue_wait: Percentiles
    delivery: Percentiles


class Worker(_Answer, frozen=True):
    """A worker process; ``last_error`` is how the one before it ended."""

    id: int
    pid: int | None
    state: str
    restarts: int
    cpu_percent: float | None
    rss_bytes: int | None
    accepted: int
    delivered: int
    last_error: str | None = None


class Stats(_Answer, frozen=True):
    """GET /stats. ``packets`` and ``rejected`` are counts by their JSON names."""

    packets: dict[str, int]
    rejected: dict[str, int]
    rates: Rates
    latency_ms: Latencies
    workers: list[Worker]


class Queue(_Answer, frozen=True):
    """GET /queue."""

    packets: int
    bytes: int
    capacity_bytes: int
    in_flight: int
    oldest_age_seconds: float
    durability: str
    estimated_drain_seconds: float | None


class Probation(_Answer, frozen=True):
    """Of an analyzer whose deliveries have failed: it gets one packet at a time, the next one not before."""

    next_packet_in_seconds: float


class Analyzer(_Answer, frozen=True):
    """One of GET /analyzers."""

    id: str
    state: str
    target_share: float
    effective_share: float
    actual_share: float
    delivered: int
    failed: int
    retried: int
    in_flight: int
    last_error: str | None
    latency_ms: Percentiles
    paused_for_seconds: float | None = None
    probation: Probation | None = None

    @property
    def shown_state(self) -> str:
        """The state, or that it is online but on probation, or asks for a pause."""
        if self.state == "online" and self.probation:
            return "on trial"
        return "paused" if self.state == "online" and self.paused_for_seconds else self.state


class Analyzers(_Answer, frozen=True):
    """GET /analyzers."""

    analyzers: list[Analyzer]


class Answers(msgspec.Struct, frozen=True):
    """All of them, asked for one after another."""

    health: Health
    stats: Stats
    queue: Queue
    analyzers: list[Analyzer]
