"""A publisher's three outcomes, with clients that a test plays."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import msgspec
import pytest

from fastdist.protocols.base import Limits
from fastdist.settings import Jetstream
from fastdist.storage.jetstream.publisher import Publisher
from fastdist.stream_figures import StreamFigures
from fastdist.worker.stream.queue import ENVELOPE, StreamQueue

STORE_FAILED = {"stream": "S", "error": {"code": 503, "err_code": 10077, "description": "maximum bytes exceeded"}}


class Client:
    """A connection to a server; what was published can be replied to."""

    def __init__(self, max_payload: int = 1000) -> None:
        self.max_payload = max_payload
        self.sent: list[str] = []  # where each message is to be replied to

    def new_inbox(self) -> str:
        return "_INBOX.x"

    def take(self, _subject: str, handler) -> None:
        self.replied = handler

    def send(self, _subject: str, _message: bytes, reply: str, _message_id: str) -> None:
        self.sent.append(reply)

    def reply(self, number: int, answer: object) -> None:
        self.replied(self.sent[number], "", b"", msgspec.json.encode(answer))


def outcome_of(play, timeout: float = 5.0, waited: float = 0.0):
    """Return what becomes of a message of 500 bytes; ``play(publisher, clients)`` is what happens to it."""

    async def run():
        connection = SimpleNamespace(add=lambda _part: None, unsent=0, last_error="", drop=lambda: None)
        publisher = Publisher(connection, "S", "S.packets", timeout)
        client = Client()
        publisher.connected(client)
        outcome = asyncio.get_running_loop().create_future()
        publisher.store(bytes(500), "id", outcome.set_result, waited)
        play(publisher, client)
        return await outcome

    return asyncio.run(run())


def test_too_large_at_the_next_server():
    """The server before may have stored it."""

    def play(publisher, client):
        assert len(client.sent) == 1
        publisher.lost()
        publisher.connected(Client(max_payload=100))

    assert outcome_of(play).stored == "unknown"


def test_too_large_after_a_refusal():
    def play(publisher, client):
        client.reply(0, {"stream": "S", "error": {"code": 503, "err_code": 10008, "description": "busy"}})
        publisher.lost()
        publisher.connected(Client(max_payload=100))

    outcome = outcome_of(play)
    assert (outcome.stored, outcome.reason) == ("no", "tooLarge")


def test_what_waited_too_long_is_not_sent():
    def play(publisher, client):
        assert (client.sent, publisher.under_way, publisher.refusal) == ([], 0, "storage")

    outcome = outcome_of(play, waited=5.0)
    assert (outcome.stored, outcome.reason) == ("no", "storage")


def test_time_that_was_waited_is_taken_off():
    def play(_publisher, client):
        assert len(client.sent) == 1

    assert outcome_of(play, timeout=3600.0, waited=3599.9).stored == "unknown"


def test_full_stream_after_a_lost_reply():
    def play(publisher, _client):
        publisher.lost()
        again = Client()
        publisher.connected(again)
        again.reply(0, STORE_FAILED)

    assert outcome_of(play).stored == "unknown"


@pytest.mark.parametrize(
    ("capacity", "reason", "refusal"),
    [(0, "queueFull", "queueFull"), (10_000, "queueFull", "queueFull"), (500, "tooLarge", "")],
)
def test_larger_than_the_whole_stream(capacity, reason, refusal):
    """Room for it is not waited for."""

    def play(publisher, client):
        publisher.capacity = capacity
        client.reply(0, STORE_FAILED)
        assert publisher.refusal == refusal

    outcome = outcome_of(play)
    assert (outcome.stored, outcome.reason) == ("no", reason)


@pytest.mark.parametrize(("held", "lacking"), [(0, 0), (300, 300), (600, 600)])
def test_empty_stream_lacks_no_room(held, lacking):
    """Even if it refused what is larger than all of it, while that was not known."""
    stream = StreamFigures(at=2.0, capacity=600, bytes=held)
    publisher = SimpleNamespace(refusal="queueFull", refused_at=1.0, refused_bytes=700)
    queue = SimpleNamespace(publisher=publisher, block=SimpleNamespace(stream=stream))
    assert StreamQueue.lacking.fget(queue) == lacking


def test_what_is_made_here_fits_the_stream():
    """Packets of agents' records, and bundles: as large as the server and the whole stream take."""
    queue = SimpleNamespace(
        block=SimpleNamespace(stream=StreamFigures()),
        connection=SimpleNamespace(max_payload=8 << 20),
        publisher=SimpleNamespace(),
        outgoing=SimpleNamespace(),
        settings=Jetstream(bundle_bytes=9 << 20),
        _emitters=SimpleNamespace(agents=SimpleNamespace(limits=Limits(10 << 20, 10 << 20, 10 << 20))),
        _created="",
        _max_packet=10 << 20,
        _max_payload=0,
        _max_message=0,
    )
    for capacity, max_payload, largest in ((0, 8 << 20, 8 << 20), (1 << 20, 8 << 20, 1 << 20), (1 << 30, 0, 8 << 20)):
        queue.block.stream = StreamFigures(capacity=capacity)
        queue.connection.max_payload = max_payload
        StreamQueue.look(queue)
        assert queue.publisher.capacity == capacity
        assert queue.outgoing.bundle_bytes == queue._emitters.agents.limits.max_packet == largest - ENVELOPE


def test_a_fault_keeps_no_outcome_back():
    """Where what is told of one cannot act upon it."""

    async def run():
        connection = SimpleNamespace(add=lambda _part: None, unsent=0, last_error="", drop=lambda: None)
        publisher = Publisher(connection, "S", "S.packets", 0.2)
        publisher.connected(Client())
        outcomes = []

        def fail(_outcome):
            raise KeyError("a fault")

        for number, done in enumerate([outcomes.append, fail, outcomes.append, fail, outcomes.append]):
            publisher.store(b"x", str(number), done)
        while len(outcomes) < 3:  # noqa: ASYNC110  (any of them may be the last)
            await asyncio.sleep(0.01)
        assert [outcome.stored for outcome in outcomes] == ["unknown"] * 3
        assert publisher.under_way == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_only_unsent_bytes_end_a_connection():
    """Of the client that has the message."""

    async def run():
        drops = []
        connection = SimpleNamespace(add=lambda _part: None, unsent=7, last_error="", drop=lambda: drops.append(1))
        publisher = Publisher(connection, "S", "S.packets", 0.2)
        publisher.connected(Client())
        assert (await publisher.publish(bytes(500), "first")).stored == "unknown"
        assert drops == [1]
        second = asyncio.get_running_loop().create_task(publisher.publish(bytes(500), "second"))
        await asyncio.sleep(0)
        publisher.lost()
        publisher.connected(Client(max_payload=100))
        assert (await second).stored == "unknown"
        assert drops == [1]

    asyncio.run(asyncio.wait_for(run(), 20))
