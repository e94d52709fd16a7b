"""Bodies on their way: how slowly they may come, how much memory they have, and who goes when it is used up."""

from __future__ import annotations

import pytest
from ingest_harness import BODY, Service, chunk, head, keyed, post

KIB = 1024
LARGE = BODY[:-1] + b',"padding":"' + b"x" * (200 * KIB) + b'"}'
HALF = len(LARGE) // 2
ROOMY = 2**24


def begun(service, *, chunked=False, kept=HALF, stands=-1000):
    """A connection on which that much of a large body has come, and nothing for ``stands`` seconds.

    If there is nothing else to say it is yet to stop coming, however busy this machine is.
    """
    request = head("POST /logs", "Transfer-Encoding: chunked") + chunk(LARGE[:kept])
    connection = service.ask(request if chunked else post(LARGE)[: kept - len(LARGE)])
    connection.age(stands)
    return connection


def in_two_segments(service, body=BODY):
    return service.ask(post(body)[:-20], post(body)[-20:])


# ---- how slowly they may come


@pytest.mark.parametrize("how", ["length", "chunked", "refused already"])
@pytest.mark.parametrize("rate", [1, 100, 900])
def test_body_has_a_min_rate_all_the_time(how, rate):
    """Not only a byte now and then, and not only on the average: much at first is no credit for later."""
    service = Service(capacity=ROOMY)
    lines = {"length": ["Content-Length: 9000000"], "chunked": ["Transfer-Encoding: chunked"]}
    connection = service.ask(
        head("POST /logs", *lines.get(how, ["Content-Length: 9000000", "Content-Type: text/plain"])),
        chunk(bytes(100_000)),
    )
    seconds = 0
    while connection.open and seconds < 1000:
        seconds += 1
        connection.age(1)
        connection.send(chunk(bytes(rate)) if how == "chunked" else bytes(rate))
        connection.wait(0)
    assert 30 <= seconds < 400
    assert connection.statuses == [415 if how == "refused already" else 408]
    assert service.intake.bodies == 0


def test_steady_body_may_take_long():
    service = Service(capacity=ROOMY)
    connection = service.ask(head("POST /logs", "Content-Length: 2000000"))
    for _ in range(1000):
        connection.age(1)
        connection.send(bytes(1100))
        connection.wait(0)
    assert connection.open
    assert connection.written == b""


def test_pause_of_reading_is_not_body_time():
    connection = begun(Service(capacity=ROOMY), stands=0)
    connection.protocol.pause_writing()
    connection.age(40)
    connection.protocol.resume_writing()
    connection.wait(29)
    assert connection.open
    connection.wait(31)
    assert connection.statuses == [408]


# ---- how much memory they have


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_have_limited_memory(chunked):
    """While all of them move as they should, one that comes late is refused: else each would end another."""
    service = Service(capacity=ROOMY)
    service.intake.max_bodies = 10 * HALF + 5
    connections = [begun(service, chunked=chunked) for _ in range(10)]
    assert service.intake.bodies == 10 * HALF
    late = begun(service, chunked=chunked)
    answer = late.answer()
    assert (answer.status, answer.headers["retry-after"], answer.closes) == (503, "1", True)
    assert "memory" in answer.json["detail"]
    assert not late.open
    assert service.rejected == {"queue_full": 1}
    assert service.ask(post(LARGE)).answer().status == 202, "what comes at once takes none of it"
    connections.pop().lose()
    assert service.intake.bodies == 9 * HALF, "a connection that is gone still counts"
    service.intake.max_bodies = 2**22
    for connection in connections:
        connection.send(chunk(LARGE[HALF:]) + b"0\r\n\r\n" if chunked else LARGE[HALF:])
        assert connection.answer().status == 202
    assert service.intake.bodies == 0
    assert service.bodies() == [LARGE] * 10


def test_bodies_of_other_requests_count_too():
    service = Service(capacity=ROOMY)
    service.intake.max_bodies = 10
    connection = service.ask(head("PATCH /analyzers/A1", "Content-Length: 20"), b"x" * 12)
    assert connection.answer("PATCH").status == 503
    assert service.intake.bodies == 0
    assert service.rejected == {}


@pytest.mark.parametrize("end", ["time out", "broken", "too large", "eof"])
def test_ended_body_frees_its_memory(end):
    service = Service(capacity=ROOMY)
    connection = begun(service, chunked=True, stands=0)
    assert service.intake.bodies == HALF
    if end == "time out":
        connection.wait(100)
    elif end == "broken":
        connection.send(b"x")
    elif end == "too large":
        connection.send(chunk(bytes(service.config.server.max_body)))
    else:
        connection.end()
        connection.lose()
    assert service.intake.bodies == 0


def test_small_bodies_have_a_reserve():
    service = Service(capacity=ROOMY)
    service.intake.max_bodies = 8 * HALF
    large = [begun(service) for _ in range(8)]
    for _ in range(100):
        assert in_two_segments(service).answer().status == 202
    small = []
    while not small or small[-1].open:
        small.append(service.connect().send(post(bytes(40_000))[:-10_000]))
    assert small[-1].answer().status == 503, "which has its end too"
    assert HALF - 30_000 < service.intake.bodies - 8 * HALF <= HALF
    assert all(connection.open for connection in large)


# ---- who goes when it is used up


def test_slow_body_refuses_no_new_client():
    service = Service(capacity=ROOMY)
    service.intake.max_bodies = 10 * HALF
    connections = [begun(service) for _ in range(10)]
    connections[3].age(1005)
    late = begun(service)
    assert late.open
    answer = connections[3].answer()
    assert (answer.status, answer.closes) == (408, True)
    assert answer.json["detail"] == "the request's body came slowly, and others needed its memory"
    assert [connection.open for connection in connections].count(False) == 1
    assert service.intake.bodies == 10 * HALF
    assert service.rejected == {"timeout": 1}
    service.intake.max_bodies = 2**22
    assert late.send(LARGE[HALF:]).answer().status == 202


def test_largest_and_longest_goes_first():
    service = Service(capacity=ROOMY)
    little, less = begun(service, kept=10, stands=300), begun(service, kept=HALF // 4, stands=8)
    most, long = begun(service, kept=HALF * 3 // 2, stands=9), begun(service, stands=20)
    service.intake.max_bodies = service.intake.bodies
    begun(service)
    assert [each.open for each in (little, less, most, long)] == [True, True, True, False]
    begun(service)
    assert [each.open for each in (little, less, most, long)] == [True, True, False, False]


def test_dripping_body_keeps_no_other_out():
    """All the memory there is, a byte each now and then: for those who send in segments there was none."""
    service = Service(capacity=ROOMY, max_body=2**20)
    service.intake.max_bodies = 26 * 100_000
    lines = head("POST /logs", "Content-Length: 100001")
    dripping = [service.ask(lines, bytes(100_000 - 50)) for _ in range(26)]
    for second in range(40):
        for connection in dripping:
            if connection.open:
                connection.age(1)
                connection.send(b"x")
                connection.wait(0)
        assert in_two_segments(service).answer().status == 202
        if second:
            assert in_two_segments(service, LARGE).answer().status == 202
    assert {connection.answer().status for connection in dripping} == {408}
    assert service.intake.bodies == 0


def test_each_body_gets_its_own_response():
    service = Service(capacity=ROOMY)
    service.intake.max_bodies = 2 * HALF
    victim, other = begun(service, stands=5), begun(service)
    late = service.connect().send(keyed("first") + post(LARGE)[: HALF - len(LARGE)])
    service.intake.max_bodies = 2**22
    late.send(LARGE[HALF:])
    assert [answer.status for answer in victim.answers()] == [408]
    assert [answer.status for answer in late.answers()] == [202, 202]
    assert late.answers()[0].id == "first"
    assert other.written == b""
