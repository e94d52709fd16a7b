"""What operators do to replicas, as docs/cluster.md says it: dead letters replayed, a ring left for a stream."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from replicas import Replicas, compare, emitter
from support import Distributor, Emitter, Mocks, get_json, running, wait_until


@pytest.fixture(scope="module")
def lasting_mocks():
    mocks = Mocks()
    with running(mocks):
        yield mocks


@pytest.fixture
def mocks(lasting_mocks):
    lasting_mocks.start_anew()
    return lasting_mocks


@pytest.fixture
def replicas(tmp_path, mocks, one, name):
    made = Replicas(tmp_path, mocks, one.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


def command(*words):
    """Run fastdist to its end; return its status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "fastdist", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def listed(*where):
    status, shown = command("dead-letters", "list", *where, "--json")
    assert status == 0, shown
    return {json.loads(line)["id"] for line in shown.splitlines()}


def test_refused_here_is_replayed_there(replicas, mocks):
    """By the configuration alone, within the window in which the stream knows the packets' keys."""
    first = replicas.start()
    config = first.folder / "fastdist.toml"
    mocks.set_all(status=422)
    refused = emitter(first, prefix="r").send(60)
    wait_until(lambda: first.stats()["stream"]["deadLetters"] == 60, "dead letters")
    second = replicas.start()
    first.stop()
    assert listed("--config", config) == refused.accepted
    mocks.set_all(status=None)
    mocks.reset()
    assert command("dead-letters", "replay", "--config", config) == (0, "replayed 60, refused 0, left 0\n")
    replicas.wait_at_rest()
    compare([refused], mocks.delivered())
    assert second.stats()["packets"]["delivered"] == 60
    assert listed("--config", config) == set()


def test_refused_again_is_dead_again(replicas, mocks):
    replica = replicas.start()
    config = replica.folder / "fastdist.toml"
    mocks.set_all(status=422)
    refused = emitter(replica, prefix="r").send(20)
    wait_until(lambda: replica.stats()["stream"]["deadLetters"] == 20, "dead letters")
    assert command("dead-letters", "replay", "--config", config) == (0, "replayed 20, refused 0, left 0\n")
    wait_until(lambda: replica.stats()["packets"]["deadLettered"] == 40, "that they are refused again")
    assert listed("--config", config) == refused.accepted
    assert command("dead-letters", "purge", "--yes", "--config", config) == (0, "removed 20 dead letters\n")
    wait_until(lambda: replica.stats()["stream"]["deadLetters"] == 0, "that all are gone")


def test_a_ring_is_left_without_a_loss(replicas, mocks, tmp_path):
    """It has a backlog and dead letters, and both services deliver at the same time."""
    folder = tmp_path / "ring"
    folder.mkdir()
    data = folder / "data"
    ring = Distributor(folder, mocks, {"queue": {"durability": "disk"}})
    with running(ring):
        mocks.set_all(status=422)
        refused = Emitter(ring.port, prefix="refused").send(30)
        wait_until(lambda: len(ring.dead_letters()) == 30, "dead letters of the ring")
        mocks.set_all(status=None, refuse=True)
        ring.wait_for_states("offline")
        backlog = Emitter(ring.port, prefix="backlog").send(500)
        mocks.reset()
        replica = replicas.start()
        replica.wait_ready()
        new = emitter(replica, prefix="new").send(500)
        assert get_json(ring.port, "/queue")["packets"] == 500
        mocks.set_all(refuse=False)
        ring.wait_at_rest()
        assert ring.stop() == 0
    url = f"http://127.0.0.1:{replica.port}"
    status, shown = command("queue", "verify", data)
    assert (status, "0 packets to be delivered" in shown) == (0, True)
    assert listed(data) == refused.accepted
    assert command("dead-letters", "replay", data, "--url", url) == (0, "replayed 30, refused 0, left 0\n")
    assert listed(data) == set()
    replicas.wait_at_rest()
    compare([refused, backlog, new], mocks.delivered())
