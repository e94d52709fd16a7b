"""With nothing wrong: every packet is answered 202, is delivered once and unchanged, and the weights hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import struct
import subprocess
import threading

import pytest
from support import BODY, WEIGHTS, Emitter, compare, own_body, wait_until

MODES = {
    "single": {},
    "pipelined": {"pipeline": 8},
    "batch": {"mode": "batch"},
}
WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [[%s]]
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format("RESULT %%d %%d %%d", summary.requests, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


def check_shares(stats, unit="delivered"):
    """All shares are within 0.1 percentage points of the weights, over all workers, but for what was spilled."""
    total = sum(row[unit] for row in stats["analyzers"])
    spilled = stats["packets"]["spilled"] / stats["packets"]["delivered"]
    for row in stats["analyzers"]:
        assert abs(row[unit] / total - WEIGHTS[row["id"]]) < 0.001 + spilled, (spilled, stats["analyzers"])
        assert row["targetShare"] == WEIGHTS[row["id"]]
        assert row["actualShare"] == pytest.approx(row[unit] / total, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_packet_once_and_weights_hold(mocks, serve, mode):
    fastdist = serve(mocks, {"delivery": MODES[mode]})
    emitter = Emitter(fastdist.port, connections=64).send(20_000)
    assert emitter.count(202) == 20_000
    stats = fastdist.wait_at_rest()
    assert stats["packets"] == dict.fromkeys(stats["packets"], 0) | {
        "received": 20_000,
        "accepted": 20_000,
        "delivered": 20_000,
        "spilled": stats["packets"]["spilled"],
    }
    assert all(worker["accepted"] > 0 for worker in stats["workers"]), "one worker got nothing"
    assert stats["messages"] == {"accepted": 40_000, "delivered": 40_000}
    assert stats["bytes"] == dict.fromkeys(("accepted", "delivered"), 20_000 * len(BODY))
    compare(emitter, mocks)
    check_shares(stats)
    for name in WEIGHTS:
        totals = mocks.totals(name)
        assert (totals["broken"], totals["anonymous"], totals["changed"], totals["maxAttempt"]) == (0, 0, 0, 1)
        assert bool(totals["batches"]) == (mode == "batch")


@pytest.mark.parametrize("mode", MODES)
def test_bodies_arrive_byte_for_byte(mocks, serve, mode):
    mocks.set_all(verify=True)
    fastdist = serve(mocks, {"delivery": MODES[mode]})
    emitter = Emitter(fastdist.port, connections=16, body=own_body).send(2000)
    fastdist.wait_at_rest()
    compare(emitter, mocks)
    assert mocks.digests() == {
        name: hashlib.blake2b(own_body(name), digest_size=8).hexdigest() for name in emitter.accepted
    }
    assert all(mocks.totals(name)["broken"] == 0 for name in WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_weights_hold_while_a_backlog_waits(mocks, serve, mode):
    """Analyzers slower than the emitters, one much more so than the others: with "never" it still gets its share."""
    mocks.set_all(latency=3)  # at first, so that there is a backlog however slowly the emitters come by the processor
    narrow = {
        "connections": 32 if mode == "single" else 4,
        "batch_packets": 8,
        "spill_after": "never",
        "timeout": "60s",
    }
    fastdist = serve(mocks, {"delivery": MODES[mode] | narrow})
    emitter = Emitter(fastdist.port, connections=64).send(20_000)
    waiting = fastdist.stats()["packets"]
    assert waiting["queued"] > 1000, "no backlog"
    mocks.set_all(latency=0.01)
    mocks.set("A2", latency=0.04)
    stats = fastdist.wait_at_rest()
    assert emitter.count(202) == 20_000
    assert stats["packets"]["spilled"] == 0
    compare(emitter, mocks)
    check_shares(stats)


def test_slow_analyzer_loses_part_of_share(mocks, serve):
    mocks.set("A2", latency=0.5)
    fastdist = serve(mocks, {"delivery": {"spill_after": "300ms", "connections": 8}})
    emitter = Emitter(fastdist.port, connections=16).send(3000)
    stats = fastdist.wait_at_rest()
    compare(emitter, mocks)
    shares = {row["id"]: row["actualShare"] for row in stats["analyzers"]}
    assert stats["packets"]["spilled"] > 0
    assert shares["A2"] < 0.2, "it can take 32 a second, and its share were far more"
    assert fastdist.analyzers()["A2"]["state"] == "online"


def test_sticky_keeps_emitter_at_analyzer(mocks, serve):
    fastdist = serve(mocks, {"distribution": {"strategy": "sticky"}})
    emitters = [f"host-{number}" for number in range(300)]
    bodies = [json.dumps({"emitterId": name, "messages": [{"message": "m"}]}).encode() for name in emitters]
    emitter = Emitter(fastdist.port, connections=8, body=lambda name: bodies[int(name.split("-")[1]) % len(bodies)])
    emitter.send(3000)
    stats = fastdist.wait_at_rest()
    compare(emitter, mocks)
    where: dict[int, set[str]] = {}
    for analyzer, rows in mocks.ledger().items():
        for name in rows:
            where.setdefault(int(name.split("-")[1]) % len(bodies), set()).add(analyzer)
    assert all(len(analyzers) == 1 for analyzers in where.values())
    assert all(row["delivered"] > 0 for row in stats["analyzers"])


@pytest.mark.slow
def test_200_000_packets_of_a_load_generator(mocks, serve, tmp_path):
    """The emitter is not ours: wrk, whose every answer must be 202."""
    if not shutil.which("wrk"):
        pytest.skip("wrk is not installed (scripts/peers.sh installs it)")
    fastdist = serve(mocks, {"queue": {"capacity": "256MiB"}, "health": {"fall": 1000}})
    script = tmp_path / "post.lua"
    script.write_text(WRK_SCRIPT % BODY.decode())
    sent = cut_off = 0
    while sent < 200_000:
        command = [
            "wrk",
            "-t2",
            "-c64",
            "-d5s",
            "--timeout",
            "20s",
            "-s",
            script,
            f"http://127.0.0.1:{fastdist.port}/logs",
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        requests, refused, broken = map(int, output.partition("RESULT ")[2].split())
        assert (refused, broken) == (0, 0), output
        sent += requests
        cut_off += 64  # requests under way when wrk stops
    stats = fastdist.wait_at_rest(90)
    accepted = stats["packets"]["accepted"]
    assert stats["packets"]["rejected"] == 0
    assert sent <= accepted <= sent + cut_off
    totals = [mocks.totals(name) for name in WEIGHTS]
    assert sum(row["ids"] for row in totals) == accepted == stats["packets"]["delivered"]
    assert sum(row["acknowledged"] for row in totals) == accepted
    assert stats["packets"]["retried"] == 0
    assert len(mocks.delivered()) == accepted, "an id was given twice"
    check_shares(stats)


class EarlyAnalyzer:
    """Answers 200 when it has a request's head; resets the first ``cuts`` connections then, and reads on in the others.

    ``bodies``: all that were read whole.
    """

    def __init__(self, answer: bytes, cuts: int) -> None:
        self.answer, self.cuts, self.bodies = answer, cuts, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}/analyze"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
            head = b"".join(iter(lines.readline, b"\r\n"))
            connection.sendall(self.answer)
            if not head.startswith(b"POST"):
                return
            self.cuts -= 1
            if self.cuts >= 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = lines.read(length)
            if len(body) == length:
                self.bodies.append(body)
            lines.read()  # until the other side closes


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_packet_answered_early_is_sent_whole(serve, connection):
    """What the analyzer cut off after its 200 was no delivery, and goes again."""
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: {connection}\r\n\r\nok".encode()
    analyzer = EarlyAnalyzer(answer, cuts=2)
    body = b'{"emitterId":"e1","messages":[{"message":"%s"}]}' % (b"x" * (8 << 20))
    with analyzer.listener:
        fastdist = serve({"A1": analyzer.endpoint}, weights={"A1": 1.0})
        assert fastdist.post(body)[0] == 202
        packets = fastdist.wait_at_rest()["packets"]
        assert (packets["delivered"], packets["deadLettered"]) == (1, 0)
        assert packets["retried"] == 2
        wait_until(lambda: analyzer.bodies, "the body is read")
        assert analyzer.bodies == [body]
