"""The queue's folder and its rings: whose they are, what is made at a start, whether they keep their names."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from structlog.testing import capture_logs
from support import files_end_at, wait_until

from fastdist._core import HEADER_SIZE, PacketRing, file_size
from fastdist.errors import StartError
from fastdist.shm.block import SharedBlock
from fastdist.storage import directory, files, locks
from fastdist.storage.directory import OldRing, QueueFolder, ring_path
from fastdist.storage.inspect import InUseError, look
from fastdist.worker.migrate import Migration
from fastdist.worker.queue import RingNames

CAPACITY = 3 << 20
LOCKS_AND_SLEEPS = """
import fcntl, sys, time
file = open(sys.argv[1], "rb")
fcntl.flock(file, fcntl.LOCK_SH if sys.argv[2] == "reads" else fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def opened(path, workers=1, capacity=CAPACITY):
    """Return a queue's folder that is ours, and its rings."""
    folder = QueueFolder(path)
    folder.lock()
    return folder, folder.rings(workers, capacity)


@pytest.fixture
def another():
    """Return ``another(path, how)``: a process that has the file locked, and "reads" or "writes" it."""
    processes = []

    def another(path, how):
        command = [sys.executable, "-c", LOCKS_AND_SLEEPS, str(path), how]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"locked\n"
        return processes[-1]

    yield another
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(directory, "ENDING", 0.0)
    monkeypatch.setattr(directory, "LOG_AFTER", 0.0)


@pytest.mark.parametrize("most", [1 << 30, 1 << 21, 1 << 16])
def test_memory_rings_are_cleared_boundedly(tmp_path, monkeypatch, most):
    written, real = {}, os.pwrite

    def pwrite(fd, data, at):
        assert at == written.get(fd, 0), "in order, without gaps"
        assert not any(data)
        written[fd] = at + len(data)
        return real(fd, data, at)

    monkeypatch.setattr(directory.os, "pwrite", pwrite)
    monkeypatch.setattr(directory, "CLEARED", most)
    rings = QueueFolder(tmp_path).memory_rings(2, CAPACITY)
    assert written == dict.fromkeys(rings, min(file_size(CAPACITY), most // 2))
    for fd in rings:
        assert os.fstat(fd).st_size == file_size(CAPACITY)
        ring = PacketRing(fd, volatile=True)
        assert ring.capacity == CAPACITY
        assert ring.push(b"x")
        os.close(fd)


def test_failed_creation_reason_ends_start(tmp_path):
    folder = QueueFolder(tmp_path)
    (tmp_path / "ring-0.new").mkdir()  # as where the disk has no room for one more name, or is read-only
    with pytest.raises(StartError, match=r"cannot make the queue in .*ring-0\.new: Is a directory"):
        folder.rings(1, CAPACITY)


def test_no_folder_has_no_rings(tmp_path):
    (tmp_path / "file").touch()
    for nothing in ("none", "file", "file/q"):
        assert not QueueFolder(tmp_path / nothing).has_rings()
    with pytest.raises(StartError, match=r"cannot be read: File name too long"):
        QueueFolder(tmp_path / ("x" * 300)).has_rings()


def test_unseen_rings_are_not_overwritten(tmp_path):
    """In a folder that may be written to and searched, but not listed."""
    folder, rings = opened(tmp_path / "q")
    PacketRing(rings[0]).push(b"x", "p")
    for fd in (*rings, *folder.held):
        os.close(fd)
    code = (
        "import os, sys\nfrom fastdist.errors import StartError\n"
        "from fastdist.storage.directory import QueueFolder\n"
        "if os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)\n"
        "folder = QueueFolder(sys.argv[1])\n"
        "for step in folder.has_rings, lambda: (folder.lock(), folder.rings(1, 1 << 20)):\n"
        "    try: print(step())\n    except StartError as error: print(error)\n"
    )
    for path in (tmp_path / "q", *(tmp_path / "q").iterdir()):
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    for path in tmp_path, *tmp_path.parents:
        if path.stat().st_mode & 0o005 == 0:
            path.chmod(0o755)
    (tmp_path / "q").chmod(0o300)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "q"], capture_output=True, text=True, check=False)
    (tmp_path / "q").chmod(0o700)
    text = f"the queue's folder {tmp_path}/q cannot be read: Permission denied"
    assert done.stdout.splitlines() == [text] * 2, done.stderr
    with (tmp_path / "q" / "ring-0.fdq").open("rb+") as ring:
        assert PacketRing(ring.fileno()).undone == 1


@pytest.mark.parametrize("name", ["ring-0.fdq", "adopt-00.fdq"])
def test_pipe_as_queue_file_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(StartError, match=f"{name}: not a regular file"):
        QueueFolder(tmp_path).rings(1, CAPACITY)
    (report,) = look(tmp_path).files
    assert (report.error, report.sound) == ("not a regular file", False)


# ---- whose it is


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("ring", ["its own", "renamed by an operator", "to be migrated", "being made"])
def test_no_ring_ever_has_two_services(tmp_path, ring):
    first, rings = opened(tmp_path)
    path = ring_path(tmp_path, 0)
    if ring == "renamed by an operator":
        path.rename(tmp_path / "ring-7.fdq")
    elif ring == "to be migrated":
        assert PacketRing(rings[0]).push(b"x")  # an empty one is deleted
        first.retire_all()
        assert [old.fd for old in first.old_rings()] == rings
    elif ring == "being made":
        path.rename(path.with_suffix(".new"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "lock"}
    (tmp_path / "lock").unlink()
    with pytest.raises(StartError, match=r"in use by|being made by another"):
        opened(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "lock"} == before
    if ring != "being made":
        (tmp_path / "lock").unlink()
        with pytest.raises(InUseError, match="in use by a running fastdist"):
            look(tmp_path)


@pytest.mark.parametrize("file", ["lock", "ring-0.fdq"])
def test_owner_of_the_queue_is_named(tmp_path, another, file):
    folder, rings = opened(tmp_path)
    for fd in (*folder.held, *rings):
        os.close(fd)
    pid = another(tmp_path / file, "writes").pid
    with pytest.raises(StartError, match=rf"in use by a running fastdist \(pid {pid}\)"):
        opened(tmp_path)


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("file", ["lock", "ring-0.fdq"])
def test_start_waits_for_and_names_readers(tmp_path, another, file):
    folder, rings = opened(tmp_path)
    for fd in (*folder.held, *rings):
        os.close(fd)
    reader = another(tmp_path / file, "reads")

    with capture_logs() as logs, ThreadPoolExecutor(1) as thread:
        locking = thread.submit(QueueFolder(tmp_path).lock)
        wait_until(lambda: logs, "the start says that it waits")
        assert not locking.done()
        reader.kill()
        locking.result(30)
    assert [(line["event"], line["file"]) for line in logs] == [
        ("the queue is being read; the start waits", str(tmp_path / file))
    ]
    assert f"(pid {reader.pid})" in logs[0]["by"]


def test_holder_is_found_by_its_files_inode(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("")
    with path.open() as file:
        inode = path.stat().st_ino
        monkeypatch.setattr(locks, "LOCKS", tmp_path / "locks")
        assert locks.holder(file.fileno()) is None
        (tmp_path / "locks").write_text(
            f"1: POSIX  ADVISORY  READ 11 00:2d:{inode} 0 EOF\n"
            f"2: FLOCK  ADVISORY  WRITE 12 00:2d:{inode}1 0 EOF\n"
            f"3: FLOCK  ADVISORY  WRITE 13 00:2d:{inode} 0 EOF\n"
            f"3: -> FLOCK  ADVISORY  WRITE 14 00:2d:{inode} 0 EOF\n"
        )
        assert locks.holder(file.fileno()) == 13


def test_deleted_lock_is_there_again(tmp_path):
    folder, _ = opened(tmp_path / "queue")
    path = tmp_path / "queue" / "lock"
    folder.renew_lock()
    before = folder.held
    path.unlink()
    with capture_logs() as logs:
        folder.renew_lock()
        folder.renew_lock()
    assert len(logs) == 1
    assert folder.held != before or not os.path.samestat(os.fstat(before[0]), path.stat())
    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert path.read_text().split() == [str(os.getpid())]
    (tmp_path / "queue").rename(tmp_path / "elsewhere")
    folder.renew_lock()
    (tmp_path / "queue").mkdir()
    folder.renew_lock()
    assert not path.exists(), "another folder is not ours to lock"


def test_one_ring_of_two_names_counts_once(tmp_path):
    folder, rings = opened(tmp_path)
    for fd in (*folder.held, *rings):
        os.close(fd)
    (tmp_path / "another.fdq").hardlink_to(ring_path(tmp_path, 0))
    with pytest.raises(StartError, match="one file under two names; delete one of them"):
        opened(tmp_path)


# ---- whether they keep their names


@pytest.mark.parametrize("how", ["renamed", "in a renamed folder", "replaced", "deleted", "deleted, with another link"])
def test_ring_that_loses_its_name_is_logged(tmp_path, how):
    folder = tmp_path / "queue"
    _, (fd,) = opened(folder)
    path = ring_path(folder, 0)
    names = RingNames(PacketRing(fd), fd, path)
    names.look([])
    assert not names.misplaced
    if how == "renamed":
        path.rename(folder / "x.fdq")
    elif how == "in a renamed folder":
        folder.rename(tmp_path / "elsewhere")
    elif how == "replaced":
        (folder / "x").write_bytes(path.read_bytes())
        (folder / "x").rename(path)
    else:
        if "link" in how:
            (tmp_path / "link").hardlink_to(path)
        path.unlink()
    with capture_logs() as logs:
        names.look([])
        assert names.misplaced
        names.look([])
        assert names.misplaced
    (line,) = logs
    assert files.is_nameless(fd) is ("renamed" not in how)
    assert ("was renamed" in line["event"]) is ("renamed" in how)
    if how == "renamed":
        assert line["now"] == str(folder / "x.fdq")
        (folder / "x.fdq").rename(path)
    elif how == "in a renamed folder":
        assert line["now"] == str(tmp_path / "elsewhere" / "ring-0.fdq")
        (tmp_path / "elsewhere").rename(folder)
    else:
        return
    with capture_logs() as logs:
        names.look([])
        assert not names.misplaced
    assert "has its name again" in logs[0]["event"]


def test_deleted_or_memory_file_is_nameless(tmp_path):
    assert files.is_nameless(os.memfd_create("ring"))
    with (tmp_path / ".nfs0000000000000001").open("w") as deleted, (tmp_path / "ring").open("w") as file:
        assert files.is_nameless(deleted.fileno())
        assert not files.is_nameless(file.fileno())


# ---- old rings


def migration(tmp_path, packets=3, body=b"x"):
    """Return an old ring's migration, the ring that is to take its packets, and the counters of that."""
    _, (fd,) = opened(tmp_path / "old")
    made = PacketRing(fd)
    for _ in range(packets):
        assert made.push(body)
    _, (own,) = opened(tmp_path / "own")
    (counters,) = SharedBlock.create(1, 4).rows
    return Migration(OldRing(fd, str(ring_path(tmp_path / "old", 0)))), PacketRing(own), counters


def test_old_rings_stay_until_copies_sync(tmp_path):
    it, own, counters = migration(tmp_path)
    assert it.step(own, counters, 2) == (2, [])
    for _ in range(3):
        assert it.step(own, counters, 2) == (0, [])
        assert (it.ring.undone, it.finished) == (3, False)
    own.mark_synced(own.tail_position)
    assert it.step(own, counters, 2) == (1, [])
    assert (it.ring.undone, it.finished) == (1, False)
    own.mark_synced(own.tail_position)
    assert it.step(own, counters, 2) == (0, [])
    assert it.finished
    it.delete()
    assert not ring_path(tmp_path / "old", 0).exists()


def test_copies_before_a_failure_need_a_sync(tmp_path):
    """What was copied before the new ring could not be written to stays in the old one until its copy is synced."""
    it, own, counters = migration(tmp_path, packets=5, body=bytes(1500))
    own.mark_synced(own.tail_position)
    with files_end_at(HEADER_SIZE + 4096), pytest.raises(OSError, match="File too large"):
        it.step(own, counters, 5)
    assert (own.undone, it.undone) == (2, 3)
    assert not it.settle(own)
    assert it.ring.undone == 5
    own.mark_synced(own.tail_position)
    assert it.settle(own)
    assert it.ring.undone == 3
    assert it.step(own, counters, 5) == (3, [])


def test_only_an_old_ring_itself_is_deleted(tmp_path):
    it, _, _ = migration(tmp_path, 0)
    path = ring_path(tmp_path / "old", 0)
    path.rename(tmp_path / "kept")
    path.write_text("another's")
    it.delete()
    assert path.read_text() == "another's"
    assert (tmp_path / "kept").exists()


def test_old_ring_without_name_is_logged(tmp_path):
    it, own, counters = migration(tmp_path)
    names = RingNames(own, it.old.fd, None)
    ring_path(tmp_path / "old", 0).unlink()
    with capture_logs() as logs:
        for _ in range(2):
            names.look([it])
            assert (names.misplaced, names.misplaced_old) == (False, True)
    assert len(logs) == 1
    it.step(own, counters, 3)
    own.mark_synced(own.tail_position)
    it.step(own, counters, 3)
    names.look([it])
    assert not names.misplaced_old
