"""Stores messages in a stream, each with one of three outcomes that a caller can rely on.

- *yes*: the stream has acknowledged it, with its sequence.
- *no*: it was never sent, or each time it was, it was refused. It is not in the stream and will not be.
- *unknown*: it was sent and not acknowledged. It may be in the stream.

Until ``timeout`` is over a message is sent again, always under its own id, so that the stream has it once: when there
is no acknowledgement in a second, when the stream has no leader, when the connection was lost. All replies come to one
inbox, under the message's number. A message that was given up while its bytes were still ours takes the connection
with it, so that they are never sent.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING, Literal

import msgspec
from nats.errors import Error as NatsError

from fastdist import logs
from fastdist.storage.jetstream import api
from fastdist.storage.jetstream.client import status_of
from fastdist.storage.jetstream.connection import forever, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.storage.jetstream.client import Client
    from fastdist.storage.jetstream.connection import Connection

LIMIT = 512  # messages under way
BYTES = 64 << 20  # of those
ACK_TIMEOUT = 1.0  # seconds; acknowledgements do get lost
FIRST_PAUSE, LAST_PAUSE = 0.05, 0.8  # seconds before a message that was refused is sent again, doubling
SWEEP = 0.05  # seconds between looks at what is due
HEADERS_BYTES = len(b"NATS/1.0\r\nNats-Msg-Id: \r\n\r\n")
RECORD_BYTES = 34  # that a message takes in the servers' files besides subject, headers and data (filestore.go)

log = logs.get()

Stored = Literal["yes", "no", "unknown"]
Reason = Literal["", "queueFull", "storage", "unconfirmed", "tooLarge"]


class Outcome(msgspec.Struct, frozen=True):
    """What became of a message; ``reason`` if it is not stored, and ``detail`` for people."""

    stored: Stored
    sequence: int = 0
    duplicate: bool = False  # it was in the stream before: another's, under the same id
    reason: Reason = ""
    detail: str = ""


class _Entry:
    """A message on its way."""

    __slots__ = (
        "answered",
        "client",
        "deadline",
        "done",
        "due",
        "floor",
        "message",
        "message_id",
        "number",
        "over",
        "pause",
        "reason",
        "refused",
        "sent",
        "size",
    )

    def __init__(
        self, number: int, message: bytes, message_id: str, deadline: float, done: Callable[[Outcome], None]
    ) -> None:
        self.number, self.message, self.message_id, self.done = str(number), message, message_id, done
        self.size = len(message) + HEADERS_BYTES + len(message_id)
        self.deadline = deadline
        self.over = False
        self.client: Client | None = None  # that has sent it last
        self.sent = 0  # how often
        self.answered = 0  # of those; what was not may be stored
        self.refused = 0  # of those
        self.due = 0.0  # when to send it (again)
        self.pause = FIRST_PAUSE
        self.floor = 0  # the last sequence known when it was sent first
        self.reason = ""


class Publisher:
    """Publishes to one subject of one stream; a part of a connection (before that is started)."""

    def __init__(self, connection: Connection, stream: str, subject: str, timeout: float) -> None:
        self.connection, self.stream, self.subject, self.timeout = connection, stream, subject, timeout
        self.retries: dict[str, int] = {}  # {why: how often a message was sent again}
        self.refusal: Reason = ""  # why the last message was not stored, if it was not
        self.refused_at = 0.0  # when that was (time.monotonic())
        self.refused_bytes = 0  # that the message would have taken in the stream
        self.stored_at = 0.0  # when the last one was stored
        self.capacity = 0  # bytes of the stream, if they are known
        self._numbers = itertools.count()
        self._under_way: dict[str, _Entry] = {}
        self._bytes = 0
        self._waiting: deque[_Entry] = deque()
        self._latest = 0  # sequence
        self._inbox = ""
        self._client: Client | None = None
        self._sweeper: asyncio.Task[None] | None = None
        connection.add(self)

    @property
    def under_way(self) -> int:
        """How many messages were sent and have no outcome yet."""
        return len(self._under_way)

    @property
    def waiting(self) -> int:
        """How many messages wait until others have their outcome."""
        return len(self._waiting)

    async def publish(self, message: bytes, message_id: str) -> Outcome:
        """Store a message; return what became of it. See ``store``."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        entry = self.store(message, message_id, done)
        try:
            return await future
        finally:
            entry.over = True
            self._forget(entry)

    def store(self, message: bytes, message_id: str, done: Callable[[Outcome], None], waited: float = 0.0) -> _Entry:
        """Store a message, once for each id within the stream's window; ``done(outcome)`` says what became of it.

        That takes as long as the timeout at most, less what it has ``waited`` already (seconds). ``message_id``:
        printable ASCII.
        """
        entry = _Entry(next(self._numbers), message, message_id, now() + self.timeout - waited, done)
        if waited >= self.timeout:
            self._settle(entry, Outcome("no", reason="storage", detail=self._why(None)))
            return entry
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = forever(self._sweep)
        if self._waiting or not self._has_room(entry):
            self._waiting.append(entry)
        else:
            self._begin(entry)
        return entry

    def _has_room(self, entry: _Entry) -> bool:
        under_way = self._under_way
        return not under_way or (len(under_way) < LIMIT and self._bytes + entry.size <= BYTES)

    def _begin(self, entry: _Entry) -> None:
        self._under_way[entry.number] = entry
        self._bytes += entry.size
        entry.floor = self._latest
        self._send(entry)

    def _send(self, entry: _Entry) -> None:
        client = self._client
        if client is None:
            entry.due = float("inf")  # until there is a connection
            return
        if entry.size > client.max_payload:
            detail = f"over the server's max_payload, {client.max_payload} B"
            self._give_up(entry, "tooLarge", detail)  # it may be stored: the server before took larger ones
            return
        if entry.sent:
            why = entry.reason or "unconfirmed"
            self.retries[why] = self.retries.get(why, 0) + 1
        entry.sent += 1
        entry.client = client
        entry.reason = ""
        entry.due = now() + ACK_TIMEOUT
        try:
            client.send(self.subject, entry.message, f"{self._inbox}.{entry.number}", entry.message_id)
        except NatsError:  # the client has ended, and the next one is due soon
            entry.sent -= 1
            entry.due = now() + FIRST_PAUSE

    # ---- replies

    def connected(self, client: Client) -> None:
        """Take replies on a new client, and send again what is under way."""
        self._inbox = client.new_inbox()
        client.take(f"{self._inbox}.*", self._replied)
        self._client = client
        for entry in list(self._under_way.values()):
            self._send(entry)
        self._fill()

    def lost(self) -> None:
        """Wait for the next client."""
        self._client = None

    def _replied(self, subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        entry = self._under_way.get(subject[len(self._inbox) + 1 :])
        if entry is None:  # it has its outcome
            return
        if headers and status_of(headers) == "503":
            entry.answered += 1
            self._refuse(entry, "noResponder")
            return
        try:
            ack = api.read_ack(data)
        except msgspec.MsgspecError:
            return  # what answers there is not JetStream; the stream's own may still come
        if ack.error is not None:
            self._judge(entry, ack.error)
        elif ack.stream == self.stream and ack.seq:
            # Another's, unless it may be one of our own that was not answered, and is not older than that.
            duplicate = ack.duplicate and (entry.sent - entry.answered <= 1 or ack.seq <= entry.floor)
            self._latest = max(self._latest, ack.seq)
            self._settle(entry, Outcome("yes", ack.seq, duplicate))
        if self._waiting:
            self._fill()

    def _judge(self, entry: _Entry, fault: api.Fault) -> None:
        """Act on an error of the stream's."""
        entry.answered += 1
        if fault.err_code == api.STORE_FAILED and "maximum" in fault.description:
            entry.refused += 1
            if 0 < self.capacity < self._stored_bytes(entry):
                self._give_up(entry, "tooLarge", f"over jetstream.max_bytes, {self.capacity} B")
            else:
                self._give_up(entry, "queueFull", fault.description)
        elif fault.err_code == api.MESSAGE_TOO_LARGE:
            entry.refused += 1
            self._give_up(entry, "tooLarge", fault.description)
        elif fault.err_code == api.DUPLICATE_IN_PROCESS:
            entry.due = now() + FIRST_PAUSE  # not a refusal: that one may be stored
        else:
            self._refuse(entry, f"error{fault.err_code}")

    def _refuse(self, entry: _Entry, reason: str) -> None:
        """Send it again in a while: what could not store it may soon."""
        entry.refused += 1
        entry.reason = reason
        entry.due = now() + entry.pause
        entry.pause = min(2 * entry.pause, LAST_PAUSE)

    def _give_up(self, entry: _Entry, reason: Reason, detail: str) -> None:
        if entry.sent == entry.refused:
            self._settle(entry, Outcome("no", reason=reason, detail=detail))
        else:
            if entry.client is self._client and self.connection.unsent:
                self.connection.drop()
            self._settle(entry, Outcome("unknown", reason="unconfirmed", detail="sent, and not acknowledged in time"))

    def _settle(self, entry: _Entry, outcome: Outcome) -> None:
        self._forget(entry)
        if outcome.reason != "tooLarge":  # which says nothing of the stream
            self.refusal = outcome.reason
            if outcome.reason:
                self.refused_at = now()
                self.refused_bytes = self._stored_bytes(entry)
            else:
                self.stored_at = now()
        if not entry.over:
            entry.over = True
            try:
                entry.done(outcome)
            except Exception as error:  # one that is told is not to keep the others from it
                log.error("an outcome could not be acted upon", exc_info=error)

    def _stored_bytes(self, entry: _Entry) -> int:
        """Return how many bytes of the stream a message takes."""
        return entry.size + len(self.subject) + RECORD_BYTES

    def _forget(self, entry: _Entry) -> None:
        if self._under_way.pop(entry.number, None) is not None:
            self._bytes -= entry.size

    # ---- what is due

    def _fill(self) -> None:
        """Send what waits, as far as there is room."""
        while self._waiting and (self._waiting[0].over or self._has_room(self._waiting[0])):
            entry = self._waiting.popleft()
            if not entry.over:
                self._begin(entry)

    async def _sweep(self) -> None:
        """Send again, or give up, what is due; ends when nothing is under way."""
        while self._under_way or self._waiting:
            await asyncio.sleep(SWEEP)
            moment = now()
            late = [entry for entry in self._under_way.values() if entry.due <= moment or entry.deadline <= moment]
            for entry in late:
                if entry.deadline <= moment:
                    self._give_up(entry, "storage", self._why(entry))
                elif not entry.over:
                    self._send(entry)
            while self._waiting and self._waiting[0].deadline <= moment:
                self._settle(self._waiting.popleft(), Outcome("no", reason="storage", detail=self._why(None)))
            self._fill()

    def _why(self, entry: _Entry | None) -> str:
        if self._client is None:
            return self.connection.last_error or "no server is connected"
        return f"the stream does not store: {entry.reason or 'it has no leader'}" if entry else "too much is under way"
