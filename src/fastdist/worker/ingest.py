"""Emitters' connections: their life, their time-outs, and every response but 202.

The compiled ``IngestBase`` reads requests and accepts packets; it calls the methods here for whatever is seldom.
Responses are bytes; problems are documents of RFC 9457.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import os
import time
from typing import TYPE_CHECKING

from msgspec import UNSET

from fastdist._core import IngestBase, Intake, PendingResponse
from fastdist.errors import INTERNAL_ERROR, PacketError
from fastdist.exchange import Request, Response
from fastdist.http.admin import has_token, is_token
from fastdist.http.api import cors_headers, is_preflight
from fastdist.http.responses import problem
from fastdist.net.proxies import TrustedProxies
from fastdist.protocols.base import BUSY, STATUSES, Reason, Refused, refusal_headers
from fastdist.protocols.encodings import decode
from fastdist.retry_after import retry_after
from fastdist.shm.snapshot import CONNECTIONS
from fastdist.worker.agents import AgentRequest, Agents, counter_of
from fastdist.worker.waits import BatchWait, PacketWait

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping, Sequence

    from fastdist.http.api import Api
    from fastdist.ipc import Action
    from fastdist.protocols.base import Batch
    from fastdist.settings import Server
    from fastdist.worker.waits import Waiting

UNREADABLE = ("malformed", "head_too_large", "timeout")  # counted although the request is unknown
MAX_REJECTED = 256  # connections too many that stay open until their 503 is read; further ones are closed at once
PART_NS = 2_000_000  # of an event-loop iteration, for waits that end
FEW = 1000  # waits that are over and may still be remembered
CLOCK = 0.001  # seconds: what the event loop's clock counts in


# What the core finds wrong with a request, by the status it suggests; other statuses have one shape for all.
REASONS = {400: Reason.MALFORMED, 408: Reason.TIMEOUT, 413: Reason.TOO_LARGE, 417: Reason.EXPECTATION}


class Emitters:
    """What the connections of a worker share: their ``Intake``, the API, tokens, CORS, and waits for deliveries.

    ``carry_out(action, done)`` requests a change; ``done`` gets the response. ``found_full()`` is called when there was
    no room for a packet, and returns in how many seconds there may be. ``shared``: the queue is a stream, and what is
    not stored says so.
    ``on_rejected(kind, client, pointer)`` gets what was rejected, as an example for the log.
    """

    def __init__(  # noqa: PLR0913  (what connections share)
        self,
        api: Api,
        intake: Intake,
        carry_out: Callable[[Action, Callable[[Response], None]], None],
        server: Server,
        found_full: Callable[[], int] = lambda: 1,
        *,
        shared: bool = False,
        on_rejected: Callable[[str, str, str], None] = lambda *_: None,
    ) -> None:
        self.api, self.intake, self.carry_out, self.found_full = api, intake, carry_out, found_full
        self.shared, self.on_rejected = shared, on_rejected
        self.counts_messages = server.validation != "none"
        self.proxies = TrustedProxies(server.trusted_proxies)
        self.agents = Agents(server, min(intake.ring.capacity, intake.max_bodies))
        self.tokens: Sequence[str] = ()
        self.cors_origins: Sequence[str] = ()
        self.waiting: dict[int, Waiting] = {}  # by sequence
        self.part_ns = PART_NS
        self._ends: list[tuple[float, int, Waiting]] = []  # a heap of those and of some that are over, and numbers
        self._numbers = itertools.count()
        self._timer: tuple[float, asyncio.TimerHandle] | None = None  # for the first of them, and when
        self.rejected: set[IngestProtocol] = set()  # connections too many, and not closed yet

    def configure(self, tokens: Sequence[str], cors_origins: Sequence[str]) -> None:
        """Put tokens and origins in force."""
        self.tokens = tokens
        self.cors_origins = cors_origins
        self.intake.open_to_all = not tokens
        self.intake.has_cors = bool(cors_origins)

    def has_room_besides(self, coming: int) -> bool:
        """Whether one more connection may be accepted beside so many in a handshake: to be served, or to get a 503."""
        return len(self.intake.connections) + coming < self.intake.max_connections + MAX_REJECTED

    def wait(self, seconds: float, waiting: Waiting) -> None:
        """Register an emitter that waits for deliveries, so many seconds at most."""
        self.waiting.update(dict.fromkeys(waiting.left, waiting))
        waiting.connection.awaited |= waiting.left
        if len(self._ends) > 2 * len(self.waiting) + FEW:  # most of what is in it is over: waits may be for a day
            self._ends = [each for each in self._ends if each[2].left]
            heapq.heapify(self._ends)
        heapq.heappush(self._ends, (asyncio.get_running_loop().time() + seconds, next(self._numbers), waiting))
        self._await_first()

    def _await_first(self) -> None:
        """Set the timer for the first wait that ends: one for all, as very many may end together."""
        first = self._ends[0][0]
        if self._timer is not None:
            due, timer = self._timer
            if due <= first:
                return
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = first, loop.call_later(max(0.0, first - loop.time()), self._end_some)

    def _end_some(self) -> None:
        """End waits whose time is over, for as long as an event-loop iteration has for that; the rest in the next."""
        self._timer = None
        now, end = asyncio.get_running_loop().time() + CLOCK, time.monotonic_ns() + self.part_ns
        try:
            while self._ends and self._ends[0][0] <= now:
                self._end(heapq.heappop(self._ends)[2])
                if time.monotonic_ns() >= end:
                    break
        finally:
            if self._ends:
                self._await_first()

    def settled(self, sequence: int, analyzer: str | None) -> None:
        """Note that a packet was delivered to ``analyzer``, or (None) is a dead letter; answer who waits for that."""
        waiting = self.waiting.get(sequence)
        if waiting is None:
            return
        self._forget(waiting, (sequence,) if analyzer is not None else tuple(waiting.left))
        if not waiting.left:
            response = waiting.dead_letter() if analyzer is None else waiting.delivered(analyzer)
            waiting.pending.complete_after_sync(_bytes(waiting.pending, response))

    def lost(self, sequence: int) -> None:
        """Answer the emitter that waits for this packet, which was damaged in the queue: it will not be delivered."""
        waiting = self.waiting.get(sequence)
        if waiting is not None:
            self._forget(waiting, tuple(waiting.left))
            waiting.pending.complete(_bytes(waiting.pending, waiting.lost()))

    def wait_over(self, sequence: int) -> None:
        """Answer that packets are safe, but were not delivered in the time the emitter was prepared to wait."""
        waiting = self.waiting.get(sequence)
        if waiting is not None:
            self._end(waiting)

    def _end(self, waiting: Waiting) -> None:
        if waiting.left:
            self._forget(waiting, tuple(waiting.left))
            waiting.pending.complete_after_sync(_bytes(waiting.pending, waiting.stored()))

    def end_waiting(self) -> None:
        """Answer so to all that still wait: the time of this process is up, not that of their packets."""
        for sequence in tuple(self.waiting):
            self.wait_over(sequence)

    def close_all(self) -> None:
        """Close all connections when all is written."""
        for connection in tuple(self.intake.connections):
            if connection.transport is not None:
                connection.transport.close()

    def forget(self, connection: IngestProtocol) -> None:
        """Drop the waits of a connection that is gone."""
        for sequence in tuple(connection.awaited):
            if (waiting := self.waiting.get(sequence)) is not None and waiting.connection is connection:
                self._forget(waiting, (sequence,))

    def forget_wait(self, sequence: int) -> None:
        """Drop the wait for this packet, and for all others of the same response, which is sent by other means."""
        waiting = self.waiting.get(sequence)
        if waiting is not None:
            self._forget(waiting, tuple(waiting.left))

    def forget_from(self, sequence: int) -> None:
        """Drop the waits for packets from this sequence on: they were never stored, and others will have it."""
        for unknown in [each for each in self.waiting if each >= sequence]:
            self._forget(self.waiting[unknown], (unknown,))

    def _forget(self, waiting: Waiting, sequences: Collection[int]) -> None:
        for sequence in sequences:
            if self.waiting.get(sequence) is waiting:  # or the packet was withdrawn, and another has its sequence
                del self.waiting[sequence]
        waiting.connection.awaited.difference_update(sequences)
        waiting.left.difference_update(sequences)


def _bytes(pending: PendingResponse, response: Response) -> bytes:
    return pending.compose(*response.parts)


class IngestProtocol(IngestBase, asyncio.Protocol):
    """One emitter's connection."""

    def __init__(self, intake: Intake, emitters: Emitters) -> None:  # noqa: ARG002  (intake is taken by __cinit__)
        self.emitters = emitters
        self.awaited: set[int] = set()  # sequences of packets whose delivery it waits for

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection in, unless there are too many."""
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self.peer = self.address = str(peer[0]) if peer else ""
        self.set_client(self.address)
        if self.emitters.proxies and self.emitters.proxies.trusts(self.peer):
            self.forwarded = b""
        self.intake.connections.add(self)
        rejected = self.emitters.rejected
        if len(self.intake.connections) - len(rejected) > self.intake.max_connections:
            rejected.add(self)
            self.emitters.on_rejected(CONNECTIONS, self.address, "")
            response = problem(503, "too many connections; try again shortly", headers=retry_after())
            self.close_with(self._compose(response, close=True), len(rejected) <= MAX_REJECTED)
        self._count()

    def client_changed(self, forwarded: bytes) -> None:
        """Note whose the requests of a trusted proxy are from now on."""
        self.address = self.emitters.proxies.client(forwarded.decode("latin-1"), self.peer)
        self.set_client(self.address)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Release everything."""
        self.let_go()
        self.transport = None
        self.intake.connections.discard(self)
        self.emitters.rejected.discard(self)
        self.emitters.forget(self)
        self._count()

    def _count(self) -> None:
        self.intake.counters.set("emitters", len(self.intake.connections) - len(self.emitters.rejected))

    def eof_received(self) -> bool:
        """Let pending responses still be sent; a request cut short gets none."""
        self.read_rest()
        self.ended()
        if not self.transport.can_write_eof():  # TLS, which ends both sides: responses have to be sent now
            self.end_waits()
            return False
        waits: bool = self.has_waiting()
        return waits

    def end_waits(self) -> None:
        """Answer 202 to all waits on this connection: their packets are stored."""
        for sequence in tuple(self.awaited):
            self.emitters.wait_over(sequence)

    def shut(self, lingering: bool) -> None:  # noqa: FBT001
        """Close when all is written; ``lingering``: read on for a while, so that no reset destroys the response."""
        if lingering:
            self.transport.write_eof()
        else:
            self.transport.close()

    def went_wrong(self, error: Exception) -> None:
        """Report an error of the program, which has cost the connection."""
        asyncio.get_running_loop().call_exception_handler(
            {"message": "a connection is closed for an error in its protocol", "exception": error, "protocol": self}
        )

    def check(self, now_ns: int) -> None:
        """Act on whatever has taken too long."""
        late = self.expired(now_ns)
        if late in ("head", "body", "idle") and self.has_unread():  # it arrived in time, and was not read yet
            return
        if late == "head":
            self.time_out("the request's head did not arrive in time")
        elif late == "body":
            self.time_out("the request's body came too slowly")
        elif late == "wait":
            self.end_waits()
            if self.has_waiting() and self.is_stuck(now_ns):  # what it depends on does not come
                self.transport.abort()
        elif late == "idle" and not self.transport.is_closing():  # or its last responses are not read
            self.transport.close()
        elif late:
            self.transport.abort()

    # ---- responses

    def _compose(self, response: Response, *, close: bool = False) -> bytes:
        return self.respond(*response.parts, close)

    def handle(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes | None:
        """Answer a request that brings no packets; a change that was asked for is answered when it is carried out."""
        if self.route is not None:
            return self._compose(self._without_records(method, headers, body))
        response = self.emitters.api.respond(method, target, headers, body, self.address)
        if isinstance(response, Response):
            return self._compose(response)
        pending = self.promise()
        self.emitters.carry_out(response, lambda response: pending.complete(_bytes(pending, response)))
        return None

    def route_of(self, method: str, target: str, headers: Mapping[str, str]) -> tuple[object, bool] | None:
        """Return what a request is for, and whether it brings an agent's records; None: for no agent."""
        return self.emitters.agents.find(method, target, headers)

    def refuse(self, status: int, counter: str, detail: str, headers: bytes = b"") -> bytes:
        """Count and describe a fault."""
        if counter and (self.is_log or self.brings or counter in UNREADABLE):
            self._count_rejected(counter)
        if self.route is not None and status in REASONS:
            return self._compose(self._agent().refused(Refused(REASONS[status], detail, headers=headers)))
        return self._compose(problem(status, detail, headers=headers))

    def _count_rejected(self, counter: str, pointer: str = "") -> None:
        self.intake.counters.add(counter)
        self.emitters.on_rejected(counter, self.address, pointer)

    def _refuse_for(self, why: Refused) -> bytes:
        """Count and describe why packets are not taken."""
        if counter := counter_of(why.reason):
            self._count_rejected(counter, "" if why.record is None else f"/{why.record}")
        if self.route is not None:
            return self._compose(self._agent().refused(why))
        headers = refusal_headers(why, b"")
        if why.reason is Reason.RATE_LIMITED:
            return self._compose(problem(429, why.detail, headers=headers))
        stored = "no" if self.emitters.shared and why.reason in BUSY else ""
        return self._compose(problem(STATUSES[why.reason], why.detail, headers=headers, stored=stored))

    def limited(self, seconds: float) -> bytes:
        """Answer that the rate is exceeded."""
        wait = max(1, math.ceil(seconds))
        detail = f"more requests than the limit allows; try again in {wait} s"
        return self._refuse_for(Refused(Reason.RATE_LIMITED, detail, retry_after=wait))

    def is_authorized(self, authorization: bytes) -> bool:
        """Whether an Authorization header holds one of the tokens, in one of the forms that are known here."""
        given, tokens = authorization.decode("latin-1"), self.emitters.tokens
        if self.route is None:
            return has_token(given, tokens)
        forms = self.route.protocol.tokens({"authorization": given})
        return sum(is_token(form, tokens) for form in forms) > 0

    def unauthorized(self, authorization: bytes | None) -> bytes:
        """Answer that a token is missing or wrong."""
        if self.route is not None:
            detail = "this token is not known" if authorization is not None else "a token is needed"
            return self._refuse_for(Refused(Reason.UNAUTHORIZED, detail))
        headers = b'WWW-Authenticate: Bearer realm="fastdist"\r\n'
        if authorization is not None:
            headers = b'WWW-Authenticate: Bearer realm="fastdist", error="invalid_token"\r\n'
        detail = "this token is not known" if authorization is not None else "a bearer token is needed"
        return self._refuse_for(Refused(Reason.UNAUTHORIZED, detail, headers=headers))

    def invalid(self, error: Exception) -> bytes:
        """Answer that the body is no packet, or cannot be converted to packets."""
        if isinstance(error, Refused):
            return self._refuse_for(error)
        if isinstance(error, PacketError):
            self._count_rejected(error.reason, error.errors[0]["pointer"] if error.errors else "")
            return self._compose(problem(400, error.detail, errors=error.errors))
        response = self.emitters.api.faults.response(error)
        if self.route is None:
            return self._compose(response)
        return self._refuse_for(Refused(Reason.FAULT, INTERNAL_ERROR))

    def not_stored(self, full: bool) -> bytes:  # noqa: FBT001
        """Answer that packets cannot be stored now."""
        if full:
            seconds = self.emitters.found_full()
            why = Refused(Reason.QUEUE_FULL, f"the queue is full; try again in {seconds} s", retry_after=seconds)
        elif self.intake.closed:
            why = Refused(Reason.DRAINING, "the service is shutting down")
        elif self.emitters.shared:
            fault = self.emitters.api.snapshot().storage_error
            why = Refused(Reason.STORAGE, f"nothing can be stored now: {fault or 'the stream was not reached'}")
        else:
            fault = os.strerror(self.intake.broken_storage)
            why = Refused(Reason.STORAGE, f"the queue's storage fails ({fault}); nothing can be stored safely now")
        return self._refuse_for(why)

    def crowded_out(self) -> bytes:
        """Answer that in-progress bodies take all the memory there is for them."""
        detail = "more bodies are on their way than there is memory for; try again shortly"
        if self.is_log or self.brings:
            return self._refuse_for(Refused(Reason.QUEUE_FULL, detail))
        return self._compose(problem(503, detail, headers=retry_after()))

    def origin_headers(self, origin: bytes) -> bytes | None:
        """Return the CORS headers for an origin, if it is listed."""
        return cors_headers(origin.decode("latin-1"), self.emitters.cors_origins) or None

    def await_delivery(
        self, pending: PendingResponse, sequence: int, seconds: float, packet_id: str, messages: int | None
    ) -> None:
        """Answer once the packet is delivered, or after ``seconds``."""
        waiting = PacketWait(self, pending, sequence, packet_id, UNSET if messages is None else messages)
        self.emitters.wait(seconds, waiting)

    # ---- agents' requests, and bodies that are encoded

    def _agent(self, body: bytes = b"") -> AgentRequest:
        assert self.route is not None  # noqa: S101  (for type checkers)
        return AgentRequest(self.route, self._request(body), self.intake.counters)

    def _request(self, body: bytes) -> Request:
        assert self.request is not None  # noqa: S101  (for type checkers)
        return Request(*self.request, body, self.address, time.time_ns())

    def _without_records(self, method: str, headers: Mapping[str, str], body: bytes) -> Response:
        agent, api = self._agent(body), self.emitters.api
        route = agent.route
        if method == "OPTIONS" and (route.reply is None or is_preflight(headers)):
            return api.options(headers, route.allow)
        try:
            return agent.without_records(api.snapshot().obstacle)
        except Exception as error:  # noqa: BLE001  (every request gets a response)
            return api.faults.response(error)

    def conversion_of(self, body: bytes) -> Generator[int | None, None, Batch | bytes]:
        """Return what makes packets of the body of an agent's request, or decodes that of a packet."""
        limits = self.emitters.agents.limits
        if self.route is None:
            return decode(self._request(body), limits.max_body)
        return self._agent(body).work(limits)

    def stored(self, batch: Batch) -> bytes:
        """Answer that a batch is stored. The core counts it once that is so."""
        return self._compose(batch.reply)

    def withdrawn(self) -> Callable[[PendingResponse], bytes]:
        """Return what makes the response if the batch is withdrawn because it could not be written or synced."""
        what = "not all records could be stored" if self.emitters.shared else "the records could not be written to disk"
        agent, why = self._agent(), Refused(Reason.STORAGE, what)
        return lambda pending: _bytes(pending, agent.refused(why))

    def awaiting(self, pending: PendingResponse, seconds: float, batch: Batch) -> Callable[[Collection[int]], None]:
        """Return what, given the packets' sequences, answers once all are delivered, or after ``seconds``."""
        agent, batch = self._agent(), batch.without_packets()  # a wait may be for a day
        return lambda sequences: self.emitters.wait(seconds, BatchWait(self, pending, sequences, agent, batch))
