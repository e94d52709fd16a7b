"""Durability disk: what was accepted outlives the death of every process."""

from __future__ import annotations

import json
import os
import shutil
import signal

import psutil
import pytest
from support import WEIGHTS, Emitter, check_identity, compare, get_json, own_body, request, wait_until

DISK = {"queue": {"durability": "disk", "capacity": "32MiB"}}
FSYNC = {"queue": {"durability": "fsync", "capacity": "32MiB"}}


def kill_everything(fastdist):
    """kill -9 of supervisor and workers, as near to one moment as can be."""
    workers = [psutil.Process(pid) for pid in fastdist.worker_pids()]
    os.killpg(fastdist.process.pid, signal.SIGKILL)
    fastdist.wait()
    psutil.wait_procs(workers, timeout=10)


@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
def test_what_is_queued_is_delivered_after_a_restart(mocks, serve, settings):
    mocks.set_all(refuse=True, verify=True)
    fastdist = serve(mocks, settings)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port, body=own_body).send(2000)
    assert emitter.count(202) == 2000
    kill_everything(fastdist)
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, settings)
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["recovered"] == stats["packets"]["delivered"] == 2000
    assert stats["packets"]["accepted"] == stats["packets"]["corrupt"] == 0
    compare(emitter, mocks)
    assert all(mocks.totals(name)["broken"] == 0 for name in WEIGHTS)
    assert len(mocks.digests()) == 2000


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
def test_kill_9_of_everything_under_load_three_times(mocks, serve, settings):
    """With a backlog in the queue, requests on their way in and out, and new emitters after each restart."""
    emitters, fastdist = [], None
    most_duplicates = 0
    for round_number in range(3):
        mocks.set_all(latency=0.01)
        fastdist = serve(mocks, settings | {"delivery": {"connections": 8}})
        before = fastdist.stats()["packets"]["recovered"]
        emitter = Emitter(fastdist.port, connections=32, prefix=f"round{round_number}", pause=0).start().wait_for(1500)
        emitters.append(emitter)
        if round_number:
            assert before > 0, "nothing was left in the queue: this has tested little"
        os.killpg(fastdist.process.pid, signal.SIGKILL)
        fastdist.wait()
        emitter.stop()
        most_duplicates += 2 * 4 * 8 * 2  # in flight, and answered by analyzers but not yet read
    mocks.set_all(latency=0)
    fastdist = serve(mocks, settings)
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["recovered"] == stats["packets"]["delivered"] > 0
    assert stats["packets"]["corrupt"] == 0
    everything = Emitter(0)
    for emitter in emitters:
        assert set(emitter.answers.values()) <= {202, None}
        everything.answers |= emitter.answers
    compare(everything, mocks, most_duplicates=most_duplicates)


def test_figures_of_a_restart_are_exact_while_new_packets_come(mocks, serve):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK)
    fastdist.wait_for_states("offline")
    old = Emitter(fastdist.port, prefix="old").send(700)
    kill_everything(fastdist)
    fastdist = serve(mocks, DISK)
    new = Emitter(fastdist.port, prefix="new").send(300)

    def all_there():
        packets = fastdist.stats()["packets"]
        return packets if packets["queued"] + packets["inFlight"] == 1000 else None

    packets = wait_until(all_there, "1000 packets wait")
    assert (packets["accepted"], packets["recovered"], packets["delivered"]) == (300, 700, 0)
    mocks.set_all(refuse=False)
    check_identity(fastdist.wait_at_rest())
    delivered = mocks.delivered()
    assert delivered == dict.fromkeys(old.accepted | new.accepted, 1)


def test_a_normal_end_leaves_the_rest_on_disk(mocks, serve):
    """No dead letters: the queue is kept, and the next start goes on with it."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK | {"server": {"drain_timeout": "500ms"}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(500)
    assert fastdist.stop() == 0
    assert fastdist.dead_letters() == []
    told = json.loads(fastdist.line_with("packets stay queued"))
    assert (told["packets"], told["path"]) == (500, str(fastdist.folder / "data"))
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, DISK)
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["recovered"] == stats["packets"]["delivered"] == 500
    compare(emitter, mocks)


def test_a_killed_worker_is_no_restart_of_the_whole(mocks, serve):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(500)
    victim = fastdist.worker_pids()[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in fastdist.worker_pids(), "a successor")
    mocks.set_all(refuse=False)
    stats = fastdist.wait_at_rest()
    assert (stats["packets"]["recovered"], stats["packets"]["accepted"]) == (0, 500)
    compare(emitter, mocks)


def test_two_services_cannot_share_a_queue(mocks, serve, run, tmp_path):
    fastdist = serve(mocks, DISK)
    second = run(os.sys.executable, "-m", "fastdist", "serve", "--config", tmp_path / "fastdist.toml", "--port", "0")
    assert second.wait() == 3
    assert f"in use by a running fastdist (pid {fastdist.process.pid})" in second.output
    assert "Traceback" not in second.output
    assert fastdist.post()[0] == 202


def test_files_are_for_their_owner_only(mocks, serve):
    fastdist = serve(mocks, DISK)
    fastdist.post()
    folder = fastdist.folder / "data"
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) >= 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_awaited_packets_of_a_service_that_is_killed_are_not_answered_as_delivered(mocks, serve):
    """The emitter's connection breaks; the packet is delivered after the restart."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, FSYNC)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port, connections=8, headers="Prefer: wait=60\r\n").start()
    wait_until(lambda: fastdist.stats()["packets"]["queued"] == 8, "all wait")
    kill_everything(fastdist)
    emitter.stop()
    assert not emitter.accepted
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, FSYNC)
    assert fastdist.wait_at_rest()["packets"]["delivered"] == 8
    assert len(mocks.delivered()) == 8
    status, _, body = fastdist.post(Prefer="wait=20")
    assert (status, json.loads(body)["status"]) == (200, "delivered")


@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
def test_a_queue_that_is_deleted_takes_nothing_more_and_loses_nothing(mocks, serve, settings):
    """What is in a deleted file would be gone at the end: what cannot be delivered until then goes to a new file."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, settings | {"server": {"drain_timeout": "500ms"}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(200)
    shutil.rmtree(fastdist.folder / "data")
    wait_until(lambda: fastdist.output.count("the queue's file was deleted") == 2, "both workers have noticed")
    wait_until(lambda: get_json(fastdist.port, "/health")["storage"] == "failing", "/health tells")
    emitter.send(50)
    assert emitter.count(202) == 200
    assert emitter.count(503) == 50
    wait_until(lambda: request(fastdist.port, "GET", "/ready")[0] == 503, "/ready tells")
    assert fastdist.stop() == 0
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, settings)
    assert fastdist.post()[0] == 202
    assert get_json(fastdist.port, "/health")["storage"] == "ok"
