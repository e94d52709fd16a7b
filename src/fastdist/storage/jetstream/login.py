"""How to log in to NATS servers, and TLS: what is wrong with the files that are named, and what a connection needs.

Everything that can be known without asking a server is a problem of the configuration, named by its path. Secrets
appear in no text.
"""

from __future__ import annotations

import base64
import binascii
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.settings import Jetstream

SEED = re.compile(rb"SU[A-Z2-7]{40,80}")  # of a user
BLOCK = rb"-+BEGIN %b-+\r?\n\s*(\S+)\s*\n-+END %b-+"


def problems(settings: Jetstream) -> list[str]:
    """Return what is wrong with the files, each on one line that begins with its path."""
    return [*_login_problems(settings), *_tls_problems(settings)]


def _login_problems(settings: Jetstream) -> Iterator[str]:
    if settings.nkey:
        data, fault = _read("nkey", settings.nkey)
        if fault:
            yield fault
        elif not _is_seed(data.strip()):
            yield f"jetstream.nkey: {settings.nkey} holds no seed of a user (SU…)"
    if settings.credentials:
        data, fault = _read("credentials", settings.credentials)
        if fault:
            yield fault
        elif _block(data, b"NATS USER JWT") is None:
            yield f"jetstream.credentials: {settings.credentials} holds no user JWT"
        elif not _is_seed(_block(data, b"USER NKEY SEED") or b""):
            yield f"jetstream.credentials: {settings.credentials} holds no seed of a user (SU…)"


def _tls_problems(settings: Jetstream) -> Iterator[str]:
    faults = [_read(name, path)[1] for name in ("tls_ca", "tls_cert", "tls_key") if (path := getattr(settings, name))]
    if any(faults):
        yield from filter(None, faults)
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.tls_ca:
        try:
            context.load_verify_locations(settings.tls_ca)
        except ssl.SSLError:
            yield f"jetstream.tls_ca: {settings.tls_ca} holds no certificate in PEM form"
    if settings.tls_cert:
        try:
            context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
        except (ssl.SSLError, ValueError):
            yield (
                f"jetstream.tls_cert: {settings.tls_cert} and {settings.tls_key} are not a certificate and its key, "
                "which must not be encrypted, in PEM form"
            )


def _read(name: str, path: str) -> tuple[bytes, str]:
    """Return what a file holds, and what is wrong with it."""
    try:
        return Path(path).read_bytes(), ""
    except OSError as error:
        return b"", f"jetstream.{name}: {path} cannot be read: {error.strerror}"


def _block(data: bytes, name: bytes) -> bytes | None:
    found = re.search(BLOCK % (name, name), data)
    return found[1] if found else None


def _is_seed(text: bytes) -> bool:
    """Whether this is the seed of a user: base 32 with a CRC-16 at its end."""
    if not SEED.fullmatch(text):
        return False
    try:
        raw = base64.b32decode(text + b"=" * (-len(text) % 8))
    except binascii.Error:
        return False
    return binascii.crc_hqx(raw[:-2], 0) == int.from_bytes(raw[-2:], "little")


def tls_context(settings: Jetstream) -> ssl.SSLContext:
    """Return the context of connections; it verifies servers always. Raises OSError for files that are gone."""
    context = ssl.create_default_context(cafile=settings.tls_ca or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.tls_cert:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
    return context


def options(settings: Jetstream) -> dict[str, Any]:
    """Return nats-py's options of logging in."""
    if settings.user:
        return {"user": settings.user, "password": settings.password}
    if settings.token:
        return {"token": settings.token}
    if settings.credentials:
        return {"user_credentials": settings.credentials}
    if settings.nkey:
        return {"nkeys_seed": settings.nkey}
    return {}
