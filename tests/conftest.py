"""What all tests need of the process they run in."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import structlog
from hypothesis import HealthCheck, settings
from support import Mocks, running
from xdist.scheduler import LoadScopeScheduling

# Tests that share what is dear to make (browser, images, a Prometheus, servers): one process runs all of a group.
TOGETHER = {
    "tests/browser/test_changes.py": "browser",
    "tests/browser/test_figures.py": "browser",
    "tests/browser/test_reading.py": "browser",
    "tests/browser/test_scripts.py": "browser",
    "tests/cluster/test_claims.py": "nats",
    "tests/cluster/test_cluster_faults.py": "cluster faults",
    "tests/cluster/test_connecting.py": "nats",
    "tests/cluster/test_dead_stream.py": "stream dead letters",
    "tests/cluster/test_faults.py": "nats",
    "tests/cluster/test_publishing.py": "nats",
    "tests/cluster/test_replicas.py": "replicas",
    "tests/cluster/test_shared.py": "nats",
    "tests/cluster/test_stream_setup.py": "nats",
    "tests/cluster/test_stuck.py": "stream dead letters",
    "tests/deploy/test_grafana.py": "metrics",
    "tests/deploy/test_images.py": "images",
    "tests/deploy/test_systemd_unit.py": "images",
    "tests/deploy/test_prometheus.py": "metrics",
    "tests/deploy/test_prometheus_server.py": "prometheus",
    "tests/deploy/test_site.py": "site",
    "tests/e2e/test_agents_hostile.py": "hostile agents",
    "tests/e2e/test_endpoints.py": "endpoints",
    "tests/e2e/test_hostile.py": "hostile clients",
    "tests/e2e/test_send.py": "send",
    "tests/e2e/test_tls.py": "tls",
}

# What hypothesis makes up is the same in every run: a tree passes or fails twice. `make explore` looks for what no test
# has thought of: other examples each time, ten times as many; those that failed stay in .hypothesis/. No profile has a
# deadline or looks at how long examples take to make, for no test asserts a time.
settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
# `--hypothesis-profile` outdoes the environment.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure():
    """Make the process what it would be in a terminal of one's own.

    A run that was begun in the background ignores Ctrl-C, and its children do. A dumb terminal is shown other things.
    """
    os.environ["TERM"] = "xterm"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Let no collection of garbage look at the thousands of tests, which stay: each would take 0.2 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class Scheduling(LoadScopeScheduling):
    """Give each process the next test, or the next tests that belong together; begin with the latter."""

    def _split_scope(self, nodeid):
        return TOGETHER.get(nodeid.partition("::")[0], nodeid)


def pytest_xdist_make_scheduler(config, log):
    """Keep together what belongs together where ``--dist loadgroup`` asks for it."""
    return Scheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """Undo what a command that runs in this process has set up."""
    before = structlog.get_config()
    yield
    if structlog.get_config() != before:
        structlog.configure(**before)


@pytest.fixture(scope="session")
def lasting_mocks():
    """Four mock analyzers in one process, for all tests: starting them for each would take a minute."""
    mocks = Mocks()
    with running(mocks):
        yield mocks
