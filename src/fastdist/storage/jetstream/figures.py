"""Figures of the stream, of all replicas together: asked of its leader once a second.

They also say whether it can store: there is a leader, and it is in touch with a majority.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from fastdist.storage.jetstream.api import STREAM_NOT_FOUND, ApiError, UnavailableError, parse_time, request
from fastdist.storage.jetstream.connection import now
from fastdist.storage.jetstream.consumer import NAME
from fastdist.stream_figures import GONE, StreamFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastdist.storage.jetstream.connection import Connection

EVERY = 0.8  # seconds between two questions: figures are at most a second old
TIMEOUT = 0.8  # seconds for each
RATE_WINDOW = 10.0  # seconds
SILENT_NS = 3_000_000_000  # a copy that its leader has not seen for as long does not count


class Watcher:
    """Keeps ``latest`` current while ``run`` runs."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.latest = StreamFigures()
        self._consumer: dict[str, Any] | ApiError = {}  # what was last said of it
        self._dead = 0  # dead letters
        self._settled: deque[tuple[float, int]] = deque()  # (when, how many by then), of the last RATE_WINDOW seconds

    async def run(self, changed: Callable[[StreamFigures], object] = lambda _: None) -> None:
        """Ask again and again, and tell what it is told; never ends."""
        while True:
            began = now()
            changed(await self.refresh())
            await asyncio.sleep(max(0.05, EVERY - (now() - began)))

    def _rate(self, settled: int) -> float:
        """Return how many messages were settled a second."""
        moment = now()
        samples = self._settled
        if samples and samples[-1][1] > settled:  # another stream
            samples.clear()
        samples.append((moment, settled))
        while moment - samples[0][0] > RATE_WINDOW:
            samples.popleft()
        since, before = samples[0]
        return (settled - before) / (moment - since) if moment > since else 0.0

    async def refresh(self) -> StreamFigures:
        """Ask now, and return the figures; where there is no response, the old ones with the reason."""
        connection, settings = self.connection, self.connection.settings
        client, asked = connection.client, now()
        stream, consumer, dead = await asyncio.gather(
            self._info(f"STREAM.INFO.{settings.stream}"),
            self._info(f"CONSUMER.INFO.{settings.stream}.{NAME}"),
            self._info(f"STREAM.INFO.{settings.dead_stream}"),
        )
        # Neither of these keeps packets from being stored while it elects a leader.
        self._consumer = self._consumer if isinstance(consumer, UnavailableError) else consumer
        self._dead = self._dead if isinstance(dead, Exception) else dead["state"]["messages"]
        fault = stream if isinstance(stream, Exception) else self._consumer
        if isinstance(stream, Exception) or isinstance(fault, Exception):
            gone = isinstance(stream, ApiError) and stream.code == STREAM_NOT_FOUND
            self.latest = msgspec.structs.replace(
                self.latest,
                created=GONE if gone else self.latest.created,
                connected=client is not None,
                server=connection.server,
                has_leader=False,
                replicas_current=0,
                error=str(fault),
            )
            return self.latest
        found = figures(stream, fault, connection.server, self._dead)
        if fault is not consumer:  # what was said of it is old: all that is there waits, but for what was claimed then
            in_flight = min(found.in_flight, found.messages)
            found = msgspec.structs.replace(found, queued=found.messages - in_flight, in_flight=in_flight)
        self.latest = msgspec.structs.replace(found, at=asked, settled_per_second=self._rate(found.settled))
        return self.latest

    async def _info(self, subject: str) -> dict[str, Any] | UnavailableError | ApiError:
        try:
            return await request(self.connection.client, subject, timeout=TIMEOUT)
        except (UnavailableError, ApiError) as error:
            return error


def figures(stream: Mapping[str, Any], consumer: Mapping[str, Any], server: str, dead_letters: int) -> StreamFigures:
    """Return the figures that are in two responses of JetStream."""
    state, config, cluster = stream["state"], stream["config"], stream.get("cluster") or {}
    total = config["num_replicas"]
    others = cluster.get("replicas") or []
    seen = [other for other in others if not other.get("offline") and other.get("active", 0) < SILENT_NS]
    current, in_touch = 1 + sum(bool(other.get("current")) for other in seen), 1 + len(seen)
    has_leader = (total == 1 or bool(cluster.get("leader"))) and 2 * in_touch > total
    messages, stored = state["messages"], state["last_seq"]
    return StreamFigures(
        connected=True,
        has_leader=has_leader,
        server=server,
        leader=cluster.get("leader", ""),
        stored=stored,
        messages=messages,
        bytes=state["bytes"],
        capacity=config["max_bytes"],
        queued=consumer.get("num_pending", 0),
        in_flight=consumer.get("num_ack_pending", 0),
        wanted=consumer.get("num_waiting", 0),
        redelivered=consumer.get("num_redelivered", 0),
        settled=stored - messages,
        created=stream.get("created", ""),
        oldest=parse_time(state.get("first_ts", "")).timestamp() if messages else 0.0,
        dead_letters=dead_letters,
        replicas_current=current if has_leader else 0,  # none, as far as can be known
        replicas_total=total,
    )
