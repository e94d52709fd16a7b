"""The mock analyzers, from outside: a process, its flags, its sockets.

The other tests trust the mock's ledger, so this file checks that each fault does what it says on the wire, and that
each outcome lands in the right one of the three counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10  # seconds: only a broken test waits so long
SILENCE = 0.1  # seconds without a byte that count as "nothing more comes"


class Mock:
    """A running ``python -m mock_analyzers`` and ways to talk to it."""

    def __init__(self, *flags, ports="0,0"):
        command = [sys.executable, "-m", "mock_analyzers", "--ports", ports, "--control-port", "0", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        self.lines = [self.process.stdout.readline().strip() for _ in range(len(ports.split(",")) + 1)]
        *self.ports, self.desk = [urlsplit(line.split()[-1]).port for line in self.lines]

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def request(self, method, path, body=None, headers=None, port=None):
        """One request on a connection of its own: (status, headers, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.ports[0], timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def send(self, packet_id, body=b"{}", attempt="1", **more):
        return self.request("POST", "/analyze", body, {"X-Packet-Id": packet_id, "X-Attempt": attempt}, **more)

    def send_batch(self, ids, body, count=None):
        headers = {"X-Packet-Ids": ",".join(ids), "X-Packet-Count": str(len(ids) if count is None else count)}
        return self.request("POST", "/analyze", body, headers | {"X-Attempt": "1"})

    def configure(self, port=None, path="/control", **options):
        status, _, body = self.request("POST", path, json.dumps(options), port=port)
        assert status == 200, body
        return json.loads(body)

    def control(self, path="/control", port=None):
        status, _, body = self.request("GET", path, port=port)
        assert status == 200, body
        return json.loads(body)

    def totals(self):
        return self.control()["totals"]

    def counts(self, packet_id):
        """Return (acknowledged, received, ambiguous)."""
        for line in self.request("GET", "/control/ids")[2].decode().splitlines():
            name, *figures = line.split(" ")
            if name == packet_id:
                return tuple(int(figure) for figure in figures)
        return (0, 0, 0)

    def connect(self, port=None):
        return socket.create_connection(("127.0.0.1", port or self.ports[0]), timeout=PATIENCE)

    def raw(self, data, answers=None):
        """Send bytes and ``read`` what comes."""
        with self.connect() as sock:
            sock.sendall(data)
            return read(sock, answers)


def read(sock, answers=None):
    """Return what comes until the connection ends, or until so many answers and a silence; and how it ended."""
    got = b""
    try:
        while True:
            enough = answers is not None and got.count(b"HTTP/1.1 ") >= answers
            sock.settimeout(SILENCE if enough else PATIENCE)
            piece = sock.recv(65536)
            if not piece:
                return got, "closed"
            got += piece
    except TimeoutError:
        return got, "open"
    except ConnectionError:
        return got, "reset"


def post(packet_id, body=b"{}", extra=b""):
    return b"POST /analyze HTTP/1.1\r\nHost: a\r\nX-Packet-Id: %s\r\nX-Attempt: 1\r\n%sContent-Length: %d\r\n\r\n%s" % (
        packet_id.encode(),
        extra,
        len(body),
        body,
    )


def digest(body):
    return hashlib.blake2b(body, digest_size=8).hexdigest()


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def process():
    mock = Mock("--seed", "1")
    yield mock
    assert mock.stop() == (0, "", "")  # whatever the tests sent, no traceback


@pytest.fixture
def start():
    started = []

    def start_one(*flags):
        started.append(Mock(*flags))
        return started[-1]

    yield start_one
    for mock in started:
        if mock.process.poll() is None:
            mock.stop(signal.SIGKILL)


@pytest.fixture
def mock(process):
    harmless = process.control(port=process.desk)["analyzers"][0]["options"]
    yield process
    for name in ("A1", "A2"):
        process.configure(port=process.desk, path=f"/control/{name}", **harmless)
        process.request("POST", f"/control/{name}/reset", port=process.desk)


# The process and its flags.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_announces_analyzers_ends_cleanly(start, number):
    mock = start("--ids", "left,right")
    assert mock.lines == [
        f"left listens on http://127.0.0.1:{mock.ports[0]}/analyze",
        f"right listens on http://127.0.0.1:{mock.ports[1]}/analyze",
        f"control listens on http://127.0.0.1:{mock.desk}/control",
    ]
    with mock.connect() as idle:
        assert mock.stop(number) == (0, "", "")
        assert read(idle)[1] == "closed"


def test_flags_are_options_of_all_analyzers(start):
    values = {
        "latency": 0.25,
        "jitter": 0.5,
        "failureRate": 0.1,
        "failureStatus": 502,
        "status": 429,
        "rejects": "bad [0-9]",
        "retryAfter": 3.0,
        "resetRate": 0.2,
        "truncateRate": 0.3,
        "garbageRate": 0.4,
        "wrongLengthRate": 0.6,
        "closeEvery": 7,
        "silentClose": 8,
    }
    switches = ("hang", "chunked", "interim", "unhealthy", "healthHang", "refuse", "verify", "keep")
    flags = [f"--{dashed(name)}={value}" for name, value in values.items()] + [f"--{dashed(name)}" for name in switches]
    mock = start(*flags)
    assert mock.lines[0].startswith("A1 refuses http://127.0.0.1:")
    analyzers = mock.control(port=mock.desk)["analyzers"]
    assert [analyzer["id"] for analyzer in analyzers] == ["A1", "A2"]
    for analyzer in analyzers:
        assert analyzer["options"] == values | dict.fromkeys(switches, True)
    with pytest.raises(ConnectionRefusedError):
        mock.connect()
    assert mock.stop() == (0, "", "")


def dashed(name):
    return re.sub("[A-Z]", lambda upper: "-" + upper[0].lower(), name)


def test_quiet_prints_only_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "mock_analyzers", "--quiet", "--ports", f"0,{port}", "--control-port", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.fullmatch(rf"mock_analyzers: cannot start: A2 on 127.0.0.1:{port}: .*in use.*\n", done.stderr)


@pytest.mark.parametrize(
    "flags", [["--failure-rate", "2"], ["--ports", "3001,x"], ["--ids", "A1,A1,A2,A3"], ["--status", "100"]]
)
def test_wrong_flags_are_refused(flags):
    command = [sys.executable, "-m", "mock_analyzers", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_the_ledger_file_survives_a_kill(start, tmp_path):
    ledger = tmp_path / "ledger"
    mock = start("--ledger", str(ledger), "--status=200")
    mock.send("one")
    mock.send("two", attempt="3", port=mock.ports[1])
    mock.send_batch(["three", "four"], b"[1,2]")
    mock.configure(status=500)
    mock.send("never")
    expected = ["four A1 1", "one A1 1", "three A1 1", "two A2 3"]
    wait_for(lambda: sorted(ledger.read_text().splitlines()) == expected)
    mock.stop(signal.SIGKILL)
    assert sorted(ledger.read_text().splitlines()) == expected


def test_the_ledger_file_is_complete_at_exit(start, tmp_path):
    ledger = tmp_path / "ledger"
    ledger.write_text("before A1 1\n")
    mock = start("--ledger", str(ledger))
    mock.raw(b"".join(post(f"p{number}") for number in range(500)), answers=500)
    assert mock.stop() == (0, "", "")
    assert ledger.read_text().splitlines() == ["before A1 1", *(f"p{number} A1 1" for number in range(500))]


def test_a_seed_makes_faults_repeatable(start):
    patterns = []
    for _ in range(2):
        mock = start("--seed", "42", "--failure-rate", "0.5")
        answers, _ = mock.raw(b"".join(post(str(number)) for number in range(100)), answers=100)
        patterns.append(re.findall(rb"HTTP/1.1 (\d+)", answers))
        mock.stop()
    assert len(patterns[0]) == 100
    assert 20 < patterns[0].count(b"500") < 80
    assert patterns[0] == patterns[1]


# Receiving and counting.


def test_packet_is_acknowledged_and_counted(mock):
    status, headers, body = mock.send("p1", b'{"a":1}')
    assert (status, headers["Content-Type"], headers["Content-Length"]) == (200, "application/json", str(len(body)))
    assert json.loads(body) == {"status": "ok"}
    assert headers["Connection"] is None
    assert mock.counts("p1") == (1, 0, 0)
    totals = mock.totals()
    assert totals | {"requests": 1, "packets": 1, "acknowledged": 1, "bytes": 7, "ids": 1, "maxAttempt": 1} == totals
    assert totals | {"batches": 0, "duplicates": 0, "ambiguous": 0, "received": 0, "waiting": 0} == totals


def test_repeated_ids_keep_highest_attempt(mock):
    for attempt in ("1", "9", "2"):
        mock.send("p1", attempt=attempt)
    mock.send("p2")
    assert mock.counts("p1") == (3, 0, 0)
    assert mock.totals() | {"duplicates": 2, "ids": 2, "maxAttempt": 9} == mock.totals()


def test_retry_after_failure_is_no_duplicate(mock):
    mock.configure(status=503)
    mock.send("p1")
    mock.configure(status=None)
    mock.send("p1", attempt="2")
    assert mock.counts("p1") == (1, 1, 0)
    assert mock.totals()["duplicates"] == 0


def test_any_path_or_missing_id_counts(mock):
    assert mock.request("POST", "/other?x=1", b"{}")[0] == 200
    assert mock.request("POST", "/controlled", b"{}")[0] == 200
    assert mock.totals() | {"packets": 2, "anonymous": 2, "ids": 0} == mock.totals()
    assert mock.request("GET", "/analyze")[0] == 404
    assert mock.request("PUT", "/analyze", b"{}")[0] == 404


def test_a_batch_counts_each_of_its_packets(mock):
    assert mock.send_batch(["a", "b", "c"], b'[{"x":[1,2]},2,"3"]')[0] == 200
    assert [mock.counts(name) for name in "abc"] == [(1, 0, 0)] * 3
    assert mock.totals() | {"requests": 1, "packets": 3, "batches": 1, "broken": 0} == mock.totals()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("body", "count"), [(b"[1,2]", 3), (b"[1]", 2), (b"[1,2,3]", 2), (b"[1,2", 2), (b"{}", 2), (b"", 2), (b"x[1]", 2)]
)
def test_inconsistent_batch_is_broken(mock, body, count, verify):
    mock.configure(verify=verify)
    assert mock.send_batch(["a", "b"], body, count)[0] == 200
    assert mock.totals()["broken"] == 1


def test_verify_finds_bad_or_changed_bodies(mock):
    mock.send("p0", b"not json")
    assert mock.totals()["broken"] == 0
    mock.configure(verify=True)
    mock.send("p1", b"{")
    mock.send("p2", b'"\xff"')
    mock.send("p3", b'{"a": 1}')
    mock.send("p3", b'{"a":1}')
    assert mock.totals() | {"broken": 2, "changed": 1} == mock.totals()
    assert mock.control("/control/digests") == {"p3": digest(b'{"a": 1}')}


def test_batch_digests_are_its_packets(mock):
    mock.configure(verify=True)
    rng = random.Random(7)
    packets = [b'"]\\",["', b' {"a,]":"\\\\"} ', b"\t[ ]", b"{}\n", b'{"k\\"":[[],{"":","}]}', '"ü☃"'.encode(), b"-1e5"]
    sent = {}
    for batch in range(40):
        bodies = [rng.choice([*packets, random_json(rng)]) for _ in range(rng.randrange(1, 9))]
        ids = [f"{batch}-{number}" for number in range(len(bodies))]
        mock.send_batch(ids, b"[" + b",".join(bodies) + b"]")
        sent |= dict(zip(ids, map(digest, bodies), strict=True))
    assert mock.control("/control/digests") == sent
    assert mock.totals()["broken"] == 0


def test_kept_packets_are_those_received(mock):
    assert mock.control("/control/bodies") == {}
    mock.configure(keep=True)
    mock.send("p1", b'{"a": 1}')
    mock.send("p2", b"{")
    mock.send_batch(["p3", "p4"], b'[ "x" ,[2]]')
    assert mock.totals()["broken"] == 1
    mock.configure(keep=False)
    mock.send("p5", b"5")
    assert mock.control("/control/digests").keys() == {"p1", "p3", "p4"}
    assert mock.control("/control/bodies") == {"p1": {"a": 1}, "p3": "x", "p4": [2]}


def random_json(rng, depth=0):
    kind = rng.randrange(5 if depth < 3 else 3)
    text = "".join(rng.choice('ab,[]{}":\\ \n\u2603') for _ in range(rng.randrange(8)))
    value = [text, rng.random(), None][kind] if kind < 3 else None
    if kind == 3:
        value = [json.loads(random_json(rng, depth + 1)) for _ in range(rng.randrange(4))]
    if kind == 4:
        value = {text + str(n): json.loads(random_json(rng, depth + 1)) for n in range(rng.randrange(4))}
    return json.dumps(value, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5).encode()


# HTTP.


def test_pipelined_requests_keep_order(mock):
    requests = [
        post(f"p{number}") if number % 3 else b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" for number in range(60)
    ]
    got, end = mock.raw(b"".join(requests), answers=60)
    bodies = re.findall(rb'\{"status":"ok"[^}]*\}', got)
    assert end == "open"
    assert [b"A1" in body for body in bodies] == [number % 3 == 0 for number in range(60)]
    assert mock.totals()["acknowledged"] == 40


def test_chunked_bodies_in_small_pieces(mock):
    mock.configure(verify=True)
    chunked = (
        b"POST /analyze HTTP/1.1\r\nHost: a\r\nX-Packet-Id: p1\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'4\r\n{"a"\r\n3\r\n:1}\r\n0\r\n\r\n'
    )
    with mock.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in chunked + post("p2", b"[ ]") + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n":
            sock.sendall(bytes([byte]))
        got, _ = read(sock, answers=3)
    assert got.count(b"HTTP/1.1 200") == 3
    assert got.endswith(b'"id":"A1"}')
    assert mock.control("/control/digests") == {"p1": digest(b'{"a":1}'), "p2": digest(b"[ ]")}


def test_close_and_continue_are_honoured(mock):
    got, end = mock.raw(post("p1", extra=b"Connection: close\r\n"))
    assert b"\r\nConnection: close\r\n" in got
    assert end == "closed"
    got, end = mock.raw(post("p2").replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert got.startswith(b"HTTP/1.1 200")
    assert end == "closed"
    got, _ = mock.raw(post("p3", extra=b"Expect: 100-continue\r\n").removesuffix(b"{}"), answers=1)
    assert got == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert mock.totals()["acknowledged"] == 2


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"HELLO\r\n\r\n",
        b"POST /analyze HTTP/1.1\r\nbroken header\r\n\r\n",
        b"POST /analyze HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_non_http_gets_400_and_close(mock, data):
    got, end = mock.raw(post("p1") + data + post("p2"))
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"400"]
    assert b"Connection: close" in got
    assert end in {"closed", "reset"}
    assert mock.counts("p1") == (1, 0, 0)
    assert mock.counts("p2") == (0, 0, 0)


def test_noise_stops_nothing(mock):
    rng = random.Random(3)
    for _ in range(150):
        data = bytearray(post("p", b'{"a":1}') + b"GET /control/ids HTTP/1.1\r\nHost: a\r\n\r\n")
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with mock.connect() as sock:
            sock.sendall(data[: rng.randrange(len(data))])
    assert mock.send("after")[0] == 200


# Control.


def test_health_responds_as_configured(mock):
    status, _, body = mock.request("GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok", "id": "A1"})
    assert mock.request("HEAD", "/health")[2] == b""
    mock.configure(unhealthy=True)
    assert mock.request("GET", "/health")[0] == 503
    mock.configure(healthHang=True)
    assert mock.raw(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", answers=0) == (b"", "open")
    assert mock.send("p1")[0] == 200


def test_invalid_options_change_nothing(mock):
    before = mock.control()["options"]
    status, _, body = mock.request("POST", "/control", b'{"latency":1,"foo":1,"bar":2}')
    problem = json.loads(body)
    assert status == 400
    assert problem["unknown"] == ["bar", "foo"]
    assert set(problem["known"]) == set(before)
    for wrong in (b'{"latency":-1}', b'{"status":42}', b'{"hang":1}', b'{"resetRate":1.5}', b"[]", b"{"):
        status, _, body = mock.request("POST", "/control", wrong)
        assert status == 400
        assert json.loads(body)["error"]
    assert mock.control()["options"] == before
    assert mock.request("POST", "/control/nothing")[0] == 404
    assert mock.request("GET", "/control/A9", port=mock.desk)[0] == 404
    assert mock.request("GET", "/health", port=mock.desk)[0] == 404


def test_analyzers_have_options_and_ledgers(mock):
    mock.configure(status=500)
    assert mock.send("p1")[0] == 500
    assert mock.send("p1", port=mock.ports[1])[0] == 200
    assert mock.counts("p1") == (0, 1, 0)
    assert mock.request("GET", "/control/A2/ids", port=mock.desk)[2] == b"p1 1 0 0\n"
    assert mock.control("/control/A1", port=mock.desk)["options"]["status"] == 500
    assert mock.control("/control/A2", port=mock.desk)["totals"]["acknowledged"] == 1
    every = mock.configure(port=mock.desk, status=404)["analyzers"]
    assert [analyzer["options"]["status"] for analyzer in every] == [404, 404]


def test_reset_forgets_all_but_options(mock):
    mock.configure(verify=True, status=503)
    mock.send("p1")
    mock.send_batch(["a"], b"[1,2]")
    status, _, body = mock.request("POST", "/control/reset")
    totals = json.loads(body)["totals"]
    assert status == 200
    assert totals.pop("faults") == {}
    assert totals.pop("connections") == 1
    assert not any(totals.values())
    assert mock.request("GET", "/control/ids")[2] == b""
    assert mock.control("/control/digests") == {}
    assert mock.control()["options"]["status"] == 503


def test_long_id_lists_are_whole_under_load(mock):
    mock.configure(verify=True)
    ids = [f"{number:036d}" for number in range(30_000)]
    for first in range(0, len(ids), 500):
        some = ids[first : first + 500]
        mock.send_batch(some, json.dumps(some).encode())
    stop = threading.Event()

    def keep_sending():
        while not stop.is_set():
            mock.send("more")

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        lines = mock.request("GET", "/control/ids")[2].decode().splitlines()
        digests = mock.control("/control/digests")
    finally:
        stop.set()
        sender.join()
    assert [line for line in lines if "more" not in line] == [f"{packet_id} 1 0 0" for packet_id in ids]
    assert set(digests) - {"more"} == set(ids)
    assert digests[ids[1]] == digest(f' "{ids[1]}"'.encode())


def test_control_does_not_suffer_the_faults(mock):
    mock.configure(hang=True, latency=60, resetRate=1, garbageRate=1, status=500, closeEvery=1, interim=True)
    assert mock.control()["options"]["hang"] is True
    assert mock.request("GET", "/health")[0] == 200


def test_open_connections_are_counted(mock):
    with mock.connect(), mock.connect():
        wait_for(lambda: mock.totals()["connections"] == 3)  # with the one that asks
    wait_for(lambda: mock.totals()["connections"] == 1)


# Faults.


def test_latency_delays_pipelined_together(mock):
    mock.configure(latency=0.3, jitter=0.2)
    begin = time.monotonic()
    with mock.connect() as sock:
        sock.sendall(b"".join(post(str(number)) for number in range(30)) + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        got, _ = read(sock, answers=31)
    assert 0.3 <= time.monotonic() - begin < 0.3 * 30
    assert got.count(b"HTTP/1.1 200") == 31
    assert got.endswith(b'"id":"A1"}')
    assert mock.totals() | {"waiting": 0, "acknowledged": 30} == mock.totals()


def test_jitter_delays_too(mock):
    mock.configure(jitter=0.5)
    begin = time.monotonic()
    got, _ = mock.raw(b"".join(post(str(number)) for number in range(40)), answers=40)
    assert got.count(b"HTTP/1.1 200") == 40
    assert time.monotonic() - begin > 0.25  # the longest of 40 draws from 0..0.5


def test_client_gone_early_is_not_acked(mock):
    mock.configure(latency=30)
    with mock.connect() as sock:
        sock.sendall(post("p1") + post("p2"))
        wait_for(lambda: mock.totals()["waiting"] == 2)
    wait_for(lambda: mock.totals()["received"] == 2)
    assert mock.counts("p1") == (0, 1, 0)
    assert mock.totals()["waiting"] == 0


@pytest.mark.parametrize("status", [400, 413, 429, 500, 503, 302])
def test_failure_status_is_not_acknowledged(mock, status):
    mock.configure(status=status, retryAfter=1.5)
    got, headers, body = mock.send("p1")
    assert got == status
    assert headers["Retry-After"] == ("2" if status in {429, 503} else None)
    assert headers["Location"] == ("/elsewhere" if status == 302 else None)
    assert json.loads(body)["code"] == status
    assert mock.counts("p1") == (0, 1, 0)
    assert mock.totals()["faults"] == {str(status): 1}


def test_only_matching_packets_are_rejected(mock):
    mock.configure(rejects="[13579]x")
    assert [mock.send(name, body)[0] for name, body in (("p1", b'"3x"'), ("p2", b'"4x"'))] == [422, 200]
    assert (mock.counts("p1"), mock.counts("p2")) == ((0, 1, 0), (1, 0, 0))
    assert mock.request("POST", "/control", b'{"rejects": "["}')[0] == 400


@pytest.mark.parametrize("status", [201, 204, 299])
def test_other_successes_are_acknowledged(mock, status):
    mock.configure(status=status)
    got, end = mock.raw(post("p1") * 2, answers=2)
    assert got.count(b"HTTP/1.1 %d " % status) == 2
    assert (b"Content-Length" in got) == (status != 204)
    assert end == "open"
    assert mock.counts("p1") == (2, 0, 0)


def test_the_failure_rate_picks_its_part(mock):
    mock.configure(failureRate=0.3, failureStatus=502)
    got, _ = mock.raw(b"".join(post(str(number)) for number in range(1000)), answers=1000)
    failed = got.count(b"HTTP/1.1 502")
    assert 200 < failed < 400
    assert mock.totals() | {"acknowledged": 1000 - failed, "received": failed} == mock.totals()
    assert mock.totals()["faults"] == {"502": failed}


def test_hang_reads_and_says_nothing(mock):
    with mock.connect() as sock:
        sock.sendall(post("p0"))
        assert sock.recv(1024).startswith(b"HTTP/1.1 200")
        mock.configure(hang=True)
        sock.sendall(post("p1") + post("p2"))
        assert read(sock, answers=0) == (b"", "open")
        wait_for(lambda: mock.totals()["received"] == 2)
        mock.configure(hang=False)
        sock.sendall(post("p3"))  # behind a request without an answer there are no answers either
        assert read(sock, answers=0) == (b"", "open")
        wait_for(lambda: mock.totals()["received"] == 3)
    assert [mock.counts(name) for name in ("p0", "p1", "p2", "p3")] == [(1, 0, 0)] + [(0, 1, 0)] * 3
    assert mock.send("p4")[0] == 200


def test_a_reset_comes_instead_of_the_answer(mock):
    mock.configure(resetRate=1)
    assert mock.raw(post("p1") + post("p2")) == (b"", "reset")
    assert [mock.counts(name) for name in ("p1", "p2")] == [(0, 1, 0)] * 2
    assert mock.totals()["faults"] == {"reset": 1}


def test_answers_before_a_reset_still_arrive(mock):
    mock.configure(resetRate=0.2)
    acknowledged = 0
    for number in range(20):
        got, end = mock.raw(b"".join(post(f"{number}-{index}") for index in range(20)), answers=20)
        acknowledged += got.count(b'{"status":"ok"}')
        assert end in {"reset", "open"}
    assert 0 < mock.totals()["acknowledged"] == acknowledged
    assert mock.totals()["received"] == 400 - acknowledged


def test_truncated_after_head_is_ambiguous(mock):
    mock.configure(truncateRate=1)
    outcomes = set()
    for number in range(30):
        got, end = mock.raw(post(f"p{number}"))
        whole_head = b"\r\n\r\n" in got
        assert got.startswith(b"HTTP/1.1 200")
        assert b'"ok"}' not in got
        assert end == "reset"
        assert mock.counts(f"p{number}") == ((0, 0, 1) if whole_head else (0, 1, 0))
        outcomes.add(whole_head)
    assert outcomes == {True, False}
    assert mock.totals()["faults"] == {"truncate": 30}
    mock.configure(status=503)
    for number in range(10):
        mock.raw(post(f"q{number}"))
        assert mock.counts(f"q{number}") == (0, 1, 0)


def test_garbage_leaves_the_connection_open(mock):
    mock.configure(garbageRate=1)
    with mock.connect() as sock:
        sock.sendall(post("p1") + post("p2"))
        got = sock.recv(1024)
        assert read(sock, answers=0)[1] == "open"
    assert got
    assert b"HTTP/1.1" not in got
    assert [mock.counts(name) for name in ("p1", "p2")] == [(0, 1, 0)] * 2


@pytest.mark.parametrize(("status", "expected"), [(200, (0, 0, 1)), (500, (0, 1, 0))])
def test_a_wrong_length_promises_too_much(mock, status, expected):
    mock.configure(wrongLengthRate=1, status=status)
    got, end = mock.raw(post("p1"))
    head, _, body = got.partition(b"\r\n\r\n")
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) > len(body) > 0
    assert end == "closed"
    assert mock.counts("p1") == expected


@pytest.mark.parametrize(("option", "announced"), [("closeEvery", True), ("silentClose", False)])
def test_connections_close_after_nth_reply(mock, option, announced):
    mock.configure(**{option: 3})
    got, end = mock.raw(b"".join(post(str(number)) for number in range(5)))
    assert got.count(b"HTTP/1.1 200") == 3
    assert (b"Connection: close" in got) == announced
    assert end in {"closed", "reset"}
    assert mock.totals() | {"acknowledged": 3, "received": 2} == mock.totals()


def test_chunked_answers(mock):
    mock.configure(chunked=True)
    got, _ = mock.raw(post("p1") + post("p2"), answers=2)
    assert got.count(b"Transfer-Encoding: chunked") == 2
    assert b"Content-Length" not in got
    assert json.loads(mock.send("p3")[2]) == {"status": "ok"}
    assert mock.totals()["acknowledged"] == 3


def test_interim_answers(mock):
    mock.configure(interim=True)
    got, _ = mock.raw(b"".join(post(str(number)) for number in range(40)), answers=80)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", got)
    assert statuses[1::2] == [b"200"] * 40
    assert set(statuses[::2]) == {b"100", b"103"}
    assert mock.totals()["acknowledged"] == 40


def test_refuse_closes_all_and_is_reversible(mock):
    with mock.connect() as idle:
        assert mock.configure(refuse=True)["options"]["refuse"] is True  # the answer still comes
        assert read(idle)[1] == "closed"
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            mock.connect()
    assert mock.send("p1", port=mock.ports[1])[0] == 200
    assert mock.configure(port=mock.desk, path="/control/A1", refuse=False)["options"]["refuse"] is False
    assert mock.send("p1")[0] == 200  # at once: the port listens before the answer says so


def test_port_lost_in_refusal_is_reported(mock):
    mock.configure(refuse=True)
    with socket.create_server(("127.0.0.1", mock.ports[0])):
        status, _, body = mock.request("POST", "/control/A1", b'{"refuse":false}', port=mock.desk)
        assert status == 409
        assert "in use" in json.loads(body)["error"]
        assert mock.control("/control/A1", port=mock.desk)["options"]["refuse"] is True
    mock.configure(port=mock.desk, path="/control/A1", refuse=False)
    assert mock.send("p1")[0] == 200


def test_flapping_leaves_no_trace(mock):
    for _ in range(30):
        mock.configure(port=mock.desk, path="/control/A1", refuse=True)
        mock.configure(port=mock.desk, path="/control/A1", refuse=False)
        assert mock.send("p1")[0] == 200
