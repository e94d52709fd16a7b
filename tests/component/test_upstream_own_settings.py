"""Settings of one analyzer: its headers, limits and TLS, as they are and as a reload changes them."""

from __future__ import annotations

import asyncio
import ssl
import time

import msgspec
import pytest
import trustme
from recorder import Recorder
from upstream_harness import (
    OK,
    Bench,
    Desk,
    ScriptServer,
    World,
    reply,
    requests_in,
    run,
    shared_block,
    start_mock,
    until,
)

from fastdist.net.upstream_tls import with_files
from fastdist.settings import Analyzer, Config, Header, Health
from fastdist.shm.block import AnalyzerWord
from fastdist.supervisor.health import HealthChecker

PRIVATE, PUBLIC = trustme.CA(), trustme.CA()
HEADERS = (Header("Authorization", b"Bearer \xff\xe9\t="), Header("x-key", b"1"))


def change(desk, **settings):
    """Set up the pool as a reload does."""
    desk.pool.set_up(msgspec.structs.replace(desk.pool.analyzer, **settings), desk.delivery, None)


# ---- headers


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_headers_are_in_each_request(mode):
    desk = Desk()
    change(desk, headers=HEADERS, mode=mode)
    connection = desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    while connection.in_flight():
        connection.data_received(OK)
    sent = connection.transport.requests
    assert [request.ids for request in sent] == ([["p1"], ["p2"]] if mode == "single" else [["p1", "p2"]])
    for request in sent:
        assert b"\r\nAuthorization: Bearer \xff\xe9\t=\r\nx-key: 1\r\n" in request.head
        assert request.head.count(b"\nHost: ") == request.head.count(b"\nContent-Length: ") == 1
    desk.check()


def test_no_headers_no_other_bytes():
    desk = Desk()
    connection = desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    assert connection.transport.sent == (
        b"POST /analyze HTTP/1.1\r\nHost: analyzer.test\r\nContent-Type: application/json\r\n"
        b"X-Packet-Id: p1\r\nX-Attempt: 1\r\nContent-Length: 1\r\n\r\n1"
    )


def test_headers_change_on_open_connection():
    desk = Desk()
    connection = desk.connect()
    for headers in (HEADERS, (), HEADERS[1:]):
        change(desk, headers=headers)
        desk.push(b"x")
        desk.pool.pump()
        connection.data_received(OK)
    assert [b"x-key: 1" in request.head for request in connection.transport.requests] == [True, False, True]
    assert len(desk.pool.connections) == 1


def test_large_headers_leave_room():
    desk = Desk(mode="batch", batch_packets=100)
    change(desk, headers=tuple(Header(f"X-{number}", b"v" * 8192) for number in range(30)))
    connection = desk.connect()
    desk.push(*[b"x" * 300] * 100)
    desk.pool.pump()
    assert sum(len(request.ids) for request in connection.transport.requests) == 100


def test_unasked_reply_shows_no_header(monkeypatch):
    logged = []
    monkeypatch.setattr("fastdist.worker.upstream.log.warning", lambda *_, **more: logged.append(more), raising=False)
    desk = Desk()
    change(desk, headers=HEADERS)
    desk.connect().data_received(b"HTTP/1.1 200 OK\r\nX-Echo: Bearer \xff\xe9\t=\r\n\r\n")
    (line,) = logged
    assert line["beginning"] == "HTTP/1.1 200 OK\r\nX-Echo: ***\r\n\r\n"


# ---- limits


def test_pipeline_changes_in_flight():
    """A connection keeps the depth it was opened with until it is replaced."""
    desk = Desk(pipeline=2, connections=2)
    old = desk.connect()
    desk.push(*[b"x"] * 9)
    desk.pool.pump()
    assert old.in_flight() == 2
    change(desk, pipeline=7)
    old.data_received(OK)
    assert old.in_flight() == 1, "it takes no more requests"
    new = desk.connect()
    desk.pool.pump()
    assert new.in_flight() == 7
    old.data_received(OK)
    assert old.transport.ended
    change(desk, pipeline=1)
    for _ in range(7):
        new.data_received(OK)
    assert new.transport.ended
    desk.check()
    assert desk.counters.get_of(1, "delivered") == 9


@pytest.mark.parametrize("busy", [0, 2, 5])
def test_lower_limit_closes_idle_ones_first(busy):
    desk = Desk(connections=5)
    connections = [desk.connect() for _ in range(5)]
    desk.push(*[b"x"] * busy)
    desk.pool.pump()
    change(desk, connections=3)
    closed = sum(each.transport.ended is not None for each in connections)
    assert closed == min(2, 5 - busy)
    for each in connections:
        if each.in_flight():
            each.data_received(OK)
    assert sum(each.transport.ended is not None for each in connections) == 2
    assert desk.counters.get_of(1, "delivered") == busy


def test_late_connection_is_closed():
    desk = Desk(connections=2)
    desk.connect()
    change(desk, connections=1)
    late = desk.connect()
    assert late.transport.ended
    assert late not in desk.pool.idle


def test_time_out_is_the_analyzers_own():
    desk = Desk(timeout=5.0)
    change(desk, timeout=20.0)
    connection = desk.connect()
    desk.push(b"x")
    desk.pool.pump()
    now = time.monotonic_ns()
    for seconds in (0, 6, 12, 18):
        desk.pool.looked_ns = now + seconds * 10**9
        connection.check()
        assert connection.in_flight() == 1
    desk.pool.looked_ns = now + 21 * 10**9
    connection.check()
    assert [event[2] for event in desk.owner.events] == ["no reply within 20 s"]


def test_mode_changes_while_packets_wait():
    desk = Desk()
    desk.push(b"1", b"2", b"3")
    change(desk, mode="batch")
    connection = desk.connect()
    desk.pool.pump()
    change(desk, mode="single")
    connection.data_received(OK)
    desk.push(b"4")
    desk.pool.pump()
    connection.data_received(OK)
    assert [request.ids for request in connection.transport.requests] == [["p1", "p2", "p3"], ["p4"]]
    desk.check()


def test_an_analyzers_limit_is_its_own(tmp_path):
    async def scenario():
        slow, quick = start_mock("A1", latency=0.05), start_mock("A2", latency=0.05)
        world = World(tmp_path, {"A1": slow, "A2": quick}, delivery={"spill_after": 60.0})
        world.analyzers[0] = msgspec.structs.replace(world.analyzers[0], connections=2)
        async with world as w:
            w.push(100)
            await until(lambda: w.dispatcher.pools[1].open_connections > 2, "more than the one may have")
            assert w.dispatcher.pools[0].open_connections <= 2
            await w.until_empty()
            assert w.delivered(0) + w.delivered(1) == 100
            assert abs(w.delivered(0) - 50) <= 3, "its share"
            assert w.dispatcher.pools[0].open_connections <= 2

    run(scenario())


def test_claims_are_limited_by_the_sum(tmp_path):
    """While this process is the bottleneck: four times what may be in flight to all of them."""
    with Bench(tmp_path, weights=(1, 1, 1)) as bench:
        bench.analyzers[1] = msgspec.structs.replace(bench.analyzers[1], connections=2, pipeline=3)
        bench.analyzers[2] = msgspec.structs.replace(bench.analyzers[2], mode="batch", connections=1)
        bench.dispatcher.set_analyzers(bench.analyzers)
        bench.dispatcher._load.measure = lambda _now: 1.0
        bench.tick()
        assert bench.dispatcher.claim_limit == 4 * (32 + 2 * 3 + 1 * 64)


# ---- TLS


def server_context(authority, *, client_authority=None, name="analyzer.example"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    if client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        client_authority.configure_trust(context)
    return context


class Secure:
    """An analyzer with TLS, and what it was asked."""

    def __init__(self, context):
        self.names, self.context = [], context
        context.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self.server = ScriptServer(lambda _number, transport, data: transport.write(OK * data.count(b" HTTP/1.1\r\n")))

    async def start(self):
        await self.server.start(self.context)
        return self

    @property
    def endpoint(self):
        return f"https://127.0.0.1:{self.server.port}/analyze"

    @property
    def received(self):
        return b"".join(data for _, data in self.server.received)


@pytest.fixture
def files(tmp_path):
    """Write the authority's certificate, and a client's pair of it; return them as settings."""
    pair = PRIVATE.issue_cert("fastdist.example")
    PRIVATE.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair.private_key_pem.write_to_path(tmp_path / "client.key")
    (tmp_path / "client.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    client = {"client_cert": str(tmp_path / "client.pem"), "client_key": str(tmp_path / "client.key")}
    return {"ca_file": str(tmp_path / "ca.pem")}, client


@pytest.fixture
def public(monkeypatch):
    """Make PUBLIC the one authority that the system trusts."""
    default = ssl.create_default_context

    def trusting(**more):
        context = default(**more)
        if not more:
            PUBLIC.configure_trust(context)
        return context

    monkeypatch.setattr(ssl, "create_default_context", trusting)


def own(name, endpoint, **settings):
    (found,) = with_files(Config(analyzers=(Analyzer(id=name, endpoint=endpoint, weight=1, **settings),))).analyzers
    return found


@pytest.mark.usefixtures("public")
def test_private_authority_beside_public_one(tmp_path, files):
    authority, _ = files

    async def scenario():
        private = await Secure(server_context(PRIVATE)).start()
        general = await Secure(server_context(PUBLIC, name="127.0.0.1")).start()
        world = World(tmp_path, {"A1": private.endpoint, "A2": general.endpoint})
        world.analyzers[0] = own("A1", private.endpoint, **authority, server_name="analyzer.example")
        async with world as w:
            w.push(40)
            await w.until_empty()
            assert abs(w.delivered(0) - 20) <= 3
            assert w.counters.get("retried") == 0
            assert set(private.names) == {"analyzer.example"}
            assert set(general.names) == {None}, "an address is no name to ask for"
            for slot in (0, 1):
                assert w.states.get(slot, AnalyzerWord.NOT_AFTER) > time.time()
        private.server.stop()
        general.server.stop()

    run(scenario())


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("trust", ["another authority", "another name"])
def test_authority_and_name_are_checked(tmp_path, files, trust):
    authority, _ = files

    async def scenario():
        server = await Secure(server_context(PUBLIC if trust == "another authority" else PRIVATE)).start()
        name = "analyzer.example" if trust == "another authority" else "other.example"
        world = World(tmp_path, {"A1": server.endpoint})
        world.analyzers[0] = own("A1", server.endpoint, **authority, server_name=name)
        async with world as w:
            w.push(1)
            await until(lambda: w.states.error(0))
            assert "certificate verify failed" in w.states.error(0)
            assert w.delivered(0) == 0
            assert not server.received
        server.server.stop()

    run(scenario())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_missing_client_certificate_is_named(tmp_path, files, version):
    """Then a reload brings one, and its connections carry all that has waited."""
    authority, client = files
    context = server_context(PRIVATE, client_authority=PRIVATE)
    context.minimum_version = context.maximum_version = version
    alert = "certificate required" if version is ssl.TLSVersion.TLSv1_3 else "handshake failure"

    async def scenario():
        server = Recorder(context)  # uvloop's TLS would send no alert
        shared = {**authority, "server_name": "analyzer.example"}
        world = World(tmp_path, {"A1": server.endpoint}, health={"fall": 1000}, retry={"cap": 0.1})
        world.analyzers[0] = own("A1", server.endpoint, **shared)
        async with world as w:
            w.push(5)
            await until(lambda: f"TLS alert: {alert}" in w.states.error(0), "the alert is named")
            assert server.packets == []
            w.analyzers[0] = own("A1", server.endpoint, **shared, **client)
            w.dispatcher.set_analyzers(w.analyzers)
            await w.until_empty()
            assert sorted(server.ids) == sorted(set(server.ids))
            assert len(server.ids) == w.delivered(0) == 5
        server.close()

    run(scenario())


def test_new_files_replace_connections(tmp_path, files):
    """What is under way on the old ones is finished there."""
    authority, client = files

    async def scenario():
        server = await Secure(server_context(PRIVATE, client_authority=PRIVATE)).start()
        answers = []
        server.server.on_data = lambda _number, transport, data: answers.append((transport, requests_in(data)))
        shared = {**authority, **client, "server_name": "analyzer.example"}
        world = World(tmp_path, {"A1": server.endpoint}, delivery={"connections": 1})
        world.analyzers[0] = own("A1", server.endpoint, **shared)
        async with world as w:
            w.push(1)
            await until(lambda: answers)
            w.dispatcher.set_analyzers({0: w.analyzers[0]})
            assert not answers[0][0].is_closing(), "the same files are no change"
            pair = PRIVATE.issue_cert("next.example")
            pair.private_key_pem.write_to_path(client["client_key"])
            (tmp_path / "client.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
            w.analyzers[0] = own("A1", server.endpoint, **shared)
            w.dispatcher.set_analyzers(w.analyzers)
            w.push(1)
            await asyncio.sleep(0.05)
            assert len(answers) == 1, "one connection at a time"
            answers[0][0].write(OK)
            await until(lambda: len(answers) == 2)
            (first, _), (second, _) = answers
            assert first is not second
            subject = second.get_extra_info("peercert")["subjectAltName"]
            assert subject == (("DNS", "next.example"),)
            second.write(OK)
            await w.until_empty()
        server.server.stop()

    run(scenario())


# ---- health checks


class Checks:
    """Checks of analyzers behind a server that wants a certificate of its clients."""

    def __init__(self):
        self.server = Recorder(server_context(PRIVATE, client_authority=PRIVATE))
        self.states = shared_block().analyzers
        for slot in (0, 1):
            self.states.clear(slot)
        self.checker = HealthChecker(self.states, Health(interval=0.02, timeout=5.0, rise=1, fall=1), 60.0)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_error):
        self.checker.close()
        self.server.close()
        await asyncio.sleep(0.01)

    async def asked(self, times):
        before = len(self.server.checks)
        await until(lambda: len(self.server.checks) >= before + times, f"{times} more checks")


def test_checks_have_headers_and_certificate(files):
    authority, client = files

    async def scenario():
        async with Checks() as it:
            shared = {**authority, "server_name": "analyzer.example"}
            it.checker.set_analyzers({0: own("A1", it.server.endpoint, **shared)})
            await until(lambda: "health check: TLS alert: certificate required" in it.states.error(0))
            assert not it.states.is_online(0)
            it.checker.set_analyzers({0: own("A1", it.server.endpoint, **shared, **client, headers=HEADERS)})
            await until(lambda: it.states.is_online(0))
            await it.asked(3)
            for check in it.server.checks:
                assert check.values(b"Authorization") == [b"Bearer \xff\xe9\t="]
                assert check.values(b"x-key") == [b"1"]
            assert set(it.server.names_asked) == {"analyzer.example"}
            assert it.states.get(0, AnalyzerWord.NOT_AFTER) > time.time()
            it.checker.set_analyzers({0: own("A1", it.server.endpoint, **shared, **client, headers=HEADERS[1:])})
            await it.asked(2)
            assert it.server.checks[-1].values(b"Authorization") == []

    run(scenario())


def test_checks_of_one_url_stay_apart(files):
    """Analyzers behind one URL are checked over connections with the certificate of each."""
    authority, client = files

    async def scenario():
        async with Checks() as it:
            shared = {**authority, "server_name": "analyzer.example"}
            with_one = own("A1", it.server.endpoint, **shared, **client)
            it.checker.set_analyzers({0: with_one, 1: own("A2", it.server.endpoint, **shared)})
            await until(lambda: it.states.error(1), "the one without fails")
            await it.asked(5)
            assert it.states.is_online(0)
            assert not it.states.is_online(1)

    run(scenario())


def test_plain_checks_have_headers_too():
    async def scenario():
        server = await ScriptServer(lambda _number, transport, _data: transport.write(reply(200))).start()
        states = shared_block().analyzers
        states.clear(0)
        checker = HealthChecker(states, Health(interval=0.02, timeout=5.0), 60.0)
        checker.set_analyzers({0: Analyzer(id="A1", endpoint=server.endpoint, weight=1, headers=HEADERS)})
        await until(lambda: server.received)
        assert server.received[0][1] == (
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: */*\r\nUser-Agent: fastdist-health\r\n"
            b"Connection: close\r\nAuthorization: Bearer \xff\xe9\t=\r\nx-key: 1\r\n\r\n" % server.port
        )
        checker.close()
        server.stop()
        await asyncio.sleep(0.01)

    run(scenario())
