"""What is known of the stream that several services share as their queue; see ``storage.jetstream``."""

from __future__ import annotations

from msgspec import Struct

GONE = "gone"


class StreamFigures(Struct, frozen=True, kw_only=True):
    """The stream as it is. Counts are of messages, which may be bundles of packets.

    ``at``: time.monotonic() of the last question that was answered, 0 if none was. ``stored``: the last sequence, so
    all messages there ever were. ``queued``: claimed by no replica. ``in_flight``: claimed by some. ``settled``: gone
    from the stream since it was made. ``settled_per_second``: over the last seconds. ``oldest``: when the oldest
    message was stored (Unix time), or 0. ``replicas_current``: copies that have all of it, 0 without a leader.
    ``created``: when the stream was made, as the servers say it; GONE: it was deleted.
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
    wanted: int = 0  # requests for messages that are open: some replica has room
    redelivered: int = 0
    settled: int = 0
    settled_per_second: float = 0.0
    oldest: float = 0.0
    created: str = ""
    dead_letters: int = 0
    replicas_current: int = 0
    replicas_total: int = 0
    error: str = ""  # why there are no newer figures, or the stream cannot be used
