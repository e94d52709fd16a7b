"""What goes on all the time beside a stream, after a fault in it: nothing else would do it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from fastdist.settings import Jetstream
from fastdist.storage.jetstream import connection as connections
from fastdist.storage.jetstream import consumer as consumers
from fastdist.storage.jetstream.connection import Connection, forever
from fastdist.storage.jetstream.consumer import Claim, Consumer
from fastdist.worker.stream.waits import DeliveryNotices


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(connections, "AFTER_FAILURE", 0.01)


class Client:
    """A client whose subscriptions and messages are noted."""

    def __init__(self) -> None:
        self.max_payload, self.is_closed, self.discovered_servers = 1 << 20, False, []
        self.transport = SimpleNamespace(close=lambda: None)
        self.sent: list[tuple[str, bytes]] = []

    def new_inbox(self) -> str:
        return "_INBOX.x"

    def take(self, _subject: str, handler) -> None:
        self.received = handler

    def send(self, subject: str, data: bytes, _reply: str = "") -> None:
        self.sent.append((subject, data))

    async def close(self) -> None:
        self.is_closed = True


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (any condition)
            await asyncio.sleep(0.01)


def test_task_begins_again_until_it_ends():
    runs = []

    async def work():
        runs.append(1)
        if len(runs) < 3:
            raise KeyError("a fault")

    asyncio.run(asyncio.wait_for(forever_of(work), 20))
    assert len(runs) == 3


async def forever_of(work):
    await forever(work)


def test_consumer_goes_on_after_faults():
    """One in what says how much room there is, and one in what is told of a claim that is void."""

    async def run():
        faults = []

        def room():
            if len(faults) < 2:
                faults.append("room")
                raise KeyError("a fault")
            return 5

        def void(claims):
            faults.extend(["void"] * len(claims))
            raise KeyError("a fault")

        settings = Jetstream(ack_wait=1.5)
        consumer = Consumer(SimpleNamespace(add=lambda _part: None), settings, lambda *_: None, room, void)
        client = Client()
        consumer.connected(client)
        consumer.start()
        await until(lambda: any(".MSG.NEXT." in subject for subject, _ in client.sent))
        for sequence in (1, 2):
            reply = f"$JS.ACK.FASTDIST.fastdist.1.{sequence}.{sequence}.0.0"
            client.received(settings.subject, reply, b"", b"")
        await until(lambda: faults.count("void") == 2 and consumer.held == 0)  # no renewal was confirmed
        assert any(data == b"+WPI" for _, data in client.sent)

    asyncio.run(run())


def test_acknowledgements_do_not_pile_up(monkeypatch):
    """While no server is connected they wait, each once, however long that is."""

    async def run():
        monkeypatch.setattr(consumers, "CONFIRM_TIMEOUT", 0.001)
        monkeypatch.setattr(consumers, "SWEEP", 0.002)
        settings = Jetstream()
        consumer = Consumer(SimpleNamespace(add=lambda _part: None), settings, lambda *_: None, lambda: 0, print)
        claims = [Claim(sequence, 1, f"reply.{sequence}", 0.0) for sequence in range(1, 101)]
        for claim in claims:
            consumer.acknowledge(claim)
        consumer.start()
        await asyncio.sleep(0.5)  # hundreds of times until they are due again
        assert len(consumer._to_send) == len(claims)
        monkeypatch.setattr(consumers, "CONFIRM_TIMEOUT", 3600.0)
        client = Client()
        consumer.connected(client)
        await until(lambda: len(client.sent) >= len(claims))
        await asyncio.sleep(0.1)
        assert client.sent == [(claim.reply, b"+ACK") for claim in claims]

    asyncio.run(run())


def test_given_back_without_a_connection(monkeypatch):
    """Others have it as soon as there is one: also if its claim was renewed over the one before."""

    async def run():
        settings = Jetstream(ack_wait=60)
        consumer = Consumer(SimpleNamespace(add=lambda _part: None), settings, lambda *_: None, lambda: 5, print)
        first, second = Client(), Client()
        consumer.connected(first)
        consumer.start()
        reply = "$JS.ACK.FASTDIST.fastdist.1.1.1.0.0"
        claims = []
        monkeypatch.setattr(consumer, "_take", lambda claim, _data: claims.append(claim))
        first.received(settings.subject, reply, b"", b"")
        consumer._send(claims, "w")
        assert (reply, b"+WPI") in first.sent
        consumer.lost()
        consumer.give_back(claims[0])
        consumer.connected(second)
        await until(lambda: (reply, b"-NAK") in second.sent)

    asyncio.run(run())


def test_only_inboxes_are_told():
    """A message of the stream may name any subject."""
    connection, client = SimpleNamespace(add=lambda _part: None), Client()
    notices = DeliveryNotices(connection, "_INBOX.0123456789abcdef", print)
    notices.connected(client)
    inbox = notices.subject(17)
    for subject in (
        "x 0\r\n\r\nPUB y",
        inbox + "\r\n",
        inbox + " y",
        "FASTDIST.packets",
        "_INBOX." + 5000 * "x",
        inbox,
    ):
        notices.tell(subject, "A1")
    assert [subject for subject, _ in client.sent] == [inbox]


def test_fault_replaces_the_connection(monkeypatch):
    """In a part of it, while that is told of a new client."""

    async def run():
        it = Connection(Jetstream(), "test", is_quiet=True)
        clients: list[Client] = []

        async def try_all():
            clients.append(Client())
            it.client, it._ended = clients[-1], asyncio.Event()
            return []

        def connected(client):
            if client is clients[0]:
                raise KeyError("a fault")

        monkeypatch.setattr(it, "_try_all", try_all)
        it.add(SimpleNamespace(connected=connected, lost=lambda: None))
        it.keep()
        await asyncio.wait_for(it.wait(), 20)
        assert clients[0].is_closed
        assert it.client is clients[1]
        it._task.cancel()

    asyncio.run(run())


def test_fault_on_losing_one_brings_another(monkeypatch):
    """In a part of it, while that is told that a client is lost."""

    async def run():
        it = Connection(Jetstream(), "test", is_quiet=True)
        clients: list[Client] = []
        second = asyncio.Event()

        async def try_all():
            clients.append(Client())
            it.client, it._ended = clients[-1], asyncio.Event()
            return []

        def connected(client):
            if client is not clients[0]:
                second.set()

        def lost():
            if len(clients) == 1:
                raise KeyError("a fault")

        monkeypatch.setattr(it, "_try_all", try_all)
        it.add(SimpleNamespace(connected=connected, lost=lost))
        it.keep()
        await asyncio.wait_for(it.wait(), 20)
        it.drop()
        await asyncio.wait_for(second.wait(), 20)
        it._task.cancel()

    asyncio.run(run())
