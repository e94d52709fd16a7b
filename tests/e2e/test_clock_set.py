"""The wall clock is set while the service runs: spans are what they were, times are those of the clock as it is.

A preloaded library stands between the processes and their wall clock; the machine's own is left alone.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from datetime import UTC, datetime

import pytest
from support import Emitter, get_json, kill_worker, wait_until

HOUR, DAY = 3600, 86_400
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static int (*real)(clockid_t, struct timespec *);
static volatile long long *set_by;
int clock_gettime(clockid_t id, struct timespec *t) {
    if (!real) {
        int fd = open(getenv("SET_BY"), O_RDONLY);
        set_by = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        real = dlsym(RTLD_NEXT, "clock_gettime");
    }
    int result = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += *set_by;
    return result;
}
"""


class Clock:
    """The wall clock of processes that are started with ``environment``."""

    def __init__(self, folder):
        self.file = folder / "set-by"
        self.file.write_bytes(bytes(8))
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler")
        library = folder / "clock.so"
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=SHIM, text=True, check=True)
        self.environment = {"LD_PRELOAD": str(library), "SET_BY": str(self.file)}

    def set_by(self, seconds):
        with self.file.open("r+b") as file:
            file.write(struct.pack("q", seconds))

    def says(self, iso):
        """Whether a time is the present one, by this clock."""
        (offset,) = struct.unpack("q", self.file.read_bytes())
        return abs(datetime.fromisoformat(iso).astimezone(UTC).timestamp() - offset - time.time()) < HOUR


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path)


def start(serve, mocks, clock):
    settings = {"server": {"workers": 1}, "queue": {"durability": "disk", "capacity": "8MiB"}}
    return serve(mocks, settings, **clock.environment)


def check_spans(fastdist):
    stats, queue = fastdist.stats(), get_json(fastdist.port, "/queue")
    assert 0 < stats["uptimeSeconds"] < HOUR
    assert 0 <= queue["oldestAgeSeconds"] < HOUR
    assert (stats["latencyMs"]["queueWait"]["max"] or 0) < HOUR * 1000


@pytest.mark.parametrize("days", [30, -1, -20_000])
def test_setting_the_clock_changes_no_span(mocks, serve, clock, days):
    mocks.set_all(refuse=True)
    fastdist = start(serve, mocks, clock)
    fastdist.wait_for_states("offline")
    before = Emitter(fastdist.port, prefix="before").send(20)
    clock.set_by(days * DAY)
    after = Emitter(fastdist.port, prefix="after").send(20)
    check_spans(fastdist)
    (victim,) = fastdist.worker_pids()
    kill_worker(victim)
    wait_until(lambda: fastdist.worker_pids() != [victim], "a successor, which reads the clock again")
    wait_until(lambda: get_json(fastdist.port, "/queue")["oldestAgeSeconds"] > 0, "it tells of the queue")
    check_spans(fastdist)
    mocks.set_all(refuse=False)
    fastdist.wait_at_rest()
    check_spans(fastdist)
    assert mocks.delivered() == dict.fromkeys(before.accepted | after.accepted, 1)


def test_times_follow_the_set_clock(mocks, serve, clock):
    mocks.set_all(refuse=True)
    fastdist = start(serve, mocks, clock)
    fastdist.wait_for_states("offline")
    Emitter(fastdist.port).send(5)
    clock.set_by(30 * DAY)
    mocks.set_all(refuse=False, status=400)
    fastdist.wait_for_states("online")
    dead_letters = wait_until(lambda: len(found := fastdist.dead_letters()) == 5 and found, "they are dead letters")
    assert all(
        clock.says(dead_letter[name]) for dead_letter in dead_letters for name in ("acceptedAt", "deadLetteredAt")
    )
    for row in fastdist.analyzers().values():  # which have come online since
        assert clock.says(row["since"])
        assert clock.says(row["health"]["lastCheck"])


def test_future_packets_have_age_0(mocks, serve, clock):
    mocks.set_all(refuse=True)
    fastdist = start(serve, mocks, clock)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(20)
    fastdist.kill_all()
    clock.set_by(-30 * DAY)
    successor = start(serve, mocks, clock)
    assert get_json(successor.port, "/queue")["oldestAgeSeconds"] == 0
    check_spans(successor)
    mocks.set_all(refuse=False)
    successor.wait_at_rest()
    check_spans(successor)
    assert mocks.delivered() == dict.fromkeys(emitter.accepted, 1)
