"""Disks that fail: a sync that returns an error, no room for dead letters, no room at all."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time

import pytest
from experiment import DELIVERY, SOME, body_of, form, in_flight, twice_after_a_kill, wait_for_restarts
from small_disk import fill, small_disk
from support import check_identity, get_json, request, wait_until
from test_processes_killed import kill_a_worker

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int fails(void) {
    const char *flag = getenv("SYNC_FAILS_WHILE_THERE_IS");
    if (flag == NULL || access(flag, F_OK) != 0) return 0;
    errno = EIO;
    return 1;
}
int fdatasync(int fd) {
    static int (*next)(int);
    if (fails()) return -1;
    if (next == NULL) next = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return next(fd);
}
int fsync(int fd) {
    static int (*next)(int);
    if (fails()) return -1;
    if (next == NULL) next = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return next(fd);
}
"""


WATCH = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int fdatasync(int fd) {
    static int (*next)(int);
    char link[64], name[4096];
    int notes = open(getenv("SYNCED_FILES"), O_WRONLY | O_APPEND);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    if (n > 0 && notes >= 0) {
        name[n] = '\n';
        if (write(notes, name, n + 1) < 0) abort();
    }
    if (notes >= 0) close(notes);
    usleep(50000);
    if (next == NULL) next = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return next(fd);
}
"""

OLD_RINGS_STAY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int unlink(const char *path) {
    static int (*next)(const char *);
    if (strstr(path, "/adopt-") != NULL && access(getenv("OLD_RINGS_STAY_WHILE_THERE_IS"), F_OK) == 0) {
        errno = EROFS;
        return -1;
    }
    if (next == NULL) next = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
    return next(path);
}
int fdatasync(int fd) {
    static int (*next)(int);
    int notes = open(getenv("SYNCS"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (notes >= 0) {
        if (write(notes, ".", 1) < 0) abort();
        close(notes);
    }
    if (next == NULL) next = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return next(fd);
}
"""

SLOW_FAILURE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int fdatasync(int fd) {
    static int (*next)(int);
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    name[n > 0 ? n : 0] = 0;
    if (strstr(name, ".ndjson") != NULL) {
        close(open(getenv("DEAD_LETTERS_ARE_SYNCED"), O_WRONLY | O_CREAT, 0600));
        usleep(1500000);
        errno = EIO;
        return -1;
    }
    if (next == NULL) next = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return next(fd);
}
"""

HANGS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

int fdatasync(int fd) {
    static int (*next)(int);
    if (next == NULL) next = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    close(open(getenv("SYNC_HAS_BEGUN"), O_WRONLY | O_CREAT, 0600));
    while (access(getenv("SYNC_HANGS_WHILE_THERE_IS"), F_OK) == 0) usleep(1000);
    return next(fd);
}
"""


@pytest.fixture
def slowly_failing_dead_letters(tmp_path):
    """Return the environment of a process whose syncs of dead letters take 1.5 s and fail, and a file that shows it."""
    source, library, begun = tmp_path / "slow.c", tmp_path / "slow.so", tmp_path / "sync-begun"
    source.write_text(SLOW_FAILURE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "DEAD_LETTERS_ARE_SYNCED": str(begun)}, begun


@pytest.fixture
def failing_sync(tmp_path):
    """Return the environment of a process whose syncs fail, and the file during whose existence they do."""
    source, library, flag = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "disk-fails"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "SYNC_FAILS_WHILE_THERE_IS": str(flag)}, flag


def storage(fastdist) -> str:
    try:
        return get_json(fastdist.port, "/health")["storage"]
    except OSError:  # asked a worker that was killed
        return "unknown"


def problems(fastdist) -> set[str]:
    """Return the codes of what is wrong."""
    return {problem["code"] for problem in get_json(fastdist.port, "/health")["problems"]}


def test_sync_that_hangs_holds_up_nothing(experiment, tmp_path):
    """With "disk" packets are accepted and delivered while it lasts, however long that is."""
    source, library, flag, begun = (tmp_path / name for name in ("hangs.c", "hangs.so", "sync-hangs", "sync-begun"))
    source.write_text(HANGS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    shim = {"LD_PRELOAD": str(library), "SYNC_HANGS_WHILE_THERE_IS": str(flag), "SYNC_HAS_BEGUN": str(begun)}
    experiment.analyzers()
    settings = {"server": {"workers": 1}, "queue": {"capacity": "64MiB", "sync_interval": "100ms"}}
    fastdist = experiment.serve(settings, **shim)
    worker = fastdist.worker_pids()
    flag.touch()
    begun.unlink(missing_ok=True)
    emitter = experiment.emitter().start()
    wait_until(begun.exists, "a sync has begun")
    before = get_json(fastdist.port, "/stats")["packets"]
    time.sleep(2)
    emitter.wait_for(200)
    wait_until(
        lambda: get_json(fastdist.port, "/stats")["packets"]["delivered"] >= before["delivered"] + 200,
        "what is accepted meanwhile is delivered",
    )
    assert request(fastdist.port, "GET", "/ready")[0] == 200
    flag.unlink()
    experiment.judge("a sync hangs")
    assert {*emitter.answers.values()} == {202}
    assert fastdist.worker_pids() == worker


def test_remaining_old_ring_blocks_nothing(experiment, tmp_path):
    """It cannot be deleted (an immutable folder, a read-only file system): the rest of the upkeep goes on."""
    source, library, flag, syncs = (tmp_path / name for name in ("stay.c", "stay.so", "stay", "syncs"))
    source.write_text(OLD_RINGS_STAY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    shim = {"LD_PRELOAD": str(library), "OLD_RINGS_STAY_WHILE_THERE_IS": str(flag), "SYNCS": str(syncs)}
    mocks = experiment.analyzers()
    mocks.set_all(refuse=True)
    server = {"workers": 1, "keepalive_timeout": "1s", "header_timeout": "1s"}
    fastdist = experiment.serve({"server": server, "queue": {"capacity": "2MiB"}})
    emitter = experiment.emitter().start().wait_for(100)
    fastdist.kill_all()
    mocks.set_all(refuse=False)
    flag.touch()
    fastdist = experiment.serve({"server": server, "queue": {"capacity": "3MiB"}}, **shim)
    health = wait_until(lambda: (got := get_json(fastdist.port, "/health"))["failing"] and got, "/health tells")
    assert (health["failing"], health["status"], health["storage"]) == (["oldRings"], "degraded", "ok")
    emitter.wait_for(50)
    before = syncs.stat().st_size
    wait_until(lambda: syncs.stat().st_size > before + 2, "what is accepted is synced")
    with socket.create_connection(("127.0.0.1", fastdist.port)) as idle:
        idle.settimeout(30)
        idle.recv(1000)  # 408, or the end
    assert request(fastdist.port, "GET", "/ready")[0] == 200
    flag.unlink()
    wait_until(lambda: get_json(fastdist.port, "/health")["failing"] == [], "it heals by itself")
    assert not list(experiment.data.glob("adopt-*"))
    experiment.judge("an old ring cannot be deleted", bound=in_flight(DELIVERY, 1))
    assert fastdist.output.count("a part of the upkeep fails") == 1, "told once"
    assert fastdist.output.count("a part of the upkeep works again") == 1


@pytest.mark.parametrize("durability", ["disk", "fsync"])
def test_syncs_fail_and_work_again(experiment, failing_sync, durability):
    environment, flag = failing_sync
    experiment.analyzers()
    fastdist = experiment.serve({"queue": {"durability": durability}}, **environment)
    emitter = experiment.emitter().start()
    for _ in range(form(2, 6)):
        emitter.wait_for(200)
        flag.touch()
        wait_until(lambda: storage(fastdist) == "failing", "the failure shows in /health")
        assert request(fastdist.port, "GET", "/ready")[0] == 503
        # Each worker finds out by itself, with disk up to half a second apart. (What they are asked with is no packet.)
        wait_until(lambda: {fastdist.post(b"[]")[0] for _ in range(12)} == {503}, "no worker accepts anything")
        before = emitter.count(202)
        time.sleep(form(0.6, 1.5))
        if durability == "fsync":
            # What was answered 202 meanwhile was synced by the other worker, before it met the failure as well.
            wait_until(lambda: fastdist.post()[0] == 503, "nothing is accepted")
            before = emitter.count(202)
            time.sleep(0.3)
        assert emitter.count(202) - before <= (0 if durability == "fsync" else 2 * emitter.connections)
        flag.unlink()
        wait_until(lambda: storage(fastdist) == "ok", "it heals by itself")
        wait_until(lambda: request(fastdist.port, "GET", "/ready")[0] == 200, "/ready tells, too")
    emitter.wait_for(200)
    experiment.judge(f"sync fails with EIO ({durability})")
    assert emitter.count(503) > 0
    assert {*emitter.answers.values()} == {202, 503}
    assert fastdist.stats()["rejected"]["storage"] >= emitter.count(503)
    assert fastdist.output.count("cannot write the queue to disk") <= 2 * form(2, 6), "said once, not once a second"


@pytest.mark.parametrize("durability", form(["fsync"], ["disk", "fsync"]))
def test_workers_are_killed_while_syncs_fail(experiment, failing_sync, durability):
    """Their successors cannot be sure of what they find, and accept nothing until they are."""
    environment, flag = failing_sync
    experiment.analyzers("--latency", "0.002")
    fastdist = experiment.serve({"queue": {"durability": durability}}, **environment)
    emitter = experiment.emitter().start()
    kills = form(1, 4)
    for kill in range(1, kills + 1):
        emitter.wait_for(200)
        flag.touch()
        wait_until(lambda: storage(fastdist) == "failing", "the failure shows in /health")
        kill_a_worker(fastdist)
        wait_for_restarts(fastdist, kill)
        assert storage(fastdist) == "failing"
        flag.unlink()
        wait_until(lambda: storage(fastdist) == "ok", "it heals by itself")
    emitter.wait_for(200)
    bound = kills * twice_after_a_kill(DELIVERY, 1)
    experiment.judge(f"sync fails, and workers are killed ({durability})", bound=bound)


# ---- dead letters


@pytest.fixture
def watched_sync(tmp_path):
    """Return the environment of a process whose fdatasync takes 50 ms, and what reads which files were synced."""
    source, library, notes = tmp_path / "watch.c", tmp_path / "watch.so", tmp_path / "synced"
    source.write_text(WATCH)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    notes.touch()

    def synced() -> list[str]:
        return [line.rpartition("/")[2] for line in notes.read_text().splitlines()]

    return {"LD_PRELOAD": str(library), "SYNCED_FILES": str(notes)}, synced


@pytest.mark.parametrize("durability", ["disk", "fsync"])
def test_dead_letters_sync_before_ring(experiment, watched_sync, durability):
    environment, synced = watched_sync
    experiment.analyzers().set_all(rejects=SOME)
    fastdist = experiment.serve({"queue": {"durability": durability}, "server": {"workers": 1}}, **environment)
    experiment.emitter(connections=16).start().wait_for(400)
    wait_until(lambda: len(fastdist.dead_letters()) > 100, "packets are refused")
    experiment.judge(f"slow syncs, packets refused ({durability})")
    dead_letters = len(fastdist.dead_letters())
    wait_until(lambda: any(name.endswith(".ndjson") for name in synced()), "dead letters are synced")
    assert 1 <= sum(name.endswith(".ndjson") for name in synced()) < dead_letters / 2
    before = len(synced())
    wait_until(
        lambda: fastdist.post(body_of("p-1"))[0] == 202 and len(fastdist.dead_letters()) > dead_letters,
        "one more is refused",
    )
    wait_until(lambda: any(name.endswith(".ndjson") for name in synced()[before:]), "its dead letter is synced, too")
    if durability == "disk":
        wait_until(lambda: synced()[-1].endswith(".fdq"), "and then the ring")


def test_failed_last_sync_loses_nothing(experiment, slowly_failing_dead_letters):
    """The queue's file was deleted, so all that is left has to become dead letters, while some are being synced."""
    environment, begun = slowly_failing_dead_letters
    mocks = experiment.analyzers()
    server = {"workers": 1, "drain_timeout": "300ms"}
    fastdist = experiment.serve({"queue": {"durability": "fsync"}, "server": server}, **environment)
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = experiment.emitter().start().wait_for(300).stop()
    shutil.rmtree(experiment.data)
    wait_until(lambda: "the queue's file was deleted" in fastdist.output, "that is noticed")
    mocks.set("A1", refuse=False, status=422, latency=0.2)
    wait_until(begun.exists, "the first dead letters are being synced")
    assert fastdist.stop() == 0
    dead_letters = [row["id"] for row in fastdist.dead_letters()]
    assert len(dead_letters) >= len(emitter.accepted)
    experiment.judge("dead letters cannot be synced, and the queue's file is gone", at_rest=False)


def whole_lines(path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


@pytest.mark.parametrize("durability", ["memory", "disk", "fsync"])
def test_dead_letter_files_are_deleted_often(experiment, durability):
    """By another process. What had been in them is read at that moment; nothing else is."""
    experiment.analyzers().set_all(rejects=SOME)
    fastdist = experiment.serve({"queue": {"durability": durability}})
    emitter = experiment.emitter().start()
    folder, kept = experiment.data / "dead-letters", b""
    for turn in range(form(4, 20)):
        emitter.wait_for(50)
        wait_until(fastdist.dead_letters, "packets are refused")
        if turn % 2:
            folder.rename(away := experiment.folder / f"away-{turn}")
            kept += b"".join(map(whole_lines, away.iterdir()))
            shutil.rmtree(away)
        else:
            for path in folder.iterdir():
                path.rename(away := experiment.folder / path.name)
                kept += whole_lines(away)
                away.unlink()
    emitter.wait_for(50)
    wait_until(fastdist.dead_letters, "packets are refused")
    (folder / "kept.ndjson").write_bytes(kept)
    experiment.judge(f"files of dead letters are deleted ({durability})")


# ---- a disk that is full


def test_queue_that_the_disk_cannot_hold(experiment, tmp_path):
    with small_disk(tmp_path / "data", "3M") as disk:
        experiment.analyzers()
        settings = {"queue": {"capacity": "1MiB"}}
        fastdist = experiment.serve(settings)
        fastdist.kill_all()
        status, output = experiment.refused_start(FASTDIST_QUEUE__CAPACITY="16MiB")
        assert status == 3
        assert "No space left on device" in output
        assert "make room or lower queue.capacity" in output
        assert "Traceback" not in output
        assert not list(disk.glob("*.new")), "what was allocated in vain is free again"
        experiment.serve(settings)
        experiment.emitter().start().wait_for(100)
        experiment.judge("disk full at the start (exit 3), then enough room")


def test_unwritten_dead_letters_stay_queued(experiment, tmp_path):
    with small_disk(tmp_path / "data", "6M") as disk:
        mocks = experiment.analyzers()
        settings = {"queue": {"capacity": "2MiB"}}
        fastdist = experiment.serve(settings)
        emitter = experiment.emitter(connections=8).start().wait_for(100)
        fill(disk)
        mocks.set_all(rejects=SOME)
        wait_until(lambda: "dead_letters_failing" in problems(fastdist), "/health says that they cannot be written")
        emitter.wait_for(200)
        fastdist.kill_all()
        fastdist = experiment.serve(settings)  # with a disk that is full: the queue has its room
        wait_until(lambda: "dead_letters_failing" in problems(fastdist), "/health says that they cannot be written")
        assert (storage(fastdist), request(fastdist.port, "GET", "/ready")[0]) == ("ok", 200), "packets are taken"
        emitter.wait_for(100)
        emitter.stop()
        wait_until(lambda: fastdist.stats()["packets"]["queued"] > 50, "they stay queued")
        assert fastdist.dead_letters() == []
        (disk / "filler").unlink()
        stats = fastdist.wait_at_rest()
        assert stats["packets"]["deadLettered"] > 50
        assert "dead_letters_failing" not in problems(fastdist)
        assert request(fastdist.port, "GET", "/ready")[0] == 200
        dead_letters = fastdist.dead_letters()
        assert len(dead_letters) == len({row["id"] for row in dead_letters}) == stats["packets"]["deadLettered"]
        experiment.judge("no room for dead letters, restart with a full disk", bound=twice_after_a_kill(DELIVERY))


def test_purging_makes_room_on_a_full_disk(experiment, tmp_path):
    """Also while the service runs, which has a file of dead letters open and wants to write more to it."""
    with small_disk(tmp_path / "data", "6M") as disk:
        mocks = experiment.analyzers()
        fastdist = experiment.serve({"queue": {"capacity": "2MiB"}, "server": {"workers": 1}})
        mocks.set_all(rejects=SOME)
        emitter = experiment.emitter(connections=8).start().wait_for(100)
        wait_until(fastdist.dead_letters, "packets are refused")
        fill(disk)
        wait_until(lambda: "dead_letters_failing" in problems(fastdist), "/health says that they cannot be written")
        command = [sys.executable, "-m", "fastdist", "dead-letters", "purge", str(disk), "--yes"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        purged = int(done.stdout.split()[1])
        assert purged > 0
        wait_until(fastdist.dead_letters, "there is room for some")
        (disk / "filler").unlink()
        emitter.stop()
        wait_until(lambda: "dead_letters_failing" not in problems(fastdist), "it heals by itself")
        stats = fastdist.wait_at_rest()
        check_identity(stats)
        assert stats["packets"]["deadLettered"] == purged + len(fastdist.dead_letters())


WRITES_FAIL = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* While there is the flag, one in three writes to a ring fails, and one in three stops halfway. */
static int limit(int fd, size_t *n) {
    static unsigned turn;
    char link[64], name[4096];
    if (access(getenv("WRITES_FAIL_WHILE_THERE_IS"), F_OK) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, name, sizeof name - 1);
    name[length > 0 ? length : 0] = 0;
    if (strstr(name, ".fdq") == NULL) return 0;
    switch (turn++ % 3) {
    case 0:
        errno = EIO;
        return -1;
    case 1:
        *n = (*n + 1) / 2;
    }
    return 0;
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (next == NULL) next = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    return limit(fd, &n) ? -1 : next(fd, data, n, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t offset) { return pwrite(fd, data, n, offset); }
ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t offset) {
    static ssize_t (*next)(int, const struct iovec *, int, off_t);
    size_t n = pieces[0].iov_len;
    if (next == NULL) next = (ssize_t (*)(int, const struct iovec *, int, off_t))dlsym(RTLD_NEXT, "pwritev");
    if (limit(fd, &n)) return -1;
    return n == pieces[0].iov_len ? next(fd, pieces, count, offset) : pwrite(fd, pieces[0].iov_base, n, offset);
}
ssize_t pwritev64(int fd, const struct iovec *pieces, int count, off_t offset) {
    return pwritev(fd, pieces, count, offset);
}
"""


@pytest.mark.parametrize("durability", form(["disk"], ["disk", "fsync"]))
def test_writes_fail_and_work_again(experiment, tmp_path, durability):
    source, library, flag = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "writes-fail"
    source.write_text(WRITES_FAIL)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    experiment.analyzers()
    shim = {"LD_PRELOAD": str(library), "WRITES_FAIL_WHILE_THERE_IS": str(flag)}
    fastdist = experiment.serve({"queue": {"durability": durability}}, **shim)
    emitter = experiment.emitter().start()
    for _ in range(form(2, 6)):
        emitter.wait_for(200)
        flag.touch()
        wait_until(lambda: storage(fastdist) == "failing", "the failure shows in /health")
        time.sleep(form(1.5, 3))
        flag.unlink()
        emitter.wait_for(200)
        wait_until(lambda: storage(fastdist) == "ok", "it heals by itself")
    experiment.judge(f"writes fail, or stop halfway ({durability})")
    assert emitter.count(503) > 0
    assert {*emitter.answers.values()} == {202, 503}
    assert fastdist.output.count("cannot write to the queue") <= 2 * form(2, 6) * 5, "once a second at most"
