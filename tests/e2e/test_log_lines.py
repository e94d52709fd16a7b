"""What the log says of packets turned away and given up: few lines, with counts, without content."""

from __future__ import annotations

import json
import socket

from support import Emitter, request, wait_until

SECRET = "4929-1234-5678-9012"
INVALID = json.dumps({"emitterId": "web-42", "messages": [{"level": "info", "card": SECRET}]}).encode()


def lines_of(fastdist, **members):
    """Return the lines of the log that have these members."""
    found = []
    for line in fastdist.output.splitlines():
        if line.startswith("{"):
            document = json.loads(line)
            assert "message" in document, "the key of all lines"
            if all(document.get(name) == value for name, value in members.items()):
                found.append(document)
    return found


def send_at_once(port, body, count):
    """Send a packet many times in one write; return how many were refused."""
    head = f"POST /logs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall((head.encode() + body) * count)
        answers = b""
        while answers.count(b"HTTP/1.1 ") < count or not answers.endswith(b"}"):
            received = client.recv(65536)
            assert received
            answers += received
    return answers.count(b"HTTP/1.1 400 ")


def test_fifty_invalid_packets_are_one_line(mocks, serve):
    fastdist = serve(mocks)
    assert send_at_once(fastdist.port, INVALID, 50) == 50
    wait_until(lambda: lines_of(fastdist, reason="invalid"), "they are logged")
    (line,) = lines_of(fastdist, reason="invalid")
    assert (line["message"], line["level"], line["requests"]) == ("requests rejected", "warning", 50)
    assert (line["client"], line["pointer"]) == ("127.0.0.1", "/messages/0/message")
    assert request(fastdist.port, "POST", "/logs", b"{", {"Content-Type": "application/json"})[0] == 400
    assert fastdist.stop() == 0, "and what was not logged yet is"
    (line,) = lines_of(fastdist, reason="malformed")
    assert line["requests"] == 1
    assert len(lines_of(fastdist, reason="invalid")) == 1
    assert SECRET not in fastdist.output


def test_a_full_queue_is_an_event(mocks, serve):
    """With no analyzer, which is one too; the counts of its lines are those of /stats."""
    fastdist = serve(mocks, {"queue": {"capacity": "1MiB"}})
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port, connections=4).start()
    wait_until(lambda: emitter.count(503) > 500, "the queue is full", progress=lambda: len(emitter.answers))
    emitter.stop()
    wait_until(lambda: lines_of(fastdist, message="queue full; packets are rejected"), "that is logged")
    assert lines_of(fastdist, message="no analyzer is online; packets wait in the queue")
    mocks.set_all(refuse=False)
    wait_until(lambda: lines_of(fastdist, message="queue has room"), "it is over", 60)
    assert lines_of(fastdist, message="an analyzer is online again")
    lines = lines_of(fastdist, reason="queue_full")
    assert 2 <= len(lines) <= 4
    assert sum(line["requests"] for line in lines) == fastdist.stats()["rejected"]["queueFull"] > 500
    assert lines[0]["client"] == "127.0.0.1"
    fastdist.wait_at_rest()
    assert not emitter.accepted - mocks.delivered().keys()


def test_packets_given_up_are_logged(mocks, serve):
    fastdist = serve(mocks, {"health": {"fall": 10_000}})
    mocks.set_all(status=422)
    emitter = Emitter(fastdist.port).send(100)
    fastdist.wait_at_rest()
    wait_until(
        lambda: sum(line["packets"] for line in lines_of(fastdist, reason="refused")) == 100, "all are logged", 60
    )
    line, *more = lines_of(fastdist, reason="refused")
    assert len(more) <= 1
    assert (line["message"], line["status"], line["analyzer"] in mocks.endpoints) == ("packets given up", 422, True)
    (response,) = {each["response"] for each in fastdist.dead_letters()}
    assert response
    assert response not in fastdist.output
    assert "newsletter" not in fastdist.output
    assert len(emitter.accepted) == 100


def test_connections_turned_away_are_logged(mocks, serve):
    fastdist = serve(mocks, {"server": {"max_connections": 3, "workers": 1}})
    clients = [socket.create_connection(("127.0.0.1", fastdist.port)) for _ in range(10)]
    try:
        wait_until(lambda: lines_of(fastdist, reason="max_connections"), "they are logged")
        wait_until(
            lambda: sum(line["connections"] for line in lines_of(fastdist, reason="max_connections")) == 7, "all", 60
        )
        assert lines_of(fastdist, reason="max_connections")[0]["client"] == "127.0.0.1"
    finally:
        for client in clients:
            client.close()
