"""From sockets to connections: accepting on a listener, and connecting to a host.

What has no TLS becomes a ``Stream`` of the compiled core; TLS is the loop's (``fastdist.tls``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import itertools
import os
import resource
import socket
import struct
from typing import TYPE_CHECKING, cast

import aiohappyeyeballs

from fastdist import logs, timeouts
from fastdist._core import Poller, Receiver, Stream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from fastdist.names import AddressInfo, Names
    from fastdist.units import Endpoint

ACCEPTED_AT_ONCE = 64  # connections, before others of the loop have their turn
LAST_ROUNDS = 128  # of accepting when it is closed: twice what a backlog holds
PAUSE = 0.1  # seconds to accept nothing when nothing helps
HANDSHAKE = 0.1  # seconds that clients whose connection was begun before we finish have to complete it
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # else it is about one connection only
COMPLAINT_SECONDS = 10.0  # between errors of one kind
DESCRIPTORS_BESIDES = 512  # what a worker needs besides its emitters' connections and those to analyzers
NO_PORT = "no local port is left for another connection"
GOODBYE = 1.0  # seconds to write what there is when a connection with TLS ends
NEXT_ADDRESS = 0.25  # seconds that the addresses of a name have before the next is tried beside them

# A filter for a listener (classic BPF: code, jump if true, if false, operand): what has SYN set in its TCP flags is
# dropped, all else is passed on whole.
SO_ATTACH_FILTER = 26
NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))

log = logs.get()


class Acceptor:
    """Accepts connections on ``listener`` and gives each to ``taken(connection, peer's address)``.

    The system completes connections by itself, and would reset those that nobody has accepted when the listener is
    closed. So ``finish`` first has it begin no more of them, accepts what is there, and only then closes.

    ``first`` is called before: who has left is to make room before who comes is told that there is none.

    When there are no descriptors left, who comes is turned away at once, for which one is kept in reserve: nobody is to
    wait for an answer, and what has gone meanwhile is not to fill the backlog.
    """

    def __init__(
        self,
        listener: socket.socket,
        taken: Callable[[socket.socket, object], None],
        first: Callable[[], object] | None = None,
    ) -> None:
        self.listener, self.taken, self.first = listener, taken, first
        self.loop = asyncio.get_running_loop()
        self.busy = True  # connections may yet come
        self._reserve = _reserve()
        self._complain_at = 0.0
        listener.setblocking(False)  # noqa: FBT003
        self._listen()

    def finish(self) -> None:
        """Have no more connections begun; accept those that were, then close."""
        _begin_no_more(self.listener)
        self.loop.call_later(HANDSHAKE, self._accept_the_last)

    def close(self) -> None:
        """Accept all connections that are there, now, and no more."""
        if not self.busy:
            return
        for _ in range(LAST_ROUNDS):
            if not self._accept():
                break
        self.busy = False
        self.loop.remove_reader(self.listener)
        self.listener.close()
        if self._reserve is not None:
            os.close(self._reserve)

    def _accept_the_last(self) -> None:
        if self._accept():
            self.loop.call_soon(self._accept_the_last)
        else:
            self.close()

    def _listen(self) -> None:
        if self.busy:
            self.loop.add_reader(self.listener, self._ready)

    def _ready(self) -> None:
        if self.first is not None:
            self.first()
        self.loop.call_soon(self._accept)  # behind the loss of connections, which is told by way of the loop

    def _accept(self) -> bool:
        """Accept some connections; return whether there may be more of them now."""
        if not self.busy:
            return False
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, peer = self.listener.accept()
            except BlockingIOError:
                return False
            except (InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                self._complain(error)
                if error.errno in SHORTAGES and not self._turn_away():
                    self.loop.remove_reader(self.listener)
                    self.loop.call_later(PAUSE, self._listen)
                    return False
            else:
                self.taken(connection, peer)
        return True

    def _turn_away(self) -> bool:
        """Close a connection that there is no descriptor for; say whether the next may be looked at."""
        if self._reserve is None:
            self._reserve = _reserve()
            return self._reserve is not None
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            self.listener.accept()[0].close()
        self._reserve = _reserve()
        return True

    def _complain(self, error: OSError) -> None:
        now = self.loop.time()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAINT_SECONDS
            log.error("connections cannot be accepted and are closed", error=error.strerror)


def _begin_no_more(listener: socket.socket) -> None:
    """Have the system drop what would begin a connection: who sent it tries again, until the listener is closed.

    What completes a connection still passes. A system that cannot do this goes on as before.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in NO_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(NO_SYN), ctypes.addressof(program))
        )


def _reserve() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def refuse(connection: socket.socket, error: OSError) -> None:
    """Close a connection that no stream can be made of: it was reset meanwhile, or the system's limits are reached."""
    log.error("a connection was accepted and cannot be used", error=error.strerror)
    connection.close()


def serve(listener: socket.socket, poller: Poller, protocol: Callable[[], Receiver]) -> Acceptor:
    """Accept connections; each is read for a ``protocol()`` of its own."""

    def taken(connection: socket.socket, peer: object) -> None:
        try:
            Stream(poller, connection, peer, protocol())
        except OSError as error:
            refuse(connection, error)

    return Acceptor(listener, taken, poller.turn)


class TlsTransport:
    """``tls``, a transport of the loop, that knows what ``carrier`` below it has yet to write, and ends at once.

    The loop's own says that all is written when it is encrypted, and waits up to half a minute for the other side to
    agree to the end. A side that has said it is to close need not wait (RFC 8446, 6.1).
    """

    def __init__(self, tls: asyncio.Transport, carrier: asyncio.Transport) -> None:
        self._tls, self._carrier = tls, carrier
        self.write, self.abort, self.get_extra_info = tls.write, tls.abort, tls.get_extra_info

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the kernel has not taken yet; of those that are encrypted, in that form."""
        return self._tls.get_write_buffer_size() + self._carrier.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return self._tls.is_closing() or self._carrier.is_closing()

    def close(self) -> None:
        """Say that this is the end, and close; what the kernel does not take at once has ``GOODBYE`` seconds."""
        self._tls.close()
        asyncio.get_running_loop().call_later(GOODBYE if self.get_write_buffer_size() else 0, self.abort)


async def connect(  # noqa: PLR0913  (who, where to, and what by)
    protocol: asyncio.Protocol,
    names: Names,
    endpoint: Endpoint,
    patience: float,
    *,
    poller: Poller | None = None,
    tls: ssl.SSLContext | None = None,
) -> str:
    """Connect ``protocol`` to the first address of the endpoint's host that lets us; return that address.

    ``patience``: seconds for each address, and for the handshake. After ``NEXT_ADDRESS`` the next address is tried
    beside those before it, at once when one fails (RFC 8305). With a ``poller`` and without ``tls`` the protocol, a
    ``Receiver``, gets a ``Stream``, else a transport of the loop. Raises OSError, ssl.SSLError among them.
    """
    infos = await names.infos(endpoint.host, endpoint.port, patience)
    async with timeouts.running(patience + NEXT_ADDRESS * (len(infos) - 1)):
        try:
            connection = await aiohappyeyeballs.start_connection(infos, happy_eyeballs_delay=NEXT_ADDRESS)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and any(_leads_there(info) for info in infos):
                raise OSError(errno.ENOBUFS, NO_PORT) from error
            raise
    with connection:  # whose descriptor a stream takes, and which the loop holds by itself
        peer = connection.getpeername()
        for info in itertools.takewhile(lambda info: info[4][0] != peer[0], infos):
            names.put_behind(endpoint.host, info[4][0])
        if poller is not None and tls is None:
            assert isinstance(protocol, Receiver)  # noqa: S101
            Stream(poller, connection, peer, protocol)
            return str(peer[0])
        try:
            async with timeouts.running(patience):
                await _connect_by_loop(protocol, connection, tls, endpoint.host)
        except Exception:
            names.put_behind(endpoint.host, peer[0])  # it takes connections, but nobody speaks there
            raise
    return str(peer[0])


def _leads_there(info: AddressInfo) -> bool:
    """Whether this machine has an address to reach that one from: if so, EADDRNOTAVAIL was about TCP's ports."""
    try:
        with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
            probe.connect(info[4])  # sends nothing
    except OSError:
        return False
    return True


def descriptors() -> int:
    """Return how many descriptors this process may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit if limit != resource.RLIM_INFINITY else 2**20


def most_to_analyzers(emitters: int) -> int:
    """Return how many connections to analyzers leave descriptors for so many emitters, if they have half of them."""
    return max(descriptors() // 2, descriptors() - emitters - DESCRIPTORS_BESIDES)


def shortage(error: BaseException) -> OSError | None:
    """Return what this process or machine lacks, if ``error`` comes of that: it says nothing of the other side.

    An error without a number is one of several addresses, or of a look-up, which does not tell when it is out of
    descriptors: then it is tried whether there is one.
    """
    if not isinstance(error, OSError) or isinstance(error, TimeoutError):
        return None
    if error.errno is None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as lacking:
            error = lacking
    return error if error.errno in SHORTAGES else None


async def _connect_by_loop(
    protocol: asyncio.Protocol, connection: socket.socket, tls: ssl.SSLContext | None, host: str
) -> None:
    """Connect ``protocol`` to a transport of the loop; with TLS, after the handshake."""
    loop = asyncio.get_running_loop()
    if tls is None:
        await loop.create_connection(lambda: protocol, sock=connection)
        return
    carrier, nobody = await loop.create_connection(asyncio.Protocol, sock=connection)
    transport = await loop.start_tls(carrier, nobody, tls, server_hostname=host)
    if transport is None or carrier.is_closing():  # nobody would tell the protocol
        carrier.abort()
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    transport.set_protocol(protocol)  # no data come before who waits for the handshake has had its turn
    protocol.connection_made(cast("asyncio.Transport", TlsTransport(transport, carrier)))
