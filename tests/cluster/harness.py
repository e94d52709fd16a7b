"""What tests of the stream have in common: a loop to run in, a service's parts, and what the stream really holds."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
from collections import Counter

import uvloop

from fastdist.storage.jetstream import streams
from fastdist.storage.jetstream.api import ApiError, UnavailableError, request
from fastdist.storage.jetstream.connection import Connection
from fastdist.storage.jetstream.consumer import Consumer
from fastdist.storage.jetstream.publisher import Publisher

PATIENCE = 400  # seconds after which a test hangs


def in_loop(test):
    """Run a test that is a coroutine."""

    @functools.wraps(test)
    def run(*arguments, **fixtures):
        uvloop.run(asyncio.wait_for(test(*arguments, **fixtures), PATIENCE))

    return run


async def until(condition, what):
    """Wait until something is so; a test that waits too long ends."""
    try:
        async with asyncio.timeout(120):
            while not (result := condition()):  # noqa: ASYNC110  (any condition)
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None
    return result


async def repeated(ask, condition, what):
    """Ask until what comes is so, and return it."""
    last = None
    try:
        async with asyncio.timeout(120):
            while not condition(last := await ask()):  # noqa: ASYNC110  (any condition)
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"never: {what}; last: {last}") from None
    return last


async def figures_until(watcher, condition):
    """Wait until the stream's figures are so."""
    return await repeated(watcher.refresh, condition, "such figures")


async def dead_letters_from(dead, first=1):
    """Return all dead letters from a sequence on, oldest first."""
    found = []
    while (each := await dead.next(first)) is not None:
        found.append(each)
        first = each.sequence + 1
    return found


class Service:
    """A connection with a publisher and a consumer, and the ledgers of both."""

    def __init__(self, settings, *, room=1000, keep=True):
        self.settings, self.room, self.keep = settings, room, keep
        self.connection = Connection(settings, "test")
        self.publisher = Publisher(self.connection, settings.stream, settings.subject, settings.publish_timeout)
        self.consumer = Consumer(self.connection, settings, self._take, self._room, self._void)
        self.outcomes = {}  # {message id: outcome}
        self.claims = []  # all that were handed out
        self.bodies = []  # of those
        self.voids = []

    def _take(self, claim, data):
        self.claims.append(claim)
        self.bodies.append(data)
        if not self.keep:
            self.consumer.acknowledge(claim)

    def _room(self):
        return self.room - self.consumer.held

    def _void(self, claims):
        self.voids += claims

    async def publish(self, message_id, data=b"body"):
        outcome = await self.publisher.publish(data, message_id)
        self.outcomes[message_id] = outcome
        return outcome

    async def publish_all(self, message_ids, data=b"body"):
        return await asyncio.gather(*(self.publish(message_id, data) for message_id in message_ids))

    def stored(self, answer):
        """Return the ids of messages with an outcome."""
        return {message_id for message_id, outcome in self.outcomes.items() if outcome.stored == answer}


@contextlib.asynccontextmanager
async def service(settings, *, prepare=True, **options):
    """Have a service connected, and the streams made."""
    made = Service(settings, **options)
    try:
        if not await made.connection.start() and prepare:  # a busy machine
            async with asyncio.timeout(60):
                await made.connection.wait()
        if prepare:
            await prepared(made.connection)
        yield made
    finally:
        await made.consumer.stop(0)
        await made.connection.close()


async def prepared(connection):
    """Make the streams, as soon as that is possible."""
    async with asyncio.timeout(120):
        while True:
            try:
                return await streams.prepare(connection)
            except UnavailableError:
                await asyncio.sleep(0.1)


async def patiently(ask):
    """Ask until there is an answer."""
    async with asyncio.timeout(120):
        while True:
            try:
                return await ask()
            except UnavailableError:
                await asyncio.sleep(0.1)


async def ask(connection, subject, body=None):
    """Ask JetStream until it answers."""
    return await patiently(lambda: request(connection.client, subject, body))


async def contents(connection, stream):
    """Return {sequence: (message id, data)} of all that is in a stream."""
    found, sequence = {}, 1
    while True:
        try:
            answer = await ask(connection, f"STREAM.MSG.GET.{stream}", {"seq": sequence, "next_by_subj": ">"})
        except ApiError:
            return found
        message = answer["message"]
        headers = base64.b64decode(message.get("hdrs", "")).decode()
        message_id = headers.partition("Nats-Msg-Id: ")[2].partition("\r\n")[0]
        found[message["seq"]] = message_id, base64.b64decode(message.get("data", ""))
        sequence = message["seq"] + 1


async def compare(made, connection=None):
    """Compare what publishes said with what the stream has; return how often each message is in it."""
    held = await contents(connection or made.connection, made.settings.stream)
    counts = Counter(message_id for message_id, _ in held.values())
    assert {message_id: counts[message_id] for message_id in made.stored("yes") if counts[message_id] != 1} == {}
    assert {message_id for message_id in made.stored("no") if counts[message_id]} == set()
    assert {message_id for message_id in made.stored("unknown") if counts[message_id] > 1} == set()
    for message_id in made.stored("yes"):
        assert held[made.outcomes[message_id].sequence][0] == message_id
    return counts
