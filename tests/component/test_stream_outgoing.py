"""Packets on their way to a stream: bundles, keys, answers in order, and batches of which a part is not stored."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_harness import Service, keyed, post

from fastdist.settings import Jetstream
from fastdist.storage.jetstream.message import decode
from fastdist.storage.jetstream.publisher import Outcome
from fastdist.worker.stream.outgoing import MAX_BUNDLES, MAX_MESSAGES, Outgoing

YES = Outcome("yes", 1)
NO = Outcome("no", reason="storage", detail="no server is connected")
UNKNOWN = Outcome("unknown", reason="unconfirmed")


class Stream:
    """A publisher whose messages are stored when a test says so."""

    def __init__(self) -> None:
        self.messages: list[tuple[list[str], str, asyncio.Future[Outcome]]] = []  # packets' ids, message id, outcome
        self.waited: list[float] = []

    def store(self, message: bytes, message_id: str, done, waited: float) -> None:
        self.waited.append(waited)
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda future: done(future.result()))
        self.messages.append(([packet.id for packet in decode(message)], message_id, future))

    @property
    def under_way(self) -> list[list[str]]:
        return [ids for ids, _, future in self.messages if not future.done()]


class Replica:
    """A service whose packets go to a ``Stream``."""

    def __init__(self, capacity=1 << 20, **settings) -> None:
        self.service = Service(capacity=capacity, replicated=True, remembers_keys=True)
        self.stream = Stream()
        self.fulls = 0
        self.outgoing = Outgoing(
            asyncio.get_running_loop(),
            self.service.ring,
            self.stream,
            Jetstream(**settings),
            self.service.counters,
            self._full,
        )
        self.service.emitters.shared = True
        self.service.intake.later = asyncio.get_running_loop().call_soon
        self.outgoing.serve(self.service.intake, self.service.emitters, lambda sequence: f"inbox.{sequence}")

    def _full(self) -> int:
        self.fulls += 1
        return 7

    async def go_on(self) -> None:
        self.outgoing.schedule()
        for _ in range(6):
            await asyncio.sleep(0)

    async def ask(self, data: bytes):
        connection = self.service.ask(data)
        await self.go_on()
        return connection

    async def settle(self, number: int, outcome: Outcome) -> None:
        self.stream.messages[number][2].set_result(outcome)
        await self.go_on()

    def count(self, field: str) -> int:
        return self.service.counters.get(field)


def statuses_of(connection) -> list[int]:
    return [int(part[:3]) for part in connection.written.split(b"HTTP/1.1 ")[1:]]


def answers_of(connection) -> list[tuple[int, dict]]:
    parts = connection.written.split(b"HTTP/1.1 ")[1:]
    return [(int(part[:3]), json.loads(part.split(b"\r\n\r\n", 1)[1])) for part in parts]


def test_keys_travel_alone():
    async def run():
        replica = Replica()
        connection = await replica.ask(keyed("a") + post() * 2 + keyed("b") + post())
        assert [len(ids) for ids in replica.stream.under_way] == [1, 2, 1, 1]
        assert [message[1] for message in replica.stream.messages][::2] == ["a", "b"]
        for number in (3, 2, 1):
            await replica.settle(number, YES)
            assert connection.written == b""
        await replica.settle(0, YES)
        assert [status for status, _ in answers_of(connection)] == [202] * 5
        assert (replica.count("stream_messages"), replica.count("stream_packets")) == (4, 5)

    asyncio.run(run())


def test_packets_wait_for_company():
    async def run():
        replica = Replica(bundle_packets=5)
        for _ in range(MAX_BUNDLES):
            await replica.ask(post())
        await replica.ask(post() * 3)
        assert [len(ids) for ids in replica.stream.under_way] == [1] * MAX_BUNDLES
        await replica.ask(post() * 2)  # it is full
        assert [len(ids) for ids in replica.stream.under_way] == [1] * MAX_BUNDLES + [5]
        await replica.ask(post() * 2)
        await replica.settle(0, YES)
        assert len(replica.stream.under_way) == MAX_BUNDLES
        await replica.settle(1, YES)
        assert [len(ids) for ids in replica.stream.under_way] == [5, 2]

    asyncio.run(run())


def test_time_in_the_ring_counts():
    """What waited until others had their outcome has so much less of its own time left."""

    async def run():
        replica = Replica()
        await replica.ask(b"".join(keyed(f"k{number}") for number in range(MAX_MESSAGES + 1)))
        while len(replica.stream.under_way) < MAX_MESSAGES:  # they are taken in parts, more of them on a busy machine
            await replica.go_on()
        assert len(replica.stream.under_way) == MAX_MESSAGES
        await asyncio.sleep(0.2)
        await replica.settle(0, NO)
        assert len(replica.stream.waited) == MAX_MESSAGES + 1
        assert replica.stream.waited[-1] >= 0.2

    asyncio.run(run())


def test_bundle_of_one():
    async def run():
        replica = Replica(bundle_packets=1)
        await replica.ask(post() * 4)
        assert [len(ids) for ids in replica.stream.under_way] == [1] * 4

    asyncio.run(run())


@pytest.mark.parametrize(
    ("outcome", "status", "word", "field"),
    [
        (NO, 503, "no", "storage"),
        (UNKNOWN, 503, "unknown", "unconfirmed"),
        (Outcome("no", reason="queueFull"), 503, "no", "queue_full"),
        (Outcome("no", reason="tooLarge", detail="over the server's max_payload, 9 B"), 413, None, "too_large"),
    ],
    ids=["no", "unknown", "full", "large"],
)
def test_what_is_not_stored_says_so(outcome, status, word, field):
    async def run():
        replica = Replica()
        connection = await replica.ask(keyed("a"))
        await replica.settle(0, outcome)
        ((seen, problem),) = answers_of(connection)
        assert (seen, problem.get("stored")) == (status, word)
        assert (replica.count("accepted"), replica.count(field)) == (0, 1)
        assert (b"Retry-After: 7" in connection.written) == (field == "queue_full")
        assert replica.service.ring.undone == 0

    asyncio.run(run())


def test_duplicate_is_counted_as_one():
    async def run():
        replica = Replica()
        connection = await replica.ask(keyed("a") + keyed("b"))
        await replica.settle(1, Outcome("yes", 1, duplicate=True))
        await replica.settle(0, YES)
        assert [document.get("duplicate") for _, document in answers_of(connection)] == [None, True]
        assert (replica.count("accepted"), replica.count("duplicates")) == (1, 1)
        assert replica.count("messages_accepted") == 2  # of the one packet

    asyncio.run(run())


def test_duplicate_of_a_client_that_left():
    async def run():
        replica = Replica()
        connection = await replica.ask(keyed("a"))
        connection.protocol.connection_lost(None)
        await replica.settle(0, Outcome("yes", 1, duplicate=True))
        assert replica.count("duplicates") == 1
        assert replica.service.ring.undone == 0

    asyncio.run(run())


@pytest.mark.parametrize("pipelined", [False, True])
def test_refusal_of_a_client_that_left(pipelined):
    async def run():
        replica = Replica()
        connection = await replica.ask(keyed("a") + keyed("b") * pipelined)
        connection.protocol.connection_lost(None)
        await replica.settle(pipelined, NO)
        if pipelined:
            await replica.settle(0, YES)
        assert (replica.count("accepted"), replica.count("storage")) == (int(pipelined), 1)
        assert (replica.service.ring.undone, replica.service.intake.held) == (0, 0)

    asyncio.run(run())


def test_refused_keys_are_answered_in_order():
    async def run():
        replica = Replica()
        connection = await replica.ask(keyed("a") + keyed("b") + keyed("c"))
        await replica.settle(1, NO)
        assert connection.written == b""
        await replica.settle(0, YES)
        assert statuses_of(connection) == [202, 503]
        await replica.settle(2, YES)
        assert statuses_of(connection) == [202, 503, 202]
        assert (replica.count("accepted"), replica.count("messages_accepted"), replica.count("storage")) == (2, 4, 1)

    asyncio.run(run())


def test_a_wait_is_named_in_the_message():
    async def run():
        replica = Replica()
        head = b"POST /logs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nPrefer: wait=9\r\n"
        body = post().split(b"\r\n\r\n", 1)[1]
        connection = await replica.ask(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        replica.service.emitters.settled(1, "A1")
        assert connection.written == b""
        await replica.settle(0, YES)
        assert answers_of(connection)[0][0] == 200

    asyncio.run(run())


def ndjson(records: int, size: int = 3000) -> bytes:
    body = b"".join(b'{"message":"%d %s"}\n' % (number, b"x" * size) for number in range(records))
    head = b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


@pytest.mark.parametrize("failing", [[0], [1], [2], [0, 1], [2, 0], [0, 2, 1], [1, 2]], ids=str)
def test_batch_is_whole_or_says_not(failing):
    """Whichever of its messages is not stored, and in whatever order that is known."""

    async def run():
        replica = Replica(bundle_packets=1)
        agents = replica.service.emitters.agents
        agents.limits = msgspec.structs.replace(agents.limits, max_packet=6000)
        connection = await replica.ask(keyed("a") + ndjson(3) + keyed("z"))
        for _ in range(20):
            await replica.go_on()
        packets = [number for number, (ids, _, _) in enumerate(replica.stream.messages) if ids not in (["a"], ["z"])]
        assert len(packets) == 3, connection.written
        for number in failing:
            await replica.settle(packets[number], UNKNOWN)
        for number, (_, _, future) in enumerate(replica.stream.messages):
            if not future.done():
                await replica.settle(number, YES)
        statuses = [int(part[:3]) for part in connection.written.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [202, 503, 202]
        assert replica.service.intake.held == 0

    asyncio.run(run())


@pytest.mark.parametrize("waits", [False, True], ids=["", "waits"])
@pytest.mark.parametrize("failing", [[number] for number in range(8)] + [[3, 0], [4, 1, 2], [*range(8)]], ids=str)
def test_large_batches_are_no_others(failing, waits):
    """What others send while one is stored is answered for its own, whichever message is not stored."""

    async def run():
        replica = Replica(capacity=1 << 22, bundle_packets=1)
        agents = replica.service.emitters.agents
        agents.limits = msgspec.structs.replace(agents.limits, max_packet=500_000)
        asked = {"o0": replica.service.ask(keyed("o0"))}
        line = b"Host: x\r\nPrefer: wait=60\r\n" if waits else b"Host: x\r\n"
        batch = replica.service.ask(ndjson(3, 400_000).replace(b"Host: x\r\n", line))
        for number in range(1, 5):
            asked[f"o{number}"] = replica.service.ask(keyed(f"o{number}"))
            await asyncio.sleep(0)
        for _ in range(20):
            await replica.go_on()
        names = [ids[0] for ids, _, _ in replica.stream.messages]
        assert len(names) == 8
        refused = {names[number] for number in failing}
        for number in [*failing, *range(8)]:
            if not replica.stream.messages[number][2].done():
                await replica.settle(number, NO if number in failing else YES)
        for sequence in tuple(replica.service.emitters.waiting):
            replica.service.emitters.settled(sequence, "A1")
        await replica.go_on()
        whole = refused <= asked.keys()
        assert statuses_of(batch) == [200 if whole else 503]
        assert {name: statuses_of(each) for name, each in asked.items()} == {
            name: [503 if name in refused else 202] for name in asked
        }
        assert (replica.service.intake.held, replica.service.ring.undone) == (0, 0)
        assert replica.service.emitters.waiting == {}
        assert replica.count("accepted") == 3 * whole + len(asked.keys() - refused)

    asyncio.run(run())


@pytest.mark.parametrize("size", [110_000, 130_000, 150_000, 154_000, 157_000, 190_000, 250_000])
def test_the_ring_is_free_when_all_is_stored(size):
    """Also where packets were moved to make room: the copies are of packets that are done."""

    async def run():
        replica = Replica()
        body = b'{"emitterId":"e","messages":[{"message":"%b"}]}' % (b"x" * size)
        for turn in range(3):
            connections = [await replica.ask(keyed(f"k{turn}-{number}", body)) for number in range(10)]
            for number, (_, _, future) in enumerate(replica.stream.messages):
                if not future.done():
                    await replica.settle(number, YES)
            assert connections[0].statuses == [202]
            assert (replica.service.ring.undone, replica.service.ring.room_lacking()) == (0, 0)

    asyncio.run(run())


@given(st.lists(st.sampled_from(["key", "plain", "batch", "pipelined", "yes", "last", "no", "unknown"]), max_size=40))
def test_every_packet_has_its_answer(steps):  # noqa: C901  (steps of all kinds)
    """What is answered 202 was stored; what was stored and nothing else is answered so."""

    async def run():  # noqa: C901
        replica = Replica(bundle_packets=3)
        asked, count = [], 0
        for step in steps:
            waiting = [number for number, (_, _, future) in enumerate(replica.stream.messages) if not future.done()]
            if step in ("key", "pipelined"):
                names = [f"k{count + each}" for each in range(1 if step == "key" else 3)]
                count += len(names)
                asked.append((await replica.ask(b"".join(map(keyed, names))), names))
            elif step == "plain":
                asked.append((await replica.ask(post()), [None]))
            elif step == "batch":
                asked.append((await replica.ask(ndjson(2)), [None]))
            elif waiting:
                outcome = {"no": NO, "unknown": UNKNOWN}.get(step, YES)
                await replica.settle(waiting[0 if step == "yes" else -1], outcome)
        for _ in range(200):
            waiting = [number for number, (_, _, future) in enumerate(replica.stream.messages) if not future.done()]
            if not waiting:
                break
            await replica.settle(waiting[0], YES)
        stored = {name for ids, _, future in replica.stream.messages if future.result().stored == "yes" for name in ids}
        for connection, names in asked:
            parts = connection.written.split(b"HTTP/1.1 ")[1:]
            assert len(parts) == len(names)
            for part, name in zip(parts, names, strict=True):
                if name is not None:
                    assert (part[:3] == b"202") == (name in stored)
                elif b'"packetId"' in part:
                    assert json.loads(part.split(b"\r\n\r\n", 1)[1])["packetId"] in stored
        assert (replica.service.intake.held, replica.service.ring.undone) == (0, 0)

    asyncio.run(run())
