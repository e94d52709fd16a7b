"""The unit: read, judged by systemd's own tools, and started by a real systemd in a machine of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import dockerfile
import machine as machines
import psutil
import pytest
from dockerfile import ROOT
from images import Image
from machine import Machine
from support import BODY, Emitter, Mocks, free_port, get_json, request, running, wait_until

from fastdist.settings import Config
from fastdist.supervisor.listeners import BACKLOG

pytestmark = pytest.mark.processes
FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "fastdist.service"
SOCKET = FOLDER / "fastdist.socket"
EXPOSURE = 1.5  # of 10: what systemd-analyze makes of the sandbox
CONFIG = "/etc/fastdist/fastdist.toml"


def entries(section, unit=UNIT):
    """Return the settings of a section, as (name, value), in order."""
    text = re.search(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", unit.read_text(), re.MULTILINE | re.DOTALL)[1]
    return [tuple(line.split("=", 1)) for line in text.splitlines() if line and not line.startswith("#")]


SERVICE = dict(entries("Service"))


def seconds(text):
    value, unit = re.fullmatch(r"(\d+)(s|min)", text).groups()
    return int(value) * {"s": 1, "min": 60}[unit]


@pytest.fixture
def analyze():
    """Return ``analyze(*words)``: run systemd-analyze; skip where it is not installed."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")

    def analyze(*words):
        command = [program, *map(str, words)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)

    return analyze


# ----------------------------------------------------------------------------------------------------------------- read


def test_systemd_verifies_the_unit(analyze, tmp_path):
    """But for the program, which is not installed where this is tested."""
    installed = Path(sys.executable).with_name("fastdist")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/fastdist/bin/fastdist", str(installed)))
    done = analyze("verify", unit)
    assert (done.returncode, done.stdout) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMood=mixed"))
    assert "KillMood" in analyze("verify", unit).stdout


def test_systemd_verifies_the_socket(analyze, tmp_path):
    installed = Path(sys.executable).with_name("fastdist")
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("/opt/fastdist/bin/fastdist", str(installed)))
    unit = tmp_path / SOCKET.name
    unit.write_text(SOCKET.read_text())
    done = analyze("verify", unit)
    assert (done.returncode, done.stdout) == (0, "")
    unit.write_text(SOCKET.read_text().replace("Backlog=", "Backlock="))
    assert "Backlock" in analyze("verify", unit).stdout


def test_socket_is_where_the_settings_say():
    socket, server = dict(entries("Socket", SOCKET)), Config().server
    assert (socket["ListenStream"], socket["BindIPv6Only"]) == (str(server.port), "both")
    assert int(socket["Backlog"]) == BACKLOG
    assert "Accept" not in socket, "the service accepts connections itself"
    assert SOCKET.stem == UNIT.stem, "which is how systemd finds the service"


def test_the_sandbox_is_tight(analyze):
    done = analyze("security", "--offline=true", f"--threshold={round(EXPOSURE * 10)}", "--no-pager", UNIT)
    if "unrecognized option" in done.stdout or "Unknown" in done.stdout:
        pytest.skip("this systemd does not judge units that are not running")
    assert done.returncode == 0, done.stdout
    assert float(re.search(r"exposure level for fastdist.service: ([\d.]+)", done.stdout)[1]) <= EXPOSURE


def test_only_supervisor_notifies_systemd():
    assert (SERVICE["Type"], SERVICE["NotifyAccess"]) == ("notify", "main")
    assert seconds(SERVICE["WatchdogSec"]) > 0


def test_draining_is_left_to_the_supervisor():
    assert SERVICE["KillMode"] == "mixed"  # SIGTERM to the supervisor only
    assert seconds(SERVICE["TimeoutStopSec"]) > Config().server.drain_timeout


def test_worker_out_of_memory_keeps_service():
    assert SERVICE["OOMPolicy"] == "continue"


def test_permanent_errors_are_not_restarted():
    assert (SERVICE["Restart"], SERVICE["RestartPreventExitStatus"]) == ("on-failure", "2")


def test_descriptors_suffice_for_connections():
    config = Config()
    most = config.server.max_connections + len(config.analyzers) * config.delivery.connections
    assert int(SERVICE["LimitNOFILE"]) > most


def test_reload_checks_the_served_file_first():
    (start,) = [value for name, value in entries("Service") if name == "ExecStart"]
    check, hang_up = [value for name, value in entries("Service") if name == "ExecReload"]
    assert start == f"/opt/fastdist/bin/fastdist serve --config {CONFIG}"
    assert check == f"/opt/fastdist/bin/fastdist check {CONFIG}"
    assert hang_up == "/bin/kill -HUP $MAINPID"


def test_user_and_paths_match_the_image():
    image = dockerfile.environment("fastdist")
    assert SERVICE["Environment"] == f"FASTDIST_QUEUE__PATH={image['FASTDIST_QUEUE__PATH']}"
    assert f"/var/lib/{SERVICE['StateDirectory']}" == image["FASTDIST_QUEUE__PATH"] == SERVICE["WorkingDirectory"]
    assert image["FASTDIST_CONFIG"] == CONFIG
    (made,) = [run.text for stage in dockerfile.lineage("fastdist") for run in stage.all("RUN")]
    assert "useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fastdist" in made
    assert made.split("useradd")[1].split(" && ")[0].split()[-1] == SERVICE["User"] == SERVICE["Group"]
    (line,) = [line for line in (FOLDER / "fastdist.sysusers").read_text().splitlines() if line.startswith("u ")]
    assert line.split()[1] == SERVICE["User"]
    assert line.split()[-2:] == ["/var/lib/fastdist", "/usr/sbin/nologin"]


# -------------------------------------------------------------------------------------------------------------- started


class Service:
    """fastdist in a machine with systemd, installed as docs/operations.md says; systemd's waits are shortened."""

    def __init__(self, machine, mocks):
        self.machine, self.mocks = machine, mocks
        self.port = free_port()

    def configure(self, **settings):
        server = {"port": self.port, "workers": 2, "drain_timeout": "20s"} | settings
        text = "[server]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in server.items())
        for name, endpoint in self.mocks.endpoints.items():
            text += f'[[analyzers]]\nid = "{name}"\nendpoint = "{endpoint}"\nweight = 1\n'
        self.write(text)

    def write(self, text):
        self.machine.run("sh", "-c", f"cat > {CONFIG} <<'END'\n{text}\nEND")

    def systemctl(self, *words, check=True):
        return self.machine.run("systemctl", *words, "fastdist", check=check)

    def show(self, name):
        return self.machine.show("fastdist", name)

    def processes(self):
        """Return the service's processes, as this machine counts, the supervisor first."""
        group = self.machine.group / self.show("ControlGroup").strip("/")
        found = [psutil.Process(int(pid)) for pid in (group / "cgroup.procs").read_text().split()]
        return sorted(found, key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def mocks():
    mocks = Mocks()
    with running(mocks):
        yield mocks


@pytest.fixture(scope="module")
def machine(builder, tmp_path_factory):
    """Return a machine with systemd on which fastdist is installed."""
    if obstacle := machines.obstacle():
        pytest.skip(obstacle)
    image = Image(tmp_path_factory.mktemp("machine") / "image", builder.build("build"))
    image.copy_in(UNIT, "/etc/systemd/system/fastdist.service")
    image.copy_in(SOCKET, "/etc/systemd/system/fastdist.socket")
    image.copy_in(FOLDER / "fastdist.sysusers", "/etc/sysusers.d/fastdist.conf")
    image.copy_text("", CONFIG)
    # The watchdog's half minute, for tests that wait for it. All else is as it is.
    image.copy_text("[Service]\nWatchdogSec=10s\n", "/etc/systemd/system/fastdist.service.d/test.conf")
    machine = Machine(image)
    try:
        machine.run("systemd-sysusers")
        yield machine
    finally:
        machine.kill()


@pytest.fixture
def service(machine, mocks):
    """Return the service, started."""
    mocks.start_anew()
    service = Service(machine, mocks)
    service.configure()
    service.systemctl("start")
    yield service
    service.systemctl("stop", check=False)
    service.systemctl("reset-failed", check=False)


@pytest.mark.slow
def test_started_accepts_stopped_delivered(service):
    assert service.show("ActiveState") == "active"
    assert Emitter(service.port).send(200).count(202) == 200
    service.systemctl("stop")
    assert service.show("Result") == "success"
    assert len(service.mocks.delivered()) == 200


@pytest.mark.slow
def test_works_in_sandbox_as_its_own_user(service):
    supervisor, *workers = service.processes()
    assert len(workers) == 2
    user = int(service.machine.run("id", "-u", "fastdist"))
    for process in (supervisor, *workers):
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert process.uids().real == user
        assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
        assert re.search(r"^Seccomp:\s2$", status, re.MULTILINE)

    def measured():
        return all(row["rssBytes"] > 0 for row in get_json(service.port, "/stats")["workers"])

    wait_until(measured, "what it measures once a second, it can still see")
    state = service.machine.run("stat", "-c", "%U %a", "/var/lib/fastdist", "/var/lib/fastdist/ring-0.fdq")
    assert state == "fastdist 700\nfastdist 600"


@pytest.mark.slow
def test_the_status_line_says_how_it_is(service):
    expected = "2 of 2 workers running, 4 of 4 analyzers online"
    assert service.show("StatusText") == expected
    service.mocks.set("A1", unhealthy=True)
    wait_until(lambda: "3 of 4 analyzers" in service.show("StatusText"), "one is missing")


@pytest.mark.slow
def test_reload_changes_without_new_process(service):
    pid = service.show("MainPID")
    service.mocks.set("A2", refuse=True)
    text = service.machine.run("cat", CONFIG)
    service.write(text.replace('id = "A2"', 'id = "B2"'))
    service.systemctl("reload")

    def names():
        return [row["id"] for row in get_json(service.port, "/analyzers")["analyzers"]]

    wait_until(lambda: names() == ["A1", "B2", "A3", "A4"], "the new analyzer")
    wait_until(lambda: service.show("ActiveState") == "active", "reloaded")
    assert service.show("MainPID") == pid


@pytest.mark.slow
def test_failed_reload_says_why_keeps_all(service):
    service.configure(workers=-1)
    said = service.systemctl("reload", check=False)
    assert "failed" in said
    assert "server.workers: must be >= 0" in service.machine.journal()
    assert service.show("ActiveState") == "active"
    assert request(service.port, "GET", "/ready")[0] == 200


@pytest.mark.slow
def test_wrong_config_fails_without_restart(service):
    service.systemctl("stop")
    service.configure(workers=-1)
    service.systemctl("start", check=False)
    assert service.show("ActiveState") == "failed"
    assert (service.show("ExecMainStatus"), service.show("NRestarts")) == ("2", "0")


@pytest.mark.slow
def test_killed_processes_are_restarted(service):
    supervisor, worker, _ = service.processes()
    worker.kill()
    wait_until(lambda: sum(row["restarts"] for row in get_json(service.port, "/stats")["workers"]), "replaced")
    assert service.show("NRestarts") == "0"
    supervisor.kill()
    wait_until(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active", "restarted")
    assert request(service.port, "GET", "/ready")[0] == 200


@pytest.mark.slow
def test_hanging_supervisor_is_replaced(service):
    before = service.processes()[0]
    os.kill(before.pid, signal.SIGSTOP)
    wait_until(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active", "replaced", 90)
    assert "Watchdog timeout" in service.machine.journal()
    assert service.processes()[0].pid != before.pid


@pytest.mark.slow
def test_draining_may_exceed_systemd_default(service):
    """The supervisor asks for the time that its configuration says."""
    service.systemctl("stop")
    service.machine.run(
        "sh", "-c", "printf '[Service]\\nTimeoutStopSec=2s\\n' > /etc/systemd/system/fastdist.service.d/stop.conf"
    )
    service.machine.run("systemctl", "daemon-reload")
    try:
        service.systemctl("start")
        service.mocks.set_all(latency=4.0)
        assert Emitter(service.port).send(20).count(202) == 20
        service.systemctl("stop")
        assert service.show("Result") == "success"
        assert len(service.mocks.delivered()) == 20
    finally:
        service.machine.run("rm", "/etc/systemd/system/fastdist.service.d/stop.conf")
        service.machine.run("systemctl", "daemon-reload")


def new_connections(port, outcomes, enough):
    """Post packets, each on a connection of its own; note each status, or what went wrong."""
    while not enough.is_set():
        try:
            outcomes.append(request(port, "POST", "/logs", BODY)[0])
        except OSError as error:
            outcomes.append(repr(error))


@pytest.mark.slow
def test_systemd_holds_port_over_restarts(service):
    """With a packet that cannot be delivered, so that the old process takes its time."""
    service.systemctl("stop")
    port = service.port
    service.machine.run(
        "sh", "-c", "mkdir -p /etc/systemd/system/fastdist.socket.d; printf "
        f"'[Socket]\\nListenStream=\\nListenStream={port}\\n' > /etc/systemd/system/fastdist.socket.d/test.conf",
    )  # fmt: skip
    service.configure(drain_timeout="4s")
    service.mocks.set_all(status=503)
    enough = threading.Event()
    try:
        service.machine.run("systemctl", "daemon-reload")
        service.machine.run("systemctl", "start", "fastdist.socket")
        service.systemctl("start")
        before, outcomes = service.show("MainPID"), []
        client = threading.Thread(target=lambda: new_connections(port, outcomes, enough))
        client.start()
        wait_until(lambda: len(outcomes) > 100, "packets that cannot be delivered")
        service.systemctl("restart")
        there = len(outcomes)
        wait_until(lambda: len(outcomes) > there + 100, "packets for the new process")
        assert service.show("MainPID") != before
        assert service.show("NRestarts") == "0"
        service.mocks.set_all(**service.mocks.harmless)
        enough.set()
        client.join(60)
        assert set(outcomes) == {202}
        wait_until(lambda: len(service.mocks.delivered()) == len(outcomes), "all of them are delivered")
    finally:
        enough.set()
        service.machine.run("systemctl", "stop", "fastdist.socket", check=False)
        service.machine.run("rm", "-r", "/etc/systemd/system/fastdist.socket.d")
        service.machine.run("systemctl", "daemon-reload")
