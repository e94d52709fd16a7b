"""TLS for the tests of components: a certificate, and a parameter that has a test run without TLS and with it."""

from __future__ import annotations

import ssl

import pytest
from upstream_harness import self_signed


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The certificate's path, and a server's context with it."""
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusted(monkeypatch, certificate):
    """A server's context with a certificate that is trusted in this test."""
    path, context = certificate
    trusting = ssl.create_default_context(cafile=path)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    return context


@pytest.fixture(params=["plain", "tls"])
def tls(request):
    """The server's context, or None."""
    return None if request.param == "plain" else request.getfixturevalue("trusted")
