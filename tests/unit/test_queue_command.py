"""``fastdist queue verify|show``: what they say of queues sound, damaged, in use and missing, and change nothing."""

from __future__ import annotations

import fcntl
import json
import os
import time

import pytest
from typer.testing import CliRunner

from fastdist._core import HEADER_SIZE, PacketRing, file_size
from fastdist.cli import main

CAPACITY = 65536
SECOND_HEADER = 32768


def make(path, bodies=(), **options):
    """Make a ring's file with a packet for each body, the first of which are the oldest; return the ring."""
    with path.open("w+b") as file:
        os.ftruncate(file.fileno(), file_size(CAPACITY))
        ring = PacketRing(file.fileno(), CAPACITY)
        for i, body in enumerate(bodies):
            # Not now, so that no age is rounded up.
            assert ring.push(body, f"{path.stem}-{i}", accepted_ns=time.time_ns() - (3600 - i) * 10**9, **options)
    return ring


def spoil(path, offset, content=b"\xee" * 8):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def image(folder):
    """Return all there is to a folder's files, times of change included."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) for path in folder.iterdir()}


@pytest.fixture
def run():
    """Run a command on a queue and see to it that nothing is changed."""

    def run(*arguments, folder=None):
        before = image(folder) if folder else None
        result = CliRunner().invoke(main.app, ["queue", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert (image(folder) if folder else None) == before
        return result

    return run


@pytest.fixture
def queue(tmp_path):
    """Two files: three packets in one, none in the other."""
    make(tmp_path / "ring-0.fdq", [b"one", b"two", b"three"])
    make(tmp_path / "ring-1.fdq")
    (tmp_path / "lock").write_text("4711")
    return tmp_path


def test_sound_queue_is_verified(run, queue):
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 0
    first, second, summary = result.stdout.splitlines()
    assert first.startswith("ring-0.fdq: sound: 3 packets, ")
    assert first.endswith(" of 64.0 KiB")
    assert second == "ring-1.fdq: sound: 0 packets, 0 B of 64.0 KiB"
    assert summary == "sound: 2 files, 3 packets to be delivered"
    assert result.stderr == ""


def test_a_corrupt_record(run, queue):
    path = queue / "ring-0.fdq"
    at = path.read_bytes().index(b"two")
    spoil(path, at, b"TWO")
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ring-0.fdq: DAMAGED: 1 corrupt record; intact: 2 packets, ")
    offset, what = lines[1].removeprefix("  at byte ").split(": ", 1)
    assert HEADER_SIZE < int(offset) < at
    assert what == "checksum of packet ring-0-1"
    assert lines[-1] == "DAMAGED: 1 of 2 files, 1 corrupt record, 2 packets intact and to be delivered"


def test_one_of_two_headers(run, queue):
    spoil(queue / "ring-0.fdq", 0)
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 1
    assert "  at byte 0: header copy" in result.stdout
    assert "0 corrupt records, 3 packets intact" in result.stdout


@pytest.mark.parametrize("copy", [0, SECOND_HEADER])
def test_one_torn_position_copy_is_no_damage(run, queue, copy):
    spoil(queue / "ring-0.fdq", copy + 80)
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("ring-0.fdq: sound: 3 packets, ")
    assert f"  note: at byte {copy}: positions in a header copy, half written by a process" in result.stdout
    shown = json.loads(run("show", queue, "--json", folder=queue).stdout)
    assert shown["files"][0]["notes"] == [{"offset": copy, "what": "positions in a header copy"}]


def test_both_position_copies_lost_is_damage(run, queue):
    for copy in (0, SECOND_HEADER):
        spoil(queue / "ring-0.fdq", copy + 80)
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 1
    assert "  at byte 0: positions in a header copy" in result.stdout


@pytest.mark.parametrize("content", [b"", b"x" * 10, bytes(file_size(CAPACITY))])
def test_a_file_that_is_no_ring_at_all(run, queue, content):
    (queue / "ring-1.fdq").write_bytes(content)
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 1
    assert "ring-1.fdq: DAMAGED: " in result.stdout
    assert "1 of 2 files" in result.stdout
    result = run("show", queue, folder=queue)
    assert result.exit_code == 1
    assert "ring-0-0" in result.stdout


def test_both_headers_gone(run, queue):
    for at in (0, SECOND_HEADER):
        spoil(queue / "ring-0.fdq", at)
    result = run("verify", queue / "ring-0.fdq", folder=queue)
    assert result.exit_code == 1
    assert "no intact ring header" in result.stdout


def test_a_lot_of_damage_is_summed_up(run, tmp_path):
    path = tmp_path / "ring-0.fdq"
    make(path, [b"body-%03d" % i for i in range(100)])
    content = path.read_bytes()
    for i in range(0, 100, 2):
        spoil(path, content.index(b"body-%03d" % i), b"X")
    lines = run("verify", path).stdout.splitlines()
    assert lines[0].startswith("ring-0.fdq: DAMAGED: 50 corrupt records; intact: 50 packets")
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2] == "  and 30 more"


def test_one_file_of_a_queue(run, queue):
    result = run("verify", queue / "ring-1.fdq", folder=queue)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "sound: 1 file, 0 packets to be delivered")


def test_files_that_were_set_aside_are_named(run, queue):
    (queue / "ring-9.fdq.damaged-ab12cd34").write_bytes(b"?")
    result = run("verify", queue, folder=queue)
    assert result.exit_code == 0
    assert "ring-9.fdq.damaged-ab12cd34: set aside" in result.stdout
    result = run("verify", queue / "ring-9.fdq.damaged-ab12cd34", folder=queue)
    assert result.exit_code == 1


@pytest.mark.parametrize("command", ["verify", "show"])
def test_where_there_is_no_queue(run, tmp_path, command):
    (tmp_path / "fastdist.toml").write_text("")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, tmp_path / "empty", tmp_path / "nowhere", tmp_path / "fastdist.toml", tmp_path / "r.fdq"):
        result = run(command, path, folder=tmp_path / "empty")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr == f"fastdist: no queue in {path}\n"
    (tmp_path / "ring-0.fdq.damaged-00").write_bytes(b"")
    assert "set aside: ring-0.fdq.damaged-00" in run(command, tmp_path).stderr


@pytest.mark.parametrize("command", ["verify", "show"])
def test_queue_in_use_is_refused(run, queue, command):
    with (queue / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (queue, queue / "ring-0.fdq"):
            result = run(command, path, folder=queue)
            assert result.exit_code == 3
            assert result.stdout == ""
            assert f"the queue in {queue} is in use by a running fastdist (pid 4711)" in result.stderr
    assert run(command, queue, folder=queue).exit_code == 0


@pytest.mark.parametrize("lock", ["is free", "was deleted"])
def test_ring_in_use_means_queue_in_use(run, queue, lock):
    if lock == "was deleted":
        (queue / "lock").unlink()
    with (queue / "ring-1.fdq").open("r+") as ring:
        fcntl.flock(ring, fcntl.LOCK_EX)
        result = run("verify", queue, folder=queue)
        assert (result.exit_code, result.stdout) == (3, "")
        assert f"the queue in {queue} is in use by a running fastdist (pid " in result.stderr
    assert run("verify", queue, folder=queue).exit_code == 0


def test_two_may_look_at_once(run, queue):
    with (queue / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with (queue / "ring-0.fdq").open() as ring:
            fcntl.flock(ring, fcntl.LOCK_SH)
            assert run("verify", queue, folder=queue).exit_code == 0


def test_a_queue_that_never_was_locked(run, queue):
    (queue / "lock").unlink()
    assert run("verify", queue, folder=queue).exit_code == 0


def test_a_queue_that_may_only_be_read(run, queue):
    for path in queue.iterdir():
        path.chmod(0o400)
    assert run("verify", queue, folder=queue).exit_code == 0
    assert run("show", queue, folder=queue).exit_code == 0


def test_show_lists_what_waits(run, queue):
    result = run("show", queue, folder=queue)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["ID", "ACCEPTED", "AGE", "ATTEMPTS", "MESSAGES", "SIZE", "FILE"]
    name, accepted, age, unit, attempts, messages, size, _, file = lines[1].split()
    assert (name, attempts, messages, size, file) == ("ring-0-0", "0", "1", "3", "ring-0.fdq")
    assert accepted.endswith("Z")
    assert (age, unit) == ("1", "h")
    assert [line.split()[0] for line in lines[2:4]] == ["ring-0-1", "ring-0-2"]
    table = [line.split() for line in lines[4:] if line]
    assert table[0][0] == "FILE"
    assert [row[:2] for row in table[1:]] == [["ring-0.fdq", "3"], ["ring-1.fdq", "0"]]


def test_show_takes_the_oldest_of_all_files(run, tmp_path):
    make(tmp_path / "ring-0.fdq", [b"x"] * 30, attempts=2)
    make(tmp_path / "ring-1.fdq", [b"x"] * 30, messages=7)
    result = run("show", tmp_path, "--limit", "4", "--json")
    view = json.loads(result.stdout)
    assert sorted(packet["id"] for packet in view["packets"]) == ["ring-0-0", "ring-0-1", "ring-1-0", "ring-1-1"]
    assert {(packet["attempts"], packet["messages"]) for packet in view["packets"]} == {(2, 1), (0, 7)}
    assert view["total"] == 60
    assert "… and 56 more" in run("show", tmp_path, "--limit", "4").stdout
    assert len(json.loads(run("show", tmp_path, "--json").stdout)["packets"]) == 20
    assert json.loads(run("show", tmp_path, "--limit", "0", "--json").stdout)["packets"] == []


def test_show_as_json(run, queue):
    spoil(queue / "ring-0.fdq", 0)
    (queue / "ring-1.fdq").write_bytes(b"")
    result = run("show", queue, "--json", folder=queue)
    view = json.loads(result.stdout)
    assert result.exit_code == 1
    packet = view["packets"][0]
    assert packet["acceptedAt"].endswith("Z")
    assert 3000 < packet.pop("ageSeconds") < 4000
    packet.pop("acceptedAt")
    assert packet == {"file": "ring-0.fdq", "id": "ring-0-0", "attempts": 0, "messages": 1, "bytes": 3}
    first, second = view["files"]
    assert (first["packets"], first["capacityBytes"], first["corrupt"], first["error"]) == (3, CAPACITY, 0, None)
    assert first["damage"] == [{"offset": 0, "what": "header copy"}]
    assert second["error"]


def test_show_leaves_out_what_was_delivered(run, tmp_path):
    make(tmp_path / "ring-0.fdq", [b"a", b"b", b"c"])
    with (tmp_path / "ring-0.fdq").open("r+b") as file:
        ring = PacketRing(file.fileno())
        ring.claim()
        ring.done(ring.claim())
    view = json.loads(run("show", tmp_path, "--json").stdout)
    assert [packet["id"] for packet in view["packets"]] == ["ring-0-0", "ring-0-2"]


def test_show_of_an_empty_queue(run, tmp_path):
    make(tmp_path / "ring-0.fdq")
    result = run("show", tmp_path)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["FILE", "ring-0.fdq"]
