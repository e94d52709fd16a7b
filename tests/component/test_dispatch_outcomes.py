"""What becomes of packets whose delivery fails, and of analyzers that fail: on a loop and a clock of the test's own."""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter

import pytest
import upstream_harness
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_harness import Bench, reply

from fastdist._core import PacketRing, Rendezvous, file_size
from fastdist.shm.block import AnalyzerWord
from fastdist.shm.weights import effective_weights
from fastdist.worker import dispatch, outcomes
from fastdist.worker.outcomes import MAX_PAUSE, MIN_PAUSE, pause_of


def where(bench, packet_id):
    """Return the slots a packet was sent to, by attempt."""
    sent = {
        int(request.headers["X-Attempt"]): slot
        for slot in bench.analyzers
        for request in bench.sent(slot)
        if packet_id in request.ids
    }
    return [sent[attempt] for attempt in sorted(sent)]


def fail(bench, slot, data=None):
    """Let all that is in flight at an analyzer fail."""
    return bench.answer_all(data or reply(500), [slot])


def share_of(bench, slot):
    weights = effective_weights(bench.states, bench.analyzers, bench.config.health, bench.clock.monotonic_ns())
    return weights.get(slot, 0.0)


def test_what_is_answered_2xx_is_delivered(tmp_path):
    with Bench(tmp_path) as bench:
        bench.push(*[b"x"] * 30)
        assert bench.answer_all() == 30
        assert bench.delivered == 30
        assert bench.ring.undone == bench.ring.claimed == 0
        assert bench.settled == []  # no emitter waits for them, and none had failed
        assert [bench.count_of(slot, "delivered") for slot in range(3)] == [
            len(bench.sent_ids(slot)) for slot in range(3)
        ]


OF_THE_ENDPOINT = (300, 301, 302, 303, 304, 307, 308, 401, 403, 404, 405, 407, 410, 421, 426, 451)
FAILURES = (408, 425, 429, 500, 502, 503, 504, 599, *OF_THE_ENDPOINT, "garbage", "reset", "closed", "late")


@pytest.mark.parametrize("how", FAILURES)
def test_failure_retries_elsewhere_at_once(tmp_path, how):
    with Bench(tmp_path, (1, 1, 1), delivery={"timeout": 5.0}) as bench:
        bench.push(b"x")
        (first,) = where(bench, "p1")
        (connection,) = bench.busy(first)
        if how == "late":
            bench.pass_time(5.2)
        elif how == "reset":
            bench.lose(connection, ConnectionResetError(104, "reset"))
        elif how == "closed":
            bench.lose(connection)
        else:
            bench.answer(connection, b"\0" if how == "garbage" else reply(how))
        tried = where(bench, "p1")
        assert len(set(tried)) == len(tried) == 2
        assert bench.states.get(first, AnalyzerWord.DELIVERY_FAILURES) == 1
        assert f"HTTP {how}" in bench.states.error(first) if isinstance(how, int) else bench.states.error(first)
        assert bench.states.is_online(first)
        assert (bench.count("retried"), bench.count_of(first, "retries"), bench.count_of(first, "failed")) == (1, 1, 1)
        bench.answer_all()
        assert bench.settled == [(1, f"A{tried[1] + 1}")]
        assert bench.dispatcher.retrying == {}
        assert bench.delivered == 1


def test_packet_failed_everywhere_backs_off(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(outcomes.random, "uniform", lambda low, high: drawn.append((low, high)) or high)
    with Bench(tmp_path, (1, 2, 3, 4), retry={"base": 3.0, "cap": 30.0}, health={"fall": 10_000}) as bench:
        bench.push(b"x")
        attempts = 0
        for wanted in (3, 6, 12, 24, 30, 30):
            for _ in range(4):
                attempts += 1
                assert bench.answer_all(reply(500)) == 1
            assert sorted(where(bench, "p1")[-4:]) == [0, 1, 2, 3]  # a round: each once
            assert len(where(bench, "p1")) == attempts
            assert drawn[-1] == (0, pytest.approx(wanted))
            assert len(bench.dispatcher.backing_off) == 1
            bench.pass_time(wanted - 2)
            assert len(where(bench, "p1")) == attempts
            bench.pass_time(2.1)
            assert len(where(bench, "p1")) == attempts + 1
        bench.answer_all()
        assert bench.delivered == 1
        assert len(drawn) == 6
        assert bench.count("retried") == 24


def test_back_off_has_full_jitter(tmp_path, monkeypatch):
    with Bench(tmp_path, (1,), retry={"base": 8.0, "cap": 8.0}, health={"fall": 10_000}, capacity=1 << 22) as bench:
        bench.push(*[b"x"] * 2000, run=False)
        bench.loop.run()
        now = bench.clock.monotonic_ns()
        monkeypatch.setattr(outcomes.time, "monotonic_ns", lambda: now)
        while bench.busy(0):
            fail(bench, 0)
        delays = [(due - now) / 1e9 for due, _ in bench.dispatcher.backing_off]
        assert len(delays) == 2000
        assert 0 <= min(delays) < 0.5
        assert 7 < max(delays) <= 8
        quarters = Counter(int(max(delay, 0) // 2) for delay in delays)
        assert all(350 < quarters[quarter] < 650 for quarter in range(4))


def test_a_back_off_without_end_stays_finite(tmp_path):
    with Bench(tmp_path, (1,), retry={"base": 0.1, "cap": 30.0}, health={"fall": 10_000}) as bench:
        bench.push(b"x")
        for _ in range(1200):  # 2.0 ** 1200 is no float
            fail(bench, 0)
            bench.pass_time(31)
        assert bench.count_of(0, "failed") == 1200
        assert len(bench.sent_ids(0)) == 1201


def test_the_alternative_is_picked_by_weight(tmp_path):
    with Bench(tmp_path, (0.1, 3, 1), health={"fall": 10_000}, capacity=1 << 22) as bench:
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"x"] * 1000)
        while bench.busy(0):
            fail(bench, 0)
        second = Counter(bench.pool(slot).waiting + bench.pool(slot).packets_in_flight for slot in (1, 2))
        one, two = (bench.pool(slot).waiting + bench.pool(slot).packets_in_flight for slot in (1, 2))
        assert one + two == 1000, second
        assert 690 < one < 810


def test_failed_packet_precedes_waiting_ones(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 1}) as bench:
        bench.push(*[b"x"] * 10)
        victim = bench.sent_ids(0)[0]
        fail(bench, 0)
        bench.answer_all(slots=[1])
        assert bench.sent_ids(1)[1] == victim


def test_failed_batch_spreads_over_others(tmp_path):
    with Bench(tmp_path, (1, 1, 1), delivery={"mode": "batch", "connections": 1}, health={"fall": 2}) as bench:
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"%d" % number for number in range(1, 41)])
        fail(bench, 0)
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 1  # a batch is one failure
        assert bench.count_of(0, "failed") == bench.count("retried") == 40
        while bench.answer_all(slots=[1, 2]):
            pass
        assert bench.delivered == 40
        assert bench.count_of(1, "delivered") > 5 < bench.count_of(2, "delivered")
        for slot in (1, 2):  # in the order they came
            numbers = [int(name[1:]) for name in bench.sent_ids(slot)]
            assert numbers == sorted(numbers)


def test_sticky_packets_fail_over_together(tmp_path):
    with Bench(tmp_path, (1, 1, 1, 1), distribution={"strategy": "sticky"}, health={"fall": 100}) as bench:
        for emitter in range(1, 41):
            bench.push(b"x", emitter=emitter * 7919)
        first = {f"p{emitter}": where(bench, f"p{emitter}")[0] for emitter in range(1, 41)}
        for slot in range(4):
            for connection in bench.busy(slot):
                connection.data_received(reply(500))
        bench.loop.run()
        bench.check()
        for emitter in range(1, 41):
            others = [slot for slot in range(4) if slot != first[f"p{emitter}"]]
            own_order = Rendezvous([f"A{slot + 1}" for slot in others], others, [1.0] * 3)
            assert where(bench, f"p{emitter}")[1] == own_order.pick(emitter * 7919)


# ---- stale connections


def test_a_stale_connection_is_no_failure(tmp_path):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        bench.push(*[b"x"] * 40)
        bench.answer_all()
        bench.push(*[b"y"] * 8)
        stale = bench.busy(0)
        assert stale
        ids = [connection.transport.requests[-1].ids[0] for connection in stale]
        for connection in stale:
            bench.lose(connection, ConnectionResetError(104, "reset"))
        for name in ids:
            assert where(bench, name) == [0, 0]  # at once, and on the same
        assert bench.states.is_online(0)
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0
        assert bench.count_of(0, "failed") == 0
        assert bench.count("retried") == len(ids)
        bench.answer_all()
        assert bench.delivered == 48


@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "reset")])
def test_break_after_a_second_is_a_failure(tmp_path, error):
    """An idle connection is not closed that late: the analyzer had begun to work on the request."""
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        bench.push(*[b"x"] * 40)
        bench.answer_all()
        bench.push(*[b"y"] * 8)
        late = bench.busy(0)[0]
        assert late.replies, "it has been of use before"
        name = late.transport.requests[-1].ids[0]
        time.sleep(1.05)
        bench.lose(late, error)
        assert where(bench, name) == [0, 1], "another gets it"
        assert bench.count_of(0, "failed") == 1
        assert not bench.states.is_online(0)
        bench.answer_all()
        assert bench.delivered == 48


def test_requests_behind_failed_do_not_count(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"pipeline": 8, "connections": 1}, health={"fall": 3}) as bench:
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"x"] * 8)
        (connection,) = bench.busy(0)
        bench.answer(connection, b"\0")
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == bench.count_of(0, "failed") == 1
        assert where(bench, "p1") == [0, 1]
        assert [where(bench, f"p{number}") for number in range(2, 9)] == [[0, 0]] * 7
        assert bench.sent_ids(0)[8:] == [f"p{number}" for number in range(2, 9)]


def test_unsent_to_a_removed_one_picks_again(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"pipeline": 4, "connections": 1}) as bench:
        bench.dispatcher.set_table(dispatch.AliasTable([0], [1.0]), None)
        bench.push(*[b"x"] * 4)
        (connection,) = bench.busy(0)
        bench.go_offline(0)
        bench.answer(connection, b"\0")
        assert [where(bench, f"p{number}") for number in range(1, 5)] == [[0, 1]] * 4


# ---- Retry-After


def pause(bench, slot, value, status=503):
    for connection in bench.busy(slot)[:1]:
        bench.answer(connection, reply(status, f"Retry-After: {value}"))


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_pauses_but_stays_online(tmp_path, status, form):
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        bench.push(*[b"x"] * 10)
        in_time = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=20)
        value = "20" if form == "seconds" else in_time.strftime("%a, %d %b %Y %H:%M:%S GMT")
        victim = bench.busy(0)[0].transport.requests[0].ids[0]
        pause(bench, 0, value, status)
        assert bench.states.is_online(0)
        assert bench.states.get(0, AnalyzerWord.DELIVERY_FAILURES) == 0
        assert share_of(bench, 0) == 0
        assert share_of(bench, 1) == 1
        assert bench.states.error(0) == f"HTTP {status}, Retry-After: {value}"
        assert where(bench, victim) == [0, 1]
        bench.answer_all()
        before = len(bench.sent_ids(0))
        bench.push(*[b"y"] * 20)
        assert len(bench.sent_ids(0)) == before  # all go elsewhere
        bench.answer_all()
        bench.pass_time(18)
        bench.push(*[b"y"] * 4)
        assert len(bench.sent_ids(0)) == before
        bench.answer_all()
        bench.pass_time(3)
        assert share_of(bench, 0) == 1
        bench.push(*[b"z"] * 4)
        assert before < len(bench.sent_ids(0)) < before + 4
        assert bench.pool(0).paused is False


def test_packets_of_paused_one_go_elsewhere(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 1}) as bench:
        bench.push(*[b"x"] * 20)
        assert bench.pool(0).waiting >= 8
        pause(bench, 0, 5)
        assert bench.pool(0).waiting == 0
        while bench.answer_all():
            pass
        assert bench.delivered == 20
        assert len(bench.sent_ids(0)) == 1


def test_packets_wait_when_all_are_paused(tmp_path):
    with Bench(tmp_path, (1, 1), retry={"base": 0.1, "cap": 0.1}) as bench:
        bench.push(b"x")
        for _ in range(2):
            for slot in range(2):
                pause(bench, slot, 5)
        bench.push(*[b"y"] * 10)
        bench.pass_time(1)
        assert len(bench.sent(0)) + len(bench.sent(1)) == 2
        assert bench.ring.claimed == 0
        bench.pass_time(4.5)
        assert len(bench.busy(0)) + len(bench.busy(1)) == 11
        bench.answer_all()
        assert bench.delivered == 11


def test_sticky_packets_wait_for_paused_one(tmp_path):
    with Bench(tmp_path, (1, 1), distribution={"strategy": "sticky"}) as bench:
        bench.push(b"x", emitter=1)
        ((slot,),) = [where(bench, "p1")]
        pause(bench, slot, 5)
        assert where(bench, "p1") == [slot, 1 - slot]  # it had its chance
        bench.answer_all()
        bench.push(b"y", emitter=1)
        assert where(bench, "p2") == []
        assert bench.pool(slot).waiting == 1
        bench.pass_time(2)
        assert where(bench, "p2") == []
        bench.pass_time(4)
        assert where(bench, "p2") == [slot]
        bench.answer_all()


def answer_503(bench, value):
    """Let a packet be answered 503 with this Retry-After; return the analyzer's slot."""
    bench.push(b"x")
    ((slot,),) = [where(bench, "p1")]
    (connection,) = bench.busy(slot)
    bench.answer(
        connection, b"HTTP/1.1 503 No\r\nRetry-After: %b\r\nContent-Length: 0\r\n\r\n" % value.encode("latin-1")
    )
    assert where(bench, "p1") == [slot, 1 - slot]
    return slot


@pytest.mark.parametrize("value", ["0", "00", "Thu, 01 Jan 1970 00:00:00 GMT", "a second ago"])
def test_retry_after_0_pauses_for_a_second(tmp_path, value):
    if value == "a second ago":
        value = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    with Bench(tmp_path, (1, 1), health={"fall": 1}) as bench:
        slot = answer_503(bench, value)
        assert bench.states.is_online(slot)
        assert bench.states.get(slot, AnalyzerWord.DELIVERY_FAILURES) == 0
        assert bench.states.error(slot) == f"HTTP 503, Retry-After: {value}"
        assert share_of(bench, slot) == 0
        bench.pass_time(1.1)
        assert share_of(bench, slot) == 1
        bench.answer_all()


@pytest.mark.parametrize("value", ["", "soon", "\xb2", "-3", "1.5"])
def test_invalid_retry_after_is_a_failure(tmp_path, value):
    with Bench(tmp_path, (1, 1), health={"fall": 3}) as bench:
        slot = answer_503(bench, value)
        assert bench.states.get(slot, AnalyzerWord.DELIVERY_FAILURES) == 1
        assert bench.states.error(slot) == "HTTP 503"
        assert share_of(bench, slot) == 1


NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 1),
        ("1", 1),
        ("0120", 120),
        ("3600", 3600),
        ("3601", MAX_PAUSE),
        ("9" * 400, MAX_PAUSE),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30),
        ("Tuesday, 14-Nov-23 22:13:50 GMT", 30),
        ("Tue Nov 14 22:13:50 2023", 30),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 1),
        ("Tue, 14 Nov 2023 22:13:19 GMT", 1),
        ("Tue, 14 Nov 2023 23:14:20 +0100", 60),
        ("Wed, 15 Nov 2023 22:13:20 GMT", MAX_PAUSE),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_PAUSE),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 1),
        ("", None),
        (" ", None),
        ("soon", None),
        ("-1", None),
        ("+1", None),
        ("1.5", None),
        ("1 2", None),
        ("1e3", None),
        ("\xb2", None),
        ("\xb9\xb2", None),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
        ("Tue, 14 Nov 99999999999999999999 22:13:50 GMT", None),
        ("Tue, 14 Nov 2023 22:13:50 +99999999", None),
        (",,,", None),
        (":", None),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_retry_after_is_seconds_or_a_date(monkeypatch, value, seconds, zone):
    monkeypatch.setenv("TZ", zone)
    outcomes.time.tzset()
    monkeypatch.setattr(outcomes.time, "time", lambda: NOW)
    try:
        assert pause_of(value) == (None if seconds is None else pytest.approx(seconds))
    finally:
        monkeypatch.undo()
        outcomes.time.tzset()


@given(
    st.one_of(st.text(st.characters(max_codepoint=255), max_size=60), st.text("0123456789:,- GMTMonJan+", max_size=40))
)
@settings(max_examples=5 * settings().max_examples)
def test_no_retry_after_is_too_odd(value):
    seconds = pause_of(value)
    assert seconds is None or MIN_PAUSE <= seconds <= MAX_PAUSE


# ---- what a killed worker leaves


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_what_is_delivered_is_marked_at_once(tmp_path, monkeypatch, mode):
    """In the file, at the end of the iteration: also where nothing more comes, and what waits is with the analyzers."""
    files = []

    def ring_in_a_file(capacity):
        files.append((tmp_path / "ring").open("w+b"))
        files[0].truncate(file_size(capacity))
        return PacketRing(files[0].fileno(), capacity)

    monkeypatch.setattr(upstream_harness, "memory_ring", ring_in_a_file)
    with Bench(tmp_path, delivery={"mode": mode, "linger": 0.0, "connections": 1, "batch_packets": 10}) as bench:
        bench.push(*[b"x"] * 100)
        left = 100
        while bench.answer_all():
            bench.rest()
            assert bench.ring.undone < left
            left = bench.ring.undone
            assert PacketRing(files[0].fileno(), private=True).undone == left
        assert left == 0
    files[0].close()
