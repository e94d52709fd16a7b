"""Settings of single analyzers in a running service: credentials, limits, TLS, and what a reload makes of them."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import resource
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from recorder import Recorder
from support import ROOT, Emitter, compare, get_json, kill_worker, request, wait_until

PRIVATE, PUBLIC = trustme.CA(), trustme.CA()
SECRET = b"Bearer \xe2\x82\xac s3cret-of-a-test"
PATHS = ("/stats", "/analyzers", "/metrics", "/health", "/ready", "/queue", "/nothing")


@pytest.fixture
def record():
    """Return ``record(context, ...)``: an analyzer that keeps what it is sent."""
    with contextlib.ExitStack() as stack:

        def record(*context, **options):
            return stack.enter_context(contextlib.closing(Recorder(*context, **options)))

        yield record


def reload(fastdist, text=None):
    if text is not None:
        fastdist.config.write_text(text)
    status, _, body = request(fastdist.port, "POST", "/admin/reload")
    return status, json.loads(body)


def send(fastdist, count, **headers):
    for _ in range(count):
        assert fastdist.post(**headers)[0] == 202


# ---- headers and credentials


class Guarded:
    """A distributor whose analyzer wants credentials: in a file, from the environment, in the configuration."""

    def __init__(self, serve, record, folder, mode="single"):
        self.analyzer, self.other, self.token = record(), record(), folder / "credential"
        self.token.write_bytes(SECRET + b"\n")
        headers = (
            f'Authorization = {{ file = "{self.token}" }}\nX-Env = {{ env = "A1_TOKEN" }}\n'
            'X-Literal = "s3cret-of-a-test literal"\n'
        )
        self.fastdist = serve(
            {"A1": f"{self.analyzer.endpoint}?key=s3cret-of-a-test", "A2": self.other.endpoint},
            {"delivery": {"mode": mode}},
            weights={"A1": 1, "A2": 0},
            own={"A1": f"[analyzers.headers]\n{headers}"},
            A1_TOKEN="s3cret-of-a-test env",
        )

    def check(self, requests, value):
        """Each of them has the credentials, byte for byte."""
        assert requests
        for received in requests:
            assert received.values(b"authorization") == [value]
            assert received.values(b"x-env") == [b"s3cret-of-a-test env"]
            assert received.values(b"x-literal") == [b"s3cret-of-a-test literal"]
            assert len(received.values(b"host")) == 1

    def send(self, count):
        """Return the requests that so many packets came in."""
        before = len(self.analyzer.packets)
        send(self.fastdist, count)
        self.fastdist.wait_at_rest()
        return self.analyzer.packets[before:]


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_credentials_arrive_and_are_renewed(serve, record, tmp_path, mode):
    it = Guarded(serve, record, tmp_path, mode)
    sent = it.send(20)
    it.check(sent, SECRET)
    assert all(received.lines[0].startswith(b"POST /analyze?key=s3cret-of-a-test ") for received in sent)
    assert len(it.analyzer.ids) == len(set(it.analyzer.ids)) == 20
    wait_until(lambda: it.analyzer.checks, "a check")
    it.check(it.analyzer.checks, SECRET)
    wait_until(lambda: it.other.checks, "a check of the other")
    assert not any(received.values(b"authorization") for received in it.other.checks)
    it.token.write_bytes(b"Bearer renewed-s3cret-of-a-test")
    assert reload(it.fastdist)[0] == 200
    it.check(it.send(5), b"Bearer renewed-s3cret-of-a-test")
    checks = len(it.analyzer.checks)
    wait_until(lambda: len(it.analyzer.checks) > checks + 1, "more checks")
    it.check(it.analyzer.checks[-1:], b"Bearer renewed-s3cret-of-a-test")


def test_credentials_are_shown_nowhere(serve, record, tmp_path):
    """Not where they are wrong, and not where the analyzer sends them back."""
    it = Guarded(serve, record, tmp_path)
    fastdist = it.fastdist
    it.analyzer.answer = lambda received: (422, b"\r\n".join(received.lines))
    it.send(3)
    assert len(fastdist.dead_letters()) == 3
    it.analyzer.answer = lambda received: (302, b"\r\n".join(received.lines))
    send(fastdist, 3)
    wait_until(lambda: "HTTP 302" in (fastdist.analyzers()["A1"]["lastError"] or ""), "the error")
    it.token.write_bytes(b"s3cret-of-a-test\r\nHost: other")
    status, refused = reload(fastdist)
    assert status == 422
    assert refused["errors"][0]["detail"].startswith(f"analyzers[0].headers.Authorization: {it.token} holds a line end")
    fastdist.line_with("the new configuration cannot be used")
    it.analyzer.answer = lambda _received: (200, b"")
    it.token.write_bytes(SECRET)
    shown = [
        subprocess.run(
            [sys.executable, "-m", "fastdist", command, str(fastdist.config)],
            cwd=ROOT,
            env={"A1_TOKEN": "s3cret-of-a-test env"},
            capture_output=True,
            text=True,
            check=True,
        )
        for command in ("config", "check")
    ]
    texts = [request(fastdist.port, "GET", path)[2].decode() for path in PATHS]
    texts += [json.dumps(refused), fastdist.output, *(done.stdout + done.stderr for done in shown)]
    texts += [file.read_bytes().decode("latin-1") for file in (tmp_path / "data").rglob("*") if file.is_file()]
    for text in texts:
        assert "s3cret" not in text, text
    assert "/analyze?..." in shown[0].stdout
    assert fastdist.analyzers()["A1"]["endpoint"].endswith("/analyze?...")


@pytest.mark.parametrize(
    "lines",
    ['X = "a\\r\\nHost: b"', 'Content-Length = "3"', 'Host = "b"', 'Transfer-Encoding = "chunked"', 'X-Attempt = "9"'],
)
def test_check_refuses_unusable_headers(run, tmp_path, lines):
    config = tmp_path / "fastdist.toml"
    config.write_text(f'[[analyzers]]\nid = "a"\nendpoint = "http://h/"\nweight = 1\n[analyzers.headers]\n{lines}\n')
    checked = run(sys.executable, "-m", "fastdist", "check", config)
    assert checked.wait() == 2
    assert checked.line_with(f"analyzers[0].headers.{lines.split()[0]}: ")


def test_tokens_in_files_are_asked_for(mocks, serve, tmp_path):
    for name in ("tokens", "admin"):
        (tmp_path / name).write_text(f"# {name}\nfirst-{name}\n")
    files = {"tokens_file": str(tmp_path / "tokens"), "admin_tokens_file": str(tmp_path / "admin")}
    fastdist = serve(mocks, {"security": files})

    def status(token):
        return fastdist.post(Authorization=f"Bearer {token}")[0]

    def renew(token):
        return request(fastdist.port, "POST", "/admin/reload", headers={"Authorization": f"Bearer {token}"})[0]

    assert (fastdist.post()[0], status("first-tokens"), status("first-admin")) == (401, 202, 401)
    (tmp_path / "tokens").write_text("second-tokens\nthird-tokens\n")
    (tmp_path / "admin").write_text("second-admin\n")
    assert status("second-tokens") == 401
    assert (renew("first-tokens"), renew("second-admin"), renew("first-admin")) == (401, 401, 200)
    assert [status(token) for token in ("first-tokens", "second-tokens", "third-tokens")] == [401, 202, 202]
    (tmp_path / "tokens").write_text("")
    assert renew("first-admin") == 401
    assert renew("second-admin") == 422
    assert (fastdist.post()[0], status("second-tokens")) == (401, 202)
    for word in ("first-", "second-", "third-"):
        assert word not in fastdist.output
        assert all(word.encode() not in request(fastdist.port, "GET", path)[2] for path in PATHS)


# ---- limits of one


def test_slow_analyzer_has_its_own_limits(mocks, serve, record):
    """It takes 6 s, and may: it keeps its share, and gets nothing twice."""
    slow = record(latency=6.0)
    endpoints = {"slow": slow.endpoint, "A1": mocks.endpoints["A1"], "A2": mocks.endpoints["A2"]}
    fastdist = serve(
        endpoints,
        weights={"slow": 0.1, "A1": 0.5, "A2": 0.4},
        own={"slow": 'timeout = "20s"\nconnections = 4\n'},
    )
    emitter = Emitter(fastdist.port, connections=1, pause=0.2).start()
    states = []
    while emitter.count(202) < 100:
        states.append(fastdist.analyzers()["slow"]["state"])
        time.sleep(0.1)
    emitter.stop()
    stats = fastdist.wait_at_rest()
    assert set(states) == {"online"}
    assert "offline" not in fastdist.output
    assert (stats["packets"]["retried"], stats["packets"]["deadLettered"]) == (0, 0)
    assert slow.peak_open <= 4 * len(stats["workers"])
    delivered = mocks.delivered()
    assert len(slow.ids) == len(set(slow.ids))
    assert not delivered.keys() & set(slow.ids)
    assert emitter.accepted == delivered.keys() | set(slow.ids)
    assert set(delivered.values()) == {1}
    assert abs(len(slow.ids) - len(emitter.accepted) / 10) <= len(stats["workers"]), (
        "its share, of each worker's packets"
    )

    mocks.set("A1", hang=True)
    send(fastdist, 8)
    wait_until(lambda: fastdist.analyzers()["A1"]["lastError"] == "no reply within 5 s", "the time-out of all others")
    assert fastdist.analyzers()["slow"]["lastError"] is None
    mocks.set("A1", hang=False)


def test_limits_change_on_reload(serve, record):
    analyzer = record(latency=0.2)
    fastdist = serve(
        {"A1": analyzer.endpoint}, {"server": {"workers": 1}}, weights={"A1": 1}, own={"A1": "connections = 2\n"}
    )

    def sent(count):
        analyzer.peak_open = analyzer.open
        before = len(analyzer.packets)
        for _ in range(count):
            assert fastdist.post()[0] == 202
        fastdist.wait_at_rest()
        return analyzer.packets[before:]

    text = fastdist.config.read_text()
    assert all(len(received.ids) == 1 for received in sent(12))
    assert analyzer.peak_open == 2
    assert reload(fastdist, text.replace("connections = 2", "connections = 6")) == (
        200,
        {
            "status": "reloaded",
            "changed": [{"setting": "analyzers[A1].connections", "before": "2", "after": "6"}],
            "masked": [],
            "needsRestart": [],
        },
    )
    sent(24)
    assert 2 < analyzer.peak_open <= 6
    assert reload(fastdist, text.replace("connections = 2", 'connections = 1\nmode = "batch"\npipeline = 3'))[0] == 200
    wait_until(lambda: analyzer.open <= 1, "connections beyond the limit are closed")
    batches = sent(24)
    assert analyzer.peak_open == 1
    assert all(received.values(b"X-Packet-Ids") for received in batches)
    assert len(batches) < 24
    assert reload(fastdist, text.replace("connections = 2", 'timeout = "300ms"'))[0] == 200
    analyzer.latency = 1.0
    assert fastdist.post()[0] == 202
    wait_until(lambda: fastdist.analyzers()["A1"]["lastError"] == "no reply within 0.3 s", "its new time-out")
    analyzer.latency = 0.0
    fastdist.wait_at_rest()


def test_changes_of_limits_lose_nothing(mocks, serve):
    """Under load, with requests in flight on connections that are replaced."""
    fastdist = serve(mocks, {"queue": {"durability": "disk"}}, own={"A2": "# its own\n"})
    text = fastdist.config.read_text()
    for name, latency in (("A1", 0.0), ("A2", 0.02)):
        mocks.set(name, latency=latency, jitter=latency)
    emitter = Emitter(fastdist.port, connections=32, pause=0.001).start()
    for pipeline, connections, mode in itertools.islice(
        itertools.cycle(itertools.product((1, 8, 3), (4, 1, 32), ("single", "batch"))), 30
    ):
        own = f'pipeline = {pipeline}\nconnections = {connections}\nmode = "{mode}"\n'
        assert reload(fastdist, text.replace("# its own\n", own))[0] == 200
        emitter.wait_for(50)
    emitter.stop()
    stats = fastdist.wait_at_rest()
    compare(emitter, mocks)
    assert stats["packets"]["deadLettered"] == 0
    assert [row["restarts"] for row in stats["workers"]] == [0, 0]
    assert "offline" not in fastdist.output


# ---- TLS


def context(authority, name, *, ends=None, client_authority=None):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    begins = datetime.now(UTC) - timedelta(days=2)
    authority.issue_cert(name, not_before=begins, not_after=ends).configure_cert(made)
    if client_authority is not None:
        made.verify_mode = ssl.CERT_REQUIRED
        client_authority.configure_trust(made)
    return made


def client_pair(folder, name="client"):
    """Write a client's certificate and key; return them as settings."""
    pair = PRIVATE.issue_cert("fastdist.example")
    (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    pair.private_key_pem.write_to_path(folder / f"{name}.key")
    return f'client_cert = "{folder}/{name}.pem"\nclient_key = "{folder}/{name}.key"\n'


def test_files_one_worker_rejects_are_void(serve, record, tmp_path):
    """It has no descriptor left for a moment, which loading a certificate takes: all keep what they had."""
    PRIVATE.cert_pem.write_to_path(tmp_path / "ca.pem")
    analyzer = record(context(PRIVATE, "127.0.0.1", client_authority=PRIVATE))
    own = f'ca_file = "{tmp_path}/ca.pem"\n{client_pair(tmp_path)}'
    fastdist = serve({"A1": analyzer.endpoint}, weights={"A1": 1}, own={"A1": own})
    pid = fastdist.worker_pids()[0]
    client_pair(tmp_path)
    connection = http.client.HTTPConnection("127.0.0.1", fastdist.port, timeout=20)
    connection.connect()  # before there are too few descriptors to accept it
    connection.request("GET", "/ready")
    connection.getresponse().read()
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    connection.request("POST", "/admin/reload")
    response = connection.getresponse()
    status, refused = response.status, json.loads(response.read())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    connection.close()
    assert status == 422
    assert "analyzer A1.client_cert: " in refused["errors"][0]["detail"]
    assert "Too many open files" in refused["errors"][0]["detail"]
    send(fastdist, 10)
    fastdist.wait_at_rest()
    assert reload(fastdist)[0] == 200
    send(fastdist, 10)
    fastdist.wait_at_rest()
    assert len(analyzer.ids) == len(set(analyzer.ids)) == 20
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0, 0]


def certificate_ends(fastdist):
    """Return {labels: when it expires} of the metric."""
    _, _, text = request(fastdist.port, "GET", "/metrics")
    name = "fastdist_tls_certificate_not_after_timestamp_seconds"
    lines = [line.removeprefix(name) for line in text.decode().splitlines() if line.startswith(name)]
    return {line.split()[0]: float(line.split()[1]) for line in lines}


def test_private_authority_and_certificate(serve, record, tmp_path):
    """Beside an analyzer with a certificate of a public authority; a reload brings what was missing."""
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(days=9)
    private = record(context(PRIVATE, "analyzer.example", ends=ends, client_authority=PRIVATE))
    public = record(context(PUBLIC, "127.0.0.1", ends=ends + timedelta(days=300)))
    PRIVATE.cert_pem.write_to_path(tmp_path / "private.pem")
    PUBLIC.cert_pem.write_to_path(tmp_path / "public.pem")
    soon = ends - timedelta(days=2)
    client = PRIVATE.issue_cert("fastdist.example", not_before=soon - timedelta(days=30), not_after=soon)
    (tmp_path / "client.pem").write_bytes(b"".join(blob.bytes() for blob in client.cert_chain_pems))
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    fastdist = serve(
        {"A1": private.endpoint, "A2": public.endpoint},
        weights={"A1": 1, "A2": 1},
        own={"A1": f'ca_file = "{tmp_path}/private.pem"\nserver_name = "analyzer.example"\n'},
        SSL_CERT_FILE=str(tmp_path / "public.pem"),
    )
    fastdist.wait_for_state("A1", "offline")
    assert "TLS alert: certificate required" in fastdist.analyzers()["A1"]["lastError"]
    fastdist.wait_for_state("A2", "online")
    send(fastdist, 10)
    fastdist.wait_at_rest()
    assert (len(private.ids), len(public.ids)) == (0, 10)
    pair = f'client_cert = "{tmp_path}/client.pem"\nclient_key = "{tmp_path}/client.key"\n'
    text = fastdist.config.read_text()
    status, refused = reload(fastdist, text.replace("server_name", f"{pair}server_name").replace("client.key", "none"))
    assert status == 422
    assert refused["errors"][0]["detail"].startswith(f"analyzers[0].client_key: {tmp_path}/none cannot be read: ")
    assert reload(fastdist, text.replace("server_name", f"{pair}server_name"))[0] == 200
    fastdist.wait_for_state("A1", "online")
    fastdist.line_with("analyzers[0].client_cert: the certificate in ")
    send(fastdist, 20)
    fastdist.wait_at_rest()
    assert len(private.ids) + len(public.ids) == 30
    assert private.ids
    assert set(private.names_asked) == {"analyzer.example"}
    assert certificate_ends(fastdist) == {
        '{certificate="analyzer",analyzer="A1"}': ends.timestamp(),
        '{certificate="client",analyzer="A1"}': soon.timestamp(),
        '{certificate="analyzer",analyzer="A2"}': (ends + timedelta(days=300)).timestamp(),
    }
    assert get_json(fastdist.port, "/health")["analyzers"]["online"] == 2

    for name in ("private.pem", "client.pem", "client.key"):
        (tmp_path / name).unlink()
    pids = fastdist.worker_pids()
    for pid in pids:
        kill_worker(pid)
    wait_until(lambda: len({*fastdist.worker_pids()} - {*pids}) == len(pids), "workers were replaced")
    delivered = len(private.ids)
    send(fastdist, 20)
    fastdist.wait_at_rest()
    assert len(private.ids) > delivered, "they have what was read at the reload"
    assert fastdist.analyzers()["A1"]["failed"] == 0
