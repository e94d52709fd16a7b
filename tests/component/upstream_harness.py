"""What the tests of forwarding and dispatching stand on.

``Desk`` is one pool over a real ring, with transports that record, and an owner that writes down what it is told.
``Bench`` is a whole dispatcher on a loop and a clock that the test moves. ``World`` is a dispatcher on a running uvloop
with mock analyzers behind real sockets.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import socket
import ssl
import struct
import subprocess
import termios
import time
import uuid
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import uvloop

from fastdist._core import PacketRing, Poller, file_size
from fastdist.net.names import Names
from fastdist.settings import Analyzer, Config
from fastdist.shm.block import AnalyzerWord, SharedBlock
from fastdist.storage import dead_letter_writer
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.worker import dispatch, outcomes
from fastdist.worker.dispatch import Dispatcher
from fastdist.worker.upstream import AnalyzerConnection, AnalyzerPool
from mock_analyzers.analyzer import Analyzer as Mock
from mock_analyzers.connection import Connection as MockConnection
from mock_analyzers.control import Control
from mock_analyzers.listener import Listener
from mock_analyzers.options import Options

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
SECOND = 10**9
PATIENCE = 20.0  # seconds: only a broken test waits so long


def memory_ring(capacity=1 << 20):
    fd = os.memfd_create("ring")
    os.ftruncate(fd, file_size(capacity))
    return PacketRing(fd, capacity, volatile=True)


def shared_block(slots=8):
    block = SharedBlock.create(1, slots)
    os.close(block.fd)
    return block


def settings(**sections):
    """Return a Config; ``settings(delivery={"mode": "batch"})`` differs from the default in that."""
    default = Config()
    return Config(
        **{name: msgspec.structs.replace(getattr(default, name), **values) for name, values in sections.items()}
    )


def reply(status=200, *fields, body=b""):
    """Return a reply with a Content-Length."""
    lines = [f"HTTP/1.1 {status} Reason", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Request(NamedTuple):
    head: bytes
    headers: dict[str, str]
    body: bytes

    @property
    def ids(self):
        return (self.headers.get("X-Packet-Ids") or self.headers["X-Packet-Id"]).split(",")


def requests_in(data):
    """Take the bytes that were sent apart; there must be whole requests and nothing else."""
    requests = []
    while data:
        head, mark, rest = data.partition(b"\r\n\r\n")
        assert mark, data
        _, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert len(headers) == len(lines)
        length = int(headers["Content-Length"])
        assert len(rest) >= length
        requests.append(Request(head + mark, headers, rest[:length]))
        data = rest[length:]
    return requests


class Transport:
    """Records what is done with it. With a ``loop`` the end of the connection follows, as on a real one."""

    def __init__(self, connection, loop=None):
        self.connection, self.loop = connection, loop
        self.writes = []
        self.unflushed = 0
        self.ended = None  # "close" or "abort"
        self.lost = False

    def write(self, data):
        assert self.ended is None, "written to after its end"
        assert type(data) is bytes
        self.writes.append(data)

    def is_closing(self):
        return self.ended is not None

    def get_write_buffer_size(self):
        return self.unflushed

    def get_extra_info(self, _name, default=None):
        return default

    def close(self):
        self.abort("close")

    def abort(self, how="abort"):
        if self.ended is None:
            self.ended = how
            if self.loop is not None and not self.lost:
                self.loop.call_soon(self.lose)

    def lose(self, error=None):
        """The connection ends: None is an orderly end."""
        self.lost = True
        self.connection.connection_lost(error)

    @property
    def sent(self):
        return b"".join(self.writes)

    @property
    def requests(self):
        return requests_in(self.sent)


class Owner:
    """A pool's owner that writes down what it is told: ``events`` are (name, ids of packets, anything else)."""

    def __init__(self):
        self.events = []
        self.responses = []  # beside the events of replies that are no 2xx
        self.handles = []
        self.wakes = 0
        self.names = Names()

    def _note(self, name, pool, handles, *more):
        self.handles += handles
        self.events.append((name, [pool.ring.packet_id(handle) for handle in handles], *more))

    def delivered(self, _pool, sequences):
        self.events.append(("delivered", sequences))

    def refused(self, pool, handles, status, *, batch, response):
        self.responses.append(response)
        self._note("refused", pool, handles, status, batch)

    def failed(self, pool, handles, error, *, counted, status=None, response=None):  # noqa: PLR0913  (as is called)
        self.responses.append(response)
        self._note("failed", pool, handles, error, counted, status)

    def paused_for(self, pool, handles, status, value, *, response):
        self.responses.append(response)
        self._note("paused", pool, handles, status, value)

    def not_sent(self, pool, handles):
        self._note("not sent", pool, handles)

    def schedule(self):
        pass

    def went_wrong(self, error):
        raise error

    def wake(self, _pool):
        self.wakes += 1


class EagerPool(AnalyzerPool):
    """A pool that opens connections as soon as packets wait."""

    def set_up(self, *args):
        super().set_up(*args)
        self.growth_ns = 0


class DeskPool(EagerPool):
    """Counts how often it was asked for connections, and opens none."""

    asked = 0

    def open_more(self):
        self.asked += 1

    def check(self, now_ns):
        """Look at all connections, as they are at that time."""
        for connection in self.look(now_ns):
            connection.check()


class Desk:
    """One pool in slot 1, over a ring; ``delivery`` as in the configuration."""

    def __init__(self, endpoint="http://analyzer.test/analyze", capacity=1 << 20, **delivery):
        self.ring = memory_ring(capacity)
        self.block = shared_block()
        self.counters = self.block.rows[0]
        self.owner = Owner()
        self.pool = DeskPool(self.ring, self.counters, self.block.analyzers, 1, self.owner)
        self.delivery = msgspec.structs.replace(Config().delivery, **delivery)
        self.pool.set_up(Analyzer(id="A1", endpoint=endpoint, weight=1), self.delivery, None)
        self.pushed = 0

    def connect(self):
        connection = AnalyzerConnection(self.pool)
        self.pool.opening += 1
        connection.connection_made(Transport(connection))
        return connection

    def push(self, *bodies, keys=(), **options):
        """Claim packets with these bodies for the pool; return their handles. Keys are p1, p2, ... unless given."""
        handles = []
        for index, body in enumerate(bodies):
            self.pushed += 1
            key = keys[index] if index < len(keys) else f"p{self.pushed}"
            assert self.ring.push(body, key, **options)
            handles.append(self.ring.claim())
            self.pool.append(handles[-1])
        return handles

    def check(self):
        """Every packet is once in one of: done, waiting, in flight, told to the owner."""
        pool, owner = self.pool, self.owner
        assert len(set(owner.handles)) == len(owner.handles)
        assert self.ring.claimed == self.ring.undone == pool.waiting + pool.packets_in_flight + len(owner.handles)
        assert self.pushed == self.ring.undone + self.counters.get_of(1, "delivered")
        assert pool.packets_in_flight == self.counters.get_of(1, "packets_in_flight")
        assert pool.requests_in_flight == self.counters.get_of(1, "requests_in_flight")
        in_flight = sum(connection.in_flight() for connection in pool.connections)
        assert pool.requests_in_flight == in_flight <= pool.connection_limit * pool.pipeline


# ---------------------------------------------------------------------------------------------- a dispatcher by hand


class Loop:
    """call_soon and call_later of an event loop, run when the test says so."""

    def __init__(self):
        self.ready = []
        self.timers = []
        self.held_up = None  # turns after which ``run`` leaves the rest for later

    def call_soon(self, callback, *args):
        self.ready.append(partial(callback, *args))

    def call_later(self, delay, callback, *args):
        timer = (delay, partial(callback, *args))
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer))

    def turn(self):
        """Run what is ready."""
        ready, self.ready = self.ready, []
        while ready:
            callback = ready.pop(0)
            try:
                callback()
            except Exception:  # which ends this callback and no other
                self.ready = ready + self.ready
                raise

    def run(self, turns=10_000):
        """Run what is ready, and what that makes ready."""
        for _ in range(turns if self.held_up is None else self.held_up):
            if not self.ready:
                return
            self.turn()
        assert self.held_up is not None, "never comes to rest"

    def fire(self):
        """Let all timers be over."""
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()
        self.run()


class Clock:
    """The real clocks plus what the test has let pass: the compiled half reads the real ones."""

    def __init__(self):
        self.ahead = 0.0

    def monotonic_ns(self):
        return time.monotonic_ns() + int(self.ahead * SECOND)

    def time(self):
        return time.time() + self.ahead

    def module(self):
        """What stands for the ``time`` module."""
        return SimpleNamespace(monotonic_ns=self.monotonic_ns, time=self.time, thread_time_ns=time.thread_time_ns)


class BenchPool(EagerPool):
    """A pool whose connections arrive in the next event-loop iteration, or are refused."""

    reachable = True

    def __init__(self, *args):
        super().__init__(*args)
        self.history = []  # all connections there ever were

    def open_more(self):
        per_connection = (self.delivery.batch_packets if self.delivery.mode == "batch" else 1) * self.pipeline
        wanted = -(-self.waiting // per_connection) - self.opening
        for _ in range(min(wanted, self.connection_limit - self.open_connections - self.opening)):
            self.opening += 1
            self.owner.loop.call_soon(self._arrive)

    def _arrive(self):
        if not self.reachable:
            self.opening -= 1
            self._unreachable("connection refused")
            return
        connection = AnalyzerConnection(self)
        connection.connection_made(Transport(connection, self.owner.loop))
        self.history.append(connection)


class Site:
    """A dispatcher with its ring, its shared block and its analyzers."""

    def __init__(self, folder, loop, config, capacity, poller=None):
        self.folder, self.loop, self.config = folder, loop, config
        self.ring, self.block = memory_ring(capacity), shared_block()
        self.states, self.counters = self.block.analyzers, self.block.rows[0]
        self.analyzers, self.settled, self.pushed = {}, [], 0
        self.dispatcher = Dispatcher(
            loop,
            self.ring,
            self.states,
            config,
            counters=self.counters,
            dead_letters=DeadLetterFiles(folder, "w0"),
            settled=lambda sequence, analyzer: self.settled.append((sequence, analyzer)),
            poller=poller,
        )
        self.dispatcher.part_ns = 3600 * SECOND  # a test that has to wait for the processor sees no other order

    @property
    def pools(self):
        """All pools there are, those of former endpoints included."""
        return [pool for pool in [*self.dispatcher.pools, *self.dispatcher.retired] if pool is not None]

    def add(self, slot, weight, endpoint=None, name=None):
        """Add a new analyzer (A1 in slot 0 ...)."""
        name = name or f"A{slot + 1}"
        self.states.clear(slot)
        self.states.set(slot, AnalyzerWord.IN_USE, 1)
        self.states.set_weight(slot, weight)
        self.analyzers[slot] = Analyzer(id=name, endpoint=endpoint or f"http://{name}.test/analyze", weight=weight)


class Bench(Site):
    """A dispatcher whose loop, clock and transports the test drives: ``with Bench(folder) as bench``.

    ``weights``: of A1, A2, ... in slots 0, 1, ...; ``sections`` as in ``settings``, but nothing spills unless asked
    for: the compiled half does not see the time that passes here.
    """

    def __init__(self, folder, weights=(1, 1, 1), capacity=1 << 20, **sections):
        sections["delivery"] = {"spill_after": math.inf} | sections.get("delivery", {})
        self.clock = Clock()
        self.replaced = [(dispatch, "time", dispatch.time), (dispatch, "AnalyzerPool", dispatch.AnalyzerPool)]
        self.replaced += [(outcomes, "time", outcomes.time), (dead_letter_writer, "time", dead_letter_writer.time)]
        self.replaced.append((dead_letter_writer, "PART_NS", dead_letter_writer.PART_NS))
        dead_letter_writer.PART_NS = 3600 * SECOND  # however slow this machine is
        dispatch.time = outcomes.time = dead_letter_writer.time = self.clock.module()
        dispatch.AnalyzerPool = BenchPool
        super().__init__(folder, Loop(), settings(**sections), capacity)
        self.dispatcher._load.measure = lambda _now: 0.0
        self.count, self.count_of = self.counters.get, self.counters.get_of
        for slot, weight in enumerate(weights):
            self.add(slot, weight)
        self.dispatcher.set_analyzers(self.analyzers)
        self.loop.run()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for module, name, value in self.replaced:
            setattr(module, name, value)
        if error[0] is None:
            self.account()

    # ---- doing

    def rest(self):
        """Let the loop come to rest."""
        self.loop.run()
        self.check()

    def push(self, *bodies, run=True, **options):
        """Let packets be accepted; their keys are p1, p2, ..."""
        for body in bodies:
            self.pushed += 1
            assert self.ring.push(body, f"p{self.pushed}", **options)
        self.dispatcher.schedule()
        if run:
            self.rest()

    def pass_time(self, seconds):
        """Let time pass, all at once, and the dispatcher's tick see it."""
        self.clock.ahead += seconds
        self.tick()

    def tick(self):
        now = self.clock.monotonic_ns()
        for task in self.dispatcher.tasks:
            while task.work(now):
                pass
        self.dispatcher.dead_letter_writer.tick(now)
        self.rest()

    def answer(self, connection, data=OK):
        connection.data_received(data)
        self.rest()

    def lose(self, connection, error=None):
        """Let a connection end, from the other side."""
        connection.transport.lose(error)
        self.rest()

    def answer_all(self, data=OK, slots=None):
        """Answer every request that is in flight (to these analyzers); return how many."""
        count = 0
        for slot in self.analyzers if slots is None else slots:
            for connection in self.connections(slot):
                for _ in range(connection.in_flight()):
                    connection.data_received(data)
                    count += 1
        self.rest()
        return count

    def go_offline(self, slot):
        self.states.go_offline(slot)
        self.tick()

    def go_online(self, slot):
        self.states.go_online(slot)
        self.tick()

    def drain(self, slot, draining=1):
        self.states.set(slot, AnalyzerWord.DRAINING, draining)
        self.states.touch()
        self.tick()

    # ---- looking

    def pool(self, slot):
        return self.dispatcher.pools[slot]

    def connections(self, slot):
        """Return the open connections, the oldest first."""
        return [each for each in self.pool(slot).history if each in self.pool(slot).connections]

    def busy(self, slot):
        """Return the connections that wait for a reply."""
        return [connection for connection in self.connections(slot) if connection.in_flight()]

    def sent(self, slot):
        """Return all requests the analyzer got so far, in the order of its connections."""
        return [request for each in self.pool(slot).history for request in each.transport.requests]

    def sent_ids(self, slot):
        return [name for request in self.sent(slot) for name in request.ids]

    @property
    def delivered(self):
        return sum(self.count_of(slot, "delivered") for slot in range(self.counters.slots))

    @property
    def dead_lettered(self):
        return self.count("refused") + self.count("exhausted") + self.count("shutdown")

    def dead_letters(self):
        """Return the dead letters, in the order they were written."""
        files = sorted(self.folder.glob("dead-letters/*.ndjson"))
        return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]

    def check(self):
        """Every packet is once in one of: done, waiting, in flight, backing off, to be written, in the ring."""
        held = sum(pool.waiting + pool.packets_in_flight for pool in self.pools)
        held += sum(len(returned.handles) for returned in self.dispatcher.returned)
        held += sum(map(len, [self.dispatcher.backing_off, *self.dispatcher.backed_off]))
        held += len(self.dispatcher.dead_letter_writer.unwritten)
        assert self.ring.claimed == held
        assert self.ring.undone == self.pushed - self.delivered - self.dead_lettered
        for pool in self.pools:
            in_flight = sum(connection.in_flight() for connection in pool.connections)
            assert pool.requests_in_flight == in_flight <= pool.connection_limit * pool.pipeline
            assert len(pool.connections) == pool.open_connections <= pool.connection_limit

    def account(self):
        """End everything, and find every packet that is not done in the ring, once."""
        self.dispatcher.stop()
        for pool in self.pools:
            pool.release_waiting()
        self.dispatcher.give_back()
        for dead_letter in self.dispatcher.dead_letter_writer.unwritten:
            self.ring.release(dead_letter.handle)
        left = []
        while handle := self.ring.claim():
            left.append(self.ring.sequence(handle))
            assert len(left) <= self.pushed
        assert len(set(left)) == len(left) == self.pushed - self.delivered - self.dead_lettered


# ------------------------------------------------------------------------------------------------------ real sockets


def run(coroutine):
    """Run a scenario on a uvloop; no test takes a minute."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


def self_signed(folder):
    """Make a certificate for 127.0.0.1 and analyzer.test; return its path and a server's context with it."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=analyzer"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:analyzer.test", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


async def until(condition, what="the condition", seconds=PATIENCE):
    """Wait for a condition and return what it returns."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)
    return result


def wait_at_work(condition):
    """Wait for a condition, and let the event loop do nothing meanwhile."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end


def reset_behind(data, connection, transport):
    """Send ``data`` and reset the connection. Both have reached ``transport``, its other side, and lie unread there."""
    assert connection.send(data) == len(data)
    wait_at_work(lambda: not any(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))))
    reset(connection)
    wait_at_work(transport.peer_has_ended)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def start_mock(name="A1", **options):
    """Return a mock analyzer that listens on a free port of this process."""
    mock = Mock(name, Options(**options), seed=7, log=None)
    mock.listener = Listener(partial(MockConnection, mock, Control(own=mock)), "127.0.0.1", 0)
    mock.start()
    return mock


class Script(asyncio.Protocol):
    """A server's side of connections, each read given to ``on_data(connection number, transport, data)``."""

    def __init__(self, server):
        self.server = server

    def connection_made(self, transport):
        self.transport = transport
        self.number = len(self.server.transports)
        self.server.transports.append(transport)
        self.server.on_connect(self.number, transport)

    def data_received(self, data):
        self.server.received.append((self.number, data))
        self.server.on_data(self.number, self.transport, data)

    def eof_received(self):
        self.server.on_eof(self.number)


class ScriptServer:
    """A server that does what the test says: see ``Script``. ``on_eof(connection number)``: the other side ended."""

    def __init__(self, on_data=lambda *_: None, on_connect=lambda *_: None):
        self.on_data, self.on_connect, self.on_eof = on_data, on_connect, lambda _number: None
        self.transports, self.received = [], []

    async def start(self, tls=None, host="127.0.0.1", port=0, room=None):
        """Listen; ``room``: bytes that the system keeps of what is not read yet."""
        listener = socket.create_server((host, port))
        if room is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.server = await asyncio.get_running_loop().create_server(lambda: Script(self), sock=listener, ssl=tls)
        self.port = listener.getsockname()[1]
        return self

    @property
    def endpoint(self):
        return endpoint(self.port)

    @property
    def open(self):
        return sum(not transport.is_closing() for transport in self.transports)

    def stop(self):
        self.server.close()
        for transport in self.transports:
            transport.abort()


def endpoint(port, tls=None, host="127.0.0.1"):
    return f"{'https' if tls else 'http'}://{host}:{port}/analyze"


def endpoint_of(server):
    if isinstance(server, Mock):
        return f"{server.listener.origin}/analyze"
    return server.endpoint if isinstance(server, ScriptServer) else server


class World(Site):
    """A dispatcher on the running loop, ticking, over ``servers``: {id: mock, ScriptServer or endpoint}."""

    def __init__(self, folder, servers, weights=None, capacity=1 << 22, **sections):
        loop = asyncio.get_running_loop()
        self.poller = Poller(loop)
        super().__init__(folder, loop, settings(**sections), capacity, self.poller)
        for slot, (name, server) in enumerate(servers.items()):
            self.add(slot, (weights or {}).get(name, 1.0), endpoint_of(server), name)
        self.servers, self.peak_open = servers, 0
        self.delivered = partial(self.counters.get_of, field="delivered")

    async def __aenter__(self):
        self.dispatcher.set_analyzers(self.analyzers)
        self._ticking = self.loop.create_task(self._tick())
        return self

    async def __aexit__(self, *_error):
        self._ticking.cancel()
        self.dispatcher.stop()
        for server in self.servers.values():
            if not isinstance(server, str):
                server.stop()
        await asyncio.sleep(0.01)
        self.poller.close()

    async def _tick(self):
        due = dict.fromkeys(self.dispatcher.tasks, 0)
        while True:
            for task in self.dispatcher.tasks:
                if time.monotonic_ns() >= due[task]:
                    due[task] = time.monotonic_ns() + int(task.interval * SECOND)
                    while task.work(time.monotonic_ns()):
                        pass
            self.dispatcher.dead_letter_writer.tick(time.monotonic_ns())
            for pool in self.pools:
                self.peak_open = max(self.peak_open, pool.open_connections + pool.opening)
            await asyncio.sleep(0.01)

    def push(self, count=1, body=b'{"n":1}'):
        for _ in range(count):
            self.pushed += 1
            assert self.ring.push(body, str(uuid.UUID(int=self.pushed)))
        self.dispatcher.schedule()

    async def until_empty(self):
        await until(lambda: self.ring.undone == 0, "all delivered")
