"""What GET /metrics tells of a stream that replicas share, without NATS servers."""

from __future__ import annotations

import os

from fastdist.http import metrics
from fastdist.settings import Config, Queue
from fastdist.shm.block import SharedBlock
from fastdist.shm.snapshot import Snapshot
from fastdist.stream_figures import StreamFigures

FIGURES = StreamFigures(
    at=1.0,
    connected=True,
    has_leader=True,
    stored=1000,
    messages=16,
    bytes=5424,
    capacity=1 << 30,
    queued=12,
    in_flight=4,
    dead_letters=1,
    replicas_current=3,
    replicas_total=3,
)


def stream_exposition() -> str:
    """Return all metrics of a replica."""
    config = Config(queue=Queue(backend="jetstream"))
    block = SharedBlock.create(1, 8)
    os.close(block.fd)
    block.stream = FIGURES
    return metrics.text(Snapshot(block, config, dict(enumerate(config.analyzers)), "1")).decode()
