"""The dispatcher and mock analyzers on real sockets, in one process: every fault, and nothing lost."""

from __future__ import annotations

import asyncio
import json
import time
import uuid

import pytest
from upstream_harness import OK, ScriptServer, World, requests_in, run, start_mock, until

WEIGHTS = {"A1": 0.1, "A2": 0.4, "A3": 0.2, "A4": 0.3}
MODES = {
    "single": {},
    "pipeline": {"pipeline": 4, "connections": 3},
    "batch": {"mode": "batch", "batch_packets": 7},
    "batch and pipeline": {"mode": "batch", "pipeline": 3, "connections": 2},
}


def ledger(*mocks):
    """Return {packet id: (acknowledged, received, ambiguous)}, over all of them."""
    rows = {}
    for mock in mocks:
        for line in b"".join(mock.ledger.id_lines()).decode().splitlines():
            name, *counts = line.split()
            rows[name] = tuple(a + int(b) for a, b in zip(rows.get(name, (0, 0, 0)), counts, strict=True))
    return rows


def check_ledger(w, *mocks, duplicates):
    """Every packet was delivered, and (unless the fault leaves doubt) once."""
    rows = ledger(*mocks)
    assert set(rows) == {str(uuid.UUID(int=number)) for number in range(1, w.pushed + 1)}
    sure = {name: acknowledged for name, (acknowledged, _, _) in rows.items()}
    assert all(acknowledged + ambiguous for acknowledged, _, ambiguous in rows.values())
    if not duplicates:
        assert set(sure.values()) == {1}
    assert sum(mock.ledger.changed + mock.ledger.broken for mock in mocks) == 0
    assert sum(w.delivered(slot) for slot in w.analyzers) == w.pushed


# ---- faults

FAULTS = {
    "none": {},
    "chunked": {"chunked": True},
    "interim": {"interim": True},
    "close": {"close_every": 1},
    "close now and then": {"close_every": 3},
    "latency": {"latency": 0.002, "jitter": 0.004},
    "204": {"status": 204},
    "500": {"failure_rate": 0.3},
    "503": {"failure_rate": 0.3, "failure_status": 503, "chunked": True},
    "408": {"failure_rate": 0.3, "failure_status": 408, "close_every": 2},
    "silent close": {"silent_close": 2},
    "silent close at once": {"silent_close": 1},
    "reset": {"reset_rate": 0.2},
    "garbage": {"garbage_rate": 0.2},
    "truncated": {"truncate_rate": 0.2},
    "wrong length": {"wrong_length_rate": 0.2},
    "everything": {
        "failure_rate": 0.1,
        "reset_rate": 0.1,
        "garbage_rate": 0.1,
        "truncate_rate": 0.1,
        "wrong_length_rate": 0.1,
        "silent_close": 3,
        "interim": True,
        "jitter": 0.003,
    },
}
WHOLE = ("none", "chunked", "interim", "latency", "204")  # with these every packet is sent once


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_analyzer_behaviour_loses_packets(tmp_path, fault, mode):
    async def scenario():
        bad, good = start_mock("A1", verify=True, **FAULTS[fault]), start_mock("A2", verify=True)
        retry = {"base": 0.005, "cap": 0.02}
        async with World(
            tmp_path, {"A1": bad, "A2": good}, delivery=MODES[mode], retry=retry, health={"fall": 10_000}
        ) as w:
            for number in range(30):
                w.push(10, json.dumps({"n": number}).encode())
                await asyncio.sleep(0)
            await w.until_empty()
            assert w.dispatcher.retrying == {}
            check_ledger(w, bad, good, duplicates=fault not in WHOLE)
            if fault in WHOLE:
                assert w.counters.get("retried") == 0
                assert bad.ledger.acknowledged > 100 < good.ledger.acknowledged
            if fault in ("close", "close now and then", "silent close", "silent close at once"):
                assert w.counters.get_of(0, "failed") == 0
            if fault in ("500", "503", "408", "reset", "garbage"):
                assert w.counters.get("retried") > 0
                if fault != "reset" or "pipeline" not in mode:  # a reset may overtake the replies before it
                    assert {acknowledged for acknowledged, _, _ in ledger(bad, good).values()} == {1}

    run(scenario())


@pytest.mark.parametrize("mode", MODES)
def test_hanging_analyzer_loses_its_packets(tmp_path, mode):
    async def scenario():
        stuck, good = start_mock("A1", hang=True), start_mock("A2")
        delivery = {"timeout": 0.2, "connections": 4} | MODES[mode]
        async with World(tmp_path, {"A1": stuck, "A2": good}, delivery=delivery, health={"fall": 1}) as w:
            w.push(100)
            await w.until_empty()
            assert not w.states.is_online(0)
            assert w.states.error(0) == "no reply within 0.2 s"
            assert w.delivered(1) == 100
            assert good.ledger.duplicates == 0

    run(scenario())


@pytest.mark.parametrize("mode", MODES)
def test_only_packets_at_fault_are_refused(tmp_path, mode):
    """An analyzer that refuses every request with one bad packet in it."""

    def judge(_number, transport, data):
        buffered[transport] = buffered.get(transport, b"") + data
        try:
            requests = requests_in(buffered[transport])
        except AssertionError:
            return  # there is more to come
        buffered[transport] = b""
        for request in requests:
            bad = b"bad" in request.body
            seen.append((request.ids, bad))
            transport.write(b"HTTP/1.1 422 Unprocessable\r\nContent-Length: 3\r\n\r\nbad" if bad else OK)

    buffered, seen = {}, []

    async def scenario():
        server = await ScriptServer(judge).start()
        async with World(tmp_path, {"A1": server}, delivery=MODES[mode]) as w:
            for number in range(200):
                w.push(1, b'"bad"' if number % 20 == 7 else b'"good"')
            await w.until_empty()
            assert w.counters.get("refused") == 10
            assert w.delivered(0) == 190
            assert {dead_letter for dead_letter, analyzer in w.settled if analyzer is None} == {
                n + 1 for n in range(7, 200, 20)
            }
        taken = [name for ids, bad in seen if not bad for name in ids]
        assert len(set(taken)) == len(taken) == 190

    run(scenario())


# ---- offline and back


def test_nothing_is_lost_while_all_are_away(tmp_path):
    async def scenario():
        mocks = {name: start_mock(name, refuse=True) for name in ("A1", "A2")}
        async with World(tmp_path, mocks, retry={"base": 0.01, "cap": 0.05}, health={"fall": 2}) as w:
            w.push(300)
            await until(lambda: not w.states.is_online(0) and not w.states.is_online(1))
            await until(lambda: w.ring.claimed == 0)
            assert w.ring.undone == 300
            mocks["A2"].configure({"refuse": False})
            await until(lambda: not w.dispatcher.pools[1].opening)  # or a late refusal takes it offline again
            w.states.go_online(1)
            await w.until_empty()
            assert w.delivered(1) == 300
            check_ledger(w, *mocks.values(), duplicates=False)

    run(scenario())


def test_flapping_analyzer_loses_nothing(tmp_path):
    async def scenario():
        mocks = {name: start_mock(name) for name in ("A1", "A2", "A3")}
        async with World(tmp_path, mocks, delivery={"pipeline": 2}, health={"fall": 2}) as w:
            for _ in range(6):
                mocks["A1"].configure({"refuse": True})
                w.push(100)
                while w.states.is_online(0):  # what was on its kept connections may go elsewhere, which is no failure
                    w.push(1)
                    await asyncio.sleep(0.001)
                w.push(50)
                mocks["A1"].configure({"refuse": False})
                await until(lambda: not w.dispatcher.pools[0].opening)  # or a late refusal takes it offline again
                w.states.go_online(0)
                w.push(100)
                await w.until_empty()
            check_ledger(w, *mocks.values(), duplicates=True)
            assert w.delivered(0) > 150

    run(scenario())


def test_retry_after_pauses_and_ends_in_time(tmp_path):
    async def scenario():
        mocks = {"A1": start_mock("A1", status=429, retry_after=1), "A2": start_mock("A2")}
        async with World(tmp_path, mocks, delivery={"connections": 2}, health={"fall": 3}) as w:
            started = time.monotonic()
            w.push(60)
            await w.until_empty()
            assert w.states.is_online(0)
            assert mocks["A1"].ledger.requests <= 4  # one for each connection, and each once more at most
            mocks["A1"].configure({"status": None})
            while w.delivered(0) == 0:
                w.push(4)
                await w.until_empty()
                await asyncio.sleep(0.02)
            assert time.monotonic() - started > 0.95
            assert w.states.is_online(0)

    run(scenario())


# ---- load


@pytest.mark.parametrize(("connections", "pipeline"), [(1, 1), (3, 1), (2, 4), (8, 2)])
def test_in_flight_requests_stay_in_limit(tmp_path, connections, pipeline):
    async def scenario():
        mock = start_mock("A1", latency=0.01)
        most = 0
        async with World(tmp_path, {"A1": mock}, delivery={"connections": connections, "pipeline": pipeline}) as w:
            w.push(20 * connections * pipeline)
            while w.ring.undone:
                most = max(most, mock.waiting)
                assert len(mock.connections) <= connections
                assert w.dispatcher.pools[0].requests_in_flight <= connections * pipeline
                await asyncio.sleep(0.001)
            assert most <= connections * pipeline
            assert most > connections * pipeline // 2
            assert mock.ledger.acknowledged == w.pushed
            assert mock.ledger.duplicates == 0

    run(scenario())


def test_one_connection_delivers_in_order(tmp_path):
    async def scenario():
        bodies = []
        server = await ScriptServer(
            lambda _n, transport, data: (
                bodies.extend(request.body for request in requests_in(data)),
                transport.write(OK * len(requests_in(data))),
            )
        ).start()
        async with World(tmp_path, {"A1": server}, delivery={"connections": 1}) as w:
            for number in range(300):
                w.push(1, b"%d" % number)
                if number % 7 == 0:
                    await asyncio.sleep(0)
            await w.until_empty()
        assert bodies == [b"%d" % number for number in range(300)]

    run(scenario())


def test_slow_analyzer_does_not_delay_others(tmp_path):
    async def scenario():
        mocks = {"A1": start_mock("A1", latency=0.7), "A2": start_mock("A2"), "A3": start_mock("A3")}
        delivery = {"connections": 2, "spill_after": 2.0}
        async with World(tmp_path, mocks, delivery=delivery) as w:
            w.push(300)
            await until(lambda: w.delivered(1) + w.delivered(2) >= 190)
            assert w.counters.get("spilled") == 0
            await w.until_empty()  # in less than the 35 s that A1 would take for its hundred
            assert w.counters.get("spilled") > 50
            assert 2 <= w.delivered(0) < 50
            assert w.counters.get("retried") == 0
            check_ledger(w, *mocks.values(), duplicates=False)

    run(scenario())


def test_batch_lingers_no_longer_than_max(tmp_path):
    """One connection hangs, the other is free: what came while both were busy leaves when its time is over."""

    async def scenario():
        requests = []

        def answer_but_the_first(_number, transport, data):
            for request in requests_in(data):
                requests.append(request.ids)
                if len(requests) > 1:
                    asyncio.get_running_loop().call_later(0.02, transport.write, OK)

        server = await ScriptServer(answer_but_the_first).start()
        delivery = {"mode": "batch", "connections": 2, "linger": 0.1, "batch_packets": 2, "timeout": 50.0}
        async with World(tmp_path, {"A1": server}, delivery=delivery) as w:
            w.push(4)
            await until(lambda: len(requests) == 2)
            w.push(1)
            await until(lambda: w.ring.undone == 2)
            assert len(requests) == 3

    run(scenario())


def test_lingering_batch_is_not_polled(tmp_path):
    """uvloop takes a timer of less than half a millisecond for one of none."""

    async def scenario():
        server = await ScriptServer(lambda _number, _transport, _data: None).start()
        delivery = {"mode": "batch", "connections": 20, "linger": 0.0004, "batch_packets": 9, "timeout": 50.0}
        async with World(tmp_path, {"A1": server}, delivery=delivery) as w:
            delays = []
            later = w.dispatcher.loop.call_later

            class Loop:
                call_soon = staticmethod(w.dispatcher.loop.call_soon)

                @staticmethod
                def call_later(delay, callback):
                    delays.append(delay)
                    return later(delay, callback)

            w.push(1)
            await until(lambda: server.received, "one request is under way, without a reply")
            w.dispatcher.loop = Loop

            def looked_at_again():
                w.push(1)
                return len(delays) > 3

            await until(looked_at_again, "batches linger")
            assert all(delay >= 0.001 for delay in delays)

    run(scenario())


# ---- shares


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_shares_are_exact_over_20000_packets(tmp_path, mode):
    async def scenario():
        mocks = {name: start_mock(name) for name in WEIGHTS}
        async with World(tmp_path, mocks, WEIGHTS, delivery=MODES[mode] | {"spill_after": float("inf")}) as w:
            for _ in range(40):
                w.push(500)
                await w.until_empty()
            assert w.pushed == 20_000
            for slot, weight in enumerate(WEIGHTS.values()):
                assert abs(w.delivered(slot) / 20_000 - weight) < 0.001
            check_ledger(w, *mocks.values(), duplicates=False)

    run(scenario())
