"""The ingest of one worker without sockets: real ring, shared block, rate limits and API; a transport that keeps notes.

``Service`` is the worker's part, ``Service.connect()`` an emitter's connection to it. What is written is read by
``read_answers``, which is strict and checks what every answer must have, so that each test checks it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import heapq
import itertools
import os
import re
import time
import weakref
from collections import deque
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import orjson
from msgspec.structs import replace

from fastdist import packet
from fastdist._core import Intake, PacketRing, file_size
from fastdist.http.api import Api
from fastdist.http.responses import problem
from fastdist.settings import Config, Limits, Security, Server
from fastdist.shm.block import AnalyzerWord, SharedBlock, WorkerState, WorkerWord
from fastdist.shm.snapshot import REJECTIONS, Snapshot
from fastdist.worker.ingest import Emitters, IngestProtocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.shm.histograms import Histogram

BODY = b'{"emitterId":"web-1","messages":[{"message":"one"},{"message":"two"}]}'
RECORDS = b"""{"time":1760000000,"host":"h","message":"one"}
{"time":1760000001,"host":"h","message":"two"}
"""
EVENTS = RECORDS.replace(b"message", b"event")
STREAMS = b'{"streams":[{"stream":{"host":"h"},"values":[["1760000000000000000","one"]]}]}'
ADDRESS = "192.0.2.1"
SECOND = 10**9
UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
DATE = re.compile(rb"Date: (?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\r\n")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110; Python's are older


# ---- requests


def head(first: str, *lines: str, host: str | None = "logs.example") -> bytes:
    """Return a request head: its first line (a version is added if it has none), then Host, then ``lines``."""
    if " HTTP/" not in first:
        first += " HTTP/1.1"
    return "\r\n".join([first, *([f"Host: {host}"] if host is not None else []), *lines, "", ""]).encode("latin-1")


def post(body: bytes = BODY, *lines: str, first: str = "POST /logs", host: str | None = "logs.example") -> bytes:
    """Return a request with Content-Length."""
    return head(first, *lines, f"Content-Length: {len(body)}", host=host) + body


def post_chunked(*chunks: bytes, lines: tuple[str, ...] = (), end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a request whose body comes in these chunks."""
    return head("POST /logs", *lines, "Transfer-Encoding: chunked") + b"".join(map(chunk, chunks)) + end


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def keyed(key: str, body: bytes = BODY, *lines: str) -> bytes:
    return post(body, f"Idempotency-Key: {key}", *lines)


def corpus() -> dict[str, bytes]:
    """Return what emitters send, good and bad, by name; keys make the ids of packets the same every time."""
    one, two, three = keyed("k1"), keyed("k2", b'{"emitterId":"e","messages":[{"message":"x"}]}'), keyed("k3")
    health = head("GET /health")
    return {
        "plain": post(),
        "keyed": one,
        "every header": keyed("k", BODY, "Content-Type: application/json; charset=utf-8", "Accept: */*", "X-Empty:"),
        "odd spacing": head("POST /logs", f"content-LENGTH:\t {len(BODY)} \t", "Idempotency-Key:k") + BODY,
        "empty lines before": b"\r\n\r\n" + one + b"\r\n" + two,
        "absolute form": keyed("k").replace(b" /logs", b" http://logs.example:3000/logs?a=b"),
        "pair": one + two,
        "triple": one + post(b"{") + three,
        "bad, then good": post(b"[]") + post(b"\xff") + one,
        "chunked": post_chunked(BODY[:1], BODY[1:40], BODY[40:], lines=("Idempotency-Key: k",)),
        "chunked, pipelined": post_chunked(BODY, lines=("Idempotency-Key: k",)) + two,
        "chunk extensions, trailers": head("POST /logs", "Transfer-Encoding: CHUNKED", "Idempotency-Key: k")
        + b'5;a=b;c="d"\r\n%b\r\n%X\r\n%b\r\n00;x\r\nX-Sum: 1\r\nX-Other:\r\n\r\n' % (BODY[:5], len(BODY) - 5, BODY[5:])
        + two,
        "chunked and empty": post_chunked() + one,
        "empty": post(b"") + one,
        "no length": head("POST /logs") + one,
        "expect": keyed("k", BODY, "Expect: 100-continue") + two,
        "expect, chunked": post_chunked(BODY, lines=("Expect: 100-continue", "Idempotency-Key: k")) + two,
        "expect and refused": post(BODY, "Expect: 100-continue", "Content-Type: text/plain") + one,
        "expect something else": post(BODY, "Expect: 200-ok") + one,
        "health": health + head("HEAD /health") + health,
        "head of logs": head("HEAD /logs") + one,
        "options": head("OPTIONS /logs") + head("OPTIONS *") + one,
        "not found, with a body": post(b"abc", first="PUT /nowhere") + one,
        "not allowed": head("GET /logs") + post(b"x", first="DELETE /stats") + one,
        "unknown method": head("BREW /logs") + one,
        "http/1.0": head("POST /logs HTTP/1.0", f"Content-Length: {len(BODY)}", host=None) + BODY + two,
        "http/1.0, kept alive": head("POST /logs HTTP/1.0", "Connection: keep-alive", f"Content-Length: {len(BODY)}")
        + BODY
        + two,
        "close": keyed("k", BODY, "Connection: close") + two,
        "h2c": keyed("k", BODY, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIA"),
        "media type": post(BODY, "Content-Type: text/plain") + one,
        "encoded": post_chunked(BODY, lines=("Content-Encoding: br",)) + one,
        "bad key": keyed("a b") + one,
        "too large": post(bytes(5000)) + one,
        "too large, chunked": post_chunked(bytes(3000), bytes(3000)) + one,
        "refused and too large, chunked": post_chunked(bytes(5000), lines=("Content-Encoding: br",)) + one,
        "head too large": one + head("POST /logs", "X-Padding: " + "x" * 2000),
        "head too large, and bad beyond": one + head("POST /logs", "X-Padding: " + "x" * 2000, "Y: \x01"),
        "head too large, and bad before": one + head("POST /logs", "Y: \x01", "X-Padding: " + "x" * 2000),
        "trailers too large": post_chunked(BODY, end=b"0\r\n" + b"A: b\r\n" * 300 + b"\r\n") + one,
        "two lengths": one + post(BODY, f"Content-Length: {len(BODY)}") + two,
        "length and coding": one + post(BODY, "Transfer-Encoding: chunked") + two,
        "unknown coding": one + head("POST /logs", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
        "future version": one + head("POST /logs HTTP/2.0", "X: \x01"),
        "control character": one + head("POST /logs", "X: a\x00b", "Content-Length: 1") + b"x",
        "control character later": one + head("POST /logs", "Content-Length: x", "A: b", "X: a\x7fb") + b"x",
        "broken head of HEAD": one + head("HEAD /health", "X: a\xff\rb", "Y: z"),
        "bare line feed": one + b"POST /logs HTTP/1.1\nHost: x\r\n\r\n",
        "bare line feed later": one + b"POST /logs HTTP/1.1\r\nHost x\r\nA: b\n\r\n\r\n",
        "bare carriage return": one + b"POST /logs HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
        "folded line": one + head("POST /logs", "A: b", " c", "Content-Length: 1") + b"x",
        "bad chunk": one + post_chunked(BODY, end=b"x\r\n") + two,
        "bad chunk of what is refused": post_chunked(b"ab", lines=("Content-Type: a/b",), end=b"x\r\n") + two,
        "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
        "cut short": one + two[:-1],
        "agents": one + post(RECORDS, first="POST /ingest/app") + two + post(STREAMS, first="POST /loki/api/v1/push"),
        "agents, chunked": head("POST /services/collector", "Transfer-Encoding: chunked")
        + chunk(EVENTS[:20])
        + chunk(EVENTS[20:])
        + chunk(b"")
        + one,
        "agents, encoded": post(gzip.compress(RECORDS, mtime=1), "Content-Encoding: gzip", first="PUT /ingest") + one,
        "packet, encoded": post(gzip.compress(BODY, mtime=1), "Content-Encoding: gzip", "Idempotency-Key: k") + two,
        "agents, other methods": head("GET /services/collector/health") + head("OPTIONS /v1/logs") + one,
    }


# ---- answers


class Answer(NamedTuple):
    """A final answer; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    interims: int = 0  # 100s before it

    @property
    def json(self):
        return orjson.loads(self.body)

    @property
    def id(self) -> str:
        return self.json["packetId"]

    @property
    def closes(self) -> bool:
        return self.headers.get("connection") == "close"


def read_answers(data: bytes, *methods: str, agents: bool = False) -> list[Answer]:
    """Take apart what was written; ``methods`` of the requests, in order, where one may be HEAD.

    ``agents``: errors may be in the shape of an agents' protocol.

    Fails unless every answer is well-formed, complete, and has what all answers have to have.
    """
    answers, asked, interims = [], iter(methods), 0
    while data:
        if data.startswith(CONTINUE):
            data, interims = data.removeprefix(CONTINUE), interims + 1
            continue
        top, separator, data = data.partition(b"\r\n\r\n")
        assert separator, top
        first, *lines = top.decode("latin-1").split("\r\n")
        parts = re.fullmatch(r"HTTP/1\.1 ([2-5]\d\d) ([A-Z][A-Za-z -]+)", first)
        assert parts, first
        status = int(parts[1])
        assert parts[2] == (TITLES.get(status) or HTTPStatus(status).phrase)
        headers = _read_headers(lines)
        length = int(headers.get("content-length", "0"))
        if next(asked, "POST") == "HEAD":
            length = 0
        assert len(data) >= length, (first, data)
        answer = Answer(status, headers, data[:length], interims)
        _check(answer, has_body=length > 0, agents=agents)
        answers.append(answer)
        data, interims = data[length:], 0
    assert interims == 0
    return answers


def _read_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        field = re.fullmatch(r"([A-Za-z][A-Za-z-]*): ([!-~](?:[ -~]*[!-~])?)", line)
        assert field, line
        name = field[1].lower()
        assert name not in headers, lines
        headers[name] = field[2]
    return headers


def _check(answer: Answer, *, has_body: bool, agents: bool) -> None:
    headers = answer.headers
    assert DATE.fullmatch(f"Date: {headers['date']}\r\n".encode())
    assert abs(time.time() - parsedate_to_datetime(headers["date"]).timestamp()) < 3600
    assert headers["x-content-type-options"] == "nosniff"
    # What may be kept has to be asked for again.
    assert headers["cache-control"] == ("no-cache" if "etag" in headers else "no-store")
    assert not headers.keys() & {"server", "x-powered-by", "transfer-encoding"}
    assert headers.get("connection", "close") in ("close", "keep-alive")
    assert ("content-length" in headers) == (answer.status not in (204, 304))
    if answer.status >= 400 and not (agents and headers["content-type"] != "application/problem+json"):
        assert headers["content-type"] == "application/problem+json"
        if has_body:
            document = answer.json
            assert list(document)[:4] == ["type", "title", "status", "detail"]
            assert document.keys() <= {"type", "title", "status", "detail", "errors"}
            assert document["type"] == "about:blank"
            assert document["status"] == answer.status
            assert document["title"] == (TITLES.get(answer.status) or HTTPStatus(answer.status).phrase)
            assert document["detail"]
            for error in document.get("errors", ()):
                assert error.keys() == {"pointer", "detail"}
                assert error["pointer"] == "" or error["pointer"].startswith("/")


def normalised(data: bytes) -> bytes:
    """Return what was written with dates and made-up ids replaced: two of the same can be compared."""
    return DATE.sub(b"Date: DATE\r\n", UUID.sub(b"UUID", data))


# ---- the service


class Loop:
    """Timers that go off when told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, seconds, callback, *args):
        timer = Timer(lambda: callback(*args))
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), timer))
        return timer

    def next(self) -> None:
        """Let the first timer go off that is due, as in a turn of its own."""
        while (timer := heapq.heappop(self._timers)[2]).cancelled:
            pass
        timer.callback()

    @property
    def timers(self) -> int:
        """How many there are."""
        return sum(not timer.cancelled for _, _, timer in self._timers)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while self._timers and self._timers[0][0] <= self.now:
            timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled:
                timer.callback()


class Timer:
    def __init__(self, callback) -> None:
        self.callback, self.cancelled = callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Transport:
    """What the event loop would hand to a protocol. Fails when it is used after it was closed."""

    def __init__(self, address: str | None = ADDRESS) -> None:
        self.peer = (address, 50000) if address is not None else None
        self.writes: list[bytes] = []
        self.reading = True
        self.unwritten = 0  # bytes that the emitter's system does not take
        self.half_closed = self.closed = self.aborted = False

    def get_extra_info(self, name, default=None):
        return self.peer if name == "peername" else default

    def write(self, data):
        assert type(data) is bytes
        assert data
        assert not self.half_closed
        assert not self.closed
        self.writes.append(data)

    def get_write_buffer_size(self):
        return self.unwritten

    def can_write_eof(self):
        return True

    def write_eof(self):
        assert not self.closed
        assert not self.half_closed
        self.half_closed = True

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        assert self.reading
        self.reading = False

    def resume_reading(self):
        assert not self.reading
        self.reading = True

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True


class Connection:
    """An emitter's end. What it sends waits, as in a socket, while the other end does not read."""

    def __init__(self, service: Service, address: str | None = ADDRESS) -> None:
        self.protocol = service.protocol(service.intake, service.emitters)
        self.transport = Transport(address)
        self._unread: deque[bytes] = deque()
        self._turns = service.turns
        self.agents = False  # errors may be in the shape of an agents' protocol
        self.protocol.connection_made(self.transport)

    def send(self, *reads: bytes) -> Connection:
        """Send; each of ``reads`` arrives by itself."""
        self._unread.extend(reads)
        self.pump()
        return self

    def pump(self) -> None:
        while not self.transport.closed:
            if self._turns:
                self._turns.popleft()()
            elif self._unread and self.transport.reading:
                data = self._unread.popleft()
                if data:
                    self.protocol.data_received(data)
            else:
                return

    def end(self) -> None:
        """Send the end of the stream."""
        if not self.protocol.eof_received():
            self.transport.close()

    def wait(self, seconds: float) -> None:
        """Let that time pass without anything being sent, as far as this connection's time-outs are concerned."""
        self.protocol.check(time.monotonic_ns() + int(seconds * SECOND))

    def age(self, seconds: float) -> None:
        """Let all that has happened here have happened so much earlier."""
        self.protocol.excuse(time.monotonic_ns(), -int(seconds * SECOND))

    def lose(self) -> None:
        """Let the connection be gone."""
        self.transport.closed = True
        self.protocol.connection_lost(None)

    @property
    def written(self) -> bytes:
        return b"".join(self.transport.writes)

    def answers(self, *methods: str) -> list[Answer]:
        return read_answers(self.written, *methods, agents=self.agents)

    def answer(self, method: str = "POST") -> Answer:
        """Return the only answer."""
        (answer,) = self.answers(method)
        return answer

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers()]

    @property
    def open(self) -> bool:
        """Whether further requests are read."""
        return not self.transport.closed and not self.transport.half_closed


class Service:
    """A worker's ingest. Keywords are settings of ``[server]``; ``security`` and ``limits`` those of their sections.

    ``fsync``: answers wait for ``synced``, as with durability fsync; ``disk``: until their packets are written;
    ``replicated``: until they are stored elsewhere. ``remembers_keys``: see ``Intake``.
    """

    def __init__(  # noqa: PLR0913  (settings of a service)
        self,
        *,
        capacity: int = 2**20,
        fsync: bool = False,
        disk: bool = False,
        replicated: bool = False,
        remembers_keys: bool = False,
        security: dict | None = None,
        limits: dict | None = None,
        protocol: type[IngestProtocol] = IngestProtocol,
        **server: object,
    ) -> None:
        self.protocol = protocol
        self.config = replace(
            Config(), server=Server(**server), security=Security(**security or {}), limits=Limits(**limits or {})
        )
        self.block = SharedBlock.create(1, 8)
        os.close(self.block.fd)  # the mappings stay
        self.block.worker(0)[WorkerWord.STATE] = WorkerState.RUNNING
        self.analyzers = dict(enumerate(self.config.analyzers))
        for slot in self.analyzers:
            self.block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
            self.block.analyzers.set_weight(slot, 1.0)
        self.fd = fd = os.memfd_create("ring", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, file_size(capacity))
        volatile = not (fsync or disk)
        self.ring = PacketRing(fd, capacity, claims_wait_for_sync=fsync, volatile=volatile, replicated=replicated)
        self.counters = self.block.rows[0]
        limiter = self.block.limiter()
        limiter.configure(*(float(value) for value in (getattr(self.config.limits, name) for name in LIMITS)))
        self.accepts = self.syncs_wanted = self.unwritten = 0
        self.intake = Intake(
            self.ring,
            self.counters,
            limiter,
            self.config.server,
            packet.check,
            self._accepted,
            self._sync_wanted if fsync or replicated else None,
            self._not_written,
            responds_after_sync=fsync or replicated,
            remembers_keys=remembers_keys,
        )
        api = Api(lambda: Snapshot(self.block, self.config, self.analyzers, "1.2.3", at=0))
        self.emitters = Emitters(api, self.intake, lambda _action, _done: None, self.config.server)
        self.turns: deque[Callable[[], None]] = deque()  # what the event loop is to call in its next turn
        self.intake.later = self.turns.append
        self.budget(10**18, 10**18)
        self.emitters.configure(self.config.security.tokens, self.config.security.cors_origins)
        self.loop = Loop()

    def _accepted(self) -> None:
        self.accepts += 1

    def _sync_wanted(self) -> None:
        self.syncs_wanted += 1

    def _not_written(self, code: int) -> None:
        self.unwritten = code
        fault = problem(503, "the packet could not be written to disk", headers=b"Retry-After: 1\r\n")
        answer = fault.status, "Service Unavailable", fault.headers, fault.body
        self.counters.add("storage", self.intake.not_stored(self.ring.tail_position, *answer))
        self.emitters.forget_from(self.ring.next_sequence_number)

    def connect(self, address: str | None = ADDRESS) -> Connection:
        return Connection(self, address)

    def budget(self, packets: int, costly: int, *, loop: int = 10**18) -> None:
        """Give every event-loop iteration so many ns. With 0 and 1 it has time for one packet and one costly answer."""
        self.intake.slice_ns = self.intake.packets_ns = packets
        self.intake.costly_ns, self.intake.loop_ns = costly, loop
        self.intake.go_on()

    def turn(self) -> None:
        """Let the event loop have one turn."""
        for _ in range(len(self.turns)):
            self.turns.popleft()()

    def ask(self, *reads: bytes) -> Connection:
        """Send on a connection of its own."""
        return self.connect().send(*reads)

    def packets(self):
        """Take what can be claimed out of the ring."""
        packets = []
        while handle := self.ring.claim():
            packets.append(self.ring.packet(handle))
            self.ring.done(handle)
        return packets

    def bodies(self) -> list[bytes]:
        return [packet.body for packet in self.packets()]

    def deliver(self, analyzer: str | None = "A2") -> None:
        """Take all packets out of the ring; answer waiting emitters: delivered to ``analyzer`` (None: dead letter)."""
        for taken in self.packets():
            self.emitters.settled(taken.sequence, analyzer)

    def sync(self, position: int | None = None) -> None:
        """Have everything up to ``position`` (all there is) synced."""
        position = self.ring.tail_position if position is None else position
        self.ring.mark_synced(position)
        self.intake.synced()

    @property
    def rejected(self) -> dict[str, int]:
        """Counters of rejections that are not 0."""
        counts = {reason: self.counters.get(reason) for reason in REJECTIONS}
        return {reason: count for reason, count in counts.items() if count}

    @property
    def accepted(self) -> int:
        return self.counters.get("accepted")

    @property
    def ingest(self) -> Histogram:
        """How long answers took."""
        return self.emitters.api.snapshot().ingest

    @contextlib.contextmanager
    def timers(self):
        """Have timers go off by ``loop.advance`` only."""
        with mock.patch.object(asyncio, "get_running_loop", return_value=self.loop):
            yield self.loop


LIMITS = ("rate", "burst", "client_rate", "client_burst")
