"""Certificates and keys: those of emitters' connections (``security.tls_cert``, ``tls_key``), and dates of any.

With emitters TLS 1.2 or newer is spoken, with modern ciphers. The two files are read once, by the supervisor, and
checked; workers get the ``Pair`` of bytes. Each makes a context of it: new connections have the new certificate, those
that are open keep theirs. A pair that cannot be used changes nothing. For analyzers see ``upstream_tls``.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastdist.errors import StartError
from fastdist.ipc import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastdist.settings import Config, Security


# Of TLS 1.2; those of 1.3 are all like these: a new key for each connection, and authenticated encryption.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}  # as OpenSSL calls its errors
VERSION = 0xA0  # the tag of a certificate's first field, which very old ones do not have
UTC_TIME = 0x17  # the tag of a date whose year has two digits
SOON = timedelta(days=14)  # to its end: a certificate should have been renewed by then


class Named(NamedTuple):
    """Where a certificate and its key were read from: settings and files, for messages."""

    cert_setting: str
    cert: str
    key_setting: str
    key: str


def _own(security: Security) -> Named:
    return Named("security.tls_cert", security.tls_cert, "security.tls_key", security.tls_key)


def read_pair(security: Security) -> Pair | None:
    """Return the contents of the configured files; None without TLS. Raises StartError if they cannot be used."""
    if not security.tls_cert:
        return None
    own = _own(security)
    pair = Pair(*read({own.cert_setting: own.cert, own.key_setting: own.key}))
    server_context(pair, security)
    return pair


def read(files: Mapping[str, str]) -> list[bytes]:
    """Return the contents of files by the settings that name them. Raises StartError, with a line for each at fault."""
    contents, problems = [], []
    for setting, file in files.items():
        try:
            contents.append(Path(file).read_bytes())
        except OSError as error:
            problems.append(f"{setting}: {file} cannot be read: {error.strerror}")
    if problems:
        raise StartError("\n".join(problems))
    return contents


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
    load(context, pair, _own(security))
    return context


def load(context: ssl.SSLContext, pair: Pair, named: Named) -> None:
    """Have a context show a certificate. Raises StartError when that or its key cannot be used."""
    try:
        with _as_file(pair.certificate) as certificate, _as_file(pair.key) as key:
            context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise StartError(_fault(pair, named, error)) from error
    except OSError as error:
        raise StartError(f"{named.cert_setting}: {named.cert} cannot be loaded: {error.strerror}") from error


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Return a path to ``data``, as ``ssl`` takes nothing else: in memory, and to be opened by this user only."""
    with os.fdopen(os.memfd_create("fastdist-pem", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"


def _no_password() -> str:
    """Prevent a prompt at the terminal for the password of an encrypted key."""
    return ""


def _fault(pair: Pair, named: Named, error: Exception) -> str:
    """Return which of the two files cannot be used, and why."""
    try:
        with _as_file(pair.certificate) as certificate:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate)
    except ssl.SSLError:
        return f"{named.cert_setting}: {named.cert} holds no certificate in PEM form"
    if isinstance(error, ssl.SSLError) and error.reason in MISMATCHES:
        return f"{named.key_setting}: {named.key} is not the key of the certificate in {named.cert}"
    return (
        f"{named.key_setting}: {named.key} holds no private key in PEM form that is not encrypted, "
        f"or not that of {named.cert}"
    )


# ---- dates


def out_of_date(pair: Pair | None, security: Security) -> str:
    """Return what is wrong with the dates of a pair that was read from these files; empty if nothing is."""
    return _not_valid(pair.certificate, "security.tls_cert", security.tls_cert) if pair is not None else ""


def date_warnings(pair: Pair | None, config: Config) -> list[str]:
    """Return what is wrong with the dates of all certificates that are shown, or will be within ``SOON``."""
    shown = [(pair.certificate, "security.tls_cert", config.security.tls_cert)] if pair is not None else []
    for index, analyzer in enumerate(config.analyzers):
        if analyzer.tls.certificate:
            shown.append((analyzer.tls.certificate, f"analyzers[{index}].client_cert", analyzer.client_cert))
    return [text for each in shown if (text := _not_valid(*each) or _not_for_long(*each))]


def not_after(certificate: bytes) -> int:
    """Return when a certificate (PEM) expires, in seconds since 1970; 0 if that cannot be parsed."""
    _, ends = validity(certificate)
    return int(ends.timestamp()) if ends is not None else 0


def _not_valid(certificate: bytes, setting: str, file: str) -> str:
    begins, ends = validity(certificate)
    now = datetime.now(UTC)
    if ends is not None and now > ends:
        return f"{setting}: the certificate in {file} expired on {ends:%Y-%m-%d %H:%M:%S} UTC"
    if begins is not None and now < begins:
        return f"{setting}: the certificate in {file} is not valid before {begins:%Y-%m-%d %H:%M:%S} UTC"
    return ""


def _not_for_long(certificate: bytes, setting: str, file: str) -> str:
    _, ends = validity(certificate)
    left = ends - datetime.now(UTC) if ends is not None else SOON
    if ends is None or left >= SOON:
        return ""
    days = f"{left.days} day{'' if left.days == 1 else 's'}" if left.days else "less than a day"
    return f"{setting}: the certificate in {file} expires in {days}, on {ends:%Y-%m-%d %H:%M:%S} UTC; renew it"


def validity(pem: bytes) -> tuple[datetime | None, datetime | None]:
    """Return from when until when the first certificate of a chain is valid; None for what cannot be parsed.

    ``ssl`` reports that only of certificates received from a peer.
    """
    found = re.search(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END", pem, re.DOTALL)
    try:
        der = base64.b64decode(found[1] if found else b"")
        _, at, _ = _element(der, 0)  # the certificate
        _, at, _ = _element(der, at)  # its signed part
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
