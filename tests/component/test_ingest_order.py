"""Answers that wait, for a delivery or a sync: each at its moment, and all in the order of their requests."""

from __future__ import annotations

import time

import pytest
from ingest_harness import BODY, CONTINUE, Service, chunk, head, keyed, post

from fastdist.http.responses import problem

FAULT = problem(503, "the packet could not be written to disk", headers=b"Retry-After: 1\r\n")
STORAGE_FAULT = (FAULT.status, "Service Unavailable", FAULT.headers, FAULT.body)


@pytest.fixture(scope="module")
def service():
    return Service()


# ---- Prefer: wait


def waiting(service, *lines, value="wait=5", body=BODY):
    return service.ask(post(body, f"Prefer: {value}", *lines))


def test_delivered_within_the_time():
    service = Service()
    with service.timers() as loop:
        connection = waiting(service, "Idempotency-Key: k")
        loop.advance(4.9)
        assert connection.written == b""
        assert not connection.protocol.idle()
        service.deliver("A3")
        loop.advance(100)
    answer = connection.answer()
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == b'{"status":"delivered","packetId":"k","messages":2,"analyzer":"A3"}'
    assert connection.open
    assert connection.protocol.idle()
    assert not service.emitters.waiting
    assert service.accepted == 1


def test_not_delivered_within_the_time():
    service = Service()
    with service.timers() as loop:
        connection = waiting(service)
        loop.advance(5)
        answer = connection.answer()
        service.deliver()
    assert answer.status == 202
    assert answer.body == b'{"status":"accepted","packetId":"%b","messages":2}' % answer.id.encode()
    assert connection.statuses == [202]
    assert not service.emitters.waiting


def test_dead_letter_while_others_wait():
    service = Service()
    with service.timers() as loop:
        connection = waiting(service, "Idempotency-Key: k")
        service.deliver(None)
        loop.advance(100)
    answer = connection.answer()
    assert answer.status == 502
    assert answer.json["detail"] == "packet k could not be delivered and is now among the dead letters"
    assert service.rejected == {}
    assert connection.open


def test_unvalidated_has_no_messages():
    service = Service(validation="none")
    with service.timers() as loop:
        delivered, late = waiting(service, "Idempotency-Key: k"), waiting(service, "Idempotency-Key: l")
        service.emitters.settled(service.packets()[0].sequence, "A1")
        loop.advance(5)
    assert delivered.answer().body == b'{"status":"delivered","packetId":"k","analyzer":"A1"}'
    assert late.answer().body == b'{"status":"accepted","packetId":"l"}'


def test_waiting_no_time_at_all():
    service = Service()
    with service.timers() as loop:
        connection = waiting(service, value="wait=0")
        loop.advance(0)
        assert connection.statuses == [202]
    assert [packet.flags for packet in service.packets()] == [1]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["wait=7"], 7),
        (["WAIT=7"], 7),
        (["wait = 7"], 7),
        (['wait="7"'], 7),
        (["respond-async, wait=7"], 7),
        (["wait=7, respond-async"], 7),
        (["return=minimal;x=y , wait=7;strict ,foo"], 7),
        (['foo="a, wait=1", wait=7'], 7),
        (['foo="a\\", wait=1", wait=7'], 7),
        (["respond-async", "wait=7"], 7),
        (["wait=7", "return=minimal"], 7),
        (["wait=7, wait=1"], 7),
        (["wait=7", "wait=1"], 7),
        (["wait=x, wait=7"], 7),
        (["wait=007"], 7),
        (["wait=999999999999999999999999"], 86400),
    ],
)
def test_preferences_that_are_understood(values, seconds):
    service = Service()
    with service.timers() as loop:
        connection = service.ask(post(BODY, *(f"Prefer: {value}" for value in values)))
        loop.advance(seconds - 0.01)
        assert connection.written == b""
        loop.advance(0.02)
        assert connection.statuses == [202]


@pytest.mark.parametrize(
    "value",
    [
        "",
        ",",
        "wait",
        "wait=",
        "wait=x",
        "wait=-1",
        "wait=1.5",
        "wait=1s",
        'wait=""',
        'wait="1',
        "wait=0x1",
        "waits=1",
        "await=1",
        "foo; wait=1",
        'foo="wait=1"',
        'foo="',
        "respond-async",
        "=1",
        "wait:1",
        "wait==1",
    ],
)
def test_preferences_that_are_ignored(service, value):
    connection = service.ask(post(BODY, f"Prefer: {value}"))
    assert connection.answer().status == 202
    assert [packet.flags for packet in service.packets()] == [0]


def test_last_response_may_wait_as_well():
    service = Service()
    with service.timers() as loop:
        connection = waiting(service, "Connection: close")
        assert connection.open
        connection.send(keyed("never read"))
        loop.advance(5)
    answer = connection.answer()
    assert (answer.status, answer.closes) == (202, True)
    assert connection.transport.closed
    assert service.accepted == 1


def test_waiting_http_1_0_gets_keep_alive():
    service = Service()
    with service.timers():
        data = post(BODY, "Connection: keep-alive", "Prefer: wait=5", first="POST /logs HTTP/1.0")
        connection = service.ask(data)
        service.deliver()
    assert connection.answer().headers["connection"] == "keep-alive"


def test_lost_emitter_waits_no_more():
    service = Service()
    with service.timers() as loop:
        connection, late = waiting(service), waiting(service)
        connection.lose()
        late.lose()
        service.emitters.settled(service.packets()[0].sequence, "A1")
        loop.advance(5)
    assert connection.written == late.written == b""
    assert not service.emitters.waiting
    assert not service.intake.connections


# ---- order


def test_responses_keep_order_of_requests():
    service = Service()
    with service.timers():
        connection = service.ask(
            keyed("a")
            + keyed("b", BODY, "Prefer: wait=5")
            + keyed("c")
            + keyed("d", BODY, "Prefer: wait=5")
            + head("GET /health")
            + post(b"{")
            + keyed("e")
        )
        assert [answer.id for answer in connection.answers()] == ["a"]
        packets = {packet.id: packet for packet in service.packets()}
        service.emitters.settled(packets["d"].sequence, "A4")
        assert [answer.id for answer in connection.answers()] == ["a"]
        service.emitters.settled(packets["b"].sequence, "A2")
    answers = connection.answers()
    assert [answer.status for answer in answers] == [202, 200, 202, 200, 200, 400, 202]
    assert [answer.json.get("packetId") for answer in answers] == ["a", "b", "c", "d", None, None, "e"]
    assert connection.protocol.responses is None
    assert len(connection.transport.writes) == 2


def test_the_last_words_wait_for_their_turn():
    """A fault, or Connection: close, closes the connection when what came before it is answered, not earlier."""
    service = Service()
    for last, status in (
        (b"broken\r\n\r\n", 400),
        (post(BODY, "Connection: close"), 202),
        (head("TRACE /x HTTP/3.0"), 505),
    ):
        with service.timers() as loop:
            connection = service.ask(post(BODY, "Prefer: wait=5") + last + keyed("never read"))
            assert connection.written == b""
            assert connection.open
            loop.advance(5)
        assert connection.statuses == [202, status]
        assert not connection.open
        assert "never read" not in [packet.id for packet in service.packets()]


def test_100_waits_for_its_turn():
    service = Service()
    expecting = head("POST /logs", "Expect: 100-continue", "Transfer-Encoding: chunked")
    with service.timers() as loop:
        connection = service.ask(post(BODY, "Prefer: wait=5") + expecting)
        assert connection.written == b""
        loop.advance(5)
    assert connection.written.endswith(CONTINUE)
    connection.send(chunk(BODY) + b"0\r\n\r\n")
    first, second = connection.answers()
    assert (first.interims, second.interims) == (0, 1)


# ---- durability fsync


def test_responses_wait_for_their_sync():
    service = Service(fsync=True)
    connection = service.ask(keyed("a"))
    middle = service.ring.tail_position
    assert service.syncs_wanted == 1
    connection.send(keyed("b") + keyed("c") + head("GET /health"))
    other = service.ask(keyed("d"))
    assert service.syncs_wanted == 3
    assert connection.written == other.written == b""
    assert service.packets() == []
    service.sync(middle)
    assert [answer.id for answer in connection.answers()] == ["a"]
    assert other.written == b""
    service.sync()
    assert connection.statuses == [202, 202, 202, 200]
    assert other.answer().id == "d"
    assert [packet.id for packet in service.packets()] == ["a", "b", "c", "d"]
    assert service.intake.held == 0


def test_other_responses_wait_for_no_sync():
    service = Service(fsync=True)
    connection = service.ask(head("GET /health") + post(b"{") + post(BODY, "Content-Type: a/b"))
    assert connection.statuses == [200, 400, 415]
    assert not service.syncs_wanted


def test_response_time_includes_the_sync():
    service = Service(fsync=True)
    with service.timers():
        service.ask(keyed("a") + keyed("b", BODY, "Prefer: wait=60"))
        asked = time.monotonic_ns()
        time.sleep(0.02)
        assert service.ingest.cumulative()[-1] == 0
        syncing = time.monotonic_ns()
        service.sync()
        assert service.ingest.cumulative()[-1] == 2
        assert service.ingest.sum_ns >= 2 * (syncing - asked)
        service.deliver()
        service.sync()
    assert service.ingest.cumulative()[-1] == 2


def test_failed_sync_counts_no_response_time():
    service = Service(fsync=True)
    with service.timers():
        connection = service.ask(keyed("a", BODY, "Prefer: wait=60"))
        service.sync()
        connection.send(keyed("b"))
        service.ring.withdraw_unsynced()
        service.intake.not_stored(service.ring.synced_position, *STORAGE_FAULT)
        connection.send(keyed("c"))
        service.sync()
        assert (service.accepted, service.ingest.cumulative()[-1]) == (2, 2)
        service.deliver()


@pytest.mark.parametrize("fsync", [False, True])
def test_response_time_excludes_slow_arrival(fsync):
    service, request = Service(fsync=fsync), keyed("a")
    connection = service.ask(request[:-10])
    time.sleep(0.02)
    resumed = time.monotonic_ns()
    connection.send(request[-10:])
    if fsync:
        service.sync()
    assert service.ingest.sum_ns <= time.monotonic_ns() - resumed
    assert service.ingest.cumulative()[-1] == 1


def test_failed_sync_sends_no_202():
    service = Service(fsync=True)
    connection, other = service.ask(keyed("a") + head("GET /health") + keyed("b")), service.ask(keyed("c"))
    service.ring.withdraw_unsynced()
    service.intake.not_stored(service.ring.synced_position, *STORAGE_FAULT)
    assert connection.statuses == [503, 200, 503]
    assert [answer.body for answer in connection.answers()[::2]] == [FAULT.body, FAULT.body]
    assert connection.answers()[0].headers["retry-after"] == "1"
    assert other.statuses == [503]
    assert service.accepted == 0
    connection.transport.writes.clear()
    connection.send(keyed("d"))
    service.sync()
    assert connection.answer().id == "d"
    assert service.accepted == 1
    assert [packet.id for packet in service.packets()] == ["d"]


def test_failed_sync_keeps_or_closes():
    service = Service(fsync=True)
    connections = [service.ask(post(BODY, "Connection: close")), service.ask(post(first="POST /logs HTTP/1.0"))]
    connections.append(service.ask(post(BODY, "Connection: keep-alive", first="POST /logs HTTP/1.0")))
    service.ring.withdraw_unsynced()
    service.intake.not_stored(service.ring.synced_position, *STORAGE_FAULT)
    assert [each.answer().status for each in connections] == [503, 503, 503]
    assert [each.answer().headers.get("connection") for each in connections] == ["close", "close", "keep-alive"]
    assert [each.open for each in connections] == [False, False, True]


def test_next_requests_close_is_its_own():
    service = Service(fsync=True)
    last = post(BODY, "Connection: close")
    connection = service.ask(keyed("a") + last[:-1])
    service.ring.withdraw_unsynced()
    service.intake.not_stored(service.ring.synced_position, *STORAGE_FAULT)
    assert connection.answer().status == 503
    assert "connection" not in connection.answer().headers
    connection.send(last[-1:])
    service.sync()
    assert connection.statuses == [503, 202]


def test_delivery_wait_waits_for_sync_first():
    service = Service(fsync=True)
    with service.timers() as loop:
        connection = waiting(service, "Idempotency-Key: k")
        assert service.syncs_wanted == 1
        loop.advance(5)  # the time is up, but nothing is safe yet
        assert connection.written == b""
        service.sync()
        assert connection.answer().status == 202
        other = waiting(service, "Idempotency-Key: l")
        service.sync()
        assert other.written == b""
        service.deliver()
        assert other.answer().status == 200
        loop.advance(5)
    assert connection.statuses == [202]
    assert service.intake.held == 0


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_delivery_wait_reports_failed_sync(late):
    """Before and after the time is up; what had been synced is not concerned."""
    service = Service(fsync=True)
    with service.timers() as loop:
        connection = service.ask(keyed("a", BODY, "Prefer: wait=60"))
        service.sync()
        connection.send(keyed("b", BODY, "Prefer: wait=5"), keyed("c"))
        if late:
            loop.advance(5)
        service.ring.withdraw_unsynced()
        service.intake.not_stored(service.ring.synced_position, *STORAGE_FAULT)
        loop.advance(10)
        service.sync()  # a later one succeeds, and has nothing to do with them
        assert connection.written == b""
        service.deliver()
        assert connection.statuses == [200, 503, 503]
        loop.advance(100)
    assert connection.written.count(b"HTTP/1.1") == 3
    assert connection.protocol.responses is None


class Eager(Service):
    """Syncs at once, from within the read."""

    def _sync_wanted(self):
        super()._sync_wanted()
        self.sync()


def test_sync_at_once_is_as_good_as_late():
    service = Eager(fsync=True)
    with service.timers():
        connection = service.ask(
            head("GET /health") + keyed("a") + post(b"{") + keyed("b", BODY, "Prefer: wait=5") + keyed("c") + keyed("d")
        )
        assert connection.statuses == [200, 202, 400]
        service.deliver()
        connection.send(keyed("e", BODY, "Connection: close"))
    assert connection.statuses == [200, 202, 400, 200, 202, 202, 202]
    assert connection.transport.closed
    assert service.syncs_wanted == 2


# ---- back-pressure


def test_waiting_responses_pause_reading():
    service = Service(fsync=True, capacity=2**22)
    connection = service.connect()
    sent = 0
    while connection.transport.reading:
        connection.send(keyed(f"k{sent}"))
        sent += 1
        assert sent <= 1000
    assert sent == 513
    connection.send(keyed("late"))
    assert service.ring.undone == 513
    service.sync()
    assert connection.transport.reading
    connection.pump()
    service.sync()
    assert [answer.id for answer in connection.answers()] == [*(f"k{number}" for number in range(513)), "late"]


def test_responses_of_one_read_wait_together():
    service = Service(fsync=True, capacity=2**22)
    connection = service.ask(b"".join(keyed(f"k{number}") for number in range(1000)))
    assert service.ring.undone == 1000
    assert connection.written == b""
    service.sync()
    assert [answer.id for answer in connection.answers()] == [f"k{number}" for number in range(1000)]


def test_long_response_waits_for_prior_read():
    """A read holds thousands of requests for it: all at once they were a gigabyte."""
    service = Service()
    connection = service.connect()
    write = connection.transport.write

    def clog(data):
        write(data)
        connection.protocol.pause_writing()

    connection.transport.write = clog
    connection.send(head("GET /openapi.json") * 100 + keyed("last"), keyed("behind"))
    for made in range(1, 102):
        assert not connection.transport.reading
        assert len(connection.transport.writes) == made
        assert len(connection.transport.writes[-1]) < 2**18
        connection.protocol.resume_writing()
        connection.pump()
    connection.protocol.resume_writing()
    connection.pump()
    assert connection.statuses == [200] * 100 + [202, 202]
    assert connection.transport.reading
    assert [packet.id for packet in service.packets()] == ["last", "behind"]


def test_long_responses_wait_behind_waiting():
    service = Service()
    with service.timers():
        connection = waiting(service).send(head("GET /openapi.json") * 100 + keyed("last"))
        assert len(connection.protocol.responses) < 10
        assert not connection.transport.reading
        assert service.ring.undone == 1
        service.deliver()
        connection.pump()
    assert connection.statuses == [200] * 101 + [202]
    assert connection.transport.reading


@pytest.mark.parametrize("how", ["lost", "ended", "timed out"])
def test_held_input_goes_with_its_connection(how):
    service = Service()
    service.budget(0, 1)
    connection = service.connect()
    connection.protocol.data_received(head("HEAD /metrics") * 100 + keyed("never"))
    if how == "lost":
        connection.lose()
    elif how == "ended":
        connection.end()
    else:
        connection.protocol.time_out("too slow")
    while service.turns:
        service.turn()
    assert service.ring.undone == 0


def test_emitter_not_reading_is_not_read():
    service = Service()
    connection = service.ask(keyed("a"))
    connection.protocol.pause_writing()
    assert not connection.transport.reading
    connection.send(keyed("b"))
    assert connection.statuses == [202]
    connection.protocol.resume_writing()
    assert connection.transport.reading
    connection.pump()
    assert connection.statuses == [202, 202]


def test_reading_resumes_after_both_pauses():
    service = Service(fsync=True, capacity=2**22)
    connection = service.ask(b"".join(keyed(f"k{number}") for number in range(600)))
    connection.protocol.pause_writing()
    service.sync()
    assert not connection.transport.reading
    connection.protocol.resume_writing()
    connection.pump()
    assert connection.transport.reading
