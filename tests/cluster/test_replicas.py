"""Replicas that share a stream, as their users see them: everything is there once, whichever replica has it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from replicas import Replicas, compare, emitter
from support import BODY, Mocks, get_json, own_body, request, wait_until

KEYED = {"Content-Type": "application/json"}


@pytest.fixture
def replicas(tmp_path, mocks, three, name):
    made = Replicas(tmp_path, mocks, three.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


@pytest.fixture
def on_one(tmp_path, mocks, one, name):
    """Replicas on a single server."""
    made = Replicas(tmp_path, mocks, one.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


def ledger_of(replicas):
    return replicas.mocks.delivered()


def test_all_is_delivered_once(replicas):
    first, second = replicas.start(), replicas.start()
    emitters = [emitter(each, prefix=f"e{n}").send(1500) for n, each in enumerate((first, second))]
    replicas.wait_at_rest()
    accepted = compare(emitters, ledger_of(replicas))
    assert len(accepted) == 3000
    packets = [each.stats()["packets"] for each in (first, second)]
    assert sum(each["accepted"] for each in packets) == 3000
    assert sum(each["delivered"] for each in packets) == 3000
    assert [each["received"] for each in packets] == [1500, 1500]


def test_packets_without_a_key_are_bundled(replicas):
    first, second = replicas.start(), replicas.start()

    def post(replica, count):
        for _ in range(count):
            assert replica.post()[0] == 202

    threads = [threading.Thread(target=post, args=(each, 40)) for each in (first, second) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream = replicas.wait_at_rest()
    delivered = ledger_of(replicas)
    assert len(delivered) == 16 * 80
    assert set(delivered.values()) == {1}
    assert stream["stored"] < 16 * 80


def test_other_replicas_deliver(replicas, mocks):
    """What one replica accepts another delivers, if that is the one with an analyzer."""
    first = replicas.start()
    away = dict.fromkeys(mocks.endpoints, "http://127.0.0.1:9/logs")
    replicas.mocks = type("Away", (), {"endpoints": away})
    second = replicas.start()
    replicas.mocks = mocks
    wait_until(lambda: second.health()["analyzers"]["online"] == 0, "no analyzer at the second")
    sender = emitter(second).send(300)
    replicas.wait_at_rest()
    compare([sender], ledger_of(replicas))
    assert first.stats()["packets"]["delivered"] == 300


def test_claims_go_to_who_has_an_analyzer(replicas, mocks):
    """One that has claimed packets, and then loses its analyzers, gives them back to one that has some."""
    others = Mocks()
    try:
        replicas.mocks = others
        first = replicas.start()
        others.set_all(latency=20)
        sender = emitter(first, connections=8).send(40)
        wait_until(lambda: first.stats()["packets"]["inFlight"] == 40, "40 claims")
        others.set_all(refuse=True)
        replicas.mocks = mocks
        replicas.start()
        replicas.wait_at_rest()
        compare([sender], mocks.delivered())
    finally:
        others.kill_all()


def test_key_is_known_at_every_replica(on_one):
    first, second = on_one.start(), on_one.start()
    status, _, body = first.post(own_body("one"), Idempotency_Key="k1")
    assert (status, json.loads(body)) == (202, {"status": "accepted", "packetId": "k1", "messages": 1})
    for replica in (first, second, second):
        status, _, body = replica.post(own_body("two"), Idempotency_Key="k1")
        document = json.loads(body)
        assert (status, document) == (202, {"status": "accepted", "packetId": "k1", "messages": 1, "duplicate": True})
    on_one.wait_at_rest()
    assert ledger_of(on_one) == {"k1": 1}
    packets = [replica.stats()["packets"] for replica in (first, second)]
    assert [each["duplicates"] for each in packets] == [1, 2]
    for each in packets:
        assert each["received"] == each["accepted"] + each["rejected"] + each["duplicates"]
    metrics = request(second.port, "GET", "/metrics")[2].decode()
    assert "fastdist_packets_duplicate_total 2" in metrics


def test_duplicates_are_answered_in_order(on_one):
    replica = on_one.start()
    assert replica.post(Idempotency_Key="known")[0] == 202
    names = ["a", "known", "b", "known", "c"]
    with socket.create_connection(("127.0.0.1", replica.port)) as connection:
        for name in names:
            head = f"POST /logs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nIdempotency-Key: {name}\r\n"
            connection.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
        received = b""
        while received.count(b'"packetId"') < len(names):
            received += connection.recv(65536)
    bodies = [json.loads(part.split(b"\r\n\r\n")[1]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert [body["packetId"] for body in bodies] == names
    assert [body.get("duplicate", False) for body in bodies] == [False, True, False, True, False]


@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
def test_wait_is_answered_whoever_delivers(replicas, mocks, here):
    delivers = replicas.start()
    if not here:
        replicas.mocks = type("Away", (), {"endpoints": dict.fromkeys(mocks.endpoints, "http://127.0.0.1:9/logs")})
    accepts = replicas.start()
    replicas.mocks = mocks
    if not here:
        wait_until(lambda: accepts.health()["analyzers"]["online"] == 0, "no analyzer here")
    else:
        accepts = delivers
    status, _, body = accepts.post(Prefer="wait=20", Idempotency_Key="w1")
    assert status == 200, body
    assert json.loads(body)["analyzer"] in mocks.endpoints
    status, _, body = accepts.post(Prefer="wait=20", Idempotency_Key="w1")
    assert (status, json.loads(body)["duplicate"]) == (202, True)


def test_wait_for_a_dead_letter(on_one, mocks):
    mocks.set_all(status=422)
    replica = on_one.start()
    assert replica.post(Prefer="wait=20", Idempotency_Key="dead")[0] == 502
    on_one.wait_at_rest()
    assert replica.stats()["stream"]["deadLetters"] == 1
    assert replica.stats()["packets"]["deadLettered"] == 1


def test_refused_packet_of_a_bundle_alone(on_one, mocks):
    """Only what is refused becomes a dead letter; its neighbours in the message are delivered."""
    mocks.set_all(rejects="poison")
    replica = on_one.start(delivery={"mode": "batch", "linger": "50ms"}, retry={"max_attempts": 5})
    bodies = [own_body(f"poison{n}" if n % 20 == 7 else f"fine{n}") for n in range(200)]
    statuses = []

    def post(part):
        statuses.extend(replica.post(body)[0] for body in part)

    threads = [threading.Thread(target=post, args=(bodies[n::20],)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [202] * 200
    on_one.wait_at_rest()
    delivered = ledger_of(on_one)
    assert (len(delivered), set(delivered.values())) == (190, {1})
    packets = replica.stats()["packets"]
    assert (packets["delivered"], packets["deadLettered"], replica.stats()["stream"]["deadLetters"]) == (190, 10, 10)


def test_overrides_hold_everywhere(replicas):
    first, second = replicas.start(), replicas.start()
    body = json.dumps({"weight": 7}).encode()
    assert request(first.port, "PATCH", "/analyzers/A1", body, KEYED)[0] == 200
    wait_until(lambda: second.analyzers()["A1"]["weight"] == 7, "the weight at the other")
    third = replicas.start()
    assert third.analyzers()["A1"]["weight"] == 7
    assert request(third.port, "DELETE", "/analyzers/A1/override")[0] == 200
    for replica in (first, second):
        wait_until(lambda each=replica: each.analyzers()["A1"]["override"] is None, "no override")


def test_overrides_at_the_same_time(on_one):
    """What another replica has changed a moment ago is in force where the next change is made."""
    first, second = on_one.start(), on_one.start()
    for weight in (3, 5, 7):
        body = json.dumps({"weight": weight}).encode()
        assert request(first.port, "PATCH", "/analyzers/A1", body, KEYED)[0] == 200
        assert request(second.port, "PATCH", "/analyzers/A2", body, KEYED)[0] == 200
        assert request(first.port, "PATCH", "/analyzers/A9", body, KEYED)[0] == 404
        for replica in (first, second):
            for name in ("A1", "A2"):
                wait_until(lambda r=replica, n=name, w=weight: r.analyzers()[n]["weight"] == w, f"{name} {weight}")


def test_figures_and_metrics(replicas):
    replica = replicas.start()
    emitter(replica).send(50)
    replicas.wait_at_rest()
    wait_until(lambda: replica.stats()["stream"]["replicas"]["current"] == 3, "three copies")
    stream = replica.stats()["stream"]
    assert stream["name"] == replicas.jetstream.stream
    assert (stream["connected"], stream["replicas"]) == (True, {"current": 3, "total": 3})
    assert stream["stored"] == 50
    assert stream["capacityBytes"] == replicas.jetstream.max_bytes
    queue = get_json(replica.port, "/queue")
    assert (queue["backend"], queue["durability"], queue["packets"]) == ("jetstream", "replicated", 0)
    assert queue["capacityBytes"] == replicas.jetstream.max_bytes
    assert replica.health()["storage"] == "ok"
    metrics = request(replica.port, "GET", "/metrics")[2].decode()
    for line in (
        "fastdist_stream_connected 1",
        "fastdist_stream_packets 0",
        f"fastdist_stream_capacity_bytes {replicas.jetstream.max_bytes}",
        "fastdist_stream_unacknowledged_packets 0",
        "fastdist_stream_dead_letters 0",
        "fastdist_stream_replicas_current 3",
        "fastdist_stream_stored_total 50",
        "fastdist_stream_redelivered_total 0",
        "fastdist_stream_reconnects_total 0",
        "fastdist_stream_publish_duration_seconds_count 50",
    ):
        assert f"\n{line}\n" in metrics, line
    # How many there were is the machine's affair.
    assert '\nfastdist_stream_publish_retries_total{reason="unconfirmed"} ' in metrics


def test_rolling_restart_gives_no_error(replicas):
    first, second = replicas.start(), replicas.start()
    emitters = [emitter(each, prefix=f"e{n}").start() for n, each in enumerate((first, second))]
    emitters[1].wait_for(300)
    first.signal(signal.SIGTERM)
    assert first.wait(30) == 0
    emitters[1].wait_for(300)
    third = replicas.start()
    emitters.append(emitter(third, prefix="e3").start().wait_for(300))
    for each in emitters:
        each.stop()
    replicas.wait_at_rest()
    compare(emitters, ledger_of(replicas))
    assert {status for each in emitters[1:] for status in each.answers.values()} == {202}


def test_end_does_not_wait_for_ack_wait(replicas, mocks):
    """What was not sent is another's at once."""
    mocks.set_all(latency=0.3)
    first, second = replicas.start(), replicas.start()
    senders = [emitter(each, prefix=f"e{n}", connections=64).send(400) for n, each in enumerate((first, second))]
    began = time.monotonic()
    first.signal(signal.SIGTERM)
    assert first.wait(30) == 0
    mocks.set_all(latency=0)
    replicas.wait_at_rest()
    assert time.monotonic() - began < 60
    compare(senders, ledger_of(replicas))
    assert not list(Path(second.folder).glob("data/*.ring"))


def test_replica_killed_with_its_disk(replicas):
    first, second = replicas.start(), replicas.start()
    emitters = [emitter(each, prefix=f"e{n}").start() for n, each in enumerate((first, second))]
    for each in emitters:
        each.wait_for(500)
    in_flight = 2 * 4096
    first.kill_all()
    emitters[0].enough.set()
    emitters[1].wait_for(500)
    for each in emitters:
        each.stop()
    replicas.wait_at_rest()
    compare(emitters, ledger_of(replicas), twice=in_flight)


def test_worker_killed(replicas):
    replica = replicas.start()
    sender = emitter(replica).start().wait_for(500)
    (pid,) = replica.worker_pids()
    os.kill(pid, signal.SIGKILL)
    sender.wait_for(500)
    sender.stop()
    replicas.wait_at_rest()
    compare([sender], ledger_of(replicas), twice=4096)


def test_analyzers_away_beyond_ack_wait(replicas, mocks):
    mocks.set_all(refuse=True)
    first, second = replicas.start(), replicas.start()
    for replica in (first, second):
        wait_until(lambda each=replica: each.health()["analyzers"]["online"] == 0, "analyzers away")
    emitters = [emitter(each, prefix=f"e{n}").send(300) for n, each in enumerate((first, second))]
    time.sleep(9)
    packets = [each.stats()["packets"] for each in (first, second)]
    assert packets[0]["queued"] + sum(each["inFlight"] for each in packets) == 600
    mocks.set_all(**mocks.harmless)
    replicas.wait_at_rest()
    compare(emitters, ledger_of(replicas))


def test_slow_analyzers_keep_their_claims(replicas, mocks):
    """Analyzers slower than ack_wait get each packet once."""
    mocks.set_all(latency=9)
    settings = {"delivery": {"timeout": "20s"}}
    first, second = (replicas.start(**settings) for _ in range(2))
    emitters = [emitter(each, prefix=f"e{n}").send(40) for n, each in enumerate((first, second))]
    replicas.wait_at_rest(90)
    compare(emitters, ledger_of(replicas))
