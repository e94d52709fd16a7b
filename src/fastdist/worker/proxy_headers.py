"""Headers of the PROXY protocol, read before all else of a connection: before TLS, and before its ``Stream`` is made.

So only connections of trusted proxies cost something, and only where ``server.proxy_protocol`` is on. What belongs to a
header is looked at in the kernel's buffer, and taken out of it to the byte: the rest is read as ever.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from fastdist import logs
from fastdist.net import timeouts
from fastdist.net.proxies import MAX_2, TrustedProxies, believed, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable

LOG_INTERVAL = 10.0  # seconds between errors of one kind

log = logs.get()


class ProxyHeaders:
    """Called with each connection that is accepted; ``taken(connection, address)`` gets it, with the client's address.

    Connections from elsewhere than trusted proxies are passed on as they are. ``has_room(waiting)`` says whether one
    more may wait for its header, which has to come within ``patience`` seconds. A connection without one is closed.
    """

    def __init__(
        self,
        taken: Callable[[socket.socket, object], None],
        proxies: TrustedProxies,
        has_room: Callable[[int], bool],
        patience: float,
    ) -> None:
        self._taken, self._proxies, self._has_room, self._patience = taken, proxies, has_room, patience
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}
        self._log_limit = logs.Throttle(LOG_INTERVAL)

    @property
    def busy(self) -> bool:
        """Whether headers are awaited."""
        return bool(self._waiting)

    def close(self) -> None:
        """Close all connections that wait for their headers."""
        for connection in tuple(self._waiting):
            self._leave(connection)
            connection.close()

    def __call__(self, connection: socket.socket, peer: Any) -> None:
        """Read the header, if there has to be one, and pass the connection on."""
        if not self._proxies.trusts(peer[0]):
            self._taken(connection, peer)
            return
        if not self._has_room(len(self._waiting)):
            connection.close()
            return
        connection.setblocking(False)  # noqa: FBT003
        begun = bytearray()
        self._wait(connection, peer, self._patience)
        self._loop.add_reader(connection, self._read, connection, peer, begun)
        self._read(connection, peer, begun)

    def _wait(self, connection: socket.socket, peer: tuple[str, int], seconds: float) -> None:
        due = self._loop.time() + seconds
        self._waiting[connection] = self._loop.call_at(due, self._expired, connection, peer, due)

    def _expired(self, connection: socket.socket, peer: tuple[str, int], due: float) -> None:
        if more := timeouts.grace(self._loop.time() - due, self._patience):
            self._wait(connection, peer, more)
        else:
            self._refuse(connection, peer, "none came in time")

    def _read(self, connection: socket.socket, peer: tuple[str, int], begun: bytearray) -> None:
        """Take what has come of a header; ``begun``: what had come before."""
        try:
            data = connection.recv(MAX_2, socket.MSG_PEEK)
            header = parse_header(bytes(begun + data)) if data else None
            size = len(data) if header is None else header.length - len(begun)
            if data:
                connection.recv(size)
        except (BlockingIOError, InterruptedError):
            return
        except ValueError as error:
            self._refuse(connection, peer, str(error))
            return
        except OSError:  # it was reset
            data, header = b"", None
        if not data:  # a check whether the port is open does no more
            self._leave(connection)
            connection.close()
        elif header is None:
            begun += data
        else:
            self._leave(connection)
            client = header.client
            self._taken(connection, peer if client is None else (believed(client[0], peer[0]), client[1]))

    def _refuse(self, connection: socket.socket, peer: tuple[str, int], why: str) -> None:
        if self._log_limit.allow() and logs.may_log():
            log.warning("a connection from a trusted proxy has no PROXY header and is closed", proxy=peer[0], error=why)
        self._leave(connection)
        connection.close()

    def _leave(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._waiting.pop(connection).cancel()
