"""What replicas share besides packets: dead letters, overrides, figures."""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import datetime

import pytest
from harness import Service, ask, dead_letters_from, figures_until, in_loop, prepared, service, until
from proxy import Proxy

from fastdist._core import Packet
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import as_line
from fastdist.storage.jetstream import figures as figures_module
from fastdist.storage.jetstream.api import UnavailableError
from fastdist.storage.jetstream.connection import now
from fastdist.storage.jetstream.dead_stream import DeadStream
from fastdist.storage.jetstream.figures import Watcher
from fastdist.storage.jetstream.state import ConflictError, StateBucket, Value


@contextlib.asynccontextmanager
async def dead_letters(settings):
    """A service with its stream of dead letters, which is a part of its connection."""
    made = Service(settings)
    dead = DeadStream(made.connection)
    try:
        await made.connection.start()
        await prepared(made.connection)
        yield made, dead
    finally:
        await made.connection.close()


async def lines(dead, first=1):
    return [(found.sequence, found.line) for found in await dead_letters_from(dead, first)]


@in_loop
async def test_dead_letters_are_seen_by_all(one, name):
    settings = one.settings(name)
    async with dead_letters(settings) as (_, dead), dead_letters(settings) as (_, elsewhere):
        assert await lines(elsewhere) == []
        for sequence in range(1, 4):
            assert (await dead.put(b'{"id":"p%d"}' % sequence, sequence)).stored == "yes"
        assert await lines(elsewhere) == [(number, b'{"id":"p%d"}' % number) for number in (1, 2, 3)]
        assert await lines(elsewhere, first=3) == [(3, b'{"id":"p3"}')]
        assert await elsewhere.remove(2)
        assert not await dead.remove(2)
        assert [sequence for sequence, _ in await lines(dead)] == [1, 3]


@in_loop
async def test_dead_letter_larger_than_a_message(one, name):
    """As a string in JSON a packet takes more than it did when it was accepted; that is compressed."""
    async with dead_letters(one.settings(name)) as (_, dead):
        body = json.dumps({"message": "\\" * (dead.connection.max_payload // 2 - 1000)}).encode()
        line = as_line(Packet(1, "p", body, 1, 10**18, 2, 0, 0), "refused", "A1", 422, None)
        assert len(body) < dead.connection.max_payload < len(line)
        assert (await dead.put(line, 1)).stored == "yes"
        assert await lines(dead) == [(1, line)]


@in_loop
async def test_a_dead_letter_is_that_of_the_files(one, name, tmp_path):
    packet = Packet(1, "id-1", b'{"a": "\xc3\xbc"}', 3, 10**18, 2, 0, 0)
    async with dead_letters(one.settings(name)) as (_, dead):
        files = DeadLetterFiles(tmp_path, "w")
        files.write(as_line(packet, "refused", "A1", 400, None))
        files.close()
        await dead.put(as_line(packet, "refused", "A1", 400, None), 1)
        [(_, line)] = await lines(dead)
        [file] = (tmp_path / "dead-letters").glob("*.ndjson")
        stored, written = json.loads(line), json.loads(file.read_bytes())
        assert stored | {"deadLetteredAt": ""} == written | {"deadLetteredAt": ""}
        assert stored["body"] == '{"a": "ü"}'


@in_loop
async def test_packets_dead_letter_is_stored_once(one, name):
    """Its worker was killed after it was stored, and before its message was settled."""
    settings = one.settings(name)
    async with dead_letters(settings) as (_, dead):
        assert not (await dead.put(b"{}", 7)).duplicate
        assert (await dead.put(b"{}", 7)).duplicate
        assert not (await dead.put(b"{}", 7, 1)).duplicate  # the next packet of a bundle
        assert not (await dead.put(b"{}", 71)).duplicate
        assert len(await lines(dead)) == 3


@in_loop
async def test_dead_letters_wait_for_their_stream(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with dead_letters(one.settings(name, servers=(proxy.url,), publish_timeout=30)) as (_, dead):
        proxy.word, proxy.lose_replies = b'"seq"', 1
        assert (await dead.put(b"{}", 1)).stored == "yes"
        proxy.cut()
        assert (await dead.put(b"{}", 2)).stored == "yes"
        assert len(await lines(dead)) == 2
    await proxy.stop()


@in_loop
async def test_full_dead_letters_are_refused(one, name):
    async with dead_letters(one.settings(name, max_bytes=1 << 20)) as (_, dead):
        outcomes = [await dead.put(bytes(300_000), sequence) for sequence in range(1, 5)]
        assert [outcome.stored for outcome in outcomes] == ["yes", "yes", "yes", "no"]
        assert len(await lines(dead)) == 3  # none was dropped to make room


@in_loop
async def test_overrides_are_shared(one, name):
    settings = one.settings(name)
    async with service(settings) as made, service(settings) as other:
        mine, its = StateBucket(made.connection), StateBucket(other.connection)
        assert await its.get("overrides") == Value()
        first = await mine.put("overrides", b"one")
        assert await its.get("overrides") == Value(b"one", first)
        second = await its.put("overrides", b"two", replaces=first)
        assert await mine.get("overrides") == Value(b"two", second)


@in_loop
async def test_of_two_changes_one_is_refused(one, name):
    settings = one.settings(name)
    async with service(settings) as made, service(settings) as other:
        mine, its = StateBucket(made.connection), StateBucket(other.connection)
        results = await asyncio.gather(
            mine.put("overrides", b"mine", replaces=0), its.put("overrides", b"its", replaces=0), return_exceptions=True
        )
        assert sorted(type(result) for result in results if not isinstance(result, int)) == [ConflictError]
        winner = b"mine" if isinstance(results[0], int) else b"its"
        assert (await mine.get("overrides")).data == winner


@in_loop
async def test_a_watch_sees_changes_over_a_loss(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with (
        service(one.settings(name)) as made,
        service(one.settings(name, servers=(proxy.url,)), prepare=False) as other,
    ):
        seen = []

        async def watch():
            async for value in StateBucket(other.connection).watch("overrides"):
                seen.append(value.data)  # noqa: PERF401  (it never ends)

        watching = asyncio.create_task(watch())
        bucket = StateBucket(made.connection)
        await until(lambda: seen == [b""], "that there is nothing")
        await bucket.put("overrides", b"one")
        await until(lambda: seen[-1] == b"one", "the first")
        proxy.cut()
        await bucket.put("overrides", b"two")
        await until(lambda: seen[-1] == b"two", "the second")
        assert len(seen) == 3
        watching.cancel()
    await proxy.stop()


@in_loop
async def test_without_a_server_nothing_is_shared(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,))) as made:
        await proxy.stop()
        await until(lambda: not made.connection.is_connected, "the loss")
        bucket = StateBucket(made.connection)
        with pytest.raises(UnavailableError):
            await bucket.get("overrides")
        with pytest.raises(UnavailableError):
            await bucket.put("overrides", b"")


@in_loop
async def test_without_its_bucket_nothing_is_put(one, name):
    async with service(one.settings(name), prepare=False) as made:
        with pytest.raises(UnavailableError, match="the bucket does not answer"):
            await StateBucket(made.connection).put("overrides", b"")
        with pytest.raises(UnavailableError, match="stream not found"):
            await StateBucket(made.connection).get("overrides")


@in_loop
async def test_figures_are_those_of_the_stream(three, name):
    settings = three.settings(name)
    async with service(settings, room=4) as made, dead_letters(settings) as (other, dead):
        watcher = Watcher(other.connection)
        await made.publish_all([f"m{number}" for number in range(10)], bytes(1000))
        made.consumer.start()
        await until(lambda: len(made.claims) == 4, "claims")
        made.room = 0
        made.consumer.acknowledge(made.claims[0])
        await dead.put(b"{}", 99)
        figures = await figures_until(
            watcher,
            lambda figures: (figures.messages, figures.in_flight, figures.replicas_current) == (9, 3, 3),
        )
        assert (figures.stored, figures.queued, figures.settled, figures.dead_letters) == (10, 6, 1, 1)
        assert 9000 < figures.bytes < 10_000
        assert figures.capacity == settings.max_bytes
        assert (figures.replicas_total, figures.has_leader) == (3, True)
        assert figures.leader == three.leader(name).name
        assert figures.server in three.urls
        assert figures.connected
        assert figures.error == ""
        oldest = await ask(other.connection, f"STREAM.MSG.GET.{name}", {"seq": 2})
        assert figures.oldest == datetime.fromisoformat(oldest["message"]["time"]).timestamp()


@in_loop
async def test_figures_say_why_they_are_old(one, name, monkeypatch):
    monkeypatch.setattr(figures_module, "TIMEOUT", 30.0)
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,))) as made:
        watcher = Watcher(made.connection)
        await made.publish("a")
        known = await watcher.refresh()
        assert known.stored == 1
        await ask(made.connection, f"STREAM.DELETE.{name}")
        figures = await watcher.refresh()
        assert (figures.connected, figures.has_leader, figures.error) == (True, False, "stream not found")
        assert (figures.stored, figures.at) == (1, known.at)
        assert (known.replicas_current, figures.replicas_current, figures.replicas_total) == (1, 0, 1)
        await proxy.stop()
        await until(lambda: not made.connection.is_connected, "the loss")
        figures = await watcher.refresh()
        assert (figures.connected, figures.error) == (False, "no server is connected")


@in_loop
async def test_consumer_electing_hides_no_message(one, name, monkeypatch):
    monkeypatch.setattr(figures_module, "TIMEOUT", 30.0)
    async with service(one.settings(name)) as made:
        watcher, ask_for = Watcher(made.connection), Watcher._info
        await made.publish("a")
        await watcher.refresh()

        async def info(self, subject):
            return UnavailableError("no leader") if subject.startswith("CONSUMER") else await ask_for(self, subject)

        monkeypatch.setattr(Watcher, "_info", info)
        await made.publish("b")
        figures = await watcher.refresh()
        assert (figures.stored, figures.queued, figures.in_flight, figures.error) == (2, 2, 0, "")


@in_loop
async def test_figures_are_renewed_by_themselves(one, name):
    async with service(one.settings(name)) as made:
        watcher = Watcher(made.connection)
        assert watcher.latest.at == 0
        running = asyncio.create_task(watcher.run())
        await until(lambda: watcher.latest.at, "figures")
        await made.publish("a")
        moment = now()
        await until(lambda: watcher.latest.at > moment, "newer ones")
        assert watcher.latest.stored == 1
        running.cancel()
