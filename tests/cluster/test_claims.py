"""Claims: taken as there is room, renewed, acknowledged until that is confirmed, given back, void."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import pytest
from harness import ask, contents, figures_until, in_loop, repeated, service, until
from proxy import Proxy

from fastdist.storage.jetstream import consumer as module
from fastdist.storage.jetstream.consumer import position
from fastdist.storage.jetstream.figures import Watcher


async def figures_are(made, **expected):
    """Wait until the stream has these figures."""
    await figures_until(
        Watcher(made.connection), lambda figures: {key: getattr(figures, key) for key in expected} == expected
    )


@in_loop
async def test_messages_are_claimed_and_settled(servers, name):
    async with service(servers.settings(name, publish_timeout=40), keep=False) as made:
        await made.publish_all([f"m{number}" for number in range(600)])
        made.consumer.start()
        await until(lambda: len(made.claims) == 600 and not made.consumer.unconfirmed, "all settled")
        assert [claim.sequence for claim in made.claims] == list(range(1, 601))
        assert {claim.deliveries for claim in made.claims} == {1}
        await repeated(lambda: contents(made.connection, name), lambda held: held == {}, "nothing is left")
        await made.publish("later", b"later")  # while it waits for messages
        await until(lambda: len(made.claims) == 601, "one more")
        assert made.bodies[-1] == b"later"
        await figures_are(made, stored=601, messages=0, queued=0, in_flight=0, settled=601)


@in_loop
async def test_no_more_is_claimed_than_has_room(servers, name):
    async with service(servers.settings(name), room=10) as made:
        await made.publish_all([f"m{number}" for number in range(50)])
        made.consumer.start()
        await until(lambda: len(made.claims) == 10, "ten claims")
        await figures_are(made, in_flight=10, queued=40)
        for claim in made.claims[:5]:
            made.consumer.acknowledge(claim)
        await until(lambda: len(made.claims) == 15, "five more")
        await figures_are(made, in_flight=10, queued=35)
        assert made.consumer.held == 10
        made.room = 0
        made.consumer.acknowledge(made.claims[5])
        await figures_are(made, in_flight=9, queued=35)
        made.room = 100
        made.consumer.wake()
        await until(lambda: len(made.claims) == 50, "the rest")


@in_loop
async def test_what_is_given_back_goes_to_others(servers, name):
    settings = servers.settings(name)
    async with service(settings, room=3) as made, service(settings, room=0) as other:
        await made.publish_all(["a", "b", "c"])
        made.consumer.start()
        other.consumer.start()
        await until(lambda: len(made.claims) == 3, "three claims")
        made.room, other.room = 0, 100
        other.consumer.wake()
        for claim in made.claims:
            made.consumer.give_back(claim)
        await until(lambda: len(other.claims) == 3, "claims of the other")
        assert sorted(claim.sequence for claim in other.claims) == [1, 2, 3]
        assert {claim.deliveries for claim in other.claims} == {2}
        await until(lambda: not made.consumer.unconfirmed, "confirmations")


@in_loop
async def test_what_was_given_back_may_return(servers, name):
    async with service(servers.settings(name)) as made:
        await made.publish("a")
        made.consumer.start()
        await until(lambda: len(made.claims) == 1, "a claim")
        made.consumer.give_back(made.claims[0])
        await until(lambda: len(made.claims) == 2, "the same again")
        assert [claim.deliveries for claim in made.claims] == [1, 2]
        made.consumer.give_back(made.claims[1], delay=0.5)
        await until(lambda: len(made.claims) == 3, "the same again, later")
        made.consumer.acknowledge(made.claims[2])
        await figures_are(made, messages=0)


@in_loop
async def test_claims_are_kept_beyond_ack_wait(servers, name):
    settings = servers.settings(name, ack_wait=4)
    async with service(settings) as made, service(settings) as other:
        await made.publish_all([f"m{number}" for number in range(100)])
        made.consumer.start()
        await until(lambda: len(made.claims) == 100, "claims")
        other.consumer.start()
        await asyncio.sleep(9)
        assert other.claims == []
        assert made.voids == []
        assert made.consumer.redelivered == 0
        assert len(made.claims) == 100
        await figures_are(made, in_flight=100, redelivered=0)


@in_loop
async def test_the_dead_ones_claims_go_to_others(one, name):
    settings = one.settings(name, ack_wait=1)
    async with service(settings) as other:
        async with service(settings, prepare=False) as dying:
            await other.publish_all(["a", "b"])
            dying.consumer.start()
            await until(lambda: len(dying.claims) == 2, "claims")
            dying.connection.drop()  # and with the end of its tasks it never speaks again
        other.consumer.start()
        await until(lambda: len(other.claims) == 2, "claims of the other")
        assert {claim.deliveries for claim in other.claims} == {2}


@in_loop
async def test_a_claim_not_renewed_is_void(one, name):
    """The server is out of reach for longer than ack_wait: others may have the message."""
    proxy = await Proxy(one.all[0].port).start()
    settings = one.settings(name, ack_wait=1)
    async with (
        service(settings) as other,
        service(one.settings(name, ack_wait=1, servers=(proxy.url,)), prepare=False) as made,
    ):
        await other.publish_all(["a", "b"])
        made.consumer.start()
        await until(lambda: len(made.claims) == 2, "claims")
        made.consumer.acknowledge(made.claims[0])
        await until(lambda: not made.consumer.unconfirmed, "a confirmation")
        proxy.open.clear()
        await until(lambda: made.voids, "a void claim")
        assert made.voids == [made.claims[1]]
        assert made.consumer.held == 0
        other.consumer.start()
        await until(lambda: other.claims, "a claim of the other")
        assert [claim.sequence for claim in other.claims] == [2]
        # It was under way to an analyzer, and was delivered: said late rather than never.
        made.consumer.acknowledge(made.claims[1])
        proxy.open.set()
        await until(lambda: not made.consumer.unconfirmed, "a late confirmation")
        await repeated(lambda: contents(other.connection, name), lambda held: held == {}, "nothing is left")
    await proxy.stop()


@in_loop
async def test_lost_confirmations_are_asked_again(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,))) as made:
        await made.publish("a")
        made.consumer.start()
        await until(lambda: made.claims, "a claim")
        proxy.answering.clear()
        made.consumer.acknowledge(made.claims[0])
        await asyncio.sleep(0.3)
        assert made.consumer.unconfirmed == 1
        proxy.cut()  # with the confirmation
        proxy.answering.set()
        await until(lambda: not made.consumer.unconfirmed, "a confirmation")
        assert made.connection.reconnects >= 1
        await repeated(lambda: contents(made.connection, name), lambda held: held == {}, "nothing is left")
        assert len(made.claims) == 1
    await proxy.stop()


@in_loop
async def test_what_is_held_is_not_handed_out(servers, name):
    """The stream hands it out again, as after a server's death; it is ours already."""
    async with service(servers.settings(name)) as made, service(servers.settings(name), prepare=False) as other:
        await made.publish_all(["a", "b"])
        made.consumer.start()
        await until(lambda: len(made.claims) == 2, "claims")
        for claim in made.claims:  # behind its back, so that they come again at once
            await other.connection.client.publish(claim.reply, b"-NAK")
        await until(lambda: made.consumer.redelivered == 2, "both again")
        assert len(made.claims) == 2
        assert [claim.deliveries for claim in made.claims] == [2, 2]
        for claim in made.claims:
            made.consumer.acknowledge(claim)
        await figures_are(made, messages=0, in_flight=0)
        assert len(made.claims) == 2


@in_loop
async def test_what_was_settled_is_not_handed_out(one, name):
    """An acknowledgement that its server lost, after it had confirmed it, is given again."""
    async with service(one.settings(name)) as made:
        await made.publish("a")
        made.consumer._settled = type("All", (OrderedDict,), {"__contains__": lambda *_: True})()
        made.consumer.start()
        await figures_are(made, messages=0)
        assert made.claims == []
        assert made.consumer.redelivered == 1


@in_loop
async def test_the_end_leaves_nothing_waiting(servers, name):
    """What is held is given back, what comes meanwhile too, and others have it at once."""
    settings = servers.settings(name, ack_wait=3600)
    async with service(settings) as ending, service(settings) as other:
        await other.publish_all([f"m{number}" for number in range(500)])
        ending.consumer.start()
        await until(lambda: len(ending.claims) > 100, "claims")
        settled = ending.claims[:50]
        for claim in settled:
            ending.consumer.acknowledge(claim)
        stopping = asyncio.create_task(ending.consumer.stop(30))
        await asyncio.sleep(0)
        for claim in ending.claims[50:]:
            ending.consumer.give_back(claim)
        assert await stopping
        await ending.connection.close()
        other.consumer.start()
        await until(lambda: len(other.claims) >= 450, "the rest")
        assert {claim.sequence for claim in other.claims} == set(range(1, 501)) - {claim.sequence for claim in settled}


@in_loop
async def test_the_end_has_a_limit(one, name):
    proxy = await Proxy(one.all[0].port).start()
    async with service(one.settings(name, servers=(proxy.url,))) as made:
        await made.publish("a")
        made.consumer.start()
        await until(lambda: made.claims, "a claim")
        proxy.open.clear()
        made.consumer.acknowledge(made.claims[0])
        assert not await made.consumer.stop(0.5)
        proxy.open.set()
    await proxy.stop()


@in_loop
async def test_a_lost_request_is_made_again(one, name, monkeypatch):
    monkeypatch.setattr(module, "OVERDUE", 0.2)
    proxy = await Proxy(one.all[0].port).start()
    async with (
        service(one.settings(name)) as other,
        service(one.settings(name, servers=(proxy.url,)), prepare=False) as made,
    ):
        proxy.word, proxy.lose_replies = b" 408 ", 1
        made.consumer.start()
        await until(lambda: proxy.lost, "the loss of a request's end")
        await other.publish("a")
        await until(lambda: made.claims, "a claim")
    await proxy.stop()


@in_loop
async def test_what_cannot_be_taken_is_given_back(one, name, capfd):
    async with service(one.settings(name, ack_wait=1)) as made:
        taken = made.consumer._take

        def take(claim, data):
            if claim.deliveries == 1:
                raise RuntimeError("a fault of ours")
            taken(claim, data)

        made.consumer._take = take
        await made.publish("a")
        made.consumer.start()
        await until(lambda: made.claims, "the same again")
        assert made.claims[0].deliveries == 2
        assert "a fault of ours" in capfd.readouterr().out


@in_loop
async def test_without_consumer_it_asks_on(one, name):
    async with service(one.settings(name)) as made:
        made.consumer.start()
        await ask(made.connection, f"CONSUMER.DELETE.{name}.fastdist")
        await made.publish("a")
        await asyncio.sleep(0.6)
        assert made.claims == []
        await ask(
            made.connection,
            f"CONSUMER.DURABLE.CREATE.{name}.fastdist",
            {"stream_name": name, "config": {"durable_name": "fastdist", "ack_policy": "explicit"}},
        )
        await until(lambda: made.claims, "a claim")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("$JS.ACK.S.fastdist.3.17.20.1700000000.5", (3, 17, 1700000000)),
        ("$JS.ACK._.hash.S.fastdist.2.9.10.1700000000.0.token", (2, 9, 1700000000)),
        ("$JS.ACK.hub.hash.S.fastdist.2.9.10.1700000000.0", (2, 9, 1700000000)),
    ],
)
def test_a_reply_subject_has_the_position(reply, expected):
    assert position(reply) == expected


@pytest.mark.parametrize("reply", ["", "_INBOX.a", "$JS.ACK.S", "$JS.ACK.S.fastdist.x.17.20.1700000000.5"])
def test_other_reply_subjects_are_refused(reply):
    with pytest.raises(ValueError, match=r"not a message of a stream|invalid literal"):
        position(reply)
