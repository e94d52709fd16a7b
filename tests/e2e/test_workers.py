"""Workers that die, hang or never start, and a supervisor that is gone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time

import psutil
import pytest
from support import BODY, Emitter, check_identity, compare, get_json, kill_worker, wait_until

POST = b"POST /logs HTTP/1.1\r\nHost: test\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n" + BODY
CANNOT_IMPORT = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name == "fastdist.worker.dispatch" and "fastdist.worker.main" in sys.orig_argv:
            raise ImportError("no dispatching today")

sys.meta_path.insert(0, Refuses())
"""
SLOW_DISK = """
import os, sys, time

if "fastdist.worker.main" in sys.orig_argv:
    sync, slow = os.fdatasync, [True]

    def fdatasync(fd):
        if slow:
            slow.clear()  # the first sync of a worker is that of what it finds
            time.sleep(28)
        sync(fd)

    os.fdatasync = fdatasync
elif "serve" in sys.orig_argv:
    from fastdist.supervisor import processes

    processes.START = 12.0  # which a start on a busy machine is far from
"""


def running_workers(fastdist):
    return [row for row in fastdist.stats()["workers"] if row["state"] == "running"]


def wait_for_successor(fastdist, pid, workers=2):
    def replaced():
        rows = running_workers(fastdist)
        return len(rows) == workers and pid not in {row["pid"] for row in rows}

    wait_until(replaced, f"a successor of {pid} runs")


def test_ready_worker_has_its_figures(mocks, serve):
    fastdist = serve(mocks)
    assert all(row["rssBytes"] > 2**20 for row in fastdist.stats()["workers"])
    (pid, _) = fastdist.worker_pids()
    kill_worker(pid)
    wait_for_successor(fastdist, pid)
    assert all(row["rssBytes"] > 2**20 for row in running_workers(fastdist))


@pytest.mark.slow
@pytest.mark.parametrize("delivery", [{}, {"mode": "batch"}, {"pipeline": 8}], ids=["single", "batch", "pipelined"])
def test_killed_workers_lose_nothing(mocks, serve, delivery):
    """kill -9 in the midst of everything: with a backlog, and with none."""
    fastdist = serve(mocks, {"delivery": {"connections": 8} | delivery})
    emitter = Emitter(fastdist.port, connections=32, pause=0).start().wait_for(1000)
    rng = random.Random(4)
    for kills in range(1, 5):
        slow = 0 if kills % 2 else 0.01
        mocks.set_all(latency=slow)
        emitter.wait_for(500)
        victim = rng.choice(fastdist.worker_pids())
        kill_worker(victim)
        wait_for_successor(fastdist, victim)
        assert sum(row["restarts"] for row in fastdist.stats()["workers"]) == kills
    emitter.stop()
    mocks.set_all(latency=0)
    assert {*emitter.answers.values()} <= {202, None}
    assert len(emitter.unknown) <= 4 * 32, "more connections broke than a killed worker had"
    stats = fastdist.wait_at_rest()
    in_flight = 4 * 8 * delivery.get("pipeline", 1) * (64 if "mode" in delivery else 1)
    compare(emitter, mocks, max_duplicates=4 * in_flight)
    assert len(emitter.accepted) <= stats["packets"]["accepted"] <= len(emitter.accepted) + len(emitter.unknown)
    assert stats["packets"]["delivered"] == stats["packets"]["accepted"]
    assert stats["packets"]["recovered"] == 0, "that is for restarts of the whole"
    assert stats["messages"]["delivered"] == stats["messages"]["accepted"] == 2 * stats["packets"]["accepted"]


def test_figures_survive_their_worker(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1}})
    Emitter(fastdist.port).send(1000)
    assert fastdist.post(b"{}")[0] == 400
    before = fastdist.wait_at_rest()
    victim = fastdist.worker_pids()[0]
    kill_worker(victim)
    wait_for_successor(fastdist, victim, workers=1)
    after = fastdist.stats()
    for part in ("packets", "messages", "bytes", "rejected", "latencyMs"):
        assert after[part] == before[part]
    assert [row["delivered"] for row in after["analyzers"]] == [row["delivered"] for row in before["analyzers"]]
    check_identity(after)
    assert get_json(fastdist.port, "/health")["status"] == "ok"


def test_successor_delivers_queued_packets(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1}})
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(1000)
    victim = fastdist.worker_pids()[0]
    kill_worker(victim)
    wait_for_successor(fastdist, victim, workers=1)
    packets = wait_until(lambda: p if (p := fastdist.stats()["packets"])["queued"] == 1000 else None, "all are there")
    assert packets["accepted"] == 1000
    assert packets["recovered"] == packets["inFlight"] == packets["delivered"] == 0
    mocks.set_all(refuse=False)
    fastdist.wait_at_rest()
    compare(emitter, mocks)


def test_successor_serves_queued_connections(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1}})
    victim = fastdist.worker_pids()[0]
    os.kill(victim, signal.SIGSTOP)  # it accepts nothing: all wait in the socket's queue
    connections = []
    for number in range(50):
        connection = socket.create_connection(("127.0.0.1", fastdist.port), timeout=20)
        connection.sendall(POST % (b"queued-%d" % number, len(BODY)))
        connections.append(connection)
    kill_worker(victim)
    for connection in connections:
        with connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 202 ")
    fastdist.wait_at_rest()
    assert mocks.delivered() == {f"queued-{number}": 1 for number in range(50)}


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(mocks, serve):
    fastdist = serve(mocks)
    victim, other = fastdist.worker_pids()
    emitter = Emitter(fastdist.port, connections=16).start().wait_for(200)
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    fastdist.line_with("worker hung, sending SIGKILL", 40)
    assert time.monotonic() - stopped > 5, "that is no hang yet"
    emitter.wait_for(200)
    wait_for_successor(fastdist, victim)
    emitter.stop()
    assert other in fastdist.worker_pids()
    assert len(emitter.unknown) <= 16
    stats = fastdist.wait_at_rest()
    assert sorted(row["restarts"] for row in stats["workers"]) == [0, 1]
    assert [row["lastError"] for row in stats["workers"] if row["restarts"]] == ["it hung and was killed"]
    compare(emitter, mocks, max_duplicates=4 * 32)


def test_workers_end_with_killed_supervisor(mocks, serve):
    fastdist = serve(mocks)
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(200)
    workers = [psutil.Process(pid) for pid in fastdist.worker_pids()]
    assert fastdist.stats()["supervisor"]["pid"] == fastdist.process.pid
    fastdist.signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive
    dead_letters = fastdist.dead_letters()  # durability memory: the queue ends with its workers
    assert {row["id"] for row in dead_letters} == emitter.accepted
    assert {row["reason"] for row in dead_letters} == {"shutdown"}


def test_unstartable_workers_end_service(mocks, run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(CANNOT_IMPORT)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(tmp_path), *([inherited] if inherited else [])])
    config = tmp_path / "fastdist.toml"
    config.write_text(
        f'[server]\nport = 0\nworkers = 2\n[queue]\npath = "{tmp_path}/data"\ndurability = "memory"\n'
        + "".join(
            f'[[analyzers]]\nid = "{name}"\nendpoint = "{url}"\nweight = 1\n' for name, url in mocks.endpoints.items()
        )
    )
    fastdist = run(os.sys.executable, "-m", "fastdist", "serve", "--config", config, PYTHONPATH=path)
    assert fastdist.wait() == 3
    assert "no dispatching today" in fastdist.output
    assert "workers cannot start" in fastdist.output
    assert "fastdist is ready" not in fastdist.output


@pytest.mark.slow
def test_worker_on_slow_disk_is_not_hung(mocks, serve, tmp_path):
    """The time to get ready begins again when what was found in the queue is on the disk."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(tmp_path), *([inherited] if inherited else [])])
    fastdist = serve(mocks, {"queue": {"durability": "disk"}}, PYTHONPATH=path)
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0, 0]
    assert "the disk takes long" in fastdist.output
    assert fastdist.post()[0] == 202


def test_dying_worker_restarts_with_back_off(mocks, serve):
    """It got ready each time: that is no reason to give up."""
    fastdist = serve(mocks, {"server": {"workers": 1}})
    for _ in range(4):
        victim = fastdist.worker_pids()[0]
        kill_worker(victim)
        wait_for_successor(fastdist, victim, workers=1)
    delays = [json.loads(line)["delay"] for line in fastdist.lines if "worker exited, restarting" in line]
    assert len(delays) == 4
    assert delays == sorted(delays)
    assert 0.1 <= delays[-1] <= 5
    assert delays[-1] > delays[0]
    assert Emitter(fastdist.port).send(100).count(202) == 100
