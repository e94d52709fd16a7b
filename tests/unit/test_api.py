"""The API: every route with every method, problem documents, CORS, and what is asked for in headers."""

from __future__ import annotations

import os
import re
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from structlog.testing import capture_logs

from fastdist._core import RequestHead
from fastdist.exchange import Response, reason
from fastdist.http.api import LOG_INTERVAL, Api, accepts, cors_headers
from fastdist.http.metrics import CONTENT_TYPE, OPENMETRICS_CONTENT_TYPE
from fastdist.http.responses import problem
from fastdist.ipc import Action
from fastdist.settings import Config, Security
from fastdist.shm.block import AnalyzerWord, HeadWord, SharedBlock, WorkerWord
from fastdist.shm.snapshot import Snapshot

SITE = "https://ops.example"
CONFIG = replace(Config(), security=Security(cors_origins=(SITE,)))
ANALYZERS = dict(enumerate(CONFIG.analyzers))
VIEWS = ("/health", "/ready", "/stats", "/queue", "/analyzers", "/dead-letters")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "BREW")


@pytest.fixture
def block():
    block = SharedBlock.create(2, 64)
    os.close(block.fd)  # the mapping stays
    for slot in ANALYZERS:
        block.analyzers.set(slot, AnalyzerWord.IN_USE, 1)
        block.analyzers.set_weight(slot, 1.0)
    return block


@pytest.fixture
def api(block):
    return Api(lambda: Snapshot(block, CONFIG, ANALYZERS, "1.2.3"))


def ask(api, method, target, **headers):
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *lines, "", ""])
    return api.respond(method, target, RequestHead(head.encode("latin-1")).fields, b"")


def header(response, name):
    """Return the value of a header that is there once, None if it is not there."""
    assert response.headers == b"" or response.headers.endswith(b"\r\n")
    lines = [line.partition(b": ") for line in response.headers.split(b"\r\n")[:-1]]
    values = [value.decode() for key, _, value in lines if key.lower() == name.lower().encode()]
    assert len(values) <= 1
    return values[0] if values else None


def assert_problem(response, status):
    assert response.status == status
    assert header(response, "Content-Type") == "application/problem+json"
    document = orjson.loads(response.body)
    assert document["type"] == "about:blank"
    assert document["status"] == status
    assert document["title"] == reason(status)
    assert document["detail"]
    return document


# ---- routes


@pytest.mark.parametrize("path", [*VIEWS, "/metrics"])
@pytest.mark.parametrize("method", METHODS)
def test_reading_routes_are_read_only(api, path, method):
    response = ask(api, method, path)
    if method in {"GET", "HEAD"}:
        assert response.status == 200
        assert response.body
        assert header(response, "Content-Type") == (CONTENT_TYPE if path == "/metrics" else "application/json")
        assert header(response, "Allow") is None
    elif method == "OPTIONS":
        assert (response.status, response.body) == (204, b"")
        assert header(response, "Allow") == "GET, HEAD, OPTIONS"
    else:
        assert_problem(response, 405)
        assert header(response, "Allow") == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", VIEWS)
def test_views_are_current_json_objects(api, block, path):
    assert isinstance(orjson.loads(ask(api, "GET", path).body), dict)
    block.rows[0].add("accepted", 3)
    assert orjson.loads(ask(api, "GET", "/stats").body)["packets"]["accepted"] == 3


@pytest.mark.parametrize("method", METHODS)
def test_logs_takes_packets_only(api, method):
    response = ask(api, method, "/logs")
    assert header(response, "Allow") == "POST, OPTIONS"
    if method == "OPTIONS":
        assert response == Response(204, b"", b"Allow: POST, OPTIONS\r\n")
    else:
        assert_problem(response, 405)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["/nothing", "/health/", "/Health", "//health", "/health/x", "/logs/", "/%68ealth"])
def test_what_is_not_there(api, method, path):
    response = ask(api, method, path)
    assert_problem(response, 404)
    assert header(response, "Allow") is None


def test_the_query_is_no_part_of_the_path(api):
    assert ask(api, "GET", "/health?").status == 200
    assert ask(api, "GET", "/health?a=/b?c").status == 200
    assert ask(api, "DELETE", "/health?x").status == 405
    assert ask(api, "GET", "/nothing?/health").status == 404


def test_the_server_as_a_whole(api):
    assert ask(api, "OPTIONS", "*") == Response(204, b"", b"Allow: GET, HEAD, POST, PATCH, DELETE, OPTIONS\r\n")
    assert_problem(ask(api, "CONNECT", "example.com:443"), 405)


def test_head_responds_as_get(api):
    assert ask(api, "HEAD", "/analyzers") == ask(api, "GET", "/analyzers")


def test_routes_can_be_added(api):
    seen = []

    def patch(request):
        seen.append((request.method, request.path, request.headers["host"], request.body))
        return Response(200, b"{}", b"")

    api.routes["/admin/reload"] = {"POST": patch}
    assert api.respond("POST", "/admin/reload?x=1", {"host": "h"}, b"body").status == 200
    assert seen == [("POST", "/admin/reload", "h", b"body")]
    assert header(ask(api, "GET", "/admin/reload"), "Allow") == "POST, OPTIONS"


def test_tokenless_api_rejects_other_origins(api):
    """A browser on this machine sends what any page tells it to."""

    def reload(**headers):
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /admin/reload HTTP/1.1\r\nHost: localhost:3000\r\n{lines}\r\n".encode()
        return api.respond("POST", "/admin/reload", RequestHead(head).fields, b"", "127.0.0.1")

    assert reload() == Action("reload", by="127.0.0.1")
    assert reload(Origin="http://localhost:3000") == Action("reload", by="127.0.0.1")
    for origin in ("https://evil.example", "null", "http://localhost:8080"):
        response = reload(Origin=origin)
        assert_problem(response, 403)
        assert origin in orjson.loads(response.body)["detail"]


# ---- readiness


def test_ready_without_an_obstacle(api):
    assert orjson.loads(ask(api, "GET", "/ready").body) == {"status": "ready"}


@pytest.mark.parametrize(("what", "word"), [("draining", "draining"), ("storage", "stored"), ("full", "full")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_not_ready_names_the_obstacle(api, block, what, word, method):
    if what == "draining":
        block.head[HeadWord.DRAINING] = 1
    elif what == "storage":
        block.worker(1)[WorkerWord.STORAGE_FAULT] = 1
    else:
        block.worker(1)[WorkerWord.LACKING] = 100
    response = ask(api, method, "/ready")
    assert word in assert_problem(response, 503)["detail"]
    assert header(response, "Retry-After") == "1"
    assert ask(api, "GET", "/health").status == 200


# ---- metrics


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", CONTENT_TYPE),
        ("text/plain;version=0.0.4", CONTENT_TYPE),
        ("application/openmetrics-text", OPENMETRICS_CONTENT_TYPE),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2", OPENMETRICS_CONTENT_TYPE),
    ],
)
def test_metrics_come_in_the_format_asked(api, accept, content_type):
    response = ask(api, "GET", "/metrics", Accept=accept)
    assert header(response, "Content-Type") == content_type
    assert b"\nfastdist_packets_accepted_total 0\n" in response.body
    assert response.body.endswith(b"# EOF\n") is (content_type == OPENMETRICS_CONTENT_TYPE)


@pytest.mark.parametrize(
    ("accept", "named"),
    [
        ("", False),
        ("a/b", True),
        ("x/y , A/B ;q=0.3", True),
        ("a/b;q=0", False),
        ("a/b;q=0.000", False),
        ("a/b; v=1; q=0.001", True),
        ("a/*, */*", False),
        ("a/bc", False),
    ],
)
def test_accept_header_names_media_type(accept, named):
    assert accepts(accept, "a/b") is named


# ---- CORS


def test_preflight_lists_what_is_allowed(api):
    response = ask(api, "OPTIONS", "/logs", Origin=SITE, Access_Control_Request_Method="POST")
    assert (response.status, response.body) == (204, b"")
    assert header(response, "Allow") == header(response, "Access-Control-Allow-Methods") == "POST, OPTIONS"
    allowed = "Content-Type, Content-Encoding, Authorization, Idempotency-Key, Prefer, X-Emitter-Id"
    assert header(response, "Access-Control-Allow-Headers") == allowed
    assert header(response, "Access-Control-Max-Age") == "600"
    assert header(response, "Access-Control-Allow-Origin") is None  # the connection adds it to all its answers


def test_no_preflight_for_others(api):
    plain = ask(api, "OPTIONS", "/logs")
    assert ask(api, "OPTIONS", "/logs", Origin=SITE) == plain
    assert ask(api, "OPTIONS", "/logs", Access_Control_Request_Method="POST") == plain
    assert ask(api, "OPTIONS", "/logs", Origin="https://evil.example", Access_Control_Request_Method="POST") == plain
    assert ask(api, "OPTIONS", "/nothing", Origin=SITE, Access_Control_Request_Method="POST").status == 404


@pytest.mark.parametrize("allowed", [(SITE,), ("https://other.example", SITE)])
def test_cors_of_a_listed_origin(allowed):
    assert cors_headers(SITE, allowed) == (
        b"Access-Control-Allow-Origin: https://ops.example\r\n"
        b"Vary: Origin\r\n"
        b"Access-Control-Expose-Headers: Retry-After\r\n"
    )


def test_cors_of_every_origin():
    everyone = b"Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: Retry-After\r\n"
    assert cors_headers("https://anything", ("*",)) == everyone
    assert cors_headers("null", ("*",)) == everyone


@pytest.mark.parametrize(
    "origin",
    ["", "null", "*", "http://ops.example", "https://ops.example:444", "https://ops.example.evil", SITE[:-1], "\xff"],
)
def test_other_origins_get_no_cors_headers(origin):
    assert cors_headers(origin, (SITE,)) == b""
    assert cors_headers(origin, ()) == b""


# ---- parts


def test_problem_documents():
    faults = [{"pointer": "/messages/0/message", "detail": "missing"}]
    response = problem(400, "the packet is not valid", errors=faults, headers=b"X-Y: z\r\n")
    assert assert_problem(response, 400)["errors"] == faults
    assert header(response, "X-Y") == "z"
    assert "errors" not in assert_problem(problem(413, "too large"), 413)
    assert "errors" not in assert_problem(problem(400, "broken", errors=[]), 400)


@pytest.mark.parametrize(
    ("status", "phrase"), [(404, "Not Found"), (413, "Content Too Large"), (422, "Unprocessable Content")]
)
def test_status_has_its_reason_phrase(status, phrase):
    assert reason(status) == phrase


def test_headers_of_a_request():
    head = b"GET / HTTP/1.1\r\nHost:x:80\r\nA: 1 \r\nEmpty:\r\na:\t2\r\nName: caf\xe9\r\n\r\n"
    assert RequestHead(head).fields == {
        "host": "x:80",
        "a": "1, 2",
        "empty": "",
        "name": "caf\xe9",
    }


# ---- faults

ANY_TEXT = st.text(st.characters())  # halves of surrogate pairs too


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_problem_detail_takes_any_text(detail, pointer, fault):
    document = orjson.loads(problem(422, detail, errors=[{"pointer": pointer, "detail": fault}]).body)
    for told, text in (
        (document["detail"], detail),
        *zip(document["errors"][0].values(), (pointer, fault), strict=True),
    ):
        assert told == re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def broken_snapshot():
    raise ZeroDivisionError("of a test")


@pytest.mark.parametrize(("method", "target"), [("GET", "/stats"), ("GET", "/metrics"), ("PATCH", "/analyzers/A1")])
def test_exception_gets_500_and_is_logged(method, target):
    with capture_logs() as lines:
        response = ask(Api(broken_snapshot), method, target)
    assert_problem(response, 500)
    assert [(line["error"], line["log_level"]) for line in lines] == [("of a test", "error")]
    assert isinstance(lines[0]["exc_info"], ZeroDivisionError)


def test_same_exceptions_are_logged_rarely(monkeypatch):
    def other():
        raise ZeroDivisionError("of another place")

    api = Api(broken_snapshot)
    with capture_logs() as lines:
        for snapshot in (broken_snapshot, other, broken_snapshot, other):
            api.snapshot = snapshot
            assert_problem(ask(api, "GET", "/stats"), 500)
    assert [line["error"] for line in lines] == ["of a test", "of another place"]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + LOG_INTERVAL)
    with capture_logs() as lines:
        ask(api, "GET", "/stats")
    assert [line["error"] for line in lines] == ["of another place"]


# ---- two addresses (admin.listen)


PATHS = ["/", "/dashboard/app.js", "/stats", "/queue", "/analyzers", "/metrics", "/openapi.json", "/admin/reload"]


@pytest.mark.parametrize("path", PATHS)
def test_views_are_at_their_own_address(block, path):
    def snapshot():
        return Snapshot(block, CONFIG, ANALYZERS, "1.2.3")

    response = ask(Api(snapshot, at="packets"), "GET", path)
    assert response.status == 404
    assert "admin.listen" in orjson.loads(response.body)["detail"]
    views, both = ask(Api(snapshot, at="views"), "GET", path), ask(Api(snapshot), "GET", path)
    assert (views.status, views.headers) == (both.status, both.headers)


@pytest.mark.parametrize("at", ["packets", "views"])
def test_both_addresses_tell_of_health(block, at):
    def snapshot():
        return Snapshot(block, CONFIG, ANALYZERS, "1.2.3")

    api = Api(snapshot, at=at)
    for path in ("/health", "/ready"):
        assert ask(api, "GET", path).status == ask(Api(snapshot), "GET", path).status
    logs = ask(api, "GET", "/logs")
    assert logs.status == (405 if at == "packets" else 404)
    allowed = header(ask(api, "OPTIONS", "*"), "Allow")
    assert ("PATCH" in allowed) == (at == "views")
