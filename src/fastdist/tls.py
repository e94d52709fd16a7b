"""TLS on emitters' connections (``security.tls_cert``, ``tls_key``): 1.2 or newer, with ciphers that are modern.

The two files are read once, by the supervisor, and tried; what workers get is the ``Pair`` of bytes. Each makes a
context of it: connections from then on have the new certificate, those that are open keep theirs. A pair that cannot be
used changes nothing.

Handshakes under way are connections that nobody else counts yet: ``TlsServer`` bounds their number and their time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from fastdist.errors import StartError
from fastdist.sockets import Acceptor

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from fastdist.config import Security

GOODBYE = 86400.0  # seconds that the loop gives the end of a connection: the protocol sees what leaves, and gives fewer

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
