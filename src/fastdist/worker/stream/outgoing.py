"""Publishes what emitters bring, and has each answered once the stream has acknowledged its packet, or has not.

- A packet with an Idempotency-Key travels alone: the key is its message's id, by which the stream knows it again. So
  does one whose emitter waits for its delivery.
- Others share a message where they come together. While MAX_BUNDLES messages without a key have no acknowledgement yet,
  packets wait for company until they fill one. So nothing waits while nothing is under way.
- Responses leave in the order of the packets. What was not stored is answered at once.
- A batch has one response: if one of its packets was not stored, that says so of all.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING

from msgspec import UNSET

from fastdist import logs
from fastdist._core import claim_bundle, done_all
from fastdist.errors import INTERNAL_ERROR
from fastdist.http.responses import Accepted, json_response, problem
from fastdist.retry_after import retry_after
from fastdist.storage.jetstream.message import StoredPacket, encode, whole
from fastdist.storage.jetstream.publisher import Outcome

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fastdist._core import Counters, Intake, Packet, PacketRing, PendingResponse
    from fastdist.exchange import Response
    from fastdist.settings import Jetstream
    from fastdist.storage.jetstream.publisher import Publisher
    from fastdist.worker.ingest import Emitters

MAX_MESSAGES = 512  # without an acknowledgement; a worker's
MAX_BUNDLES = 2  # of those, messages of packets without a key that are not full
PART_NS = 2_000_000  # of an event-loop iteration, for taking packets out of the ring
COUNTERS = {"queueFull": "queue_full", "storage": "storage", "unconfirmed": "unconfirmed", "tooLarge": "too_large"}

log = logs.get()


class _Message:
    """What was taken out of the ring to be a message: the packets with these ``handles``, from ``begin`` to ``end``.

    ``accepted_ns``: when the first of them was (wall clock).

    ``alone``: the only one, which has a key, or whose emitter waits, or that is large.
    """

    __slots__ = ("accepted_ns", "alone", "begin", "duplicate", "end", "handles", "is_keyed", "over", "refused")

    def __init__(self, begin: int, end: int, handles: list[int], accepted_ns: int, alone: Packet | None = None) -> None:
        self.begin, self.end, self.handles, self.accepted_ns, self.alone = begin, end, handles, accepted_ns, alone
        self.over = self.duplicate = self.refused = self.is_keyed = False


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
        self.bundle_bytes = settings.bundle_bytes  # less where servers take smaller messages
        self._loop, self._full = loop, full
        self._intake: Intake
        self._emitters: Emitters
        self._reply_to: Callable[[int], str]
        self._order: deque[_Message] = deque()  # as they lie in the ring
        self._under_way = self._bundles = 0  # messages; those of packets without a key
        self._keyed: dict[int, PendingResponse] = {}
        self._rejected: deque[tuple[int, int]] = deque()  # (begin, end) of responses that were given already
        self._scheduled = False
        self._token, self._numbers = os.urandom(12).hex(), 0

    def serve(self, intake: Intake, emitters: Emitters, reply_to: Callable[[int], str]) -> None:
        """Have the emitters of ``intake`` answered; ``reply_to(sequence)``: where to tell of a packet's delivery."""
        self._intake, self._emitters, self._reply_to = intake, emitters, reply_to
        if intake.keyed is None:
            raise AssertionError("an intake that remembers keys is needed")
        self._keyed = intake.keyed

    @property
    def undone(self) -> int:
        """Packets whose emitters have no response yet."""
        return self.ring.undone

    def schedule(self) -> None:
        """Answer what is settled, and publish what is in the ring, at the end of this event-loop iteration."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._work)

    def message_id(self) -> str:
        """Return a new message id. No key has a comma."""
        self._numbers += 1
        return f"{self._token},{self._numbers}"

    # ---- from the ring to the stream

    def _work(self) -> None:
        self._scheduled = False
        try:
            self.answer()
        finally:
            self._fill()

    def _fill(self) -> None:
        ring, settings = self.ring, self.settings
        end = time.monotonic_ns() + PART_NS
        while self._under_way < MAX_MESSAGES and ring.has_more:
            if self._bundles >= MAX_BUNDLES and ring.undone - ring.claimed < settings.bundle_packets:
                break
            found = claim_bundle(ring, settings.bundle_packets, self.bundle_bytes)
            if found is None:
                break
            packets, handles, accepted_ns, begin, behind, alone = found
            if handles:
                self._send(_Message(begin, behind, handles, accepted_ns), whole(packets), self.message_id())
            if alone:
                packet = ring.packet(alone)
                self._send_alone(_Message(behind, ring.claim_position, [alone], packet.accepted_ns, packet), packet)
            if time.monotonic_ns() >= end:
                self.schedule()
                break

    def _send_alone(self, message: _Message, packet: Packet) -> None:
        sequence = packet.sequence
        message.is_keyed = sequence in self._keyed
        inbox = self._reply_to(sequence) if sequence in self._emitters.waiting else ""
        stored = StoredPacket(packet.id, packet.body, packet.emitter, packet.messages, packet.accepted_ns, inbox=inbox)
        self._send(message, encode([stored]), packet.id if message.is_keyed else self.message_id())

    def _send(self, message: _Message, data: bytes, message_id: str) -> None:
        self._order.append(message)
        self._under_way += 1
        self._bundles += not message.is_keyed
        began = time.monotonic_ns()
        waited = max(0, time.time_ns() - message.accepted_ns) / 1e9  # in the ring
        try:
            self.publisher.store(data, message_id, lambda outcome: self._done(message, began, outcome), waited)
        except Exception as error:  # whatever it is, emitters must be answered
            log.error("a message could not be published", exc_info=error)
            self._done(message, began, Outcome("unknown", reason="unconfirmed", detail=INTERNAL_ERROR))

    def _done(self, message: _Message, began: int, outcome: Outcome) -> None:
        if message.over:
            return
        self._under_way -= 1
        self._bundles -= not message.is_keyed
        if outcome.stored == "yes":
            self.counters.observe_publish(time.monotonic_ns() - began)
            self.counters.add("stream_messages")
            self.counters.add("stream_packets", len(message.handles))
        try:
            self._settle(message, outcome)
        finally:
            self.schedule()

    # ---- responses

    def _settle(self, message: _Message, outcome: Outcome) -> None:
        try:
            if outcome.stored != "yes":
                self._reject(message, outcome)
            elif message.alone is not None and message.is_keyed and outcome.duplicate:
                self._answer_duplicate(message, message.alone)
            message.over = True  # not before it is known what its emitters are answered
        finally:
            if message.is_keyed and message.alone is not None:
                self._keyed.pop(message.alone.sequence, None)

    def answer(self) -> None:
        """Let the responses leave of what is settled."""
        if self._order and self._order[0].over:
            self._advance()

    def _advance(self) -> None:
        """Let the responses leave that no packet before theirs keeps back, in one call: each searches for who waits."""
        position, others = 0, []
        while self._order and self._order[0].over:
            message = self._order.popleft()
            done_all(self.ring, message.handles)
            position = message.end
            if (message.duplicate or message.refused) and message.alone is not None:
                others.append(message.alone)
                self.counters.add("duplicates", message.duplicate)
        while self._rejected and self._rejected[0][1] <= position:
            self._rejected.popleft()
        # A copy that was made for room may be of a packet that is done: nothing else will cover it.
        if not self.ring.undone:
            position = max(position, self.ring.sync_position)
        self.ring.mark_synced(position)
        self._intake.synced()
        for packet in others:  # which the core has counted like all that were stored
            self.counters.add("accepted", -1)
            self.counters.add("messages_accepted", -packet.messages)
            self.counters.add("bytes_accepted", -len(packet.body))

    def _answer_duplicate(self, message: _Message, packet: Packet) -> None:
        message.duplicate = True
        messages = packet.messages if self._emitters.counts_messages else UNSET
        response = json_response(Accepted(packet_id=packet.id, messages=messages, duplicate=True), 202)
        self._emitters.forget_wait(packet.sequence)
        pending = self._keyed[packet.sequence]
        pending.complete_after_sync(pending.compose(*response.parts))

    def _reject(self, message: _Message, outcome: Outcome) -> None:
        """Answer that packets are not stored, or that it is not known; each response once."""
        if message.alone is not None:
            self._emitters.forget_wait(message.alone.sequence)
        if message.is_keyed and message.alone is not None:  # many may be refused: no search among all that wait
            pending, response = self._keyed[message.alone.sequence], self._refusal(outcome)
            pending.complete(pending.compose(*response.parts))
            message.refused = True
            self.counters.add(COUNTERS[outcome.reason or "unconfirmed"])
            return
        begin, end = message.begin, message.end
        for first, last in self._rejected:  # of batches, of which it has a part
            if first <= begin < last:
                begin = last
            if first < end <= last:
                end = first
        if begin >= end:
            return
        begin, end = self._intake.response_of(begin + 1)[0], self._intake.response_of(end)[1]
        response = self._refusal(outcome)
        self._rejected.append((begin, end))
        rejected = self._intake.not_stored(begin, *response.parts, end=end)
        self.counters.add(COUNTERS[outcome.reason or "unconfirmed"], rejected)

    def _refusal(self, outcome: Outcome) -> Response:
        if outcome.reason == "tooLarge":
            return problem(413, f"the packet is {outcome.detail}")
        seconds = self._full() if outcome.reason == "queueFull" else 1
        what = {
            "queueFull": f"the queue is full; try again in {seconds} s",
            "storage": f"the packet could not be stored, and will not be delivered: {outcome.detail}",
        }.get(
            outcome.reason,
            "the packet was sent to the queue, which has not acknowledged it in time: it may be delivered; to send it "
            "again under the same Idempotency-Key is right",
        )
        return problem(503, what, headers=retry_after(seconds), stored=outcome.stored)
