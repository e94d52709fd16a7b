"""Processes for tests: whatever a test starts is checked when it passes, shown when it fails, and killed at its end."""

from __future__ import annotations

import json

import pytest
from support import Distributor, Fleet, Mocks, Process

PROCESSES = pytest.StashKey[list]()
PASSED = pytest.StashKey[bool]()
SHOWN = 8000  # characters of a process's output


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[PASSED] = report.passed
    if report.failed:
        for process in item.stash.get(PROCESSES, []):
            report.sections.append((type(process).__name__, process.output[-SHOWN:]))
    return report


@pytest.fixture
def start(request):
    """Return ``start(kind, *arguments)``: start a process; it is killed at the end of the test."""
    processes = []

    def start(kind, *arguments, **options):
        process = kind(*arguments, **options)
        processes.append(process)
        request.node.stash.setdefault(PROCESSES, []).append(process)
        return process

    yield start
    for process in reversed(processes):
        process.kill_all()


@pytest.fixture
def mocks(lasting_mocks, request) -> Mocks:
    """Four mock analyzers in one process, as if they had just been started."""
    lasting_mocks.start_anew()
    request.node.stash.setdefault(PROCESSES, []).append(lasting_mocks)
    return lasting_mocks


@pytest.fixture
def fleet(start, tmp_path) -> Fleet:
    """Four mock analyzers in a process each."""
    return start(Fleet, tmp_path)


@pytest.fixture
def serve(start, tmp_path, request):
    """Return ``serve(analyzers, settings)``: start a distributor.

    One that still runs at the end of a test that passed must come to rest, and its accounts must be exact.
    """
    distributors: list[Distributor] = []

    def serve(analyzers, settings=None, **options):
        distributors.append(start(Distributor, tmp_path, analyzers, settings, **options))
        return distributors[-1]

    yield serve
    if request.node.stash.get(PASSED, False):
        for distributor in distributors:
            if distributor.process.poll() is None:
                distributor.wait_at_rest()


@pytest.fixture(scope="module")
def lasting():
    """Distributors for the tests of a module, by their settings."""
    distributors: dict[str, Distributor] = {}
    yield distributors
    for distributor in distributors.values():
        distributor.kill_all()


@pytest.fixture
def shared(lasting, mocks, tmp_path, request):
    """Return ``shared(settings)``: a distributor that has seen other tests, for those that neither end it nor count.

    Its analyzers are online. It must come to rest after the test; one with which a test has failed is not used again.
    """
    used: list[str] = []

    def shared(settings=None, kind=Distributor):
        key = json.dumps([kind.__name__, settings])
        used.append(key)
        if key not in lasting:
            lasting[key] = kind(tmp_path, mocks, settings)
        request.node.stash.setdefault(PROCESSES, []).append(lasting[key])
        lasting[key].wait_for_states("online")
        lasting[key].lines.clear()  # of other tests
        return lasting[key]

    yield shared
    for key in used:
        if request.node.stash.get(PASSED, False):
            lasting[key].wait_at_rest()
        else:
            lasting.pop(key).kill_all()


@pytest.fixture
def run(start):
    """Return ``run(command, **environment)``: start any command."""

    def run(*command, **environment) -> Process:
        return start(Process, [str(word) for word in command], **environment)

    return run
