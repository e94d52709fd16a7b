"""Answers: other methods and paths, CORS, and above all their order and moment when some of them have to wait."""

from __future__ import annotations

import pytest
from ingest_harness import BODY, CONTINUE, Service, chunk, head, keyed, post

SITE = "https://ops.example"
STORAGE_FAULT = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def service():
    return Service()


def deliver(service, analyzer="A2"):
    """Take all packets out of the ring and report them delivered (or, to None, dead)."""
    for packet in service.packets():
        service.emitters.settled(packet.sequence, analyzer)


# ---- other methods and paths


@pytest.mark.parametrize("path", ["/health", "/ready", "/stats", "/queue", "/analyzers", "/metrics", "/health?x=y"])
def test_head_is_get_without_the_body(service, path):
    full, empty, after = service.ask(head(f"GET {path}"), head(f"HEAD {path}"), post()).answers("GET", "HEAD")
    assert (full.status, empty.status, after.status) == (200, 200, 202)
    assert empty.body == b""
    assert full.body
    assert empty.headers.keys() == full.headers.keys()
    assert int(empty.headers["content-length"]) > 0
    assert service.bodies() == [BODY]


@pytest.mark.parametrize(
    ("first", "allow"),
    [
        ("GET /logs", "POST, OPTIONS"),
        ("HEAD /logs", "POST, OPTIONS"),
        ("PUT /logs", "POST, OPTIONS"),
        ("post /logs", "POST, OPTIONS"),
        ("POST /health", "GET, HEAD, OPTIONS"),
        ("DELETE /stats", "GET, HEAD, OPTIONS"),
        ("BREW /metrics", "GET, HEAD, OPTIONS"),
        ("TRACE /queue", "GET, HEAD, OPTIONS"),
    ],
)
def test_405_says_what_is_allowed(service, first, allow):
    connection = service.ask(head(first), keyed("next"))
    method = first.split()[0]
    answer, after = connection.answers(method)
    assert answer.status == 405
    assert answer.headers["allow"] == allow
    if method != "HEAD":
        assert answer.json["detail"] == f"{allow} are what this path takes"
    assert after.id == "next"
    assert service.rejected == {}
    service.packets()


@pytest.mark.parametrize("first", ["CONNECT logs.example:443", "FOO bar"])
def test_targets_of_unknown_methods_are_the_server_as_a_whole(service, first):
    answer = service.ask(head(first)).answer()
    assert answer.status == 405
    assert {*answer.headers["allow"].split(", ")} >= {"GET", "HEAD", "POST", "OPTIONS"}


@pytest.mark.parametrize("first", ["OPTIONS *", "OPTIONS http://logs.example", "OPTIONS http://logs.example?x"])
def test_options_of_the_server_as_a_whole(service, first):
    answer = service.ask(head(first)).answer("OPTIONS")
    assert (answer.status, answer.body) == (204, b"")
    assert {*answer.headers["allow"].split(", ")} >= {"GET", "HEAD", "POST", "OPTIONS"}


def test_options_of_a_path(service):
    answers = service.ask(head("OPTIONS /logs"), head("OPTIONS /health"), head("OPTIONS /nowhere")).answers()
    assert [answer.status for answer in answers] == [204, 204, 404]
    assert [answer.headers.get("allow") for answer in answers] == ["POST, OPTIONS", "GET, HEAD, OPTIONS", None]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "BREW"])
def test_404(service, method):
    answer = service.ask(head(f"{method} /nowhere")).answer(method)
    assert answer.status == 404
    assert "allow" not in answer.headers


def test_a_broken_head_request_gets_no_body_and_the_next_broken_request_does(service):
    """A HEAD before it has nothing to do with what is answered to it."""
    assert service.ask(head("HEAD /health", "Content-Length: x")).answer("HEAD").status == 400
    first, second = service.ask(head("HEAD /health"), b"GET /health\r\n\r\n").answers("HEAD", "GET")
    assert (first.status, second.status) == (200, 400)
    assert second.json["detail"].startswith("the request is not HTTP")


MEBIBYTE = bytes(2**20)


def test_a_body_of_other_requests_is_read_up_to_a_mebibyte():
    service = Service(max_body=2**30)
    assert service.ask(post(MEBIBYTE, first="PUT /nowhere"), keyed("next")).statuses == [404, 202]
    for data, detail in (
        (post(MEBIBYTE + b"x", first="PUT /nowhere"), "the body is larger than the 1048576 bytes allowed here"),
        (
            head("PUT /nowhere", "Transfer-Encoding: chunked") + chunk(MEBIBYTE + b"x"),
            "the body is larger than the 1048576 bytes allowed",
        ),
    ):
        connection = service.ask(data, keyed("never read"))
        answer = connection.answer()
        assert (answer.status, answer.closes, answer.json["detail"]) == (413, True, detail)
        assert connection.transport.half_closed
    assert service.rejected == {}


# ---- CORS

EXPOSED = {"access-control-allow-origin", "access-control-expose-headers"}


@pytest.fixture(scope="module", params=["exact", "any"])
def sharing(request):
    origins = (SITE, "https://b.example") if request.param == "exact" else ("*",)
    return Service(security={"cors_origins": origins, "tokens": ("t",)}, max_header=1024)


GOOD = ("Authorization: Bearer t", f"Origin: {SITE}")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(BODY, *GOOD), 202),
        (post(BODY, *GOOD, "Prefer: wait=0"), 202),
        (post(b"{", *GOOD), 400),
        (post(BODY, *GOOD[1:]), 401),
        (post(BODY, *GOOD, "Content-Type: text/plain"), 415),
        (post(BODY, *GOOD, "Expect: x"), 417),
        (post(b"", *GOOD), 400),
        (head("GET /health", *GOOD), 200),
        (head("GET /nowhere", *GOOD), 404),
        (head("GET /logs", *GOOD), 405),
        (head("OPTIONS /logs", *GOOD), 204),
        (head("POST /logs", *GOOD, "Content-Length: 99999999999"), 413),
        (head("POST /logs", *GOOD, "Transfer-Encoding: chunked") + b"x\r\n", 400),
    ],
)
def test_every_answer_is_shared_with_listed_origins_only(sharing, data, status):
    with sharing.timers() as loop:
        listed = sharing.ask(data)
        loop.advance(0)
        other = sharing.ask(data.replace(SITE.encode(), b"https://evil.example"))
        loop.advance(0)
    answer, foreign = listed.answer(), other.answer()
    assert answer.status == foreign.status == status
    if "*" in sharing.config.security.cors_origins:
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "vary" not in answer.headers
        assert foreign.headers["access-control-allow-origin"] == "*"
    else:
        assert answer.headers["access-control-allow-origin"] == SITE
        assert answer.headers["vary"] == "Origin"
        assert not any(name.startswith("access-control") for name in foreign.headers)
    assert answer.headers["access-control-expose-headers"] == "Retry-After"
    sharing.packets()


@pytest.mark.parametrize("waits", [True, False])
def test_a_delivery_is_shared_with_the_origin_that_waits_for_it(sharing, waits):
    """With the one whose request it answers, whatever comes after it on the connection."""
    with sharing.timers() as loop:
        connection = sharing.ask(post(BODY, *GOOD, "Prefer: wait=9"), post(BODY, *GOOD[:1]))
        if waits:
            loop.advance(9)
        deliver(sharing)
    first, second = connection.answers()
    assert first.status == (202 if waits else 200)
    assert first.headers["access-control-allow-origin"] in (SITE, "*")
    assert "access-control-allow-origin" not in second.headers


def test_an_origin_does_not_outlive_its_request(sharing):
    first, second = sharing.ask(head("GET /health", *GOOD), b"x y z\r\n\r\n").answers()
    assert (first.status, second.status) == (200, 400)
    assert not any(name.startswith("access-control") for name in second.headers)


def test_without_origins_there_is_no_cors(service):
    answer = service.ask(post(BODY, f"Origin: {SITE}")).answer()
    assert not any(name.startswith("access-control") for name in answer.headers)
    service.packets()


def test_a_preflight(sharing):
    asked = head("OPTIONS /logs", f"Origin: {SITE}", "Access-Control-Request-Method: POST")
    answer = sharing.ask(asked).answer()
    assert answer.status == 204
    assert answer.headers["access-control-allow-methods"] == "POST, OPTIONS"
    assert answer.headers["access-control-max-age"] == "600"
    assert {"Authorization", "Idempotency-Key"} <= {*answer.headers["access-control-allow-headers"].split(", ")}


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
        deliver(service, "A3")
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
        deliver(service)
    assert answer.status == 202
    assert answer.body == b'{"status":"accepted","packetId":"%b","messages":2}' % answer.id.encode()
    assert connection.statuses == [202]
    assert not service.emitters.waiting


def test_a_dead_letter_while_somebody_waits():
    service = Service()
    with service.timers() as loop:
        connection = waiting(service, "Idempotency-Key: k")
        deliver(service, None)
        loop.advance(100)
    answer = connection.answer()
    assert answer.status == 502
    assert answer.json["detail"] == "packet k could not be delivered and is now among the dead letters"
    assert service.rejected == {}
    assert connection.open


def test_without_validation_the_answer_has_no_messages():
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


def test_the_last_answer_of_a_connection_may_wait_as_well():
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


def test_an_http_1_0_emitter_that_waits_is_told_that_it_is_kept():
    service = Service()
    with service.timers():
        data = post(BODY, "Connection: keep-alive", "Prefer: wait=5", first="POST /logs HTTP/1.0")
        connection = service.ask(data)
        deliver(service)
    assert connection.answer().headers["connection"] == "keep-alive"


def test_an_emitter_that_is_gone_waits_no_more():
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


def test_answers_keep_the_order_of_their_requests():
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
    assert connection.protocol.answers is None
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


def test_answers_wait_for_the_sync_of_their_packets():
    service = Service(fsync=True)
    connection = service.ask(keyed("a"))
    middle = service.ring.tail_position
    assert service.syncs_wanted == 1
    connection.send(keyed("b") + keyed("c") + head("GET /health"))
    other = service.ask(keyed("d"))
    assert service.syncs_wanted == 4
    assert connection.written == other.written == b""
    assert service.packets() == []
    service.sync(middle)
    assert [answer.id for answer in connection.answers()] == ["a"]
    assert other.written == b""
    service.sync()
    assert connection.statuses == [202, 202, 202, 200]
    assert other.answer().id == "d"
    assert [packet.id for packet in service.packets()] == ["a", "b", "c", "d"]
    assert not service.intake.unsynced


def test_other_answers_do_not_wait_for_a_sync():
    service = Service(fsync=True)
    connection = service.ask(head("GET /health") + post(b"{") + post(BODY, "Content-Type: a/b"))
    assert connection.statuses == [200, 400, 415]
    assert not service.syncs_wanted


def test_when_the_sync_fails_nobody_is_told_202():
    service = Service(fsync=True)
    connection, other = service.ask(keyed("a") + head("GET /health") + keyed("b")), service.ask(keyed("c"))
    service.ring.withdraw_unsynced()
    service.intake.sync_failed(STORAGE_FAULT)
    assert connection.written.count(b"HTTP/1.1 503") == 2
    assert connection.written.startswith(STORAGE_FAULT + b"HTTP/1.1 200 OK")
    assert connection.written.endswith(b"}" + STORAGE_FAULT)
    assert other.written == STORAGE_FAULT
    connection.transport.writes.clear()
    connection.send(keyed("d"))
    service.sync()
    assert connection.answer().id == "d"
    assert [packet.id for packet in service.packets()] == ["d"]


def test_who_waits_for_a_delivery_waits_for_the_sync_first():
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
        deliver(service)
        assert other.answer().status == 200
        loop.advance(5)
    assert connection.statuses == [202]
    assert not service.intake.unsynced


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_who_waits_for_a_delivery_is_told_when_the_sync_fails(late):
    """Before and after the time is up; what had been synced is not concerned."""
    service = Service(fsync=True)
    with service.timers() as loop:
        connection = service.ask(keyed("a", BODY, "Prefer: wait=60"))
        service.sync()
        connection.send(keyed("b", BODY, "Prefer: wait=5"), keyed("c"))
        if late:
            loop.advance(5)
        service.ring.withdraw_unsynced()
        service.intake.sync_failed(STORAGE_FAULT)
        service.sync()  # a later one succeeds, and has nothing to do with them
        assert connection.written == b""
        deliver(service)
        assert connection.written.startswith(b"HTTP/1.1 200 OK")
        assert connection.written.endswith(b"}" + 2 * STORAGE_FAULT)
        loop.advance(100)
    assert connection.written.count(b"HTTP/1.1") == 3
    assert connection.protocol.answers is None


class Eager(Service):
    """Syncs at once, from within the read."""

    def _sync_wanted(self):
        super()._sync_wanted()
        self.sync()


def test_a_sync_at_once_is_as_good_as_a_late_one():
    service = Eager(fsync=True)
    with service.timers():
        connection = service.ask(
            head("GET /health") + keyed("a") + post(b"{") + keyed("b", BODY, "Prefer: wait=5") + keyed("c") + keyed("d")
        )
        assert connection.statuses == [200, 202, 400]
        deliver(service)
        connection.send(keyed("e", BODY, "Connection: close"))
    assert connection.statuses == [200, 202, 400, 200, 202, 202, 202]
    assert connection.transport.closed
    assert service.syncs_wanted == 5


# ---- back-pressure


def test_too_many_waiting_answers_pause_reading():
    service = Service(fsync=True, capacity=2**22)
    connection = service.connect()
    sent = 0
    while connection.transport.reading:
        connection.send(keyed(f"k{sent}"))
        sent += 1
        assert sent <= 1000
    assert sent == 513
    connection.send(keyed("late"))
    assert service.accepted == 513
    service.sync()
    assert connection.transport.reading
    connection.pump()
    service.sync()
    assert [answer.id for answer in connection.answers()] == [*(f"k{number}" for number in range(513)), "late"]


def test_many_answers_of_one_read_wait_together():
    service = Service(fsync=True, capacity=2**22)
    connection = service.ask(b"".join(keyed(f"k{number}") for number in range(1000)))
    assert not connection.transport.reading
    service.sync()
    assert connection.transport.reading
    assert [answer.id for answer in connection.answers()] == [f"k{number}" for number in range(1000)]
    assert len(connection.transport.writes) == 1


def test_an_emitter_that_does_not_read_is_not_read():
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


def test_reading_goes_on_when_both_reasons_to_pause_are_gone():
    service = Service(fsync=True, capacity=2**22)
    connection = service.ask(b"".join(keyed(f"k{number}") for number in range(600)))
    connection.protocol.pause_writing()
    service.sync()
    assert not connection.transport.reading
    connection.protocol.resume_writing()
    assert connection.transport.reading
