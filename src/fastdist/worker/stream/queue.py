"""A worker's way to the stream and back: its connection, its two rings, and whether packets can be stored now.

In the place of ``fastdist.worker.queue.Queue``: the worker calls the same of both.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import TYPE_CHECKING

import msgspec

from fastdist import logs
from fastdist._core import PacketRing, file_size, round_capacity
from fastdist.errors import StartError
from fastdist.shm.block import HeadWord
from fastdist.storage.jetstream.connection import Connection, background
from fastdist.storage.jetstream.consumer import Consumer
from fastdist.storage.jetstream.dead_stream import DeadStream
from fastdist.storage.jetstream.publisher import Publisher
from fastdist.stream_figures import GONE
from fastdist.worker.reconcile import reset_gauges
from fastdist.worker.stream.claims import Claims
from fastdist.worker.stream.dead_letters import DeadLetterPublisher
from fastdist.worker.stream.outgoing import Outgoing
from fastdist.worker.stream.waits import DeliveryNotices
from fastdist.worker.upkeep import TICK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastdist._core import Counters, Intake
    from fastdist.settings import Config
    from fastdist.shm.block import SharedBlock
    from fastdist.worker.dispatch import Dispatcher
    from fastdist.worker.ingest import Emitters

MIN_CAPACITY = 64 << 20  # bytes of each ring; pages that were never used take no memory
CONNECT_TIMEOUT = 5.0  # seconds that a start waits for a server
PATIENCE = 2.5  # seconds that a server or a leader may be missing before packets are rejected at once
IDLE = 2.0  # seconds without an analyzer that can be picked, until others may have what is claimed here: by then none
# of our own requests for messages waits any more
ENVELOPE = 512  # bytes of a message that are not the body of its only packet, at most
END_TIMEOUT = 1.0  # seconds for the last confirmations

RETRIES = {"noResponder": "publish_no_responder", "unconfirmed": "publish_unconfirmed"}  # the counters; others: refused

log = logs.get()


class StreamQueue:
    """What is kept of packets. ``full()`` is called when the stream has no room, and returns Retry-After."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, config: Config, block: SharedBlock, index: int, full: Callable[[], int]
    ) -> None:
        settings = config.jetstream
        self.block, self.settings, self.counters = block, settings, block.rows[index]
        capacity = round_capacity(max(MIN_CAPACITY, 4 * config.server.max_body))
        self.fd, self.ring = _ring(capacity, block, replicated=True)
        _, self.claimed = _ring(capacity, block, replicated=False)
        self.connection = Connection(settings, f"fastdist-{os.getpid()}", is_quiet=True)  # the supervisor's speaks
        self.publisher = Publisher(self.connection, settings.stream, settings.subject, settings.publish_timeout)
        self.notices = DeliveryNotices(self.connection, f"_INBOX.{os.urandom(16).hex()}", self._told)
        self.claims = Claims(self.claimed, self.counters, settings.claim, self.notices.tell)
        self.consumer = Consumer(self.connection, settings, self.claims.take, self.claims.room, self.claims.void)
        self.dead_stream = DeadStream(self.connection)
        self.outgoing = Outgoing(loop, self.ring, self.publisher, settings, self.counters, full)
        self.dead_letters: DeadLetterPublisher
        self._emitters: Emitters
        self._dispatcher: Dispatcher
        self._missing_since = -PATIENCE  # a server or a leader; 0: all is there
        self._pickable_at = time.monotonic()
        self._created = ""  # when the stream was, as far as it is known
        self._reconnects = 0  # counted so far
        self._max_payload = 0  # of the server that is, or was, connected
        self._max_message = 0  # that both that server and the stream take
        self._max_packet = 0  # that is made of agents' records, whatever the server takes

    def dead_letter_writer(self, gone: Callable[[PacketRing, int], None]) -> DeadLetterPublisher:
        """Return what stores the dead letters of the dispatcher."""
        self.dead_letters = DeadLetterPublisher(self.dead_stream, self.counters, self.claims.place, gone)
        return self.dead_letters

    async def serve(self, intake: Intake, emitters: Emitters, dispatcher: Dispatcher) -> None:
        """Connect, publish what comes in, and claim for the dispatcher."""
        self._emitters, self._dispatcher = emitters, dispatcher
        self._max_packet = emitters.agents.limits.max_packet
        self.outgoing.serve(intake, emitters, self.notices.subject)
        await asyncio.wait([background(self._connect())], timeout=CONNECT_TIMEOUT)
        self.look()
        self.claims.serve(
            self.consumer,
            self.publisher,
            dispatcher,
            self.outgoing.message_id,
            lambda: dispatcher.stalled + self.dead_letters.undone,
        )

    async def _connect(self) -> None:
        try:
            await self.connection.start()
        except StartError as error:  # it worked when the service started
            log.error(str(error))
            self.connection.keep()

    def _told(self, sequence: int, analyzer: str | None) -> None:
        self._emitters.settled(sequence, analyzer)

    # ---- called by the worker

    responds_after_sync = True
    sync_interval = TICK
    syncer = None
    old_bytes = 0
    migrations: Sequence[object] = ()

    @property
    def want_sync(self) -> Callable[[], None]:
        """What is called when packets were put into the ring."""
        return self.outgoing.schedule

    @property
    def undone(self) -> int:
        """Packets that are claimed here and not settled."""
        return self.claims.undone

    @property
    def oldest_ns(self) -> int:
        """When the oldest packet that is claimed was accepted, 0 without any."""
        return self.claimed.oldest_ns

    def reconcile(self, counters: Counters, *, renewed: bool) -> None:  # noqa: ARG002
        """Forget what a predecessor had claimed: it comes again."""
        reset_gauges(counters)

    def reserve(self, *_: object) -> None:
        """There are no old rings."""

    def look(self) -> None:
        """See whether the stream is still the one that messages were claimed from, and how large they may be."""
        stream = self.block.stream
        self.publisher.capacity = stream.capacity
        self._max_payload = self.connection.max_payload or self._max_payload
        largest = min((size for size in (self._max_payload, stream.capacity) if size > 0), default=0)
        if largest and largest != self._max_message:
            self._max_message = largest
            agents = self._emitters.agents
            most = min(self._max_packet, largest - ENVELOPE)
            agents.limits = msgspec.structs.replace(agents.limits, max_packet=most)
            self.outgoing.bundle_bytes = min(self.settings.bundle_bytes, largest - ENVELOPE)
        created = stream.created
        if created and created != self._created:
            if self._created not in {"", GONE}:  # what was claimed since it was gone is the new one's
                self.consumer.start_over()
            self._created = created

    def close(self) -> None:
        """Nothing is to be written."""

    @property
    def unfinished(self) -> bool:
        """Whether a worker that ends has something to wait for."""
        return bool(self.claims.undone or self.outgoing.undone or self.dead_letters.undone)

    @property
    def fault(self) -> int:
        """Why nothing may be accepted, an errno; 0 if it may."""
        stream, publisher = self.block.stream, self.publisher
        now = time.monotonic()
        if not self.connection.is_connected:
            fault = errno.ENOTCONN
        elif not stream.has_leader and now - publisher.stored_at > PATIENCE:
            fault = errno.EAGAIN
        else:
            fault = 0
        if not fault:
            self._missing_since = 0.0
        elif not self._missing_since:
            self._missing_since = now
        if fault and now - self._missing_since >= PATIENCE:
            return fault
        if publisher.refusal in {"storage", "unconfirmed"} and not self._has_recovered():
            return errno.ETIMEDOUT
        return 0

    @property
    def lacking(self) -> int:
        """Bytes that have to leave the stream until there is room for what it refused last; 0: there is."""
        publisher, stream = self.publisher, self.block.stream
        if publisher.refusal != "queueFull":
            return 0
        if stream.at <= publisher.refused_at:
            return max(1, publisher.refused_bytes)
        # What is larger than the whole stream, whose capacity was not known then, is not waited for.
        return max(0, min(publisher.refused_bytes, stream.capacity) - max(0, stream.capacity - stream.bytes))

    def _others_have_room(self) -> bool:
        """Whether another replica asks for messages; this one does not, while it has no analyzer."""
        stream = self.block.stream
        return stream.wanted > 0 and stream.at - self._pickable_at > IDLE

    def _has_recovered(self) -> bool:
        """Whether the stream could store, when it was last asked, after it did not."""
        stream = self.block.stream
        return stream.has_leader and stream.at > self.publisher.refused_at

    def sync(self, now_ns: int = 0) -> None:
        """Do what is due: to be called often."""
        self.claims.tick(now_ns)
        now = time.monotonic()
        if self._dispatcher.any_pickable or self._dispatcher.probation.trying:
            self._pickable_at = now
        elif now - self._pickable_at > IDLE and self._others_have_room():
            self.claims.take_back()
        self.counters.add("reconnects", self.connection.reconnects - self._reconnects)
        self._reconnects = self.connection.reconnects
        for reason, count in self.publisher.retries.items():
            self.counters.add(RETRIES.get(reason, "publish_refused"), count)
        self.publisher.retries.clear()

    # ---- at the end

    ends_here = False  # what is left of it is not lost with this process
    end_seconds = END_TIMEOUT  # that ``end`` takes

    def begin_to_end(self) -> None:
        """Claim nothing more, and give back what was not sent; to be called again as long as packets come back."""
        self.claims.ending = True
        self.dead_letters.give_back()
        self.claims.take_back()

    async def end(self, deadline: float) -> None:
        """Have what is settled or given back confirmed, and leave."""
        self.claims.take_back()
        end = max(time.monotonic() + END_TIMEOUT / 2, deadline)
        while self.claims.storing and time.monotonic() < end:  # noqa: ASYNC110  (an event would be set for this alone)
            await asyncio.sleep(TICK)
        await self.consumer.stop(max(TICK, end - time.monotonic()))
        await self.connection.close()
        self.outgoing.answer()


def _ring(capacity: int, block: SharedBlock, *, replicated: bool) -> tuple[int, PacketRing]:
    fd = os.memfd_create("fastdist-claims", os.MFD_CLOEXEC)
    os.ftruncate(fd, file_size(capacity))
    offset = block.head[HeadWord.CLOCK_OFFSET_NS]  # nothing but this process writes to it: no ``on_damage``
    return fd, PacketRing(fd, capacity, volatile=True, replicated=replicated, clock_offset=offset)
