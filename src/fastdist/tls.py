"""TLS on emitters' connections (``security.tls_cert``, ``tls_key``): 1.2 or newer, with ciphers that are modern.

The two files are read once, by the supervisor, and tried; what workers get is the ``Pair`` of bytes. Each makes a
context of it: connections from then on have the new certificate, those that are open keep theirs. A pair that cannot be
used changes nothing.

Handshakes under way are connections that nobody else counts yet: ``TlsServer`` bounds their number and their time. The
loop's own TLS would read from all that have something to say in one turn, and a handshake costs a millisecond or more:
so ``TlsConnection`` speaks it on a ``Stream``, and handshakes have a part of each turn.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import re
import ssl
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct

from fastdist._core import Receiver, Stream
from fastdist.errors import StartError
from fastdist.sockets import Acceptor, refuse

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from fastdist._core import Poller
    from fastdist.config import Security

LARGEST_RECORD = 16384  # bytes
TURN_NS = 1_000_000  # of a turn of the loop for handshakes; one step in any case
ENDED_AT_ONCE = 64  # handshakes whose time is over, before others of the loop have their turn

# Of TLS 1.2; those of 1.3 are all like these: a new key for each connection, and authenticated encryption.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
VERSION = 0xA0  # the tag of a certificate's first field, which very old ones do not have
UTC_TIME = 0x17  # the tag of a date whose year has two digits


class Pair(Struct, frozen=True):
    """A certificate, with its chain, and its key: PEM, as the files had it."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Pair(...)"


def read_pair(security: Security) -> Pair | None:
    """Return what the configured files hold, if it can be used; None without TLS. Raises StartError."""
    if not security.tls_cert:
        return None
    pair = Pair(_read("security.tls_cert", security.tls_cert), _read("security.tls_key", security.tls_key))
    server_context(pair, security)
    return pair


def _read(setting: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise StartError(f"{setting}: {file} cannot be read: {error.strerror}") from error


def server_context(pair: Pair | None, security: Security) -> ssl.SSLContext | None:
    """Return the context that serves a pair; None without one. ``security`` is for the names of its files.

    Raises StartError when certificate or key cannot be used.
    """
    if pair is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    try:
        with _as_file(pair.certificate) as certificate, _as_file(pair.key) as key:
            context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise StartError(_fault(pair, security, error)) from error
    except OSError as error:
        raise StartError(f"security.tls_cert: {security.tls_cert} cannot be loaded: {error.strerror}") from error
    return context


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Return a path to ``data``, as ``ssl`` takes nothing else: in memory, and to be opened by this user only."""
    with os.fdopen(os.memfd_create("fastdist-pem", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"


def _no_password() -> str:
    """Keep a key that is encrypted from asking for its password at the terminal."""
    return ""


def _fault(pair: Pair, security: Security, error: Exception) -> str:
    """Return which of the two files cannot be used, and why."""
    try:
        with _as_file(pair.certificate) as certificate:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate)
    except ssl.SSLError:
        return f"security.tls_cert: {security.tls_cert} holds no certificate in PEM form"
    if "mismatch" in str(error).lower():
        return f"security.tls_key: {security.tls_key} is not the key of the certificate in {security.tls_cert}"
    return (
        f"security.tls_key: {security.tls_key} holds no private key in PEM form that is not encrypted, "
        f"or not that of {security.tls_cert}"
    )


# ---- dates


def out_of_date(pair: Pair | None, security: Security) -> str:
    """Return what is wrong with the dates of a pair that was read from these files; empty if nothing is."""
    begins, ends = validity(pair.certificate) if pair is not None else (None, None)
    now = datetime.now(UTC)
    if ends is not None and now > ends:
        return f"security.tls_cert: the certificate in {security.tls_cert} has expired on {ends:%Y-%m-%d %H:%M:%S} UTC"
    if begins is not None and now < begins:
        since = f"{begins:%Y-%m-%d %H:%M:%S} UTC"
        return f"security.tls_cert: the certificate in {security.tls_cert} is not valid before {since}"
    return ""


def validity(pem: bytes) -> tuple[datetime | None, datetime | None]:
    """Return from when until when the first certificate of a chain is valid; None for what cannot be made out.

    ``ssl`` tells that only of certificates it was shown by others.
    """
    found = re.search(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END", pem, re.DOTALL)
    try:
        der = base64.b64decode(found[1] if found else b"")
        _, at, _ = _element(der, 0)  # the certificate
        _, at, _ = _element(der, at)  # what is signed of it
        if der[at] == VERSION:
            _, _, at = _element(der, at)
        for _ in ("serial number", "signature", "issuer"):
            _, _, at = _element(der, at)
        _, at, _ = _element(der, at)
        return _date(der, at), _date(der, _element(der, at)[2])
    except (ValueError, IndexError):
        return None, None


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of the element at ``at``, where its content begins, and where it ends (X.690)."""
    tag, length, begin = der[at], der[at + 1], at + 2
    if length & 0x80:
        end = begin + (length & 0x7F)
        length, begin = int.from_bytes(der[begin:end], "big"), end
    return tag, begin, begin + length


def _date(der: bytes, at: int) -> datetime:
    tag, begin, end = _element(der, at)
    text = der[begin:end].decode("ascii")
    if tag == UTC_TIME:
        text = ("19" if text >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


class TlsServer:
    """Accepts connections and sees them through their handshakes; then they are ``protocol()``'s.

    ``has_room(handshakes)`` says whether one more connection may be accepted with that many on their way: one too many
    is closed at once, as nothing can be said to it. A handshake has ``patience`` seconds.
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
    ) -> None:
        self.poller, self.context, self.protocol = poller, context, protocol
        self.has_room, self.patience = has_room, patience
        self.loop, self.turn_ns = asyncio.get_running_loop(), TURN_NS
        self._handshakes: dict[TlsConnection, float] = {}  # until when, the first to end first
        self._awaiting: deque[TlsConnection] = deque()  # those of them whose next step costs something
        self._turn_comes = False
        self._timer: asyncio.Handle | None = None
        self._acceptor = Acceptor(listener, self._taken, poller.turn)

    @property
    def busy(self) -> bool:
        """Whether connections may yet come: they are accepted, or in a handshake."""
        return self._acceptor.busy or bool(self._handshakes)

    def finish(self) -> None:
        """Have no more connections begun; accept those that were."""
        self._acceptor.finish()

    def close(self) -> None:
        """Accept no more connections, and end the handshakes that are under way."""
        self._acceptor.close()
        for connection in tuple(self._handshakes):
            connection.abort()

    def await_turn(self, connection: TlsConnection) -> None:
        """Have a connection shake hands when it is its turn: packets of others come first."""
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
            except Exception as error:  # noqa: BLE001  (an error of the program: the others are to have their turns)
                connection.transport.report(error)
            if time.monotonic_ns() - began > self.turn_ns:
                break
        self._turn_comes = bool(self._awaiting)
        if self._turn_comes:
            self.loop.call_soon(self._give_turns)

    def leave(self, connection: TlsConnection) -> None:
        """Forget a handshake that is over, in whatever way."""
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
        self._handshakes[connection] = self.loop.time() + self.patience
        if self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._end_the_late)

    def _end_the_late(self) -> None:
        """End handshakes whose time is over, some at a time: there may be very many."""
        self._timer = None
        for connection, end in tuple(itertools.islice(self._handshakes.items(), ENDED_AT_ONCE)):
            if end > self.loop.time():
                self._timer = self.loop.call_at(end, self._end_the_late)
                return
            self.leave(connection)
            connection.abort()
        if self._handshakes:
            self._timer = self.loop.call_soon(self._end_the_late)


class TlsConnection(Receiver):
    """TLS on a ``Stream``: first a handshake, then the transport of a protocol of the server's.

    It reads in the poller's turns, and shakes hands in the server's, so that a turn of the loop has an end whatever
    many do. It does what asyncio's transports do; but TLS ends both sides: after ``write_eof`` what still comes is
    passed over.
    """

    def __init__(self, server: TlsServer) -> None:
        self._server, self._loop = server, server.loop
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = server.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._protocol: asyncio.Protocol | None = None  # there is none before the handshake is over
        self._paused = self._over = self._told_of_end = False

    # ---- what the stream tells

    def connection_made(self, stream: Stream) -> None:
        """Begin."""
        self.transport = stream

    def data_received(self, data: bytes) -> None:
        """Take in what came, encrypted."""
        if self._over:
            return
        self._incoming.write(data)
        if self._protocol is None:
            self.transport.pause_reading()
            self._server.await_turn(self)
        else:
            self._go_on()

    def shake_hands(self) -> None:
        """Go on with the handshake; it is this connection's turn. Nothing is done for a client that has gone."""
        if self.transport.peer_has_ended():
            self.abort()
            return
        self.transport.resume_reading()
        self._go_on()

    def eof_received(self) -> bool:
        """Hear that nothing more comes, whether that was said in TLS or not; close."""
        if self._protocol is not None:
            self._go_on()
        self._end()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of everything."""
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
        """Shake hands and read, as far as what has come goes."""
        try:
            if self._protocol is None and not self._over:
                self._tls.do_handshake()
                self._begin()
            while self._protocol is not None and not (self._paused or self._over):
                if data := self._tls.read(LARGEST_RECORD):
                    self._protocol.data_received(data)
                else:
                    self._end()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:  # whoever it is speaks something else
            self._over = True
            self._flush()  # an alert that says so
            self.transport.close()
        self._flush()

    def _begin(self) -> None:
        self._server.leave(self)
        self._protocol = self._server.protocol()
        self._protocol.connection_made(cast("asyncio.Transport", self))

    def _end(self) -> None:
        if self._protocol is not None and not self._told_of_end:
            self._told_of_end = True
            self._protocol.eof_received()
        self.close()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.transport.write(data)

    def _say_goodbye(self) -> None:
        if not self._over:
            self._over = True
            with contextlib.suppress(ssl.SSLError):  # the other side has not, which nobody waits for
                self._tls.unwrap()
            self._flush()

    # ---- what a protocol asks for

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
        self._say_goodbye()
        self.transport.write_eof()

    def pause_reading(self) -> None:
        """Read nothing until ``resume_reading``."""
        self._paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again, what has come already first."""
        self._paused = False
        self.transport.resume_reading()
        if self._tls.pending() or self._incoming.pending:
            self._loop.call_soon(self._go_on)

    def close(self) -> None:
        """Read no more, and close when all is written."""
        self._say_goodbye()
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
