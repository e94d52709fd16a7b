"""``admin.listen``: an address of their own for views, metrics and changes; the other one serves packets."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import sys

import pytest
import trustme
from support import BODY, ROOT, Emitter, free_port, get_json, kill_worker, request, wait_until

from fastdist.supervisor.main import CANNOT_START

FASTDIST = [sys.executable, "-m", "fastdist"]
ADMIN = {"admin": {"listen": "127.0.0.1:0"}}
VIEWS = ["/", "/dashboard/app.js", "/stats", "/queue", "/analyzers", "/metrics", "/openapi.json"]


def test_each_address_serves_its_own(mocks, serve):
    fastdist = serve(mocks, ADMIN)
    packets, views = fastdist.port, fastdist.views_port
    assert packets != views
    for path in VIEWS:
        assert request(views, "GET", path)[0] == 200, path
        status, _, body = request(packets, "GET", path)
        assert (status, "admin.listen" in json.loads(body)["detail"]) == (404, True), path
    for path in ("/health", "/ready"):
        assert request(views, "GET", path)[0] == request(packets, "GET", path)[0] == 200
    assert Emitter(packets).send(100).count(202) == 100
    assert fastdist.wait_at_rest()["packets"]["accepted"] == 100


@pytest.mark.parametrize("durability", ["memory", "disk", "fsync"])
def test_changes_are_made_at_admin_address(mocks, serve, durability):
    fastdist = serve(mocks, ADMIN | {"queue": {"durability": durability}})
    change = ("PATCH", "/analyzers/A1", b'{"weight": 0.7}')
    assert request(fastdist.port, *change)[0] == 404
    assert request(fastdist.port, "POST", "/admin/reload")[0] == 404
    assert request(fastdist.port, "DELETE", "/analyzers/A1/override")[0] == 404
    assert fastdist.analyzers()["A1"]["weight"] == 0.1
    assert request(fastdist.views_port, *change)[0] == 200
    assert fastdist.analyzers()["A1"]["weight"] == 0.7
    assert request(fastdist.views_port, "POST", "/admin/reload")[0] == 200


def test_no_packet_is_taken_at_admin_address(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"security": {"tokens": ["secret"]}, "limits": {"rate": 1}})
    for path in ("/logs", "/ingest", "/v1/logs", "/_bulk"):
        for headers in ({}, {"Content-Type": "text/plain"}, {"Authorization": "Bearer secret"}):
            status, _, body = request(fastdist.views_port, "POST", path, BODY, headers)
            assert (status, json.loads(body)["status"]) == (404, 404)
    with socket.create_connection(("127.0.0.1", fastdist.views_port), timeout=20) as connection:
        connection.sendall(b"what is this\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert fastdist.stats()["packets"]["received"] == 0, "nor is one refused"


def test_emitters_cannot_fill_it(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": {"max_connections": 1, "workers": 1}})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(b"POST /logs HTTP/1.1\r\n")

        def rejected():
            with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as other:
                return other.recv(65536).startswith(b"HTTP/1.1 503 ")

        wait_until(rejected, "all connections are taken")
        assert get_json(fastdist.views_port, "/stats")["packets"]["accepted"] == 0


def test_admin_address_has_a_bound_too(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": {"workers": 1}})
    opened = [socket.create_connection(("127.0.0.1", fastdist.views_port), timeout=20) for _ in range(256)]
    for connection in opened:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert request(fastdist.views_port, "GET", "/health")[0] == 503
    assert fastdist.post()[0] == 202
    for connection in opened:
        connection.close()
    wait_until(lambda: request(fastdist.views_port, "GET", "/health")[0] == 200, "there is room again")


def test_it_is_served_until_a_drain_ends(mocks, serve):
    mocks.set_all(latency=1.0)
    fastdist = serve(mocks, ADMIN | {"server": {"workers": 1}, "delivery": {"connections": 1}})
    emitter = Emitter(fastdist.port).send(16)
    fastdist.signal(signal.SIGTERM)
    fastdist.line_with("draining")

    def draining():
        return request(fastdist.views_port, "GET", "/ready")[0] == 503

    wait_until(draining, "it says so")
    stats = get_json(fastdist.views_port, "/stats")
    assert stats["packets"]["queued"] + stats["packets"]["inFlight"] > 0
    assert fastdist.wait() == 0
    assert emitter.count(202) == len(mocks.delivered()) == 16


def test_a_new_worker_serves_it_again(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": {"workers": 1}})
    kill_worker(fastdist.worker_pids()[0])
    assert fastdist.stats()["workers"][0]["restarts"] == 1, "a connection waits for its successor"


@pytest.mark.parametrize("tls", ["on", "off"])
def test_tls_is_optional_at_admin_address(mocks, serve, tmp_path, tls):
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    (tmp_path / "key.pem").write_bytes(pair.private_key_pem.bytes())
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    fastdist = serve(mocks, {"security": files, "admin": {"listen": "127.0.0.1:0", "tls": tls}})
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())

    def ask(port, path, *, secure):
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind("127.0.0.1", port, timeout=20, **({"context": context} if secure else {}))
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    assert ask(fastdist.port, "/ready", secure=True)[0] == 200
    assert ask(fastdist.views_port, "/metrics", secure=tls == "on")[0] == 200
    url = json.loads(fastdist.line_with("fastdist is ready"))["admin"]
    assert url == f"http{'s' if tls == 'on' else ''}://127.0.0.1:{fastdist.views_port}"
    if tls == "on":
        before = ask(fastdist.views_port, "/health", secure=True)
        authority_2 = trustme.CA()
        pair = authority_2.issue_cert("127.0.0.1")
        (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
        (tmp_path / "key.pem").write_bytes(pair.private_key_pem.bytes())
        fastdist.signal(signal.SIGHUP)
        fastdist.line_with("configuration reloaded")
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(fastdist.views_port, "/health", secure=True)
        context = ssl.create_default_context(cadata=authority_2.cert_pem.bytes().decode())
        assert ask(fastdist.views_port, "/health", secure=True)[0] == before[0] == 200
    fastdist.kill_all()


def test_port_that_is_taken_ends_the_start(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "fastdist.toml"
        file.write_text(
            f'[server]\nport = 0\n[admin]\nlisten = "127.0.0.1:{port}"\n[queue]\npath = "{tmp_path}/data"\n'
        )
        process = run(*FASTDIST, "serve", "--config", file)
        assert process.wait() == CANNOT_START
        assert process.lines[-1] == f'fastdist: cannot listen on "127.0.0.1" port {port}: Address already in use'


def test_containers_health_check_asks_there(mocks, serve, run):
    listen = {"admin": {"listen": f"127.0.0.1:{free_port()}"}}
    fastdist = serve(mocks, listen | {"server": {"trusted_proxies": ["127.0.0.1"], "proxy_protocol": "on"}})
    check = (sys.executable, ROOT / "deploy" / "docker" / "healthcheck.py")
    process = run(*check, FASTDIST_CONFIG=str(fastdist.config))
    assert process.wait() == 0, process.output
    assert json.loads(process.lines[0])["status"] == "ok"
    fastdist.stop()
    assert run(*check, FASTDIST_CONFIG=str(fastdist.config)).wait() == 1


def test_health_check_outlasts_a_broken_file(mocks, serve, run, tmp_path):
    """What runs was started with a better one."""
    fastdist = serve(mocks)
    broken = tmp_path / "broken.toml"
    broken.write_text("[server]\nports = 1\n")
    check = (sys.executable, ROOT / "deploy" / "docker" / "healthcheck.py")
    process = run(*check, FASTDIST_CONFIG=str(broken), FASTDIST_SERVER__PORT=str(fastdist.port))
    assert process.wait() == 0, process.output
    assert "server.ports: unknown key" in process.output


def test_commands_reach_it(mocks, serve, run):
    fastdist = serve(mocks, ADMIN)
    url = f"http://127.0.0.1:{fastdist.views_port}"
    for command in (["top", "--once"], ["analyzers", "list"], ["reload"]):
        process = run(*FASTDIST, *command, "--url", url)
        assert process.wait() == 0, process.output
    wrong = run(*FASTDIST, "top", "--once", "--url", f"http://127.0.0.1:{fastdist.port}")
    assert wrong.wait() == 1
    assert "/stats is answered 404: there is nothing at this path here" in wrong.lines[-1]
    assert wrong.lines[-1].endswith("figures and changes are at the address of admin.listen")
