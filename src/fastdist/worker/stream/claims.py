"""The claimed messages of a worker: their packets go to the dispatcher's ring; when all are settled, it is told.

- As many are claimed as there is room for: what is settled in about a second, MIN_PACKETS at least. Those that wait
  for a back-off or a paused analyzer take no room, up to ``limit``: they hold up no others.
- None while no analyzer can be picked: other replicas may have one. But one message, to try an analyzer with that
  deliveries took offline: nothing else brings it back.
- ``take_back`` takes packets that were not sent yet from the dispatcher: at the end, when no analyzer is left, and when
  a claim is void (it could not be renewed, so another replica may have the message).
- A message of which nothing was sent is given back. Of one that was begun the rest is stored again as a message of its
  own, and then the message is acknowledged. What cannot be stored so is sent from here, after all.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from fastdist import logs
from fastdist._core import FLAG_WAITED
from fastdist.storage.jetstream.connection import background
from fastdist.storage.jetstream.consumer import State
from fastdist.storage.jetstream.message import StoredPacket, UnreadableError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastdist._core import Counters, PacketRing
    from fastdist.storage.jetstream.consumer import Claim, Consumer
    from fastdist.storage.jetstream.publisher import Publisher
    from fastdist.worker.dispatch import Dispatcher

MIN_PACKETS = 64  # that may be claimed, however few were settled
WINDOW_NS = 1_000_000_000  # in which those are counted that were
LATER = 5.0  # seconds until what cannot be read here is tried elsewhere or again, or a rest that could not be stored
AGAIN = 1.0  # seconds until a message comes again whose packets are on their way from a claim that is void
LOG_INTERVAL = 60.0

log = logs.get()


class Held:
    """A claimed message. ``left``: the sequences in the ring of its packets that are not settled."""

    __slots__ = ("claim", "dropped", "inboxes", "kept_until", "left", "packets", "storing", "waiting")

    def __init__(self, claim: Claim, packets: int) -> None:
        self.claim, self.packets = claim, packets
        self.left: set[int] = set()
        self.waiting: list[tuple[int, StoredPacket, int]] = []  # not in the ring yet: place, packet and attempts
        self.inboxes: dict[int, str] = {}  # sequence -> where its emitter waits
        self.kept_until = 0.0  # time.monotonic(): its rest could not be stored again just now
        self.storing = 0  # parts of it that are being stored again
        self.dropped = False  # packets of it will not be sent from here: it is never acknowledged

    @property
    def is_kept(self) -> bool:
        """Whether it is not to be taken back just now."""
        return self.claim.state is State.HELD and time.monotonic() < self.kept_until


class Claims:
    """Hands packets to the dispatcher of ``ring``. ``tell(inbox, analyzer)``: there an emitter waits for that."""

    def __init__(
        self, ring: PacketRing, counters: Counters, limit: int, tell: Callable[[str, str | None], None]
    ) -> None:
        self.ring, self.counters, self.limit = ring, counters, limit
        self._tell = tell
        self._consumer: Consumer
        self._publisher: Publisher
        self._dispatcher: Dispatcher
        self._new_id: Callable[[], str]
        self._stalled: Callable[[], int]
        self._held: dict[int, Held] = {}  # by the message's sequence
        self._by_packet: dict[int, tuple[Held, int]] = {}  # by a packet's sequence in the ring, and its place in it
        self._overflow: deque[Held] = deque()  # those with packets that the ring had no room for
        self._settled, self._window_ns, self._most = 0, 0, MIN_PACKETS
        self._mean = 1.0  # packets of a message
        self.storing = 0  # rests of messages that are being stored again
        self._log_limit = logs.Throttle(LOG_INTERVAL)
        self.ending = False

    def serve(
        self,
        consumer: Consumer,
        publisher: Publisher,
        dispatcher: Dispatcher,
        new_id: Callable[[], str],
        stalled: Callable[[], int],
    ) -> None:
        """Begin to claim for ``dispatcher``; what is left of a message that was begun goes to ``publisher``.

        ``stalled()``: how many packets wait for what others need not.
        """
        self._consumer, self._publisher, self._dispatcher, self._new_id = consumer, publisher, dispatcher, new_id
        self._stalled = stalled
        consumer.start()

    @property
    def undone(self) -> int:
        """Packets that are claimed and not settled, and messages whose rest is being stored again."""
        return self.ring.undone + sum(len(held.waiting) for held in self._overflow) + self.storing

    # ---- called by the consumer

    def room(self) -> int:
        """Return for how many messages there is room."""
        undone, dispatcher = self.ring.undone, self._dispatcher
        if self.ending or self._overflow:
            return 0
        if not dispatcher.any_pickable:
            return int(undone == 0 and dispatcher.wants_trial())
        busy = max(0, undone - self._stalled())
        free = int(min(self._most - busy, self.limit - undone) / self._mean)
        return max(free, 0) or int(busy == 0 and undone < self.limit)

    def take(self, claim: Claim, data: bytes) -> None:
        """Hand over the packets of a message."""
        known = self._held.get(claim.sequence)
        if known is not None:  # its claim was void, and some of it is on its way to an analyzer
            self._consumer.give_back(claim, AGAIN)
            return
        try:
            packets = decode(data)
        except UnreadableError as error:
            self.counters.add("corrupt")
            if self._log_limit.allow("unreadable"):
                log.error("a message of the stream cannot be read; given back", sequence=claim.sequence, why=str(error))
            self._consumer.give_back(claim, LATER)
            return
        self.counters.add("stream_messages")
        self.counters.add("stream_packets", len(packets))
        self.counters.add("redelivered", claim.deliveries > 1)
        self._mean += (len(packets) - self._mean) / 16
        held = self._held[claim.sequence] = Held(claim, len(packets))
        before = claim.deliveries - 1
        held.waiting = [(place, packet, packet.attempts + before) for place, packet in enumerate(packets)]
        self._overflow.append(held)
        self._push()

    def void(self, claims: Iterable[Claim]) -> None:
        """Let go what was not sent of messages that may be others' now: in one look at all that waits."""
        concerned = {held for claim in claims if (held := self._held.get(claim.sequence)) is not None}
        for held in concerned:
            held.dropped = held.dropped or bool(held.waiting)
            held.waiting.clear()
        if concerned:
            self.take_back(concerned.__contains__)

    def _push(self) -> None:
        """Hand over what the ring has room for."""
        tail = self.ring.tail_position
        while self._overflow:
            held = self._overflow[0]
            while held.waiting:
                if not self._push_one(held, *held.waiting[0]):
                    break
                del held.waiting[0]
            if held.waiting:
                break
            self._overflow.popleft()
            if not held.left:  # it was too large, or is void
                self._forget(held)
        if self.ring.tail_position != tail:
            self._dispatcher.schedule()

    def _push_one(self, held: Held, place: int, packet: StoredPacket, attempts: int) -> bool:
        try:
            sequence = self.ring.push(
                packet.body,
                packet.id,
                messages=packet.messages,
                emitter=packet.emitter,
                accepted_ns=packet.accepted_ns,
                attempts=attempts,
                flags=FLAG_WAITED,  # so that we are told of its delivery
            )
        except ValueError as error:  # another replica takes larger ones
            self.counters.add("corrupt")
            if self._log_limit.allow("large"):
                what = "a packet of the stream is too large for this service; given back"
                log.error(what, id=packet.id, why=str(error))
            held.dropped = True
            self._consumer.give_back(held.claim, LATER)
            return True
        if sequence:
            held.left.add(sequence)
            self._by_packet[sequence] = held, place
            if packet.inbox:
                held.inboxes[sequence] = packet.inbox
        return bool(sequence)

    # ---- called by the dispatcher

    def settled(self, sequence: int, analyzer: str | None) -> None:
        """Note that a packet was delivered, or (None) is a dead letter."""
        if sequence not in self._by_packet:
            return
        held, _ = self._by_packet.pop(sequence)
        self._settled += 1
        if inbox := held.inboxes.pop(sequence, ""):
            self._tell(inbox, analyzer)
        held.left.discard(sequence)
        if not (held.left or held.waiting or held.storing):
            self._forget(held)
        if self._overflow:
            self._push()

    def place(self, sequence: int) -> tuple[int, int, int]:
        """Return the sequence of a packet's message, its place among the packets of that, and when that was stored."""
        held, place = self._by_packet[sequence]
        return held.claim.sequence, place, held.claim.stored_ns

    def _forget(self, held: Held) -> None:
        if self._held.get(held.claim.sequence) is held:
            del self._held[held.claim.sequence]
        if held.dropped:
            self._consumer.give_back(held.claim)  # unless it is already, or void: else it would be renewed for ever
        else:
            self._consumer.acknowledge(held.claim)
        self._consumer.wake()

    # ---- now and then

    def tick(self, now_ns: int) -> None:
        """Hand over what there is room for now, and adapt how many packets may be claimed."""
        if self._overflow:
            self._push()
        if now_ns - self._window_ns < WINDOW_NS:
            return
        self._most = max(MIN_PACKETS, min(self.limit, self._settled))
        self._settled, self._window_ns = 0, now_ns
        self._consumer.wake()

    def take_back(self, concerned: Callable[[Held], bool] = lambda _: True) -> None:
        """Take what was not sent of these messages out of the dispatcher's hands."""
        dispatcher, ring = self._dispatcher, self.ring
        if not ring.undone and not self._overflow:
            return
        dispatcher.give_back()
        for pool in (*dispatcher.pools, *dispatcher.retired):
            if pool is not None:
                pool.release_waiting()
        unsent: dict[Held, list[int]] = {}
        kept = []
        while handle := ring.claim():
            held, _ = self._by_packet.get(ring.sequence(handle), (None, 0))
            if held is not None and concerned(held) and not held.is_kept:
                unsent.setdefault(held, []).append(handle)
            else:
                kept.append(handle)
        for handle in kept:
            ring.release(handle)
        for held in [each for each in self._overflow if concerned(each) and not each.is_kept]:
            unsent.setdefault(held, [])
        for held, handles in unsent.items():
            self._let_go(held, handles)
        if kept:
            dispatcher.schedule()

    def _let_go(self, held: Held, handles: list[int]) -> None:
        whole = len(handles) + len(held.waiting) == held.packets  # never again, once a part was delivered or stored
        whole = whole and not held.claim.is_stale  # its stream is gone: there is nothing to give back to
        rest = [] if whole or held.claim.state is not State.HELD else self._rest_of(held, handles)
        for handle in handles:
            sequence = self.ring.sequence(handle)
            self.ring.done(handle)
            self._dispatcher.lost(sequence)
            self._by_packet.pop(sequence, None)
            held.left.discard(sequence)
        held.waiting.clear()
        if held in self._overflow:
            self._overflow.remove(held)
        if rest:
            self.storing += 1
            held.storing += 1
            background(self._store_rest(held, rest))
            return
        held.dropped = True
        if not held.left:
            self._forget(held)

    def _rest_of(self, held: Held, handles: list[int]) -> list[tuple[int, StoredPacket]]:
        """Return packets of a message that was begun, as they are stored again, each with its place."""
        rest = []
        for handle in handles:
            packet = self.ring.packet(handle)
            inbox = held.inboxes.pop(packet.sequence, "")
            _, place = self._by_packet[packet.sequence]
            again = StoredPacket(
                packet.id, packet.body, packet.emitter, packet.messages, packet.accepted_ns, packet.attempts, inbox
            )
            rest.append((place, again))
        waiting = held.waiting
        return rest + [
            (place, msgspec.structs.replace(packet, attempts=attempts)) for place, packet, attempts in waiting
        ]

    async def _store_rest(self, held: Held, rest: list[tuple[int, StoredPacket]]) -> None:
        outcome = await self._publisher.publish(encode([packet for _, packet in rest]), self._new_id())
        self.storing -= 1
        held.storing -= 1
        if outcome.stored == "no" and held.claim.state is State.HELD:  # the stream may be full
            held.kept_until = time.monotonic() + LATER
            held.waiting += [(place, packet, packet.attempts) for place, packet in rest]
            self._overflow.append(held)
            self._push()
            return
        if outcome.stored != "yes":  # the message comes again: what was delivered of it, too
            held.dropped = True
        if not (held.left or held.waiting or held.storing):
            self._forget(held)
