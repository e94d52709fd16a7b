"""Connecting to the first address of a host that accepts, with TLS or without, and describing errors.

Without TLS a connection is a ``Stream`` of the compiled core; with it, a transport of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import re
import resource
import socket
import ssl
from typing import TYPE_CHECKING, cast

import aiohappyeyeballs

from fastdist._core import Poller, Receiver, Stream
from fastdist.net import timeouts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastdist.net.names import AddressInfo, Names
    from fastdist.units import Endpoint

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # other errors are about one connection only
DESCRIPTORS_BESIDES = 512  # what a worker needs besides its emitters' connections and those to analyzers
NO_PORT = "no local port is left for another connection"
CLOSE_TIMEOUT = 1.0  # seconds to write what is buffered when a connection with TLS is closed
YOUNGEST = 0.5  # of delivery.max_age: when the first connections of many that began together are replaced
# How OpenSSL calls what the other side has ended a connection with, and what then helps.
ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_ALERT_(\w+)")
HINTS = {"CERTIFICATE_REQUIRED": " (it asks for a client certificate: client_cert, client_key)"}
NEXT_ADDRESS = 0.25  # seconds before the next address of a name is tried in parallel


class TlsTransport:
    """``tls``, a transport of the loop, that counts what ``carrier`` below it has yet to write, and closes at once.

    The loop's own takes data for written when it is encrypted, and waits up to half a minute for the other side's
    close_notify. A side that has sent its own need not wait (RFC 8446, 6.1).
    """

    def __init__(self, tls: asyncio.Transport, carrier: asyncio.Transport) -> None:
        self._tls, self._carrier = tls, carrier
        self.write, self.abort, self.get_extra_info = tls.write, tls.abort, tls.get_extra_info

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the kernel has not taken yet; those that are encrypted count in that form."""
        return self._tls.get_write_buffer_size() + self._carrier.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return self._tls.is_closing() or self._carrier.is_closing()

    def close(self) -> None:
        """Send close_notify and close; what the kernel does not take at once has ``CLOSE_TIMEOUT`` seconds."""
        self._tls.close()
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT if self.get_write_buffer_size() else 0, self.abort)


async def connect(  # noqa: PLR0913  (protocol, address and transport)
    protocol: asyncio.Protocol,
    names: Names,
    endpoint: Endpoint,
    patience: float,
    *,
    poller: Poller | None = None,
    tls: ssl.SSLContext | None = None,
    server_name: str = "",
) -> str:
    """Connect ``protocol`` to the first address of the endpoint's host that accepts; return that address.

    ``patience``: seconds for each address, and for the handshake. After ``NEXT_ADDRESS`` the next address is tried
    in parallel, at once when one fails (RFC 8305). With a ``poller`` and without ``tls`` the protocol, a
    ``Receiver``, gets a ``Stream``, else a transport of the loop. ``server_name`` is what is asked for over TLS, if not
    the host. Raises OSError, ssl.SSLError among them.
    """
    infos = await names.infos(endpoint.host, endpoint.port, patience)
    try:
        connection = await (_connect_to(infos[0], patience) if len(infos) == 1 else _connect_to_first(infos, patience))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and any(_leads_there(info) for info in infos):
            raise OSError(errno.ENOBUFS, NO_PORT) from error
        raise
    with connection:  # a stream takes its descriptor, and the loop keeps a reference
        peer = connection.getpeername()
        for info in itertools.takewhile(lambda info: info[4][0] != peer[0], infos):
            names.deprioritize(endpoint.host, info[4][0])
        if poller is not None and tls is None:
            assert isinstance(protocol, Receiver)  # noqa: S101
            Stream(poller, connection, peer, protocol)
            return str(peer[0])
        try:
            async with timeouts.running(patience):
                await _connect_by_loop(protocol, connection, tls, server_name or endpoint.host)
        except Exception:
            names.deprioritize(endpoint.host, peer[0])  # it accepts connections, but does not respond
            raise
    return str(peer[0])


def time_for(infos: Sequence[AddressInfo], patience: float) -> float:
    """Return how many seconds there are for these addresses, each of which has ``patience`` seconds."""
    return patience + NEXT_ADDRESS * (len(infos) - 1)


async def _connect_to_first(infos: Sequence[AddressInfo], patience: float) -> socket.socket:
    async with timeouts.running(time_for(infos, patience)):
        return await aiohappyeyeballs.start_connection(infos, happy_eyeballs_delay=NEXT_ADDRESS)


async def _connect_to(info: AddressInfo, patience: float) -> socket.socket:
    """Connect to one address, as most analyzers have: with a thousand analyzers, tens of thousands of times."""
    connection = socket.socket(*info[:3])
    try:
        connection.setblocking(False)  # noqa: FBT003
        for _ in range(2):  # the second asks how the first went: on this machine it is over
            with contextlib.suppress(BlockingIOError):
                connection.connect(info[4])
                return connection
        async with timeouts.running(patience):
            await asyncio.get_running_loop().sock_connect(connection, info[4])
    except BaseException:
        connection.close()
        raise
    return connection


def _leads_there(info: AddressInfo) -> bool:
    """Whether this machine has a source address for that one: if so, EADDRNOTAVAIL was about TCP's ports."""
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


def max_upstream_connections(emitters: int) -> int:
    """Return how many connections to analyzers leave descriptors for so many emitters, but at least half of all."""
    return max(descriptors() // 2, descriptors() - emitters - DESCRIPTORS_BESIDES)


def shortage(error: BaseException) -> OSError | None:
    """Return the resource error of this process or machine behind ``error``, or None: it is not the other side's fault.

    An error without a number is one of several addresses, or of a look-up, which does not report that it is out of
    descriptors: then we try to open one.
    """
    if not isinstance(error, OSError) or isinstance(error, TimeoutError):
        return None
    if error.errno is None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as lacking:
            error = lacking
    return error if error.errno in SHORTAGES else None


class Shortage:
    """The last failure for want of a resource, as ``last``."""

    last: OSError | None = None

    def raise_once(self) -> None:
        """Raise it, if there was one since the last call."""
        last, self.last = self.last, None
        if last is not None:
            raise last


async def _connect_by_loop(
    protocol: asyncio.Protocol, connection: socket.socket, tls: ssl.SSLContext | None, host: str
) -> None:
    """Connect ``protocol`` to a transport of the loop; with TLS, after the handshake."""
    loop = asyncio.get_running_loop()
    if tls is None:
        await loop.create_connection(lambda: protocol, sock=connection)
        return
    carrier, placeholder = await loop.create_connection(asyncio.Protocol, sock=connection)
    transport = await loop.start_tls(carrier, placeholder, tls, server_hostname=host)
    if transport is None or carrier.is_closing():  # the protocol would not be notified
        carrier.abort()
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    transport.set_protocol(protocol)  # no data arrive before this task has run
    protocol.connection_made(cast("asyncio.Transport", TlsTransport(transport, carrier)))


def describe(error: BaseException, timeout: float) -> str:
    """Return a short text for a connection error."""
    if isinstance(error, TimeoutError) and not error.errno:
        return f"no answer within {timeout:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ssl.SSLError) and (alert := ALERT.fullmatch(getattr(error, "reason", None) or "")):
        return f"TLS alert: {alert[1].lower().replace('_', ' ')}{HINTS.get(alert[1], '')}"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
