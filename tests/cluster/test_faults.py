"""Servers of a cluster that are killed, stopped and wiped under load: the ledgers say what became of messages."""

from __future__ import annotations

import asyncio
import signal

from harness import compare, contents, figures_until, in_loop, prepared, repeated, service, until

from fastdist.storage.jetstream.connection import Connection
from fastdist.storage.jetstream.figures import Watcher


async def publish_on(made, count, width=64):
    """Publish messages, ``width`` of them at once."""
    numbers = iter(range(count))

    async def one_after_the_other():
        for number in numbers:
            await made.publish(f"m{number}")

    await asyncio.gather(*(one_after_the_other() for _ in range(width)))


@in_loop
async def test_leader_killed_under_publishes(three, name):
    async with service(three.settings(name, publish_timeout=40)) as made:
        publishing = asyncio.create_task(publish_on(made, 3000))
        await until(lambda: len(made.outcomes) > 500, "first messages")
        leader = three.leader(name)
        leader.kill()
        await publishing
        assert len(made.stored("yes")) == 3000
        await compare(made)
        new = three.leader(name)
        assert new is not None
        assert new is not leader


@in_loop
async def test_leader_killed_with_a_short_timeout(three, name):
    """Publishes fail then, and what is said of them is true."""
    async with service(three.settings(name, publish_timeout=0.5)) as made:
        publishing = asyncio.create_task(publish_on(made, 1500, 32))
        await until(lambda: len(made.outcomes) > 300, "first messages")
        three.leader(name).kill()
        await publishing
        assert {outcome.reason for outcome in made.outcomes.values()} <= {"", "storage", "unconfirmed"}
        three.restore()
        await until(lambda: made.connection.is_connected, "a connection")
        await compare(made)


@in_loop
async def test_stopped_server_is_left(three, name):
    """One that takes bytes and says nothing, as behind a cable that was pulled."""
    knows_one = three.settings(name, servers=three.urls[:1], publish_timeout=40)  # and learns of the others
    async with service(three.settings(name)) as other, service(knows_one, prepare=False) as made:
        assert made.connection.server == three.urls[0]
        publishing = asyncio.create_task(publish_on(made, 2000))
        await until(lambda: len(made.outcomes) > 200, "first messages")
        three.all[0].signal(signal.SIGSTOP)
        await publishing
        assert made.connection.server != three.urls[0]
        assert made.connection.reconnects == 1
        assert len(made.stored("yes")) == 2000
        three.all[0].signal(signal.SIGCONT)
        await until(lambda: other.connection.is_connected, "a connection")
        await compare(made)


@in_loop
async def test_majority_lost_and_back(three, name):
    async with service(three.settings(name, publish_timeout=1)) as made:
        watcher = Watcher(made.connection)
        await publish_on(made, 100)
        figures = await figures_until(watcher, lambda it: it.replicas_current == 3)  # or one is being caught up with
        assert (figures.has_leader, figures.replicas_total) == (True, 3)
        leader = three.leader(name)
        for server in three.others(leader.name):
            server.signal(signal.SIGSTOP)
        outcomes = await made.publish_all([f"lost{number}" for number in range(20)])
        assert "yes" not in {outcome.stored for outcome in outcomes}
        await figures_until(watcher, lambda figures: not figures.has_leader)
        three.restore()
        await figures_until(watcher, lambda figures: figures.has_leader)
        await repeated(lambda: made.publish("after"), lambda outcome: outcome.stored == "yes", "a message stored")
        await compare(made)


@in_loop
async def test_a_server_comes_back_empty(three, name):
    async with service(three.settings(name)) as made:
        await publish_on(made, 200)
        lost = three.leader(name)
        lost.kill()
        lost.wipe()
        lost.start()
        three.wait()
        other = Connection(three.settings(name, servers=(lost.url,)), "other")
        assert await other.start()
        await prepared(other)
        assert len(await contents(other, name)) == 200
        await compare(made, other)
        await other.close()


@in_loop
async def test_claims_survive_their_servers_death(three, name):
    """Acknowledgements are repeated until they are confirmed, and nothing is handed out twice by one that lives."""
    async with service(three.settings(name, publish_timeout=40, ack_wait=20), keep=False) as made:
        await publish_on(made, 1000)
        made.consumer.start()
        await until(lambda: len(made.claims) > 200, "claims")
        three.leader(name).kill()  # what it was handing out comes again after ack_wait
        await until(lambda: len(made.claims) >= 1000 and not made.consumer.unconfirmed, "all confirmed")
        watcher = Watcher(made.connection)
        await figures_until(watcher, lambda figures: not figures.messages and figures.has_leader)
        sequences = [claim.sequence for claim in made.claims]
        assert sorted(set(sequences)) == sorted(sequences)
        assert set(sequences) == {outcome.sequence for outcome in made.outcomes.values()}
