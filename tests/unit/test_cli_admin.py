"""The commands reload and analyzers, and check --probe: what they say of each response, and their exit statuses."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from fakes import Distributor

RELOADED = {
    "status": "reloaded",
    "changed": [
        {"setting": "analyzers[A2].weight", "before": "4.0", "after": "5.0"},
        {"setting": "analyzers[A9]", "before": None, "after": "http://127.0.0.1:9/"},
    ],
    "masked": ["A2"],
    "needsRestart": ["server.port", "queue.capacity"],
}
ROW = {
    "id": "A1",
    "state": "online",
    "targetShare": 0.25,
    "actualShare": 0.5,
    "delivered": 7,
    "failed": 2,
    "retried": 1,
    "inFlight": 3,
    "weight": 0.2,
    "effectiveShare": 0.125,
    "lastError": None,
    "latencyMs": {},
}


@pytest.fixture
def answering():
    """Return ``answering(status, document)``: the URL of what answers every request with it."""
    servers = []

    def answering(status, document, **headers):
        server = Distributor()
        server.says = {}
        servers.append(server)
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        server.otherwise = (status, headers, body)
        return server

    yield answering
    for server in servers:
        server.shutdown()
        server.server_close()


def test_reload_prints_what_it_did(run, answering):
    server = answering(200, RELOADED)
    result = run("reload", "--url", server.url, FASTDIST_TOKEN="secret")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "the configuration was read again\n"
        "changed: analyzers[A2].weight: 4.0 -> 5.0\nchanged: analyzers[A9]: nothing -> http://127.0.0.1:9/\n"
        "masked: the weight of A2 in the file; `fastdist analyzers reset A2` puts it in force\n"
        "needs a restart: server.port\nneeds a restart: queue.capacity\n"
    )
    path, headers, _ = server.requests[0]
    assert (path, headers["Authorization"]) == ("/admin/reload", "Bearer secret")


def test_reload_prints_every_problem(run, answering):
    place = {"file": "/etc/x.toml", "line": 7}
    errors = [
        {"pointer": "", "detail": "server.port: must be >= 0"},
        {"pointer": "/a", "detail": "limits.rate:\n x"},
        {"pointer": "/analyzers/0/weight", "detail": "analyzers[0].weight: must be >= 0", **place},
        {"pointer": "/queue/capacity", "detail": "queue.capacity: too small"},
        {"pointer": "", "detail": "/etc/x.toml: line 7, column 5: no", **place},
    ]
    document = {"title": "Unprocessable Content", "status": 422, "detail": "the old one stays", "errors": errors}
    server = answering(422, document)
    result = run("reload", "--url", server.url)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == (
        f"fastdist: {server.url}: 422 (the old one stays)\n"
        "fastdist: server.port: must be >= 0\nfastdist: /a: limits.rate: x\n"
        "fastdist: analyzers[0].weight: must be >= 0 (/etc/x.toml:7)\nfastdist: queue.capacity: too small\n"
        "fastdist: /etc/x.toml: line 7, column 5: no\n"
    )


ASKED = "an admin token is needed"


@pytest.mark.parametrize(
    ("answer", "exits", "text"),
    [
        ((401, ASKED), 4, f"({ASKED}); give one by --token or FASTDIST_TOKEN"),
        ((401, ASKED, "--token", "t"), 4, f"({ASKED}); the token that was given is not one"),
        ((403, "from this machine only"), 4, "403 (from this machine only)"),
        ((404, "there is no analyzer 'B'; there are A1"), 4, "there is no analyzer 'B'; there are A1"),
        ((503, "the supervisor has not answered in time"), 1, "503 (the supervisor has not answered in time)"),
    ],
)
@pytest.mark.parametrize("command", [["reload"], ["analyzers", "drain", "B"], ["analyzers", "list"]])
def test_refusal_says_why_and_what_helps(run, answering, command, *, answer, exits, text):  # noqa: PLR0913
    status, detail, *options = answer
    server = answering(status, {"title": "x", "status": status, "detail": detail})
    result = run(*command, "--url", server.url, *options)
    assert result.exit_code == exits
    assert text in result.stderr
    assert result.stdout == ""


NESTED = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "answer", [(200, b"<html>"), (404, b"nginx"), (200, b"{}"), (500, b""), (200, NESTED), (404, NESTED)]
)
def test_other_servers_are_not_ours(run, answering, answer):
    server = answering(*answer)
    result = run("analyzers", "list", "--url", server.url)
    assert result.exit_code == (1 if answer[0] == 500 else 4)
    assert "is that the URL of a distributor?" in result.stderr


def test_what_is_no_http_is_shown_on_a_line(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection = listener.accept()[0]
            connection.recv(65536)
            connection.sendall(b"\x1b[2J\x00SSH\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = run("analyzers", "list", "--url", url)
        thread.join()
    assert (result.exit_code, result.stderr) == (1, f"fastdist: {url}: [2J SSH\n")
    assert "Traceback" not in result.output


def test_unreachable_is_no_refusal(run):
    for command in (["reload"], ["analyzers", "list"], ["analyzers", "reset", "A1"]):
        result = run(*command, "--url", "http://127.0.0.1:1")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "fastdist: http://127.0.0.1:1: Connection refused\n"


@pytest.mark.parametrize(
    ("words", "path", "body"),
    [
        (["drain", "A1"], "/analyzers/A1", {"state": "draining"}),
        (["online", "A1"], "/analyzers/A1", {"state": "online"}),
        (["weight", "A1", "0.2"], "/analyzers/A1", {"weight": 0.2}),
        (["weight", "A 1/?", "0"], "/analyzers/A%201%2F%3F", {"weight": 0.0}),
        (["reset", "A1"], "/analyzers/A1/override", None),
    ],
)
def test_changes_show_the_row_as_it_is_now(run, answering, words, path, body):
    server = answering(200, ROW | {"override": {"weight": 0.2}})
    result = run("analyzers", *words, "--url", server.url)
    assert (result.exit_code, result.stderr) == (0, "")
    asked, _, sent = server.requests[0]
    assert (asked, json.loads(sent) if sent else None) == (path, body)
    names, row = result.stdout.splitlines()
    assert names.split()[:3] == ["ID", "STATE", "WEIGHT"]
    assert row.split() == ["A1", "online", "0.2*", "25.0", "%", "12.5", "%", "50.0", "%", "7", "2", "3", "-"]


def test_list_shows_trouble_and_is_json_too(run, answering):
    trial = {"nextPacketInSeconds": 2.0}
    rows = [
        ROW | {"probation": trial},
        ROW | {"id": "A2", "state": "offline", "lastError": "HTTP 500,\n twice", "pausedForSeconds": 90.0},
        ROW | {"id": "A3", "override": {"state": "draining"}, "state": "draining", "unknownMember": 1},
    ]
    server = answering(200, {"analyzers": rows})
    lines = run("analyzers", "list", "--url", server.url).stdout.splitlines()
    assert lines[1].startswith("A1  online, on probation ")
    assert lines[2].startswith("A2  offline, paused for 2 min ")
    assert lines[2].endswith("HTTP 500, twice")
    assert lines[3].split()[:3] == ["A3", "draining", "0.2"]
    document = json.loads(run("analyzers", "list", "--json", "--url", server.url).stdout)
    assert [row["id"] for row in document["analyzers"]] == ["A1", "A2", "A3"]
    assert document["analyzers"][0]["probation"] == trial


@pytest.mark.parametrize("value", ["nan", "inf", "--", "x", "-1"])
def test_unusable_weight_is_not_sent(run, value):
    result = run("analyzers", "weight", "A1", value, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# ---- check --probe


class Analyzer(threading.Thread):
    """Answers each connection with the same bytes, and notes what it was asked."""

    def __init__(self, answer):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answer, self.asked = answer, []
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(65536))
                connection.sendall(self.answer)


@pytest.fixture
def analyzer():
    made = []

    def analyzer(status):
        made.append(Analyzer(b"HTTP/1.1 %d Status\r\nContent-Length: 0\r\n\r\n" % status))
        return made[-1]

    yield analyzer
    for each in made:
        each.listener.close()


def written(file, *analyzers):
    text = "[health]\ntimeout = '500ms'\n[delivery]\nconnect_timeout = '500ms'\n"
    for number, (endpoint, health) in enumerate(analyzers, 1):
        text += f"[[analyzers]]\nid = 'A{number}'\nendpoint = '{endpoint}'\nhealth = '{health}'\nweight = 1\n"
    file.write_text(text)
    return str(file)


def test_probe_has_a_line_for_each_analyzer(run, file, analyzer):
    good, bad, silent = analyzer(204), analyzer(503), socket.create_server(("127.0.0.1", 0))
    place = "http://127.0.0.1:"
    gone = socket.create_server(("127.0.0.1", 0))
    closed = gone.getsockname()[1]
    gone.close()
    path = written(
        file,
        (f"{place}{good.port}/analyze", "/health?key=secret"),
        (f"{place}{bad.port}/analyze", "/health"),
        (f"{place}{silent.getsockname()[1]}/analyze", "/health"),
        (f"{place}{closed}/analyze", "/health"),
        ("http://nowhere.invalid/analyze", "/health"),
        (f"{place}{closed}/analyze?key=secret", f"{place}{good.port}/up"),
        (f"{place}{bad.port}/other", f"{place}{good.port}/up"),
    )
    result = run("check", path, "--probe")
    silent.close()
    assert result.exit_code == 1, result.output
    assert result.stdout.splitlines()[1:] == [
        f"A1: ok: {place}{good.port}/health?... (127.0.0.1) answers 204",
        f"A7: ok: {place}{good.port}/up (127.0.0.1) answers 204",
    ]
    lines = result.stderr.splitlines()
    assert lines[0] == f"A2: FAILED: {place}{bad.port}/health (127.0.0.1): HTTP 503"
    assert lines[1].endswith("(127.0.0.1): no answer within 0.5 s")
    assert lines[2] == f"A4: FAILED: {place}{closed}/health (127.0.0.1): connection refused"
    assert lines[3].startswith(
        "A5: FAILED: http://nowhere.invalid/health: the name nowhere.invalid cannot be looked up: "
    )
    assert lines[4] == f"A6: FAILED: {place}{closed}/analyze?...: connection refused"
    assert "secret" not in result.output
    assert any(request.startswith(b"GET /health?key=secret ") for request in good.asked), "it is sent all the same"


def test_probe_of_healthy_analyzers_exits_0(run, file, analyzer):
    good = analyzer(200)
    path = written(file, (f"http://127.0.0.1:{good.port}/analyze", "/health"))
    result = run("check", path, "--probe")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(good.asked) == 1, "each is asked once"
    assert good.asked[0].startswith(b"GET /health HTTP/1.1\r\n")


def test_probe_of_a_bad_config_asks_nothing(run, file):
    file.write_text("[server]\nport = -1\n")
    result = run("check", str(file), "--probe")
    assert (result.exit_code, result.stderr) == (2, f"server.port: must be >= 0 ({file}:2)\n")
