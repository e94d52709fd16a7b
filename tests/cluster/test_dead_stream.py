"""``fastdist dead-letters`` for a stream: listed, replayed and purged from anywhere; a replay that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from harness import PATIENCE, contents, in_loop, repeated, service
from proxy import Proxy

from fastdist._core import Packet, scan
from fastdist.storage.dead_letter_format import as_line
from fastdist.storage.jetstream.message import decode
from fastdist.storage.jetstream.publisher import Publisher

BODY = b'{"emitterId":"web-1","messages":[{"message":"a"},{"message":"b"}]}'


def dead_letter(name, body=BODY, reason="refused"):
    return as_line(Packet(1, name, body, 7, 10**18, 2, 0, 0), reason, "A1", 422, "it says no")


@pytest.fixture
def command(tmp_path):
    """Return ``command(settings, verb, *options)``: run it to its end; return its status and what it has printed."""

    async def command(settings, verb, *options, program=("-m", "fastdist"), **environment):
        file = tmp_path / "fastdist.toml"
        servers = json.dumps(list(settings.servers))
        file.write_text(
            f'[queue]\nbackend = "jetstream"\n[jetstream]\nservers = {servers}\nstream = "{settings.stream}"\n'
            f'replicas = {settings.replicas}\nmax_bytes = {settings.max_bytes}\ndedup_window = "2m"\n'
        )
        words = [sys.executable, *program, "dead-letters", verb, "--config", str(file), *options]
        pipe = subprocess.PIPE
        running = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=os.environ | environment
        )
        out, err = await running.communicate()
        return running.returncode, out.decode(), err.decode()

    return command


async def fill(made, lines):
    """Store dead letters, as workers do."""
    dead = Publisher(made.connection, made.settings.dead_stream, made.settings.dead_subject, 5)
    dead.connected(made.connection.client)
    for number, line in enumerate(lines, 1):
        assert (await dead.publish(line, f"dead/{number}")).stored == "yes"


async def packets(made):
    """Return the packets of the stream."""
    held = await contents(made.connection, made.settings.stream)
    return [packet for _, data in held.values() for packet in decode(data)]


async def left(made):
    """Return the ids of dead letters that are in their stream."""
    held = await contents(made.connection, made.settings.dead_stream)
    return [json.loads(line)["id"] for _, line in held.values()]


@in_loop
async def test_dead_letters_are_listed_anywhere(one, name, command):
    async with service(one.settings(name)) as made:
        assert await command(made.settings, "list") == (0, "no dead letters\n", "")
        await fill(made, [dead_letter("first"), dead_letter("second", b"\xff", "exhausted"), b'{"id":"torn'])
        status, shown, errors = await command(made.settings, "list")
        assert (status, errors) == (0, "")
        lines = shown.splitlines()
        assert lines[1].split()[:5] == ["first", "refused", "A1", "422", "7"]
        assert lines[3].split()[:2] == ["-", "unreadable"]
        assert lines[4].startswith(f"2 dead letters and 1 unreadable line, {len(BODY) + 12} B, the oldest of 20")
        status, shown, _ = await command(made.settings, "list", "--json")
        first, second, torn = map(json.loads, shown.splitlines())
        assert first.pop("deadLetteredAt").endswith("Z")
        assert first == {
            "id": "first",
            "reason": "refused",
            "analyzer": "A1",
            "status": 422,
            "error": "it says no",
            "response": None,
            "attempts": 7,
            "messages": 2,
            "acceptedAt": "2001-09-09T01:46:40Z",
            "stream": f"{name}_DEAD",
            "sequence": 1,
            "bytes": len(BODY),
        }
        assert (second["id"], second["sequence"], second["bytes"]) == ("second", 2, 1)
        assert torn == {"id": None, "reason": "unreadable", "stream": f"{name}_DEAD", "sequence": 3, "bytes": 11}
        assert "1 dead letter, 1 B" in (await command(made.settings, "list", "--reason", "exhausted"))[1]


@in_loop
async def test_replay_keeps_ids_and_bytes(servers, name, command):
    """And is stored although the stream knows the packets' keys."""
    bodies = {f"p-{number}": BODY.replace(b"web-1", b"web-%d" % number) for number in range(150)}
    bodies |= {"binary": b"\xff\x00\xfe"}
    async with service(servers.settings(name)) as made:
        await made.publish_all(list(bodies))  # under their keys, and settled since
        for outcome in made.outcomes.values():
            await made.connection.client.request(
                f"$JS.API.STREAM.MSG.DELETE.{name}", json.dumps({"seq": outcome.sequence}).encode(), timeout=PATIENCE
            )
        await fill(made, [dead_letter(*each) for each in bodies.items()])
        assert await command(made.settings, "replay") == (0, f"replayed {len(bodies)}, refused 0, left 0\n", "")
        found = await packets(made)
        assert {packet.id: packet.body for packet in found} == bodies
        assert len(found) == len(bodies)
        assert {packet.attempts for packet in found} == {0}
        for packet in found:
            assert (packet.messages, packet.emitter) == (scan(packet.body) or (2, 0))
        assert await left(made) == []
        assert await command(made.settings, "replay") == (0, "no dead letters\n", "")


@in_loop
async def test_replay_selects_and_leaves_the_rest(one, name, command):
    async with service(one.settings(name)) as made:
        await fill(
            made, [dead_letter("a"), dead_letter("b", reason="exhausted"), b"torn", dead_letter("c"), dead_letter("d")]
        )
        status, shown, _ = await command(made.settings, "replay", "--reason", "refused", "--limit", "2")
        assert (status, shown) == (1, "replayed 2, refused 0, left 1\n")
        assert sorted(packet.id for packet in await packets(made)) == ["a", "c"]
        held = await contents(made.connection, f"{name}_DEAD")
        assert sorted(held) == [2, 3, 5]


KILLED = """
import os, signal, sys
from fastdist.cli import main
from fastdist.client.dead_letter_stream import DeadLetterStream

step, count = os.environ["STEP"], int(os.environ["COUNT"])

def counted(method):
    def call(*arguments):
        global count
        result = method(*arguments)
        count -= 1
        if not count:
            os.kill(os.getpid(), getattr(signal, os.environ.get("SIGNAL", "SIGKILL")))
        return result
    return call

if step == "published":  # and not removed yet
    DeadLetterStream.publish = counted(DeadLetterStream.publish)
else:
    DeadLetterStream.remove = counted(DeadLetterStream.remove)
main.main()
"""


@pytest.mark.parametrize("step", ["published", "removed"])
@in_loop
async def test_killed_replay_doubles_nothing(three, name, command, step):
    names = {f"p-{number}" for number in range(60)}
    async with service(three.settings(name)) as made:
        await fill(made, [dead_letter(each) for each in sorted(names)])
        for count in (1, 7, 20):
            status, *_ = await command(made.settings, "replay", program=("-c", KILLED), STEP=step, COUNT=str(count))
            assert status == -signal.SIGKILL
            known = Counter(packet.id for packet in await packets(made))
            assert known.keys() | set(await left(made)) == names  # nothing is lost at any moment
        status, shown, _ = await command(made.settings, "replay")
        assert (status, shown.endswith("left 0\n")) == (0, True)
        assert Counter(packet.id for packet in await packets(made)) == dict.fromkeys(names, 1)
        assert await left(made) == []


@in_loop
async def test_two_replays_store_each_packet_once(one, name, command):
    names = {f"p-{number}" for number in range(200)}
    async with service(one.settings(name)) as made:
        await fill(made, [dead_letter(each) for each in sorted(names)])
        results = await asyncio.gather(*(command(made.settings, "replay", "--connections", "8") for _ in range(2)))
        assert [status for status, *_ in results] == [0, 0]
        assert Counter(packet.id for packet in await packets(made)) == dict.fromkeys(names, 1)
        assert await left(made) == []


@in_loop
async def test_a_second_dead_letter_is_another(one, name, command):
    """The same packet, refused again after its replay: its message has another id."""
    async with service(one.settings(name)) as made:
        for round_ in (1, 2):
            dead = Publisher(made.connection, f"{name}_DEAD", made.settings.dead_subject, 5)
            dead.connected(made.connection.client)
            await dead.publish(dead_letter("p"), f"dead/{round_}")
            assert (await command(made.settings, "replay"))[0] == 0
            assert [packet.id for packet in await packets(made)] == ["p"] * round_


@in_loop
async def test_what_cannot_be_stored_stays(one, name, command):
    async with service(one.settings(name)) as made:
        large = dead_letter("large", b'"' + bytes([97]) * 11_900_000 + b'"')
        await fill(made, [dead_letter("a"), dead_letter("empty", b""), large])
        status, shown, errors = await command(made.settings, "replay")
        assert (status, shown) == (1, "replayed 2, refused 1, left 1\n")
        assert errors.startswith("refused empty: ")
        assert await left(made) == ["empty"]
        assert sorted(packet.id for packet in await packets(made)) == ["a", "large"]


@in_loop
async def test_a_replay_lasts_over_a_lost_server(three, name, command):
    names = {f"p-{number}" for number in range(300)}
    async with service(three.settings(name)) as made:
        await fill(made, [dead_letter(each) for each in sorted(names)])
        running = asyncio.create_task(command(made.settings, "replay", "--connections", "2"))
        await repeated(lambda: packets(made), bool, "a packet that was replayed")
        three.leader(name).kill()
        status, shown, errors = await running
        assert (status, shown) == (0, "replayed 300, refused 0, left 0\n"), errors
        assert Counter(packet.id for packet in await packets(made)) == dict.fromkeys(names, 1)
        assert await left(made) == []


@in_loop
async def test_purge_removes_what_is_selected(one, name, command):
    async with service(one.settings(name)) as made:
        await fill(made, [dead_letter("a"), dead_letter("b", reason="exhausted"), b"torn", dead_letter("c")])
        status, _, errors = await command(made.settings, "purge")
        assert (status, "say --yes" in errors) == (2, True)
        assert await command(made.settings, "purge", "--yes", "--older-than", "1h") == (
            0,
            "no dead letters removed\n",
            "",
        )
        assert (await command(made.settings, "purge", "--yes", "--reason", "refused"))[1] == "removed 2 dead letters\n"
        assert sorted(await contents(made.connection, f"{name}_DEAD")) == [2, 3]
        assert (await command(made.settings, "purge", "-y"))[1] == "removed 1 dead letter and 1 unreadable line\n"
        assert await contents(made.connection, f"{name}_DEAD") == {}


@in_loop
async def test_what_is_wrong_is_one_line(one, name, command):
    async with service(one.settings(name), prepare=False) as made:
        status, shown, errors = await command(made.settings, "list")
        assert (status, shown) == (3, "")
        [line] = errors.splitlines()
        assert line == (
            f"fastdist: jetstream: {one.all[0].url}: stream {name}_DEAD: stream not found: "
            "no fastdist has been started with it"
        )
        proxy = await Proxy(one.all[0].port).start()
        await proxy.stop()
        status, shown, errors = await command(one.settings(name, servers=(proxy.url,)), "replay")
        assert (status, shown) == (3, "")
        assert errors.startswith(f"fastdist: jetstream: {proxy.url}: ")
        assert len(errors.splitlines()) == 1


@in_loop
async def test_new_ones_are_left_for_later(one, name):
    """What is refused again while a command runs is not sent in circles."""
    from fastdist.client.dead_letter_stream import DeadLetterStream  # noqa: PLC0415  (needs the client's library)

    async with service(one.settings(name)) as made:
        await fill(made, [dead_letter("a"), dead_letter("b")])

        def look():
            with DeadLetterStream(made.settings) as store:
                lines = store.lines()
                first = next(lines).dead_letter.id
                asyncio.run_coroutine_threadsafe(later(), loop).result()
                return [first, *(line.dead_letter.id for line in lines)]

        async def later():
            dead = Publisher(made.connection, f"{name}_DEAD", made.settings.dead_subject, 5)
            dead.connected(made.connection.client)
            await dead.publish(dead_letter("c"), "dead/99")

        loop = asyncio.get_running_loop()
        assert await asyncio.to_thread(look) == ["a", "b"]
        assert await left(made) == ["a", "b", "c"]


@in_loop
async def test_ctrl_c_ends_it_in_good_order(one, name, command):
    names = {f"p-{number}" for number in range(400)}
    async with service(one.settings(name)) as made:
        await fill(made, [dead_letter(each) for each in sorted(names)])
        status, shown, errors = await command(
            made.settings, "replay", program=("-c", KILLED), STEP="removed", COUNT="50", SIGNAL="SIGINT"
        )
        assert (status, errors) == (1, "stopped: interrupted\n")
        stored, kept = Counter(packet.id for packet in await packets(made)), await left(made)
        assert shown == f"replayed {len(stored)}, refused 0, left {len(kept)}\n"
        assert stored == dict.fromkeys(names - set(kept), 1)
        assert (await command(made.settings, "replay"))[0] == 0
        assert Counter(packet.id for packet in await packets(made)) == dict.fromkeys(names, 1)
