"""``make run-cluster``: what it writes can be used, and what it says to try is tried."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from nats_servers import BINARY
from support import ROOT, Process, free_port, wait_until

SCRIPT = ROOT / "scripts" / "run_cluster.py"
SPEC = importlib.util.spec_from_file_location("run_cluster", SCRIPT)
run_cluster = sys.modules["run_cluster"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_cluster)
SYSTEM = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
HAPROXY, NGINX = (shutil.which(name, path=SYSTEM) for name in ("haproxy", "nginx"))
PACKETS = 3000


@pytest.fixture
def numbers():
    """Return free ports, as the option takes them."""
    return ",".join(str(free_port()) for _ in range(17))


@pytest.fixture
def ports(numbers):
    return run_cluster._ports(numbers)


def accepted(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Have clusters make their folders where no other does, and return what says which there are."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return lambda: set(tmp_path.glob("fastdist-cluster-*"))


@pytest.mark.parametrize("number", [0, 1])
def test_replicas_configuration_can_be_used(tmp_path, ports, number):
    file = tmp_path / "fastdist.toml"
    file.write_text(run_cluster.replica_config(tmp_path, ports, number))
    done = subprocess.run(
        [sys.executable, "-m", "fastdist", "check", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 analyzers: A1 10 %, A2 40 %, A3 20 %, A4 30 %" in done.stdout


def test_other_configurations_can_be_used(tmp_path, ports):
    file = tmp_path / "config"
    for number in range(3):
        file.write_text(run_cluster.nats_config(tmp_path, ports, number))
        accepted(str(BINARY), "-t", "-c", str(file))
    if HAPROXY:
        file.write_text(run_cluster.haproxy_config(ports))
        accepted(HAPROXY, "-c", "-f", str(file))
    if NGINX:
        file.write_text(run_cluster.nginx_config(tmp_path, ports))
        accepted(NGINX, "-t", "-p", str(tmp_path), "-c", str(file))


def test_haproxy_leads_to_the_replicas(ports):
    text = run_cluster.haproxy_config(ports)
    assert re.findall(r"^    server \S+ (\S+)", text, re.MULTILINE) == [f"127.0.0.1:{port}" for port in ports.replicas]
    assert f"bind 127.0.0.1:{ports.balancer}\n" in text


def read(url):
    with urllib.request.urlopen(url, timeout=5) as reply:
        return reply.read()


def test_nats_servers_run_and_end(tmp_path, ports):
    cluster = run_cluster.Cluster(tmp_path, ports)
    try:
        cluster.start_nats()
        for monitor in ports.monitors:
            wait_until(lambda url=f"http://127.0.0.1:{monitor}/jsz": b'"cluster_size": 3' in read(url), "three of them")
    finally:
        cluster.end()
    assert [child.process.returncode for child in cluster.children] == [0, 0, 0]


def test_a_port_in_use_is_said_and_all_ends(numbers, ports, folders):
    with socket.create_server(("127.0.0.1", ports.nats[2])):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--ports", numbers], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("run_cluster: nats-3 has ended; the end of its log:\n")
    assert "address already in use" in done.stderr
    assert folders() == set()


def test_count_without_analyzers_is_an_error(numbers):
    command = [sys.executable, str(SCRIPT), "--count", "--ports", numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("run_cluster: no answer of the mock analyzers at port ")


def test_replica_dies_and_nothing_is_lost(numbers, folders):
    cluster = Process([sys.executable, str(SCRIPT), "--ports", numbers])
    try:
        cluster.line_with("Ctrl-C ends everything", 120)
        url = re.search(r"--url (\S+)", cluster.output)[1]
        kill, folder = re.search(r"kill -9 -- (-\d+) && rm -r (\S+)", cluster.output).groups()
        lines = "".join(f"{number}\n" for number in range(PACKETS))
        command = [sys.executable, "-m", "fastdist", "send", "-", "--batch", "1", "--url", url]
        sender = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        sender.stdin.write(lines[: len(lines) // 2])
        sender.stdin.flush()

        def delivered():
            count = [sys.executable, str(SCRIPT), "--count", "--ports", numbers]
            said = subprocess.run(count, capture_output=True, text=True, check=True).stdout
            return int(re.match(r"([\d,]+) packets were delivered, ", said)[1].replace(",", ""))

        wait_until(delivered, "the first packets", 60)
        os.killpg(-int(kill), signal.SIGKILL)
        shutil.rmtree(folder)
        shown, _ = sender.communicate(lines[len(lines) // 2 :], timeout=300)
        assert sender.returncode == 0, shown
        wait_until(lambda: delivered() == PACKETS, "all packets", 60, delivered)
        assert "replica-1 has ended (status -9)" in cluster.output
        cluster.signal(signal.SIGINT)
        assert cluster.wait(90) == 0
        assert folders() == set()
    finally:
        cluster.kill_all()
