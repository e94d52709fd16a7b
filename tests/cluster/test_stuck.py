"""What must not keep replicas from delivering: analyzers that fail, packets that fail, a pause that one asks for."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import threading
import time

import nats
import pytest
from replicas import Replicas, compare, emitter
from support import Mocks, own_body, request, wait_until


@pytest.fixture(scope="module")
def lasting_mocks():
    mocks = Mocks()
    yield mocks
    mocks.kill_all()


@pytest.fixture
def mocks(lasting_mocks):
    lasting_mocks.start_anew()
    return lasting_mocks


@pytest.fixture
def replicas(tmp_path, mocks, one, name):
    """Replicas on a single server."""
    made = Replicas(tmp_path, mocks, one.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


def test_failed_analyzers_are_tried_again(replicas, mocks):
    """Deliveries have taken all of them offline, so packets are claimed for trials."""
    mocks.set_all(status=500)
    replica = replicas.start()
    sender = emitter(replica).send(50)
    wait_until(lambda: {row["state"] for row in replica.analyzers().values()} == {"offline"}, "all offline")
    wait_until(lambda: replica.stats()["packets"]["inFlight"] == 0, "nothing claimed")
    mocks.set_all(**mocks.harmless)
    replicas.wait_at_rest()
    compare([sender], mocks.delivered())


def test_paused_analyzer_keeps_only_its_own(replicas, mocks):
    """More packets than a worker claims at once wait for it, as their emitters are its own; the others' do not."""
    mocks.set("A2", status=503, retryAfter=300)
    replica = replicas.start(distribution={"strategy": "sticky"})
    for number in range(600):
        assert replica.post(own_body(f"p{number}"), Idempotency_Key=f"p{number}")[0] == 202
    wait_until(lambda: len(mocks.delivered()) > 300, "the packets of all other emitters", 60)
    mocks.set_all(**mocks.harmless)
    assert request(replica.port, "PATCH", "/analyzers/A2", b'{"state": "online"}')[0] == 200
    replicas.wait_at_rest()
    assert mocks.delivered() == {f"p{number}": 1 for number in range(600)}


class Posting(threading.Thread):
    """Posts packets without keys, which share messages, to a replica until that ends, or it is told to; notes ids."""

    def __init__(self, replica):
        super().__init__(daemon=True)
        self.replica, self.accepted, self.over = replica, set(), threading.Event()
        self.start()

    def run(self):
        while not self.over.is_set():
            try:
                status, _, body = self.replica.post(Prefer="")
            except (OSError, http.client.HTTPException):  # it has ended
                return
            if status == 202:
                self.accepted.add(json.loads(body)["packetId"])


def test_analyzers_and_replicas_come_and_go(replicas, mocks):
    """Messages of several packets are given back in whole or in part, and nothing is delivered twice."""
    settings = {"delivery": {"mode": "batch", "batch_packets": 8, "linger": "20ms", "connections": 1}}
    settings["health"] = {"interval": "200ms", "rise": 1, "fall": 1}
    mocks.set_all(latency=0.1)
    running = [replicas.start(**settings) for _ in range(2)]
    posting = [Posting(replica) for replica in running for _ in range(12)]
    for _ in range(2):
        time.sleep(1)
        mocks.set_all(unhealthy=True)
        time.sleep(3)
        mocks.set_all(unhealthy=False)
        time.sleep(1)
        running[0].signal(signal.SIGTERM)
        assert running[0].wait(40) == 0
        running = [running[1], replicas.start(**settings)]
        posting += [Posting(running[1]) for _ in range(12)]
    for each in posting:
        each.over.set()
    for each in posting:
        each.join(20)
    mocks.set_all(**mocks.harmless)
    replicas.wait_at_rest()
    accepted = set().union(*(each.accepted for each in posting))
    delivered = mocks.delivered()
    assert accepted <= delivered.keys()
    assert {name: count for name, count in delivered.items() if count > 1} == {}


def delete(server, stream):
    async def run():
        client = await nats.connect(server)
        await client.jetstream().delete_stream(stream)
        await client.close()

    asyncio.run(run())


def test_new_stream_of_the_same_name(replicas, mocks, one, name):
    """A replica that lived through does not take its messages for those of the old one, which have the same numbers."""
    first = replicas.start()
    senders = [emitter(first, prefix="old").send(200)]
    replicas.wait_at_rest()
    mocks.set_all(latency=4)
    senders.append(emitter(first, prefix="held").send(40))
    wait_until(lambda: first.stats()["packets"]["inFlight"] == 40, "claims")
    delete(one.urls[0], name)
    wait_until(lambda: first.ready() == 503, "no readiness")
    second = replicas.start()
    first.wait_ready()
    senders.append(emitter(second, prefix="new").send(300))
    replicas.wait_at_rest()
    compare(senders, mocks.delivered())
