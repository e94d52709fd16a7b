"""POST /logs: which requests bring a packet into the ring, what the packet is then, and what is answered."""

from __future__ import annotations

import time
import uuid

import pytest
from ingest_harness import BODY, CONTINUE, Service, chunk, corpus, head, keyed, post, post_chunked

CORPUS = corpus()
KEY_FAULT = (
    "Idempotency-Key must be one value of 1 to 64 visible ASCII characters "
    r'other than " , ; \, bare or in double quotes'
)
STRICT = b'{"emitterId":"e","messages":[{"message":"m","timestamp":"2026-01-31T12:34:56Z","level":"Info"}]}'
NO_SUCH_PATH = "there is nothing at this path; packets go to POST /logs"


@pytest.fixture(scope="module")
def service():
    return Service()


def assert_problem(service, data, status, detail, reason=None):
    """What is sent is answered with this problem, counted as a rejection for this reason, and brings no packet.

    The connection goes on. Returns the answer.
    """
    before = service.rejected
    connection = service.ask(data)
    answer = connection.answer()
    assert answer.status == status
    assert answer.json["detail"] == detail
    assert not answer.closes
    assert connection.open
    expected = before | ({reason: before.get(reason, 0) + 1} if reason else {})
    assert service.rejected == expected
    assert not service.ring.undone
    connection.send(post(STRICT))
    assert connection.answers()[-1].status == 202
    assert service.bodies() == [STRICT]
    connection.lose()
    return answer


# ---- 202


def test_packet_is_stored_unchanged(service):
    accepts = service.accepts
    before = {name: service.counters.get(name) for name in ("accepted", "messages_accepted", "bytes_accepted")}
    connection = service.ask(post(BODY, "Content-Type: application/json"))
    answer = connection.answer()
    assert answer.status == 202
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == b'{"status":"accepted","packetId":"%b","messages":2}' % answer.id.encode()
    assert "connection" not in answer.headers
    (packet,) = service.packets()
    assert (packet.id, packet.body, packet.messages, packet.attempts, packet.flags) == (answer.id, BODY, 2, 0, 0)
    after = {name: service.counters.get(name) for name in before}
    assert [after[name] - before[name] for name in before] == [1, 2, len(BODY)]
    assert service.accepts == accepts + 1
    assert connection.open
    assert connection.protocol.idle()


def test_packets_together_are_one_write(service):
    accepts = service.accepts
    connection = service.ask(b"".join(keyed(f"k{number}") for number in range(200)))
    assert [answer.id for answer in connection.answers()] == [f"k{number}" for number in range(200)]
    assert [packet.id for packet in service.packets()] == [f"k{number}" for number in range(200)]
    assert len(connection.transport.writes) == 1
    assert service.accepts == accepts + 1


def test_ids_are_uuid_7_in_order_of_time(service):
    start = time.time_ns() // 10**6
    connection = service.connect()
    for _ in range(20):
        connection.send(post() * 500)
        service.packets()
    end = time.time_ns() // 10**6
    ids = [uuid.UUID(answer.id) for answer in connection.answers()]
    assert len(set(ids)) == 10_000
    assert {(made.version, made.variant) for made in ids} == {(7, uuid.RFC_4122)}
    times = [made.int >> 80 for made in ids]
    assert start <= times[0]
    assert times == sorted(times)
    assert times[-1] <= end
    assert [made.int >> 64 for made in ids] == sorted(
        made.int >> 64 for made in ids
    )  # fractions of milliseconds as well
    for bit in range(62):  # the rest is random
        ones = sum(made.int >> bit & 1 for made in ids)
        assert 4500 < ones < 5500


def test_ids_do_not_repeat_over_processes():
    """Each has a random start of its own."""
    noise = {Service().ask(post()).answer().id[-17:] for _ in range(10)}
    assert len(noise) == 10


@pytest.mark.parametrize(
    "name", ["chunked", "chunk extensions, trailers", "expect, chunked", "h2c", "absolute form", "odd spacing"]
)
def test_body_is_same_however_it_is_split(service, name):
    service.ask(CORPUS[name])
    assert service.bodies()[0] == BODY


@pytest.mark.parametrize(
    "target",
    [
        "/logs",
        "/logs?a=b",
        "/logs?",
        "/logs?/x",
        "http://h/logs",
        "HTTPS://h:1/logs?x",
        "http://[::1]/logs",
        "http://h/logs?http://x",
    ],
)
def test_targets_that_are_logs(service, target):
    assert service.ask(post(first=f"POST {target}")).answer().status == 202
    assert service.bodies() == [BODY]


@pytest.mark.parametrize(
    "target",
    [
        "/log",
        "/logs/",
        "/LOGS",
        "//logs",
        "/%6cogs",
        "/logs%3f",
        "/logs;x",
        "/x/../logs",
        "http://h/logs/",
    ],
)
def test_targets_that_are_not_logs(service, target):
    assert_problem(service, post(first=f"POST {target}"), 404, NO_SUCH_PATH)


@pytest.mark.parametrize("target", ["/", "http://h", "http://h?x=/logs", "http://h?/logs"])
def test_dashboard_targets_take_no_packets(service, target):
    assert_problem(service, post(first=f"POST {target}"), 405, "GET, HEAD, OPTIONS are what this path takes")


# ---- media type, coding

JSON_TYPES = [
    "application/json",
    "application/json; charset=utf-8",
    "application/json;charset=UTF-8;x=y",
    "application/json ; a=b",
    "application/json\t;a=b",
    "APPLICATION/JSON",
    "Application/Json;",
    "",
]


@pytest.mark.parametrize("value", JSON_TYPES)
def test_media_types_that_are_json(service, value):
    assert service.ask(post(BODY, f"Content-Type: {value}")).answer().status == 202
    assert service.bodies() == [BODY]


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "application/jsonx",
        "application/json5",
        "application/problem+json",
        "application/x-ndjson",
        "json",
        ";",
        "application/x-www-form-urlencoded",
        "application/json, text/plain",
        "application/ json",
        '"application/json"',
        "*/*",
    ],
)
def test_media_types_that_are_not(service, value):
    data = post(BODY, f"Content-Type: {value}")
    assert_problem(service, data, 415, "Content-Type must be application/json", "unsupported_media_type")


@pytest.mark.parametrize("lines", [["identity"], ["Identity"], [""], ["identity", "identity"]])
def test_no_coding_or_identity(service, lines):
    assert service.ask(post(BODY, *(f"Content-Encoding: {value}" for value in lines))).answer().status == 202
    assert service.bodies() == [BODY]


@pytest.mark.parametrize(
    "values", [["compress"], ["br"], ["x"], ["identity, br"], ["br", "identity"], ["identity", "lz4"], ["gzip", "br"]]
)
def test_codings_are_not_understood(service, values):
    data = post(BODY, *(f"Content-Encoding: {value}" for value in values))
    detail = "Content-Encoding must be gzip, deflate, zstd or snappy"
    answer = assert_problem(service, data, 415, detail, "unsupported_media_type")
    assert answer.headers["accept-encoding"] == "gzip, deflate, zstd, snappy"


# ---- no body


@pytest.mark.parametrize(
    "data",
    [
        post(b""),
        head("POST /logs"),
        post_chunked(),
        post_chunked(end=b"0\r\nA: b\r\n\r\n"),
        post(b"", "Expect: 100-continue"),
    ],
    ids=["length", "no length", "chunked", "chunked with a trailer", "expect"],
)
@pytest.mark.parametrize("validation", ["none", "schema", "strict"])
def test_an_empty_body_is_no_packet(data, validation):
    answer = assert_problem(Service(validation=validation), data, 400, "the body is empty", "malformed")
    assert answer.interims == 0


# ---- validation

MISSING = [{"pointer": "/emitterId", "detail": "is required"}, {"pointer": "/messages", "detail": "is required"}]
EXPECTED_STAMP = "expected an RFC 3339 date-time such as 2026-01-31T12:34:56.789Z"


@pytest.mark.parametrize(
    ("body", "reason", "detail", "errors"),
    [
        (
            b"{",
            "malformed",
            "not JSON: expected a name in double quotes at line 1, column 2 (byte 1)",
            None,
        ),
        (b'{"a":\xff}', "malformed", "not UTF-8 at line 1, column 6 (byte 5)", None),
        (b" ", "malformed", "not JSON: expected a value at line 1, column 2 (byte 1)", None),
        (b"{}", "invalid", "/emitterId: is required (and 1 more)", MISSING),
        (
            b"[]",
            "invalid",
            "the body: expected an object, got an array",
            [{"pointer": "", "detail": "expected an object, got an array"}],
        ),
        (
            b'{"emitterId":"","messages":[{"message":1},{}]}',
            "invalid",
            "/emitterId: expected 1 to 256 characters, got 0 (and 2 more)",
            [
                {"pointer": "/emitterId", "detail": "expected 1 to 256 characters, got 0"},
                {"pointer": "/messages/0/message", "detail": "expected a string, got a number"},
                {"pointer": "/messages/1/message", "detail": "is required"},
            ],
        ),
    ],
)
def test_bodies_that_are_no_packet(service, body, reason, detail, errors):
    for data in (post(body), post_chunked(body)):
        assert assert_problem(service, data, 400, detail, reason).json.get("errors") == errors


def test_strict_wants_timestamps_and_levels():
    service = Service(validation="strict")
    errors = [
        {"pointer": "/messages/0/timestamp", "detail": "is required"},
        {"pointer": "/messages/0/level", "detail": "is required"},
        {"pointer": "/messages/1/timestamp", "detail": "is required"},
        {"pointer": "/messages/1/level", "detail": "is required"},
    ]
    before = service.ask(post())
    answer = before.answer()
    assert answer.status == 400
    assert answer.json["errors"] == errors
    assert service.rejected == {"invalid": 1}
    wrong = b'{"emitterId":"e","messages":[{"message":"m","timestamp":"yesterday","level":"Info"}]}'
    assert service.ask(post(wrong)).answer().json["errors"] == [
        {"pointer": "/messages/0/timestamp", "detail": EXPECTED_STAMP},
    ]
    right = wrong.replace(b"yesterday", b"2026-01-31T12:34:56Z")
    assert service.ask(post(right)).answer().status == 202
    assert service.bodies() == [right]


def test_validation_none_takes_any_bytes():
    service = Service(validation="none")
    for body in (b"\x00", b"not json", bytes(range(256)), b"{"):
        connection = service.ask(post(body))
        answer = connection.answer()
        assert answer.body == b'{"status":"accepted","packetId":"%b"}' % answer.id.encode()
        (packet,) = service.packets()
        assert (packet.id, packet.body, packet.messages) == (answer.id, body, 0)
    assert service.accepted == 4
    assert service.counters.get("messages_accepted") == 0


# ---- Idempotency-Key

VISIBLE = "".join(chr(code) for code in range(33, 127) if chr(code) not in '",;\\')


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("k", "k"),
        ('"k"', "k"),
        ("a" * 64, "a" * 64),
        ('"' + "a" * 64 + '"', "a" * 64),
        (VISIBLE[:64], VISIBLE[:64]),
        (VISIBLE[-64:], VISIBLE[-64:]),
        (" \tk\t ", "k"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
    ],
)
def test_keys_become_ids(service, value, key):
    answer = service.ask(post(BODY, f"Idempotency-Key: {value}")).answer()
    assert answer.body == b'{"status":"accepted","packetId":"%b","messages":2}' % key.encode()
    (packet,) = service.packets()
    assert (packet.id, packet.body) == (key, BODY)


@pytest.mark.parametrize(
    "value",
    [
        "",
        '""',
        '"',
        "a" * 65,
        '"' + "a" * 65 + '"',
        "a b",
        '"a b"',
        "a,b",
        "a;b",
        "a\\b",
        'a"b',
        '"a',
        'a"',
        '"a"b"',
        "\xe9",
        "a\tb",
        "'\xa0'",
    ],
)
def test_invalid_keys_are_refused(service, value):
    assert_problem(service, post(BODY, f"Idempotency-Key: {value}"), 400, KEY_FAULT, "invalid")


@pytest.mark.parametrize("other", ["k", "l", ""])
def test_two_keys_are_one_too_many(service, other):
    data = post(BODY, "Idempotency-Key: k", f"idempotency-key: {other}")
    assert_problem(service, data, 400, KEY_FAULT, "invalid")


def test_keys_are_not_remembered(service):
    """Neither to recognise a packet that was here before, nor for the next request of the connection."""
    connection = service.ask(keyed("k") + keyed("k") + post())
    first, second, third = (answer.id for answer in connection.answers())
    assert first == second == "k"
    assert third not in ("k", "")
    assert len(service.packets()) == 3


# ---- connection


@pytest.mark.parametrize(
    ("version", "lines", "header"),
    [
        ("HTTP/1.1", [], None),
        ("HTTP/1.1", ["Connection: keep-alive"], None),
        ("HTTP/1.1", ["Connection: close"], "close"),
        ("HTTP/1.1", ["Connection: CLOSE"], "close"),
        ("HTTP/1.1", ["Connection: x, close ,y"], "close"),
        ("HTTP/1.1", ["Connection: close, keep-alive"], "close"),
        ("HTTP/1.1", ["Connection: keep-alive, close"], "close"),
        ("HTTP/1.1", ["Connection: close", "Connection: keep-alive"], "close"),
        ("HTTP/1.1", ["Connection: keep-alive", "Connection: close"], "close"),
        ("HTTP/1.1", ["Connection: closed"], None),
        ("HTTP/1.0", [], "close"),
        ("HTTP/1.0", ["Connection: keep-alive"], "keep-alive"),
        ("HTTP/1.0", ["Connection: Keep-Alive, x"], "keep-alive"),
        ("HTTP/1.0", ["Connection: close", "Connection: keep-alive"], "close"),
    ],
)
@pytest.mark.parametrize("what", ["packet", "error", "view"])
def test_connection_is_kept_or_closed(service, what, version, lines, header):
    kept = header != "close"
    data = {
        "packet": post(BODY, *lines, first=f"POST /logs {version}"),
        "error": post(b"{", *lines, first=f"POST /logs {version}"),
        "view": head(f"GET /health {version}", *lines),
    }[what]
    connection = service.ask(data, keyed("next"))
    answer, *others = connection.answers()
    assert answer.status == {"packet": 202, "error": 400, "view": 200}[what]
    assert answer.headers.get("connection") == header
    assert connection.transport.closed != kept
    assert not connection.transport.half_closed
    assert [other.id for other in others] == ["next"] * kept
    assert len(service.packets()) == (what == "packet") + kept
    connection.lose()


def test_h2c_is_served_as_http_1_1(service):
    """As Java's client asks on its first request, with a body or without one."""
    lines = (
        "Connection: Upgrade, HTTP2-Settings",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
        "Upgrade: h2c",
    )
    connection = service.ask(
        keyed("a", BODY, *lines) + head("GET /health", *lines) + post_chunked(BODY, lines=lines) + post(BODY)
    )
    assert connection.statuses == [202, 200, 202, 202]
    assert service.bodies() == [BODY] * 3
    assert connection.open


# ---- Expect


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["Content-Length: 70", "Expect: 100-continue"], BODY),
        (["Expect: 100-CONTINUE", "Content-Length: 70"], BODY),
        (["Transfer-Encoding: chunked", "Expect: 100-continue"], chunk(BODY) + b"0\r\n\r\n"),
    ],
)
def test_100_invites_the_body(service, lines, body):
    connection = service.ask(head("POST /logs", *lines))
    assert connection.written == CONTINUE
    connection.send(body)
    assert connection.answer().status == 202
    assert service.bodies() == [BODY]
    assert connection.open


def test_100_is_not_for_http_1_0(service):
    connection = service.ask(head("POST /logs HTTP/1.0", "Expect: 100-continue", "Content-Length: 70"))
    assert connection.written == b""
    connection.send(BODY)
    assert connection.answer().status == 202
    assert service.bodies() == [BODY]


def test_100_invites_other_requests_bodies(service):
    connection = service.ask(head("PUT /nowhere", "Expect: 100-continue", "Content-Length: 3"))
    assert connection.written == CONTINUE
    connection.send(b"abc", keyed("next"))
    assert connection.statuses == [404, 202]
    service.packets()


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        ("Content-Type: text/plain", 415, "unsupported_media_type"),
        ("Content-Encoding: br", 415, "unsupported_media_type"),
        ("Idempotency-Key: a b", 400, "invalid"),
        ("Expect: later", 417, "invalid"),
    ],
)
@pytest.mark.parametrize("coming", [b"", BODY], ids=["waits", "does not wait"])
def test_refusal_replaces_a_100_response(line, status, reason, coming):
    """It is not known whether the body still comes, so nothing more is read."""
    service = Service()
    connection = service.ask(
        head("POST /logs", "Expect: 100-continue", line, "Content-Length: 70") + coming, keyed("next")
    )
    answer = connection.answer()
    assert (answer.status, answer.closes, answer.interims) == (status, True, 0)
    assert connection.transport.half_closed
    assert service.rejected == {reason: 1}
    assert not service.ring.undone


@pytest.mark.parametrize("value", ["100-continue, x", "x", "", "100", "200-ok"])
def test_other_expectations_are_not_met(service, value):
    assert_problem(
        service, post(BODY, f"Expect: {value}"), 417, "the only expectation understood is 100-continue", "invalid"
    )
