"""Publishes what emitters bring, and has each answered once the stream has acknowledged its packet, or has not.

- A packet with an Idempotency-Key travels alone: the key is its message's id, by which the stream knows it again.
- Others share a message where they come together. While MAX_BUNDLES messages of such packets have no acknowledgement
  yet, further ones wait for company; a full message does not. So nothing waits while nothing is under way.
- Answers leave in the order of the packets. What was not stored is answered at once.
- A batch has one answer: if one of its packets was not stored, that says so of all.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET

from fastdist import logs
from fastdist.http.api import JSON, problem, retry_after
from fastdist.http.models import Accepted
from fastdist.statuses import reason
from fastdist.storage.jetstream.connection import background
from fastdist.storage.jetstream.message import StoredPacket, encode, largest_overhead
from fastdist.storage.jetstream.publisher import Outcome

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fastdist._core import Counters, Intake, PacketRing
    from fastdist.settings import Jetstream
    from fastdist.storage.jetstream.publisher import Publisher
    from fastdist.worker.ingest import Emitters

MAX_MESSAGES = 512  # without an acknowledgement; a worker's
MAX_BUNDLES = 2  # of those, messages of packets without a key that are not full
PART_NS = 2_000_000  # of an event-loop iteration, for taking packets out of the ring
COUNTERS = {"queueFull": "queue_full", "storage": "storage", "unconfirmed": "unconfirmed", "tooLarge": "too_large"}

log = logs.get()


class _Entry:
    """A packet that was taken out of the ring, in which it lies from ``begin`` to ``end``."""

    __slots__ = ("begin", "body_bytes", "duplicate", "end", "handle", "messages", "over", "packet_id", "sequence")

    def __init__(self, begin: int, end: int, handle: int, sequence: int, packet: StoredPacket) -> None:
        self.begin, self.end, self.handle, self.sequence = begin, end, handle, sequence
        self.packet_id, self.messages, self.body_bytes = packet.id, packet.messages, len(packet.body)
        self.over = self.duplicate = False


class _Message(NamedTuple):
    """What becomes a message, or waits for company."""

    entries: list[_Entry]
    packets: list[StoredPacket]


class Outgoing:
    """Publishes the packets of ``ring``. ``full()``: the stream has no room; returns Retry-After."""

    def __init__(  # noqa: PLR0913, PLR0917  (the parts it is wired from)
        self,
        loop: asyncio.AbstractEventLoop,
        ring: PacketRing,
        publisher: Publisher,
        settings: Jetstream,
        counters: Counters,
        full: Callable[[], int],
    ) -> None:
        self.ring, self.publisher, self.settings, self.counters = ring, publisher, settings, counters
        self._loop, self._full = loop, full
        self._intake: Intake
        self._emitters: Emitters
        self._reply_to: Callable[[int], str]
        self._order: deque[_Entry] = deque()  # as they lie in the ring
        self._open = _Message([], [])
        self._open_bytes = 0
        self._under_way = self._bundles = 0  # messages; those of packets without a key
        self._rejected: deque[tuple[int, int]] = deque()  # (begin, end) of answers that were given already
        self._scheduled = False
        self._token, self._numbers = os.urandom(12).hex(), 0

    def serve(self, intake: Intake, emitters: Emitters, reply_to: Callable[[int], str]) -> None:
        """Have the emitters of ``intake`` answered; ``reply_to(sequence)``: where to tell of a packet's delivery."""
        self._intake, self._emitters, self._reply_to = intake, emitters, reply_to
        intake.keyed = {}

    @property
    def undone(self) -> int:
        """Packets whose emitters have no answer yet."""
        return self.ring.undone

    def schedule(self) -> None:
        """Publish what is in the ring at the end of this event-loop iteration."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._fill)

    def message_id(self) -> str:
        """Return a new message id. No key has a comma."""
        self._numbers += 1
        return f"{self._token},{self._numbers}"

    # ---- from the ring to the stream

    def _fill(self) -> None:
        self._scheduled = False
        end = time.monotonic_ns() + PART_NS
        while self._under_way < MAX_MESSAGES and self.ring.has_more:
            begin = self.ring.claim_position
            handle = self.ring.claim()
            if not handle:  # a large batch that is not whole yet
                break
            self._take(begin, handle)
            if time.monotonic_ns() >= end:
                self.schedule()
                break
        if self._open.entries and self._bundles < MAX_BUNDLES:
            self._send_open()

    def _take(self, begin: int, handle: int) -> None:
        packet = self.ring.packet(handle)
        sequence = packet.sequence
        inbox = self._reply_to(sequence) if sequence in self._emitters.waiting else ""
        stored = StoredPacket(
            packet.id, packet.body, packet.emitter, packet.messages, packet.accepted_ns, packet.attempts, inbox
        )
        entry = _Entry(begin, self.ring.claim_position, handle, sequence, stored)
        self._order.append(entry)
        if self._intake.keyed is not None and sequence in self._intake.keyed:
            self._send(_Message([entry], [stored]), stored.id)
            return
        size = len(stored.body) + largest_overhead(stored)
        if self._open.entries and self._open_bytes + size > self.settings.bundle_bytes:
            self._send_open()
        self._open.entries.append(entry)
        self._open.packets.append(stored)
        self._open_bytes += size
        if len(self._open.entries) >= self.settings.bundle_packets or self._open_bytes >= self.settings.bundle_bytes:
            self._send_open()

    def _send_open(self) -> None:
        message, self._open, self._open_bytes = self._open, _Message([], []), 0
        self._send(message, "")

    def _send(self, message: _Message, key: str) -> None:
        self._under_way += 1
        self._bundles += not key
        background(self._publish(message, key))

    async def _publish(self, message: _Message, key: str) -> None:
        began = time.monotonic_ns()
        try:
            outcome = await self.publisher.publish(encode(message.packets), key or self.message_id())
        except Exception as error:  # whatever it is, emitters must be answered
            log.error("a message could not be published", exc_info=error)
            outcome = Outcome("unknown", reason="unconfirmed", detail="a fault in fastdist; its log has the traceback")
        self._under_way -= 1
        self._bundles -= not key
        if outcome.stored == "yes":
            self.counters.observe_publish(time.monotonic_ns() - began)
            self.counters.add("stream_messages")
            self.counters.add("stream_packets", len(message.entries))
        self._settle(message, outcome, keyed=bool(key))
        self._fill()

    # ---- answers

    def _settle(self, message: _Message, outcome: Outcome, *, keyed: bool) -> None:
        for entry in message.entries:
            entry.over = True
        try:
            if outcome.stored != "yes":
                self._reject(message, outcome)
            elif keyed and outcome.duplicate:
                self._answer_duplicate(message.entries[0])
        finally:
            if keyed and self._intake.keyed is not None:
                self._intake.keyed.pop(message.entries[0].sequence, None)
            self._advance()

    def _advance(self) -> None:
        """Let the answers leave that no packet before theirs keeps back."""
        position, duplicates = 0, []
        while self._order and self._order[0].over:
            entry = self._order.popleft()
            self.ring.done(entry.handle)
            position = entry.end
            if entry.duplicate:
                duplicates.append(entry)
        if not position:
            return
        while self._rejected and self._rejected[0][1] <= position:
            self._rejected.popleft()
        self.ring.mark_synced(position)
        self._intake.synced()
        for entry in duplicates:  # which the core has counted like all others
            self.counters.add("duplicates")
            self.counters.add("accepted", -1)
            self.counters.add("messages_accepted", -entry.messages)
            self.counters.add("bytes_accepted", -entry.body_bytes)

    def _answer_duplicate(self, entry: _Entry) -> None:
        entry.duplicate = True
        counted = self._emitters.counts_messages
        document = Accepted(packet_id=entry.packet_id, messages=entry.messages if counted else UNSET, duplicate=True)
        self._emitters.forget_wait(entry.sequence)
        answer = (self._intake.keyed or {})[entry.sequence]
        answer.complete_after_sync(answer.compose(202, reason(202), JSON, msgspec.json.encode(document)))

    def _reject(self, message: _Message, outcome: Outcome) -> None:
        """Answer that packets are not stored, or that it is not known; each answer once."""
        seconds = self._full() if outcome.reason == "queueFull" else 1
        if outcome.reason == "tooLarge":
            response = problem(413, f"the packet is {outcome.detail}")
        else:
            what = {
                "queueFull": f"the queue is full; try again in {seconds} s",
                "storage": f"the packet could not be stored, and will not be delivered: {outcome.detail}",
            }.get(
                outcome.reason,
                "the packet was sent to the queue, which has not acknowledged it in time: it may be delivered; to send "
                "it again under the same Idempotency-Key is right",
            )
            response = problem(503, what, headers=retry_after(seconds), stored=outcome.stored)
        for entry in message.entries:
            self._emitters.forget_wait(entry.sequence)
            if any(begin < entry.end <= end for begin, end in self._rejected):
                continue  # another packet of the same batch
            begin, end = self._intake.answer_of(entry.end)
            self._rejected.append((begin, end))
            rejected = self._intake.not_stored(
                begin, response.status, reason(response.status), response.headers, response.body, end=end
            )
            self.counters.add(COUNTERS[outcome.reason or "unconfirmed"], rejected)
