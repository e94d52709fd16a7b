"""TLS on emitters' connections (``security.tls_cert``, ``tls_key``): 1.2 or newer, with ciphers that are modern.

One context serves all connections for as long as a worker lives. A new certificate is put into it, so that connections
from then on have the new one and those that are open keep theirs. A pair of files that cannot be used changes nothing.

Handshakes under way are connections that nobody else counts yet: ``TlsServer`` bounds their number and their time.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from fastdist.errors import StartError
from fastdist.sockets import Acceptor

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from fastdist.config import Security

GOODBYE = 5.0  # seconds a client has to agree to the end of a connection

# Of TLS 1.2; those of 1.3 are all like these: a new key for each connection, and authenticated encryption.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def server_context(security: Security) -> ssl.SSLContext | None:
    """Return the context that serves the configured certificate; None without one.

    Raises StartError when certificate or key cannot be used.
    """
    if not security.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    _load(context, security)
    return context


def load_certificate(context: ssl.SSLContext, security: Security) -> None:
    """Have connections from now on use the certificate and key that the files hold now.

    Raises StartError; ``context`` is then as it was.
    """
    # A key that does not fit is found when the certificate is already in place.
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), security)
    _load(context, security)


def _load(context: ssl.SSLContext, security: Security) -> None:
    try:
        context.load_cert_chain(security.tls_cert, security.tls_key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is the former
        raise StartError(_fault(security, error)) from error


def _no_password() -> str:
    """Keep a key that is encrypted from asking for its password at the terminal."""
    return ""


def _fault(security: Security, error: Exception) -> str:
    """Return which of the two files cannot be used, and why."""
    for setting, file in (("security.tls_cert", security.tls_cert), ("security.tls_key", security.tls_key)):
        try:
            Path(file).read_bytes()
        except OSError as unreadable:
            return f"{setting}: {file} cannot be read: {unreadable.strerror}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(security.tls_cert)
    except ssl.SSLError:
        return f"security.tls_cert: {security.tls_cert} holds no certificate in PEM form"
    if "mismatch" in str(error).lower():
        return f"security.tls_key: {security.tls_key} is not the key of the certificate in {security.tls_cert}"
    return (
        f"security.tls_key: {security.tls_key} holds no private key in PEM form that is not encrypted, "
        f"or not that of {security.tls_cert}"
    )


class TlsServer:
    """Accepts connections and sees them through their handshakes; then they are ``protocol()``'s.

    ``has_room(handshakes)`` says whether one more connection may be accepted with that many on their way: one too many
    is closed at once, as nothing can be said to it. A handshake has ``patience`` seconds.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        protocol: Callable[[], asyncio.Protocol],
        has_room: Callable[[int], bool],
        patience: float,
    ) -> None:
        self.context, self.protocol = context, protocol
        self.has_room, self.patience = has_room, patience
        self._handshakes: set[asyncio.Task[None]] = set()
        self._acceptor = Acceptor(listener, self._taken)

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
        for task in self._handshakes:
            task.cancel()

    def _taken(self, connection: socket.socket, _peer: object) -> None:
        if not self.has_room(len(self._handshakes)):
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._shake_hands(connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self.protocol,
                connection,
                ssl=self.context,
                ssl_handshake_timeout=self.patience,
                ssl_shutdown_timeout=GOODBYE,
            )
        except OSError:  # of ssl and of time-outs too: whoever it was has gone, or speaks something else
            connection.close()
