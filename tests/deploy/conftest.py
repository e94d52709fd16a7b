"""What the tests of deployment files look at: the files, and a distributor that has had some traffic."""

from __future__ import annotations

import shutil
import ssl

import images
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families
from recorder import Recorder
from stream_exposition import stream_exposition
from support import Distributor, Emitter, Mocks, request, running


def checked_over_tls(folder):
    """Return settings of an analyzer whose health check is over TLS, with a certificate on either side."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = authority.issue_cert("fastdist.example")
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    client.private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
    files = f'client_cert = "{folder}/client.pem"\nclient_key = "{folder}/client.pem"\nca_file = "{folder}/ca.pem"\n'
    return f'{files}health = "https://127.0.0.1:{Recorder(context).port}/health"\n'


@pytest.fixture(scope="session")
def over_tls():
    """Return ``over_tls(folder)``: settings of an analyzer whose certificate is known."""
    return checked_over_tls


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    """Return a distributor that has accepted, rejected and delivered packets."""
    mocks = Mocks()
    with running(mocks):
        folder = tmp_path_factory.mktemp("live")
        distributor = Distributor(folder, mocks, own={"A1": checked_over_tls(folder)})
        with running(distributor):
            Emitter(distributor.port).send(200)
            assert distributor.post(b"[]")[0] == 400
            for kind, status in (("application/json", 200), ("application/msgpack", 415)):
                assert request(distributor.port, "POST", "/ingest", b"{}", {"Content-Type": kind})[0] == status
            assert request(distributor.port, "POST", "/ingest", b"{", {"Content-Type": "application/json"})[0] == 400
            distributor.wait_at_rest()
            yield distributor


@pytest.fixture(scope="session")
def exposition(live) -> str:
    """Return the text of GET /metrics."""
    status, _, body = request(live.port, "GET", "/metrics")
    assert status == 200
    return body.decode()


@pytest.fixture(scope="session")
def families(exposition):
    """Return what GET /metrics tells, as prometheus_client reads it."""
    return list(text_string_to_metric_families(exposition))


@pytest.fixture(scope="session")
def all_families(families):
    """Return the same with what a replica tells that shares a stream with others."""
    return [*families, *text_string_to_metric_families(stream_exposition())]


@pytest.fixture
def promtool() -> str:
    """Return where promtool is; skip where it is not."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; scripts/peers.sh installs it")
    return found


@pytest.fixture(scope="session")
def builder(tmp_path_factory) -> images.Builder:
    """Return what makes the Dockerfile's images, each once; skip where none can be made."""
    folder = tmp_path_factory.mktemp("images")
    if obstacle := images.obstacle(folder):
        pytest.skip(obstacle)
    return images.Builder(folder)
