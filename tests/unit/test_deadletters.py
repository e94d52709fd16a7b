"""Dead letters: what stands in them, how their files come and go, and what a disk that fails does to them."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import Packet
from fastdist.storage import dead_letter_bounds
from fastdist.storage import dead_letter_files as module
from fastdist.storage.dead_letter_files import IDLE_NS, MAX_OPEN_NS, DeadLetterFiles, ask_for
from fastdist.storage.dead_letter_format import FOLDER, as_line, find_files, iso_time, read_file

MOMENT = 1_700_000_000_123_456_000  # 2023-11-14, 22:13:20.123456 UTC


def packet(body=b"{}", name="p1", sequence=1, **more):
    fields = {"attempts": 3, "accepted_ns": MOMENT, "messages": 2, "emitter": 0, "flags": 0} | more
    return Packet(sequence, name, body, **fields)


def files_in(folder):
    return sorted((folder / FOLDER).iterdir())


def dead_letters_in(folder):
    return [json.loads(line) for file in files_in(folder) for line in file.read_bytes().splitlines()]


def write(dead_letters, body=b"{}", name="p1"):
    dead_letters.write(as_line(packet(body, name), "refused", "A2", 422, "HTTP 422"))


@pytest.fixture
def dead_letters(tmp_path):
    made = DeadLetterFiles(tmp_path, "w0-1")
    yield made
    made.close()


# ---- what stands in them


def test_a_dead_letter_tells_everything(dead_letters, tmp_path):
    before = datetime.now(UTC) - timedelta(microseconds=1)
    dead_letters.write(as_line(packet('{"a":"é\u2028"}'.encode(), "key~1"), "exhausted", "A2", 503, "HTTP 503"))
    (dead_letter,) = dead_letters_in(tmp_path)
    when = datetime.fromisoformat(dead_letter.pop("deadLetteredAt"))
    assert before <= when <= datetime.now(UTC)
    assert dead_letter == {
        "id": "key~1",
        "reason": "exhausted",
        "analyzer": "A2",
        "status": 503,
        "error": "HTTP 503",
        "attempts": 3,
        "messages": 2,
        "acceptedAt": "2023-11-14T22:13:20.123456Z",
        "body": '{"a":"é\u2028"}',
    }


def test_what_is_not_known_is_null(dead_letters, tmp_path):
    dead_letters.write(as_line(packet(), "shutdown", None, None, None))
    (dead_letter,) = dead_letters_in(tmp_path)
    assert (dead_letter["analyzer"], dead_letter["status"], dead_letter["error"]) == (None, None, None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"plain",
        b'"quotes" and \\ and \n and \0',
        "\U0001f600 \u2028 \x7f".encode(),
        b"\xff\xfe",
        b"half \xc3",
        b"\xed\xa0\x80",  # a surrogate
        b"\xc0\xaf",  # overlong
        bytes(range(256)),
        b"x" * 100_000,
    ],
)
def test_body_is_its_exact_text_or_base64(dead_letters, tmp_path, body):
    write(dead_letters, body)
    (line,) = files_in(tmp_path)[0].read_bytes().splitlines(keepends=True)
    assert line.endswith(b"\n")
    dead_letter = json.loads(line)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        assert "body" not in dead_letter
        assert base64.b64decode(dead_letter["bodyBase64"], validate=True) == body
    else:
        assert dead_letter["body"] == text
        assert "bodyBase64" not in dead_letter


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_packet_can_be_had_back(tmp_path_factory, body):
    folder = tmp_path_factory.mktemp("any")
    dead_letters = DeadLetterFiles(folder, "w0")
    write(dead_letters, body)
    dead_letters.close()
    (line,) = (line for found in find_files(folder) for line in read_file(found))
    assert line.dead_letter.packet == body
    assert (line.dead_letter.id, line.dead_letter.attempts, line.dead_letter.status) == ("p1", 3, 422)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (MOMENT, "2023-11-14T22:13:20.123456Z"),
        (10**18, "2001-09-09T01:46:40.000000Z"),
        (1_700_000_000_000_000_000, "2023-11-14T22:13:20.000000Z"),
    ],
)
def test_times_are_rfc_3339(ns, text):
    assert iso_time(ns) == text


# ---- their files


def test_dead_letters_share_the_owners_file(dead_letters, tmp_path):
    for number in range(50):
        write(dead_letters, name=f"p{number}")
    (file,) = files_in(tmp_path)
    assert file.name.endswith("-w0-1.ndjson")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == [f"p{number}" for number in range(50)]


def test_only_the_owner_can_read_them(tmp_path):
    old = os.umask(0)
    try:
        dead_letters = DeadLetterFiles(tmp_path / "new" / "data", "w0")
        write(dead_letters)
    finally:
        os.umask(old)
    (file,) = files_in(tmp_path / "new" / "data")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.parent.parent.stat().st_mode) == 0o700
    dead_letters.close()


def test_no_file_before_first_dead_letter(tmp_path):
    dead_letters = DeadLetterFiles(tmp_path / "data", "w0")
    dead_letters.tick(1)
    dead_letters.close()
    assert not (tmp_path / "data").exists()


def test_owners_do_not_share_files(tmp_path):
    owners = [DeadLetterFiles(tmp_path, f"w{number}") for number in range(3)]
    for number in range(30):
        write(owners[number % 3], name=f"p{number}")
    assert len(files_in(tmp_path)) == 3
    assert {dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)} == {f"p{number}" for number in range(30)}
    for owner in owners:
        owner.close()


def test_new_file_begins_when_one_has_grown(dead_letters, tmp_path, monkeypatch):
    monkeypatch.setattr(dead_letter_bounds, "MAX_FILE", 2000)
    for number in range(20):
        write(dead_letters, b"x" * 300, f"p{number}")
    files = files_in(tmp_path)
    assert len(files) == 7  # three to a file
    assert all(file.stat().st_size <= 2000 for file in files)
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == [f"p{number}" for number in range(20)]


def test_a_huge_dead_letter_has_its_own_file(dead_letters, tmp_path, monkeypatch):
    monkeypatch.setattr(dead_letter_bounds, "MAX_FILE", 2000)
    for size in (10, 5000, 10, 5000, 5000):
        write(dead_letters, b"x" * size)
    assert [len(dead_letter["body"]) for dead_letter in dead_letters_in(tmp_path)] == [10, 5000, 10, 5000, 5000]
    assert len(files_in(tmp_path)) == 5


def test_idle_file_of_dead_letters_closes(dead_letters, tmp_path):
    def open_files():
        links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())  # one is that of the listing
        return [link for link in links if link.resolve().is_relative_to(tmp_path)]

    write(dead_letters)
    dead_letters.settle()
    dead_letters.tick(10 * IDLE_NS)
    dead_letters.tick(10 * IDLE_NS + IDLE_NS // 2)
    assert len(open_files()) == 1
    write(dead_letters, name="p2")
    dead_letters.settle()
    dead_letters.tick(11 * IDLE_NS)  # it was written to since
    dead_letters.tick(11 * IDLE_NS + IDLE_NS // 2)
    assert len(open_files()) == 1
    dead_letters.tick(12 * IDLE_NS)
    assert open_files() == []
    write(dead_letters, name="p3")  # and is taken up again
    assert len(files_in(tmp_path)) == 1
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p2", "p3"]


@pytest.mark.parametrize("what", ["locked", "deleted", "replaced"])
def test_locked_or_replaced_file_is_left(dead_letters, tmp_path, what):
    write(dead_letters)
    dead_letters.settle()
    dead_letters.tick(1)
    dead_letters.tick(1 + IDLE_NS)
    (file,) = files_in(tmp_path)
    other = os.open(file, os.O_RDWR)
    if what == "locked":
        fcntl.flock(other, fcntl.LOCK_EX)
    else:
        file.unlink()
        if what == "replaced":
            file.write_bytes(b"")
    write(dead_letters, name="p2")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == (
        ["p1", "p2"] if what == "locked" else ["p2"]
    )
    os.close(other)


def test_a_file_in_use_is_locked(dead_letters, tmp_path):
    write(dead_letters)
    (file,) = files_in(tmp_path)
    with file.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_after_close_comes_another_file(dead_letters, tmp_path):
    write(dead_letters)
    dead_letters.close()
    dead_letters.close()
    write(dead_letters, name="p2")
    assert len(files_in(tmp_path)) == 2
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p2"]


def is_locked(file):
    with file.open("rb") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_file_is_given_up_on_request(dead_letters, tmp_path):
    """However steadily dead letters come; what comes then goes to another."""
    write(dead_letters)
    dead_letters.settle()
    dead_letters.tick(1)
    (file,) = files_in(tmp_path)
    with file.open("rb") as other:
        write(dead_letters, name="p2")
        dead_letters.tick(2)
        assert is_locked(file)
        ask_for(other.fileno())
        dead_letters.tick(3)
        assert is_locked(file), "not before it is settled"
        dead_letters.settle()
        assert not is_locked(file)
        write(dead_letters, name="p3")
        dead_letters.settle()
        dead_letters.tick(4)
    assert [len(each.read_bytes().splitlines()) for each in files_in(tmp_path)] == [2, 1]


def test_dead_requester_gets_no_file(dead_letters, tmp_path):
    write(dead_letters)
    dead_letters.settle()
    (file,) = files_in(tmp_path)
    with file.open("rb") as other:
        ask_for(other.fileno())
    dead_letters.tick(1)
    assert is_locked(file)


def test_file_is_written_for_max_a_minute(dead_letters, tmp_path):
    for now in range(1, MAX_OPEN_NS + 2, IDLE_NS // 2):
        write(dead_letters, name=f"p{now}")
        dead_letters.settle()
        dead_letters.tick(now)
    (file,) = files_in(tmp_path)
    assert not is_locked(file)
    write(dead_letters, name="last")
    assert len(files_in(tmp_path)) == 2


def test_unwritable_file_is_given_up(dead_letters, tmp_path, monkeypatch):
    """Purging it may be what makes room."""
    write(dead_letters)
    dead_letters.settle()
    (file,) = files_in(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(module.os, "write", broken)
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                write(dead_letters, name="lost")
            assert not is_locked(file)
    write(dead_letters, name="p2")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p2"]
    assert files_in(tmp_path) == [file]


def test_file_size_limit_starts_a_new_file(tmp_path):
    """Of the process (RLIMIT_FSIZE), which the kernel tells by a signal, too."""
    script = """
import resource, sys
from fastdist._core import Packet
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import as_line
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
dead_letters = DeadLetterFiles(sys.argv[1], "w0")
for number in range(20):
    dead_letters.write(as_line(Packet(1, f"p{number}", b"x" * 300, 1, 0, 1, 0, 0), "refused", "A1", 400, None))
    assert dead_letters.settle()
for _ in range(3):
    try:
        dead_letters.write(as_line(Packet(1, "large", b"x" * 3000, 1, 0, 1, 0, 0), "refused", "A1", 400, None))
    except OSError as error:
        print(error.strerror)
dead_letters.write(as_line(Packet(1, "small", b"x", 1, 0, 1, 0, 0), "refused", "A1", 400, None))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["File too large"] * 3 + [""]
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == [
        *(f"p{number}" for number in range(20)),
        "small",
    ]
    assert len(files_in(tmp_path)) == 5 + 1, "four to each; one for the large one, and then for the small one"


def test_close_error_closes_no_other_file(dead_letters, tmp_path, monkeypatch):
    """The number is free and may be another file's when it is closed once more."""
    real, closed = os.close, []

    def close(fd):
        closed.append(fd)
        real(fd)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    write(dead_letters)
    dead_letters.settle()
    dead_letters.tick(1)
    monkeypatch.setattr(module.os, "close", close)
    dead_letters.tick(1 + 2 * IDLE_NS)
    dead_letters.tick(1 + 4 * IDLE_NS)
    dead_letters.settle()
    monkeypatch.undo()
    assert len(closed) == 1
    write(dead_letters, name="p2")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p2"]


# ---- what becomes of what was written


@pytest.fixture
def calls(monkeypatch):
    """Return what is synced: ("data", size of the file) or ("folder", its name)."""
    calls = []
    monkeypatch.setattr(module.os, "fdatasync", lambda fd: calls.append(("data", os.fstat(fd).st_size)))
    for where in (module.__name__, "fastdist.storage.files"):
        monkeypatch.setattr(f"{where}.sync_folder", lambda folder: calls.append(("folder", folder.name)))
    return calls


def sizes_in(folder):
    return [path.stat().st_size for path in files_in(folder)]


def sync(dead_letters):
    """Sync what was written, as a worker does; say whether it is safe."""
    try:
        dead_letters.begin_sync()()
    except OSError as error:
        return dead_letters.settle(error)
    return dead_letters.settle()


def broken(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_sync_covers_names_and_dead_letters(dead_letters, tmp_path, calls):
    assert sync(dead_letters)
    assert calls == []
    for _ in range(3):
        write(dead_letters)
    (size,) = sizes_in(tmp_path)
    assert dead_letters.unsettled == size
    assert sync(dead_letters)
    assert calls == [("data", size), ("folder", FOLDER), ("folder", tmp_path.name)]
    assert dead_letters.unsettled == 0
    write(dead_letters)
    assert sync(dead_letters)
    assert sync(dead_letters)
    assert calls[3:] == [("data", *sizes_in(tmp_path))]


def test_folder_in_one_of_others_is_synced(dead_letters, calls, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "no", str(folder))

    monkeypatch.setattr("fastdist.storage.files.sync_folder", refuse)
    monkeypatch.setattr("fastdist.storage.files.os.sync", lambda: calls.append(("all", "")))
    write(dead_letters)
    assert sync(dead_letters)
    assert [name for name, _ in calls] == ["data", "folder", "all"]


def test_name_of_a_closed_file_is_synced(dead_letters, tmp_path, calls, monkeypatch):
    with monkeypatch.context() as disk:
        disk.setattr(module.os, "write", broken)
        with pytest.raises(OSError, match="Input/output"):
            write(dead_letters)
    write(dead_letters)
    assert sync(dead_letters)
    assert calls == [("data", *sizes_in(tmp_path)), ("folder", FOLDER), ("folder", tmp_path.name)]


def test_full_file_is_synced_as_well(dead_letters, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(dead_letter_bounds, "MAX_FILE", 1000)
    for _ in range(3):
        write(dead_letters, b"x" * 600)
    assert sync(dead_letters)
    assert [call for call in calls if call[0] == "data"] == [("data", size) for size in sizes_in(tmp_path)]
    assert len(calls) == 3 + 2


def test_file_is_closed_only_when_settled(dead_letters, tmp_path):
    write(dead_letters)
    (file,) = files_in(tmp_path)
    for now in range(1, 5):
        dead_letters.tick(now * IDLE_NS)
        assert is_locked(file)
    write(dead_letters, name="p2")
    for now in range(5, 9):
        dead_letters.tick(now * IDLE_NS)
        assert is_locked(file)
    work = dead_letters.begin_sync()
    work()
    assert is_locked(file)
    dead_letters.settle()
    assert not is_locked(file)
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p2"]
    assert files_in(tmp_path) == [file]


@pytest.mark.parametrize("files", [1, 3])
def test_unsynced_lines_are_taken_back(dead_letters, tmp_path, monkeypatch, files):
    write(dead_letters)
    assert sync(dead_letters)
    if files > 1:
        monkeypatch.setattr(dead_letter_bounds, "MAX_FILE", 1000)
    for number in range(3):
        write(dead_letters, b"x" * 600, name=f"lost{number}")
    assert len(files_in(tmp_path)) == (1 if files == 1 else 4)
    with monkeypatch.context() as disk:
        disk.setattr(module.os, "fdatasync", broken)
        assert not sync(dead_letters)
    assert dead_letters.unsettled == 0
    write(dead_letters, name="later")
    assert sync(dead_letters)
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "later"]


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced", "cut short", "with its folder"])
def test_writes_to_removed_file_are_not_safe(dead_letters, tmp_path, how):
    write(dead_letters)
    assert dead_letters.settle()
    (file,) = files_in(tmp_path)
    write(dead_letters, name="p2")
    whole = file.read_bytes()
    if how == "renamed":
        file.rename(file.with_suffix(".1"))
    elif how == "cut short":
        os.truncate(file, 0)
    elif how == "with its folder":
        file.parent.rename(tmp_path / "elsewhere")
    else:
        file.unlink()
        if how == "replaced":
            file.write_bytes(whole)
    assert not dead_letters.settle()
    write(dead_letters, name="p2")
    assert sync(dead_letters)
    assert dead_letters_in(tmp_path)[-1]["id"] == "p2"
    assert all(each.stat().st_size < len(whole) or each.read_bytes() == whole for each in files_in(tmp_path))


def test_renamed_folder_is_not_recreated(tmp_path):
    """It would be in the way of giving the folder its name back. One that was deleted is made, to lose no packet."""
    (queue := tmp_path / "data").mkdir()
    ring = os.open(queue / "ring-0.fdq", os.O_RDWR | os.O_CREAT)
    dead_letters = DeadLetterFiles(queue, "w0", ring)
    queue.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        write(dead_letters)
    assert not queue.exists()
    (tmp_path / "moved").rename(queue)
    write(dead_letters)
    assert dead_letters.settle()
    dead_letters.close()
    shutil.rmtree(queue)
    write(dead_letters, name="p2")
    assert dead_letters.settle()
    assert [dead_letter["id"] for dead_letter in dead_letters_in(queue)] == ["p2"]
    dead_letters.close()
    os.close(ring)


@pytest.mark.parametrize("call", ["write", "open", "mkdir"])
def test_failed_write_is_error_without_trace(tmp_path, monkeypatch, call):
    dead_letters = DeadLetterFiles(tmp_path, "w0")
    if call == "write":
        write(dead_letters)  # the first goes well

    def fail(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "mkdir":
        (tmp_path / FOLDER).write_bytes(b"in its place")
    else:
        monkeypatch.setattr(module.os, call, fail)
    for _ in range(5):
        with pytest.raises(OSError, match=r"No space|exists"):
            write(dead_letters, name="lost")
    monkeypatch.undo()
    if call == "mkdir":
        (tmp_path / FOLDER).unlink()
    write(dead_letters, name="later")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == (
        ["p1", "later"] if call == "write" else ["later"]
    )
    assert len(files_in(tmp_path)) == 1
    dead_letters.close()


@pytest.mark.parametrize("first", [0, 1, 50])
def test_half_a_line_is_taken_back(dead_letters, tmp_path, monkeypatch, first):
    write(dead_letters)
    whole = files_in(tmp_path)[0].read_bytes()
    real, sizes = os.write, [first]

    def write_some(fd, data):
        if sizes:
            return real(fd, data[: sizes.pop()])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(module.os, "write", write_some)
    with pytest.raises(OSError, match="full"):
        write(dead_letters, name="p2")
    assert files_in(tmp_path)[0].read_bytes() == whole
    monkeypatch.undo()
    write(dead_letters, name="p3")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p3"]


def test_short_writes_are_continued(dead_letters, tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: real(fd, data[:7]))
    write(dead_letters, b"x" * 1000)
    write(dead_letters, b"y" * 1000, "p2")
    assert [dead_letter["id"] for dead_letter in dead_letters_in(tmp_path)] == ["p1", "p2"]


def test_nothing_follows_unremoved_half_line(dead_letters, tmp_path, monkeypatch):
    write(dead_letters)
    real, sizes = os.write, [50]

    def write_some(fd, data):
        if sizes:
            return real(fd, data[: sizes.pop()])
        raise OSError(errno.EIO, "broken")

    def fail(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(module.os, "write", write_some)
    monkeypatch.setattr(module.os, "ftruncate", fail)
    with pytest.raises(OSError, match="broken"):
        write(dead_letters, name="p2")
    monkeypatch.undo()
    write(dead_letters, name="p3")
    first, second = files_in(tmp_path)
    assert len(first.read_bytes().splitlines()) == 2
    assert [json.loads(line)["id"] for line in second.read_bytes().splitlines()] == ["p3"]
    lines = [line for found in find_files(tmp_path) for line in read_file(found)]
    assert [line.dead_letter and line.dead_letter.id for line in lines] == ["p1", None, "p3"]
