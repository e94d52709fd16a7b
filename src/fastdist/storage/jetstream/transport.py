"""The TCP connection under nats-py's client, so that it can be left at any moment.

nats-py's own waits for the bytes that a server has not taken yet, when it writes, and when it closes: one that says
nothing any more (stopped, or behind a cable that was pulled) would not be left before the system gives up, after many
minutes. This one

- never waits to write: what is on its way is bounded by those who publish;
- closes at once, and drops what was not sent, in the kernel too: nothing leaves after it was given up;
- writes nothing (the login is the first thing) before the connection is encrypted, where it has to be.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Protocol, cast

from nats.aio.transport import Transport

if TYPE_CHECKING:
    import ssl
    from urllib.parse import ParseResult

MAX_UNREAD = 4 << 20  # bytes after which the server is not read from until those are taken
DROP_UNSENT = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds


class NotEncryptedError(ConnectionError):
    """The server does not ask for TLS, which the settings do."""


class Splitter(Protocol):
    """What takes out of the bytes that have come what nats-py is not to read."""

    rest: bytearray  # that waits for more

    def split(self, received: bytes) -> bytes:
        """Return what nats-py is to read."""


class _Received(asyncio.Protocol):
    """What has come, is left by ``splitter`` and was not read yet."""

    def __init__(self, splitter: Splitter) -> None:
        self.splitter = splitter
        self.data = bytearray()
        self.ended = False
        self.error: Exception | None = None
        self.transport: asyncio.Transport | None = None
        self._paused = False
        self._more: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.data += self.splitter.split(data)
        if not self.data:
            return
        if len(self.data) > MAX_UNREAD and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended, self.error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    async def more(self) -> None:
        """Wait until something comes, or the end."""
        if self.ended:
            return
        self._more = asyncio.get_running_loop().create_future()
        try:
            await self._more
        finally:
            self._more = None

    def take(self, count: int) -> bytes:
        data = bytes(self.data[:count])
        del self.data[:count]
        if self._paused and len(self.data) <= MAX_UNREAD and self.transport is not None and not self.ended:
            self._paused = False
            self.transport.resume_reading()
        return data


class DroppableTransport(Transport):
    """A connection to one server; ``must_encrypt``: nothing is written before TLS is up."""

    def __init__(self, splitter: Splitter, *, must_encrypt: bool) -> None:
        self._received = _Received(splitter)
        self._transport: asyncio.Transport | None = None
        self._beneath: asyncio.Transport | None = None  # that of TCP, under TLS
        self._may_write = not must_encrypt
        self._socket: socket.socket | None = None

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:  # noqa: ARG002  (theirs)
        """Open the connection; ``uri`` names host and port."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_timeout):
            host, port = str(uri.hostname), int(uri.port or 0)
            self._transport, _ = await loop.create_connection(lambda: self._received, host, port)
        self._socket = self._transport.get_extra_info("socket")

    async def connect_tls(
        self,
        uri: str | ParseResult,
        ssl_context: ssl.SSLContext,
        buffer_size: int,  # noqa: ARG002  (theirs)
        connect_timeout: int,
    ) -> None:
        """Encrypt it; the certificate has to be for ``uri``, or its host."""
        assert self._transport is not None  # noqa: S101  (connect comes first)
        if self._received.data or self._received.splitter.rest:
            raise ConnectionResetError("the server has said more than its INFO before TLS")
        host = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            encrypted = await asyncio.get_running_loop().start_tls(
                self._transport, self._received, ssl_context, server_hostname=host
            )
        if encrypted is None:
            raise ConnectionResetError("closed during the handshake")
        self._beneath = self._transport
        self._transport = self._received.transport = encrypted
        self._may_write = True

    def write(self, payload: bytes) -> None:
        """Send bytes as soon as the kernel takes them. Raises NotEncryptedError before they may be."""
        if not self._may_write:
            raise NotEncryptedError("certificate: the server does not ask for TLS, and tls:// does")
        if self._transport is not None and not self._received.ended:
            self._transport.write(payload)

    def writelines(self, payload: list[bytes]) -> None:
        """Send all of these."""
        self.write(payload[0] if len(payload) == 1 else b"".join(payload))

    async def read(self, buffer_size: int) -> bytes:  # noqa: ARG002  (all there is: fewer calls)
        """Return what has come, once there is something; nothing at the end."""
        if not self._received.data:
            await self._received.more()
        return self._received.take(len(self._received.data))

    async def readline(self) -> bytes:
        """Return a line. Raises OSError when the connection ends before its end."""
        while (end := self._received.data.find(b"\n")) < 0:
            if self._received.ended:
                raise self._received.error or ConnectionResetError("the server has closed the connection")
            await self._received.more()
        return self._received.take(end + 1)

    async def drain(self) -> None:
        """Return at once; see above."""

    async def wait_closed(self) -> None:
        """Return at once: closed is closed."""

    def close(self) -> None:
        """Close the connection; nothing more is sent."""
        if self._transport is None:
            return
        if self._socket is not None and self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DROP_UNSENT)
        self._received.ended = True
        self._transport.abort()
        self._transport = None

    def at_eof(self) -> bool:
        """Whether all was read and nothing more comes."""
        return self._received.ended and not self._received.data

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken yet."""
        transports = (self._transport, self._beneath if self._transport is not None else None)
        return sum(each.get_write_buffer_size() for each in transports if each is not None)

    def __bool__(self) -> bool:
        return True
