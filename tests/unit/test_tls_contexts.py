"""TLS contexts: what cannot be used changes nothing, and there is no prompt for a passphrase."""

from __future__ import annotations

import base64
import contextlib
import gc
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from fastdist.errors import StartError
from fastdist.net.tls import out_of_date, read_pair, server_context, validity
from fastdist.settings import Security


class Authority:
    """Signs certificates into two files."""

    def __init__(self, folder):
        self.authority = trustme.CA()
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.security = Security(tls_cert=str(self.cert), tls_key=str(self.key))

    def write(self, **dates):
        pair = self.authority.issue_cert("logs.example", **dates)
        self.cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
        self.key.write_bytes(pair.private_key_pem.bytes())
        return ssl.PEM_cert_to_DER_cert(pair.cert_chain_pems[0].bytes().decode())

    def shown_by(self, context):
        """Return the certificate that a client is shown."""
        ours, theirs = socket.socketpair()
        client = ssl.create_default_context()
        self.authority.configure_trust(client)

        def serve():
            with contextlib.suppress(OSError), context.wrap_socket(ours, server_side=True) as connection:
                connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with client.wrap_socket(theirs, server_hostname="logs.example") as connection:
            shown = connection.getpeercert(binary_form=True)
        thread.join()
        return shown


@pytest.fixture
def files(tmp_path):
    return Authority(tmp_path)


def context_of(files):
    return server_context(read_pair(files.security), files.security)


def test_without_certificate_there_is_no_tls():
    assert read_pair(Security()) is None
    assert server_context(None, Security()) is None


def test_loaded_pair_is_served_without_files(files):
    first = files.write()
    pair = read_pair(files.security)
    second = files.write()
    assert files.shown_by(server_context(pair, files.security)) == first
    files.cert.unlink()
    files.key.write_text("nonsense")
    assert files.shown_by(server_context(pair, files.security)) == first != second


@pytest.mark.parametrize("fault", ["another key", "no key", "no certificate", "garbage", "cut short"])
def test_what_cannot_be_used_is_not_taken(files, fault):
    files.write()
    key = files.key.read_bytes()
    files.write()
    if fault == "another key":
        files.key.write_bytes(key)
    elif fault == "no key":
        files.key.unlink()
    elif fault == "no certificate":
        files.cert.unlink()
    elif fault == "garbage":
        files.cert.write_text("nonsense")
    else:
        files.key.write_bytes(files.key.read_bytes()[:100])
    with pytest.raises(StartError) as caught:
        read_pair(files.security)
    assert str(files.cert.parent) in str(caught.value)


def test_key_leaves_no_file_or_descriptor(files):
    files.write()
    gc.collect()  # what other tests have left is not to go meanwhile
    before = sorted(Path("/proc/self/fd").iterdir())
    assert context_of(files) is not None
    files.key.write_bytes(files.cert.read_bytes())
    with pytest.raises(StartError):
        context_of(files)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert sorted(files.cert.parent.iterdir()) == [files.cert, files.key]


def test_encrypted_key_refusal_has_reason(files):
    files.write()
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    lock = serialization.BestAvailableEncryption(b"word")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    files.key.write_bytes(key.private_bytes(*form, lock))
    with pytest.raises(StartError, match="not encrypted"):
        read_pair(files.security)


# ---- dates

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.mark.parametrize(
    ("begins", "ends", "fault"),
    [
        (datetime(1950, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), ""),
        (NOW - timedelta(days=2), NOW + timedelta(days=2), ""),
        (datetime(1990, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, tzinfo=UTC), ""),
        (
            datetime(2019, 1, 1, tzinfo=UTC),
            datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC),
            "expired on 2020-02-03 04:05:06 UTC",
        ),
        (
            datetime(2070, 2, 3, tzinfo=UTC),
            datetime(2080, 1, 1, tzinfo=UTC),
            "not valid before 2070-02-03 00:00:00 UTC",
        ),
    ],
)
def test_the_dates_of_a_certificate_are_read(files, begins, ends, fault):
    files.write(not_before=begins, not_after=ends)
    pair = read_pair(files.security)
    assert validity(pair.certificate) == validity(b"Subject: with text before\n" + pair.certificate) == (begins, ends)
    told = out_of_date(pair, files.security)
    assert fault in told
    assert bool(told) == bool(fault)
    assert not fault or told.startswith(f"security.tls_cert: the certificate in {files.cert} ")


@given(st.binary(max_size=300))
def test_unreadable_dates_are_no_fault(der):
    text = base64.b64encode(der)
    for cut in (text, text[:-1]):
        begins, ends = validity(b"-----BEGIN CERTIFICATE-----\n" + cut + b"\n-----END CERTIFICATE-----\n")
        assert (begins is None) == (ends is None)
    assert validity(der) == (None, None)
