"""Clients with bad intentions, over real sockets: slow on purpose, many headers, deep JSON, requests within requests.

What one connection makes of any bytes is tested without sockets, in tests/component; here is what others notice.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import select
import selectors
import shutil
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from support import BODY, Emitter, Process, compare, free_port, request, wait_until

GET_STATS = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n"
GET_DESCRIPTION = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE = 20  # seconds: only a broken test waits so long


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def read_all(connection):
    """Return what comes until the connection is closed, or reset."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def head(*lines, first="POST /logs HTTP/1.1"):
    return "\r\n".join([first, "Host: x", "Content-Type: application/json", *lines, "", ""]).encode("latin-1")


def post(body=BODY, *lines):
    return head(*lines, f"Content-Length: {len(body)}") + body


def assert_unharmed(fastdist):
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0] * len(fastdist.stats()["workers"])
    assert not [line for line in fastdist.lines if "Traceback" in line or json.loads(line)["level"] == "error"]
    assert fastdist.post()[0] == 202


def peak_memory(pid):
    """Return how many bytes of memory a process had at its largest."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


# ---- slow on purpose


class Drip:
    """Connections that send a byte of ``data`` each now and then, and no more of it once they are closed."""

    def __init__(self, port, count, data):
        self.connections = [connect(port) for _ in range(count)]
        self.data, self.answers = data, {}
        self._thread = threading.Thread(target=self._drip)
        self._thread.start()

    def _drip(self):
        alive = dict(enumerate(self.connections))
        for connection in self.connections:
            connection.settimeout(0.001)
        for place in range(len(self.data)):
            for number, connection in list(alive.items()):
                try:
                    connection.sendall(self.data[place : place + 1])
                    answer = connection.recv(65536)
                except TimeoutError:
                    continue
                except ConnectionError:
                    answer = b""
                self.answers[number] = answer
                del alive[number]
            if not alive:
                return
            time.sleep(0.02)

    def end(self):
        self._thread.join()
        for connection in self.connections:
            connection.close()


def test_slow_heads_are_cut_off(mocks, serve):
    fastdist = serve(mocks, {"server": {"header_timeout": "1s"}})
    drip = Drip(fastdist.port, 100, b"POST /logs HTTP/1.1\r\nHost: x\r\n" + b"X-Slow: y\r\n" * 1000)
    emitter = Emitter(fastdist.port, connections=8).send(2000)
    drip.end()
    assert len(drip.answers) == 100
    assert {answer[:13] for answer in drip.answers.values()} == {b"HTTP/1.1 408 "}
    assert emitter.count(202) == 2000
    assert fastdist.wait_at_rest()["rejected"]["timeout"] == 100
    compare(emitter, mocks)
    assert_unharmed(fastdist)


def test_stalled_bodies_are_cut_off(mocks, serve):
    fastdist = serve(mocks, {"server": {"body_timeout": "1s"}})
    whole = post()
    connections = [connect(fastdist.port) for _ in range(100)]
    for number, connection in enumerate(connections):
        connection.sendall(whole[: len(whole) - 1 - number % 50])
    chunked = connect(fastdist.port)
    chunked.sendall(head("Transfer-Encoding: chunked") + b"10\r\nabc")
    emitter = Emitter(fastdist.port, connections=8).send(2000)
    for connection in (*connections, chunked):
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
        connection.close()
    assert emitter.count(202) == 2000
    assert fastdist.wait_at_rest()["rejected"]["timeout"] == 101
    compare(emitter, mocks)


class Flood:
    """Connections that send ``data`` again and again, as fast as they can, and read what is answered."""

    def __init__(self, port, count, data):
        self.data, self.answers, self.closed, self.enough = data * 100, 0, 0, threading.Event()
        self.selector = selectors.DefaultSelector()
        for _ in range(count):
            connection = connect(port)
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, [b""])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self.enough.is_set():
            for key, events in self.selector.select(0.1):
                try:
                    self._exchange(key.fileobj, events, key.data)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    self.closed += 1
                    self.selector.unregister(key.fileobj)

    def _exchange(self, connection, events, rest):
        if events & selectors.EVENT_READ:
            part = connection.recv(1 << 20)
            if not part:
                raise ConnectionResetError
            self.answers += part.count(b"HTTP/1.1 ")
        if events & selectors.EVENT_WRITE:
            rest[0] = rest[0] or self.data
            rest[0] = rest[0][connection.send(rest[0]) :]

    def end(self):
        self.enough.set()
        self._thread.join()
        for key in tuple(self.selector.get_map().values()):
            key.fileobj.close()


@pytest.mark.parametrize("asked", [post(b'{"emitterId":1}'), GET_STATS], ids=["invalid", "view"])
def test_pipelined_requests_delay_no_other(mocks, serve, asked):
    """200 connections stopped a worker for seconds: analyzers went offline, and it was killed as one that hangs."""
    fastdist = serve(mocks, {"server": {"workers": 1}})
    flood = Flood(fastdist.port, 200, asked)
    wait_until(lambda: flood.answers > 1000, "the flood is answered", progress=lambda: flood.answers)
    answers = flood.answers
    emitter = Emitter(fastdist.port, connections=4).send(200)
    wait_until(lambda: flood.answers > answers + 1000, "the flood goes on", progress=lambda: flood.answers)
    flood.end()
    assert flood.closed == 0
    assert emitter.count(202) == 200
    assert {row["state"] for row in fastdist.analyzers().values()} == {"online"}
    assert not [line for line in fastdist.lines if "offline" in line or "hangs" in line]
    fastdist.wait_at_rest()
    compare(emitter, mocks)
    assert_unharmed(fastdist)


def test_dripping_bodies_keep_no_other_out(mocks, serve):
    """They have announced all the memory there is for bodies, and sent nearly as much."""
    fastdist = serve(mocks, {"server": {"workers": 1, "body_timeout": "15s"}})
    size, count, left = 10 * 2**20, 26, 1000
    most = head(f"Content-Length: {size}") + bytes(size - left)
    connections = [connect(fastdist.port) for _ in range(count)]
    for connection in connections[:-1]:
        connection.sendall(most)
    kept = size * count * 9 // 10
    wait_until(lambda: fastdist.stats()["workers"][0]["rssBytes"] > kept, "their bodies are there")
    time.sleep(1.5)  # none of them moves any more: the next is not refused
    connections[-1].sendall(most)
    packet = post(BODY[:-1] + b',"padding":"' + b"x" * 3000 + b'"}')
    alive = dict(enumerate(connections))
    answers = []
    end = time.monotonic() + 3 * PATIENCE
    while alive and time.monotonic() < end:
        with connect(fastdist.port) as emitter:
            emitter.sendall(packet[:-1500])
            time.sleep(0.05)
            emitter.sendall(packet[-1500:])
            assert emitter.recv(65536).startswith(b"HTTP/1.1 202 ")
        for number, connection in list(alive.items()):
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"x")
            if select.select([connection], [], [], 0)[0]:
                answers.append(read_all(connection))
                del alive[number]
    assert {answer[:13] for answer in answers} == {b"HTTP/1.1 408 "}
    assert len(answers) == count, "a byte now and then is no progress"
    for connection in connections:
        connection.close()
    assert_unharmed(fastdist)


@pytest.mark.parametrize("asked", [GET_STATS, GET_DESCRIPTION], ids=["short", "long"])
def test_unread_responses_end_the_connection(mocks, serve, asked):
    """It asks for more and more, and reads nothing: what waits for it must not grow, and it is given up in the end."""
    fastdist = serve(mocks, {"server": {"workers": 1, "body_timeout": "2s"}})
    worker = fastdist.stats()["workers"][0]
    before = worker["rssBytes"]
    connection = connect(fastdist.port)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    sent = 0

    def is_given_up():
        nonlocal sent
        while sent < 50_000_000:
            try:
                sent += connection.send(asked * 1000)
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
        pytest.fail("it was read without end")

    process = psutil.Process(worker["pid"])
    # It has to work for a while, whose length is the machine's affair, before it can wait for its client.
    wait_until(is_given_up, "it is given up", progress=lambda: min(20, int(sum(process.cpu_times()[:2]))))
    connection.close()
    assert peak_memory(worker["pid"]) < before + 64 * 2**20
    wait_until(lambda: fastdist.stats()["workers"][0]["rssBytes"] < before + 64 * 2**20, "its memory is free")
    assert_unharmed(fastdist)


def test_costly_requests_delay_no_other(shared):
    """A worker that does nothing else for ten seconds is taken for hung: such a read was enough for that."""
    fastdist = shared({"server": {"workers": 1}})
    answers = b""
    with connect(fastdist.port) as connection:
        connection.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        for _ in range(5):
            assert fastdist.post()[0] == 202
        while select.select([connection], [], [], 0)[0]:
            answers += connection.recv(65536)
        assert answers.count(b"HTTP/1.1 200") < 2000, "others had to wait for the last of them"
        while answers.count(b"HTTP/1.1 200") < 2000 or not answers.endswith(b"\r\n\r\n"):
            answers += connection.recv(65536)
    assert_unharmed(fastdist)


def test_idle_connections_delay_no_other(mocks, serve):
    fastdist = serve(mocks, {"server": {"keepalive_timeout": "2s"}})
    idle = [connect(fastdist.port) for _ in range(1000)]
    emitter = Emitter(fastdist.port, connections=8).send(2000)
    assert emitter.count(202) == 2000
    assert [read_all(connection) for connection in idle] == [b""] * 1000
    for connection in idle:
        connection.close()
    compare(emitter, mocks)


# ---- floods


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["A: b"] * 1000, 202),
        (["A:"] * 3000, 202),
        (["A: b"] * 5000, 431),
        (["Cookie: " + "c" * 16_000], 202),
        (["Cookie: " + "c" * 17_000], 431),
        (["A" * 17_000 + ": b"], 431),
        (["Content-Type: application/json"] * 400, 202),
        ([f"Idempotency-Key: k{number}" for number in range(500)], 400),
        (["Authorization: Bearer " + "x" * 15_000], 202),
        (["Prefer: wait=" + "9" * 10_000], 202),
        (["Prefer: " + "a=b, " * 3000], 202),
        (["Connection: " + "x, " * 5000], 202),
    ],
    ids=lambda value: f"{len(value)} x {value[0][:16]}" if isinstance(value, list) else str(value),
)
def test_headers_without_end_come_to_an_end(shared, lines, status):
    fastdist = shared({"server": {"workers": 1}})
    if any("wait=" in line for line in lines):
        status = 200  # it is delivered before all those seconds are over
    with connect(fastdist.port) as connection:
        connection.sendall(post(BODY, *lines, "Connection: close"))
        assert read_all(connection)[:13] == b"HTTP/1.1 %d " % status
    assert_unharmed(fastdist)


def test_endless_headers_are_refused(shared):
    fastdist = shared({"server": {"workers": 1}})
    for flood in (b"A: b\r\n", b"A" * 4096, b"\t", b"A: " + b"b" * 4096 + b"\r\n"):
        with connect(fastdist.port) as connection:
            connection.sendall(b"POST /logs HTTP/1.1\r\nHost: x\r\n")
            with contextlib.suppress(ConnectionError, BrokenPipeError):
                for _ in range(100_000 // len(flood)):
                    connection.sendall(flood)
            assert read_all(connection)[:13] in (b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")
    assert_unharmed(fastdist)


def test_tiny_extended_chunks_are_only_slow(shared):
    fastdist = shared({"server": {"workers": 1}})
    chunks = b"".join(b"1;a=%b\r\n%c\r\n" % (b"b" * 100, byte) for byte in BODY)
    with connect(fastdist.port) as connection:
        connection.sendall(head("Transfer-Encoding: chunked", "Connection: close") + chunks + b"0\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 202 ")
    assert_unharmed(fastdist)


# ---- bodies


def nested(levels, opening, closing):
    return b'{"emitterId":"e","messages":[{"message":"m"}],"x":' + opening * levels + b"1" + closing * levels + b"}"


@pytest.mark.parametrize(
    "brackets", [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")], ids=["array", "object", "both"]
)
def test_json_depth_limit_costs_no_stack(shared, brackets):
    fastdist = shared({"server": {"workers": 1}})
    step = 2 if len(brackets[1]) == 2 else 1
    assert fastdist.post(nested(126 // step, *brackets))[0] == 202
    for levels in (130, 1000, 100_000, 1_000_000):
        status, _, body = fastdist.post(nested(levels, *brackets))
        assert (status, "nested more than 128 levels" in json.loads(body)["detail"]) == (400, True)
        status, _, body = fastdist.post(brackets[0] * levels)
        assert status == 400, body
    assert_unharmed(fastdist)


def test_compressed_bodies(mocks, serve):
    """A bomb is unpacked up to ``server.max_body``; what is no packet of the coding it names is refused."""
    fastdist = serve(mocks)
    bomb = gzip.compress(bytes(50_000_000))
    codings = {
        "gzip": 413,
        "GZIP": 413,
        "x-gzip": 413,
        "identity, gzip": 413,
        "gzip, gzip": 413,
        "deflate": 400,
        "zstd": 400,
    }
    for coding, expected in (codings | {"br": 415}).items():
        status, headers, body = fastdist.post(bomb, Content_Encoding=coding)
        assert status == expected, body
        assert headers.get("accept-encoding") == ("gzip, deflate, zstd, snappy" if expected == 415 else None)
        status, headers, _ = request(fastdist.port, "PATCH", "/analyzers/A1", bomb, {"Content-Encoding": coding})
        assert (status, headers["accept-encoding"]) == (415, "identity")
    status, headers, _ = fastdist.post(gzip.compress(BODY))
    assert (status, "accept-encoding" in headers) == (400, False), "what does not say that it is compressed is no JSON"
    status, headers, _ = fastdist.post(BODY, Content_Type="application/x-ndjson")
    assert (status, headers["accept"]) == (415, "application/json")
    assert fastdist.post(BODY, Content_Encoding="identity")[0] == 202
    assert fastdist.post(gzip.compress(BODY), Content_Encoding="gzip")[0] == 202
    rejected = fastdist.stats()["rejected"]
    assert (rejected["unsupportedMediaType"], rejected["tooLarge"], rejected["malformed"]) == (2, 5, 3)
    assert_unharmed(fastdist)


# ---- requests within requests, through proxies that read them first

HIDDEN = post(BODY, "Idempotency-Key: hidden")
SMUGGLED = {
    "length, then coding": head(f"Content-Length: {len(HIDDEN) + 5}", "Transfer-Encoding: chunked")
    + b"0\r\n\r\n"
    + HIDDEN,
    "coding, then length": head("Transfer-Encoding: chunked", f"Content-Length: {len(HIDDEN) + 5}")
    + b"0\r\n\r\n"
    + HIDDEN,
    "space before the colon": head("Transfer-Encoding : chunked", f"Content-Length: {len(HIDDEN) + 5}")
    + b"0\r\n\r\n"
    + HIDDEN,
    "tab behind the coding": head("Transfer-Encoding:\tchunked\t", f"Content-Length: {len(HIDDEN) + 5}")
    + b"0\r\n\r\n"
    + HIDDEN,
    "vertical tab": head("Transfer-Encoding: \x0bchunked", f"Content-Length: {len(HIDDEN) + 5}")
    + b"0\r\n\r\n"
    + HIDDEN,
    "folded": head("Transfer-Encoding:", " chunked", f"Content-Length: {len(HIDDEN) + 5}") + b"0\r\n\r\n" + HIDDEN,
    "two codings": head("Transfer-Encoding: identity, chunked") + b"0\r\n\r\n" + HIDDEN,
    "coding twice": head("Transfer-Encoding: chunked", "Transfer-Encoding: cow") + b"0\r\n\r\n" + HIDDEN,
    "quoted coding": head('Transfer-Encoding: "chunked"', f"Content-Length: {len(HIDDEN) + 5}") + b"0\r\n\r\n" + HIDDEN,
    "two lengths": head("Content-Length: 0", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "list of lengths": head(f"Content-Length: 0, {len(HIDDEN)}") + HIDDEN,
    "length with a sign": head("Content-Length: +0") + HIDDEN,
    "length in hexadecimal": head(f"Content-Length: 0x{len(HIDDEN):x}") + HIDDEN,
    "underscore": head("Content_Length: 0", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "bare line feed in a header": head(f"X: x\nContent-Length: {len(HIDDEN)}") + HIDDEN,
    "bare carriage return": head(f"X: x\rContent-Length: {len(HIDDEN)}") + HIDDEN,
    "null in a header": head("X: \x00", "Content-Length: 0") + HIDDEN,
    "bare line feed behind a chunk's size": head("Transfer-Encoding: chunked") + b"0\n\r\n" + HIDDEN,
    "line feed in an extension": head("Transfer-Encoding: chunked") + b"1;a\nb\r\nZ\r\n0\r\n\r\n" + HIDDEN,
    "size beyond 64 bits": head("Transfer-Encoding: chunked") + b"10000000000000000\r\n\r\n0\r\n\r\n" + HIDDEN,
    "size with a sign": head("Transfer-Encoding: chunked") + b"-1\r\n\r\n" + HIDDEN,
    "size in 0x": head("Transfer-Encoding: chunked") + b"0x0\r\n\r\n" + HIDDEN,
    "space in a size": head("Transfer-Encoding: chunked") + b"0 \r\n\r\n" + HIDDEN,
    "chunk longer than its size": head("Transfer-Encoding: chunked") + b"1\r\nZZ\r\n0\r\n\r\n" + HIDDEN,
    "trailer": head("Transfer-Encoding: chunked") + b"0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "coding in http/1.0": head("Transfer-Encoding: chunked", first="POST /logs HTTP/1.0") + b"0\r\n\r\n" + HIDDEN,
    "http/0.9": b"POST /logs\r\n\r\n" + HIDDEN,
    "body of a get": head(f"Content-Length: {len(HIDDEN)}", first="GET /health HTTP/1.1") + HIDDEN,
    "body of a head": head(f"Content-Length: {len(HIDDEN)}", first="HEAD /health HTTP/1.1") + HIDDEN,
    "body that is refused": head("Content-Encoding: br", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "expectation": head("Expect: 100-continue", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "expectation that cannot be met": head("Expect: \t100-continued", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "upgrade": head("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "two hosts": head("Host: y", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    "hop by hop": head("Connection: close, Content-Length", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
}
# The hidden request stands behind a whole one here: pipelined, not smuggled. A server that serves it does no wrong.
HONEST = {"coding, then length", "length, then coding", "tab behind the coding", "trailer", "two codings"}

NGINX = """\
daemon off;
error_log stderr crit;
pid nginx.pid;
events {{}}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy;
  fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  underscores_in_headers on;
  ignore_invalid_headers off;
  upstream fastdist {{ server 127.0.0.1:{backend}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://fastdist; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_request_buffering off;
      proxy_ignore_client_abort on;  # a client that has sent all still reads its answers
    }}
  }}
}}
"""
HAPROXY = """\
defaults
  mode http
  option http-keep-alive
  option accept-invalid-http-request
  http-reuse always
  timeout client 5s
  timeout server 5s
  timeout connect 5s
frontend all
  bind 127.0.0.1:{port}
  default_backend fastdist
backend fastdist
  option accept-invalid-http-response
  server one 127.0.0.1:{backend} pool-max-conn 4
"""


def program(name):
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


@pytest.fixture(params=["nothing", "nginx", "haproxy"])
def front(request, serve, mocks, start, tmp_path):
    """Return a distributor, the port of what is in front of it, as lenient as it can be made, and whether it is."""
    fastdist = serve(mocks, {"server": {"workers": 1, "body_timeout": "1s"}})
    if request.param == "nothing":
        return fastdist, fastdist.port, False
    if not program(request.param):
        pytest.skip(f"{request.param} is not installed (scripts/peers.sh installs it)")
    port = free_port()
    text = (NGINX if request.param == "nginx" else HAPROXY).format(port=port, backend=fastdist.port)
    config = tmp_path / "front.conf"
    config.write_text(text)
    options = ["-c", config, "-p", tmp_path] if request.param == "nginx" else ["-db", "-f", config]
    start(Process, [program(request.param), *map(str, options)])

    def answers():
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=1)

    wait_until(answers, f"{request.param} listens").close()
    return fastdist, port, True


def ids_in(answers):
    return re.findall(rb'"packetId":"([^"]+)"', answers)


def attack(port, data):
    """Return the ids of the packets that an attacker is answered for."""
    with connect(port) as attacker:
        attacker.sendall(data)
        attacker.shutdown(socket.SHUT_WR)
        return ids_in(read_all(attacker))


def test_nothing_is_smuggled_past_a_proxy(front, mocks):
    """Every packet is one that was answered, and every client gets the response to its own request."""
    fastdist, port, proxied = front
    answered = set()
    for attacked, (name, data) in enumerate(SMUGGLED.items()):
        ids = attack(port, data.replace(b"hidden", b"hidden-%d" % attacked))
        # A proxy may take what is hidden for a request of its own, and ask us in earnest: the attacker is answered.
        if not proxied and name not in HONEST:
            assert not any(each.startswith(b"hidden") for each in ids), name
        for number in range(6):  # over all connections between the two
            with connect(port) as victim:
                key = b"victim-%d-%d" % (attacked, number)
                victim.sendall(post(BODY, f"Idempotency-Key: {key.decode()}", "Connection: close"))
                answer = read_all(victim)
            assert answer.startswith(b"HTTP/1.1 202 "), (name, answer)
            assert ids_in(answer) == [key], f"{name}: a response to another client's request"
            ids.append(key)
        answered |= {each.decode() for each in ids}
        packets = fastdist.stats()["packets"]
        assert packets["accepted"] == len(answered), f"{name}: a packet without a response"
    fastdist.wait_at_rest()
    assert set(mocks.delivered()) == answered
    assert_unharmed(fastdist)
