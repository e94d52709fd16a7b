"""TLS on emitters' connections, spoken on a ``Stream``.

Connections in a handshake are counted nowhere else: ``TlsServer`` bounds their number and their time. The loop's own
TLS would read from all connections that are readable in one iteration, and a handshake costs a millisecond or more:
so ``TlsConnection`` speaks it on a ``Stream``, and handshakes get a part of each iteration.
"""

from __future__ import annotations

import contextlib
import itertools
import ssl
import time
from collections import deque
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, cast

from fastdist._core import Receiver, Stream
from fastdist.exchange import reason
from fastdist.http.responses import problem
from fastdist.net import timeouts
from fastdist.worker.listener import Acceptor, refuse

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable
    from typing import Unpack

    from fastdist._core import Poller
    from fastdist.worker.listener import Options

MAX_RECORD = 16384  # bytes
HEAD = b"HEAD "
PLAIN = "a plain HTTP request was sent to a port that takes HTTPS only: use https:// in the URL"
HANDSHAKES_NS = 1_000_000  # of an event-loop iteration for handshakes; one step in any case
EXPIRED_AT_ONCE = 64  # expired handshakes, before the loop runs other callbacks


class TlsServer(Acceptor):
    """Accepts connections and does their handshakes; then each gets a ``protocol()``.

    ``has_room(handshakes)`` says whether one more connection may be accepted with that many in a handshake: one too
    many is closed at once, as no response can be sent on it. A handshake has ``patience`` seconds.
    """

    def __init__(  # noqa: PLR0913  (what a server is wired from)
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        protocol: Callable[[], asyncio.Protocol],
        has_room: Callable[[int], bool],
        patience: float,
        *,
        poller: Poller,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(listener, self._taken, poller.run_once, **options)
        self.poller, self.context, self.protocol = poller, context, protocol
        self.has_room, self.patience, self.handshakes_ns = has_room, patience, HANDSHAKES_NS
        self._handshakes: dict[TlsConnection, float] = {}  # until when, the first to end first
        self._awaiting: deque[TlsConnection] = deque()  # those of them whose next step costs something
        self._turn_comes = False
        self._timer: asyncio.Handle | None = None

    @property
    def busy(self) -> bool:
        """Whether connections may still arrive: they are accepted, or in a handshake."""
        return super().busy or bool(self._handshakes)

    def use(self, context: ssl.SSLContext | None) -> None:
        """Do the handshakes of connections from now on with this certificate."""
        if context is not None:
            self.context = context

    def close(self) -> None:
        """Accept no more connections, and end the handshakes that are under way."""
        super().close()
        for connection in tuple(self._handshakes):
            connection.abort()

    def await_turn(self, connection: TlsConnection) -> None:
        """Schedule a connection's next handshake step: packets of others come first."""
        self._awaiting.append(connection)
        if not self._turn_comes:
            self._turn_comes = True
            self.loop.call_soon(self._give_turns)

    def _give_turns(self) -> None:
        began = time.monotonic_ns()
        while self._awaiting:
            connection = self._awaiting.popleft()
            try:
                connection.shake_hands()
            except Exception as error:  # noqa: BLE001  (an error of the program: the others must go on)
                connection.transport.report(error)
            if time.monotonic_ns() - began > self.handshakes_ns:
                break
        self._turn_comes = bool(self._awaiting)
        if self._turn_comes:
            self.loop.call_soon(self._give_turns)

    def leave(self, connection: TlsConnection) -> None:
        """Forget a handshake that is over, whatever its outcome."""
        self._handshakes.pop(connection, None)

    def _taken(self, accepted: socket.socket, peer: object) -> None:
        if not self.has_room(len(self._handshakes)):
            accepted.close()
            return
        connection = TlsConnection(self)
        try:
            Stream(self.poller, accepted, peer, connection)
        except OSError as error:
            refuse(accepted, error)
            return
        end = self._handshakes[connection] = self.loop.time() + self.patience
        if self._timer is None:
            self._timer = self.loop.call_at(end, self._abort_expired, end)

    def _abort_expired(self, due: float) -> None:
        """Abort expired handshakes, some at a time: there may be very many. ``due``: when this was to be called."""
        self._timer = None
        late = self.loop.time() - due
        if more := timeouts.grace(late, self.patience):
            self._handshakes = {each: end + late + more for each, end in self._handshakes.items()}
        for connection, end in tuple(itertools.islice(self._handshakes.items(), EXPIRED_AT_ONCE)):
            if end > self.loop.time():
                self._timer = self.loop.call_at(end, self._abort_expired, end)
                return
            self.leave(connection)
            connection.abort()
        if self._handshakes:
            self._timer = self.loop.call_soon(self._abort_expired, self.loop.time())


class TlsConnection(Receiver):
    """TLS on a ``Stream``: first a handshake, then the transport of a protocol of the server's.

    It reads when the poller runs and shakes hands when the server does, so that an event-loop iteration is bounded
    however many there are. It behaves as asyncio's transports do, but TLS ends both sides: what arrives after
    ``write_eof`` is discarded.
    """

    def __init__(self, server: TlsServer) -> None:
        self._server, self._loop = server, server.loop
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = server.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._protocol: asyncio.Protocol | None = None  # None before the handshake is over
        self._paused = self._over = self._eof_reported = False
        self._beginning = b""  # of what arrives, until it is known to be TLS

    # ---- called by the stream

    def connection_made(self, stream: Stream) -> None:
        """Begin."""
        self.transport = stream

    def data_received(self, data: bytes) -> None:
        """Take encrypted data."""
        if self._over:
            return
        self._incoming.write(data)
        if self._protocol is None:
            self._beginning += data[: len(HEAD) - len(self._beginning)]
            self.transport.pause_reading()
            self._server.await_turn(self)
        else:
            self._go_on()

    def shake_hands(self) -> None:
        """Do the next step of the handshake, unless the client is gone."""
        if self.transport.peer_has_ended():
            self.abort()
            return
        self.transport.resume_reading()
        self._go_on()

    def eof_received(self) -> bool:
        """Note that nothing more will arrive, whether TLS said so or not; close."""
        if self._protocol is not None:
            self._go_on()
        self._end()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Release everything."""
        self._over = True
        self._server.leave(self)
        if self._protocol is not None:
            self._protocol.connection_lost(error)

    def pause_writing(self) -> None:
        """Pass it on."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    # ---- reading

    def _go_on(self) -> None:
        """Shake hands and read, as far as the data that has arrived goes."""
        try:
            if self._protocol is None and not self._over:
                self._tls.do_handshake()
                self._begin()
            while self._protocol is not None and not (self._paused or self._over):
                if data := self._tls.read(MAX_RECORD):
                    self._protocol.data_received(data)
                else:
                    self._end()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:  # the client speaks something else
            self._over = True
            if self._protocol is None and self._beginning[:1].isalpha():  # which no TLS record begins with
                self._answer_plain()
                return
            self._flush()  # an alert that says so
            self.transport.close()
        self._flush()

    def _answer_plain(self) -> None:
        """Answer a request that came without TLS; it is not read, and the connection is closed by ``patience``."""
        response = problem(400, PLAIN)
        head = (
            f"HTTP/1.1 400 {reason(400)}\r\nDate: {formatdate(usegmt=True)}\r\nContent-Length: {len(response.body)}\r\n"
            "Connection: close\r\n"
        )
        body = b"" if self._beginning == HEAD else response.body
        self.transport.write(head.encode() + response.headers + b"\r\n" + body)
        self.transport.write_eof()

    def _begin(self) -> None:
        self._server.leave(self)
        self._protocol = self._server.protocol()
        self._protocol.connection_made(cast("asyncio.Transport", self))

    def _end(self) -> None:
        if self._protocol is not None and not self._eof_reported:
            self._eof_reported = True
            self._protocol.eof_received()
        self.close()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.transport.write(data)

    def _send_close_notify(self) -> None:
        if not self._over:
            self._over = True
            with contextlib.suppress(ssl.SSLError):  # the other side has not closed yet, which we do not wait for
                self._tls.unwrap()
            self._flush()

    # ---- called by the protocol

    def write(self, data: bytes) -> None:
        """Write; ``pause_writing`` is called when much of it has to be kept."""
        left = memoryview(data)
        try:
            while left and not self._over:
                left = left[self._tls.write(left) :]
        except ssl.SSLError:
            self.abort()
        self._flush()

    def can_write_eof(self) -> bool:
        """Whether this side may end, and the other not."""
        return False

    def write_eof(self) -> None:
        """End TLS, and this side of the connection when all is written; the other may end later."""
        self._send_close_notify()
        self.transport.write_eof()

    def pause_reading(self) -> None:
        """Read nothing until ``resume_reading``."""
        self._paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again, what has arrived already first."""
        self._paused = False
        self.transport.resume_reading()
        if self._tls.pending() or self._incoming.pending:
            self._loop.call_soon(self._go_on)

    def close(self) -> None:
        """Read no more, and close when all is written."""
        self._send_close_notify()
        self.transport.close()

    def abort(self) -> None:
        """Close at once, whatever is not written yet."""
        self._over = True
        self.transport.abort()

    def is_closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return bool(self.transport.is_closing())

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the kernel has not taken yet, as they are when encrypted."""
        return int(self.transport.get_write_buffer_size())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the peer's address for ``peername``, and what has a ``fileno`` for ``socket``."""
        return self.transport if name == "socket" else self.transport.get_extra_info(name, default)
