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
from nats_servers import Servers, running
from replicas import Replicas, compare, emitter
from support import own_body, request, wait_until


@pytest.fixture
def replicas(tmp_path, mocks, one, name):
    """Replicas on a single server."""
    made = Replicas(tmp_path, mocks, one.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


def test_failed_analyzers_are_tried_again(replicas, mocks):
    """A delivery has taken each of them offline, and nothing is claimed: a packet is, for a trial."""
    mocks.set_all(status=500)
    replica = replicas.start(retry={"max_attempts": 4}, health={"fall": 1})
    assert replica.post()[0] == 202
    wait_until(lambda: replica.stats()["packets"]["deadLettered"] == 1, "a failure of each")
    time.sleep(3)  # until no request for messages is open any more
    mocks.set_all(**mocks.harmless)
    sender = emitter(replica).send(50)
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
    both = [replicas.start(**settings) for _ in range(2)]
    posting = [Posting(replica) for replica in both for _ in range(12)]
    for _ in range(2):
        time.sleep(1)
        mocks.set_all(unhealthy=True)
        time.sleep(3)
        mocks.set_all(unhealthy=False)
        time.sleep(1)
        both[0].signal(signal.SIGTERM)
        assert both[0].wait(40) == 0
        both = [both[1], replicas.start(**settings)]
        posting += [Posting(both[1]) for _ in range(12)]
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
    first = replicas.start(delivery={"timeout": "20s"})
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


def test_dead_letters_of_a_new_stream(replicas, mocks, one, name):
    """They are not taken for those of the old one, whose packets had the same numbers."""
    mocks.set_all(status=422)
    replica = replicas.start()
    for attempt in (1, 2):
        assert replica.post(Prefer="wait=20")[0] == 502
        wait_until(lambda n=attempt, r=replica: r.stats()["stream"]["deadLetters"] == n, "a dead letter more")
        delete(one.urls[0], name)
        wait_until(lambda r=replica: r.ready() == 503, "no readiness")
        assert replica.stop() == 0
        replica = replicas.start()


def test_records_of_agents_fit_into_messages(tmp_path, mocks, name):
    """However many there are in a request, and however small the messages that the servers take."""
    servers = Servers(tmp_path / "nats", extra="max_payload: 100000")
    replicas = Replicas(tmp_path, mocks, servers.settings(name))
    with running(servers):
        replica = replicas.start()
        assert "smaller messages" in replica.output
        body = b"".join(b'{"message":"%d %s"}\n' % (number, b"x" * 2000) for number in range(200))
        status, _, text = request(replica.port, "POST", "/ingest", body, {"Content-Type": "application/x-ndjson"})
        assert status == 200, text
        replicas.wait_at_rest()
        packets = replica.stats()["packets"]
        assert packets["delivered"] == packets["accepted"] > 4
        status, _, text = replica.post(b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * 100_000))
        assert (status, "max_payload" in json.loads(text)["detail"]) == (413, True)
        replicas.kill_all()
