"""A supervisor without processes, and all the troubles that docs/operations.md lists: how each comes about."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trustme

from fastdist.config import load
from fastdist.dead_letter_report import Count
from fastdist.dead_letter_report import Report as DeadLetterReport
from fastdist.http import stats
from fastdist.ipc import Pair
from fastdist.shm.block import AnalyzerWord, HeadWord, Step, WorkerState, WorkerWord
from fastdist.shm.snapshot import Snapshot
from fastdist.supervisor import main
from fastdist.supervisor.processes import CRASHES, WorkerSlot

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"
CONFIG = """
[server]
workers = 2
[queue]
path = "{folder}/data"
durability = "memory"
[[analyzers]]
id = "A1"
endpoint = "http://127.0.0.1:4001/"
weight = 1
[[analyzers]]
id = "A2"
endpoint = "http://127.0.0.1:4002/"
weight = 3
"""
WHOLE = 2**20  # bytes of a worker's part of the queue


class Manager:
    """A service manager that keeps the last line of status."""

    line = ""

    def status(self, text):
        self.line = text

    def reloading(self):
        class Nothing:
            async def __aenter__(self):
                pass

            async def __aexit__(self, *_):
                pass

        return Nothing()


class World:
    """A supervisor of two workers that run, as far as it can see, and two analyzers."""

    def __init__(self, folder: Path) -> None:
        (folder / "data").mkdir()
        self.folder, self.file = folder, folder / "fastdist.toml"
        self.file.write_text(CONFIG.format(folder=folder))
        self.supervisor = main.Supervisor(load(self.file, {}, {}))
        self.block, self.changes = self.supervisor.block, self.supervisor.changes
        self.supervisor.manager = self.manager = Manager()
        self.block.head[HeadWord.STARTED_NS] = time.monotonic_ns()
        self.block.head[HeadWord.CLOCK_OFFSET_NS] = time.time_ns() - time.monotonic_ns()
        self.changes.begin()
        for index in range(2):
            self.block.worker(index)[WorkerWord.STATE] = WorkerState.RUNNING
            self.block.rows[index].set("queue_capacity", WHOLE)
            slot = WorkerSlot(self.block, index, None, os.memfd_create("ring"), [])
            slot.ready = slot.ever_ready = True
            self.supervisor.processes.slots.append(slot)
        self.supervisor.processes.all_ready.set()

    def close(self) -> None:
        for slot in self.supervisor.processes.slots:
            os.close(slot.ring)
        os.close(self.supervisor.settings)
        os.close(self.block.fd)

    def look(self) -> dict:
        """Have the supervisor list what is wrong; return what a worker then answers to GET /health."""
        self.supervisor.problems._list()
        return self.health()

    def health(self) -> dict:
        return msgspec.to_builtins(stats.health(self.snapshot()), str_keys=True)

    def snapshot(self) -> Snapshot:
        """Return what a worker sees."""
        return Snapshot(self.block, self.supervisor.config, self.changes.analyzers, "1.2.3")


def every_worker(word, value):
    def happens(world):
        for index in range(2):
            world.block.worker(index)[word] = value

    return happens


def offline(*slots):
    def happens(world):
        for slot in slots:
            world.block.analyzers.set_error(slot, "health check: HTTP 503")
            world.block.analyzers.go_offline(slot)

    return happens


def nearly_full(world):
    world.block.rows[1].set("queue_bytes", WHOLE * 9 // 10)


def refusing(world):
    for _ in range(world.supervisor.config.health.fall + 1):
        world.block.analyzers.delivery_refused(1)
    world.block.analyzers.set_error(1, "HTTP 422: no such index")


def missing(world):
    words = world.block.worker(1)
    words[WorkerWord.STATE], words[WorkerWord.END_STATUS], words[WorkerWord.END_NS] = WorkerState.STARTING, -9, 1


def crashing(world):
    processes = world.supervisor.processes
    for _ in range(CRASHES):
        processes._after_death(processes.slots[1], -9)


def counted(*names):
    def happens(world):
        for name in names:
            world.block.rows[0].add(name, 2)

    return happens


def full_disk(world):
    world.block.dead_letters = DeadLetterReport((Count("refused", "A1", 1),), size=100, available=10)


def lock_lost(world):
    world.block.head[HeadWord.FAILING] = int(Step.QUEUE_FILES)


def set_aside(world):
    (world.folder / "data" / "ring-0.fdq.damaged-1a2b3c4d").write_bytes(b"")


def bad_file(world):
    world.file.write_text(CONFIG.format(folder=world.folder).replace("weight = 3", "weight = -3"))
    assert asyncio.run(world.supervisor._reload("127.0.0.1"))[0] == 422


def late(world):
    """Have a worker be told of new settings, and not confirm them."""

    class Control:
        def is_closing(self):
            return False

        def write(self, data):
            pass

    class Process:
        returncode = None

    class Checker:
        def set_analyzers(self, analyzers):
            pass

    slot = world.supervisor.processes.slots[1]
    slot.control, slot.process, world.supervisor.health = Control(), Process(), Checker()
    before, main.APPLIED = main.APPLIED, 0.01
    try:
        assert asyncio.run(world.supervisor._reload("127.0.0.1"))[0] == 200
    finally:
        main.APPLIED = before


def bad_overrides(world):
    (world.folder / "data" / "overrides.json").write_text("{")
    world.changes.begin()


def expired(world):
    ends = datetime(2020, 1, 1, tzinfo=UTC)
    made = trustme.CA().issue_cert("emitters.example", not_before=datetime(2019, 1, 1, tzinfo=UTC), not_after=ends)
    world.changes.pair = Pair(made.cert_chain_pems[0].bytes(), made.private_key_pem.bytes())


def probation(world):
    world.block.analyzers.go_offline(1, by_deliveries=True)
    world.block.analyzers.set(1, AnalyzerWord.CHECK_SUCCESSES, world.supervisor.config.health.rise)


def draining(world):
    world.block.head[HeadWord.DRAINING] = 1


TROUBLES = {
    "storage_failing": every_worker(WorkerWord.STORAGE_FAULT, errno.EIO),
    "queue_full": every_worker(WorkerWord.LACKING, 1),
    "no_analyzer": offline(0, 1),
    "certificate_out_of_date": expired,
    "queue_nearly_full": nearly_full,
    "analyzer_offline": offline(1),
    "analyzer_refusing": refusing,
    "worker_missing": missing,
    "worker_restarting": crashing,
    "dead_letters_failing": every_worker(WorkerWord.DEAD_LETTERS_FAULT, errno.ENOSPC),
    "packets_dead_lettered": counted("refused", "exhausted"),
    "dead_letters_fill_disk": full_disk,
    "descriptors_short": every_worker(WorkerWord.FAILING, int(Step.CONNECTIONS | Step.ACCEPTING)),
    "upkeep_failing": every_worker(WorkerWord.FAILING, int(Step.OLD_RINGS)),
    "lock_lost": lock_lost,
    "queue_file_set_aside": set_aside,
    "reload_failed": bad_file,
    "settings_not_applied": late,
    "overrides_ignored": bad_overrides,
    "service_draining": draining,
    "restart_needed": lambda world: world.changes.succeeded(["server.port", "queue.capacity"]),
    "connections_lowered": lambda world: world.changes.lower_connections(500),
    "analyzer_probation": probation,
    "analyzer_paused": lambda world: world.block.analyzers.pause(1, time.monotonic_ns() + 10**12),
    "analyzer_draining": lambda world: world.block.analyzers.set(1, AnalyzerWord.DRAINING, 1),
    "records_damaged": counted("corrupt", "lost"),
    "requests_rejected": counted("queue_full", "malformed"),
}
STOPPING = ("service_draining", "storage_failing", "queue_full")  # what makes /ready a 503


def table() -> dict[str, str]:
    """Return {code: level} of the table in docs/operations.md."""
    section = OPERATIONS.read_text().partition("\n## Problems\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \| .+ \| .+ \|$", section, re.MULTILINE))
