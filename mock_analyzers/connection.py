"""One connection of a sender: parses requests, answers them in their order, and does to it what the options say.

Rules:

1. All responses that one read produced leave in one write, and only after that write do their packets count as
   acknowledged: a connection that turned out to be dead has acknowledged nothing.
2. Responses keep the order of their requests. One that has to wait (``latency``) makes all behind it wait, in a queue
   with one timer per connection.
3. Once a connection is ending (it hangs, or its last response is out), what still comes on it is counted and ignored.
4. No exception leaves a method that the event loop calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, cast

import httptools

from mock_analyzers import responses
from mock_analyzers.control import is_control
from mock_analyzers.ledger import Ledger
from mock_analyzers.options import Fault, draw_delay, draw_fault, draw_status
from mock_analyzers.responses import is_success, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mock_analyzers.analyzer import Analyzer
    from mock_analyzers.control import Control
    from mock_analyzers.responses import Response

_OK = b"".join(verdict(200))
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time: close() sends RST instead of FIN
_MAX_REQUEST = 256 * 1024 * 1024  # bytes; a sender that never finishes must not eat the machine
_ENOUGH_BUFFERED = 1024 * 1024  # bytes of a long response waiting for a slow reader
_MALFORMED = b""  # the "method" of what cannot be parsed
_TICK = 0.001  # seconds, the event loop's resolution


class Request(NamedTuple):
    """A complete request; ``ids`` are those of its packets, none unless it is for the analyzer."""

    method: bytes
    path: bytes
    body: bytes
    keep_alive: bool
    ids: Sequence[bytes] = ()
    attempt: bytes = b""
    rejected: bool = False


class Connection(asyncio.Protocol):
    """A connection to ``analyzer``, or to the control port if that is ``None``."""

    _transport: asyncio.Transport

    def __init__(self, analyzer: Analyzer | None, control: Control) -> None:
        self._analyzer = analyzer
        self._ledger = analyzer.ledger if analyzer else Ledger()  # of the control port: never filled
        self._control = control
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._unfinished = 0  # bytes read since the last complete request
        self._out: list[bytes] = []  # responses to be written together
        self._unconfirmed: list[Request] = []  # their requests, acknowledged by the write
        self._queue: deque[tuple[float, Request]] = deque()  # (when due, what)
        self._timer: asyncio.TimerHandle | None = None
        self._sent = 0
        self._ignoring = False  # what comes cannot be parsed any more
        self._ending = False  # rule 3

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the analyzer's connections."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without saying so
        if self._analyzer is not None:
            self._analyzer.connections.add(self)
            if self._analyzer.options.refuse:  # accepted in the very moment the listener closed
                self.drop()

    def data_received(self, data: bytes) -> None:
        """Parse, answer and write."""
        if self._ignoring:
            return
        self._unfinished += len(data)
        try:
            self._parser.feed_data(data)
            if self._unfinished > _MAX_REQUEST:
                self._give_up()
        except httptools.HttpParserCallbackError as error:
            sys.stderr.write(f"mock_analyzers: a request failed: {error.__context__!r}\n")
            self._give_up()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._give_up()
        if self._out:
            self._flush()

    def pause_writing(self) -> None:
        """Stop reading from a sender that does not read its responses."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Count what was never answered, and leave."""
        self._ending = self._ignoring = True
        if self._timer is not None:
            self._timer.cancel()
        for _, request in self._queue:
            self._ledger.miss(request.ids)
        self._queue.clear()
        if self._analyzer is not None:
            self._analyzer.connections.discard(self)

    def drop(self) -> None:
        """End the connection; what was answered still leaves."""
        self._flush()
        self._ending = self._ignoring = True
        self._transport.close()

    @property
    def waiting(self) -> int:
        """How many requests wait for their response."""
        return len(self._queue)

    # What the parser calls. Names and signatures are httptools'.

    def on_url(self, url: bytes) -> None:
        """Take the target, or a part of it: it may come in two reads."""
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        name = name.lower()
        self._headers[name] = value
        if name == b"expect" and not self._queue and not self._ending:
            self._out.append(responses.CONTINUE)

    def on_body(self, data: bytes) -> None:
        """Take a part of the body."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Answer, or queue the request for later."""
        headers, chunks, path = self._headers, self._body, self._path
        self._headers, self._body, self._path = {}, [], b""
        self._unfinished = 0
        if self._parser.should_upgrade():  # the parser has skipped the body; what follows is lost
            self._give_up()
            return
        method = self._parser.get_method()
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        keep_alive = self._parser.should_keep_alive()
        analyzer = self._analyzer
        if analyzer is None or method != b"POST" or is_control(path):
            self._take(Request(method, path, body, keep_alive), 0.0)
            return
        ids = self._ledger.arrive(headers, body, analyzer.options)
        # The body has been counted and looked at; a queue of requests must not hold on to it.
        rejected = analyzer.options.reject(body)
        request = Request(method, path, b"", keep_alive, ids, headers.get(b"x-attempt", b""), rejected)
        if analyzer.plain and keep_alive and not self._queue and not self._ending:
            self._out.append(_OK)  # the short way, and the usual one
            self._unconfirmed.append(request)
        else:
            self._take(request, draw_delay(analyzer.options, analyzer.random))

    def _give_up(self) -> None:
        """Answer 400 after all that is still to be answered, and read no more."""
        if not self._ignoring:
            self._ignoring = True
            self._take(Request(_MALFORMED, b"", b"", keep_alive=False), 0.0)

    # The queue (rule 2).

    def _take(self, request: Request, delay: float) -> None:
        if not self._queue and not delay:
            self._serve(request)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        self._queue.append((due, request))  # due or not, it waits for those before it
        if self._timer is None:
            self._timer = loop.call_at(due, self._serve_due)

    def _serve_due(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        soon = loop.time() + _TICK
        while self._queue and self._queue[0][0] <= soon:
            self._serve(self._queue.popleft()[1])
        self._flush()
        if self._queue:
            self._timer = loop.call_at(self._queue[0][0], self._serve_due)

    # Responses.

    def _serve(self, request: Request) -> None:
        analyzer = self._analyzer
        if self._ending:
            self._ledger.miss(request.ids)
        elif is_control(request.path):
            self._serve_control(request)
        elif request.method == _MALFORMED:
            self._send(responses.json(400, {"error": "this is not HTTP"}, close=True), request)
        elif analyzer is not None and request.method == b"POST":
            self._analyze(analyzer, request)
        elif analyzer is not None and request.method in {b"GET", b"HEAD"} and request.path.startswith(b"/health"):
            self._serve_health(analyzer, request)
        else:
            self._send(responses.json(404, {"error": "not found"}, close=not request.keep_alive), request)

    def _serve_control(self, request: Request) -> None:
        response = self._control.respond(request.method, request.path, request.body)
        if isinstance(response, responses.Response):
            self._send(response, request)
            return
        head, pieces = response
        self._out.append(head)
        self._flush()
        self._ending = self._ignoring = True
        self._pump(pieces)

    def _pump(self, pieces: Iterator[bytes]) -> None:
        """Write a long response piece by piece, so that other connections get their turn in between."""
        if self._transport.is_closing():
            return
        delay = 0.0
        if self._transport.get_write_buffer_size() > _ENOUGH_BUFFERED:
            delay = 10 * _TICK
        elif piece := next(pieces, b""):
            self._transport.write(responses.chunk(piece))
        else:
            self._transport.write(responses.chunk(b""))
            self._transport.close()
            return
        asyncio.get_running_loop().call_later(delay, self._pump, pieces)

    def _serve_health(self, analyzer: Analyzer, request: Request) -> None:
        if analyzer.options.health_hang:
            self._ending = True
        elif analyzer.options.unhealthy:
            self._send(responses.json(503, {"status": "unhealthy", "id": analyzer.id}), request)
        else:
            self._send(responses.json(200, {"status": "ok", "id": analyzer.id}), request)

    def _send(self, response: Response, request: Request) -> None:
        """Send a response that no fault touches."""
        self._out.append(response.head if request.method == b"HEAD" else response.head + response.body)
        if not request.keep_alive:
            self._close()

    def _analyze(self, analyzer: Analyzer, request: Request) -> None:
        options = analyzer.options
        fault = draw_fault(options, analyzer.random)
        if fault is not None:
            self._ledger.faults[fault.value] += 1
        if fault in {Fault.RESET, Fault.GARBAGE, Fault.HANG}:
            self._break_off(request, fault)
            return
        status = 422 if request.rejected else draw_status(options, analyzer.random)
        if fault is None:
            self._respond(analyzer, request, status)
        else:
            self._respond_in_part(analyzer, request, status, short=fault is Fault.WRONG_LENGTH)

    def _respond(self, analyzer: Analyzer, request: Request, status: int) -> None:
        options = analyzer.options
        self._sent += 1
        silent = options.silent_close and self._sent % options.silent_close == 0
        announced = options.close_every and self._sent % options.close_every == 0
        last = not request.keep_alive or bool(announced)
        response = verdict(status, options.retry_after, close=last, chunked=options.chunked)
        if options.interim:
            self._out.append(analyzer.random.choice((responses.CONTINUE, responses.EARLY_HINTS)))
        if options.chunked and response.body:
            half = len(response.body) // 2
            self._out.append(response.head + response.body[:half])
            self._flush()
            self._out.append(response.body[half:])
        else:
            self._out.append(response.head + response.body)
        if is_success(status):
            self._unconfirmed.append(request)
        else:
            self._ledger.miss(request.ids)
            self._ledger.faults[str(status)] += 1
        if last or silent:
            self._close()

    def _respond_in_part(self, analyzer: Analyzer, request: Request, status: int, *, short: bool) -> None:
        options = analyzer.options
        head, body = verdict(status, options.retry_after, chunked=options.chunked, short=short)
        self._flush()
        whole_head = short or (bool(body) and analyzer.random.random() < 0.5)  # noqa: PLR2004 - heads or tails
        if not short:
            head, body = (head, body[: len(body) // 2]) if whole_head else (head[: len(head) // 2], b"")
        self._out.append(head + body)
        self._flush()
        if whole_head and is_success(status) and not self._transport.is_closing():
            self._ledger.doubt(request.ids)
        else:
            self._ledger.miss(request.ids)
        if short:
            self._close()
        else:
            self._reset()

    def _break_off(self, request: Request, fault: Fault) -> None:
        self._ledger.miss(request.ids)
        if fault is Fault.RESET:
            self._reset()
            return
        if fault is Fault.GARBAGE:
            self._out.append(responses.GARBAGE)
        self._ending = True

    # Writing and closing (rule 1).

    def _flush(self) -> None:
        out, unconfirmed = self._out, self._unconfirmed
        if not out:
            return
        alive = not self._transport.is_closing()
        if alive:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
            alive = not self._transport.is_closing()  # a write to a connection that is gone closes it
        out.clear()
        if unconfirmed:
            self._unconfirmed = []
            for request in unconfirmed:
                self._confirm(request, alive=alive)

    def _confirm(self, request: Request, *, alive: bool) -> None:
        if not alive:
            self._ledger.miss(request.ids)
            return
        self._ledger.acknowledge(request.ids)
        if self._analyzer is not None and self._analyzer.log is not None:
            self._analyzer.log.note(request.ids, self._analyzer.key, request.attempt)

    def _close(self) -> None:
        self._flush()
        self._ending = True
        self._transport.close()

    def _reset(self) -> None:
        self._flush()
        self._ending = True
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            with contextlib.suppress(OSError):  # the sender may have been quicker
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()
