"""TLS contexts: for emitters' connections (``security.tls_cert``, ``tls_key``) and for analyzers behind https."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from fastdist.errors import StartError

if TYPE_CHECKING:
    from fastdist.config import Security


def server_context(security: Security) -> ssl.SSLContext | None:
    """Return the context that serves the configured certificate; None without one.

    Raises StartError when certificate or key cannot be used.
    """
    if not security.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, security)
    return context


def load_certificate(context: ssl.SSLContext, security: Security) -> None:
    """Have connections from now on use the certificate and key that the files hold now. Raises StartError."""
    try:
        context.load_cert_chain(security.tls_cert, security.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise StartError(
            f"security.tls_cert {security.tls_cert} and tls_key {security.tls_key} cannot be used: {error}"
        ) from error
