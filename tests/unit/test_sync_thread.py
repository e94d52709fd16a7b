"""The thread that syncs, against a slow model: what is requested, what begins, what ends how, what is told."""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from operator import le
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sync_address, wait_until

from fastdist._core import SyncThread

CORE = Path(__file__).parents[2] / "src" / "fastdist" / "core"


def tasks() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def take_when_ready(thread: SyncThread) -> tuple[int, int]:
    assert select.select([thread.fileno()], [], [], 10)[0], "there is a result"
    return thread.take()


def test_a_file_is_synced(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        thread = SyncThread(file.fileno())
        assert thread.take() == (-1, 0)
        for position in (0, 5, 5, 2**62):
            thread.request(position)
            assert take_when_ready(thread) == (position, 0)
            assert thread.take() == (-1, 0)
            assert not select.select([thread.fileno()], [], [], 0)[0]
        thread.close()
        thread.close()
        thread.request(3)
        assert thread.take() == (-1, 0)


@pytest.mark.parametrize(("fd", "error"), [(-1, errno.EBADF), ("pipe", errno.EINVAL)])
def test_the_kernel_tells_what_is_wrong(fd, error):
    pipe = os.pipe()
    thread = SyncThread(pipe[1] if fd == "pipe" else fd)
    for _ in range(3):
        thread.request(1)
        assert take_when_ready(thread) == (-1, error)
    thread.close()
    for end in pipe:
        os.close(end)


def take_all(thread: SyncThread, expected: tuple[int, int]) -> None:
    """Take results, in parts perhaps, until they are those that are expected."""
    position, error = -1, 0
    end = time.monotonic() + 10
    while (position, error) != expected and not error and time.monotonic() < end:
        got, error = thread.take()
        position = max(position, got)
    assert (position, error) == expected


def test_positions_are_not_negative():
    thread = SyncThread(-1)
    with pytest.raises(ValueError, match="not negative"):
        thread.request(-1)
    thread.close()


class Disk:
    """A sync begins, and ends as it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self._begins, self._ends = threading.Semaphore(0), threading.Semaphore(0)
        self._error = 0

    def sync(self, _fd: int) -> int:
        self.begun += 1
        self._begins.release()
        assert self._ends.acquire(timeout=10)
        return self._error

    def wait_for_begin(self) -> None:
        assert self._begins.acquire(timeout=10)

    def end(self, error: int) -> None:
        self._error = error
        self._ends.release()


class Model:
    """What ``SyncThread`` is to do; ``running``: what the sync that runs covers."""

    def __init__(self) -> None:
        self.wanted: int | None = None
        self.running: int | None = None
        self.synced, self.error = -1, 0
        self.begun = 0

    def begin(self) -> bool:
        if self.wanted is None or self.running is not None or self.error:
            return False
        self.running, self.wanted = self.wanted, None
        self.begun += 1
        return True

    def end(self, error: int) -> None:
        if error:
            self.error = error
        else:
            self.synced = self.running
        self.running = None

    def take(self) -> tuple[int, int]:
        result = self.synced, self.error
        if self.error:
            self.wanted = None
        self.synced, self.error = -1, 0
        return result


@settings(max_examples=3 * settings().max_examples)
@given(st.lists(st.sampled_from(["request", "request", "succeed", "fail", "take"])))
def test_thread_does_what_the_model_says(steps):
    disk, model = Disk(), Model()
    thread = SyncThread(7, sync_address(disk.sync))

    def end(error: int) -> None:
        model.end(error)
        disk.end(error)

    for number, step in enumerate(steps):
        if step == "request":
            model.wanted = number
            thread.request(number)
        elif step == "take":
            take_all(thread, model.take())
        elif model.running is not None:
            end(errno.EIO if step == "fail" else 0)
        if model.begin():
            disk.wait_for_begin()
        assert disk.begun == model.begun
    while model.running is not None:
        end(0)
        if model.begin():
            disk.wait_for_begin()
    thread.close()
    assert (thread.take(), disk.begun) == (model.take(), model.begun)


def test_signals_are_for_other_threads():
    before = tasks()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    thread = SyncThread(-1)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    (task,) = tasks() - before
    status = Path(f"/proc/self/task/{task}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        assert blocked >> (number - 1) & 1, number
    thread.close()
    wait_until(lambda: task not in tasks(), "the thread has ended")


HANGS = """
import ctypes, sys
from fastdist._core import SyncThread
pause = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p).value  # a disk that never answers
kept = SyncThread(0, pause)
kept.request(1)
thrown_away = SyncThread(0, pause)
thrown_away.request(1)
del thrown_away
idle = SyncThread(0)
del idle
print("end")
"""


def test_process_ends_with_a_hanging_sync():
    done = subprocess.run([sys.executable, "-c", HANGS], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_threads_that_are_thrown_away_end():
    def used() -> tuple[int, int]:
        return len(tasks()), len([*Path("/proc/self/fd").iterdir()])

    gc.collect()  # what other tests have left is not to go meanwhile
    before = used()
    for _ in range(20):
        SyncThread(-1).request(1)
        SyncThread(-1)
    wait_until(lambda: all(map(le, used(), before)), "threads and descriptors are gone")


RACES = r"""
#include "syncing.h"
#include <sched.h>
#include <stdio.h>

static int written, found, calls; /* plain words: what orders them is the thread's doing, or there is a race */

static int sync_(int fd) {
    found = written;
    return ++calls % 7 == 3 ? EIO : 0;
}
static int counts(int fd) {
    sched_yield();
    return __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) % 3 == 0 ? EIO : 0;
}

int main(void) {
    int error;
    fd_syncing *s = fd_syncing_start(-1, sync_);
    for (int i = 1; i <= 3000; i++) { /* one at a time: what was written before a request is seen by its sync */
        int64_t position;
        written = i;
        fd_syncing_request(s, i);
        do position = fd_syncing_take(s, &error);
        while (position < 0 && !error);
        if (found != i || (error ? position != FD_NOTHING : position != i)) return 1;
    }
    fd_syncing_end(s, 1);
    fd_syncing_release(s);
    s = fd_syncing_start(-1, counts);
    int64_t last = 0, failed = 0;
    for (int64_t i = 1; i <= 40000; i++) { /* as fast as can be: after a failure only new requests succeed */
        fd_syncing_request(s, i);
        if (i % 3) sched_yield();
        int64_t position = fd_syncing_take(s, &error);
        if (position >= 0) {
            if (position < last || position <= failed || position > i) return 2;
            last = position;
        }
        if (error) failed = i;
    }
    fd_syncing_end(s, 1);
    fd_syncing_take(s, &error);
    fd_syncing_release(s);
    for (int i = 0; i < 300; i++) { /* left alone, in whatever state */
        s = fd_syncing_start(-1, counts);
        for (int k = 0; k < i % 4; k++) fd_syncing_request(s, k);
        if (i % 3 == 0) fd_syncing_take(s, &error);
        fd_syncing_end(s, 0);
        fd_syncing_release(s);
    }
    puts("sound");
    return 0;
}
"""


@pytest.mark.processes
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_two_threads_race(tmp_path, sanitizer):
    source, program = tmp_path / "races.c", tmp_path / "races"
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1", "-pthread", f"-I{CORE}"]
    source.write_text("int main(void) { return 0; }")
    built = subprocess.run(["gcc", *flags, source, "-o", program], check=False, capture_output=True)
    if built.returncode or subprocess.run([program], check=False, capture_output=True).returncode:
        pytest.skip(f"no gcc with -fsanitize={sanitizer} that runs here")
    source.write_text(RACES)
    subprocess.run(["gcc", *flags, source, "-o", program], check=True)
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sound\n", "")
