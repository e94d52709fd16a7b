"""What the service manager is told, read from a real datagram socket as systemd would."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from itertools import count

import pytest
from structlog.testing import capture_logs

from fastdist._core import PacketRing, file_size
from fastdist.config import load
from fastdist.supervisor import systemd
from fastdist.supervisor.main import Supervisor
from fastdist.supervisor.processes import WorkerSlot
from fastdist.supervisor.systemd import ServiceManager

NUMBERS = count()


class Socket:
    """The manager's end, at a path or (with @) in the abstract namespace."""

    def __init__(self, name):
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.socket.setblocking(False)

    def messages(self):
        """Return what has come since the last look."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    name = str(tmp_path / "notify") if request.param == "path" else f"@fastdist-test-{os.getpid()}-{next(NUMBERS)}"
    manager = Socket(name)
    yield manager
    manager.socket.close()


def service(manager, **environment):
    return ServiceManager({"NOTIFY_SOCKET": manager.name} | environment)


def test_readiness_is_notified_once(manager):
    it = service(manager)
    assert manager.messages() == []
    it.ready()
    it.ready()
    assert manager.messages() == ["READY=1"]


def reload(it, meanwhile=lambda: None):
    """Reload, with something happening in the middle."""

    async def reload():
        async with it.reloading():
            meanwhile()

    asyncio.run(reload())


def test_reload_sends_its_time_then_ready(manager):
    it = service(manager)
    it.ready()
    before = time.monotonic_ns() // 1000
    reload(it, lambda: it.status("in the middle"))
    _, message, *after = manager.messages()
    assert message.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert before <= int(message.rpartition("=")[2]) <= time.monotonic_ns() // 1000
    assert after == ["STATUS=in the middle", "READY=1"]


def test_failed_reload_sends_ready_as_well(manager):
    it = service(manager)
    it.ready()

    def fail():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        reload(it, fail)
    assert manager.messages()[-1] == "READY=1"


def test_reload_before_ready_sends_no_ready(manager):
    reload(service(manager))
    assert manager.messages() == []


def test_nothing_is_ready_after_stopping(manager):
    it = service(manager)
    it.ready()
    reload(it, lambda: it.stopping(1.5))
    reload(it, it.ready)
    assert manager.messages()[2:] == ["STOPPING=1\nEXTEND_TIMEOUT_USEC=1500000"]


def test_the_end_is_extended_when_it_is_near(manager, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(systemd.time, "monotonic", lambda: now)
    it = service(manager)
    it.extend(20)
    it.stopping(50)
    for _ in range(60):
        now += 1
        it.extend(20)
    assert manager.messages()[1:] == ["EXTEND_TIMEOUT_USEC=20000000"] * 2  # after 41 and 52 s


def test_writing_the_rest_extends_the_end(manager, tmp_path):
    """It is written by workers, as long as they get on, and then by the supervisor, of those that died."""
    environment = {"FASTDIST_QUEUE__PATH": str(tmp_path), "FASTDIST_QUEUE__DURABILITY": "memory"}
    supervisor = Supervisor(load(None, environment, {"workers": 1}))
    supervisor.manager, fd = service(manager), os.memfd_create("ring")
    os.ftruncate(fd, file_size(1 << 20))
    assert PacketRing(fd, 1 << 20, volatile=True).push(b"{}")
    supervisor.processes.slots.append(WorkerSlot(supervisor.block, 0, socket.socket(), fd, []))
    for write, gets_on in (
        (supervisor._send_heartbeat, False),
        (supervisor._send_heartbeat, True),
        (supervisor._dead_letter_rest, False),
    ):
        supervisor.processes.gets_on = gets_on
        supervisor.manager.stopping(1)
        write()
        extended = gets_on or write == supervisor._dead_letter_rest
        assert manager.messages()[1:] == ["EXTEND_TIMEOUT_USEC=20000000"] * extended
    assert len(list(tmp_path.glob("dead-letters/*"))) == 1
    for each in (fd, supervisor.settings, supervisor.block.fd):
        os.close(each)


def test_status_is_one_line_sent_when_new(manager):
    it = service(manager)
    for text in ("all is well", "all is well", "one\nis missing", "all is well"):
        it.status(text)
    assert manager.messages() == ["STATUS=all is well", "STATUS=one is missing", "STATUS=all is well"]


def test_watchdog_gets_three_heartbeats(manager, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(systemd.time, "monotonic", lambda: now)
    it = service(manager, WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
    assert it.interval == 10
    for _ in range(241):
        it.heartbeat()
        now += 0.125
    assert manager.messages() == ["WATCHDOG=1"] * 4  # at once, and after 10, 20 and 30 s


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
def test_foreign_watchdog_gets_no_heartbeat(manager, environment):
    it = service(manager, **environment)
    it.heartbeat()
    assert manager.messages() == []


def test_variables_do_not_reach_the_workers(manager):
    environment = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid()), "A": "1"}
    ServiceManager(environment)
    assert environment == {"A": "1"}


def test_no_manager_means_no_message_or_log(monkeypatch):
    monkeypatch.setattr(systemd.socket, "socket", None)
    for environment in ({}, {"NOTIFY_SOCKET": ""}):
        with capture_logs() as lines:
            it = ServiceManager(environment)
            it.ready()
            it.status("all is well")
            it.heartbeat()
            it.stopping(1)
        assert lines == []


def test_invalid_address_is_logged_not_used():
    with capture_logs() as lines:
        it = ServiceManager({"NOTIFY_SOCKET": "vsock:2:1234"})
        it.ready()
    assert [line["value"] for line in lines] == ["vsock:2:1234"]


def test_a_missing_manager_is_logged_once(tmp_path):
    name = str(tmp_path / "notify")
    with capture_logs() as lines:
        it = ServiceManager({"NOTIFY_SOCKET": name})
        it.ready()
        it.status("not read")
        assert len(lines) == 1
        back = Socket(name)
        it.status("read")
        back.socket.close()
        it.stopping(1)
        assert len(lines) == 2


def test_blocked_manager_blocks_no_service(manager, monkeypatch):
    monkeypatch.setattr(systemd, "PATIENCE", 0.001)
    it = service(manager)
    with capture_logs() as lines:
        for number in range(600):  # more than the kernel keeps for a reader (net.unix.max_dgram_qlen)
            it.status(f"status {number}")
    assert len(lines) == 1
    assert 0 < len(manager.messages()) < 600
