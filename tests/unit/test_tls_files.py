"""Certificates: which of the two files is at fault, said without a traceback or an error number."""

from __future__ import annotations

import subprocess

import pytest

from fastdist.errors import StartError
from fastdist.net import tls
from fastdist.settings import Security


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a certificate, its key (also encrypted), and another key."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("own", "other"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")
    openssl("req", "-x509", "-key", "own.key", "-days", "2", "-subj", "/CN=test", "-out", "own.crt")
    openssl("ec", "-in", "own.key", "-aes256", "-passout", "pass:secret", "-out", "encrypted.key")
    (folder / "text").write_text("nothing\n")
    (folder / "empty").write_text("")
    return folder


def test_a_certificate_and_its_key_are_taken(files):
    pair = tls.read_pair(Security(tls_cert=str(files / "own.crt"), tls_key=str(files / "own.key")))
    assert pair == tls.Pair((files / "own.crt").read_bytes(), (files / "own.key").read_bytes())
    assert "KEY" not in repr(pair)
    assert tls.read_pair(Security()) is None


@pytest.mark.parametrize(
    ("cert", "key", "fault", "why"),
    [
        ("nope", "nokey", "tls_cert", "cannot be read: No such file or directory"),
        ("own.crt", "nokey", "tls_key", "cannot be read: No such file or directory"),
        (".", "own.key", "tls_cert", "cannot be read: Is a directory"),
        ("text", "own.key", "tls_cert", "holds no certificate in PEM form"),
        ("empty", "own.key", "tls_cert", "holds no certificate in PEM form"),
        ("own.key", "own.key", "tls_cert", "holds no certificate in PEM form"),
        ("own.crt", "text", "tls_key", "holds no private key in PEM form that is not encrypted"),
        ("own.crt", "own.crt", "tls_key", "holds no private key in PEM form that is not encrypted"),
        ("own.crt", "encrypted.key", "tls_key", "holds no private key in PEM form that is not"),
        ("own.crt", "other.key", "tls_key", "is not the key of the certificate in "),
    ],
)
def test_the_file_at_fault_is_named(files, cert, key, fault, why):
    with pytest.raises(StartError) as caught:
        tls.read_pair(Security(tls_cert=str(files / cert), tls_key=str(files / key)))
    at_fault = files / (cert if fault == "tls_cert" else key)
    assert str(caught.value).startswith(f"security.{fault}: {at_fault} {why}")
    assert "Errno" not in str(caught.value)
