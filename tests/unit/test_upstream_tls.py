"""TLS with analyzers: files that cannot be used are named, contexts are shared, and dates are warned of in time."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest
import trustme

from fastdist.errors import ConfigError, StartError
from fastdist.net import connect, tls
from fastdist.net.upstream_tls import NOTHING, Contexts, not_after, with_files
from fastdist.settings import Analyzer, ClientTls, Config, Security

AUTHORITY = trustme.CA()
NOW = datetime.now(UTC).replace(microsecond=0)


def analyzer(name="a", **settings):
    return Analyzer(id=name, endpoint="https://h/", weight=1, **settings)


@pytest.fixture
def files(tmp_path):
    """Write an authority, a client's certificate and its key, and another key; return their paths by name."""
    pair, other = AUTHORITY.issue_cert("client"), AUTHORITY.issue_cert("other")
    contents = {
        "ca": AUTHORITY.cert_pem.bytes(),
        "cert": b"".join(blob.bytes() for blob in pair.cert_chain_pems),
        "key": pair.private_key_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "text": b"nothing\n",
        "empty": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {name: str(tmp_path / name) for name in (*contents, "none")}


def test_contents_of_files_are_read(files):
    named = analyzer(ca_file=files["ca"], client_cert=files["cert"], client_key=files["key"])
    plain, secure = with_files(Config(analyzers=(analyzer("b"), named))).analyzers
    assert plain == analyzer("b")
    assert secure.tls.authorities == AUTHORITY.cert_pem.bytes()
    assert (secure.client_cert, secure.id) == (files["cert"], "a")


@pytest.mark.parametrize(
    ("settings", "at_fault", "problem"),
    [
        ({"ca_file": "none"}, "ca_file", "cannot be read: No such file or directory"),
        ({"ca_file": "text"}, "ca_file", "holds no certificates in PEM form"),
        ({"ca_file": "empty"}, "ca_file", "is empty"),
        ({"client_cert": "empty", "client_key": "key"}, "client_cert", "is empty"),
        ({"client_cert": "cert", "client_key": "empty"}, "client_key", "is empty"),
        ({"ca_file": "key"}, "ca_file", "holds no certificates in PEM form"),
        ({"client_cert": "none", "client_key": "key"}, "client_cert", "cannot be read"),
        ({"client_cert": "cert", "client_key": "none"}, "client_key", "cannot be read"),
        ({"client_cert": "text", "client_key": "key"}, "client_cert", "holds no certificate in PEM form"),
        ({"client_cert": "cert", "client_key": "other"}, "client_key", "is not the key of the certificate in"),
        ({"client_cert": "cert", "client_key": "text"}, "client_key", "holds no private key in PEM form"),
    ],
)
def test_file_that_cannot_be_used_is_named(files, settings, at_fault, problem):
    wrong = analyzer(**{name: files[file] for name, file in settings.items()})
    with pytest.raises(ConfigError) as caught:
        with_files(Config(analyzers=(analyzer("b"), wrong, analyzer("c", ca_file=files["none"]))))
    first, second = caught.value.problems
    assert first.startswith(f"analyzers[1].{at_fault}: {files[settings[at_fault]]} {problem}")
    assert second.startswith("analyzers[2].ca_file: ")


def test_equal_contents_share_a_context(files):
    contexts = Contexts()
    one, two = with_files(
        Config(analyzers=(analyzer("1", ca_file=files["ca"]), analyzer("2", ca_file=files["ca"])))
    ).analyzers
    assert contexts.of(one) is contexts.of(two) is not contexts.of(analyzer("3"))
    assert contexts.of(analyzer("3")) is contexts.of(analyzer("4", server_name="x")) is contexts.system
    held = contexts.of(one)
    contexts.keep([two])
    assert contexts.of(one) is held
    contexts.keep([analyzer("3")])
    assert contexts.of(one) is not held


def test_own_authorities_replace_the_systems(files):
    (one,) = with_files(Config(analyzers=(analyzer(ca_file=files["ca"]),))).analyzers
    context = Contexts().of(one)
    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_context_that_cannot_be_made_says_so():
    broken = analyzer(tls=ClientTls(authorities=b"x"))
    with pytest.raises(StartError, match=r"^analyzer a\.ca_file: "):
        Contexts().of(broken)
    assert analyzer().tls == NOTHING


@pytest.mark.parametrize(
    ("endpoint", "health", "own", "names"),
    [
        ("https://h:1/x", "/health", "", ("h", "h")),
        ("https://h:1/x", "/health", "Inside.Example", ("inside.example", "inside.example")),
        ("https://h:1/x", "https://h:1/up", "n", ("n", "n")),
        ("https://h:1/x", "https://other/up", "n", ("n", "other")),
        ("https://h:1/x", "https://h:2/up", "n", ("n", "h")),
    ],
)
def test_name_that_is_asked_for(endpoint, health, own, names):
    own = own.lower()
    found = Analyzer(id="a", endpoint=endpoint, weight=1, health=health, server_name=own)
    assert (found.tls_name, found.health_tls_name) == names


# ---- what an analyzer ends a handshake with


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLS alert: certificate required (it asks for a client certificate: "),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "TLS alert: handshake failure"),
        ("TLSV1_ALERT_UNKNOWN_CA", "TLS alert: unknown ca"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "TLS alert: protocol version"),
        ("WRONG_VERSION_NUMBER", "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
    ],
)
def test_alerts_are_named(reason, words):
    error = ssl.SSLError(1, f"[SSL: {reason}] {reason.lower().replace('_', ' ')} (_ssl.c:1)")
    error.reason = reason
    assert connect.describe(error, 1.0).startswith(words)


# ---- dates


def certificate(ends, name="emitters.example"):
    pair = AUTHORITY.issue_cert(name, not_before=NOW - timedelta(days=400), not_after=ends)
    return pair.cert_chain_pems[0].bytes()


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (timedelta(days=14, hours=1), None),
        (timedelta(days=13, hours=23), "expires in 13 days, on "),
        (timedelta(days=1, hours=5), "expires in 1 day, on "),
        (timedelta(hours=2), "expires in less than a day, on "),
        (timedelta(days=-1), "expired on "),
    ],
)
def test_dates_are_warned_of_in_time(left, words):
    pair = tls.Pair(certificate(NOW + left), b"")
    config = Config(
        security=Security(tls_cert="own.pem", tls_key="own.key"),
        analyzers=(analyzer("b"), analyzer(client_cert="c.pem", tls=ClientTls(certificate=certificate(NOW + left)))),
    )
    warned = tls.date_warnings(pair, config)
    if words is None:
        assert warned == []
        return
    own, client = warned
    assert own.startswith(f"security.tls_cert: the certificate in own.pem {words}")
    assert client.startswith(f"analyzers[1].client_cert: the certificate in c.pem {words}")
    assert f"{NOW + left:%Y-%m-%d %H:%M:%S} UTC" in own


def test_end_of_a_certificate_in_seconds():
    assert tls.not_after(certificate(NOW)) == NOW.timestamp()
    assert tls.not_after(b"nothing") == tls.not_after(b"") == 0


class Told:
    def __init__(self, certificate):
        self.certificate = certificate

    def get_extra_info(self, name):
        return self.certificate if name == "peercert" else None


@pytest.mark.parametrize(
    ("shown", "ends"),
    [
        ({"notAfter": "Jan  5 09:34:43 2018 GMT"}, 1515144883),
        ({"notAfter": "nonsense"}, 0),
        ({}, 0),
        (None, 0),
    ],
)
def test_end_of_certificate_that_was_seen(shown, ends):
    assert not_after(Told(shown)) == ends
    assert not_after(None) == 0
