"""TLS contexts: for emitters' connections (``security.tls_cert``, ``tls_key``) and for analyzers behind https."""

from __future__ import annotations

import ssl
from pathlib import Path
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
    if getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
        return f"security.tls_key: {security.tls_key} is not the key of the certificate in {security.tls_cert}"
    return f"security.tls_key: {security.tls_key} holds no private key in PEM form that is not encrypted"
