"""Claims messages of the stream for one worker: what there is room for, renewed, acknowledged or given back.

A claim is a message that the stream has handed out to us and to no other, for ``ack_wait``. The rules:

- One request at a time asks for as many messages as there is room for, and ends after a second.
- A claim is renewed before a third of ``ack_wait`` is over, for as long as it is held. One that could not be in time is
  void: another replica may have the message soon.
- Acknowledgements are repeated until the stream has confirmed them: over lost replies, leaders and connections.
- A message that comes again while it is held, or after it was settled, is not handed out again.
- Giving back is not repeated once it may have arrived: the message may be another's claim by then.
- Messages are known by their sequence and by when they were stored: a stream that was deleted and made again has the
  same sequences once more. Of claims of the old one nothing is said any more (``start_over``).
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec
from nats.errors import Error as NatsError

from fastdist.storage.jetstream.client import fields_of, status_of
from fastdist.storage.jetstream.connection import forever, now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastdist.settings import Jetstream
    from fastdist.storage.jetstream.client import Client
    from fastdist.storage.jetstream.connection import Connection

NAME = "fastdist"  # of the durable consumer
MAX_REQUEST = 256  # messages
MAX_REQUEST_BYTES = 16 << 20
EXPIRES = 1.0  # seconds that a request waits for messages
OVERDUE = 2.0  # seconds after that without its end: it was lost
PAUSE = 0.25  # seconds until the next request after one that was refused
CONFIRM_TIMEOUT = 1.0  # seconds until what was not confirmed is sent again
SWEEP = 0.25  # seconds between looks at what is due
REMEMBERED = 1 << 16  # sequences of messages that were settled
SLICE = 64  # messages sent without letting others run

ACK, NAK, PROGRESS = b"+ACK", b"-NAK", b"+WPI"
_V1_TOKENS = 9  # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>


class State(enum.Enum):
    """What a claim is to us."""

    HELD = "held"
    ACKNOWLEDGED = "acknowledged"  # not confirmed yet
    GIVEN_BACK = "given back"  # not confirmed yet
    VOID = "void"
    SETTLED = "settled"


class Era:
    """The time of one stream; ``over``: it is gone."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False


class Claim:
    """A message that is ours for now. ``deliveries``: how often the stream has handed it out, this time included."""

    __slots__ = (
        "confirmed_at",
        "deliveries",
        "due",
        "era",
        "reply",
        "sent_at",
        "sequence",
        "state",
        "stored_ns",
        "token",
        "word",
    )

    def __init__(self, sequence: int, deliveries: int, reply: str, confirmed_at: float) -> None:
        self.sequence, self.deliveries, self.reply = sequence, deliveries, reply
        self.stored_ns = 0  # when the message was stored, Unix time
        self.era = Era()
        self.confirmed_at = confirmed_at  # the latest moment since which it surely was ours
        self.sent_at = 0.0  # the last word about it
        self.due = 0.0  # when to send that again
        self.token = ""
        self.word = b""
        self.state = State.HELD

    @property
    def is_stale(self) -> bool:
        """Whether its stream is gone."""
        return self.era.over


def position(reply: str) -> tuple[int, int, int]:
    """Return how often a message was handed out, its sequence, and when it was stored (Unix time, ns).

    From its reply subject. Raises ValueError.
    """
    tokens = reply.split(".")
    at = 4 if len(tokens) == _V1_TOKENS else 6  # behind domain and account there
    if tokens[:2] != ["$JS", "ACK"] or len(tokens) < at + 5:
        raise ValueError(f"not a message of a stream: {reply!r:.100}")
    return int(tokens[at]), int(tokens[at + 1]), int(tokens[at + 3])


class Consumer:
    """Hands out messages with ``take(claim, data)``; a part of a connection (before that is started).

    ``room()`` says for how many messages there is room now; call ``wake`` when that has grown. ``void(claim)``: what
    was not sent of it yet must not be. Such a claim may still be acknowledged, once all of it was delivered.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Jetstream,
        take: Callable[[Claim, bytes], None],
        room: Callable[[], int],
        void: Callable[[list[Claim]], None],
    ) -> None:
        self.subject, self.ack_wait = settings.subject, settings.ack_wait
        self.redelivered = 0  # messages that came again and were not handed out again
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{settings.stream}.{NAME}"
        self._take, self._room, self._void = take, room, void
        self._held: dict[int, Claim] = {}
        self._leaving: dict[int, Claim] = {}  # acknowledged or given back, not confirmed
        self._to_send: dict[Claim, None] = {}  # in this order
        self._era = Era()
        self._settled: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._asked = 0  # messages that may still come
        self._lost_at = 0.0  # when they will not any more
        self._not_before = 0.0  # the next request
        self._requests = self._words = 0  # sent so far, which makes their replies' subjects different
        self._stopping = False
        self._inbox = ""
        self._client: Client | None = None
        self._is_scheduled = False
        self._idle = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        connection.add(self)

    # ---- for the worker

    @property
    def held(self) -> int:
        """How many messages are claimed."""
        return len(self._held)

    @property
    def unconfirmed(self) -> int:
        """How many were acknowledged or given back without a confirmation so far."""
        return len(self._leaving)

    def start(self) -> None:
        """Begin to claim."""
        self._tasks = [forever(self._sweep), forever(self._renew)]
        self.wake()

    def wake(self) -> None:
        """Look at the end of this event-loop iteration whether there is room, or something to send."""
        if not self._is_scheduled:
            asyncio.get_running_loop().call_soon(self._work)
            self._is_scheduled = True

    def acknowledge(self, claim: Claim) -> None:
        """Remove the message from the stream: all of it is settled."""
        self._leave(claim, State.ACKNOWLEDGED, ACK)

    def give_back(self, claim: Claim, delay: float = 0.0) -> None:
        """Let others have the message, after ``delay`` seconds."""
        if claim.state is State.HELD:
            word = NAK + b" " + msgspec.json.encode({"delay": int(delay * 1e9)}) if delay else NAK
            self._leave(claim, State.GIVEN_BACK, word)

    def _leave(self, claim: Claim, state: State, word: bytes) -> None:
        if claim.state in {State.SETTLED, State.ACKNOWLEDGED} or claim.is_stale:
            return
        if self._held.get(claim.sequence) is claim:
            del self._held[claim.sequence]
        claim.state, claim.word, claim.sent_at = state, word, 0.0
        self._leaving[claim.sequence] = claim
        self._send_soon(claim)

    def start_over(self) -> None:
        """Say nothing more about what was claimed so far: the stream is gone, and another may have its sequences.

        What is held may still be delivered. The callers ask ``Claim.is_stale`` before they count on its message.
        """
        self._era.over, self._era = True, Era()
        self._held.clear()
        self._leaving.clear()
        self._to_send.clear()
        self._idle.set()

    def _send_soon(self, claim: Claim) -> None:
        claim.due = now() + CONFIRM_TIMEOUT
        self._to_send[claim] = None
        self.wake()

    async def stop(self, timeout: float) -> bool:  # noqa: ASYNC109  (the rest is left after it)
        """Claim nothing more, have all that was acknowledged or given back confirmed; return whether that was done.

        What comes meanwhile is given back at once. What is still held then goes to others after ``ack_wait``.
        """
        self._stopping = True
        self.wake()
        try:
            async with asyncio.timeout(timeout):
                while self._asked or self._leaving:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        finally:
            for task in self._tasks:
                task.cancel()
            self._tasks.clear()
        return True

    # ---- requests and what comes

    def connected(self, client: Client) -> None:
        """Take messages on a new client, and send again what was not confirmed."""
        self._inbox = client.new_inbox()
        client.take(f"{self._inbox}.*", self._received)
        self._client, self._asked, self._not_before = client, 0, 0.0
        self._repeat(list(self._leaving.values()))

    def lost(self) -> None:
        """Wait for the next client."""
        self._client, self._asked = None, 0
        self._idle.set()

    def _work(self) -> None:
        self._is_scheduled = False
        if not self._tasks or self._client is None:
            return
        if self._to_send:
            claims = list(itertools.islice(self._to_send, SLICE))
            for claim in claims:
                del self._to_send[claim]
            self._send(claims, "a")
            if self._to_send:
                self.wake()
        self._ask(now())

    async def _sweep(self) -> None:
        """Say again what was not confirmed in time."""
        while True:
            await asyncio.sleep(SWEEP)
            moment = now()
            self._repeat([claim for claim in self._leaving.values() if claim.due <= moment])

    def _repeat(self, claims: list[Claim]) -> None:
        """Say again what was not confirmed of these."""
        for claim in claims:
            if claim.state is State.GIVEN_BACK and claim.sent_at:
                self._confirmed(claim)  # it may have arrived: not again
            else:
                self._send_soon(claim)
        self.wake()

    def _ask(self, moment: float) -> None:
        """Ask for messages if there is room, and none are to come."""
        if self._asked and moment >= self._lost_at:
            self._asked = 0
            self._idle.set()
        client = self._client
        if client is None or self._asked or self._stopping or moment < self._not_before:
            return
        count = min(self._room(), MAX_REQUEST)
        if count <= 0:
            return
        self._asked, self._lost_at = count, moment + EXPIRES + OVERDUE
        self._requests += 1
        size = max(MAX_REQUEST_BYTES, 2 * client.max_payload)  # or the largest messages would never come
        wanted = {"batch": count, "max_bytes": size, "expires": int(EXPIRES * 1e9)}
        try:
            client.send(self._next, msgspec.json.encode(wanted), f"{self._inbox}.p{self._requests}")
        except NatsError:
            self._asked = 0

    def _received(self, subject: str, reply: str, headers: bytes, data: bytes) -> None:
        if subject == self.subject:
            self._claim(reply, data)
            return
        token = subject[len(self._inbox) + 1 :]
        if token.startswith("p"):
            self._request_ended(headers, current=token == f"p{self._requests}")
            return
        status = status_of(headers)
        sequence = int(token[1:].partition("-")[0])
        if token.startswith("w"):
            claim = self._held.get(sequence)
            if claim is not None and claim.token == token and not status:
                claim.confirmed_at = claim.sent_at
        else:
            claim = self._leaving.get(sequence)
            if claim is None or claim.token != token:
                return
            if not status:
                self._confirmed(claim)
            else:  # no leader: it has not arrived
                claim.sent_at, claim.due = 0.0, now() + PAUSE

    def _request_ended(self, headers: bytes, *, current: bool) -> None:
        """Do not await what a request has not got. What it has got may still come: its end overtakes messages."""
        status, fields = status_of(headers), fields_of(headers)
        if status == "100" or not current:  # a heartbeat, or of one that was taken for lost
            return
        pending = fields.get("Nats-Pending-Messages", "")
        self._no_more(int(pending) if pending.isdecimal() else self._asked)
        if status not in {"404", "408"} and fields.get("Description") != "Batch Completed":
            self._not_before = now() + PAUSE

    def _no_more(self, count: int) -> None:
        """Await so many messages less."""
        self._asked = max(0, self._asked - count)
        if not self._asked:
            self._idle.set()
            self.wake()

    def _claim(self, reply: str, data: bytes) -> None:
        try:
            deliveries, sequence, stored_ns = position(reply)
        except ValueError:
            return  # published past the stream
        self._no_more(1)
        known = self._held.get(sequence) or self._leaving.get(sequence)
        if known is not None and known.stored_ns != stored_ns:
            self.start_over()
            known = None
        if known is not None and known.state is not State.GIVEN_BACK:
            self.redelivered += 1
            known.reply, known.deliveries, known.confirmed_at = reply, deliveries, now()
            if known.state is State.ACKNOWLEDGED:
                self._send_soon(known)
            return
        claim = Claim(sequence, deliveries, reply, now())
        claim.stored_ns, claim.era = stored_ns, self._era
        if (sequence, stored_ns) in self._settled:
            self.redelivered += 1
            self._leave(claim, State.ACKNOWLEDGED, ACK)
            return
        if known is not None:  # what was given back has come again
            self._confirmed(known)
        self._held[sequence] = claim
        if self._stopping:
            self.give_back(claim)
            return
        try:
            self._take(claim, data)
        except Exception:
            self.give_back(claim, self.ack_wait)  # or it would be held for ever
            raise  # which is logged

    def _confirmed(self, claim: Claim) -> None:
        if self._leaving.get(claim.sequence) is claim:
            del self._leaving[claim.sequence]
        if claim.state is State.ACKNOWLEDGED:
            self._settled[claim.sequence, claim.stored_ns] = None
            if len(self._settled) > REMEMBERED:
                self._settled.popitem(last=False)
        claim.state = State.SETTLED
        self._idle.set()

    # ---- renewing

    async def _renew(self) -> None:
        """Renew claims that are a quarter of ``ack_wait`` old, every twelfth of it; void those that are too old."""
        while True:
            await asyncio.sleep(self.ack_wait / 12)
            moment = now()
            old = [claim for claim in self._held.values() if moment - claim.confirmed_at >= self.ack_wait / 4]
            late = [claim for claim in old if moment - claim.confirmed_at >= self.ack_wait * 5 / 6]
            for claim in late:
                del self._held[claim.sequence]
                claim.state = State.VOID
            if late:
                self._void(late)
            for at in range(0, len(old), SLICE):
                self._send(old[at : at + SLICE], "w")
                await asyncio.sleep(0)

    def _send(self, claims: Iterable[Claim], kind: str) -> None:
        """Send a word about each claim, and ask for its confirmation."""
        for claim in claims:
            client = self._client
            if (
                client is None
                or claim.is_stale
                or claim.state is State.SETTLED
                or (kind == "w" and claim.state is not State.HELD)
            ):
                continue
            self._words += 1
            claim.sent_at, claim.token = now(), f"{kind}{claim.sequence}-{self._words}"
            word = PROGRESS if kind == "w" else claim.word
            try:
                client.send(claim.reply, word, f"{self._inbox}.{claim.token}")
            except NatsError:
                claim.sent_at = 0.0
                return
