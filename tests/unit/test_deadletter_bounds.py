"""The bounds of dead letters: what is discarded, what never is, and that all of it is counted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
from dead_letters import fill, idle, ids, names_in, packet
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdist.client.held_file import HeldFile
from fastdist.settings import DeadLetters as Settings
from fastdist.storage import dead_letter_bounds as module
from fastdist.storage.dead_letter_bounds import Bounds, discard
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import FOLDER, MAX_FILE, as_line, find_files, folder_of, journal_of

KIB = 1024


@pytest.fixture(autouse=True)
def time_for_all(monkeypatch):
    """However slow the machine: what fits in a worker's time is not what is tested here."""
    monkeypatch.setattr(module, "PART_NS", 3600 * 10**9)


class Writers:
    """Some workers that write to one folder, with a bound over all of them."""

    def __init__(self, folder, max_bytes, writers=1, **more):
        self.folder = folder / FOLDER
        self.discarded = 0
        self.settings = Settings(max_bytes=max_bytes, **more)
        self.all = [self._writer(folder, f"w{number}-1", writers) for number in range(writers)]
        self.written = []  # ids

    def _writer(self, folder, owner, writers):
        bounds = Bounds(folder / FOLDER, self.settings, writers, self._discard)
        return DeadLetterFiles(folder, owner, bounds=bounds)

    def _discard(self, dead_letters):
        self.discarded += dead_letters

    def write(self, size=100, writer=0, *, settle=True):
        name = f"p{len(self.written)}"
        self.all[writer].write(as_line(packet(name, b"x" * size), "refused", "A1", 422, "HTTP 422", b"no"))
        self.written.append(name)
        if settle:
            assert self.all[writer].settle()

    @property
    def size(self):
        return sum(path.stat().st_size for path in self.folder.glob("*.ndjson"))

    @property
    def there(self):
        return ids(self.folder)

    def check(self):
        there = self.there
        assert len(set(there)) == len(there)
        assert len(there) + self.discarded == len(self.written)

    def close(self):
        for each in self.all:
            each.close()


def held(path):
    """Lock a file as a replay does."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


# ---- max_bytes

WRITES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 50, 300, 2000]), st.sampled_from(["settle", "later", "idle"])),
    min_size=1,
    max_size=150,
)


@settings(max_examples=settings().max_examples // 2)
@given(WRITES, st.sampled_from([8 * KIB, 24 * KIB, 100 * KIB]))
def test_the_bound_holds_at_every_moment(tmp_path_factory, writes, max_bytes):
    writers = Writers(tmp_path_factory.mktemp("data"), max_bytes, 3)
    for writer, size, after in writes:
        writers.write(size, writer, settle=False)
        if after != "later" or writers.all[writer].wants_sync:
            assert writers.all[writer].settle()
        if after == "idle":
            idle(writers.all[writer])
        assert writers.size <= max_bytes + 2600, "and one dead letter"
    writers.check()
    writers.close()


def test_the_oldest_go_first(tmp_path):
    writers = Writers(tmp_path, 16 * KIB)
    for _ in range(300):
        writers.write()
    assert writers.there == writers.written[-len(writers.there) :]
    assert 8 * KIB < writers.size <= 16 * KIB, "no more than needed goes"
    writers.check()


def test_without_a_bound_all_are_kept(tmp_path):
    writers = Writers(tmp_path, 0)
    assert writers.all[0].bounds.file_size == MAX_FILE
    for _ in range(300):
        writers.write()
    assert writers.there == writers.written
    assert len(find_files(tmp_path)) == 1


def test_one_over_the_bound_is_kept_alone(tmp_path):
    writers = Writers(tmp_path, 4 * KIB)
    for size in (100, 100, 9000, 100):
        writers.write(size)
        assert writers.there[-1] == writers.written[-1]
        assert len(writers.there) == 1 or size == 100
    writers.check()


def test_files_of_earlier_runs_count(tmp_path):
    """Of other numbers of workers, and much larger than one is now."""
    old = fill(tmp_path, [f"old-{number}" for number in range(200)], owner="w7-999")
    writers = Writers(tmp_path, 16 * KIB)
    writers.write()
    assert not old.exists()
    assert (writers.discarded, writers.there) == (200, ["p0"])


def test_unsettled_dead_letters_are_kept(tmp_path):
    """Their packets are in the ring until then: gone they would have been lost unnoticed, or written twice."""
    writers = Writers(tmp_path, 16 * KIB, 2)
    writers.write(writer=0, settle=False)
    for _ in range(300):
        writers.write(writer=1)
    assert "p0" in writers.there
    assert writers.discarded > 100
    assert writers.all[0].settle()
    writers.check()


def test_a_writer_asks_for_a_sync_in_time(tmp_path):
    """Else what it has not settled would fill the bound, and nothing could be discarded."""
    writers = Writers(tmp_path, 16 * KIB)
    while not writers.all[0].wants_sync:
        writers.write(settle=False)
    assert 2 * KIB <= writers.size <= 6 * KIB
    assert writers.all[0].settle()
    assert not writers.all[0].wants_sync


def test_a_lower_bound_holds_after_a_reload(tmp_path):
    writers = Writers(tmp_path, 64 * KIB)
    for _ in range(200):
        writers.write()
    bounds = writers.all[0].bounds
    bounds.use(Settings(max_bytes=8 * KIB))
    bounds.enforce(pytest.fail)
    assert writers.size <= 64 * KIB // 8 + 8 * KIB, "but for the file that is written to"
    for _ in range(30):
        writers.write()
    assert writers.size <= 8 * KIB
    bounds.use(Settings())
    for _ in range(300):
        writers.write()
    assert writers.size > 64 * KIB
    writers.check()


# ---- replay and purge at the same moment


def test_what_a_replay_holds_is_passed_over(tmp_path):
    writers = Writers(tmp_path, 16 * KIB)
    for _ in range(60):
        writers.write()
    idle(writers.all[0])
    first, *_ = find_files(tmp_path)
    with HeldFile.hold(first.path, 0.0) as file:
        lines = list(file.lines())
        for line in lines[:-1]:
            file.note_replayed(line)
        for _ in range(300):
            writers.write()
        assert first.path.exists()
        assert writers.size <= 16 * KIB
        file.rewrite()
    left = [line.dead_letter.id for line in lines[-1:]]
    assert set(left) <= set(writers.there)
    writers.written = [name for name in writers.written if name not in {line.dead_letter.id for line in lines[:-1]}]
    writers.check()


def test_the_bound_gives_way_to_a_replay(tmp_path):
    """Of all files there are: a dead letter is written rather than lost."""
    writers = Writers(tmp_path, 8 * KIB)
    locks = []
    for _ in range(100):
        writers.write()
        idle(writers.all[0])
        locks += [held(each.path) for each in find_files(tmp_path)[len(locks) :]]
    assert writers.there == writers.written
    assert writers.size > 16 * KIB
    for fd in locks:
        os.close(fd)
    writers.write()
    assert writers.size <= 8 * KIB
    writers.check()


def test_who_waits_for_a_file_finds_it_gone(tmp_path):
    path = fill(tmp_path, ["a", "b"])
    assert discard(path) == 2
    assert HeldFile.hold(path, 0.0) is None
    assert discard(path) is None


def test_what_was_replayed_is_not_discarded(tmp_path):
    path = fill(tmp_path, ["a", "b", "c"])
    with HeldFile.hold(path, 0.0) as file:
        file.note_replayed(next(file.lines()))
    assert discard(path) == 2
    assert names_in(path.parent) == [], "its journal went with it"
    assert not journal_of(path).exists()


def test_unreadable_lines_are_not_counted(tmp_path):
    path = fill(tmp_path, ["a"])
    path.write_bytes(b"torn\n" + path.read_bytes() + b'{"id"')
    assert discard(path) == 1


def test_nested_brackets_keep_no_file(tmp_path):
    path = fill(tmp_path, ["a"])
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"]" * 100_000 + b"\n")
    assert discard(path) == 1
    assert not path.exists()


def test_what_is_no_file_is_in_no_bounds_way(tmp_path):
    writers = Writers(tmp_path, 4 * KIB)
    writers.folder.mkdir(parents=True)
    (writers.folder / "0.ndjson").mkdir()
    os.mkfifo(writers.folder / "1.ndjson")  # to open it would wait for ever
    for _ in range(40):
        writers.write()
    writers.all[0].bounds.enforce(writers._discard)
    assert writers.discarded > 0


def test_a_rewritten_file_stays_as_old(tmp_path):
    path = fill(tmp_path, ["a", "b"])
    os.utime(path, (1e9, 1e9))
    with HeldFile.hold(path, 0.0) as file:
        file.rewrite({0})
    assert ids(path) == ["b"]
    assert path.stat().st_mtime == 1e9


# ---- the lock of the folder, and what a worker has no time for


def test_another_holds_the_folders_lock(tmp_path):
    writers = Writers(tmp_path, 8 * KIB)
    writers.write()
    idle(writers.all[0])
    fd = os.open(writers.folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        writers.write()
    writers.all[0].bounds.gives_way = True  # at the end nothing can wait
    writers.write()
    os.close(fd)
    assert len(writers.there) == 2


def test_large_files_are_the_supervisors(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUICK", 20_000)
    fill(tmp_path, [f"old-{number}" for number in range(200)], owner="w7-999")
    writers = Writers(tmp_path, 16 * KIB)
    with pytest.raises(BlockingIOError):
        writers.write()
    assert writers.discarded == 0
    writers.all[0].bounds.enforce(pytest.fail)
    assert writers.discarded == 200
    writers.write()
    assert writers.there == ["p0"]


def test_large_dead_letters_leave_in_turn(tmp_path, monkeypatch):
    """Also where there is too little room for another one, and enough for what the supervisor keeps free."""
    monkeypatch.setattr(module, "QUICK", 10_000)
    writers = Writers(tmp_path, 64 * KIB)
    for _ in range(6):
        writers.write(17_000)
        writers.all[0].bounds.enforce(pytest.fail)
    assert writers.there == writers.written[-3:]
    writers.check()


def test_an_unreadable_file_is_discarded(tmp_path, monkeypatch):
    def fail(_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "read_journal", fail)
    old = fill(tmp_path, [f"old-{number}" for number in range(200)], owner="w7-999")
    writers = Writers(tmp_path, 16 * KIB)
    writers.write()
    assert not old.exists()
    assert writers.there == ["p0"]


def test_a_worker_stops_after_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_NS", -1)
    for number in range(5):
        fill(tmp_path, [f"old-{number}-{each}" for each in range(50)], owner=f"w{number}-9")
    writers = Writers(tmp_path, 16 * KIB)
    with pytest.raises(BlockingIOError):
        writers.write()
    writers.all[0].bounds.gives_way = True
    writers.write()
    assert "p0" in writers.there


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's file is made by root only")
def test_files_of_others_are_passed_over(tmp_path):
    mine, others = fill(tmp_path, ["a"]), fill(tmp_path, ["b"])
    code = (
        "import os, sys, pathlib, encodings.latin_1\nfrom fastdist.settings import DeadLetters\n"
        "from fastdist.storage.dead_letter_bounds import Bounds\nos.setegid(65534); os.seteuid(65534)\n"
        "bounds = Bounds(pathlib.Path(sys.argv[1]), DeadLetters(max_bytes=1), 1, print)\n"
        "bounds.enforce(print)\nwith bounds.room(1): print('room')\n"
    )
    folder = tmp_path / FOLDER
    os.chown(folder, 65534, 65534)
    os.chown(mine, 65534, 65534)
    for path in (folder, *folder.parents):
        if path.stat().st_mode & 0o005 == 0 and path != folder:
            path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "room"]), done.stderr
    assert [path for path in (mine, others) if path.exists()] == [others]


# ---- max_age


def test_old_files_are_discarded(tmp_path):
    old, young = fill(tmp_path, ["a", "b"]), fill(tmp_path, ["c"])
    os.utime(old, (time.time() - 100,) * 2)
    seen = []
    bounds = Bounds(tmp_path / FOLDER, Settings(max_age=60.0), 1, pytest.fail)
    bounds.enforce(seen.append)
    bounds.enforce(seen.append)
    assert (seen, ids(tmp_path), young.exists()) == ([2], ["c"], True)


def test_an_old_file_in_use_is_kept(tmp_path):
    old = fill(tmp_path, ["a"])
    os.utime(old, (1, 1))
    fd = held(old)
    bounds = Bounds(tmp_path / FOLDER, Settings(max_age=60.0), 1, pytest.fail)
    bounds.enforce(pytest.fail)
    os.close(fd)
    seen = []
    bounds.enforce(seen.append)
    assert seen == [1]


def test_no_file_is_written_to_for_long(tmp_path):
    """Else one dead letter an hour would keep a file, and all that is in it, for ever."""
    writers = Writers(tmp_path, 0, max_age=80.0)
    writers.write()
    writers.write()
    assert len(find_files(tmp_path)) == 1
    writers.all[0]._begun -= 11
    writers.write()
    assert len(find_files(tmp_path)) == 2
    idle(writers.all[0])
    writers.all[0]._begun -= 11
    writers.write()
    assert len(find_files(tmp_path)) == 3
    assert writers.there == writers.written


def test_nothing_is_done_once_halted(tmp_path):
    old = fill(tmp_path, ["a"])
    os.utime(old, (1, 1))
    Bounds(tmp_path / FOLDER, Settings(max_age=60.0, max_bytes=1), 1, pytest.fail).enforce(pytest.fail, lambda: True)
    assert old.exists()


# ---- a folder of its own


def test_folder_is_made_where_path_says(tmp_path):
    place = tmp_path / "elsewhere" / "dead"
    dead_letters = DeadLetterFiles(tmp_path / "data", "w0-1", path=str(place))
    dead_letters.write(as_line(packet("a"), "refused", "A1", 422, None))
    dead_letters.begin_sync()()
    assert dead_letters.settle()
    dead_letters.close()
    assert ids(place) == ["a"]
    assert not (tmp_path / "data").exists()
    assert folder_of("data") == folder_of("data", "").parent / FOLDER


# ---- the response


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (None, None),
        (b"", None),
        (b'{"error":"no such field"}', '{"error":"no such field"}'),
        ("ä".encode() * 3 + b"\xc3", "äää"),  # cut in a character
        (b"\xff\x00a", "\ufffd\x00a"),
    ],
)
def test_the_response_is_kept_as_text(tmp_path, response, text):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet("a"), "refused", "A1", 422, "HTTP 422", response))
    dead_letters.close()
    (found,) = find_files(tmp_path)
    assert json.loads(found.path.read_bytes()).get("response") == text
    assert ids(tmp_path) == ["a"], "it is readable"
