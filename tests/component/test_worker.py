"""A worker's parts as it wires them, without the process: its upkeep, and what it does last."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import Counter, deque
from types import SimpleNamespace

import pytest
from agents_harness import Sent
from ingest_harness import Connection, post
from structlog.testing import capture_logs
from upstream_harness import until

from fastdist import ipc, logs
from fastdist._core import HEADER_SIZE, PacketRing, Retrying, Stream, file_size
from fastdist.config import load
from fastdist.ipc import Settings
from fastdist.shm.block import SharedBlock, Step, WorkerWord
from fastdist.storage.dead_letter_writer import PendingDeadLetter
from fastdist.storage.directory import OldRing, QueueFolder, ring_path
from fastdist.worker.drain import Drain
from fastdist.worker.ingest import IngestProtocol
from fastdist.worker.main import Assignment, Worker
from fastdist.worker.migrate import Migration
from fastdist.worker.queue import Queue

CAPACITY = 1 << 20


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Return ``build()``: make a worker whose queue is in ``tmp_path``; there is a loop."""
    monkeypatch.setattr(logs, "_limits", [])  # which it would leave to other tests
    opened = []

    def build(durability="disk"):
        environment = {"FASTDIST_QUEUE__PATH": str(tmp_path), "FASTDIST_QUEUE__DURABILITY": durability}
        block, settings = SharedBlock.create(1, 8), os.memfd_create("settings")
        config = load(None, environment, {"workers": 1}).config
        ipc.write_settings(settings, Settings(1, {each.id: slot for slot, each in enumerate(config.analyzers)}, config))
        folder = QueueFolder(tmp_path)
        folder.lock()
        (ring,) = folder.rings(1, CAPACITY)
        opened.extend([block.fd, settings, ring, *folder.held])
        assignment = Assignment(
            index=0, shared=block.fd, listener=-1, ring=ring, control=-1, settings=settings, old_rings={}
        )
        worker = Worker(assignment, asyncio.get_running_loop(), SimpleNamespace(is_closing=lambda: True))
        worker._server = SimpleNamespace(finish=lambda: None, close=lambda: None, busy=False, handed_on=False)
        return worker

    yield build
    for fd in opened:
        os.close(fd)


def dead_letter_of_an_old_ring():
    fd = os.memfd_create("old")
    os.ftruncate(fd, file_size(CAPACITY))
    ring = PacketRing(fd, CAPACITY)
    assert ring.push(b"{}", "p1")
    return PendingDeadLetter(ring, ring.claim(), "oversized", None, None, "larger than the queue takes now")


def test_dead_letters_survive_dispatch_error(build, monkeypatch):
    async def check():
        worker = build()
        dead_letter = dead_letter_of_an_old_ring()

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(worker.dispatcher.probation, "tick", fail)
        worker.dead_letter_writer.add(dead_letter)
        worker.dead_letter_writer.sync_soon()
        with capture_logs() as logs:
            worker.schedule.start()
            await until(lambda: not dead_letter.ring.undone, "dead letters are written")
            await until(lambda: worker.words[WorkerWord.FAILING], "the failure shows")
        assert worker.words[WorkerWord.FAILING] == Step.DELIVERIES
        assert [each["step"] for each in logs] == ["deliveries"]
        await worker._drain(0.0)

    asyncio.run(check())


def test_failed_dead_letters_delay_nothing(build, monkeypatch):
    async def check():
        worker = build()
        looked = []

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(worker.dead_letter_writer, "tick", fail)
        monkeypatch.setattr(worker.dispatcher.probation, "tick", looked.append)
        with capture_logs():
            worker.schedule.start()
            await until(lambda: worker.words[WorkerWord.FAILING], "the failure shows")
            before = len(looked)
            await until(lambda: len(looked) > before, "deliveries go on")
        assert worker.words[WorkerWord.FAILING] == Step.DEAD_LETTERS
        await worker._drain(0.0)

    asyncio.run(check())


@pytest.mark.parametrize("deleted", [False, True], ids=["a ring with a name", "a deleted ring"])
def test_dead_letters_are_finished_at_end(build, tmp_path, deleted):
    """Also where the worker's own ring has nothing to be saved: the dead letters may be of others."""

    async def check():
        worker = build()
        if deleted:
            ring_path(tmp_path, 0).unlink()
        dead_letter = dead_letter_of_an_old_ring()
        worker.dead_letter_writer.add(dead_letter)
        assert dead_letter.ring.undone == 1, "it is not synced yet"
        await worker._drain(time.monotonic())
        assert dead_letter.ring.undone == 0

    asyncio.run(check())


def test_no_dead_letter_after_the_end(build, tmp_path):
    """What was not written yet stays queued: what the upkeep wrote now, unsynced, would be a dead letter as well."""

    async def check():
        worker = build()
        worker.dead_letter_writer.syncing = True
        dead_letter = dead_letter_of_an_old_ring()
        worker.dead_letter_writer.add(dead_letter)
        worker.dead_letter_writer.syncing = False
        await worker._drain(time.monotonic())
        worker._write_dead_letters(time.monotonic_ns())
        assert dead_letter.ring.undone == 1
        assert not (tmp_path / "dead-letters").exists()

    asyncio.run(check())


def test_heartbeats_go_on_at_the_end(build, tmp_path, monkeypatch):
    """While what is left is written to the dead letters, and the event loop does nothing else."""
    monkeypatch.setattr("fastdist.storage.dead_letter_writer.AT_ONCE", 1)

    async def check():
        worker, shown = build(), []
        ring_path(tmp_path, 0).unlink()
        assert all(worker.queue.ring.push(b"{}") for _ in range(4))
        write = worker.dead_letter_writer.files.write

        def show(line):
            shown.append((worker.counters.get("undone"), worker.words[WorkerWord.HEARTBEAT_NS]))
            write(line)

        monkeypatch.setattr(worker.dead_letter_writer.files, "write", show)
        await worker._drain(time.monotonic())
        undone, heartbeats = zip(*shown, strict=True)
        assert undone[1:] == (3, 2, 1)
        assert sorted(set(heartbeats)) == list(heartbeats)

    asyncio.run(check())


def test_nothing_is_migrated_after_the_end(build, tmp_path):
    """The upkeep may run once more before the event loop ends: what it copied would be delivered from both rings."""

    async def check():
        worker = build()
        path = tmp_path / "adopt-1.fdq"
        with path.open("w+b") as file:
            os.truncate(path, file_size(CAPACITY))
            old = PacketRing(file.fileno(), CAPACITY)
            assert all(old.push(b"{}") for _ in range(3))
            worker.queue.migrations.append(Migration(OldRing(os.dup(file.fileno()), str(path))))
        await worker._drain(time.monotonic())
        for _ in range(2):
            worker._tend_old_rings()
        assert (worker.queue.ring.undone, worker.queue.undone) == (0, 3)

    asyncio.run(check())


def test_slow_batch_is_withdrawn_at_the_end(build, monkeypatch):
    """A disk that takes seconds for the rest of it is not waited for: none of it is delivered, and that is said."""

    async def check():
        worker = build()
        worker.intake.piece_bytes = 1
        service = SimpleNamespace(
            protocol=IngestProtocol, intake=worker.intake, emitters=worker.emitters, turns=deque()
        )
        batch, other = Connection(service), Connection(service)
        body = b"".join(b'{"message":"m","host":"%d"}\n' % n for n in range(9))
        batch.protocol.data_received(Sent("/ingest", body, ("Content-Type: application/x-ndjson",), 200).request())
        while worker.queue.ring.undone == 0:  # the conversion may take several slices
            worker.intake.go_on()
        other.protocol.data_received(post())
        assert worker.queue.ring.undone == 2
        monkeypatch.setattr("fastdist.worker.drain.LAST_RESPONSES", 0.0)
        await worker._drain(0.0)
        assert (batch.statuses, other.statuses) == ([503], [202])
        assert worker.counters.get("storage") == 1
        assert PacketRing(worker.queue.fd, private=True).undone == 1

    asyncio.run(check())


def test_open_end_is_waited_for_a_second(build):
    """All is said, and the emitter's end stays open: it may take 5 s to read its response, but not at the end."""

    async def check():
        worker = build()
        service = SimpleNamespace(
            protocol=IngestProtocol, intake=worker.intake, emitters=worker.emitters, turns=deque()
        )
        connection = Connection(service).send(b"no HTTP\r\n\r\n")
        assert (connection.statuses, connection.transport.closed) == ([400], False)
        drain = Drain(worker._server, worker.emitters, worker.dispatcher, worker.queue, lambda: 0)
        for seconds, closed in ((0.0, False), (0.5, False), (0.6, True)):
            connection.age(seconds)
            drain._close_finished(Counter())
            assert connection.transport.closed == closed
        await worker._drain(0.0)

    asyncio.run(check())


def test_unseen_files_keep_no_worker_closed(build, monkeypatch):
    """A write has failed once, and whether files have their names cannot be seen: a folder that may not be searched."""

    def unseen(_migrations):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    async def check():
        worker = build()
        monkeypatch.setattr(worker.queue.names, "look", unseen)
        worker._not_written(errno.ENOSPC)
        assert worker.intake.broken_storage == errno.ENOSPC
        monkeypatch.setattr(worker.queue, "_next_try", 0.0)
        with pytest.raises(PermissionError):
            worker._look_for_files()
        assert worker.intake.broken_storage == 0
        await worker._drain(0.0)

    asyncio.run(check())


def test_withdrawn_packet_is_not_waited_for(build, monkeypatch):
    """After a sync that failed: its emitter has had its response, and nothing more is counted for it."""
    monkeypatch.setattr(Queue, "want_sync", lambda _: None)

    async def check():
        worker = build("fsync")
        emitter = await ask(worker, "a", "Prefer: wait=60")
        assert set(worker.emitters.waiting) == {1}
        with capture_logs():
            worker._not_synced(OSError(errno.EIO, os.strerror(errno.EIO)))
        assert (await asyncio.get_running_loop().sock_recv(emitter, 10_000)).startswith(b"HTTP/1.1 503 ")
        assert worker.emitters.waiting == {}
        assert worker.counters.get("withdrawn") == 1
        emitter.close()
        await worker._drain(0.0)

    asyncio.run(check())


def test_damage_at_a_failed_sync_is_told(build, monkeypatch):
    """Of a packet that is older than what the sync would have covered."""
    monkeypatch.setattr(Queue, "want_sync", lambda _: None)

    async def check():
        worker = build("fsync")
        ring, loop = worker.queue.ring, asyncio.get_running_loop()
        position = ring.tail_position
        damaged = await ask(worker, "damaged", "Prefer: wait=60")
        ring.mark_synced(ring.sync_position)
        withdrawn = await ask(worker, "withdrawn", "Prefer: wait=60")
        with capture_logs():
            damage(worker, position)
            worker._not_synced(OSError(errno.EIO, os.strerror(errno.EIO)))
            assert (await loop.sock_recv(withdrawn, 10_000)).startswith(b"HTTP/1.1 503 ")
            assert set(worker.emitters.waiting) == {1}
            ring.claim()
            assert (await loop.sock_recv(damaged, 10_000)).startswith(b"HTTP/1.1 500 ")
        for connection in (damaged, withdrawn):
            connection.close()
        await worker._drain(0.0)

    asyncio.run(check())


# ---- packets that are damaged in the queue


async def ask(worker, name, *lines):
    """Post a packet on a connection of its own; return the other end of that once the packet is in the ring."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    Stream(worker.poller, theirs, "", IngestProtocol(worker.intake, worker.emitters))
    body = b'{"emitterId":"e","messages":[{"message":"m"}]}'
    head = "\r\n".join(
        ["POST /logs HTTP/1.1", "Host: h", f"Idempotency-Key: {name}", f"Content-Length: {len(body)}", *lines]
    )
    before = worker.queue.ring.undone
    ours.send(head.encode() + b"\r\n\r\n" + body)
    await until(lambda: worker.queue.ring.undone > before, "the packet is accepted")
    return ours


def damage(worker, position):
    """Damage a record where nothing of it is in memory any more."""
    worker.queue.ring.forget_kept()
    os.pwrite(worker.queue.fd, b"\xee" * 8, HEADER_SIZE + position + 90)  # key and body
    os.pwrite(worker.queue.fd, b"\xee" * 8, HEADER_SIZE + position)


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "unclaimed"])
def test_lost_packet_is_not_waited_for(build, claimed):
    async def check():
        worker = build()
        ring, loop = worker.queue.ring, asyncio.get_running_loop()
        kept = await ask(worker, "kept", "Prefer: wait=60")
        position = ring.tail_position
        lost = await ask(worker, "lost", "Prefer: wait=60")
        last = await ask(worker, "last", "Prefer: wait=60")
        assert set(worker.emitters.waiting) == {1, 2, 3}
        worker.dispatcher.retrying[1] = worker.dispatcher.retrying[2] = Retrying()
        handles = [ring.claim() for _ in range(3 if claimed else 1)]
        with capture_logs() as logs:
            damage(worker, position)
            if claimed:
                ring.discard(handles[1])
            else:
                assert ring.packet(ring.claim()).id == "last"
            answer = await loop.sock_recv(lost, 10_000)
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"application/problem+json" in answer
        assert b"packet lost was accepted, but is lost" in answer
        assert set(worker.emitters.waiting) == {1, 3}
        assert set(worker.dispatcher.retrying) == {1}
        assert worker.counters.get("lost") == 1
        assert len(logs) == 1
        worker.emitters.settled(3, "A1")
        assert (await loop.sock_recv(last, 10_000)).startswith(b"HTTP/1.1 200 ")
        with pytest.raises(BlockingIOError):
            kept.recv(1)
        for connection in (kept, lost, last):
            connection.close()
        await worker._drain(0.0)

    asyncio.run(check())
