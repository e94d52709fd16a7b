"""What all tests need of the process they run in."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings
from support import Mocks, running

# Examples that hypothesis makes up are others in every run, unless the run is a gate: there the same tree must pass or
# fail twice. No profile has a deadline, for no test asserts a time. `--hypothesis-profile` outdoes the environment.
settings.register_profile("default", settings.get_profile("default"), deadline=None)
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
if "HYPOTHESIS_PROFILE" in os.environ:  # else hypothesis takes "ci" by itself where a CI service says that it is one
    settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])


def pytest_configure():
    """Hear Ctrl-C, and let children hear it, also where the run was begun in the background: it is ignored there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def lasting_mocks():
    """Four mock analyzers in one process, for all tests: starting them for each would take a minute."""
    mocks = Mocks()
    with running(mocks):
        yield mocks
