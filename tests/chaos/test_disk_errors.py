"""A disk that takes no writes or cannot read some pages, and files that are spoiled in use: workers that were killed
have successors that deliver what is left, tell what is wrong, and take packets again as soon as that is possible."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from experiment import DELIVERY, form, in_flight, twice_after_a_kill, wait_for_restarts
from support import get_json, request, wait_until
from test_queue_damaged import PAGE, SECOND_COPY, Place, records

from fastdist._core import HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* While DISK_FAULTS/writes is there writes to rings fail, with the errno that it has; DISK_FAULTS/pages lists what
 * cannot be read: an inode, the first byte and the last. To touch that in a mapping made since ends the process. */
static long numbers[3 * 64];

static int read_numbers(const char *name) {
    char path[4096], text[8192];
    int count = 0, used;
    snprintf(path, sizeof path, "%s/%s", getenv("DISK_FAULTS"), name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    for (char *at = text; count < 3 * 64 && sscanf(at, "%ld%n", &numbers[count], &used) == 1; at += used) count++;
    return count;
}

static int refuses(int fd) {
    char link[64], name[4096];
    if (!read_numbers("writes")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    name[n > 0 ? n : 0] = 0;
    if (strstr(name, ".fdq") == NULL) return 0;
    errno = (int)numbers[0];
    return 1;
}

static int is_faulty(int fd, off_t offset, size_t n) {
    struct stat file;
    int count = read_numbers("pages");
    if (count == 0 || fstat(fd, &file)) return 0;
    for (int i = 0; i + 2 < count; i += 3)
        if (numbers[i] == (long)file.st_ino && offset <= numbers[i + 2] && offset + (off_t)n > numbers[i + 1]) return 1;
    return 0;
}

ssize_t pread(int fd, void *room, size_t n, off_t offset) {
    static ssize_t (*next)(int, void *, size_t, off_t);
    if (next == NULL) next = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    if (is_faulty(fd, offset, n)) return errno = EIO, -1;
    return next(fd, room, n, offset);
}
ssize_t pread64(int fd, void *room, size_t n, off_t offset) { return pread(fd, room, n, offset); }

ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (next == NULL) next = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    return refuses(fd) ? -1 : next(fd, data, n, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t offset) { return pwrite(fd, data, n, offset); }

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t offset) {
    static ssize_t (*next)(int, const struct iovec *, int, off_t);
    if (next == NULL) next = (ssize_t (*)(int, const struct iovec *, int, off_t))dlsym(RTLD_NEXT, "pwritev");
    return refuses(fd) ? -1 : next(fd, pieces, count, offset);
}
ssize_t pwritev64(int fd, const struct iovec *pieces, int count, off_t offset) {
    return pwritev(fd, pieces, count, offset);
}

void *mmap(void *place, size_t n, int protection, int flags, int fd, off_t offset) {
    static void *(*next)(void *, size_t, int, int, int, off_t);
    if (next == NULL) next = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    char *mapped = next(place, n, protection, flags, fd, offset);
    if (fd < 0 || mapped == MAP_FAILED || !is_faulty(fd, offset, n)) return mapped;
    for (size_t at = 0; at < n; at += 4096)
        if (is_faulty(fd, offset + at, 4096) && mprotect(mapped + at, 4096, PROT_NONE)) abort();
    return mapped;
}
void *mmap64(void *place, size_t n, int protection, int flags, int fd, off_t offset) {
    return mmap(place, n, protection, flags, fd, offset);
}
"""
SETTINGS = {"queue": {"capacity": "1MiB"}, "server": {"workers": 1}, "delivery": DELIVERY}


class Faults:
    """The disk's faults; ``environment`` is that of processes that are to meet them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "faults"
        self._folder.mkdir()
        source, library = folder / "shim.c", folder / "shim.so"
        source.write_text(SHIM)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "DISK_FAULTS": str(self._folder)}

    def refuse_writes(self, code: int) -> None:
        (self._folder / "new").write_text(str(code))
        (self._folder / "new").rename(self._folder / "writes")

    def take_writes(self) -> None:
        (self._folder / "writes").unlink()

    def spoil(self, file: Path, pages: list[int]) -> None:
        """Have pages (offsets of their first bytes) be unreadable."""
        spans = [f"{file.stat().st_ino} {page} {page + PAGE - 1}" for page in pages]
        (self._folder / "new").write_text("\n".join(spans))
        (self._folder / "new").rename(self._folder / "pages")


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path)


def queued(experiment, faults, packets=300, **settings):
    """Start a distributor that has so many packets and cannot deliver them; return it, and them."""
    mocks = experiment.analyzers()
    fastdist = experiment.serve({**SETTINGS, **settings}, **faults.environment)
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = experiment.emitter(connections=8).start().wait_for(packets).stop()
    return fastdist, set(emitter.accepted)


def places(file: Path) -> Iterator[Place]:
    return records(file.name, file.read_bytes())


def health(fastdist) -> dict[str, object]:
    try:
        return get_json(fastdist.port, "/health")
    except OSError:  # asked a worker that was killed
        return {}


def kill_the_worker(fastdist) -> None:
    (pid,) = fastdist.worker_pids()
    os.kill(pid, signal.SIGKILL)


def go_on(experiment, fastdist) -> None:
    """Have analyzers take packets again, and further ones come."""
    experiment.mocks.set_all(refuse=False)
    experiment.emitter(connections=8).start().wait_for(100)
    wait_until(lambda: health(fastdist).get("storage") == "ok", "all is well again")
    assert request(fastdist.port, "GET", "/ready")[0] == 200


@pytest.mark.parametrize("durability", ["disk", "fsync"])
@pytest.mark.parametrize("code", form([errno.ENOSPC], [errno.ENOSPC, errno.EDQUOT, errno.EIO]))
def test_worker_is_killed_while_writes_fail(experiment, faults, durability, code):
    """Its successor delivers what there is, rejects what comes, says why, and heals by itself."""
    fastdist, accepted = queued(experiment, faults, queue=SETTINGS["queue"] | {"durability": durability})
    faults.refuse_writes(code)
    emitter = experiment.emitter(connections=4).start()
    wait_until(lambda: health(fastdist).get("storage") == "failing", "the failure shows in /health")
    kill_the_worker(fastdist)
    wait_for_restarts(fastdist, 1)
    wait_until(lambda: health(fastdist).get("storageError") == os.strerror(code), "it knows why")
    status, _, body = request(fastdist.port, "GET", "/ready")
    assert (status, os.strerror(code) in json.loads(body)["detail"]) == (503, True)
    status, _, body = fastdist.post()
    assert (status, os.strerror(code) in json.loads(body)["detail"]) == (503, True)
    experiment.mocks.set_all(refuse=False)
    wait_until(lambda: accepted <= experiment.delivered().keys(), "what there is is delivered meanwhile")
    assert health(fastdist)["storage"] == "failing"
    faults.take_writes()
    emitter.stop()
    go_on(experiment, fastdist)
    verdict = experiment.judge(f"a worker is killed while writes fail ({durability})", bound=in_flight(DELIVERY, 1))
    assert verdict.duplicates == 0
    assert f"{os.strerror(code)}" in fastdist.output
    assert fastdist.stats()["workers"][0]["restarts"] == 1


def lose_headers(path: Path) -> None:
    with path.open("r+b") as file:
        for copy in (0, SECOND_COPY):
            file.seek(copy)
            file.write(bytes(128))


def test_lost_headers_heal_with_next_sync(experiment, faults):
    """A worker that is killed after that has a successor which finds all there is."""
    fastdist, _ = queued(experiment, faults)
    file = experiment.data / "ring-0.fdq"
    lose_headers(file)
    experiment.emitter(connections=4).start().wait_for(50).stop()
    magic = b"fdring"
    wait_until(lambda: all(file.read_bytes()[copy:].startswith(magic) for copy in (0, SECOND_COPY)), "both are written")
    kill_the_worker(fastdist)
    wait_for_restarts(fastdist, 1)
    go_on(experiment, fastdist)
    experiment.judge("both headers are lost, packets come, a worker is killed", bound=in_flight(DELIVERY, 1))


def test_headers_are_lost_in_use(experiment, faults):
    """A worker that is killed has no successor then, until it gets a new ring; the old one is set aside."""
    fastdist, accepted = queued(experiment, faults)
    (pid,) = fastdist.worker_pids()
    os.kill(pid, signal.SIGSTOP)  # else it may write them again
    lose_headers(experiment.data / "ring-0.fdq")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "set aside" in fastdist.output, "it is set aside")
    go_on(experiment, fastdist)
    assert len(list(experiment.data.glob("ring-0.fdq.damaged-*"))) == 1
    experiment.judge("both headers are lost, and a worker is killed", may_lose=accepted, corrupt=True)
    assert fastdist.stats()["packets"]["corrupt"] == len(accepted)
    kill_the_worker(fastdist)
    wait_for_restarts(fastdist, 4)
    go_on(experiment, fastdist)
    experiment.judge("and once more", may_lose=accepted, corrupt=True, bound=in_flight(DELIVERY, 1))
    assert fastdist.stats()["packets"]["corrupt"] == len(accepted)


def unreadable(file: Path) -> tuple[list[int], set[str]]:
    """Return pages with packets, in two places of the ring, and the names of the packets on them."""
    found = list(places(file))
    pages = [place.offset // PAGE * PAGE for place in (found[20], found[len(found) // 2])]
    pages.append(pages[-1] + PAGE)
    touched = {place.name for place in found for page in pages if page - place.size < place.offset < page + PAGE}
    assert len(touched) < len(found) // 2
    return pages, touched


@pytest.mark.parametrize("part", ["data", "a header copy"])
def test_pages_become_unreadable_in_use(experiment, faults, part):
    """The worker dies by it (here it is killed). No successor touches these pages; all other packets are delivered."""
    fastdist, _ = queued(experiment, faults)
    file = experiment.data / "ring-0.fdq"
    pages, touched = unreadable(file) if part == "data" else ([SECOND_COPY], set())
    faults.spoil(file, pages)
    kill_the_worker(fastdist)
    wait_until(
        lambda: "cannot be read in part" in fastdist.output and "set aside" in fastdist.output, "it is set aside"
    )
    go_on(experiment, fastdist)
    (aside,) = experiment.data.glob("ring-0.fdq.damaged-*")
    experiment.judge(f"{part} cannot be read", may_lose=touched, corrupt=True, bound=in_flight(DELIVERY, 1))
    assert f"at {pages[0]}" in fastdist.output
    assert f"Input/output error (errno {errno.EIO})" in fastdist.output
    assert "SIGSEGV" not in fastdist.output
    assert aside.stat().st_size == file.stat().st_size
    wait_until(lambda: not list(experiment.data.glob("adopt-*")), "what could be read has moved to the new ring")
    assert fastdist.stats()["packets"]["corrupt"] >= len(touched)


def test_start_with_unreadable_pages(experiment, faults):
    fastdist, _ = queued(experiment, faults)
    fastdist.kill_all()
    file = experiment.data / "ring-0.fdq"
    pages, touched = unreadable(file)
    faults.spoil(file, pages)
    command = [sys.executable, "-m", "fastdist", "queue", "verify", str(experiment.data)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | faults.environment, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"Input/output error (errno {errno.EIO})" in done.stdout
    assert str(pages[0]) in done.stdout
    fastdist = experiment.serve(SETTINGS, **faults.environment)
    go_on(experiment, fastdist)
    assert len(list(experiment.data.glob("ring-0.fdq.damaged-*"))) == 1
    experiment.judge("a start with pages that cannot be read", may_lose=touched, bound=in_flight(DELIVERY, 1))


def test_file_is_cut_in_use(experiment, faults):
    """To read on in the mapping ends the worker by SIGBUS, as an error of the disk does.

    Unless it has written marks before that: then the file has its length again, with zeros in between.
    """
    fastdist, _ = queued(experiment, faults)
    fastdist.kill_all()  # else all of them are still in the worker's memory
    fastdist = experiment.serve(SETTINGS, **faults.environment)
    fastdist.wait_for_states("offline")
    file = experiment.data / "ring-0.fdq"
    cut = HEADER_SIZE + 16 * PAGE
    touched = {place.name for place in places(file) if place.offset + place.size > cut}
    os.truncate(file, cut)
    experiment.mocks.set_all(refuse=False)
    wait_until(lambda: re.search("SIGBUS|damage in the queue", fastdist.output), "it dies by that, or finds zeros")
    go_on(experiment, fastdist)
    bound = twice_after_a_kill(DELIVERY, 1)
    verdict = experiment.judge("a queue's file is cut", may_lose=touched, corrupt=True, bound=bound)
    assert verdict.delivered > 100
