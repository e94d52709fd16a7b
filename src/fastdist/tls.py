"""TLS on emitters' connections (``security.tls_cert``, ``tls_key``): 1.2 or newer, with ciphers that are modern.

One context serves all connections for as long as a worker lives. A new certificate is put into it, so that connections
from then on have the new one and those that are open keep theirs. A pair of files that cannot be used changes nothing.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from fastdist.errors import StartError

if TYPE_CHECKING:
    from typing import NoReturn

    from fastdist.config import Security

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
        context.load_cert_chain(security.tls_cert, security.tls_key, password=_refuse_to_ask)
    except (OSError, _EncryptedError) as error:  # ssl.SSLError is an OSError
        raise StartError(
            f"security.tls_cert {security.tls_cert} and tls_key {security.tls_key} cannot be used: {error}"
        ) from error


class _EncryptedError(Exception):
    def __str__(self) -> str:
        return "the key is encrypted, and there is nobody to ask for its passphrase"


def _refuse_to_ask() -> NoReturn:
    """In place of OpenSSL's question on the terminal, which a service waits for until somebody looks."""
    raise _EncryptedError
