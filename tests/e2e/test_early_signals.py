"""Signals that come while a start has hardly begun, also to process 1, and descriptors that are closed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from support import get_json, wait_until

SERVE = (sys.executable, "-m", "fastdist", "serve", "--config")
AS_PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
SIGNAL_AT_IMPORT = """
import os, sys

class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}" and "{command}" in sys.orig_argv:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Signals())
"""
FIRST = "fastdist.cli.main"  # what is imported first of all that takes time
LAST = "fastdist.supervisor.main"


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "fastdist.toml"
    file.write_text(
        f'[server]\nhost = "127.0.0.1"\nport = 0\nworkers = 2\n'
        f'[queue]\ndurability = "disk"\ncapacity = "8MiB"\npath = "{tmp_path}/data"\n'
    )
    return file


@pytest.fixture
def at_import(tmp_path):
    """Return an environment in which a process gets a signal as it imports a module."""

    def at_import(number, module, command="serve"):
        text = SIGNAL_AT_IMPORT.format(number=int(number), module=module, command=command)
        (tmp_path / "sitecustomize.py").write_text(text)
        return {"PYTHONPATH": str(tmp_path)}

    return at_import


def need_namespaces():
    if shutil.which("unshare") is None or subprocess.run([*AS_PROCESS_1, "true"], check=False).returncode:
        pytest.skip("process namespaces are for root, and for unshare(1)")


def port_of(fastdist):
    return int(json.loads(fastdist.line_with("fastdist is ready"))["url"].rsplit(":", 1)[1])


@pytest.mark.parametrize("module", [FIRST, LAST])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_ends_a_start_just_begun(run, config, at_import, number, module):
    fastdist = run(*SERVE, config, **at_import(number, module))
    assert (fastdist.wait(), fastdist.output) == (0, "")


@pytest.mark.parametrize("module", [FIRST, LAST])
def test_process_1_takes_sigterm_from_start(run, config, at_import, module):
    need_namespaces()
    fastdist = run(*AS_PROCESS_1, *SERVE, config, **at_import(signal.SIGTERM, module))
    assert (fastdist.wait(), fastdist.output) == (0, "")


@pytest.mark.parametrize("module", [FIRST, LAST])
def test_hangup_in_start_reloads_after_it(run, config, at_import, module):
    fastdist = run(*SERVE, config, **at_import(signal.SIGHUP, module))
    port = port_of(fastdist)
    fastdist.line_with("configuration reloaded")
    assert get_json(port, "/health")["workers"] == {"running": 2, "configured": 2}


def test_signal_ends_start_waiting_for_queue(run, config, tmp_path):
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # a reader of the queue, which is waited for
        fastdist = run(*SERVE, config)

        def waits():
            files = Path(f"/proc/{fastdist.process.pid}/fd").iterdir()
            return any(file.exists() and file.samefile(lock.name) for file in files)

        wait_until(waits, "it wants the lock")
        fastdist.signal(signal.SIGTERM)
        assert fastdist.wait() == 0
    assert "in use" not in fastdist.output


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["HUP", "INT"])
def test_starting_worker_survives_signal(run, config, at_import, number):
    fastdist = run(*SERVE, config, **at_import(number, "asyncio", "fastdist.worker.main"))
    port_of(fastdist)
    assert "worker exited, restarting" not in fastdist.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
def test_other_commands_end_by_a_signal(run, config, at_import, number):
    check = run(*SERVE[:3], "check", config, **at_import(number, FIRST, "check"))
    assert check.wait() in {-number, 128 + number}


# ---- process 1


def test_process_1_reaps_orphaned_children(run, config):
    need_namespaces()
    fastdist = run(*AS_PROCESS_1, *SERVE, config)
    port = port_of(fastdist)
    (first,) = psutil.Process(fastdist.process.pid).children()
    workers = {child.pid for child in first.children()}
    leave = "for i in $(seq 20); do (sleep 0.05 & echo $!); done; sleep 0.01"
    enter = ["nsenter", "--target", str(first.pid), "--pid", "--mount", "sh", "-c", leave]
    subprocess.run(enter, check=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: {child.pid for child in first.children()} == workers, "only workers are left")
    victim = min(workers)
    os.kill(victim, signal.SIGKILL)  # its end is still the supervisor's to see
    fastdist.line_with("worker exited, restarting")
    wait_until(lambda: get_json(port, "/health")["workers"]["running"] == 2, "a successor runs")


# ---- descriptors


@pytest.mark.parametrize("closed", ["0", "2", "0 1 2"])
def test_serves_with_standard_streams_closed(run, config, closed):
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    redirections = " ".join(f"{number}<&-" for number in closed.split())
    fastdist = run("sh", "-c", f'exec "$@" {redirections}', "sh", *SERVE, config, "--port", port)

    def serves():
        assert fastdist.process.poll() is None
        try:
            return get_json(port, "/health")["workers"]["running"] == 2
        except OSError:
            return False

    wait_until(serves, "it serves")
    for number in closed.split():
        assert Path(f"/proc/{fastdist.process.pid}/fd/{number}").readlink() == Path(os.devnull)
    fastdist.signal(signal.SIGTERM)
    assert fastdist.wait() == 0


@pytest.mark.parametrize("closed", ["1", "0 1 2"])
def test_commands_run_with_streams_closed(run, config, closed):
    redirections = " ".join(f"{number}<&-" for number in closed.split())
    assert run("sh", "-c", f'exec "$@" {redirections}', "sh", *SERVE[:3], "check", config).wait() == 0
