"""What a real supervisor tells the service manager, read from the socket that NOTIFY_SOCKET names."""

from __future__ import annotations

import os
import signal
import socket
import threading

import psutil
import pytest
from manager import Manager
from support import Distributor, Mocks, running, wait_until

from fastdist.supervisor.processes import HANG, LATE

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def mocks():
    mocks = Mocks()
    with running(mocks):
        yield mocks


@pytest.fixture
def manager(request, tmp_path):
    abstract = getattr(request, "param", "") == "abstract"
    return Manager(f"@fastdist-test-{os.getpid()}" if abstract else str(tmp_path / "notify"))


@pytest.fixture
def serve(tmp_path, mocks, manager):
    """Return ``serve(settings, **environment)``: a distributor that ``manager`` has started."""
    started = []

    def serve(settings=None, **environment):
        started.append(Distributor(tmp_path, mocks, settings, NOTIFY_SOCKET=manager.name, **environment))
        return started[-1]

    yield serve
    for distributor in started:
        distributor.kill_all()


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
def test_only_supervisor_notifies_in_order(serve, manager):
    distributor = serve()
    wait_until(lambda: manager.states() == ["READY=1"], "ready")
    distributor.signal(signal.SIGHUP)
    wait_until(lambda: manager.states()[1:] == ["RELOADING=1", "READY=1"], "reloaded")
    assert distributor.stop() == 0
    assert manager.states() == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    assert {pid for pid, _ in manager.told} == {distributor.process.pid}


def test_ready_means_that_packets_are_taken(serve, manager):
    distributor = serve()
    wait_until(manager.states, "ready")
    assert distributor.post()[0] == 202


def test_refused_reload_notifies_its_end(serve, manager):
    distributor = serve()
    distributor.config.write_text("[server]\nport = 'no port'\n")
    distributor.signal(signal.SIGHUP)
    wait_until(lambda: manager.states() == ["READY=1", "RELOADING=1", "READY=1"], "told")
    distributor.line_with("cannot be used")


def test_end_may_take_as_long_as_draining(serve, manager):
    distributor = serve({"server": {"drain_timeout": "100s"}})
    distributor.stop()
    (stopping,) = [text for text in manager.messages if text.startswith("STOPPING")]
    extended = int(stopping.rpartition("EXTEND_TIMEOUT_USEC=")[2]) / 1e6
    assert extended > 100 + LATE


def test_status_follows_analyzer_changes(serve, manager, mocks):
    serve()
    all_well = "STATUS=2 of 2 workers running, 4 of 4 analyzers online"
    wait_until(lambda: "READY=1" in manager.messages, "ready")
    assert manager.messages[manager.messages.index("READY=1") - 1] == all_well
    mocks.set("A2", unhealthy=True)
    missing = "3 of 4 analyzers online; A2 is offline: health check: HTTP 503"
    wait_until(lambda: manager.messages[-1].endswith(missing), "one is missing")
    mocks.set("A2", unhealthy=False)
    wait_until(lambda: manager.messages[-1] == all_well, "all well again")


def test_watchdog_has_heartbeat_in_service(serve, manager):
    distributor = serve(WATCHDOG_USEC="600000")
    wait_until(lambda: manager.count("WATCHDOG=1") > 5, "heartbeats")
    os.kill(distributor.worker_pids()[0], signal.SIGKILL)  # one of two
    before = manager.count("WATCHDOG=1")
    wait_until(lambda: manager.count("WATCHDOG=1") > before + 5, "heartbeats")


def test_hanging_workers_send_no_heartbeat(serve, manager):
    distributor = serve(WATCHDOG_USEC="300000")
    wait_until(lambda: manager.count("WATCHDOG=1") > 2, "heartbeats")
    workers = distributor.worker_pids()
    supervisor = distributor.process.pid
    try:
        # The supervisor would replace them; so that it cannot, it is stopped as well until they count as hanging.
        for pid in (*workers, supervisor):
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(supervisor).status() == psutil.STATUS_STOPPED, "the supervisor is stopped")
        before = manager.count("WATCHDOG=1")
        threading.Event().wait(HANG + 0.5)
        assert manager.count("WATCHDOG=1") <= before + 1  # one may have been on its way
        before = manager.count("WATCHDOG=1")
        os.kill(supervisor, signal.SIGCONT)
        distributor.line_with("worker hung, sending SIGKILL")
        assert manager.count("WATCHDOG=1") == before
    finally:
        for pid in (*workers, supervisor):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)
    wait_until(lambda: manager.count("WATCHDOG=1") > before + 5, "heartbeats of their successors")


def test_foreign_watchdog_gets_no_heartbeat(serve, manager):
    distributor = serve(WATCHDOG_USEC="100000", WATCHDOG_PID="1")
    assert distributor.stop() == 0
    assert manager.count("WATCHDOG=1") == 0


def test_failing_start_is_never_ready(tmp_path, manager, mocks):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AssertionError, match="ended"):
            Distributor(tmp_path, mocks, port=taken.getsockname()[1], NOTIFY_SOCKET=manager.name)
    assert manager.states() == []


def test_missing_manager_changes_nothing(tmp_path, mocks):
    distributor = Distributor(tmp_path, mocks, NOTIFY_SOCKET=str(tmp_path / "absent"))
    with running(distributor):
        assert distributor.post()[0] == 202
        assert sum("service manager cannot be notified" in line for line in distributor.lines) == 1
        assert distributor.stop() == 0


def test_workers_lack_the_managers_variables(serve):
    distributor = serve(WATCHDOG_USEC="600000")
    for pid in distributor.worker_pids():
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & psutil.Process(pid).environ().keys()
