"""Rates, tokens and connections: limits that hold over all workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import time
from pathlib import Path

import pytest
from support import BODY, Emitter, compare, get_json, request, wait_until

GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"
TOKENS = {"tokens": ["first-secret", "second-secret"]}


def test_the_rate_holds_over_both_workers(mocks, serve):
    fastdist = serve(mocks, {"limits": {"rate": 100, "burst": 30}})
    started = time.monotonic()
    emitter = Emitter(fastdist.port, connections=32).start()
    wait_until(lambda: time.monotonic() - started > 3, "three seconds")
    emitter.stop()
    seconds = time.monotonic() - started
    accepted, limited = emitter.count(202), emitter.count(429)
    assert accepted + limited == len(emitter.answers)
    assert limited > 100
    assert 30 + 0.3 * 100 * seconds < accepted <= 30 + 100 * seconds + 1
    assert emitter.without_retry_after == 0
    stats = fastdist.wait_at_rest()
    assert all(row["accepted"] > 0 for row in stats["workers"]), "one worker got nothing: this has tested little"
    assert stats["rejected"]["rateLimited"] == stats["packets"]["rejected"] == limited
    compare(emitter, mocks)


def test_client_rate_holds_over_both_workers(mocks, serve):
    fastdist = serve(mocks, {"limits": {"client_rate": 50, "client_burst": 10}})
    started = time.monotonic()
    clients = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    emitters = [Emitter(fastdist.port, 16, prefix=source, source=source).start() for source in clients]
    wait_until(lambda: time.monotonic() - started > 2, "two seconds")
    assert fastdist.post()[0] == 202, "another client is not concerned"
    for emitter in emitters:
        emitter.stop()
    seconds = time.monotonic() - started
    for emitter in emitters:
        assert emitter.count(429) > 0
        assert 10 + 0.3 * 50 * seconds < emitter.count(202) <= 10 + 50 * seconds + 1


def test_rates_count_packets_only(mocks, serve):
    fastdist = serve(mocks, {"limits": {"rate": 0.01, "burst": 1}})
    assert [fastdist.post()[0] for _ in range(3)] == [202, 429, 429]
    status, headers, body = fastdist.post()
    assert (status, headers["content-type"]) == (429, "application/problem+json")
    assert 1 <= int(headers["retry-after"]) <= 100
    assert json.loads(body)["status"] == 429
    assert [request(fastdist.port, "GET", "/stats")[0] for _ in range(5)] == [200] * 5


def test_only_known_tokens_are_accepted(mocks, serve):
    fastdist = serve(mocks, {"security": TOKENS})
    for token in TOKENS["tokens"]:
        assert fastdist.post(Authorization=f"Bearer {token}")[0] == 202
        assert fastdist.post(Authorization=f"bearer {token}")[0] == 202, "the scheme's case does not matter"
    for wrong in (
        "Bearer third",
        "Bearer ",
        "Bearer first-secre",
        "Bearer first-secret-and-more",
        "Basic first-secret",
    ):
        status, headers, _ = fastdist.post(Authorization=wrong)
        assert status == 401
        assert headers["www-authenticate"].startswith("Bearer ")
    assert fastdist.post()[0] == 401
    assert get_json(fastdist.port, "/health")["status"] == "ok", "looking needs no token"
    emitter = Emitter(fastdist.port, headers="Authorization: Bearer first-secret\r\n").send(500)
    assert emitter.count(202) == 500
    stats = fastdist.wait_at_rest()
    assert stats["rejected"]["unauthorized"] == stats["packets"]["rejected"] == 6
    assert stats["packets"]["delivered"] == 504
    assert "secret" not in fastdist.output


def test_excess_connections_get_503_and_end(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1, "max_connections": 10}})
    inside = [socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) for _ in range(10)]
    for connection in inside:
        connection.sendall(GET_HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: " in answer
            assert b"\r\nConnection: close\r\n" in answer
    for connection in inside:
        connection.sendall(GET_HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 "), "those inside stay"
    inside.pop().close()
    wait_until(lambda: fastdist.post()[0] == 202, "there is room for one more")
    for connection in inside:
        connection.close()


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_gone_client_takes_no_slot(mocks, serve, how):
    """They would have waited a day for a delivery that never comes."""
    mocks.set_all(status=503)
    fastdist = serve(mocks, {"server": {"workers": 1, "max_connections": 10}, "retry": {"cap": "300ms"}})
    packet = b"POST /logs HTTP/1.1\r\nHost: test\r\nPrefer: wait=86400\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    gone = [socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) for _ in range(10)]
    for connection in gone:
        connection.sendall(packet)
    wait_until(lambda: fastdist.post()[0] == 503, "all places are taken")
    for connection in gone:
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    wait_until(lambda: fastdist.post()[0] == 202, "there is room again")
    mocks.set_all(status=None)
    assert fastdist.wait_at_rest()["packets"]["delivered"] == 11


def test_silently_gone_client_is_probed(mocks, serve):
    """An emitter whose power failed sends no end: the system has to probe each connection that waits."""
    fastdist = serve(mocks, {"server": {"workers": 1}})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(GET_HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        ours, theirs = (f"0100007F:{port:04X}" for port in (fastdist.port, connection.getsockname()[1]))

        def timer():
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            return [row[5][:2] for row in rows if row[1:3] == [ours, theirs]]

        wait_until(lambda: timer() == ["02"], "the timer of the connection is that of keep-alive probes")


def test_low_file_limit_is_logged_and_kept(mocks, serve):
    prefix = ("sh", "-c", 'ulimit -n 900 && exec "$@"', "sh")
    fastdist = serve(mocks, {"server": {"workers": 1}}, prefix=prefix)
    warning = json.loads(fastdist.line_with("limit on open files"))
    assert warning["level"] == "warning"
    assert (warning["wanted"], warning["open_files"]) == (10_000, 900)
    limit = warning["lowered_to"]
    assert 16 <= limit < 900
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(limit + 20):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", fastdist.port), timeout=20))
            connection.sendall(GET_HEALTH)
            connections.append(connection)
        answers = [connection.recv(65536)[:13] for connection in connections]
    assert answers.count(b"HTTP/1.1 200 ") == limit
    assert answers.count(b"HTTP/1.1 503 ") == 20
    wait_until(lambda: fastdist.post()[0] == 202, "there is room again")
    emitter = Emitter(fastdist.port, connections=100).send(1000)
    assert emitter.count(202) == 1000


@pytest.mark.slow
def test_more_analyzers_than_descriptors(mocks, serve):
    """Neither the supervisor's checks nor a worker's connections take what others need; no analyzer goes offline."""
    endpoints = list(mocks.endpoints.values())
    analyzers = {f"B{number}": endpoints[number % 4] for number in range(400)}
    settings = {
        "server": {"workers": 1},
        "delivery": {"connections": 1, "spill_after": "100ms"},
        "health": {"interval": "200ms", "timeout": "10s", "fall": 1},
    }
    limit = ("prlimit", "--nofile=200:200")
    fastdist = serve(analyzers, settings, weights=dict.fromkeys(analyzers, 1.0), prefix=limit)
    mocks.set_all(latency=0.2)
    emitter = Emitter(fastdist.port, connections=4, pause=0).start().wait_for(2000)
    fastdist.line_with("for emitters' connections")
    mocks.set_all(latency=0)
    emitter.stop()
    stats = fastdist.wait_at_rest()
    assert [row["restarts"] for row in stats["workers"]] == [0]
    assert {row["state"] for row in fastdist.analyzers().values()} == {"online"}
    assert sum(row["failed"] for row in fastdist.analyzers().values()) == 0
    compare(emitter, mocks)


def test_slow_and_silent_clients_are_closed(mocks, serve):
    settings = {"header_timeout": "500ms", "body_timeout": "500ms", "keepalive_timeout": "500ms", "workers": 1}
    fastdist = serve(mocks, {"server": settings})
    head = b"POST /logs HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    for sent, status in (
        (b"", b""),
        (head[:30], b"HTTP/1.1 408 "),
        (head + BODY[:20], b"HTTP/1.1 408 "),
        (GET_HEALTH, b""),
    ):
        with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
            connection.sendall(sent)
            if sent == GET_HEALTH:
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert b"".join(iter(lambda connection=connection: connection.recv(65536), b""))[:13] == status
    assert fastdist.stats()["rejected"]["timeout"] == 2


def test_pause_of_machine_is_no_emitter_time(mocks, serve):
    """What came before the pause and during it makes whole requests; all time-outs were over when it ended."""
    timeouts = {"header_timeout": "3s", "body_timeout": "3s", "keepalive_timeout": "3s", "workers": 1}
    fastdist = serve(mocks, {"server": timeouts})
    whole = b"POST /logs HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    cuts = [0, 20, len(whole) - len(BODY), len(whole) - 1]
    connections = [socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) for _ in cuts]
    for connection, cut in zip(connections, cuts, strict=True):
        connection.sendall(GET_HEALTH + whole[:cut])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    processes = [fastdist.process.pid, *fastdist.worker_pids()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    for connection, cut in zip(connections, cuts, strict=True):
        connection.sendall(whole[cut:])
    time.sleep(5)  # of what passes here nothing is to count
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    for connection in connections:
        assert connection.recv(65536).startswith(b"HTTP/1.1 202 ")
        connection.close()
