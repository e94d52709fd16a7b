"""Whatever comes in whatever order: no connection leaves its tables; packets and answers are where they belong."""

from __future__ import annotations

import contextlib
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ingest_harness import BODY, CONTINUE, Service, head, keyed, post, post_chunked, read_answers
from upstream_harness import OK, SECOND, Desk, reply

from fastdist.http.responses import problem

READS = ("IDLE", "HEAD", "BODY", "CHUNKS", "WHOLE")
BODIES = ("LENGTH", "CHUNKED", "CHUNKS")
# The states that go together between two calls: what writing may be, by what reading is.
EMITTER = {state: {"AT_ONCE", "WAITING"} for state in READS}
EMITTER |= {"DISCARDING": {"WAITING", "WRITTEN"}, "ENDED": {"WAITING", "WRITTEN", "LOST"}}
ANALYZER = {state: {"OPEN", "EARLY", "LEAVING", "CLOSED"} for state in ("HEAD", *BODIES)}
ANALYZER |= {state: {"LEAVING", "CLOSED"} for state in ("TO_CLOSE", "OVER")}

NUMBERS = st.integers(0, 2)
SIZES = st.lists(st.just(0) | st.integers(1, 150), min_size=1, max_size=3)


def cut(data, size):
    """Return ``size`` bytes (0: up to the end of a head), and the rest."""
    size = size or data.find(b"\r\n\r\n") + 4
    return data[:size], data[size:]


# ---- emitters

KINDS = {  # what is sent, with an id -> the statuses that may answer it
    "packet": (keyed, {202}),
    "in chunks": (lambda key: post_chunked(BODY[:9], BODY[9:], lines=(f"Idempotency-Key: {key}",)), {202}),
    "expecting": (lambda key: keyed(key, BODY, "Expect: 100-continue"), {202}),
    "waiting": (lambda key: keyed(key, BODY, "Prefer: wait=5"), {200, 202}),
    "last": (lambda key: keyed(key, BODY, "Connection: close"), {202}),
    "no packet": (lambda _: post(b"{ "), {400}),
    "no packet, in chunks": (lambda _: post_chunked(b"{", b" "), {400}),
    "view": (lambda _: head("GET /health"), {200}),
    "refused": (lambda _: post(BODY, "Content-Type: text/plain"), {415}),
    "refused, in chunks": (lambda _: post_chunked(BODY, lines=("Content-Type: text/plain",)), {415}),
    "no http": (lambda _: b"x y z\r\n\r\n", {400}),
    "bad chunks": (lambda _: post_chunked(BODY, end=b"x\r\n"), {400}),
    "too large": (lambda _: post(bytes(5000)), {413}),
}
FAULT = problem(503, "the packet could not be written to disk")


class Emitter:
    """An emitter: what it is about to send, and what it may be answered."""

    def __init__(self, service, number):
        self.connection, self.number = service.connect(), number
        self.protocol, self.transport = self.connection.protocol, self.connection.transport
        self.out, self.asked, self.ended = b"", [], False

    def ask(self, kind):
        request, statuses = KINDS[kind]
        key = f"{self.number}-{len(self.asked)}"
        self.out += request(key)
        self.asked.append((statuses, key))

    def feed(self, size):
        if self.transport.reading and self.out and not self.ended:
            data, self.out = cut(self.out, size)
            self.protocol.data_received(data)

    def answers(self):
        data = self.connection.written
        while data.endswith(CONTINUE):
            data = data.removesuffix(CONTINUE)
        return read_answers(data)

    def check(self):
        """Each request has one answer, in order; one that was not asked for comes last."""
        answers = self.answers()
        assert not any(answer.closes for answer in answers[:-1])
        for at, answer in enumerate(answers):
            statuses, key = self.asked[at] if at < len(self.asked) else (set(), "")
            assert answer.status in statuses | {503} or (answer.closes and answer.status == 408), (at, answer)
            assert answer.json.get("packetId", key) == key
        return [answer.id for answer in answers if "packetId" in answer.json]


class Emitters(RuleBasedStateMachine):
    """A service and some emitters, to which everything happens."""

    seen: tuple[set[str], set[str]] = set(), set()

    @initialize(fsync=st.booleans(), short=st.sampled_from([True, True, False]))
    def open(self, fsync, short):
        self.service, self.fsync = Service(max_header=1024, max_body=4096, fsync=fsync), fsync
        if short:  # an iteration of the event loop has time for one packet and one answer that Python makes
            self.service.budget(0, 1)
        self.context = contextlib.ExitStack()
        self.loop = self.context.enter_context(self.service.timers())
        self.emitters, self.gone, self.delivered, self.opened = [], [], [], 0
        self.connect()

    def teardown(self):
        for emitter in self.emitters:
            if emitter.protocol.state[1] != "LOST" and emitter.transport.is_paused:
                emitter.transport.is_paused = False
                emitter.protocol.resume_writing()
        self.come_to_rest()
        self.wait(6)
        self.sync()
        self.everything_is_where_it_belongs()
        for emitter in self.emitters:
            if emitter.connection.open and not emitter.ended:
                assert emitter.protocol.state == ("IDLE", "AT_ONCE")
                assert len(emitter.answers()) == len(emitter.asked)
            emitter.connection.lose()
        assert self.service.intake.bodies == 0
        assert not self.service.emitters.waiting
        assert not self.service.intake.connections
        self.context.close()

    def come_to_rest(self):
        """Let the event loop go on until nothing is left to read."""
        for _ in range(1000):
            for emitter in self.emitters:
                emitter.feed(10**6)
            if not self.service.turns:
                return
            self.turn()
            self.sync()
        raise AssertionError("never comes to rest")

    def one(self, number):
        return self.emitters[number % len(self.emitters)]

    @invariant()
    def everything_is_where_it_belongs(self):
        for emitter in [*self.emitters, *self.gone]:
            reading, writing = emitter.protocol.state
            assert writing in EMITTER[reading], (reading, writing)
            self.seen[0].add(reading)
            self.seen[1].add(writing)
        ids = self.delivered + [packet.id for packet in self.service.ring.waiting()]
        assert len(set(ids)) == len(ids)
        for emitter in self.emitters:
            mine = [int(name.split("-")[1]) for name in ids if name.startswith(f"{emitter.number}-")]
            assert mine == sorted(mine)
            assert set(emitter.check()) <= set(ids)
        for emitter in self.emitters.copy():
            if emitter.transport.closed:  # the event loop tells of it in its next iteration
                emitter.connection.lose()
                self.emitters.remove(emitter)
                self.gone.append(emitter)
        self.gone = self.gone[-1:]
        if not self.emitters:
            self.connect()

    @rule()
    def connect(self):
        if len(self.emitters) < 3:
            self.opened += 1
            emitter = Emitter(self.service, self.opened)
            emitter.transport.is_paused = False
            self.emitters.append(emitter)

    @rule(number=NUMBERS, kinds=st.lists(st.sampled_from(list(KINDS)), max_size=3), sizes=SIZES)
    def send(self, number, kinds, sizes):
        """Send, in pieces; what is left comes later."""
        emitter = self.one(number)
        for kind in kinds:
            emitter.ask(kind)
        for size in sizes:
            emitter.feed(size)

    @rule(number=NUMBERS, kind=st.sampled_from(list(KINDS)), sizes=SIZES)
    def send_one(self, number, kind, sizes):
        self.send(number, [kind], sizes)

    @rule(number=NUMBERS)
    def empty_line(self, number):
        emitter = self.one(number)
        if not emitter.out and emitter.protocol.state[0] == "IDLE":
            emitter.out = b"\r\n"

    @rule(number=NUMBERS)
    def end(self, number):
        emitter = self.one(number)
        if not emitter.ended and emitter.transport.reading:
            emitter.ended = True
            emitter.connection.end()

    @rule(number=NUMBERS)
    def lose(self, number):
        self.one(number).transport.closed = True

    @rule(number=NUMBERS, seconds=st.sampled_from([1, 6, 11, 31, 76, 400]))
    def time_out(self, number, seconds):
        emitter = self.one(number)
        emitter.connection.age(seconds)
        emitter.connection.wait(0)

    @rule(number=NUMBERS)
    def pause_or_resume_writing(self, number):
        emitter = self.one(number)
        emitter.transport.is_paused = not emitter.transport.is_paused
        if emitter.transport.is_paused:
            emitter.protocol.pause_writing()
        else:
            emitter.protocol.resume_writing()

    @rule(number=NUMBERS, kind=st.sampled_from(["no packet", "no packet, in chunks", "view"]), size=st.integers(1, 4))
    def send_what_has_to_wait(self, number, kind, size):
        """Another has used up what this iteration of the event loop has for answers that Python makes."""
        connection = self.service.connect()
        connection.protocol.data_received(head("GET /health"))
        connection.lose()
        emitter = self.one(number)
        emitter.ask(kind)
        for end in (size, 0):
            emitter.feed(len(emitter.out) - end)

    @rule()
    def turn(self):
        self.service.turn()

    @rule()
    def sync(self):
        self.service.sync()

    @precondition(lambda self: self.fsync)
    @rule()
    def fail_to_sync(self):
        self.service.ring.withdraw_unsynced()
        response = (FAULT.status, "Service Unavailable", FAULT.headers, FAULT.body)
        self.service.intake.not_stored(self.service.ring.synced_position, *response)

    @rule()
    def deliver(self):
        for packet in self.service.packets():
            self.delivered.append(packet.id)
            self.service.emitters.settled(packet.sequence, "A1")

    @rule(seconds=st.sampled_from([1, 6]))
    def wait(self, seconds):
        self.loop.advance(seconds)

    @rule(draining=st.booleans(), closed=st.booleans())
    def drain(self, draining, closed):
        self.service.intake.draining, self.service.intake.closed = draining, closed


def test_emitter_connections_keep_to_tables():
    Emitters.seen = set(), set()
    run_state_machine_as_test(Emitters, settings=settings(stateful_step_count=40))
    life = Service().connect().protocol.life
    assert Emitters.seen == (set(life.reading), set(life.writing))


# ---- analyzers

CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n63\r\n%b\r\n0\r\n\r\n" % (b"x" * 99)
REPLIES = [
    OK,
    reply(body=b"x" * 99),
    CHUNKS,
    CHUNKS.replace(b"\r\nTransfer", b"\r\nConnection: close\r\nTransfer"),
    reply(200, "Connection: close", body=b"x" * 99),
    b"HTTP/1.1 200 OK\r\n\r\nok",
    b"HTTP/1.1 103 Early Hints\r\n\r\n",
    reply(500, body=b"x" * 99),
    reply(422),
    reply(503, "Retry-After: 2"),
    b"\0",
]


class Analyzers(RuleBasedStateMachine):
    """A pool with connections to one analyzer, to which everything happens."""

    seen: tuple[set[str], set[str]] = set(), set()

    @initialize(pipeline=st.integers(1, 3), batch=st.booleans())
    def open(self, pipeline, batch):
        mode = {"mode": "batch", "batch_packets": 2, "linger": 0} if batch else {"mode": "single"}
        self.desk = Desk(connections=3, pipeline=pipeline, timeout=5.0, **mode)
        self.now, self.all, self.out = time.monotonic_ns(), [], {}
        self.connect()

    @invariant()
    def everything_is_where_it_belongs(self):
        desk = self.desk
        for connection in self.all:
            reading, writing = connection.state
            assert writing in ANALYZER[reading], (reading, writing)
            assert connection not in desk.pool.idle or writing == "OPEN"
            assert connection.is_early() <= (writing in ("EARLY", "LEAVING"))
            assert (connection.transport.ended is not None) == (writing == "CLOSED")
            assert (writing == "CLOSED") <= (connection.in_flight() == 0)
            self.seen[0].add(reading)
            self.seen[1].add(writing)
            if writing == "CLOSED" and not connection.transport.lost:
                connection.transport.lose()
        self.all = [each for each in self.all if each.state[1] != "CLOSED"]
        desk.check()
        if not self.all:
            self.connect()

    def teardown(self):
        for connection in self.all:
            connection.transport.lose()
        self.desk.check()
        assert self.desk.pool.packets_in_flight == 0

    def one(self, number):
        return self.all[number % len(self.all)]

    @rule()
    def connect(self):
        if len(self.all) < 3:
            connection = self.desk.connect()
            self.all.append(connection)
            self.out[connection] = b""

    @rule(count=st.integers(1, 4), size=st.sampled_from([1, 50]))
    def push(self, count, size):
        self.desk.push(*[b"x" * size] * count)
        self.desk.pool.pump()

    @rule(number=NUMBERS, data=st.sampled_from(REPLIES), unwritten=st.sampled_from([0, 0, 300]), sizes=SIZES)
    def reply(self, number, data, unwritten, sizes):
        """Reply to a request, in pieces; what is left comes later."""
        connection = self.one(number)
        if connection.in_flight() == 0:
            self.push(3 * self.desk.pool.pipeline, 1)
        if connection.in_flight():
            connection.transport.unflushed = unwritten
            self.out[connection] += data
        self.go_on(number, sizes)

    @rule(number=NUMBERS, sizes=SIZES)
    def go_on(self, number, sizes):
        connection = self.one(number)
        for size in sizes:
            data, self.out[connection] = cut(self.out[connection], size)
            if data:
                connection.data_received(data)

    @rule(number=NUMBERS, count=st.sampled_from([0, 0, 1, 300, 10_000]))
    def write(self, number, count):
        """So many bytes are not written yet."""
        self.one(number).transport.unflushed = count

    @rule(number=NUMBERS)
    def end(self, number):
        connection = self.one(number)
        if not connection.eof_received():
            connection.transport.unflushed = 0  # a transport of the event loop writes all, and closes
            connection.transport.lose()

    @rule(number=NUMBERS, error=st.sampled_from([None, OSError("reset")]))
    def lose(self, number, error):
        self.one(number).transport.lose(error)

    @rule(number=NUMBERS)
    def retire(self, number):
        self.one(number).retire()

    @rule(seconds=st.sampled_from([0, 1, 6, 61]))
    def look(self, seconds):
        self.now = max(self.now, time.monotonic_ns()) + seconds * SECOND
        self.desk.pool.check(self.now)


def test_analyzer_connections_keep_to_tables():
    Analyzers.seen = set(), set()
    run_state_machine_as_test(Analyzers, settings=settings(stateful_step_count=40))
    life = Desk().connect().life
    assert Analyzers.seen == (set(life.reading), set(life.writing))
