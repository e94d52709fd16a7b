"""Every answer that is described is given, and given as it is described: path by path, status by status."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from openapi_description import AGENTS, METHODS, PATHS, check_answer, concrete, resolved
from support import BODY, request, wait_until

from fastdist.storage.directory import ring_path

OPERATIONS = [(name.upper(), path) for path, item in PATHS.items() for name in item if name in METHODS]
DESCRIBED = {
    f"{name.upper()} {path} {status}"
    for path, item in PATHS.items()
    for name, operation in item.items()
    if name in METHODS
    for status in operation["responses"]
}
PAGE = {"Origin": "https://elsewhere.example"}
ADMIN = {"Authorization": "Bearer for-changes"}
CHANGES = [("PATCH", "/analyzers/A1"), ("DELETE", "/analyzers/A1/override"), ("POST", "/admin/reload")]


def send(port, data):
    """Send to a connection of its own; return what comes until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def take_apart(answer):
    """Return status, headers and body of the only answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body


@pytest.fixture
def seen():
    return set()


@pytest.fixture
def ask(seen):
    """Return ``ask(status, port, method, path, ...)``: the answer must have that status, and be as described."""

    def ask(status, port, method, path, body=None, headers=None):  # noqa: PLR0913, PLR0917  (as request, and a status)
        given, answered, content = request(port, method, path, body, headers)
        assert given == status, (method, path, given, content)
        seen.add(check_answer(method, path, given, answered, content))
        return json.loads(content) if answered.get("content-type", "").endswith("json") and content else content

    return ask


def broken_in_every_way(port, seen):
    """What can happen to any request, for each operation."""

    def one(method, path, status):
        start = f"{method} {concrete(path)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        data = {
            400: f"{start}A\r\n\r\n",
            408: f"{start}Content-Length: 5\r\n\r\n",
            413: f"{start}Content-Length: 99999999\r\n\r\n",
            417: f"{start}Expect: more\r\n\r\n",
            431: f"{start}A: {'a' * 20_000}\r\n\r\n",
            501: f"{start}Transfer-Encoding: gzip, chunked\r\n\r\n",
            505: start.replace("HTTP/1.1", "HTTP/2.0") + "\r\n",
        }[status]
        given, headers, body = take_apart(send(port, data.encode()))
        assert given == status, (method, path, given, body)
        return check_answer(method, path, given, headers, body)

    with ThreadPoolExecutor(8) as threads:  # those that linger count among max_connections, too
        cases = [(*each, status) for each in OPERATIONS for status in (400, 408, 413, 417, 431, 501, 505)]
        seen.update(threads.map(lambda case: one(*case), cases))


def too_many(port, seen):
    """What a client that comes too late gets, whatever it asks."""
    inside = []
    try:
        for _ in range(20):
            inside.append(socket.create_connection(("127.0.0.1", port), timeout=20))
            inside[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert inside[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
        status, headers, body = take_apart(send(port, b""))
        for method, path in OPERATIONS:
            seen.add(check_answer(method, path, status, headers, body))
    finally:
        for connection in inside:
            connection.close()
    wait_until(lambda: request(port, "GET", "/health")[0] == 200, "room for others")


def looks(port, ask):
    """What has no body to send, of a service where all is well."""
    for method, path in OPERATIONS:
        if method in ("GET", "HEAD"):
            ask(200, port, method, concrete(path))
        elif method == "OPTIONS":
            ask(204, port, method, concrete(path))
            preflight = {"Origin": "https://ops.example", "Access-Control-Request-Method": "PATCH"}
            ask(204, port, method, concrete(path), headers=preflight)
    assert "# EOF" in ask(200, port, "GET", "/metrics", headers={"Accept": "application/openmetrics-text"}).decode()
    for path in ("/analyzers/A9", "/analyzers/A9/override"):
        ask(404, port, "OPTIONS", path)


def pages(port, ask):
    """The dashboard's files, held and unknown."""
    for method, path in OPERATIONS:
        if path in ("/", "/dashboard/{file}") and method in ("GET", "HEAD"):
            etag = request(port, "GET", concrete(path))[1]["etag"]
            ask(304, port, method, concrete(path), headers={"If-None-Match": etag})
            if "{file}" in path:
                ask(404, port, method, "/dashboard/nothing.js")
    ask(404, port, "OPTIONS", "/dashboard/nothing.js")


def packets(mocks, port, ask):
    """POST /logs, with every outcome that needs no limit."""
    json_type = {"Content-Type": "application/json"}
    ask(202, port, "POST", "/logs", BODY, json_type | {"Origin": "https://ops.example"})
    ask(200, port, "POST", "/logs", BODY, json_type | {"Prefer": "wait=20"})
    for body in (b"", b"{", b'{"emitterId":1,"messages":[]}'):
        ask(400, port, "POST", "/logs", body, json_type)
    ask(415, port, "POST", "/logs", BODY, {"Content-Type": "text/plain"})
    ask(415, port, "POST", "/logs", BODY, json_type | {"Content-Encoding": "br"})
    mocks.set_all(status=400)
    ask(502, port, "POST", "/logs", BODY, json_type | {"Prefer": "wait=20"})
    mocks.set_all(status=200)


def changes(fastdist, ask):
    """What administrators ask for, on this machine."""
    port = fastdist.port
    assert ask(200, port, "PATCH", "/analyzers/A1", b'{"state":"draining"}')["state"] == "draining"
    ask(200, port, "DELETE", "/analyzers/A1/override")
    ask(400, port, "PATCH", "/analyzers/A1", b"{")
    ask(415, port, "PATCH", "/analyzers/A1", b"{}", {"Content-Encoding": "gzip"})
    ask(422, port, "PATCH", "/analyzers/A1", b'{"weight":-1,"colour":"red"}')
    ask(404, port, "PATCH", "/analyzers/A9", b"{}")
    ask(404, port, "DELETE", "/analyzers/A9/override")
    for method, path in CHANGES:
        ask(403, port, method, path, b"{}", PAGE)
    for name in ("A1", "A2", "A3", "A4"):
        ask(422 if name == "A4" else 200, port, "PATCH", f"/analyzers/{name}", b'{"state":"draining"}')
    for name in ("A1", "A2", "A3"):
        ask(200, port, "DELETE", f"/analyzers/{name}/override")
    in_the_way = fastdist.folder / "data" / "overrides.new"
    in_the_way.mkdir()
    ask(503, port, "PATCH", "/analyzers/A1", b'{"weight":1}')
    ask(503, port, "DELETE", "/analyzers/A1/override")
    in_the_way.rmdir()


def reloads(fastdist, ask):
    """Reloading, and an override that the new configuration cannot do without."""
    port, text = fastdist.port, fastdist.config.read_text()
    fastdist.config.write_text(text.replace("weight = 0.1", "weight = -1"))
    ask(422, port, "POST", "/admin/reload")
    none = text
    for weight in ("0.1", "0.4", "0.2", "0.3"):
        none = none.replace(f"weight = {weight}\n", f"weight = {0 if weight != '0.1' else 0.1}\n")
    fastdist.config.write_text(none)
    assert ask(200, port, "POST", "/admin/reload")["needsRestart"] == []
    ask(200, port, "PATCH", "/analyzers/A2", b'{"weight":1}')
    ask(200, port, "PATCH", "/analyzers/A1", b'{"weight":0}')
    ask(422, port, "DELETE", "/analyzers/A2/override")
    fastdist.config.write_text(text)
    ask(200, port, "POST", "/admin/reload")
    for name in ("A1", "A2"):
        ask(200, port, "DELETE", f"/analyzers/{name}/override")


def damaged_in_the_queue(mocks, fastdist, ask):
    """A packet that waits for its delivery; it is so large that nothing of it is kept in memory."""
    mocks.set_all(status=503)
    body = json.dumps({"emitterId": "e", "messages": [{"message": "damaged " * 10_000}]}).encode()
    headers = {"Content-Type": "application/json", "Prefer": "wait=60"}
    ring = ring_path(fastdist.folder / "data", 0)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, 500, fastdist.port, "POST", "/logs", body, headers)
        wait_until(lambda: b"damaged " * 10_000 in ring.read_bytes(), "the packet is queued")
        with ring.open("r+b") as file:
            file.seek(ring.read_bytes().index(b"damaged " * 10_000))
            file.write(b"DAMAGED")
        answer.result()
    mocks.set_all(status=200)


@pytest.mark.slow
def test_each_described_response_is_given(mocks, serve, ask, seen):
    timeouts = {"header_timeout": "10s", "body_timeout": "500ms", "max_connections": 20, "workers": 1}
    settings = {"server": timeouts, "security": {"cors_origins": ["https://ops.example"]}}
    settings["queue"] = {"durability": "disk"}
    fastdist = serve(mocks, settings)
    looks(fastdist.port, ask)
    pages(fastdist.port, ask)
    packets(mocks, fastdist.port, ask)
    changes(fastdist, ask)
    reloads(fastdist, ask)
    broken_in_every_way(fastdist.port, seen)
    too_many(fastdist.port, seen)
    damaged_in_the_queue(mocks, fastdist, ask)
    security = {"tokens": ["for-packets"], "admin_tokens": ["for-changes"]}
    fastdist.config.write_text(
        fastdist.config.read_text()
        .replace("[security]\n", "".join(["[security]\n", *(f"{k} = {json.dumps(v)}\n" for k, v in security.items())]))
        .replace("[queue]", "[limits]\nrate = 0.01\nburst = 3\n\n[queue]")
    )
    ask(200, fastdist.port, "POST", "/admin/reload")
    for method, path in CHANGES:
        ask(401, fastdist.port, method, path, b"{}")
        ask(401, fastdist.port, method, path, b"{}", {"Authorization": "Bearer for-packets"})
    ask(401, fastdist.port, "POST", "/logs", BODY)
    ask(401, fastdist.port, "POST", "/logs", BODY, {"Authorization": "Bearer wrong"})
    ask(202, fastdist.port, "POST", "/logs", BODY, {"Authorization": "Bearer for-packets"})
    ask(429, fastdist.port, "POST", "/logs", BODY, {"Authorization": "Bearer for-packets"})
    ask(200, fastdist.port, "POST", "/admin/reload", headers=ADMIN)
    assert seen == DESCRIBED


def test_undescribed_routes_follow_the_text(mocks, serve):
    fastdist = serve(mocks)
    assert request(fastdist.port, "GET", "/nothing")[0] == 404
    for path, item in PATHS.items():
        for method in ("GET", "PUT", "POST", "PATCH", "DELETE", "TRACE"):
            if method.lower() not in item:
                status, headers, _ = request(fastdist.port, method, concrete(path))
                assert status == 405
                assert headers["allow"].split(", ") == [name.upper() for name in item]


# ---- log agents


def requests_of_agents():
    """Yield method, path, body and media type of every request with records that is among the examples."""
    for path, item in AGENTS.items():
        for method, operation in item.items():
            for kind, media in resolved(operation.get("requestBody", {"content": {}}))["content"].items():
                for each in media.get("examples", {}).values():
                    value = each["value"]
                    yield method.upper(), path, value if isinstance(value, str) else json.dumps(value), kind


def operations_of_agents():
    """Yield method, path, and whether the request brings records."""
    for path, item in AGENTS.items():
        for method, operation in item.items():
            yield method.upper(), path, "requestBody" in operation


def test_agents_answers_are_as_described(mocks, serve):
    fastdist = serve(mocks, {"limits": {"rate": 1_000_000}})
    seen = set()

    def ask(method, path, body=None, headers=None):
        status, answered, content = request(fastdist.port, method, concrete(path), body, headers)
        seen.add(check_answer(method, path, status, answered, content))
        return status

    for method, path, body, kind in requests_of_agents():
        assert ask(method, path, body.encode(), {"Content-Type": kind}) in {200, 201, 204}
        assert ask(method, path, body.encode(), {"Content-Type": kind, "Prefer": "wait=5"}) in {200, 201, 204}
        assert ask(method, path, b"\xff", {"Content-Type": kind, "Content-Encoding": "gzip"}) == 400
        assert ask(method, path, b"x", {"Content-Type": kind, "Content-Encoding": "br"}) == 415
        assert ask(method, path, b"x", {"Content-Type": kind, "Expect": "cookies"}) == 417
        assert ask(method, path, b"", {"Content-Type": kind, "Content-Length": "99999999"}) == 413
        ask(method, path, b"\x90", {"Content-Type": "application/msgpack"})
    for kind, body in (("application/x-protobuf", b""), ("application/x-protobuf", b"\xff")):
        ask("POST", "/v1/logs", body, {"Content-Type": kind})
        ask("POST", "/loki/api/v1/push", body, {"Content-Type": kind})
    for method, path, with_records in operations_of_agents():
        if not with_records:
            assert ask(method, path) in {200, 400}
    assert {told.split()[-1] for told in seen} >= {"200", "201", "204", "400", "413", "415", "417"}


def test_agents_refusals_are_as_described(mocks, serve):
    fastdist = serve(mocks, {"security": {"tokens": ["one"]}, "server": {"protocols": ["json", "splunk", "otlp"]}})
    for method, path, with_records in operations_of_agents():
        for headers in ({}, {"Authorization": "Splunk wrong"}) if with_records else ():
            status, answered, content = request(fastdist.port, method, concrete(path), b"{}", headers)
            assert status in {401, 403, 404}
            check_answer(method, path, status, answered, content)
