"""TLS contexts: what cannot be used changes nothing, and nobody is asked for a passphrase."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from fastdist.config import Security
from fastdist.errors import StartError
from fastdist.tls import load_certificate, server_context


class Authority:
    """Signs certificates into two files."""

    def __init__(self, folder):
        self.authority = trustme.CA()
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.security = Security(tls_cert=str(self.cert), tls_key=str(self.key))

    def write(self):
        pair = self.authority.issue_cert("logs.example")
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


def test_without_a_certificate_there_is_no_tls():
    assert server_context(Security()) is None


def test_a_new_certificate_takes_the_place_of_the_old(files):
    first = files.write()
    context = server_context(files.security)
    assert files.shown_by(context) == first
    second = files.write()
    assert files.shown_by(context) == first
    load_certificate(context, files.security)
    assert files.shown_by(context) == second != first


@pytest.mark.parametrize("fault", ["another key", "no key", "no certificate", "garbage", "cut short"])
def test_what_cannot_be_used_leaves_the_context_as_it_was(files, fault):
    first = files.write()
    context = server_context(files.security)
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
        load_certificate(context, files.security)
    assert str(files.cert.parent) in str(caught.value)
    assert files.shown_by(context) == first
    with pytest.raises(StartError):
        server_context(files.security)


def test_an_encrypted_key_is_refused_with_its_reason(files):
    files.write()
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    lock = serialization.BestAvailableEncryption(b"word")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    files.key.write_bytes(key.private_bytes(*form, lock))
    with pytest.raises(StartError, match="not encrypted"):
        server_context(files.security)
