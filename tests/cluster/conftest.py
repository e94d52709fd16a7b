"""NATS servers that tests share: they are started once."""

from __future__ import annotations

import itertools

import pytest
from nats_servers import BINARY, Servers, running

NUMBERS = itertools.count(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "cluster" in item.path.parts:
            item.add_marker("cluster")
            if not BINARY.exists():
                item.add_marker(pytest.mark.skip("needs nats-server"))


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """One server, which no test harms."""
    servers = Servers(tmp_path_factory.mktemp("nats"))
    with running(servers):
        yield servers


@pytest.fixture(scope="session")
def lasting_three(tmp_path_factory):
    servers = Servers(tmp_path_factory.mktemp("nats"), 3)
    with running(servers):
        yield servers


@pytest.fixture
def three(lasting_three):
    """A cluster of three; what a test does to them is undone."""
    yield lasting_three
    lasting_three.restore()


@pytest.fixture(params=["one", "three"])
def servers(request):
    """One server, or three: what one does in order may come out of it among three."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def mocks(lasting_mocks):
    """Return analyzers that do no harm, with empty ledgers."""
    lasting_mocks.start_anew()
    return lasting_mocks


@pytest.fixture
def name():
    """Return the name of a stream of the test's own."""
    return f"TEST{next(NUMBERS)}"
