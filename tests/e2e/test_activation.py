"""Sockets that a service manager holds: over a restart no connection is refused, and none is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import ssl
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme
from support import BODY, Process, get_json, request, wait_until

from fastdist.supervisor.main import CANNOT_START

FDS = """
import os, sys
count = int(sys.argv[1])
fds = [os.dup(int(fd)) for fd in sys.argv[2:2 + count]]  # none of them may be in the way of another
fds = [os.dup(fd) if fd < 3 + count else fd for fd in fds]
for place, fd in enumerate(fds, 3):
    os.dup2(fd, place)
os.environ.update(LISTEN_FDS=str(count), LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


def passing(*sockets):
    """Return (prefix, descriptors) of a command that gets these sockets as a service manager passes them."""
    numbers = [str(each.fileno()) for each in sockets]
    return (sys.executable, "-c", FDS, str(len(numbers)), *numbers), tuple(each.fileno() for each in sockets)


@pytest.fixture
def held():
    """Return ``held(address)``: a listening socket that outlives the service."""
    made = []

    def held(address=("127.0.0.1", 0), family=socket.AF_INET, backlog=4096, **options):
        listener = socket.socket(family, socket.SOCK_STREAM)
        made.append(listener)
        if options.get("reuse"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if backlog:
            listener.listen(backlog)
        return listener

    yield held
    for listener in made:
        listener.close()


class Analyzer(ThreadingHTTPServer):
    """Takes every packet but one, which it answers 500 while ``stuck``; ``delivered`` counts by packet id."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.stuck, self.delivered, self.refused = True, Counter(), 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoints(self):
        return {"A1": f"http://127.0.0.1:{self.server_port}/analyze"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.answer(200)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        name = self.headers["X-Packet-Id"]
        with self.server.lock:
            takes = name != "stuck" or not self.server.stuck
            if takes:
                self.server.delivered[name] += 1
            self.server.refused += not takes
        self.answer(200 if takes else 500)

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def analyzer():
    server = Analyzer()
    yield server
    server.shutdown()
    server.server_close()


class Clients:
    """Opens a new connection for each packet, so many a second, until ``stop``; never tries again.

    Not more than ``at_once``: a machine that is slow for a while would be sent more handshakes than it has time for.
    ``outcomes`` maps each packet's id to its status, or to what went wrong.
    """

    def __init__(self, port, rate=200, context=None, at_once=200):
        self.port, self.rate, self.context, self.outcomes = port, rate, context, {}
        self._room = asyncio.Semaphore(at_once)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    async def _run(self):
        clients, began, loop = [], asyncio.get_running_loop().time(), asyncio.get_running_loop()
        while not self._enough.is_set():
            await self._room.acquire()
            clients.append(loop.create_task(self._send(f"n-{len(clients)}")))
            await asyncio.sleep(max(0.0, began + len(clients) / self.rate - loop.time()))
        await asyncio.gather(*clients)

    async def _send(self, name):
        self.outcomes[name] = "no answer"
        try:
            async with asyncio.timeout(60):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
                head = (
                    f"POST /logs HTTP/1.1\r\nHost: t\r\nIdempotency-Key: {name}\r\nContent-Length: {len(BODY)}\r\n\r\n"
                )
                writer.write(head.encode() + BODY)
                self.outcomes[name] = int((await reader.readuntil(b"\r\n"))[9:12])
                writer.close()
        except (OSError, EOFError, TimeoutError) as error:
            self.outcomes[name] = repr(error)
        finally:
            self._room.release()

    def stop(self):
        self._enough.set()
        self._thread.join(90)
        assert not self._thread.is_alive()

    def wait_for(self, more):
        """Wait until so many more have an outcome."""
        enough = self.done + more
        wait_until(lambda: self.done >= enough, f"{enough} outcomes", progress=lambda: self.done)

    @property
    def done(self):
        return sum(outcome != "no answer" for outcome in self.outcomes.copy().values())


def settings(durability="disk", **server):
    return {
        "server": {"drain_timeout": "4s"} | server,
        "queue": {"durability": durability},
        "health": {"fall": 1000},  # the one that is stuck keeps no other packet from it
        "retry": {"cap": "200ms"},
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_restart_refuses_and_loses_nothing(analyzer, held, serve, workers):
    listener = held()
    prefix, fds = passing(listener)
    options = {"prefix": prefix, "pass_fds": fds}
    first = serve(analyzer, settings(workers=workers), **options)
    assert first.port == listener.getsockname()[1]
    assert first.post(Idempotency_Key="stuck")[0] == 202
    wait_until(lambda: analyzer.refused, "it is not taken")
    clients = Clients(first.port)
    clients.wait_for(200)
    first.signal(signal.SIGTERM)
    first.line_with("draining")
    assert first.wait() == 0
    assert "packets stay queued" in first.output
    second = serve(analyzer, settings(workers=workers), **options)
    clients.wait_for(200)
    clients.stop()
    assert {*clients.outcomes.values()} == {202}, Counter(map(str, clients.outcomes.values()))
    analyzer.stuck = False
    second.wait_at_rest()
    assert analyzer.delivered.keys() == clients.outcomes.keys() | {"stuck"}
    assert set(analyzer.delivered.values()) == {1}


def test_packets_are_taken_while_it_drains(analyzer, held, serve):
    listener = held()
    prefix, fds = passing(listener)
    fastdist = serve(analyzer, settings(drain_timeout="60s"), prefix=prefix, pass_fds=fds)
    assert fastdist.post(Idempotency_Key="stuck")[0] == 202
    fastdist.signal(signal.SIGTERM)
    fastdist.line_with("draining")

    numbers = itertools.count()

    def all_close():
        answers = [fastdist.post(Idempotency_Key=f"n-{next(numbers)}")[:2] for _ in range(20)]
        assert {status for status, _ in answers} == {202}
        return all(headers.get("connection") == "close" for _, headers in answers)

    wait_until(all_close, "both workers drain")
    assert request(fastdist.port, "GET", "/ready")[0] == 503
    analyzer.stuck = False
    assert fastdist.wait() == 0, "it ends when nothing is left"
    assert len(analyzer.delivered) == 1 + next(numbers)


def test_memory_queue_leaves_new_to_the_next(analyzer, held, serve):
    """What is in memory only has to be delivered before the end: no more is accepted."""
    listener = held()
    prefix, fds = passing(listener)
    options = {"prefix": prefix, "pass_fds": fds}
    first = serve(analyzer, settings("memory", workers=1), **options)
    assert first.post(Idempotency_Key="stuck")[0] == 202
    first.signal(signal.SIGTERM)
    first.line_with("draining")
    clients = Clients(first.port, rate=50)
    assert first.wait() == 0
    assert '"reason":"shutdown"' in first.output, "it is a dead letter now"
    second = serve(analyzer, settings("memory", workers=1), **options)
    clients.wait_for(20)
    clients.stop()
    assert {*clients.outcomes.values()} == {202}
    second.wait_at_rest()
    assert analyzer.delivered.keys() == clients.outcomes.keys()


def test_restart_with_tls_loses_nothing(analyzer, held, serve, tmp_path):
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    (tmp_path / "key.pem").write_bytes(pair.private_key_pem.bytes())
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    plain = {"admin": {"listen": "127.0.0.1:0", "tls": "off"}, "security": files}
    prefix, fds = passing(held())
    options = {"prefix": prefix, "pass_fds": fds}
    first = serve(analyzer, settings() | plain, **options)
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    clients = Clients(first.port, 50, context, at_once=50)
    clients.wait_for(50)
    assert first.stop() == 0
    second = serve(analyzer, settings() | plain, **options)
    clients.wait_for(50)
    clients.stop()
    assert {*clients.outcomes.values()} == {202}, Counter(map(str, clients.outcomes.values()))
    second.wait_at_rest()
    assert analyzer.delivered.keys() == clients.outcomes.keys()


def test_killed_service_leaves_its_backlog(analyzer, held, serve):
    listener = held()
    prefix, fds = passing(listener)
    options = {"prefix": prefix, "pass_fds": fds}
    first = serve(analyzer, settings(), **options)
    first.kill_all()
    clients = Clients(first.port)
    wait_until(lambda: len(clients.outcomes) > 100, "connections that wait")
    assert clients.done == 0
    second = serve(analyzer, settings(), **options)
    clients.stop()
    assert {*clients.outcomes.values()} == {202}
    second.wait_at_rest()
    assert analyzer.delivered.keys() == clients.outcomes.keys()


def test_dead_worker_leaves_no_connection(analyzer, held, serve):
    listener = held()
    prefix, fds = passing(listener)
    fastdist = serve(analyzer, settings(), prefix=prefix, pass_fds=fds)
    for pid in fastdist.worker_pids():
        Process(["kill", "-9", str(pid)]).wait()
        assert fastdist.post()[0] == 202
    wait_until(lambda: sum(row["restarts"] for row in fastdist.stats()["workers"]) == 2, "replaced")
    wait_until(lambda: {row["state"] for row in fastdist.stats()["workers"]} == {"running"}, "and what they had, too")


def test_several_sockets_are_one_each(analyzer, held, serve):
    """As of a unit with ReusePort= and ListenStream= twice: each has a worker."""
    first = held(reuse=True)
    second = held(first.getsockname(), reuse=True)
    prefix, fds = passing(first, second)
    fastdist = serve(analyzer, settings(), prefix=prefix, pass_fds=fds)
    for _ in range(40):
        assert fastdist.post()[0] == 202
    assert all(row["accepted"] for row in fastdist.stats()["workers"])


def test_workers_share_one_socket(analyzer, held, serve):
    prefix, fds = passing(held())
    fastdist = serve(analyzer, settings(), prefix=prefix, pass_fds=fds)
    clients = Clients(fastdist.port, rate=400)
    wait_until(lambda: all(row["accepted"] for row in fastdist.stats()["workers"]), "both have some")
    clients.stop()


def test_admin_socket_is_known_by_its_name(analyzer, held, serve):
    packets, admin = held(), held()
    prefix, fds = passing(packets, admin)
    options = settings(workers=1) | {"admin": {"listen": f"127.0.0.1:{admin.getsockname()[1]}"}}
    names = {"LISTEN_FDNAMES": "fastdist.socket:admin"}
    fastdist = serve(analyzer, options, prefix=prefix, pass_fds=fds, **names)
    assert (fastdist.port, fastdist.views_port) == (packets.getsockname()[1], admin.getsockname()[1])
    assert fastdist.post()[0] == 202
    assert request(fastdist.port, "GET", "/stats")[0] == 404
    assert request(fastdist.views_port, "GET", "/stats")[0] == 200


def test_admin_socket_needs_its_setting(held, run, tmp_path):
    prefix, fds = passing(held())
    names = {"LISTEN_FDNAMES": "admin", "FASTDIST_QUEUE__PATH": str(tmp_path / "data")}
    process = run(*prefix, sys.executable, "-m", "fastdist", "serve", "--port", "0", pass_fds=fds, **names)
    assert process.wait() == CANNOT_START
    assert process.lines[-1] == 'fastdist: a socket called "admin" was passed, and admin.listen is not set'


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("unix", "is not for TCP (AF_UNIX, SOCK_STREAM): ListenStream= needs a port"),
        ("udp", "is not for TCP (AF_INET, SOCK_DGRAM)"),
        ("bound", "does not listen: Accept= must be no"),
        ("file", "is no socket: "),
        ("many", "2 sockets were passed for 1 workers: each has to be a worker's"),
    ],
)
def test_what_cannot_be_served_is_an_error(run, held, tmp_path, kind, text):
    sockets = {
        "unix": lambda: [held(str(tmp_path / "socket"), socket.AF_UNIX)],
        "udp": lambda: [socket.socket(socket.AF_INET, socket.SOCK_DGRAM)],
        "bound": lambda: [held(backlog=0)],
        "file": lambda: [Path("/dev/null").open()],  # noqa: SIM115
        "many": lambda: [held(), held()],
    }[kind]()
    prefix, fds = passing(*sockets)
    data = {"FASTDIST_QUEUE__PATH": str(tmp_path / "data"), "FASTDIST_QUEUE__CAPACITY": "1MiB"}
    command = (*prefix, sys.executable, "-m", "fastdist", "serve", "--workers", "1")
    process = run(*command, pass_fds=fds, **data)
    assert process.wait() == CANNOT_START
    assert text in process.lines[-1]
    assert process.lines[-1].startswith("fastdist: ")


def test_socket_elsewhere_than_set_is_named(analyzer, held, serve):
    listener = held()
    prefix, fds = passing(listener)
    fastdist = serve(analyzer, settings(), port=1, prefix=prefix, pass_fds=fds)
    line = json.loads(fastdist.line_with("listens elsewhere than the settings say"))
    assert line["listens_on"] == f"127.0.0.1 port {fastdist.port}"
    assert line["settings"] == "127.0.0.1 port 1"
    assert get_json(fastdist.port, "/health")["status"] == "ok"


def test_sockets_of_another_process_stay(analyzer, serve):
    fastdist = serve(analyzer, settings(), LISTEN_FDS="1", LISTEN_PID="1")
    assert fastdist.post()[0] == 202
