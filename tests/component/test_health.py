"""Health checks: what is asked, what counts as an answer, and the two rows that turn an analyzer off and on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_harness import ScriptServer, reply, run, shared_block, start_mock, until

from fastdist.settings import Analyzer, Health
from fastdist.shm.block import AnalyzerState, AnalyzerWord
from fastdist.supervisor.health import HealthChecker, Probe

OK = reply(200)


def analyzer(port, name="A1", health="/health", scheme="http"):
    return Analyzer(id=name, endpoint=f"{scheme}://127.0.0.1:{port}/analyze", weight=1, health=health)


class Ward:
    """The states of analyzers and their checker."""

    def __init__(self, **settings):
        self.states = shared_block().analyzers
        for slot in range(self.states.slots):
            self.states.clear(slot)
            self.states.set(slot, AnalyzerWord.IN_USE, 1)
        self.settings = Health(**{"interval": 0.02, "timeout": 1.0, "rise": 2, "fall": 3} | settings)
        self.checker = HealthChecker(self.states, self.settings, 60.0)

    def get(self, word, slot=0):
        return self.states.get(slot, AnalyzerWord[word])

    def online(self, slot=0):
        return self.states.is_online(slot)

    async def checks(self, count, slot=0):
        """Wait for this many checks more."""
        for _ in range(count):
            last = self.get("LAST_CHECK_NS", slot)
            await until(lambda last=last: self.get("LAST_CHECK_NS", slot) > last)


@contextlib.asynccontextmanager
async def ward_of(*analyzers, **settings):
    ward = Ward(**settings)
    ward.checker.set_analyzers(dict(enumerate(analyzers)))
    try:
        yield ward
    finally:
        ward.checker.close()
        await asyncio.sleep(0.01)


# ---- the state machine


def feed(ward, results):
    """Record checks: + went well, - did not."""
    for result in results:
        ward.checker.record(0, 200 if result == "+" else 503, "" if result == "+" else "health check: HTTP 503")


@pytest.mark.parametrize(
    ("rise", "fall", "checks", "online"),
    [
        (2, 3, "", True),
        (2, 3, "--", True),
        (2, 3, "---", False),
        (2, 3, "--+--+--", True),
        (2, 3, "--+---", False),
        (2, 3, "---+", False),
        (2, 3, "---++", True),
        (2, 3, "---+-+-+", False),
        (2, 3, "---+-++", True),
        (2, 3, "---++--", True),
        (2, 3, "---++---", False),
        (1, 1, "-", False),
        (1, 1, "-+", True),
        (1, 1, "-+-", False),
        (5, 1, "-++++", False),
        (5, 1, "-+++++", True),
        (2, 3, "++++++", True),
    ],
)
def test_rise_and_fall_set_the_state(rise, fall, checks, online):
    ward = Ward(rise=rise, fall=fall)
    feed(ward, checks)
    assert ward.online() is online


@given(st.text("+-", max_size=40), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=settings().max_examples // 2, deadline=None)
def test_the_state_is_what_a_model_says(checks, rise, fall):
    ward = Ward(rise=rise, fall=fall)
    online, row = True, 0
    for check in checks:
        feed(ward, check)
        row = max(row, 0) + 1 if check == "+" else min(row, 0) - 1
        if online and row <= -fall:
            online = False
        elif not online and row >= rise:
            online = True
        assert ward.online() is online
        assert (ward.get("CHECK_SUCCESSES"), ward.get("CHECK_FAILURES")) == (max(row, 0), max(-row, 0))


def test_check_records_its_time_and_status():
    ward = Ward()
    before = time.time_ns()
    feed(ward, "-")
    assert before <= ward.get("LAST_CHECK_NS") <= time.time_ns()
    assert ward.get("LAST_STATUS") == 503
    assert ward.states.error(0) == "health check: HTTP 503"
    feed(ward, "+")
    assert (ward.get("LAST_STATUS"), ward.get("CHECK_FAILURES"), ward.get("CHECK_SUCCESSES")) == (200, 0, 1)


def test_change_of_state_notifies_workers():
    ward = Ward()
    epoch = ward.states.epoch
    feed(ward, "--")
    assert ward.states.epoch == epoch
    feed(ward, "-")
    assert ward.states.epoch > epoch
    epoch = ward.states.epoch
    feed(ward, "-+")
    assert ward.states.epoch == epoch
    feed(ward, "+")
    assert ward.states.epoch > epoch
    assert ward.get("ONLINE_SINCE_NS") > 0
    assert ward.get("STATE") == AnalyzerState.ONLINE


def test_checks_and_deliveries_count_apart():
    ward = Ward(fall=3)
    ward.states.delivery_failed(0, "HTTP 500")
    ward.states.delivery_failed(0, "HTTP 500")
    feed(ward, "+++")  # a check that goes well does not excuse the deliveries
    assert ward.get("DELIVERY_FAILURES") == 2
    feed(ward, "--")
    ward.states.delivery_succeeded(0)  # nor the other way round
    assert ward.get("CHECK_FAILURES") == 2
    assert ward.online()
    feed(ward, "-")
    assert not ward.online()


def test_bad_deliveries_flap_on_good_checks():
    ward = Ward(rise=2)
    feed(ward, "+++++")
    ward.states.go_offline(0, by_deliveries=True)  # a worker has seen enough
    feed(ward, "+")
    assert not ward.states.is_on_probation(0, 2)  # successes from before do not count
    feed(ward, "+")
    assert ward.states.is_on_probation(0, 2)
    feed(ward, "+++++")
    assert not ward.online()  # until it takes a packet
    ward.states.pass_trial(0, 2)
    assert ward.online()
    assert ward.get("DELIVERY_FAILURES") == 0


def test_since_is_when_probation_began():
    ward = Ward(rise=2)
    ward.states.go_offline(0, by_deliveries=True)
    offline_since = ward.get("SINCE_NS")
    feed(ward, "+")
    assert ward.get("SINCE_NS") == offline_since
    feed(ward, "+")
    begun = ward.get("SINCE_NS")
    assert begun > offline_since
    feed(ward, "+++")
    assert ward.get("SINCE_NS") == begun
    ward.states.fail_trial(0, 1)
    failed = ward.get("SINCE_NS")
    assert failed > begun
    feed(ward, "-++")
    assert ward.get("SINCE_NS") == failed, "it stays offline until it takes a packet"


# ---- what counts as an answer


def test_check_request_suits_any_server():
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        async with ward_of(analyzer(server.port, health="/up?x=1")):
            await until(lambda: server.received)
        assert (
            server.received[0][1]
            == (
                f"GET /up?x=1 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAccept: */*\r\n"
                "User-Agent: fastdist-health\r\nConnection: close\r\n\r\n"
            ).encode()
        )
        server.stop()

    run(scenario())


NOT_HTTP = "health check: a reply that is not HTTP"
ANSWERS = {
    "200": (OK, 200, ""),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
    "299": (reply(299), 299, ""),
    "no reason": (b"HTTP/1.1 200\r\n\r\n", 200, ""),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\n\n", 200, ""),
    "301": (reply(301), 301, "health check: HTTP 301"),
    "404": (reply(404), 404, "health check: HTTP 404"),
    "500": (reply(500), 500, "health check: HTTP 500"),
    "503 with a body": (reply(503, body=b"x" * 100_000), 503, "health check: HTTP 503"),
    "garbage": (b"\x15\x03\x01\x00\x02\x02\x46\n", 0, NOT_HTTP),
    "HTTP/2": (b"HTTP/2 200\r\n\r\n", 0, NOT_HTTP),
    "no status": (b"HTTP/1.1 OK\r\n\r\n", 0, NOT_HTTP),
    "half a status": (b"HTTP/1.1 20\r\n\r\n", 0, NOT_HTTP),
    "a line without end": (b"HTTP/1.1 200 " + b"x" * 300_000, 0, NOT_HTTP),
    "100 before": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, ""),
    "103 before": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n" + OK, 200, ""),
    "several before": (b"HTTP/1.1 102\n\n" * 20 + b"HTTP/1.1 103 x\r\nA: b\nC: d\r\n\r\n" + OK, 200, ""),
    "100 before 503": (b"HTTP/1.1 100 Continue\r\n\r\n" + reply(503), 503, "health check: HTTP 503"),
    "101": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101, "health check: HTTP 101"),
    "100 before garbage": (b"HTTP/1.1 100 Continue\r\n\r\nhello\r\n", 0, NOT_HTTP),
    "1000": (b"HTTP/1.1 1000 x\r\n\r\n", 0, NOT_HTTP),
    "interims for ever": (b"HTTP/1.1 102 Processing\r\n\r\n" * 1000, 0, NOT_HTTP),
    "an interim without end": (b"HTTP/1.1 103 Early Hints\r\n" + b"Link: </x>\r\n" * 2000, 0, NOT_HTTP),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_answer_means(name):
    data, status, error = ANSWERS[name]

    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(data)).start()
        async with ward_of(analyzer(server.port)) as ward:
            await ward.checks(1)
            assert (ward.get("LAST_STATUS"), ward.states.error(0)) == (status, error)
            if error:
                await until(lambda: not ward.online())
            else:
                await ward.checks(4)
                assert ward.online()
        server.stop()

    run(scenario())


async def status_of(*pieces):
    """Return the status that a check reads from these pieces, 0 if no head is complete."""
    probe = Probe(60.0)
    probe.connection_made(Mock(spec=asyncio.Transport))
    asking = asyncio.ensure_future(probe.ask(b""))
    await asyncio.sleep(0)
    for piece in pieces:
        probe.data_received(piece)
    probe.connection_lost(None)
    try:
        return await asking
    except ValueError:
        return 0


@pytest.mark.parametrize("name", ANSWERS)
def test_check_response_is_same_when_split(name):
    data, status, _ = ANSWERS[name]

    async def scenario():
        assert await status_of(data) == status
        for at in range(1, min(len(data), 700)):
            assert await status_of(data[:at], data[at:]) == status
        assert await status_of(*(data[at : at + 1] for at in range(min(len(data), 700))), data[700:]) == status

    run(scenario())


def drip(transport, text=b"HTTP/1.1 200 OK and so on for a long while"):
    """Write a byte now and then."""
    if text and not transport.is_closing():
        transport.write(text[:1])
        asyncio.get_running_loop().call_later(0.03, drip, transport, text[1:])


MUTE = {
    "silent": lambda _transport: None,
    "half a line": lambda transport: transport.write(b"HTTP/1.1 200"),
    "only a line": lambda transport: transport.write(b"HTTP/1.1 200 OK\r\n"),
    "an empty line": lambda transport: transport.write(b"\r\n"),
    "dripping": drip,
    "closed": lambda transport: transport.close(),
    "closed in an interim": lambda transport: (transport.write(b"HTTP/1.1 100 Continue\r\n"), transport.close()),
    "closed after an interim": lambda transport: (transport.write(b"HTTP/1.1 100 Continue\r\n\r\n"), transport.close()),
    "reset": lambda transport: transport.abort(),
}


@pytest.mark.parametrize("how", MUTE)
@pytest.mark.parametrize("on_arrival", [False, True])
def test_silent_server_is_unhealthy(how, on_arrival):
    late = how in ("silent", "half a line", "only a line", "an empty line", "dripping")

    async def scenario():
        server = ScriptServer(
            **{"on_connect" if on_arrival else "on_data": lambda _number, transport, *_data: MUTE[how](transport)}
        )
        await server.start()
        async with ward_of(analyzer(server.port), timeout=0.1 if late else 5.0, fall=2) as ward:
            await until(lambda: not ward.online())
            assert ward.get("LAST_STATUS") == 0
            assert ward.states.error(0) in (
                # What comes before it is asked for may be lost, and the rest is no HTTP.
                ["health check: no answer within 0.1 s", *([NOT_HTTP] if how == "dripping" and on_arrival else [])]
                if late
                else ["health check: connection closed before the reply", "health check: Connection reset by peer"]
            )
        server.stop()

    run(scenario())


def test_missing_server_is_unhealthy():
    async def scenario():
        mock = start_mock(refuse=True)
        async with ward_of(analyzer(mock.listener.port)) as ward:
            await until(lambda: not ward.online())
            assert ward.states.error(0) == "health check: connection refused"
            mock.configure({"refuse": False})
            await until(ward.online)
            assert ward.get("CHECK_SUCCESSES") >= 2
        mock.stop()

    run(scenario())


def test_host_without_address_is_unhealthy():
    async def scenario():
        nowhere = Analyzer(id="A1", endpoint="http://no-such-host.invalid/x", weight=1)
        async with ward_of(nowhere, timeout=5.0, fall=1) as ward:
            await until(lambda: not ward.online())
            assert ward.states.error(0).startswith("health check: ")

    run(scenario())


def test_analyzers_fall_and_rise_apart():
    async def scenario():
        mocks = [start_mock(f"A{number}") for number in (1, 2, 3)]
        async with ward_of(*(analyzer(mock.listener.port, mock.id) for mock in mocks), timeout=0.5) as ward:
            await asyncio.gather(*(ward.checks(2, slot) for slot in range(3)))
            assert [ward.online(slot) for slot in range(3)] == [True] * 3
            mocks[0].configure({"unhealthy": True})
            mocks[2].configure({"healthHang": True})
            await until(lambda: not ward.online(0) and not ward.online(2))
            assert ward.online(1)
            assert ward.states.error(0) == "health check: HTTP 503"
            assert ward.states.error(2) == "health check: no answer within 0.5 s"
            mocks[0].configure({"unhealthy": False})
            mocks[2].configure({"healthHang": False})
            await until(lambda: ward.online(0) and ward.online(2))
        for mock in mocks:
            mock.stop()

    run(scenario())


def test_the_check_may_be_elsewhere():
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        mock = start_mock(refuse=True)
        elsewhere = analyzer(mock.listener.port, health=f"http://127.0.0.1:{server.port}/a/b")
        async with ward_of(elsewhere) as ward:
            await ward.checks(4)
            assert ward.online()
        assert server.received[0][1].startswith(b"GET /a/b HTTP/1.1\r\n")
        server.stop()

    run(scenario())


def test_checks_go_on_whatever_one_meets(monkeypatch):
    async def scenario():
        mock = start_mock()
        async with ward_of(analyzer(mock.listener.port)) as ward:
            ask = ward.checker._ask
            monkeypatch.setattr(ward.checker, "_ask", lambda *_: 1 / 0)
            await until(lambda: not ward.online())
            assert ward.states.error(0) == "health check: division by zero"
            monkeypatch.setattr(ward.checker, "_ask", ask)
            await until(ward.online)
        mock.stop()

    run(scenario())


# ---- who is checked


def test_new_analyzers_add_and_remove_checks():
    async def scenario():
        first = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        second = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        async with ward_of(analyzer(first.port)) as ward:
            await ward.checks(2)
            ward.checker.set_analyzers({0: analyzer(first.port), 3: analyzer(second.port, "A2")})
            await ward.checks(2, slot=3)
            ward.checker.set_analyzers({3: analyzer(second.port, "A2")})
            await asyncio.sleep(0.05)
            before = len(first.received)
            await ward.checks(4, slot=3)
            assert len(first.received) == before
            ward.checker.set_analyzers({3: analyzer(second.port, "A2", health="/other")})  # another URL
            await until(lambda: b"GET /other" in second.received[-1][1])
            ward.checker.close()
            await asyncio.sleep(0.05)
            before = len(second.received)
            await asyncio.sleep(0.1)
            assert len(second.received) == before
        first.stop()
        second.stop()

    run(scenario())


def test_unchanged_analyzers_keep_checks():
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        async with ward_of(analyzer(server.port), interval=30.0) as ward:
            await ward.checks(1)
            for _ in range(5):
                ward.checker.set_analyzers({0: analyzer(server.port)})
                await asyncio.sleep(0.01)
            assert len(server.received) == 1
        server.stop()

    run(scenario())


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_checks_leave_no_connections_behind():
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start()
        descriptors = open_descriptors()
        async with ward_of(analyzer(server.port), interval=0.005) as ward:
            await ward.checks(40)
        await until(lambda: server.open == 0)
        await until(lambda: open_descriptors() <= descriptors + 2)
        server.stop()

    run(scenario())


# ---- TLS


def test_untrusted_certificate_fails_a_check(certificate):
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start(certificate[1])
        async with ward_of(analyzer(server.port, scheme="https")) as ward:
            await until(lambda: not ward.online())
            error = ward.states.error(0)
            assert error.startswith("health check: ")
            assert "certificate verify failed" in error
        assert server.received == []
        server.stop()

    run(scenario())


def test_trusted_certificate_passes_a_check(certificate):
    async def scenario():
        server = await ScriptServer(lambda _n, transport, _data: transport.write(OK)).start(certificate[1])
        async with ward_of() as ward:
            ward.checker.tls.system.load_verify_locations(certificate[0])
            ward.checker.set_analyzers({0: analyzer(server.port, scheme="https")})
            await ward.checks(3)
            assert (ward.get("LAST_STATUS"), ward.online()) == (200, True)
        server.stop()

    run(scenario())


def test_server_without_tls_fails_check():
    async def scenario():
        mock = start_mock()
        async with ward_of(analyzer(mock.listener.port, scheme="https")) as ward:
            await until(lambda: not ward.online())
            assert ward.get("LAST_STATUS") == 0
        mock.stop()

    run(scenario())
