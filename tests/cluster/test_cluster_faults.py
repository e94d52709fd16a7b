"""Replicas while servers are away, stopped, killed, full, or not theirs: nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import time
from datetime import datetime, timedelta

import nats
import pytest
from nats_servers import MAX_PAYLOAD, Servers, running
from replicas import Replicas, Watch, compare, emitter
from support import Process, request, wait_until


@pytest.fixture
def made(tmp_path, mocks):
    """Return what makes replicas on servers."""
    all_of_them = []

    def make(servers, name, **changes):
        all_of_them.append(Replicas(tmp_path, mocks, servers.settings(name, **{"ack_wait": 6.0} | changes)))
        return all_of_them[-1]

    yield make
    for each in all_of_them:
        each.kill_all()


def packet_of(size):
    return b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * size)


def run_over(replicas, fault, *, after=500):
    """Send to all replicas while something happens to servers; return the emitters."""
    emitters = [emitter(each, prefix=f"e{n}").start() for n, each in enumerate(replicas.alive)]
    for each in emitters:
        each.wait_for(300)
    fault()
    for each in emitters:
        each.wait_for(after)
        each.stop()
    replicas.wait_at_rest(120)
    return emitters


def test_leader_killed_under_load(made, three, mocks, name):
    replicas = made(three, name)
    replicas.start(), replicas.start()

    def fault():
        leader = wait_until(lambda: three.leader(name), "a leader")
        leader.kill()
        time.sleep(3)
        leader.start()

    emitters = run_over(replicas, fault)
    compare(emitters, mocks.delivered(), twice=2 * 4096)


def test_stopped_leader_is_left(made, three, mocks, name):
    replicas = made(three, name)
    replicas.start(), replicas.start()

    def fault():
        leader = wait_until(lambda: three.leader(name), "a leader")
        leader.signal(signal.SIGSTOP)
        time.sleep(8)
        leader.signal(signal.SIGCONT)

    emitters = run_over(replicas, fault)
    compare(emitters, mocks.delivered(), twice=2 * 4096)


def test_node_loses_its_disk(made, three, mocks, name):
    replicas = made(three, name)
    replicas.start(), replicas.start()
    lost = []

    def fault():
        lost.append(wait_until(lambda: three.leader(name), "a leader"))
        lost[0].kill()
        lost[0].wipe()

    emitters = run_over(replicas, fault)
    compare(emitters, mocks.delivered(), twice=2 * 4096)
    lost[0].start()  # not before: a server that has forgotten what it has confirmed must not have a vote under load
    three.wait()
    figures = wait_until(lambda: replicas.alive[0].stats()["stream"]["replicas"]["current"] == 3, "all copies", 60)
    assert figures
    emitters = [emitter(replicas.alive[0], prefix="later").send(100)]
    replicas.wait_at_rest()
    assert emitters[0].accepted <= mocks.delivered().keys()


def test_quorum_lost_and_back(made, three, mocks, name):
    replicas = made(three, name)
    first, second = replicas.start(), replicas.start()
    senders = [emitter(each, prefix=f"e{n}").send(200) for n, each in enumerate((first, second))]
    leader = wait_until(lambda: three.leader(name), "a leader")
    killed = [leader, three.others(leader.name)[0]]
    for server in killed:
        server.kill()
    for replica in (first, second):
        wait_until(lambda each=replica: each.ready() == 503, "no readiness")
    status, problem = first.problem(Idempotency_Key="lost")
    assert (status, problem["stored"] in {"no", "unknown"}) == (503, True)
    assert first.health()["storage"] == "failing"
    assert first.health()["status"] == "degraded"
    for server in killed:
        server.start()
    for replica in (first, second):
        replica.wait_ready(60)
        assert replica.health()["storage"] == "ok"
    senders += [emitter(each, prefix=f"f{n}").send(200) for n, each in enumerate((first, second))]
    replicas.wait_at_rest()
    delivered = mocks.delivered()
    if problem["stored"] == "no":
        assert "lost" not in delivered
    delivered.pop("lost", None)
    compare(senders, delivered, twice=2 * 4096)


def test_what_is_no_is_not_delivered(made, three, mocks, name):
    """While the quorum goes and comes: `no` is no, whatever is sent meanwhile."""
    replicas = made(three, name, publish_timeout=2.0)
    replica = replicas.start()
    said = {}

    def post(number):
        key = f"n{number}"
        status, _, body = replica.post(Idempotency_Key=key)
        said[key] = "yes" if status == 202 else json.loads(body)["stored"]

    for number in range(20):
        post(number)
    leader = wait_until(lambda: three.leader(name), "a leader")
    killed = [leader, three.others(leader.name)[0]]
    for server in killed:
        server.kill()
    for number in range(20, 50):
        post(number)
        time.sleep(0.1)
    for server in killed:
        server.start()
    replica.wait_ready(60)
    for number in range(50, 60):
        post(number)
    accepted = {key for key, word in said.items() if word == "yes"}
    wait_until(lambda: accepted <= mocks.delivered().keys(), "all is delivered", 60)  # figures may be old ones
    replicas.wait_at_rest()
    delivered = mocks.delivered()
    assert not {key for key, word in said.items() if word == "no"} & delivered.keys()
    assert "no" in said.values()
    packets = replica.stats()
    assert packets["packets"]["rejected"] == sum(word != "yes" for word in said.values())
    assert packets["rejected"]["unconfirmed"] == sum(word == "unknown" for word in said.values())


def test_servers_away_at_the_start(made, tmp_path, mocks, name):
    servers = Servers(tmp_path / "nats")
    replicas = made(servers, name)
    replica = replicas.start()
    health = replica.health()
    assert (health["storage"], replica.ready()) == ("failing", 503)
    status, problem = replica.problem()
    assert (status, problem["stored"]) == (503, "no")
    assert replica.stats()["rejected"]["storage"] == 1
    warnings = [line for line in replica.lines if "no server can be used" in line]
    moments = [datetime.fromisoformat(json.loads(line)["timestamp"]) for line in warnings]
    assert all(later - earlier > timedelta(seconds=9) for earlier, later in itertools.pairwise(moments))
    assert servers.urls[0] in warnings[0]
    with running(servers):
        replica.wait_ready()
        sender = emitter(replica).send(100)
        replicas.wait_at_rest()
        compare([sender], mocks.delivered())
        servers.all[0].kill()
        wait_until(lambda: replica.ready() == 503, "no readiness")
        servers.all[0].start()
        replica.wait_ready()
        sender = emitter(replica, prefix="later").send(100)
        replicas.wait_at_rest()
        assert len(mocks.delivered()) == 200


def test_full_stream(made, one, mocks, name):
    mocks.set_all(refuse=True)
    replicas = made(one, name, max_bytes=1 << 20)
    replica = replicas.start()
    wait_until(lambda: replica.health()["analyzers"]["online"] == 0, "analyzers away")
    body = packet_of(20_000)
    statuses = {}
    for number in range(80):
        status, headers, text = replica.post(body, Idempotency_Key=f"k{number}")
        statuses[f"k{number}"] = status
        if status == 503:
            assert json.loads(text)["stored"] == "no"
            assert 1 <= int(headers["retry-after"]) <= 30
    assert set(statuses.values()) == {202, 503}
    assert replica.ready() == 503
    assert "full" in json.loads(request(replica.port, "GET", "/ready")[2])["detail"]
    assert replica.stats()["rejected"]["queueFull"] == list(statuses.values()).count(503)
    mocks.set_all(**mocks.harmless)
    replica.wait_ready()
    assert replica.post()[0] == 202
    replicas.wait_at_rest()
    delivered = mocks.delivered()
    assert {name for name, status in statuses.items() if status == 202} <= delivered.keys()
    assert not {name for name, status in statuses.items() if status == 503} & delivered.keys()


def test_packet_over_max_payload(made, one, name):
    replica = made(one, name).start(server={"max_body": "16MiB"})
    warning = replica.line_with("takes smaller messages than server.max_body")
    assert str(MAX_PAYLOAD) in warning
    status, problem = replica.problem(
        b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * MAX_PAYLOAD), Idempotency_Key="big"
    )
    assert (status, "max_payload" in problem["detail"]) == (413, True)
    assert replica.ready() == 200
    assert replica.stats()["rejected"]["tooLarge"] == 1


@pytest.mark.parametrize("headers", [{}, {"Idempotency_Key": "big"}])
def test_packet_over_the_whole_stream(made, one, name, headers):
    replicas = made(one, name, max_bytes=1 << 20)
    replica = replicas.start()
    status, problem = replica.problem(packet_of(1 << 20), **headers)
    assert (status, "jetstream.max_bytes" in problem["detail"]) == (413, True)
    assert replica.ready() == 200
    assert replica.stats()["rejected"] | {"tooLarge": 1} == replica.stats()["rejected"]
    assert replica.post()[0] == 202
    replicas.wait_at_rest()


def start_fails(tmp_path, mocks, settings):
    """Return exit status, seconds and last line of a service that cannot start."""
    text = f'[queue]\nbackend = "jetstream"\npath = "{tmp_path}/data"\n[server]\nport = 0\nworkers = 1\n[jetstream]\n'
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    for name, endpoint in mocks.endpoints.items():
        text += f'[[analyzers]]\nid = "{name}"\nendpoint = "{endpoint}"\nweight = 1\n'
    (tmp_path / "fastdist.toml").write_text(text)
    began = time.monotonic()
    process = Process([sys.executable, "-m", "fastdist", "serve", "--config", str(tmp_path / "fastdist.toml")])
    return process.wait(120), time.monotonic() - began, process.lines[-1]


def test_wrong_credentials_end_a_start(tmp_path, mocks, name):
    servers = Servers(tmp_path / "nats", extra="authorization { user: me, password: right }")
    with running(servers):
        settings = {
            "servers": list(servers.urls),
            "stream": name,
            "replicas": 1,
            "user": "fastdist",
            "password": "wrong",
        }
        status, seconds, line = start_fails(tmp_path, mocks, settings)
    assert (status, seconds < 60) == (3, True)
    assert "jetstream: nats://" in line
    assert "authorization" in line
    assert "wrong" not in line


def test_stream_of_another_service(tmp_path, made, one, mocks, name):
    replicas = made(one, name)
    replicas.start().signal(signal.SIGTERM)
    settings = {"servers": list(one.urls), "stream": f"{name}_DEAD", "replicas": 1}
    status, seconds, line = start_fails(tmp_path, mocks, settings)
    assert (status, seconds < 60) == (3, True)
    assert f"{name}_DEAD cannot be used" in line
    assert "retention is limits, not workqueue" in line


def test_deleted_stream_is_not_made_again(made, one, name):
    replica = made(one, name).start()
    assert replica.post()[0] == 202

    async def delete():
        client = await nats.connect(one.urls[0])
        await client.jetstream().delete_stream(name)
        await client.close()

    asyncio.run(delete())
    wait_until(lambda: replica.ready() == 503, "no readiness")
    status, problem = replica.problem()
    assert (status, problem["stored"]) == (503, "no")
    replica.line_with("the stream cannot store packets")
    wait_until(lambda: "not found" in replica.health().get("storageError", ""), "it says why")
    time.sleep(1)
    assert replica.ready() == 503


def test_change_needs_the_servers(made, tmp_path, name):
    servers = Servers(tmp_path / "nats")
    with running(servers):
        replica = made(servers, name).start()
        headers = {"Content-Type": "application/json"}
        assert request(replica.port, "PATCH", "/analyzers/A1", b'{"weight": 3}', headers)[0] == 200
        servers.all[0].kill()
        wait_until(lambda: replica.ready() == 503, "no readiness")
        assert request(replica.port, "PATCH", "/analyzers/A1", b'{"weight": 4}', headers)[0] == 503
        assert replica.analyzers()["A1"]["weight"] == 3


def test_end_without_servers(made, tmp_path, name):
    """What is claimed cannot be given back; the service ends in time all the same."""
    servers = Servers(tmp_path / "nats")
    with running(servers):
        replica = made(servers, name).start(server={"drain_timeout": "4s"})
        assert replica.post()[0] == 202
        servers.all[0].kill()
        replica.signal(signal.SIGTERM)
        assert replica.wait() == 0
        assert "exceeded drain timeout" not in replica.output


def test_records_of_agents(made, three, mocks, name):
    """A request that is more than one message is answered when all of it is stored."""
    replicas = made(three, name)
    replica = replicas.start()
    lines = b"".join(b'{"message":"line %d"}\n' % number for number in range(5000))
    status, _, body = request(replica.port, "POST", "/ingest", lines, {"Content-Type": "application/x-ndjson"})
    assert status == 200, body
    replicas.wait_at_rest()
    assert replica.stats()["messages"]["delivered"] == 5000
    assert set(mocks.delivered().values()) == {1}


def test_ready_stays_while_one_node_is_away(made, three, name):
    replicas = made(three, name)
    replica = replicas.start()
    replica.wait_ready()
    leader = wait_until(lambda: three.leader(name), "a leader")
    follower = next(each for each in three.others(leader.name) if each.url != replica.stats()["stream"]["server"])
    with Watch(replica.ready) as watch:
        follower.kill()
        time.sleep(6)
    assert watch.seen == [200]
    wait_until(lambda: replica.stats()["stream"]["replicas"] == {"current": 2, "total": 3}, "two copies")
