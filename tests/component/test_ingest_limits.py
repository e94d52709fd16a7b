"""What is bounded: sizes, rates, tokens, room in the queue, connections, times, memory."""

from __future__ import annotations

import ctypes
import errno
import gc
import time

import psutil
import pytest
from ingest_harness import BODY, CONTINUE, SECOND, Service, chunk, head, keyed, post, post_chunked

from fastdist._core import RequestHead

MAX_BODY, MAX_HEADER = 1000, 1024
KIB = 1024


@pytest.fixture
def service():
    return Service(max_body=MAX_BODY, max_header=MAX_HEADER, validation="none")


def assert_refused(connection, status, detail, *, closes=True):
    answer = connection.answers()[-1]
    assert (answer.status, answer.json["detail"], answer.closes) == (status, detail, closes)
    assert connection.transport.half_closed == closes
    return answer


# ---- sizes


@pytest.mark.parametrize("excess", [1, 1000, 2**40])
def test_too_long_body_is_refused_before_it(service, excess):
    connection = service.ask(head("POST /logs", f"Content-Length: {MAX_BODY + excess}"))
    assert_refused(connection, 413, f"the body is {MAX_BODY + excess} bytes, more than the {MAX_BODY} allowed")
    assert service.rejected == {"too_large": 1}
    connection.protocol.data_received(keyed("never read"))
    assert not service.ring.undone


@pytest.mark.parametrize("line", ["Expect: 100-continue", "Expect: x", "Connection: close", "X: y"])
@pytest.mark.parametrize("other", ["Content-Type: text/plain", "Y: z"])
def test_a_body_too_long_is_never_waited_for(service, line, other):
    connection = service.ask(head("POST /logs", line, other, "Content-Length: 99999999999"), bytes(5000))
    answer = connection.answer()
    assert answer.status == (415 if "text" in other else 413)
    assert answer.closes
    assert connection.transport.half_closed
    assert sum(service.rejected.values()) == 1


def test_a_body_just_short_enough_is_read(service):
    connection = service.ask(post(bytes(MAX_BODY)), post_chunked(bytes(MAX_BODY)), post_chunked(*[b"x"] * MAX_BODY))
    assert connection.statuses == [202, 202, 202]
    assert service.bodies() == [bytes(MAX_BODY), bytes(MAX_BODY), b"x" * MAX_BODY]


SIZES = [MAX_BODY + 1, 2**31, 2**32 + 5, 2**60 - 1, 2**60, 2**63 - 1, 2**63, 2**64 + 5, 2**80]


@pytest.mark.parametrize("size", [*SIZES, *(16**n - 1 for n in range(3, 20))], ids=hex)
@pytest.mark.parametrize("zeros", [0, 1, 8])
def test_oversized_chunk_size_is_enough(service, size, zeros):
    """It is refused at the first digit that says so, in however many reads the digits come."""
    digits = b"0" * zeros + b"%x" % size
    whole = service.ask(head("POST /logs", "Transfer-Encoding: chunked") + digits)
    split = service.ask(head("POST /logs", "Transfer-Encoding: chunked"))
    for end in range(1, len(digits) + 1):
        split.send(digits[end - 1 : end])
        assert bool(split.written) == (int(digits[:end], 16) > MAX_BODY)
    for connection in (whole, split):
        assert_refused(connection, 413, f"the body is larger than the {MAX_BODY} bytes allowed")
    assert service.rejected == {"too_large": 2}


@pytest.mark.parametrize("size", [1, 7, 499, 500])
def test_sizes_of_all_chunks_count_together(service, size):
    fitting = [chunk(bytes(size))] * (MAX_BODY // size)
    rest = b"%x\r\n" % (MAX_BODY % size + 1)
    connection = service.ask(head("POST /logs", "Transfer-Encoding: chunked"), *fitting)
    assert connection.written == b""
    connection.send(*(rest[at : at + 1] for at in range(len(rest))))
    assert_refused(connection, 413, f"the body is larger than the {MAX_BODY} bytes allowed")
    assert service.rejected == {"too_large": 1}
    assert not service.ring.undone


@pytest.mark.parametrize("first", ["POST /logs", "GET /health", "PUT /nowhere"])
def test_a_head_may_have_just_so_many_bytes(service, first):
    data = head(first, "X: ")
    fitting = head(first, "X: " + "x" * (MAX_HEADER - len(data)))
    assert len(fitting) == MAX_HEADER
    connection = service.ask(fitting + fitting, head(first, "X: " + "x" * (MAX_HEADER - len(data) + 1)))
    *answers, last = connection.answers()
    assert len(answers) == 2
    assert not {answer.status for answer in answers} & {413, 431}
    assert last.status == 431
    assert_refused(connection, 431, f"the request's head is larger than the {MAX_HEADER} bytes allowed")
    assert service.rejected["head_too_large"] == 1


def test_large_heads_are_not_kept():
    service = Service()
    connection = service.ask(post(BODY, "X: " + "x" * 3000), post())
    assert connection.statuses == [202, 202]
    kept = [head.text for head in gc.get_objects() if isinstance(head, RequestHead)]
    assert kept
    assert max(map(len, kept)) < 3000


def test_endless_head_is_refused_at_limit(service):
    start = b"POST /logs HTTP/1.1\r\nX:"
    connection = service.ask(start, *[b"x"] * (MAX_HEADER - len(start)))
    assert connection.written == b""
    connection.send(b"x")
    assert_refused(connection, 431, f"the request's head is larger than the {MAX_HEADER} bytes allowed")


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("what", ["extension", "long trailer", "many trailers", "short trailers"])
def test_extensions_and_trailers_are_bounded(service, what, excess):
    room = MAX_HEADER + excess
    body = {
        "extension": b"1;" + b"x" * (room - 4) + b"\r\na\r\n0\r\n\r\n",
        "long trailer": b"1\r\na\r\n0\r\nA: " + b"x" * (room - 7) + b"\r\n\r\n",
        "many trailers": b"1\r\na\r\n0\r\n" + b"A: b\r\n" * (170 + excess) + b"\r\n",
        "short trailers": b"1\r\na\r\n0\r\n" + b"A:\r\n" * (255 + excess) + b"\r\n",
    }[what]
    connection = service.ask(head("POST /logs", "Transfer-Encoding: chunked") + body)
    if excess:
        assert_refused(connection, 431, "the trailers of the body are too large")
        assert service.rejected == {"head_too_large": 1}
        assert not service.ring.undone
    else:
        assert connection.statuses == [202]


@pytest.mark.parametrize("excess", [-2, -1, 0, 1])
def test_last_chunk_bound_ignores_splits(service, excess):
    start = head("POST /logs", "Transfer-Encoding: chunked") + b"1\r\na\r\n0;" + b"x" * (MAX_HEADER - 4 + excess)
    whole, in_two = service.ask(start + b"\r\n\r\n"), service.ask(start + b"\r\n", b"\r\n")
    assert whole.statuses == in_two.statuses == ([202] if excess <= 0 else [431])


def test_endless_trailers_come_to_an_end(service):
    connection = service.ask(post_chunked(BODY, end=b"0\r\n"))
    for _ in range(1000):
        connection.send(b"A:\r\n")
    assert_refused(connection, 431, "the trailers of the body are too large")


def test_packet_over_half_ring_is_too_large():
    service = Service(capacity=2**16, validation="none")
    half = service.ring.capacity // 2
    connection = service.ask(post(bytes(half)), keyed("next"))
    refused, after = connection.answers()
    assert refused.status == 413
    assert refused.json["detail"] == (
        f"a packet of {half} bytes is over half of what a worker's part of the queue holds "
        f"({service.ring.capacity} bytes)"
    )
    assert after.id == "next"
    assert service.rejected == {"too_large": 1}
    service.packets()
    assert service.ask(post(bytes(half - 200))).answer().status == 202


# ---- rates, tokens, and which of them comes first


def test_the_rate_of_all_emitters_together():
    service = Service(limits={"rate": 0.1, "burst": 2})
    assert service.ask(post() + post()).statuses == [202, 202]
    connection = service.connect("198.51.100.7").send(post() + head("GET /health") + post())
    answers = connection.answers()
    assert [answer.status for answer in answers] == [429, 200, 429]
    for answer in answers[::2]:
        assert answer.headers["retry-after"] == "10"
        assert answer.json["detail"] == "more requests than the limit allows; try again in 10 s"
        assert not answer.closes
    assert service.rejected == {"rate_limited": 2}
    assert len(service.packets()) == 2


def test_the_rate_of_each_client():
    service = Service(limits={"client_rate": 0.5, "client_burst": 1})
    first, second = service.connect("192.0.2.1"), service.connect("192.0.2.2")
    assert first.send(post(), post()).statuses == [202, 429]
    assert first.answers()[1].headers["retry-after"] == "2"
    assert second.send(post(), post()).statuses == [202, 429]
    assert service.connect("192.0.2.1").send(post()).statuses == [429]
    assert service.connect(None).send(post()).statuses == [202]  # a Unix socket has no address


def test_only_packets_count_for_the_rate():
    """Not what goes elsewhere, and not what cannot be read; but a packet that turns out to be none does."""
    service = Service(limits={"rate": 0.1, "burst": 2})
    service.ask(head("GET /health") * 5 + head("GET /logs") * 5 + head("POST /nowhere") * 5 + b"x\r\n\r\n")
    assert service.ask(post(b"{"), post(), post()).statuses == [400, 202, 429]


def authorized(value):
    return post(BODY, f"Authorization: {value}")


@pytest.mark.parametrize("value", ["Bearer secret", "bearer secret", "BEARER other", "Bearer  secret "])
def test_tokens_that_are_known(value):
    service = Service(security={"tokens": ("secret", "other")})
    assert service.ask(authorized(value)).answer().status == 202
    assert service.rejected == {}


@pytest.mark.parametrize(
    "value",
    [
        "Bearer wrong",
        "Bearer",
        "Bearer ",
        "Basic secret",
        "secret",
        "Bearer secre",
        "Bearer secrets",
        "Bearer Secret",
        "Bearersecret",
        "Bearer secret other",
        "Bearer secret,other",
        "",
        "Bearer éÿ",
        '"Bearer secret"',
        "Bearer\x80secret",
    ],
)
def test_tokens_that_are_not(value):
    service = Service(security={"tokens": ("secret", "other")})
    connection = service.ask(authorized(value), authorized("Bearer secret"))
    answer, after = connection.answers()
    assert (answer.status, after.status) == (401, 202)
    if value:
        assert answer.headers["www-authenticate"] == 'Bearer realm="fastdist", error="invalid_token"'
        assert answer.json["detail"] == "this token is not known"
        assert value not in answer.json["detail"]
    else:
        assert answer.headers["www-authenticate"] == 'Bearer realm="fastdist"'
    assert service.rejected == {"unauthorized": 1}


def test_two_tokens_are_malformed():
    """A proxy in front may have looked at the other."""
    service = Service(security={"tokens": ("secret",)})
    connection = service.ask(post(BODY, "Authorization: Bearer wrong", "authorization: Bearer secret"))
    answer = connection.answer()
    assert answer.status == 400
    assert answer.json["detail"] == "the request is not HTTP: more than one Authorization header"
    assert not connection.open
    assert service.bodies() == []


def test_a_token_is_asked_for():
    service = Service(security={"tokens": ("secret",)})
    answer = service.ask(post()).answer()
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="fastdist"'
    assert answer.json["detail"] == "a bearer token is needed"
    assert service.ask(head("GET /health") + head("GET /logs")).statuses == [200, 405]


def test_token_is_not_kept_for_next_request():
    service = Service(security={"tokens": ("secret",)})
    assert service.ask(authorized("Bearer secret") + post()).statuses == [202, 401]


@pytest.mark.parametrize("line", ["Expect: 100-continue", "Content-Length: 5"])
def test_without_a_token_no_body_is_invited(line):
    service = Service(security={"tokens": ("secret",)})
    lines = [line] if "Length" in line else [line, "Content-Length: 70"]
    connection = service.ask(head("POST /logs", *lines))
    answer = connection.answer()
    assert answer.status == 401
    assert answer.closes == ("Expect" in line)
    assert CONTINUE not in connection.written


def test_limits_are_checked_before_tokens():
    """Each request has all the faults that are left; each answer names the first."""
    service = Service(security={"tokens": ("secret",)}, limits={"rate": 0.001, "burst": 1}, max_body=100)
    good = [
        "Authorization: Bearer secret",
        "Content-Type: application/json",
        "Content-Encoding: identity",
        "Idempotency-Key: k",
    ]
    bad = ["Authorization: Bearer x", "Content-Type: text/plain", "Content-Encoding: br", "Idempotency-Key: a b"]
    service.intake.broken_storage = True

    def ask(faults, *lines):
        limiter = service.intake.limiter
        limiter.configure(0.001 if "rate" in faults else 0, 1, 0, 0)
        return service.ask(head("POST /logs", *lines, "Expect: x", "Content-Length: 500"))

    assert ask(["rate"], *bad).answer().status == 401
    assert ask(["rate"], *bad).answer().status == 429
    assert ask([], *bad).answer().status == 401
    assert ask([], good[0], *bad[1:]).answer().status == 503
    service.intake.broken_storage = False
    assert (
        ask([], good[0], *bad[1:]).answer().json["detail"] == "Content-Encoding must be gzip, deflate, zstd or snappy"
    )
    assert ask([], good[0], bad[1], good[2], bad[3]).answer().status == 415
    assert ask([], *good[:3], bad[3]).answer().status == 400
    assert ask([], *good).answer().status == 413
    assert not service.ring.undone


# ---- room and storage


def test_full_queue_is_refused_with_503():
    service = Service(capacity=2**16)
    connection = service.connect()
    accepted = 0
    while b" 202 " in connection.send(post()).transport.writes[-1]:
        accepted += 1
    answer = connection.answers()[-1]
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json["detail"] == "the queue is full; try again in 1 s"
    assert not answer.closes
    assert service.ring.room_lacking() > 0
    assert service.rejected == {"queue_full": 1}
    assert service.accepted == accepted == service.ring.undone > 100
    assert len(service.packets()) == accepted
    assert connection.send(post()).answers()[-1].status == 202


@pytest.mark.parametrize("fsync", [False, True])
def test_next_request_is_last_while_draining(fsync):
    service = Service(fsync=fsync)
    kept, midway, viewer = service.connect(), service.connect().send(post()[:-1]), service.connect()
    for connection in (kept, viewer):
        connection.send(head("GET /health"))
    service.intake.draining = True
    kept.send(post(), keyed("never read"))
    midway.send(post()[-1:])
    viewer.send(head("GET /health"), head("GET /stats"))
    service.sync()
    assert [(answer.status, answer.closes) for answer in kept.answers()] == [(200, False), (202, True)]
    assert [(answer.status, answer.closes) for answer in midway.answers()] == [(202, True)]
    assert [(answer.status, answer.closes) for answer in viewer.answers()] == [(200, False), (200, True)]
    for connection in (kept, midway, viewer):
        assert connection.transport.half_closed  # and read on, so that no reset destroys the response
    assert service.accepted == service.ring.undone == 2


def test_nothing_is_accepted_after_the_drain():
    service = Service()
    midway = service.connect().send(post()[:-1])
    service.intake.draining = service.intake.closed = True
    for answer in (service.ask(post(), keyed("never read")).answer(), midway.send(post()[-1:]).answer()):
        assert (answer.status, answer.closes) == (503, True)
        assert answer.headers["retry-after"] == "1"
        assert answer.json["detail"] == "the service is shutting down"
    assert service.rejected == {"draining": 2}
    assert service.ring.undone == 0


def test_storage_that_fails():
    service = Service()
    midway = service.connect().send(post()[:-1])
    service.intake.broken_storage = errno.ENOSPC
    for answer in (service.ask(post()).answer(), midway.send(post()[-1:]).answer()):
        assert (answer.status, answer.closes) == (503, False)
        assert answer.headers["retry-after"] == "1"
        assert (
            answer.json["detail"]
            == "the queue's storage fails (No space left on device); nothing can be stored safely now"
        )
    assert service.rejected == {"storage": 2}
    service.intake.broken_storage = False
    assert midway.send(post()).statuses == [503, 202]


# ---- connections


def test_too_many_connections():
    service = Service(max_connections=2)
    first, second, third = (service.connect() for _ in range(3))
    assert first.written == second.written == b""
    answer = assert_refused(third, 503, "too many connections; try again shortly")
    assert answer.headers["retry-after"] == "1"
    third.protocol.data_received(keyed("never read"))
    third.end()
    assert third.transport.closed
    third.lose()
    assert service.counters.get("emitters") == 2
    first.lose()
    assert service.counters.get("emitters") == 1
    assert service.connect().send(post()).statuses == [202]
    assert second.send(post()).statuses == [202]


def test_rejected_client_takes_no_slot():
    """Nor more than so many descriptors, while it reads why."""
    service = Service(max_connections=1)
    inside = service.connect()
    outside = [service.connect() for _ in range(300)]
    assert {connection.answer().status for connection in outside} == {503}
    assert [connection.transport.half_closed for connection in outside] == [True] * 256 + [False] * 44
    assert [connection.transport.closed for connection in outside] == [False] * 256 + [True] * 44
    assert service.counters.get("emitters") == 1
    inside.lose()
    assert service.connect().send(post()).statuses == [202]
    for connection in outside:
        connection.wait(5.1)
        assert connection.transport.closed
        connection.lose()
    assert service.counters.get("emitters") == 1
    assert not service.emitters.rejected


# ---- times


def test_a_head_that_takes_too_long(service):
    connection = service.connect().send(head("POST /logs")[:-2])
    connection.wait(9)
    assert connection.open
    connection.send(b"X: y")  # progress does not help
    connection.wait(10.1)
    assert_refused(connection, 408, "the request's head did not arrive in time")
    assert service.rejected == {"timeout": 1}


def test_a_body_that_makes_no_progress(service):
    for data in (post()[:-1], post_chunked(BODY)[:-1], head("POST /logs", "Content-Length: 1")):
        connection = service.connect().send(data)
        connection.wait(29)
        assert connection.open
        connection.wait(30.1)
        assert_refused(connection, 408, "the request's body came too slowly")
    assert service.rejected == {"timeout": 3}
    assert not service.ring.undone


def test_answered_body_gets_no_408(service):
    connection = service.connect().send(post(BODY, "Content-Type: text/plain")[:-1])
    connection.wait(30.1)
    assert connection.statuses == [415]
    assert connection.transport.half_closed
    assert service.rejected == {"unsupported_media_type": 1}


@pytest.mark.parametrize("sent", [b"", b"\r\n", head("GET /health"), post()])
def test_idle_connection_closes_silently(service, sent):
    connection = service.connect().send(sent)
    written = connection.written
    connection.wait(74)
    assert connection.open
    connection.wait(75.1)
    assert connection.transport.closed
    assert not connection.transport.aborted
    assert connection.written == written
    assert service.rejected == {}


@pytest.mark.parametrize("sent", [b"", post()[:9], post()[:-1], post()])
def test_time_without_reading_does_not_count(service, sent):
    connection = service.connect().send(sent)
    connection.protocol.excuse(time.monotonic_ns() + 100 * SECOND, 100 * SECOND)
    written = connection.written
    connection.wait(109)
    assert (connection.open, connection.written) == (True, written)
    connection.wait(176)
    assert not connection.open


def test_an_answer_under_way_is_no_idleness():
    service = Service(fsync=True)
    connection = service.ask(post())
    connection.wait(250)
    assert connection.open
    resumed = pause()
    service.sync()
    assert connection.statuses == [202]
    assert connection.protocol.expired(resumed + 75 * SECOND) == "", "idle only since then"
    connection.wait(76)
    assert not connection.open


def test_emitter_not_reading_is_cut_off(service):
    connection = service.ask(post())
    connection.protocol.pause_writing()
    connection.wait(29)
    assert connection.open
    connection.wait(30.1)
    assert connection.transport.aborted


def test_one_that_reads_again_is_not(service):
    connection = service.ask(post())
    connection.protocol.pause_writing()
    connection.protocol.resume_writing()
    connection.wait(30.1)
    assert connection.open


def test_last_response_has_time_to_be_read(service):
    """A connection is closed while the emitter sends: the kernel would reset it, and the answer might be lost."""
    connection = service.ask(head("POST /logs", "Content-Length: 99999"), bytes(500))
    assert connection.transport.half_closed
    connection.wait(4)
    assert not connection.transport.closed
    connection.wait(5.1)
    assert connection.transport.aborted
    assert connection.statuses == [413]


def pause():
    """Let a little real time pass; return the time after it. What happens from then on is judged by that clock."""
    time.sleep(0.2)
    return time.monotonic_ns()


def test_a_408_is_given_time_as_well(service):
    """Counted from the answer, not from the last that was read."""
    connection = service.connect().send(post()[:-1])
    answered = pause()
    connection.protocol.check(answered + 31 * SECOND)
    assert connection.statuses == [408]
    connection.protocol.check(answered + 49 * SECOND // 10)
    assert not connection.transport.closed
    connection.wait(5.1)
    assert connection.transport.aborted


def test_long_last_response_is_read_slowly(service):
    connection = service.ask(head("GET /metrics", "Connection: close"))
    connection.protocol.pause_writing()
    connection.wait(29)
    assert not connection.transport.aborted
    resumed = pause()
    connection.protocol.resume_writing()
    connection.protocol.check(resumed + 49 * SECOND // 10)
    assert not connection.transport.aborted
    connection.wait(5.1)
    assert connection.transport.aborted


def test_emitters_end_after_ours_closes(service):
    connection = service.ask(b"broken\r\n\r\n")
    assert connection.transport.half_closed
    connection.end()
    assert connection.transport.closed
    assert not connection.transport.aborted


# ---- half-closed connections


@pytest.mark.parametrize("sent", [b"", b"POST /lo", post()[:-1], post_chunked(BODY)[:-1], b"\r\n"])
def test_end_inside_request_has_no_response(service, sent):
    connection = service.connect().send(sent)
    connection.end()
    assert connection.transport.closed
    assert connection.written == b""
    assert not service.ring.undone
    assert service.rejected == {}


def test_pending_responses_leave_after_end():
    service = Service()
    with service.timers() as loop:
        connection = service.ask(keyed("a", BODY, "Prefer: wait=5") + keyed("b") + keyed("c")[:-1])
        connection.end()
        assert connection.open
        loop.advance(5)
    assert [answer.id for answer in connection.answers()] == ["a", "b"]
    assert connection.transport.closed
    assert not connection.transport.half_closed
    assert [packet.id for packet in service.packets()] == ["a", "b"]


def test_sync_may_come_after_end_or_never():
    service = Service(fsync=True)
    connection, gone = service.ask(post()), service.ask(post())
    connection.end()
    gone.end()
    gone.lose()
    service.sync()
    assert connection.statuses == [202]
    assert connection.transport.closed
    assert gone.written == b""


# ---- memory


def resident():
    """Return the bytes of memory in use: what malloc only keeps for later is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def test_10_000_connections_leave_nothing():
    service = Service(fsync=True)
    sent = (
        [post()],
        [post(bytes(8000))[:-3]],
        [post_chunked(bytes(8000))[:-3]],
        [b"POST /logs HTTP/1.1\r\nX:" + b"x" * 8000],
        [head("GET /health"), b"x\r\n\r\n"],
        [head("POST /logs", "Expect: 100-continue", "Content-Length: 99999999")],
        [post(BODY, "Prefer: wait=9")],
        [b"\r"],
    )

    def many(count):
        with service.timers() as loop:
            for number in range(count):
                connection = service.ask(*sent[number % len(sent)])
                if number % 3 == 0:
                    service.sync()
                connection.lose()
                if number % 100 == 0:
                    service.sync()
                    service.packets()
                    loop.advance(10)

    many(2000)
    before = resident()
    many(10_000)
    assert resident() - before < 2 * KIB**2  # 200 bytes a connection
    assert not service.intake.connections
    assert service.intake.held <= 100


@pytest.mark.parametrize("how", ["whole", "chunked", "cut short", "refused", "lost"])
def test_large_body_is_freed_when_not_needed(how):
    service = Service(max_body=2**26, capacity=2**16)
    body = bytes(2**25)
    data = {"chunked": post_chunked(body)}.get(how, post(body))
    pieces = [data[start : start + 2**18] for start in range(0, len(data) - 2**18, 2**18)] + [
        data[-(len(data) % 2**18 or 2**18) :]
    ]
    before = resident()
    connections = [service.connect() for _ in range(4)]
    for connection in connections:
        connection.send(*pieces[:-1])
    assert resident() - before > 100 * KIB**2
    for connection in connections:
        if how == "cut short":
            connection.end()
        elif how == "refused":
            connection.wait(31)
        elif how == "lost":
            connection.lose()
        else:
            connection.send(pieces[-1])
            assert connection.answer().status == 400
    if how in ("cut short", "lost"):
        del connection
        connections.clear()
        service.intake.connections.clear()
    assert resident() - before < 20 * KIB**2
