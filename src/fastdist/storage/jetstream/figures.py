"""Figures of the stream, of all replicas together: asked of its leader once a second.

They also say whether it can store: there is a leader, and it is in touch with a majority.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from fastdist.storage.jetstream.api import ApiError, UnavailableError, request
from fastdist.storage.jetstream.connection import now
from fastdist.storage.jetstream.consumer import NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdist.storage.jetstream.connection import Connection

EVERY = 0.8  # seconds between two questions: figures are at most a second old
TIMEOUT = 0.8  # seconds for each
SILENT_NS = 3_000_000_000  # a copy that its leader has not seen for as long does not count


class Figures(Struct, frozen=True, kw_only=True):
    """The stream as it is. Counts are of messages, which may be bundles of packets.

    ``at``: time.monotonic() of the last answer, 0 if there was none. ``stored``: the last sequence, so all messages
    there ever were. ``queued``: claimed by no replica. ``in_flight``: claimed by some. ``settled``: gone from the
    stream since it was made, to measure rates by. ``oldest``: when the oldest message was stored (Unix time), or 0.
    """

    at: float = 0.0
    connected: bool = False
    has_leader: bool = False  # that sees a majority
    server: str = ""
    leader: str = ""
    stored: int = 0
    messages: int = 0
    bytes: int = 0
    capacity: int = 0
    queued: int = 0
    in_flight: int = 0
    redelivered: int = 0
    settled: int = 0
    oldest: float = 0.0
    dead_letters: int = 0
    replicas_current: int = 0
    replicas_total: int = 0
    error: str = ""  # why there are no newer figures


class Watcher:
    """Keeps ``latest`` current while ``run`` runs."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.latest = Figures()

    async def run(self) -> None:
        """Ask again and again; never ends."""
        while True:
            began = now()
            await self.refresh()
            await asyncio.sleep(max(0.05, EVERY - (now() - began)))

    async def refresh(self) -> Figures:
        """Ask now, and return the figures; where there is no answer, the old ones with the reason."""
        connection, settings = self.connection, self.connection.settings
        client = connection.client
        try:
            stream, consumer = await asyncio.gather(
                request(client, f"STREAM.INFO.{settings.stream}", timeout=TIMEOUT),
                request(client, f"CONSUMER.INFO.{settings.stream}.{NAME}", timeout=TIMEOUT),
            )
        except (UnavailableError, ApiError) as error:
            self.latest = replaced(
                self.latest, connected=client is not None, server=connection.server, has_leader=False, error=str(error)
            )
            return self.latest
        dead = self.latest.dead_letters
        with contextlib.suppress(UnavailableError, ApiError):
            answer = await request(client, f"STREAM.INFO.{settings.dead_stream}", timeout=TIMEOUT)
            dead = answer["state"]["messages"]
        self.latest = figures(stream, consumer, connection.server, dead)
        return self.latest


def replaced(old: Figures, **new: Any) -> Figures:
    """Return figures with some of them changed."""
    return Figures(**{name: getattr(old, name) for name in Figures.__struct_fields__} | new)


def figures(stream: Mapping[str, Any], consumer: Mapping[str, Any], server: str, dead_letters: int) -> Figures:
    """Return the figures that are in two answers of JetStream."""
    state, config, cluster = stream["state"], stream["config"], stream.get("cluster") or {}
    total = config["num_replicas"]
    others = cluster.get("replicas") or []
    current = 1 + sum(bool(other.get("current")) and not other.get("offline") for other in others)
    in_touch = 1 + sum(not other.get("offline") and other.get("active", 0) < SILENT_NS for other in others)
    messages, stored = state["messages"], state["last_seq"]
    return Figures(
        at=now(),
        connected=True,
        has_leader=(total == 1 or bool(cluster.get("leader"))) and 2 * in_touch > total,
        server=server,
        leader=cluster.get("leader", ""),
        stored=stored,
        messages=messages,
        bytes=state["bytes"],
        capacity=config["max_bytes"],
        queued=consumer.get("num_pending", 0),
        in_flight=consumer.get("num_ack_pending", 0),
        redelivered=consumer.get("num_redelivered", 0),
        settled=stored - messages,
        oldest=_unix_time(state.get("first_ts", "")) if messages else 0.0,
        dead_letters=dead_letters,
        replicas_current=current,
        replicas_total=total,
    )


def _unix_time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
