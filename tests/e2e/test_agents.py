"""Agents' requests over real sockets: every record that was answered with success arrives exactly once."""

from __future__ import annotations

import gzip
import http.client
import json
import signal
import socket
import threading
import time
from collections import Counter

import pytest
from clients_harness import delivered as messages_delivered
from support import kill_worker, request, wait_until

EACH = 40  # records of a request
NDJSON = "application/x-ndjson"
BUSY = (429, 503)


def _json(texts):
    return (
        "/ingest/app",
        "\n".join(json.dumps({"message": text, "host": "h"}) for text in texts),
        NDJSON,
    )


def _otlp(texts):
    records = [{"body": {"stringValue": text}, "severityNumber": 9} for text in texts]
    return "/v1/logs", json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}), "application/json"


def _varint(number):
    return (bytes([number & 0x7F | 0x80]) + _varint(number >> 7)) if number > 0x7F else bytes([number])


def _field(number, data):
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _protobuf(texts):
    records = b"".join(_field(2, _field(5, _field(1, text.encode()))) for text in texts)
    return "/v1/logs", _field(1, _field(2, records)), "application/x-protobuf"


def _loki(texts):
    values = [[str(time.time_ns()), text] for text in texts]
    return (
        "/loki/api/v1/push",
        json.dumps({"streams": [{"stream": {"job": "x"}, "values": values}]}),
        "application/json",
    )


def _splunk(texts):
    return (
        "/services/collector",
        "".join(json.dumps({"event": text, "host": "h"}) for text in texts),
        "application/json",
    )


def _bulk(texts):
    lines = [line for text in texts for line in ('{"create":{}}', json.dumps({"message": text}))]
    return "/logs/_bulk", "\n".join(lines) + "\n", NDJSON


FORMATS = {
    "json": _json,
    "otlp": _otlp,
    "otlp, protobuf": _protobuf,
    "loki": _loki,
    "splunk": _splunk,
    "elasticsearch": _bulk,
}


class Agent:
    """Sends requests on one connection, again after a 429 or 503; ``accepted``: the texts of what was taken."""

    def __init__(self, port, kind, name, *, packed=False):
        self.make, self.name, self.packed = FORMATS[kind], name, packed
        self.accepted, self.refused, self.began = [], Counter(), False
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.file = self.connection.makefile("rb")

    def send(self, requests, each=EACH):
        for number in range(requests):
            texts = [f"{self.name}/{number}/{record}" for record in range(each)]
            while (status := self.ask(texts)) in BUSY:
                self.refused[status] += 1
                time.sleep(0.05)
            assert status in (200, 204), status
            self.accepted += texts

    def ask(self, texts):
        target, body, kind = self.make(texts)
        body = body.encode() if isinstance(body, str) else body
        coding = ""
        if self.packed:
            body, coding = gzip.compress(body), "Content-Encoding: gzip\r\n"
        head = (
            f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{coding}Content-Length: {len(body)}\r\n\r\n"
        )
        self.began = True
        self.connection.sendall(head.encode() + body)
        status = int(self.file.readline().split()[1])
        length = 0
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        self.file.read(length)
        return status


def delivered(mocks):
    """Return how often the text of each record arrived in what was acknowledged."""
    counts = Counter()
    for _, message, times in messages_delivered(mocks):
        counts[message["message"]] += times
    return counts


def run_all(agents, *arguments):
    threads = [threading.Thread(target=agent.send, args=arguments) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("durability", ["memory", "disk", "fsync"])
def test_every_record_arrives_once(mocks, serve, durability):
    mocks.set_all(keep=True)
    fastdist = serve(mocks, {"queue": {"durability": durability}})
    agents = [
        Agent(fastdist.port, kind, f"{kind}-{number}", packed=number > 0) for kind in FORMATS for number in range(2)
    ]
    run_all(agents, 20)
    stats = fastdist.wait_at_rest()
    sent = [text for agent in agents for text in agent.accepted]
    assert len(sent) == 20 * EACH * len(agents)
    assert delivered(mocks) == Counter(sent)
    assert stats["messages"]["accepted"] == len(sent)
    assert stats["packets"]["rejected"] == 0
    assert {name: each["records"] for name, each in stats["protocols"].items()} == {
        name: 20 * EACH * 2 * (2 if name == "otlp" else 1) for name in stats["protocols"]
    }
    _, _, metrics = request(fastdist.port, "GET", "/metrics")
    assert b'fastdist_requests_total{protocol="loki",code="204"} 40\n' in metrics
    assert b'fastdist_records_total{protocol="json"} 1600\n' in metrics


def open_when_full(mocks, agents):
    try:
        wait_until(lambda: any(agent.refused.total() for agent in agents), "the queue is full", 120)
    finally:
        mocks.set_all(status=200)


def test_each_record_once_with_a_full_queue(mocks, serve):
    mocks.set_all(keep=True)
    fastdist = serve(mocks, {"queue": {"capacity": "1MiB"}, "server": {"workers": 1}, "retry": {"cap": "200ms"}})
    agents = [Agent(fastdist.port, kind, kind) for kind in FORMATS]
    mocks.set_all(status=503)
    opening = threading.Thread(target=open_when_full, args=(mocks, agents))
    opening.start()
    run_all(agents, 120)
    opening.join()
    fastdist.wait_at_rest()
    assert sum(agent.refused.total() for agent in agents) > 0
    assert delivered(mocks) == Counter(text for agent in agents for text in agent.accepted)


def test_worker_is_killed_while_agents_send(mocks, serve):
    """What was answered with success arrives at least once; a request without a response is sent again."""
    mocks.set_all(keep=True)
    fastdist = serve(mocks, {"queue": {"durability": "disk"}})
    fastdist_pids = [row["pid"] for row in fastdist.stats()["workers"]]
    agent = Agent(fastdist.port, "otlp", "before")
    agent.send(20)
    for pid in fastdist_pids:
        kill_worker(pid)
    wait_until(lambda: {row["restarts"] for row in fastdist.stats()["workers"]} == {1}, "two new workers")
    after = Agent(fastdist.port, "otlp", "after")
    after.send(5)
    fastdist.wait_at_rest()
    counts = delivered(mocks)
    assert set(counts) == {*agent.accepted, *after.accepted}
    assert min(counts.values()) >= 1


def test_large_bodies_hold_up_no_one(mocks, serve):
    fastdist = serve(mocks, {"server": {"workers": 1}, "queue": {"capacity": "256MiB"}})
    body = b'{"message":"%b"}\n' % (b"x" * 100) * 80_000
    done = []

    def flood():
        for _ in range(3):
            status, _, _ = request(fastdist.port, "POST", "/ingest", body, {"Content-Type": NDJSON})
            done.append(status)

    thread = threading.Thread(target=flood)
    thread.start()
    accepted = 0
    while thread.is_alive():
        assert fastdist.post()[0] == 202
        accepted += 1
    thread.join()
    assert done == [200] * 3
    assert accepted > 3 * 4, "it would be one a body or two if each waited for the other"
    fastdist.wait_at_rest()


@pytest.mark.slow
def test_killed_while_storing_large_batches(mocks, serve):
    """At whatever piece of one: what was answered arrives, and the figures agree with that."""
    mocks.set_all(keep=True)
    settings = {"queue": {"capacity": "256MiB", "durability": "disk"}, "delivery": {"mode": "batch"}}
    fastdist = serve(mocks, settings | {"server": {"workers": 1}})
    accepted, stop, unanswered = [], threading.Event(), []

    def flood():
        while not stop.is_set():
            number = len(accepted) + len(unanswered)
            names = [f"r{number}-{record}" for record in range(2000)]
            body = "\n".join(json.dumps({"message": name, "host": name, "x": "y" * 1500}) for name in names)
            try:
                status, _, _ = request(fastdist.port, "POST", "/ingest", body.encode(), {"Content-Type": NDJSON})
            except (OSError, http.client.HTTPException):  # it was killed, or there was none
                unanswered.append(names)
                time.sleep(0.02)
                continue
            assert status == 200
            accepted.append(names)

    thread = threading.Thread(target=flood)
    thread.start()
    kills = 0
    while kills < 5 or not (unanswered or kills == 50):
        kills += 1
        before = len(accepted)
        wait_until(lambda before=before: len(accepted) > before, "a batch is stored")
        time.sleep(kills % 6 / 40)  # somewhere in the next
        kill_worker(fastdist.stats()["workers"][0]["pid"])
        wait_until(lambda kills=kills: fastdist.stats()["workers"][0]["restarts"] == kills, "a new worker")
    stop.set()
    thread.join()
    assert unanswered
    stats = fastdist.wait_at_rest()
    counts = delivered(mocks)
    assert {name for names in accepted for name in names} <= set(counts)
    assert set(counts) <= {name for names in accepted + unanswered for name in names}
    assert stats["packets"]["accepted"] >= len(counts)


def test_request_is_finished_at_the_end(mocks, serve):
    mocks.set_all(keep=True)
    fastdist = serve(mocks, {"queue": {"capacity": "256MiB"}, "server": {"workers": 1}})
    agent = Agent(fastdist.port, "otlp", "last")
    thread = threading.Thread(target=agent.send, args=(1, 40_000))
    thread.start()
    wait_until(lambda: agent.began, "it is being sent")
    fastdist.signal(signal.SIGTERM)
    thread.join()
    assert fastdist.wait() == 0
    assert len(agent.accepted) == 40_000
    assert delivered(mocks) == Counter(agent.accepted)
