"""SIGTERM and SIGINT: the queue drains, and what cannot drain in time becomes dead letters."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from support import BODY, WEIGHTS, Emitter, compare, kill_worker, request, wait_until

REQUEST = b"POST /logs HTTP/1.1\r\nHost: test\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n"


def exchange(connection, path="/ready"):
    """Send a GET on an open connection; return the answer's status."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    return int(connection.recv(65536).split(b" ")[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_accepted_is_delivered_before_end(mocks, serve, number):
    mocks.set_all(latency=0.02)  # so that a backlog waits
    fastdist = serve(mocks, {"delivery": {"connections": 8}})
    emitter = Emitter(fastdist.port, connections=32, pause=0).start().wait_for(3000)
    fastdist.signal(number)
    assert fastdist.wait() == 0
    emitter.stop()
    assert {*emitter.answers.values()} <= {202, 503, None}
    compare(emitter, mocks)
    delivered = mocks.delivered().keys()
    assert not delivered - emitter.accepted, "requests under way are answered before the end"
    assert emitter.without_retry_after == 0
    assert fastdist.dead_letters() == []


def test_drain_finishes_old_and_refuses_new(mocks, serve):
    mocks.set_all(latency=1.5)
    fastdist = serve(mocks, {"server": {"workers": 1}, "delivery": {"connections": 1}})
    under_way = socket.create_connection(("127.0.0.1", fastdist.port), timeout=20)
    under_way.sendall(REQUEST % (b"under-way", len(BODY)) + BODY[:50])
    other = socket.create_connection(("127.0.0.1", fastdist.port), timeout=20)
    other.sendall(REQUEST[:30])
    assert exchange(socket.create_connection(("127.0.0.1", fastdist.port), timeout=20)) == 200
    emitter = Emitter(fastdist.port).send(12)
    fastdist.signal(signal.SIGTERM)
    fastdist.line_with("draining")

    def refused():
        try:
            socket.create_connection(("127.0.0.1", fastdist.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_until(refused, "the listeners are closed")
    # Requests that began before are read to their end and answered.
    under_way.sendall(BODY[50:])
    other.sendall((REQUEST % (b"other", len(BODY)))[30:] + BODY)
    for connection, name in ((under_way, "under-way"), (other, "other")):
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 202 ")
        assert b"Connection: close" in answer
        emitter.answers[name] = int(answer[9:12])
    assert fastdist.wait() == 0
    compare(emitter, mocks)


@pytest.mark.parametrize("durability", ["memory", "disk", "fsync"])
def test_kept_connections_break_no_request(mocks, serve, durability):
    """As in a rolling update: what emitters see is a last answer, then a refused connection."""
    settings = {"queue": {"durability": durability}}
    fastdist = serve(mocks, settings)
    emitter = Emitter(fastdist.port, connections=40, pause=0.004).start().wait_for(2000)
    fastdist.signal(signal.SIGTERM)
    assert fastdist.wait() == 0
    emitter.stop()
    assert emitter.broken_when_kept == 0
    assert {*emitter.answers.values()} == {202}
    if durability != "memory":
        serve(mocks, settings | {"server": {"port": fastdist.port}}).wait_at_rest()
    compare(emitter, mocks)
    assert fastdist.dead_letters() == []


class Stalled:
    """A service whose workers do not run: what is sent to it waits in the system, which completes connections."""

    def __init__(self, fastdist):
        self.fastdist, self.pids = fastdist, fastdist.worker_pids()
        self.signal(signal.SIGSTOP)

    def signal(self, number):
        for pid in self.pids:
            os.kill(pid, number)

    def end(self):
        """SIGTERM, and let the workers run."""
        self.fastdist.signal(signal.SIGTERM)
        self.fastdist.line_with("draining")
        self.signal(signal.SIGCONT)


def connect(port, count):
    return [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(count)]


def packet_named(name):
    return REQUEST % (name.encode(), len(BODY)) + BODY


def statuses(connections):
    """Return the statuses of the answers, of each connection one."""
    return [int(connection.recv(65536)[9:12]) for connection in connections]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", ["before", "after"])
def test_backlog_is_answered_at_the_end(mocks, serve, workers, sent):
    """Connections that were not read from yet are not idle: requests that are there, or just coming, are accepted."""
    fastdist = serve(mocks, {"server": {"workers": workers}})
    emitter, names = Emitter(fastdist.port), [f"p-{number}" for number in range(600)]
    stalled = Stalled(fastdist)
    connections = connect(fastdist.port, len(names))
    if sent == "after":
        stalled.end()
    for name, connection in zip(names, connections, strict=True):
        connection.sendall(packet_named(name))
    if sent == "before":
        stalled.end()
    emitter.answers |= zip(names, statuses(connections), strict=True)
    assert {*emitter.answers.values()} == {202}
    assert fastdist.wait() == 0
    compare(emitter, mocks)


def test_excess_connections_get_503_at_end(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1, "max_connections": 50}})
    emitter, names = Emitter(fastdist.port), [f"p-{number}" for number in range(200)]
    stalled = Stalled(fastdist)
    connections = connect(fastdist.port, len(names))
    for name, connection in zip(names, connections, strict=True):
        connection.sendall(packet_named(name))
    stalled.end()
    emitter.answers |= zip(names, statuses(connections), strict=True)
    assert {*emitter.answers.values()} == {202, 503}
    assert fastdist.wait() == 0
    compare(emitter, mocks)


def test_waiting_past_deadline_is_answered(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1, "drain_timeout": "0s"}})
    stalled = Stalled(fastdist)
    connections = connect(fastdist.port, 200)
    for number, connection in enumerate(connections):
        connection.sendall(packet_named(f"p-{number}"))
    stalled.end()
    found = statuses(connections)
    assert {*found} <= {202, 503}
    assert fastdist.wait() == 0
    assert len(fastdist.dead_letters()) + sum(mocks.delivered().values()) == found.count(202)


def test_unkept_get_response_or_refusal(mocks, serve):
    """Each request has a connection of its own; at the end each is answered, or its connection is refused."""
    fastdist = serve(mocks)
    emitter = Emitter(fastdist.port, connections=60, pause=0, headers="Connection: close\r\n").start().wait_for(2000)
    fastdist.signal(signal.SIGTERM)
    assert fastdist.wait() == 0
    emitter.stop()
    assert {*emitter.answers.values()} == {202}
    compare(emitter, mocks)


def test_ready_says_503_while_it_drains(mocks, serve):
    mocks.set_all(latency=1)
    fastdist = serve(mocks, {"server": {"workers": 1}, "delivery": {"connections": 1}})
    Emitter(fastdist.port).send(8)
    probe = socket.create_connection(("127.0.0.1", fastdist.port), timeout=20)
    probe.sendall(b"GET /ready HTTP/1.1\r\nHost: te")  # a request under way: the connection is not idle
    time.sleep(0.1)
    fastdist.signal(signal.SIGTERM)
    fastdist.line_with("draining")
    probe.sendall(b"st\r\n\r\n")
    answer = probe.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"draining" in answer
    assert fastdist.wait() == 0


def test_undeliverable_becomes_dead_letters(mocks, serve):
    """Durability memory. Half of the packets are delivered before, half find no analyzer."""
    fastdist = serve(mocks, {"server": {"drain_timeout": "1s"}})
    first = Emitter(fastdist.port, prefix="first").send(500)
    fastdist.wait_at_rest()
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    second = Emitter(fastdist.port, prefix="second").send(500)
    started = time.monotonic()
    assert fastdist.stop() == 0
    assert time.monotonic() - started > 0.9
    compare(first, mocks)
    dead_letters = fastdist.dead_letters()
    assert len(dead_letters) == len(second.accepted) == 500
    assert {row["id"] for row in dead_letters} == second.accepted
    assert {row["reason"] for row in dead_letters} == {"shutdown"}
    assert {row["body"] for row in dead_letters} == {BODY.decode()}
    folder = fastdist.folder / "data" / "dead-letters"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_unwritten_dead_letters_set_status(mocks, serve):
    """Durability memory: they are lost."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, {"server": {"drain_timeout": "0s"}})
    fastdist.wait_for_states("offline")
    Emitter(fastdist.port).send(20)
    (fastdist.folder / "data").mkdir(exist_ok=True)
    (fastdist.folder / "data" / "dead-letters").write_text("in the place of the folder")
    assert fastdist.stop() == 1
    assert "packets are lost" in fastdist.output


def test_in_flight_at_end_is_dead_letter(mocks, serve):
    mocks.set_all(hang=True)
    fastdist = serve(mocks, {"server": {"drain_timeout": "500ms"}, "delivery": {"timeout": "60s"}})
    emitter = Emitter(fastdist.port).send(100)
    assert fastdist.stop() == 0
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted


def test_back_off_at_deadline_is_dead_letter(mocks, serve):
    mocks.set_all(status=500)
    settings = {"server": {"drain_timeout": "500ms"}, "retry": {"base": "20s"}, "health": {"fall": 10_000}}
    fastdist = serve(mocks, settings)
    emitter = Emitter(fastdist.port).send(100)
    assert fastdist.stop() == 0
    dead_letters = fastdist.dead_letters()
    assert sorted(row["id"] for row in dead_letters) == sorted(emitter.accepted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_it_at_once(mocks, serve, number):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, {"server": {"drain_timeout": "1h"}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(100)
    fastdist.signal(number)
    fastdist.line_with("draining")
    time.sleep(0.2)
    fastdist.signal(number)
    assert fastdist.wait() == 0
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted, "at once, but not at any cost"


def test_packets_of_a_down_worker_are_kept(mocks, serve):
    """Durability memory: its ring is in the supervisor's hands until a successor has it."""
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, {"server": {"drain_timeout": "1s", "workers": 1}})
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port).send(300)
    for _ in range(4):  # its restarts get slower
        victim = fastdist.worker_pids()[0]
        kill_worker(victim)
        wait_until(lambda victim=victim: fastdist.worker_pids()[0] != victim, "a successor")
    kill_worker(fastdist.worker_pids()[0])
    wait_until(lambda: fastdist.output.count("worker exited, restarting") == 5, "the supervisor has noticed")
    assert fastdist.stop() == 0
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted


def test_a_signal_while_it_starts_ends_it(run, tmp_path):
    config = tmp_path / "fastdist.toml"
    config.write_text(f'[server]\nport = 0\nworkers = 2\n[queue]\ndurability = "memory"\npath = "{tmp_path}/data"\n')
    for delay in (0.3, 0.4, 0.5, 0.6, 0.7):
        fastdist = run(os.sys.executable, "-m", "fastdist", "serve", "--config", config)
        time.sleep(delay)
        fastdist.signal(signal.SIGTERM)
        assert fastdist.wait(20) in (0, -signal.SIGTERM)  # the latter: before there was a handler


def test_idle_service_ends_promptly(mocks, serve):
    fastdist = serve(mocks, {"server": {"drain_timeout": "1h"}})
    connections = [socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) for _ in range(20)]
    assert [exchange(connection) for connection in connections] == [200] * 20
    assert fastdist.stop() == 0, "nothing was left to drain"
    assert [connection.recv(10) for connection in connections] == [b""] * 20
    with pytest.raises(OSError, match="refused"):
        request(fastdist.port, "GET", "/health")
    assert set(WEIGHTS) == set(mocks.ids)


def test_drain_ignores_an_emitters_open_end(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1}})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
        assert connection.recv(1) == b""  # all is said; our end stays open
        assert fastdist.stop() == 0
