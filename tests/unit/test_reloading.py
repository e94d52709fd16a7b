"""A reload as the supervisor carries it out: whom it waits for, and what becomes of it when a worker cannot follow."""

from __future__ import annotations

import asyncio
import os

import pytest
from structlog.testing import capture_logs

from fastdist.config import load
from fastdist.errors import Fault
from fastdist.ipc import Action, Message, read_settings
from fastdist.supervisor import main
from fastdist.supervisor.differences import Difference

CONFIG = """
[server]
workers = 3
[queue]
path = "{folder}"
durability = "memory"
[dead_letters]
max_bytes = {max_bytes}
[[analyzers]]
id = "A1"
endpoint = "http://127.0.0.1:4001/"
weight = {weight}
"""


def heavier(before, after):
    """Return what a reload says that has changed the weight."""
    changed = Difference("analyzers[A1].weight", f"{before:.1f}", f"{after:.1f}")
    return main.Reloaded([changed], needs_restart=[], masked=[])


class Slot:
    """A worker that sends nothing; the test sends for it."""

    def __init__(self, name):
        self.name, self.alive, self.crashes, self.heard = name, True, False, []

    def send(self, message):
        self.heard.append(message.verb)
        return True


class Checker:
    """No checks."""

    def set_analyzers(self, analyzers):
        self.analyzers = analyzers


class Service:
    """A supervisor with three workers that the test plays; ``weight``: of the analyzer, as workers would read it."""

    def __init__(self, folder):
        self.file, self.folder = folder / "fastdist.toml", folder
        self.write(1)
        self.supervisor = main.Supervisor(load(self.file, {}, {}))
        self.supervisor.changes.begin()
        self.supervisor._write_settings()
        self.supervisor.health = Checker()
        self.slots = self.supervisor.processes.slots = [Slot(str(number)) for number in range(3)]

    def write(self, weight, max_bytes=0):
        self.file.write_text(CONFIG.format(folder=self.folder, weight=weight, max_bytes=max_bytes))

    @property
    def weight(self):
        return read_settings(self.supervisor.settings).config.analyzers[0].weight

    async def begin(self, weight, max_bytes=0):
        """Begin a reload with these settings; return its task when the workers were told."""
        self.write(weight, max_bytes)
        task = asyncio.create_task(self.supervisor._reload("127.0.0.1"))
        await self.told(1)
        return task

    async def told(self, times):
        """Wait until each was told to reload so many times."""
        while any(slot.heard.count("reload") < times for slot in self.slots):  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def says(self, number, verb, body=None):
        generation = read_settings(self.supervisor.settings).generation
        self.supervisor._heard(self.slots[number], Message(verb, id=generation, body=body))


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path)
    yield service
    os.close(service.supervisor.settings)
    os.close(service.supervisor.block.fd)


def test_reload_waits_for_no_ended_worker(service):
    async def scenario():
        task = await service.begin(2)
        service.says(0, "reloaded")
        service.says(1, "gone")
        await asyncio.sleep(0.01)
        assert not task.done(), "one has yet to answer"
        service.says(2, "gone")
        return await task

    with capture_logs() as lines:
        assert asyncio.run(scenario()) == (200, heavier(1, 2))
    assert not any("not all workers" in line["event"] for line in lines)
    assert service.weight == 2


def test_requests_in_a_reload_share_the_next(service):
    """Each would take its time: a hundred signals, and no request is answered for seconds."""

    async def scenario():
        first = await service.begin(2)
        others = [asyncio.create_task(service.supervisor._reload(f"127.0.0.{n % 2}")) for n in range(50)]
        await asyncio.sleep(0)
        service.write(3)
        for times in (2, 3):
            for number in range(3):
                service.says(number, "reloaded")
            if times == 2:
                await service.told(times)
        results = await asyncio.gather(first, *others)
        assert results == [(200, heavier(1, 2)), *[(200, heavier(2, 3))] * 50]
        assert [slot.heard.count("reload") for slot in service.slots] == [2] * 3

    with capture_logs() as lines:
        asyncio.run(scenario())
    assert service.weight == 3
    done = [line["by"] for line in lines if line["event"] == "configuration reloaded"]
    assert done == [["127.0.0.1"], ["127.0.0.0", "127.0.0.1"]]


def test_change_a_worker_rejects_is_undone(service):
    async def scenario():
        task = await service.begin(2)
        assert service.weight == 2
        service.says(0, "reloaded")
        service.says(1, "reloaded", "security.tls_cert: x.pem cannot be loaded: Too many open files")
        service.says(2, "reloaded")
        await service.told(2)
        assert service.weight == 1
        for number in range(3):
            service.says(number, "reloaded")
        status, problems = await task
        assert status == 422
        assert problems == [Fault("worker 1: security.tls_cert: x.pem cannot be loaded: Too many open files")]
        assert service.supervisor.health.analyzers[0].weight == 1

        for slot in service.slots:
            slot.heard.clear()
        task = await service.begin(3)
        for number in range(3):
            service.says(number, "reloaded")
        assert (await task)[0] == 200
        assert service.weight == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(("fault", "status", "bound"), [("cannot", 422, 0), ("", 200, 1 << 20)])
def test_unconfirmed_bounds_discard_nothing(service, fault, status, bound):
    """What was discarded by the new settings is gone, also when a worker cannot use them and the old ones stay."""
    bounds = service.supervisor.dead_letters.bounds

    async def scenario():
        task = await service.begin(1, 1 << 20)
        assert bounds.max_bytes == 0
        for number in range(3):
            service.says(number, "reloaded", fault if number == 1 else "")
        if fault:
            await service.told(2)
            for number in range(3):
                service.says(number, "reloaded")
        assert (await task)[0] == status
        assert bounds.max_bytes == bound

    asyncio.run(scenario())


def test_late_workers_stay_known(service, monkeypatch):
    """Also those that could not, when the reload was over: they go by the settings before it."""
    monkeypatch.setattr(main, "APPLIED", 0.01)
    late = service.supervisor.late_workers

    async def scenario():
        task = await service.begin(2)
        service.says(1, "reloaded")
        assert (await task)[0] == 200
        assert late() == ["0", "2"]
        service.says(0, "reloaded")
        service.says(2, "reloaded", "too many open files")
        assert late() == ["2"]
        service.says(1, "reloaded", "one that was started meanwhile cannot either")
        assert late() == ["1", "2"]
        service.says(1, "gone")
        service.says(2, "reloaded")
        assert late() == []

        for slot in service.slots:
            slot.heard.clear()
        task = await service.begin(3)
        service.says(2, "gone")
        service.says(2, "reloaded", "its successor cannot either")
        service.says(1, "reloaded")
        assert (await task)[0] == 200
        assert late() == ["0", "2"]

    asyncio.run(scenario())


def test_worker_that_cannot_go_back_is_known(service):
    async def scenario():
        task = await service.begin(2)
        service.says(0, "reloaded")
        service.says(1, "reloaded", "cannot")
        service.says(2, "reloaded")
        await service.told(2)
        service.says(0, "reloaded", "cannot go back")
        service.says(1, "reloaded")
        service.says(2, "reloaded")
        assert (await task)[0] == 422
        assert service.supervisor.late_workers() == ["0"]

    asyncio.run(scenario())


def test_response_to_old_reload_is_ignored(service):
    async def scenario():
        task = await service.begin(2)
        late = Message("reloaded", id=service.supervisor.changes.generation - 1, body="could not")
        for slot in service.slots:
            service.supervisor._heard(slot, late)
        await asyncio.sleep(0.01)
        assert not task.done()
        for number in range(3):
            service.says(number, "reloaded")
        return (await task)[0]

    assert asyncio.run(scenario()) == 200


def test_failed_change_is_answered_as_well(service, monkeypatch):
    def fails(_action):
        raise ZeroDivisionError("of a test")

    said = []
    monkeypatch.setattr(service.supervisor.changes, "apply", fails)
    monkeypatch.setattr(
        service.slots[0], "send", lambda message: said.append((message.id, message.status)), raising=False
    )

    async def scenario():
        action = Action("clear", "A1")
        service.supervisor._heard(service.slots[0], Message("request", id=7, action=action))
        while service.supervisor._tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    with capture_logs() as lines:
        asyncio.run(scenario())
    assert said == [(7, 500)]
    assert isinstance(lines[-1]["exc_info"], ZeroDivisionError)
