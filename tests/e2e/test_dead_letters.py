"""Dead letters from the refusal to the second delivery; and a look at the queue of a service that has ended."""

from __future__ import annotations

import json
import signal
import socket
import sys

import pytest
from support import BODY, WEIGHTS, Emitter, own_body, wait_until

FASTDIST = [sys.executable, "-m", "fastdist"]
REFUSING = {"status": 422}
WELL = {"status": None}


@pytest.fixture
def command(run):
    """Return ``command(*words)``: run fastdist to its end; return its exit status and what it printed."""

    def command(*words, **environment):
        process = run(*FASTDIST, *words, **environment)
        return process.wait(), process.output

    return command


def listed(command, folder):
    status, output = command("dead-letters", "list", folder / "data", "--json")
    assert status == 0
    return [json.loads(line) for line in output.splitlines()]


def replay_to(fastdist, *options):
    return "dead-letters", "replay", fastdist.folder / "data", "--url", f"http://127.0.0.1:{fastdist.port}", *options


def refuse(fastdist, mocks, count, prefix="p"):
    """Have packets refused, until all of them are dead letters; return their ids."""
    mocks.set_all(**REFUSING)
    emitter = Emitter(fastdist.port, prefix=prefix).send(count)
    wait_until(lambda: len(fastdist.dead_letters()) >= count, "dead letters")
    mocks.set_all(**WELL)
    return emitter.accepted


def test_refused_is_listed_and_replayed(mocks, serve, command, tmp_path):
    """Also while it runs: its workers let go of a file when it has been idle."""
    fastdist = serve(mocks)
    names = refuse(fastdist, mocks, 100)
    dead_letters = listed(command, tmp_path)
    assert {dead_letter["id"] for dead_letter in dead_letters} == names
    assert {(dead_letter["reason"], dead_letter["status"], dead_letter["bytes"]) for dead_letter in dead_letters} == {
        ("refused", 422, len(BODY))
    }
    assert {dead_letter["messages"] for dead_letter in dead_letters} == {2}
    wait_until(lambda: command(*replay_to(fastdist))[0] == 0, "all are replayed")
    fastdist.wait_at_rest()
    assert mocks.delivered() == dict.fromkeys(names, 1)
    assert command("dead-letters", "list", tmp_path / "data") == (0, "no dead letters")


def test_bodies_come_through_byte_for_byte(start, serve, command):
    from support import Mocks  # noqa: PLC0415  (with an option of its own)

    mocks = start(Mocks, ("A1",), "--verify")
    fastdist = serve(mocks, {"server": {"validation": "none"}}, weights={"A1": 1.0})
    bodies = {f"p-{i}": own_body(f"web-{i}") for i in range(20)} | {"zero": b'{"a":"\\u0000\xc3\xbc"}'}
    for name, body in bodies.items():
        assert fastdist.post(body, Idempotency_Key=f"direct-{name}")[0] == 202
    fastdist.wait_at_rest()
    mocks.set_all(**REFUSING)
    for name, body in bodies.items():
        assert fastdist.post(body, Idempotency_Key=f"again-{name}")[0] == 202
    wait_until(lambda: len(fastdist.dead_letters()) == len(bodies), "dead letters")
    mocks.set_all(**WELL)
    wait_until(lambda: command(*replay_to(fastdist))[0] == 0, "all are replayed")
    fastdist.wait_at_rest()
    digests = mocks.digests()
    for name in bodies:
        assert digests[f"again-{name}"] == digests[f"direct-{name}"]


def test_a_replay_sends_nothing_in_circles(mocks, serve, command, tmp_path):
    fastdist = serve(mocks)
    names = refuse(fastdist, mocks, 20)
    mocks.set_all(**REFUSING)
    wait_until(lambda: command(*replay_to(fastdist))[1].endswith("left 0"), "all are replayed")
    fastdist.wait_at_rest()
    assert {dead_letter["id"] for dead_letter in listed(command, tmp_path)} == names
    assert fastdist.stats()["packets"]["accepted"] == 40


def test_next_service_gets_undelivered(mocks, serve, command, tmp_path):
    fastdist = serve(mocks, {"server": {"drain_timeout": "0s"}})
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(200)
    assert fastdist.stop() == 0
    assert {dead_letter["reason"] for dead_letter in listed(command, tmp_path)} == {"shutdown"}
    mocks.set_all(refuse=False)
    fastdist = serve(mocks)
    status, output = command(*replay_to(fastdist))
    assert (status, output) == (0, "replayed 200, refused 0, left 0")
    fastdist.wait_at_rest()
    assert mocks.delivered() == dict.fromkeys(emitter.accepted, 1)


@pytest.mark.slow
def test_killed_replay_repeats_in_flight(mocks, serve, run, command, tmp_path):
    fastdist = serve(mocks)
    names = refuse(fastdist, mocks, 3000)
    fastdist.stop()
    fastdist = serve(mocks)
    for kills in range(1, 4):
        replay = run(*FASTDIST, *replay_to(fastdist))
        wait_until(lambda so_far=kills * 500: fastdist.stats()["packets"]["accepted"] >= so_far, "some are replayed")
        replay.signal(signal.SIGKILL)
        replay.wait()
        fastdist.wait_at_rest()
        kept = {dead_letter["id"] for dead_letter in listed(command, tmp_path)}
        assert names - kept <= mocks.delivered().keys()
    status, output = command(*replay_to(fastdist))
    assert status == 0, output
    fastdist.wait_at_rest()
    delivered = mocks.delivered()
    assert delivered.keys() == names
    assert sum(delivered.values()) <= len(names) + 3 * 4
    assert list((tmp_path / "data" / "dead-letters").iterdir()) == []


@pytest.mark.slow
def test_distributor_ending_costs_nothing(mocks, serve, run, command, tmp_path):
    fastdist = serve(mocks, {"queue": {"durability": "disk"}})
    names = refuse(fastdist, mocks, 3000)
    fastdist.stop()
    fastdist = serve(mocks, {"queue": {"durability": "disk"}})
    replay = run(*FASTDIST, *replay_to(fastdist))
    wait_until(lambda: fastdist.stats()["packets"]["accepted"] >= 300, "some are replayed")
    fastdist.kill_all()
    assert replay.wait() == 1
    assert "cannot be reached" in replay.output
    fastdist = serve(mocks, {"queue": {"durability": "disk"}})
    status, output = command(*replay_to(fastdist))
    assert status == 0, output
    fastdist.wait_at_rest()
    assert mocks.delivered().keys() == names
    assert listed(command, tmp_path) == []


def test_limits_of_the_distributor_are_kept(mocks, serve, command):
    fastdist = serve(mocks)
    names = refuse(fastdist, mocks, 90)
    fastdist.stop()
    fastdist = serve(mocks, {"limits": {"rate": 30, "burst": 10}})
    status, output = command(*replay_to(fastdist))
    assert status == 0, output
    assert "replayed 90, refused 0, left 0" in output
    assert "trying again" in output
    assert fastdist.stats()["rejected"]["rateLimited"] > 0
    fastdist.wait_at_rest()
    assert mocks.delivered() == dict.fromkeys(names, 1)


def test_a_distributor_that_wants_a_token(mocks, serve, command):
    fastdist = serve(mocks)
    refuse(fastdist, mocks, 10)
    fastdist.stop()
    fastdist = serve(mocks, {"security": {"tokens": ["secret"]}})
    status, output = command(*replay_to(fastdist))
    assert status == 1
    assert "answers 401" in output
    assert "give one with --token" in output
    assert output.endswith("replayed 0, refused 0, left 10")
    assert command(*replay_to(fastdist), FASTDIST_TOKEN="secret") == (0, "replayed 10, refused 0, left 0")


def test_distributors_refusal_shows_reason(mocks, serve, command, tmp_path):
    fastdist = serve(mocks, {"server": {"validation": "none"}})
    mocks.set_all(**REFUSING)
    fastdist.post(b'{"emitterId":"e","messages":[]}', Idempotency_Key="empty")
    fastdist.post(BODY, Idempotency_Key="good")
    wait_until(lambda: len(fastdist.dead_letters()) == 2, "dead letters")
    mocks.set_all(**WELL)
    fastdist.stop()
    fastdist = serve(mocks)
    status, output = command(*replay_to(fastdist))
    assert status == 1
    assert "refused empty: 400 (" in output
    assert output.endswith("replayed 1, refused 1, left 1")
    assert [dead_letter["id"] for dead_letter in listed(command, tmp_path)] == ["empty"]
    assert command("dead-letters", "purge", tmp_path / "data", "--yes") == (0, "removed 1 dead letter")
    assert command("dead-letters", "list", tmp_path / "data") == (0, "no dead letters")


def test_where_nothing_listens(mocks, serve, command):
    fastdist = serve(mocks)
    refuse(fastdist, mocks, 10)
    fastdist.stop()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        status, output = command(*replay_to(fastdist, "--url", url))
    assert status == 1
    assert output.splitlines() == [
        "the distributor cannot be reached: Connection refused; trying again",
        f"stopped: {url} cannot be reached: Connection refused; given up, try again later",
        "replayed 0, refused 0, left 10",
    ]


def test_purge_and_replay_while_more_arrive(mocks, serve, command, tmp_path):
    """A worker that is writing to a file gives it up when it is asked for it."""
    fastdist = serve(mocks, {"server": {"workers": 1}})
    for name in WEIGHTS:
        mocks.set(name, **REFUSING)
    emitter = Emitter(fastdist.port, connections=4, pause=0.05).start()
    wait_until(lambda: len(fastdist.dead_letters()) >= 5, "dead letters")
    for verb in (("purge", tmp_path / "data", "--yes"), replay_to(fastdist)[1:]):
        before = {dead_letter["id"] for dead_letter in fastdist.dead_letters()}
        status, output = command("dead-letters", *verb)
        assert "skipped" not in output
        assert status == 0 or verb[0] == "replay", output  # some are refused again
        wait_until(lambda: len(fastdist.dead_letters()) >= 5, "more")
        if verb[0] == "purge":
            assert before.isdisjoint(dead_letter["id"] for dead_letter in fastdist.dead_letters())
    emitter.stop()


# ---- the queue


def test_queue_command_after_a_kill(mocks, serve, command, tmp_path):
    disk = {"queue": {"durability": "disk", "capacity": "16MiB"}}
    fastdist = serve(mocks, disk)
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(200)
    for verb in ("verify", "show"):
        status, output = command("queue", verb, tmp_path / "data")
        assert status == 3
        assert f"in use by a running fastdist (pid {fastdist.process.pid})" in output
    fastdist.kill_all()
    files = {path: path.read_bytes() for path in (tmp_path / "data").glob("*.fdq")}
    status, output = command("queue", "verify", tmp_path / "data")
    assert status == 0, output
    assert output.splitlines()[-1] == "sound: 2 files, 200 packets to be delivered"
    status, output = command("queue", "show", tmp_path / "data", "--limit", "1000", "--json")
    assert status == 0
    assert {packet["id"] for packet in json.loads(output)["packets"]} == emitter.accepted
    assert {path: path.read_bytes() for path in files} == files
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, disk)
    fastdist.wait_at_rest()
    assert mocks.delivered() == dict.fromkeys(emitter.accepted, 1)


def test_queue_damage_after_a_kill(mocks, serve, command, tmp_path):
    disk = {"queue": {"durability": "disk", "capacity": "16MiB"}, "server": {"workers": 1}}
    fastdist = serve(mocks, disk)
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port, connections=1).send(20)
    fastdist.kill_all()
    (path,) = (tmp_path / "data").glob("*.fdq")
    at = path.read_bytes().index(b"p-7")
    with path.open("r+b") as file:
        file.seek(at + 10)
        file.write(b"\xee" * 50)
    status, output = command("queue", "verify", tmp_path / "data")
    assert status == 1
    assert "checksum of packet p-7" in output
    assert output.endswith("1 corrupt record, 19 packets intact and to be delivered")
    mocks.set_all(refuse=False)
    fastdist = serve(mocks, disk)
    fastdist.wait_at_rest()
    assert mocks.delivered() == dict.fromkeys(emitter.accepted - {"p-7"}, 1)


def test_no_queue_on_disk(command, tmp_path):
    assert command("queue", "verify", tmp_path) == (2, f"fastdist: no queue in {tmp_path}")
