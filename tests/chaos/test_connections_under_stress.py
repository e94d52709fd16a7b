"""Emitters that mean no good, or too many of them, while others go on."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import time

import psutil
import pytest
from experiment import body_of, form
from support import get_json, wait_until


@pytest.fixture
def many_files():
    """Let this process have as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def test_slow_loris(experiment, many_files):
    """Thousands of connections that begin a request and never finish it, a byte at a time."""
    number = 5000 if many_files > 12_000 else 2000
    experiment.analyzers()
    fastdist = experiment.serve({"server": {"header_timeout": "3s"}})
    emitter = experiment.emitter().start().wait_for(100)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(experiment.port)) for _ in range(number)]
        for connection in slow:
            connection.sendall(b"POST /logs HTTP/1.1\r\nHost: test\r\nX-Slow: ")
        assert sum(row["state"] == "running" for row in fastdist.stats()["workers"]) == 2
        before, started = emitter.count(202), time.monotonic()
        ended = 0
        while slow and time.monotonic() - started < 15:
            for connection in slow[:: form(20, 5)]:
                with contextlib.suppress(OSError):
                    connection.send(b"x")
            # A reader in poll, for select takes no more than 1,024.
            poll = select.poll()
            by_number = {connection.fileno(): connection for connection in slow}
            for each in by_number:
                poll.register(each, select.POLLIN)
            for each, _ in poll.poll(200):
                with contextlib.suppress(OSError):
                    answer = by_number[each].recv(4096)
                    assert not answer or answer.startswith(b"HTTP/1.1 408 "), answer
                slow.remove(by_number[each])
                ended += 1
        assert ended == number, f"{len(slow)} of {number} are still there after {time.monotonic() - started:.0f} s"
        assert emitter.count(202) - before > 200, "the others go on meanwhile"
    experiment.judge(f"{number:,} slow-loris connections")
    assert {*emitter.answers.values()} == {202}
    assert sum(row["restarts"] for row in fastdist.stats()["workers"]) == 0


def test_emitters_that_read_no_responses(experiment, many_files):
    """They send until they are read no more: that costs them, not the worker's memory."""
    assert many_files > 500
    experiment.analyzers()
    fastdist = experiment.serve({"server": {"body_timeout": "2s"}, "queue": {"capacity": "256MiB"}})
    emitter = experiment.emitter().start().wait_for(100)
    rude = experiment.emitter()  # only its ledger is used
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connect(experiment.port)) for _ in range(form(6, 30))]
        for number, connection in enumerate(sockets):
            send_until_nobody_reads(connection, rude, number)
        memory = sum(psutil.Process(pid).memory_info().rss for pid in fastdist.worker_pids())
        before = emitter.count(202)
        wait_until(lambda: emitter.count(202) - before > 200, "the others go on meanwhile")
        wait_until(lambda: all(was_ended(connection) for connection in sockets), "they are shown out", 60)
    assert memory < 2 * 300 << 20
    experiment.judge("emitters that do not read their answers")
    assert {*emitter.answers.values()} == {202}


def send_until_nobody_reads(connection: socket.socket, ledger, number: int) -> None:
    """Send packets, each with many that are none behind it, until the connection takes no more for a while."""
    none = b"POST /logs HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\n{}" * 50
    connection.settimeout(0.5)
    for count in range(2000):
        name = f"{ledger.prefix}-{number}-{count}"
        ledger.answers[name] = None
        try:
            connection.sendall(request_of(name) + none)
        except OSError:  # a time-out, or shown out already
            return
    raise AssertionError("100,000 answers are waiting, and the next request is still taken")


def request_of(name: str) -> bytes:
    body = body_of(name)
    return b"POST /logs HTTP/1.1\r\nHost: test\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        name.encode(),
        len(body),
        body,
    )


def was_ended(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection, without reading what waits on it."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


def test_file_descriptors_are_exhausted(experiment, many_files):
    """So few that emitters' and analyzers' connections cannot all have one: nothing crashes, and it passes."""
    assert many_files > 2000
    experiment.analyzers()
    limit = 90
    fastdist = experiment.serve({"server": {"workers": 2}}, prefix=("prlimit", f"--nofile={limit}:{limit}"))
    assert "server.max_connections is more than the limit on open files allows" in fastdist.output
    emitter = experiment.emitter(connections=8).start().wait_for(50)
    for _ in range(form(3, 12)):
        with contextlib.ExitStack() as stack:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    stack.enter_context(connect(experiment.port)).send(b"POST /logs HTTP/1.1\r\n")
            time.sleep(0.3)
    emitter.wait_for(100)
    wait_until(lambda: get_json(fastdist.port, "/health")["status"] == "ok", "it recovers")
    experiment.judge("file descriptors exhausted (90 for each process)")
    assert sum(row["restarts"] for row in fastdist.stats()["workers"]) == 0
