"""Making the streams: together, once, and never over what another service has there."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from harness import ask, contents, in_loop, prepared, service
from nats_servers import Servers

from fastdist.errors import StartError
from fastdist.storage.jetstream import streams
from fastdist.storage.jetstream.api import ApiError, UnavailableError
from fastdist.storage.jetstream.connection import Connection
from fastdist.storage.jetstream.publisher import Outcome


@in_loop
async def test_what_is_made_is_as_documented(three, name):
    async with service(three.settings(name, ack_wait=7, dedup_window=60)) as made:
        stream = await ask(made.connection, f"STREAM.INFO.{name}")
        config = stream["config"]
        assert config["subjects"] == [f"{name}.packets"]
        assert (config["retention"], config["storage"], config["discard"]) == ("workqueue", "file", "new")
        assert (config["num_replicas"], config["max_bytes"], config["duplicate_window"]) == (3, 64 << 20, 60 * 10**9)
        assert (config["max_age"], config["max_msgs"]) == (0, -1)
        consumer = (await ask(made.connection, f"CONSUMER.INFO.{name}.fastdist"))["config"]
        assert (consumer["ack_policy"], consumer["ack_wait"]) == ("explicit", 7 * 10**9)
        assert (consumer["max_deliver"], consumer["max_ack_pending"], consumer["num_replicas"]) == (-1, -1, 3)
        dead = (await ask(made.connection, f"STREAM.INFO.{name}_DEAD"))["config"]
        assert dead["subjects"] == [f"{name}.dead"]
        assert (dead["retention"], dead["discard"], dead["num_replicas"]) == ("limits", "new", 3)
        bucket = (await ask(made.connection, f"STREAM.INFO.KV_{name}_STATE"))["config"]
        assert (bucket["max_msgs_per_subject"], bucket["num_replicas"], bucket["allow_direct"]) == (1, 3, True)
        keys = await made.connection.client.jetstream().key_value(f"{name}_STATE")  # a bucket to nats-py, too
        await keys.put("a", b"1")
        assert (await keys.get("a")).value == b"1"


@in_loop
async def test_several_make_them_at_once(three, name):
    settings = three.settings(name)
    made = [Connection(settings, f"test{number}") for number in range(6)]
    await asyncio.gather(*(each.start() for each in made))
    await asyncio.gather(*(prepared(each) for each in made))
    names = (await ask(made[0], "STREAM.NAMES", {"subject": f"{name}.packets"}))["streams"]
    assert names == [name]
    await asyncio.gather(*(each.close() for each in made))


@in_loop
async def test_a_second_start_changes_nothing(one, name):
    settings = one.settings(name)
    async with service(settings) as made:
        await made.publish("a")
        before = await ask(made.connection, f"STREAM.INFO.{name}")
        await streams.prepare(made.connection)
        after = await ask(made.connection, f"STREAM.INFO.{name}")
        assert (after["config"], after["created"]) == (before["config"], before["created"])
        assert await made.publish("a") == Outcome("yes", 1, duplicate=True)


@in_loop
async def test_sizes_and_times_are_updated(one, name):
    old = one.settings(name)
    async with service(old) as made:
        await made.publish("a")
    new = msgspec.structs.replace(old, max_bytes=128 << 20, dedup_window=240.0, ack_wait=11.0)
    async with service(new) as made:
        config = (await ask(made.connection, f"STREAM.INFO.{name}"))["config"]
        assert (config["max_bytes"], config["duplicate_window"]) == (128 << 20, 240 * 10**9)
        consumer = (await ask(made.connection, f"CONSUMER.INFO.{name}.fastdist"))["config"]
        assert consumer["ack_wait"] == 11 * 10**9
        assert await contents(made.connection, name) == {1: ("a", b"body")}


@in_loop
async def test_what_an_operator_added_stays(one, name):
    async with service(one.settings(name), prepare=False) as made:
        wanted = streams.stream_config(made.settings)
        await ask(
            made.connection,
            f"STREAM.CREATE.{name}",
            wanted | {"description": "ours", "metadata": {"team": "logs"}, "max_bytes": 32 << 20, "max_consumers": 5},
        )
        await streams.prepare(made.connection)
        config = (await ask(made.connection, f"STREAM.INFO.{name}"))["config"]
        assert config["max_bytes"] == 64 << 20
        assert (config["description"], config["max_consumers"]) == ("ours", 5)
        assert config["metadata"]["team"] == "logs"


DIFFERENCES = [
    ({"retention": "limits"}, "retention is limits, not workqueue"),
    ({"retention": "interest"}, "retention is interest, not workqueue"),
    ({"storage": "memory"}, "storage is memory, not file"),
    ({"discard": "old"}, "discard is old, not new"),
    ({"max_age": 3600 * 10**9}, "max_age is 3600000000000"),
    ({"max_msgs": 1000}, "max_msgs is 1000"),
    ({"max_msgs_per_subject": 10}, "max_msgs_per_subject is 10"),
    ({"max_msg_size": 1000}, "max_msg_size is 1000"),
    ({"no_ack": True}, "no_ack is True"),
]


@pytest.mark.parametrize(("changes", "difference"), DIFFERENCES, ids=lambda value: str(value)[:40])
@in_loop
async def test_a_stream_that_loses_is_refused(one, name, changes, difference):
    async with service(one.settings(name), prepare=False) as made:
        await ask(made.connection, f"STREAM.CREATE.{name}", streams.stream_config(made.settings) | changes)
        before = await ask(made.connection, f"STREAM.INFO.{name}")
        with pytest.raises(StartError) as caught:
            await streams.prepare(made.connection)
        server = one.urls[0]
        assert str(caught.value) == f"jetstream: {server}: stream {name} cannot be used: {difference}"
        assert (await ask(made.connection, f"STREAM.INFO.{name}"))["config"] == before["config"]


@in_loop
async def test_each_difference_is_named(three, name):
    async with service(three.settings(name), prepare=False) as made:
        other = {
            "name": name,
            "subjects": [f"{name}.orders", f"{name}.packets"],
            "retention": "limits",
            "storage": "memory",
            "discard": "old",
            "num_replicas": 1,
            "max_bytes": 1 << 20,
        }
        await ask(made.connection, f"STREAM.CREATE.{name}", other)
        with pytest.raises(StartError) as caught:
            await prepared(made.connection)
        assert str(caught.value).partition("cannot be used: ")[2].split("; ") == [
            f"subjects is {name}.orders and {name}.packets, not {name}.packets",
            "retention is limits, not workqueue",
            "storage is memory, not file",
            "discard is old, not new",
            "num_replicas is 1, not 3",
        ]
        assert (await ask(made.connection, f"STREAM.INFO.{name}"))["config"]["max_bytes"] == 1 << 20


@in_loop
async def test_a_subject_of_another_stream_is_said(one, name):
    async with service(one.settings(name), prepare=False) as made:
        await ask(made.connection, f"STREAM.CREATE.{name}ALL", {"name": f"{name}ALL", "subjects": [f"{name}.*"]})
        with pytest.raises(StartError, match=f"stream {name} cannot be made: subjects overlap"):
            await streams.prepare(made.connection)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"max_deliver": 5}, "max_deliver is 5, not -1"),
        ({"max_ack_pending": 1000}, "max_ack_pending is 1000, not -1"),
        ({"headers_only": True}, "headers_only is True"),
    ],
    ids=lambda value: str(value)[:40],
)
@in_loop
async def test_a_consumer_that_loses_is_refused(one, name, changes, difference):
    async with service(one.settings(name), prepare=False) as made:
        await ask(made.connection, f"STREAM.CREATE.{name}", streams.stream_config(made.settings))
        wanted = {"stream_name": name, "config": streams.consumer_config(made.settings) | changes}
        await ask(made.connection, f"CONSUMER.DURABLE.CREATE.{name}.fastdist", wanted)
        with pytest.raises(StartError) as caught:
            await streams.prepare(made.connection)
        assert f"consumer fastdist of stream {name} cannot be used: " in str(caught.value)
        assert difference in str(caught.value)


@in_loop
async def test_without_create_all_has_to_be_there(one, name):
    settings = one.settings(name, create=False)
    async with service(settings, prepare=False) as made:
        with pytest.raises(StartError, match=f"there is no stream {name}, and jetstream.create is false"):
            await streams.prepare(made.connection)
        with pytest.raises(ApiError):
            await ask(made.connection, f"STREAM.INFO.{name}")
    async with service(one.settings(name)):
        pass
    async with service(settings) as made:
        assert (await made.publish("a")).stored == "yes"


@in_loop
async def test_one_server_has_no_three_copies(one, name):
    async with service(one.settings(name, replicas=3), prepare=False) as made:
        with pytest.raises(StartError, match=r"for one server there is jetstream.replicas = 1"):
            await streams.prepare(made.connection)


@in_loop
async def test_first_start_waits_for_all_servers(tmp_path, name):
    """With two of three a stream of three copies cannot be made; when the third is there it is."""
    servers = Servers(tmp_path, 3)
    try:
        for server in servers.all[:2]:
            server.start()
        async with service(servers.settings(name, servers=servers.urls[:2]), prepare=False) as made:
            await made.connection.wait()
            with pytest.raises(UnavailableError):
                await streams.prepare(made.connection)
            servers.all[2].start()
            await prepared(made.connection)
            assert (await ask(made.connection, f"STREAM.INFO.{name}"))["config"]["num_replicas"] == 3
    finally:
        servers.end()
