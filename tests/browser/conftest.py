"""A browser, a dashboard in it, and the service behind it. Without chromium and its driver these tests are skipped."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import chromium
import pytest
from selenium_page import ELSEWHERE, watched
from support import Distributor, Mocks, request, running


def pytest_collection_modifyitems(items):
    """Skip all of it where there is no browser."""
    missing = chromium.missing()
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"missing: {missing}; scripts/peers.sh installs it"))


@pytest.fixture(scope="session")
def driver():
    with chromium.browsing(f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1") as driver:
        yield driver


@pytest.fixture
def page(driver, serve):  # noqa: ARG001  (what it shows is ended after it)
    """A dashboard to be opened; whatever the console or the policy reports at the end fails the test."""
    with watched(driver) as page:
        yield page


@pytest.fixture
def mocks(lasting_mocks) -> Mocks:
    """Four mock analyzers, as if they had just been started."""
    lasting_mocks.start_anew()
    return lasting_mocks


@pytest.fixture
def serve(tmp_path):
    """Return ``serve(analyzers, settings)``: start a distributor; it is ended with the test."""
    with ExitStack() as stack:

        def serve(analyzers, settings=None, **options):
            distributor = Distributor(tmp_path, analyzers, settings, **options)
            stack.enter_context(running(distributor))
            return distributor

        yield serve


@pytest.fixture
def fresh(mocks, serve) -> Distributor:
    """A distributor with four analyzers, for this test only."""
    return serve(mocks)


@pytest.fixture(scope="module")  # not for longer: what idles takes processor time from others
def lasting_fastdist(lasting_mocks, tmp_path_factory):
    fastdist = Distributor(tmp_path_factory.mktemp("lasting"), lasting_mocks)
    with running(fastdist):
        yield fastdist


@pytest.fixture
def fastdist(lasting_fastdist, mocks) -> Distributor:  # noqa: ARG001  (mocks: they are harmless again)
    """A distributor with four analyzers that are online, as configured; it may have seen other tests."""
    for name, row in lasting_fastdist.analyzers().items():
        if row["override"]:
            request(lasting_fastdist.port, "DELETE", f"/analyzers/{name}/override")
    lasting_fastdist.wait_for_states("online")
    return lasting_fastdist
