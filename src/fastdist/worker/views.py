"""The address of ``admin.listen``: views, metrics, the dashboard and changes, on connections of their own.

It serves what the other address serves without it, but for packets: ``POST /logs`` is 404. Its connections are counted
by themselves, so that it can be reached when emitters have taken all there are; and it is served until the end of a
drain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from fastdist import packet
from fastdist._core import Intake
from fastdist.http.api import Api
from fastdist.http.responses import problem
from fastdist.worker.ingest import Emitters, IngestProtocol
from fastdist.worker.listener import serve
from fastdist.worker.tls import TlsServer

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

    from fastdist._core import Counters, PacketRing, Poller, RateLimiter
    from fastdist.exchange import Response
    from fastdist.ipc import Action
    from fastdist.settings import Security, Server
    from fastdist.shm.snapshot import Snapshot
    from fastdist.worker.listener import Acceptor

MAX_CONNECTIONS = 256  # of each worker


class ViewsProtocol(IngestProtocol):
    """A connection on which no packet is taken, and which counts for no figure of emitters."""

    def not_stored(self, full: bool) -> bytes:  # noqa: ARG002, FBT001  (nothing is stored here at all)
        """Answer a request that brings packets."""
        return self._compose(problem(404, "packets are not taken at this address (admin.listen)"))

    def refuse(self, status: int, counter: str, detail: str, headers: bytes = b"") -> bytes:  # noqa: ARG002
        """Describe a fault."""
        return self._compose(problem(status, detail, headers=headers))

    def _count(self) -> None:
        pass


class Views:
    """Serves the address in one worker, once ``listen`` is called. ``limiter``: one that is not configured."""

    def __init__(  # noqa: PLR0913, PLR0917  (what it is wired from)
        self,
        ring: PacketRing,
        counters: Counters,
        limiter: RateLimiter,
        server: Server,
        snapshot: Callable[[], Snapshot],
        carry_out: Callable[[Action, Callable[[Response], None]], None],
    ) -> None:
        self._server = replace(server, max_connections=MAX_CONNECTIONS, protocols=())
        self.intake = Intake(ring, counters, limiter, self._server, packet.check, lambda: None)
        self.intake.closed = True  # for packets
        self.emitters = Emitters(Api(snapshot, at="views"), self.intake, carry_out, self._server)
        self._acceptor: Acceptor | None = None

    def configure(self, security: Security, context: ssl.SSLContext | None) -> None:
        """Put origins, and for new connections the certificate, in force."""
        self.emitters.configure((), security.cors_origins)
        if self._acceptor is not None:
            self._acceptor.use(context)

    def listen(self, listener: socket.socket, poller: Poller, context: ssl.SSLContext | None) -> None:
        """Begin to serve; with TLS if there is a context."""

        def protocol() -> IngestProtocol:
            return ViewsProtocol(self.intake, self.emitters)

        handed_on = True  # at the end none is accepted only to be closed
        if context is None:
            self._acceptor = serve(listener, poller, protocol, handed_on=handed_on)
        else:
            room, patience = self.emitters.has_room_besides, self._server.header_timeout
            self._acceptor = TlsServer(listener, context, protocol, room, patience, poller=poller, handed_on=handed_on)

    def close(self) -> None:
        """Accept no more connections, and close those that are there."""
        if self._acceptor is not None:
            self._acceptor.close()
        self.emitters.close_all()
