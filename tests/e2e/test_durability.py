"""Durability disk: what was accepted outlives the death of every process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from support import WEIGHTS, Emitter, check_identity, compare, get_json, kill_worker, own_body, request, wait_until

DISK = {"queue": {"durability": "disk", "capacity": "32MiB"}}
FSYNC = {"queue": {"durability": "fsync", "capacity": "32MiB"}}


def kill_everything(fastdist):
    """kill -9 of supervisor and workers, as near to one moment as can be."""
    workers = [psutil.Process(pid) for pid in fastdist.worker_pids()]
    os.killpg(fastdist.process.pid, signal.SIGKILL)
    fastdist.wait()
    psutil.wait_procs(workers, timeout=10)


def descriptors(pid):
    """Return where a process's descriptors lead."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(descriptor.readlink()))
    return links


@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
def test_queued_is_delivered_after_restart(mocks, serve, settings):
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


def test_a_deleted_old_ring_takes_up_no_disk(mocks, serve):
    """No process has it open any more, nor does one that starts later get it."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK | {"server": {"drain_timeout": "0s"}})
    fastdist.wait_for_states("offline")
    Emitter(fastdist.port, connections=16).send(200)
    assert fastdist.stop() == 0
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, DISK | {"server": {"workers": 1}})

    def deleted_rings():
        links = [link for pid in (fastdist.process.pid, *fastdist.worker_pids()) for link in descriptors(pid)]
        return [link for link in links if link.endswith(".fdq (deleted)")]

    wait_until(lambda: "old ring migrated" in fastdist.output and not deleted_rings(), "old rings are closed")
    kill_worker(fastdist.worker_pids()[0])
    wait_until(lambda: fastdist.stats()["workers"][0]["restarts"] == 1, "a new worker")
    assert deleted_rings() == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
def test_three_kills_of_all_under_load(mocks, serve, settings):
    """With a backlog in the queue, requests on their way in and out, and new emitters after each restart."""
    emitters, fastdist = [], None
    max_duplicates = 0
    for round_number in range(3):
        mocks.set_all(latency=0.05)
        fastdist = serve(mocks, settings | {"delivery": {"connections": 8}})
        before = fastdist.stats()["packets"]["recovered"]
        emitter = Emitter(fastdist.port, connections=32, prefix=f"round{round_number}", pause=0).start().wait_for(1500)
        emitters.append(emitter)
        if round_number:
            assert before > 0, "nothing was left in the queue: this has tested little"
        os.killpg(fastdist.process.pid, signal.SIGKILL)
        fastdist.wait()
        emitter.stop()
        max_duplicates += 2 * 4 * 8 * 2  # in flight, and answered in that event-loop iteration
    mocks.set_all(latency=0)
    fastdist = serve(mocks, settings)
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["recovered"] == stats["packets"]["delivered"] > 0
    assert stats["packets"]["corrupt"] == 0
    everything = Emitter(0)
    for emitter in emitters:
        assert set(emitter.answers.values()) <= {202, None}
        everything.answers |= emitter.answers
    compare(everything, mocks, max_duplicates=max_duplicates)


def test_restart_figures_exact_under_load(mocks, serve):
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


def test_normal_end_leaves_the_rest_on_disk(mocks, serve):
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


def test_queued_is_logged_with_deleted_ring(mocks, serve):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK | {"server": {"drain_timeout": "500ms"}})
    fastdist.wait_for_states("offline")
    Emitter(fastdist.port, connections=32).send(500)
    (fastdist.folder / "data" / "ring-0.fdq").unlink()
    assert fastdist.stop() == 0
    told = json.loads(fastdist.line_with("packets stay queued"))
    assert told["packets"] == 500 - len(fastdist.dead_letters())
    assert 0 < told["packets"] < 500


def test_killed_worker_restarts_no_service(mocks, serve):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(500)
    victim = fastdist.worker_pids()[0]
    kill_worker(victim)
    wait_until(lambda: len({*fastdist.worker_pids()} - {victim}) == 2, "a successor")
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


def test_deleted_lock_admits_no_second(mocks, serve, run, tmp_path):
    fastdist = serve(mocks, DISK)
    emitter = Emitter(fastdist.port).send(100)
    lock, who = tmp_path / "data" / "lock", f"in use by a running fastdist (pid {fastdist.process.pid})"
    lock.unlink()
    second = run(os.sys.executable, "-m", "fastdist", "serve", "--config", tmp_path / "fastdist.toml", "--port", "0")
    assert second.wait() == 3
    assert who in second.output
    wait_until(lambda: "the queue's lock was deleted, and is there again" in fastdist.output, "it is there again")
    verify = run(os.sys.executable, "-m", "fastdist", "queue", "verify", tmp_path / "data")
    assert verify.wait() == 3
    assert who in verify.output
    kill_worker(fastdist.worker_pids()[0])  # its successor gets the new lock
    wait_until(
        lambda: "worker exited, restarting" in fastdist.output and len(set(fastdist.worker_pids())) == 2, "a successor"
    )
    fastdist.wait_at_rest()
    assert fastdist.stop() == 0
    compare(emitter, mocks)
    assert run(os.sys.executable, "-m", "fastdist", "queue", "verify", tmp_path / "data").wait() == 0


def test_start_waiting_for_a_reader_can_end(mocks, serve, run, tmp_path):
    fastdist = serve(mocks, DISK)
    assert fastdist.stop() == 0
    with (tmp_path / "data" / "ring-0.fdq").open() as ring:
        fcntl.flock(ring, fcntl.LOCK_SH)
        waits = run(os.sys.executable, "-m", "fastdist", "serve", "--config", tmp_path / "fastdist.toml")
        line = json.loads(waits.line_with("the queue is being read; the start waits"))
        assert f"(pid {os.getpid()})" in line["by"]
        waits.signal(signal.SIGTERM)
        assert waits.wait() == 0
        waits = run(os.sys.executable, "-m", "fastdist", "serve", "--config", tmp_path / "fastdist.toml")
        waits.line_with("the queue is being read; the start waits")
    waits.line_with("fastdist is ready")


def test_files_are_for_their_owner_only(mocks, serve):
    fastdist = serve(mocks, DISK)
    fastdist.post()
    folder = fastdist.folder / "data"
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) >= 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_killed_service_confirms_no_delivery(mocks, serve):
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
def test_deleted_queue_rejects_loses_none(mocks, serve, settings):
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


@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
@pytest.mark.parametrize("what", ["folder", "files"])
def test_renamed_queue_accepts_when_back(mocks, serve, settings, what):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, settings | {"server": {"drain_timeout": "500ms"}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(200)
    data = fastdist.folder / "data"
    names = [(data, data.with_name("moved"))]
    if what == "files":
        names = [(data / f"ring-{n}.fdq", data / f"moved-{n}") for n in range(2)]
    for times in (1, 2):
        for name, moved in names:
            name.rename(moved)
        if settings is FSYNC:
            assert {fastdist.post()[0] for _ in range(20)} == {503}, "a sync of what has no name is worth nothing"
        wait_until(lambda: get_json(fastdist.port, "/health")["storage"] == "failing", "/health tells")
        fastdist.wait_for_lines("the queue's file was renamed", 2 * times)
        before = emitter.count(503)
        emitter.send(50)
        assert emitter.count(503) == before + 50
        for name, moved in names:
            moved.rename(name)
        wait_until(lambda: get_json(fastdist.port, "/health")["storage"] == "ok", "it has its name again")
        fastdist.wait_for_lines("the queue's file has its name again", 2 * times)
        before = emitter.count(202)
        emitter.send(50)
        assert emitter.count(202) == before + 50
    for name, moved in names:
        name.rename(moved)
    fastdist.wait_for_lines("the queue's file was renamed", 6)
    assert fastdist.stop() == 0
    assert (
        str(names[0][1])
        in json.loads(fastdist.line_with("packets stay in queue files that were renamed"))["files"][
            str(data / "ring-0.fdq")
        ]
    )
    assert fastdist.dead_letters() == []
    for name, moved in names:
        moved.rename(name)
    mocks.set_all(refuse=False)
    serve(mocks, settings).wait_at_rest()
    compare(emitter, mocks)


def test_dead_letters_await_renamed_folder(mocks, serve):
    """In a new folder they would be in its way."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, DISK)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(100)
    data = fastdist.folder / "data"
    data.rename(moved := data.with_name("moved"))
    fastdist.wait_for_lines("the queue's file was renamed", 2)
    mocks.set_all(refuse=False, status=422)
    fastdist.line_with("cannot write dead letters")
    assert not data.exists()
    moved.rename(data)
    wait_until(lambda: len(fastdist.dead_letters()) == 100, "all are dead letters")
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted


@pytest.mark.parametrize("settings", [DISK, FSYNC], ids=["disk", "fsync"])
def test_deleted_linked_ring_loses_nothing(mocks, serve, settings):
    """It is not known where that link is: what is left goes to the dead letters."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, settings | {"server": {"drain_timeout": "500ms"}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(200)
    for ring in (fastdist.folder / "data").glob("*.fdq"):
        (fastdist.folder / f"link-{ring.name}").hardlink_to(ring)
        ring.unlink()
    fastdist.wait_for_lines("the queue's file was deleted", 2)
    emitter.send(50)
    assert (emitter.count(202), emitter.count(503)) == (200, 50)
    assert fastdist.stop() == 0
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted


def test_deleted_old_ring_loses_nothing(mocks, serve):
    """While its packets are migrated: nothing more is accepted then, and what is left goes to the dead letters."""
    mocks.set_all(refuse=True)
    one = {"server": {"workers": 1, "drain_timeout": "500ms"}}
    fastdist = serve(mocks, one | {"queue": {"durability": "disk", "capacity": "8MiB"}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(
        fastdist.port, body=json.dumps({"emitterId": "e", "messages": [{"message": "x" * 20_000}]}).encode()
    )
    emitter.send(200)
    assert emitter.count(202) == 200
    assert fastdist.stop() == 0
    smaller = one | {"queue": {"durability": "disk", "capacity": "2MiB"}}
    fastdist = serve(mocks, smaller)
    fastdist.wait_for_states("offline")
    (old,) = (fastdist.folder / "data").glob("adopt-*.fdq")
    old.unlink()
    fastdist.line_with("an old ring was deleted or renamed")
    wait_until(lambda: fastdist.post()[0] == 503, "nothing more is accepted")
    assert get_json(fastdist.port, "/health")["storage"] == "failing"
    assert fastdist.stop() == 0
    dead_letters = {row["id"] for row in fastdist.dead_letters()}
    assert 50 < len(dead_letters) < 200
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, smaller)
    fastdist.wait_at_rest()
    assert dead_letters | mocks.delivered().keys() == emitter.accepted
    assert len(dead_letters & mocks.delivered().keys()) <= 4 * 32
