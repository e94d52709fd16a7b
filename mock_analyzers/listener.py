"""A listening socket that can be closed and opened again on the same port.

Opening is synchronous up to ``listen()``: the caller knows at once whether it worked, and a client that
connects right after waits in the backlog instead of being refused.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BACKLOG = 4096


class Listener:
    """Serves ``factory``'s protocols on ``host``; port 0 is replaced by the one the system chose."""

    def __init__(self, factory: Callable[[], asyncio.Protocol], host: str, port: int) -> None:
        self._factory = factory
        self.host = host
        self.port = port
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[asyncio.Server] | None = None

    @property
    def origin(self) -> str:
        """The URL without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def open(self) -> None:
        """Listen; raises ``OSError`` if the port is taken. Nothing happens if it does already."""
        if self._socket is not None:
            return
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._socket = socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        self.port = self._socket.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._serving = loop.create_task(loop.create_server(self._factory, sock=self._socket, backlog=_BACKLOG))

    def close(self) -> None:
        """Refuse connections from now on, also those that wait to be accepted."""
        if self._socket is None or self._serving is None:
            return
        if self._serving.done() and not self._serving.cancelled() and self._serving.exception() is None:
            self._serving.result().close()
        else:
            self._serving.cancel()
        self._socket.close()
        self._socket = self._serving = None
