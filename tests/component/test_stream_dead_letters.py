"""Dead letters on their way to their stream: stored, tried again, too large for it, given back at the end."""

from __future__ import annotations

import asyncio
import json
import os
import time

from fastdist._core import PacketRing, file_size, round_capacity
from fastdist.shm.block import SharedBlock
from fastdist.storage.dead_letter_writer import PendingDeadLetter
from fastdist.storage.jetstream.publisher import Outcome
from fastdist.worker.stream.dead_letters import TOO_LARGE_SECONDS, DeadLetterPublisher

FULL = Outcome("no", reason="queueFull", detail="maximum bytes exceeded")
TOO_LARGE = Outcome("no", reason="tooLarge", detail="over the server's max_payload, 9 B")


class Worker:
    """A worker's dead letters, and the stream they go to."""

    def __init__(self) -> None:
        fd = os.memfd_create("ring", os.MFD_CLOEXEC)
        capacity = round_capacity(1 << 20)
        os.ftruncate(fd, file_size(capacity))
        self.ring = PacketRing(fd, capacity, volatile=True)
        self.counters = SharedBlock.create(1, 64).rows[0]
        self.outcomes: dict[str, Outcome] = {}  # by a packet's id; of the others: yes
        self.stored: list[str] = []
        self.gone: list[int] = []
        self.publisher = DeadLetterPublisher(
            self, self.counters, lambda sequence: (sequence, 0, 7), lambda _ring, sequence: self.gone.append(sequence)
        )

    async def put(self, line: bytes, _sequence: int, _index: int, _stored_ns: int) -> Outcome:
        name = json.loads(line)["id"]
        outcome = self.outcomes.get(name, Outcome("yes", 1))
        if outcome.stored == "yes":
            self.stored.append(name)
        return outcome

    async def give_up(self, *names: str) -> None:
        for name in names:
            self.ring.push(b"{}", name)
            self.publisher.add(PendingDeadLetter(self.ring, self.ring.claim(), "refused", "A1", 422, "HTTP 422"))
        await asyncio.sleep(0.01)


def test_one_too_large_keeps_back_no_other():
    """Nor does it make the service unready: it is the only one that cannot be stored."""

    async def run():
        worker = Worker()
        worker.outcomes["large"] = TOO_LARGE
        await worker.give_up("large", "b")
        await worker.give_up("c")
        assert (worker.stored, worker.publisher.failed, worker.publisher.undone) == (["b", "c"], 0, 1)
        assert len(worker.gone) == 2
        del worker.outcomes["large"]
        worker.publisher.tick(time.monotonic_ns() + int(TOO_LARGE_SECONDS * 1e9) + 1)
        await asyncio.sleep(0.01)
        assert (worker.stored[-1], worker.publisher.undone, worker.ring.undone) == ("large", 0, 0)
        assert worker.counters.get("refused") == 3

    asyncio.run(run())


def test_unstored_are_given_back_at_the_end():
    async def run():
        worker = Worker()
        worker.outcomes |= {"a": FULL, "b": TOO_LARGE}
        await worker.give_up("a", "b")
        assert worker.publisher.failed
        worker.publisher.give_back()
        assert (worker.publisher.undone, worker.ring.undone, worker.gone) == (0, 2, [])
        assert {worker.ring.packet(worker.ring.claim()).id for _ in range(2)} == {"a", "b"}

    asyncio.run(run())


def test_the_end_awaits_those_under_way():
    async def run():
        worker = Worker()
        worker.ring.push(b"{}", "a")
        worker.publisher.add(PendingDeadLetter(worker.ring, worker.ring.claim(), "refused", "A1", 422, "HTTP 422"))
        worker.publisher.give_back()
        assert worker.publisher.undone == 1
        await asyncio.sleep(0.01)
        assert (worker.stored, worker.publisher.undone) == (["a"], 0)

    asyncio.run(run())
