"""Answers to other methods and paths, and what CORS adds to all of them."""

from __future__ import annotations

import pytest
from ingest_harness import BODY, Service, chunk, head, keyed, post
from structlog.testing import capture_logs

from fastdist import packet

SITE = "https://ops.example"


@pytest.fixture(scope="module")
def service():
    return Service()


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


@pytest.mark.parametrize("first", ["CONNECT logs.example:443", "CONNECT [::1]:443"])
def test_connect_asks_the_whole_server(service, first):
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
def test_unknown_path_gets_404(service, method):
    answer = service.ask(head(f"{method} /nowhere")).answer(method)
    assert answer.status == 404
    assert "allow" not in answer.headers


def test_a_broken_head_request_gets_no_body():
    assert Service().ask(head("HEAD /health", "Content-Length: x")).answer("HEAD").status == 400


@pytest.mark.parametrize(
    ("broken", "status"),
    [(b"GET /health\r\n\r\n", 400), (b"GET /health\n", 400), (b"X" * 2000, 431), (b"GET /health", 408)],
)
def test_malformed_after_any_gets_a_response(broken, status):
    """The last one: HEAD, refused, from a listed origin."""
    service = Service(max_header=1024, security={"cors_origins": (SITE,)})
    connection = service.ask(head("HEAD /logs", f"Origin: {SITE}"), broken)
    connection.wait(11)
    first, second = connection.answers("HEAD", "GET")
    assert (first.status, second.status) == (405, status)
    assert second.json["status"] == status
    assert not any(name.startswith("access-control") for name in second.headers)
    refused, answer = service.ask(post(BODY, "Content-Type: a/b"), b"\n").answers()
    assert (refused.status, answer.status) == (415, 400)


MEBIBYTE = bytes(2**20)


def test_other_requests_bodies_read_to_a_mib():
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
def test_response_names_only_listed_origins(sharing, data, status):
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
def test_delivery_response_names_its_origin(sharing, waits):
    """With the one whose request it answers, whatever comes after it on the connection."""
    with sharing.timers() as loop:
        connection = sharing.ask(post(BODY, *GOOD, "Prefer: wait=9"), post(BODY, *GOOD[:1]))
        if waits:
            loop.advance(9)
        sharing.deliver()
    first, second = connection.answers()
    assert first.status == (202 if waits else 200)
    assert first.headers["access-control-allow-origin"] in (SITE, "*")
    assert "access-control-allow-origin" not in second.headers


def test_origin_ends_with_its_request(sharing):
    first, second = sharing.ask(head("GET /health", *GOOD), b"x y z\r\n\r\n").answers()
    assert (first.status, second.status) == (200, 400)
    assert not any(name.startswith("access-control") for name in second.headers)


def test_without_origins_there_is_no_cors(service):
    answer = service.ask(post(BODY, f"Origin: {SITE}")).answer()
    assert not any(name.startswith("access-control") for name in answer.headers)
    service.packets()


def test_preflight_lists_what_is_allowed(sharing):
    asked = head("OPTIONS /logs", f"Origin: {SITE}", "Access-Control-Request-Method: POST")
    answer = sharing.ask(asked).answer()
    assert answer.status == 204
    assert answer.headers["access-control-allow-methods"] == "POST, OPTIONS"
    assert answer.headers["access-control-max-age"] == "600"
    assert {"Authorization", "Idempotency-Key"} <= {*answer.headers["access-control-allow-headers"].split(", ")}


# ---- the dashboard's files


@pytest.mark.parametrize(("path", "kind"), [("/", "text/html"), ("/dashboard/app.js", "text/javascript")])
def test_static_files_cache_and_validate(service, path, kind):
    connection = service.ask(head(f"GET {path}"), head(f"HEAD {path}"))
    full, empty = connection.answers("GET", "HEAD")
    assert full.headers["content-type"].startswith(kind)
    assert full.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
    assert (empty.status, empty.body) == (200, b"")
    assert empty.headers["content-length"] == str(len(full.body))
    held = f"If-None-Match: {full.headers['etag']}"
    not_modified, after = service.ask(head(f"GET {path}", held), post()).answers("GET", "POST")
    assert (not_modified.status, not_modified.body) == (304, b"")  # and no length, which would be that of nothing
    assert not_modified.headers["etag"] == full.headers["etag"]
    assert after.status == 202


# ---- faults of our own


@pytest.mark.parametrize("part", ["a view", "the check"])
def test_faulty_request_gets_a_response(monkeypatch, part):
    """And others on the same connection theirs."""

    def fail(*_arguments, **_options):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(packet, "check", fail)
    service = Service()
    monkeypatch.setattr(service.emitters.api, "snapshot", fail)
    faulty = head("GET /stats") if part == "a view" else post(b"{}")
    with capture_logs() as lines:
        first, second, after = service.ask(faulty, faulty, post()).answers()
    assert (first.status, second.status, after.status) == (500, 500, 202)
    assert first.headers["content-type"] == "application/problem+json"
    assert [line["error"] for line in lines] == ["of a test"]


@pytest.mark.parametrize("body", [rb'{"\ud800":1}', rb'{"weight":1,"a\udfffb":{"\ud800":"\ud800"}}'])
def test_half_a_surrogate_in_key_is_reported(service, body):
    request = head("PATCH /analyzers/A1", f"Content-Length: {len(body)}") + body
    answer = service.connect("127.0.0.1").send(request).answer("PATCH")
    assert answer.status == 400
    assert "half a surrogate pair" in answer.json["detail"]
