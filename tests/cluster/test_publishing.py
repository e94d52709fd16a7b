"""Publishing: stored, not stored or unknown, and each is true."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from harness import ask, compare, contents, figures_until, in_loop, prepared, repeated, service, until
from nats_servers import MAX_PAYLOAD, Servers
from proxy import Proxy

from fastdist.storage.jetstream import publisher
from fastdist.storage.jetstream.figures import Watcher
from fastdist.storage.jetstream.publisher import Outcome


@in_loop
async def test_a_stored_message_has_a_sequence(one, name):
    async with service(one.settings(name)) as made:
        assert await made.publish("a", b"first") == Outcome("yes", 1)
        assert await made.publish("b", b"second") == Outcome("yes", 2)
        assert await contents(made.connection, name) == {1: ("a", b"first"), 2: ("b", b"second")}


@in_loop
async def test_an_id_is_stored_once_by_all(three, name):
    settings = three.settings(name)
    async with service(settings) as made, service(settings) as other:
        assert await made.publish("key", b"first") == Outcome("yes", 1)
        assert await other.publish("key", b"second") == Outcome("yes", 1, duplicate=True)
        results = await asyncio.gather(*(each.publisher.publish(b"x", "both") for each in (made, other) * 20))
        assert [outcome.duplicate for outcome in results].count(False) == 1
        assert {outcome.sequence for outcome in results} == {2}
        assert len(await contents(made.connection, name)) == 2


@in_loop
async def test_many_under_way_are_bounded(one, name):
    async with service(one.settings(name, publish_timeout=40)) as made:
        publishes = asyncio.gather(*(made.publish(f"m{number}") for number in range(2000)))
        most = waited = 0
        while not publishes.done():
            most = max(most, made.publisher.under_way)
            waited = max(waited, made.publisher.waiting)
            await asyncio.sleep(0)
        assert most == publisher.LIMIT
        assert waited > 0
        assert len(made.stored("yes")) == 2000
        assert sum((await compare(made)).values()) == 2000
        assert made.publisher.under_way == made.publisher.waiting == 0


@in_loop
async def test_bytes_under_way_are_bounded(one, name, monkeypatch):
    monkeypatch.setattr(publisher, "BYTES", 100_000)
    async with service(one.settings(name)) as made:
        await made.publish_all([f"m{number}" for number in range(20)], bytes(60_000))
        await made.publish("large", bytes(200_000))  # alone, however large
        assert len(made.stored("yes")) == 21


@in_loop
async def test_a_lost_reply_is_asked_for_again(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,))) as made:
        proxy.word, proxy.lose_replies = b'"seq"', 2
        assert await made.publish("a") == Outcome("yes", 1)  # and not as a duplicate: that was our own first
        assert proxy.lost == 2
        assert made.publisher.retries.keys() == {"unconfirmed"}
        assert made.publisher.retries["unconfirmed"] >= 2
        await compare(made)
    await proxy.stop()


@in_loop
async def test_duplicate_is_told_over_a_lost_reply(one, name):
    proxy = await Proxy(one.all[0].port).start()
    settings = one.settings(name)
    async with service(settings) as other, service(one.settings(name, servers=(proxy.url,))) as made:
        await other.publish("key")
        await made.publish("later")  # so that the sequence of "key" is known to be an old one
        proxy.word, proxy.lose_replies = b'"seq"', 1
        assert await made.publish("key") == Outcome("yes", 1, duplicate=True)
    await proxy.stop()


@in_loop
async def test_no_reply_in_time_is_unknown(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,), publish_timeout=1.5)) as made:
        proxy.word, proxy.lose_replies = b'"seq"', 1000
        outcome = await made.publish("a")
        assert (outcome.stored, outcome.reason) == ("unknown", "unconfirmed")
        proxy.lose_replies = 0
        assert await contents(made.connection, name) == {1: ("a", b"body")}
        assert await made.publish("a") == Outcome("yes", 1, duplicate=True)
    await proxy.stop()


@in_loop
async def test_without_a_server_nothing_is_sent(tmp_path, name):
    servers = Servers(tmp_path)
    async with service(servers.settings(name, publish_timeout=2), prepare=False) as made:
        for outcome in await made.publish_all(["a", "b"]):
            assert (outcome.stored, outcome.reason) == ("no", "storage")
            assert servers.all[0].url in outcome.detail
        try:
            servers.all[0].start()
            await made.connection.wait()
            await prepared(made.connection)
            assert (await made.publish("c")).stored == "yes"
            assert await contents(made.connection, name) == {1: ("c", b"body")}
        finally:
            servers.end()


@in_loop
async def test_a_lost_connection_loses_nothing(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,), publish_timeout=40)) as made:
        publishing = asyncio.gather(*(made.publish(f"m{number}") for number in range(3000)))
        for _ in range(3):
            last = len(made.outcomes)
            await until(lambda last=last: publishing.done() or len(made.outcomes) > last + 100, "progress")
            proxy.cut()
        await publishing
        assert len(made.stored("yes")) == 3000
        assert made.connection.reconnects >= 1
        await compare(made)
    await proxy.stop()


@in_loop
async def test_nothing_leaves_after_its_outcome(one, name):
    """What a server does not read is dropped with the connection, not sent when it reads again."""
    proxy = await Proxy(one.all[0].port).start()
    settings = one.settings(name, servers=(proxy.url,), publish_timeout=3)
    async with service(settings) as made, service(one.settings(name)) as other:
        proxy.open.clear()
        outcomes = await made.publish_all(["a", "b"], bytes(11_000_000))
        assert {outcome.stored for outcome in outcomes} <= {"unknown", "no"}
        proxy.open.set()
        await until(lambda: made.connection.is_connected, "another connection")
        assert (await made.publish("c")).stored == "yes"
        assert {message_id for message_id, _ in (await contents(other.connection, name)).values()} == {"c"}
        assert len(proxy.sent) < 11_000_000
    await proxy.stop()


@in_loop
async def test_full_stream_refuses_and_keeps_all(one, name):
    async with service(one.settings(name, max_bytes=2**20)) as made:
        await made.publish_all([f"m{number}" for number in range(40)], bytes(50_000))
        refused = [outcome for outcome in made.outcomes.values() if outcome.stored != "yes"]
        assert {(outcome.stored, outcome.reason) for outcome in refused} == {("no", "queueFull")}
        stored = made.stored("yes")
        assert 10 < len(stored) < 21
        await compare(made)
        made.consumer.start()
        await until(lambda: made.claims, "a claim")
        made.consumer.acknowledge(made.claims[0])
        await until(lambda: not made.consumer.unconfirmed, "a confirmation")
        assert (await made.publish("again", bytes(50_000))).stored == "yes"


@in_loop
async def test_room_is_known_to_the_byte(servers, name):
    """So that /ready and POST agree on whether there is room for what was refused."""
    settings = servers.settings(name, max_bytes=1 << 20)
    async with service(settings) as made:
        watcher = Watcher(made.connection)
        number = itertools.count()
        while (await made.publish(f"m{next(number)}", bytes(10_000))).stored == "yes":
            pass
        full = await figures_until(watcher, lambda it: it.capacity - it.bytes < made.publisher.refused_bytes)
        free = full.capacity - full.bytes
        spare = (
            made.publisher.refused_bytes - 10_000 - len(f"m{next(number)}") + 1
        )  # what a message takes beside its data
        assert (await made.publish("x", bytes(free - spare + 1))).reason == "queueFull"
        assert made.publisher.refused_bytes == free + 1
        assert (await made.publish("y", bytes(free - spare))).stored == "yes"
        await figures_until(watcher, lambda it: it.capacity == it.bytes)


@in_loop
async def test_full_after_a_lost_reply_is_not_no(servers, name):
    """The stream is full of what may be our own first one."""
    proxy = await Proxy(servers.all[0].port).start()
    settings = servers.settings(name, max_bytes=2**20, servers=(proxy.url,))
    async with service(servers.settings(name, max_bytes=2**20)) as other, service(settings, prepare=False) as made:
        proxy.word, proxy.lose_replies = b'"seq"', 1
        outcome = await made.publish("a", bytes(600_000))
        assert proxy.lost == 1
        assert outcome in {Outcome("yes", 1), Outcome("unknown", reason="unconfirmed", detail=outcome.detail)}
        assert await compare(made, other.connection) == {"a": 1}
    await proxy.stop()


@in_loop
async def test_the_last_refusal_is_remembered(one, name):
    async with service(one.settings(name, publish_timeout=2, max_bytes=2**20)) as made:
        await made.publish("a")
        assert (made.publisher.refusal, made.publisher.refused_at) == ("", 0)
        await made.publish_all(["b", "c"], bytes(600_000))
        assert made.publisher.refusal == "queueFull"
        await made.publish("d")
        assert made.publisher.refusal == ""
        await made.publish("e", bytes(MAX_PAYLOAD))
        assert made.publisher.refusal == ""
        await ask(made.connection, f"STREAM.DELETE.{name}")
        before = made.publisher.refused_at
        await made.publish("f")
        assert made.publisher.refusal in {"storage", "unconfirmed"}
        assert made.publisher.refused_at > before


@in_loop
async def test_deleted_stream_is_not_made_again(one, name):
    async with service(one.settings(name, publish_timeout=2)) as made:
        await made.publish("a")
        await ask(made.connection, f"STREAM.DELETE.{name}")
        ids = (f"m{number}" for number in itertools.count())
        # What comes while it is being deleted may get no answer at all.
        outcome = await repeated(lambda: made.publish(next(ids)), lambda last: last.stored == "no", "a refusal")
        assert outcome.reason == "storage"
        assert "noResponder" in outcome.detail
        assert made.stored("yes") == {"a"}
        assert name not in ((await ask(made.connection, "STREAM.NAMES"))["streams"] or [])


@pytest.mark.parametrize("answer", [b"+OK", b'{"stream": "OTHER", "seq": 1}', b"{}"])
@in_loop
async def test_another_subscriber_stores_nothing(one, name, answer):
    """Only the stream's own answer counts."""
    async with service(one.settings(name, publish_timeout=0.3), prepare=False) as made:

        async def reply(message):
            await message.respond(answer)

        await made.connection.client.subscribe(made.settings.subject, cb=reply)
        assert (await made.publish("a")).stored == "unknown"


@in_loop
async def test_over_max_payload_is_not_sent(one, name):
    async with service(one.settings(name)) as made:
        fitting = MAX_PAYLOAD - publisher.HEADERS_BYTES - 1
        assert (await made.publish("b", bytes(fitting))).stored == "yes"
        outcome = await made.publish("a", bytes(fitting + 1))
        assert (outcome.stored, outcome.reason) == ("no", "tooLarge")
        assert str(MAX_PAYLOAD) in outcome.detail
        assert made.connection.reconnects == 0
        assert await compare(made) == {"b": 1}


@in_loop
async def test_a_cancelled_publish_leaves_no_trace(one, name):
    async with service(one.settings(name)) as made:
        tasks = [asyncio.create_task(made.publish(f"m{number}")) for number in range(1000)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await made.publish("after")).stored == "yes"
        assert made.publisher.under_way == made.publisher.waiting == 0
