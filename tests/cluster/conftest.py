"""NATS servers that tests share: they are started once, and end when other tests come."""

from __future__ import annotations

import itertools

import pytest
from nats_servers import BINARY, Servers

NUMBERS = itertools.count(1)
LASTING = {}  # servers by number, from their first use on


def pytest_collection_modifyitems(items):
    for item in items:
        if "cluster" in item.path.parts:
            item.add_marker("cluster")
            if not BINARY.exists():
                item.add_marker(pytest.mark.skip("needs nats-server"))


@pytest.fixture(scope="session")
def lasting(tmp_path_factory):
    """Return ``lasting(count)``: the servers that tests share. They run then, whatever a test did to them."""

    def lasting(count):
        if count not in LASTING:
            LASTING[count] = Servers(tmp_path_factory.mktemp("nats"), count)
        LASTING[count].restore()
        return LASTING[count]

    return lasting


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem):
    """End the servers when other tests come next: idle ones took a fifth of a core."""
    yield
    if nextitem is None or "cluster" not in nextitem.path.parts:
        for servers in LASTING.values():
            servers.end()


@pytest.fixture
def one(lasting):
    """One server, which no test harms."""
    return lasting(1)


@pytest.fixture
def three(lasting):
    """A cluster of three; what a test does to them is undone."""
    return lasting(3)


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
