"""What writer and readers of a file of dead letters keep to when they meet; and what is read there."""

from __future__ import annotations

import fcntl
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from dead_letters import SECOND, WHOLE, Listener, broken, fill, idle, ids, names_in, packet, replayed
from fakes import problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdist.client.held_file import HeldFile
from fastdist.storage import dead_letter_files as module
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import DeadLetter, as_line, find_files, read_file


@pytest.fixture
def run(distributor):
    """Replay a folder to the distributor."""
    return partial(replayed, distributor, Listener())


# ---- a file and those who want it


def test_file_is_its_workers_until_idle(tmp_path):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet(), "refused", "A1", 400, None))
    (found,) = find_files(tmp_path)
    assert dead_letters.settle()
    dead_letters.tick(5 * SECOND)
    dead_letters.tick(int(5.9 * SECOND))
    with pytest.raises(BlockingIOError):
        HeldFile.hold(found.path, 0.05)
    dead_letters.tick(6 * SECOND)
    held = HeldFile.hold(found.path, 0)
    assert [line.dead_letter.id for line in held.lines()] == ["p-1"]


def test_dead_letter_restarts_idle_time(tmp_path):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    for second in (5, 6, 7):
        dead_letters.write(as_line(packet(), "refused", "A1", 400, None))
        dead_letters.settle()
        dead_letters.tick(second * SECOND)
    (found,) = find_files(tmp_path)
    with pytest.raises(BlockingIOError):
        HeldFile.hold(found.path, 0)
    dead_letters.tick(8 * SECOND)
    HeldFile.hold(found.path, 0)


def test_rare_dead_letters_share_a_file(tmp_path):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    for name in "abc":
        dead_letters.write(as_line(packet(name), "refused", "A1", 400, None))
        idle(dead_letters)
    assert len(find_files(tmp_path)) == 1
    assert ids(tmp_path) == ["a", "b", "c"]


def test_worker_reopens_only_an_unowned_file(tmp_path):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
    idle(dead_letters)
    (first,) = find_files(tmp_path)
    with HeldFile.hold(first.path, 0):
        dead_letters.write(as_line(packet("b"), "refused", "A1", 400, None))
    idle(dead_letters)
    second = find_files(tmp_path)[1]
    assert ids(first.path) == ["a"]
    second.path.unlink()
    dead_letters.write(as_line(packet("c"), "refused", "A1", 400, None))
    assert ids(tmp_path) == ["a", "c"]


def test_worker_appends_to_a_rewritten_file(tmp_path, distributor, run):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
    dead_letters.write(as_line(packet("b"), "refused", "A1", 400, None))
    idle(dead_letters)
    distributor.script["b"] = [problem(400, "no")]
    run(tmp_path)
    dead_letters.write(as_line(packet("c"), "refused", "A1", 400, None))
    assert ids(tmp_path) == ["b", "c"]
    assert len(find_files(tmp_path)) == 1


def test_lock_holder_checks_file_is_the_same(tmp_path):
    path = fill(tmp_path, "ab")
    with HeldFile.hold(path, 0) as held:
        taken = []
        thread = threading.Thread(target=lambda: taken.append(HeldFile.hold(path, 10)))
        thread.start()
        time.sleep(0.1)
        held.rewrite({next(held.lines()).offset})
    thread.join()
    assert [line.dead_letter.id for line in taken[0].lines()] == ["b"]


def test_lock_of_a_deleted_file_is_not_taken(tmp_path):
    path = fill(tmp_path, "a")
    with HeldFile.hold(path, 0) as held:
        taken = []
        thread = threading.Thread(target=lambda: taken.append(HeldFile.hold(path, 10)))
        thread.start()
        held.rewrite({0})
    thread.join()
    assert taken == [None]


def test_new_file_is_locked_before_visible(tmp_path, monkeypatch):
    seen = []
    flock = fcntl.flock

    def look(fd, how):
        seen.append(find_files(tmp_path))
        flock(fd, how)

    monkeypatch.setattr(module.fcntl, "flock", look)
    DeadLetterFiles(tmp_path, "w0-1").write(as_line(packet(), "refused", "A1", 400, None))
    assert seen == [[]]


def sync(dead_letters):
    """Sync what was written, as a worker does; say whether it is safe."""
    try:
        dead_letters.begin_sync()()
    except OSError as error:
        return dead_letters.settle(error)
    return dead_letters.settle()


def test_nothing_follows_a_failed_sync(tmp_path, monkeypatch):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
    assert sync(dead_letters)
    dead_letters.write(as_line(packet("b"), "refused", "A1", 400, None))
    with monkeypatch.context() as disk:
        disk.setattr(module.os, "fdatasync", broken)
        disk.setattr(module.os, "ftruncate", broken)
        assert not sync(dead_letters)
    dead_letters.write(as_line(packet("b"), "refused", "A1", 400, None))
    assert sync(dead_letters)
    first, second = find_files(tmp_path)
    assert ids(first.path) == ["a", "b"]
    assert ids(second.path) == ["b"], "better twice than never"


def test_files_never_synced_do_not_pile_up(tmp_path, monkeypatch):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    with monkeypatch.context() as disk:
        disk.setattr(module.os, "fsync", broken)
        for _ in range(3):
            dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
            assert not sync(dead_letters)
    assert len(names_in(tmp_path / "dead-letters")) == 1
    assert ids(tmp_path) == []
    dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
    assert sync(dead_letters)
    assert ids(tmp_path) == ["a"]


def test_files_and_folders_are_owner_only(tmp_path, distributor, run):
    path = fill(tmp_path / "queue", "ab")
    distributor.script["b"] = [problem(400, "no")]
    run(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent.stat().st_mode & 0o777 == 0o700


# ---- reading


def test_dead_letter_is_read_as_written(tmp_path):
    fill(tmp_path, ["key~1"], body='{"ü":"\\u0000\u2028"} \n'.encode())
    (line,) = (line for found in find_files(tmp_path) for line in read_file(found))
    dead_letter = line.dead_letter
    assert (dead_letter.id, dead_letter.reason, dead_letter.analyzer, dead_letter.status, dead_letter.error) == (
        "key~1",
        "refused",
        "A1",
        422,
        "no",
    )
    assert (dead_letter.attempts, dead_letter.messages) == (3, 2)
    assert abs(dead_letter.accepted_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert abs(dead_letter.dead_lettered_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert dead_letter.packet == '{"ü":"\\u0000\u2028"} \n'.encode()
    assert line.size == len(dead_letter.packet)


@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    max_examples=settings().max_examples // 2,
    deadline=None,
)
@given(body=st.binary(max_size=200))
def test_every_body_comes_back_byte_for_byte(tmp_path, body):
    path = fill(tmp_path, "a", body=body)
    (line,) = read_file(find_files(path)[0])
    assert line.dead_letter.packet == body
    path.unlink()


def test_paths_of_queue_dead_letters_file(tmp_path):
    path = fill(tmp_path, "a")
    for name in (tmp_path, path.parent, path):
        assert [found.path for found in find_files(name)] == [path]
    (tmp_path / "empty").mkdir()
    assert find_files(tmp_path / "empty") == []
    with pytest.raises(FileNotFoundError):
        find_files(tmp_path / "nowhere")
    (tmp_path / "other.toml").touch()
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        find_files(tmp_path / "other.toml")


@pytest.mark.parametrize(
    "line",
    [
        WHOLE[:-7],
        b"\xff\x00\n",
        b"[]\n",
        b"{}\n",
        WHOLE.replace(b'"x"', b'"a b"') + b"\n",
        WHOLE.replace(b'"x"', b'"a\\n"') + b"\n",
        WHOLE.replace(b'"x"', b'""') + b"\n",
        WHOLE.replace(b'"x"', b'"' + b"x" * 65 + b'"') + b"\n",
        WHOLE.replace(b'"b"', b"null") + b"\n",
        WHOLE.replace(b'"body":"b"', b'"bodyBase64":"?"') + b"\n",
        WHOLE.replace(b"05Z", b"05") + b"\n",
    ],
)
def test_a_foreign_line_is_only_unreadable(tmp_path, line):
    path = fill(tmp_path, "a")
    with path.open("ab") as file:
        file.write(line)
    assert ids(path) == ["a", None]
    assert [line.reason for line in read_file(find_files(path)[0])] == ["refused", "unreadable"]


def test_missing_line_feed_loses_nothing(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_bytes(b"\n  \n" + WHOLE)
    assert ids(path) == ["x"]


def test_ids_may_be_all_that_a_key_may_be(tmp_path):
    key = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '",;\\')
    names = [key[:64], key[64:]]
    fill(tmp_path, names)
    assert ids(tmp_path) == names


def test_dead_letter_needs_exactly_one_body():
    now = datetime.now(UTC)
    with pytest.raises(ValueError, match="one body"):
        DeadLetter(id="a", reason="r", accepted_at=now, dead_lettered_at=now)
    with pytest.raises(ValueError, match="one body"):
        DeadLetter(id="a", reason="r", accepted_at=now, dead_lettered_at=now, body="", body_base64=b"")
