"""TLS: who is spoken to and how, certificates that change under open connections, and those who never finish."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from support import BODY, Distributor, kill_worker, wait_until

AUTHORITY = trustme.CA()
NEXT = trustme.CA()  # of the certificate that replaces the first


def write_pair(folder, authority=AUTHORITY, **options):
    """Put a certificate for 127.0.0.1 and its key in place, each in one step."""
    pair = authority.issue_cert("127.0.0.1", **options)
    for name, blobs in (("cert.pem", pair.cert_chain_pems), ("key.pem", [pair.private_key_pem])):
        (folder / f"{name}.new").write_bytes(b"".join(blob.bytes() for blob in blobs))
        (folder / f"{name}.new").rename(folder / name)


def client_context(authority=AUTHORITY):
    return ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())  # to trust others too takes long


class Secure(Distributor):
    """A distributor with a certificate; ``authority`` has signed it. ``pair``: options of its certificate."""

    def __init__(self, folder, mocks, settings=None, *, pair=None, **options):
        self.authority = AUTHORITY
        write_pair(folder, **(pair or {}))
        files = {"tls_cert": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}
        super().__init__(folder, mocks, {"security": files, **(settings or {})}, **options)

    def connect(self, context=None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=20, context=context or client_context(self.authority)
        )

    def ask(self, connection, method="GET", path="/health", body=None):
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()

    def once(self, method, path, body=None):
        connection = self.connect()
        try:
            return self.ask(connection, method, path, body)
        finally:
            connection.close()

    def stats(self):
        return json.loads(self.once("GET", "/stats")[1])

    def analyzers(self):
        return {row["id"]: row for row in json.loads(self.once("GET", "/analyzers")[1])["analyzers"]}


class WithRsa(Secure):
    """One with a key that ciphers of old work with."""

    def __init__(self, folder, mocks, settings=None):
        super().__init__(folder, mocks, settings, pair={"key_type": trustme.KeyType.RSA})


@pytest.fixture
def secure(start, tmp_path, mocks):
    """Return ``secure(settings)``: start a distributor with TLS."""

    def secure(settings=None, **options):
        return start(Secure, tmp_path, mocks, settings, **options)

    return secure


def handshake(port, context):
    """Return a TLS socket, or what the handshake failed with."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=20)
    try:
        return context.wrap_socket(raw, server_hostname="127.0.0.1")
    except (ssl.SSLError, ConnectionError) as error:
        raw.close()
        return error


# ---- what is spoken


def test_packets_over_tls_are_delivered(secure, mocks):
    fastdist = secure()
    assert json.loads(fastdist.line_with("fastdist is ready"))["url"].startswith("https://")
    connection = fastdist.connect()
    for _ in range(50):
        assert fastdist.ask(connection, "POST", "/logs", BODY)[0] == 202
    large = BODY[:-1] + b',"padding":"' + b"x" * 2_000_000 + b'"}'
    assert fastdist.ask(connection, "POST", "/logs", large)[0] == 202
    connection.close()
    fastdist.wait_at_rest()
    assert len(mocks.delivered()) == 51


def test_alpn_agrees_on_http_1_1(shared):
    fastdist = shared(kind=WithRsa)
    for offered, agreed in ((["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)):
        context = client_context()
        if offered:
            context.set_alpn_protocols(offered)
        with handshake(fastdist.port, context) as connection:
            assert connection.selected_alpn_protocol() == agreed


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_modern_tls_has_forward_secrecy(shared, version):
    fastdist = shared(kind=WithRsa)
    context = client_context()
    context.minimum_version = context.maximum_version = version
    with handshake(fastdist.port, context) as connection:
        name, protocol, bits = connection.cipher()
        assert protocol == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
        assert bits >= 128
        assert "GCM" in name or "CHACHA20" in name
        assert name.startswith(("ECDHE-", "TLS_"))
        assert connection.compression() is None


def weak_context(context, version, ciphers):
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


def handshake_with_a_lax_server(folder, version, ciphers):
    """What the handshake comes to where everything is allowed."""
    context = weak_context(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), version, "ALL:COMPLEMENTOFALL")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(listener.accept()[0], server_side=True) as connection,
            ):
                connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        result = handshake(listener.getsockname()[1], weak_context(client_context(), version, ciphers))
        if isinstance(result, ssl.SSLSocket):
            result.close()
        thread.join()
        return result


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize(
    ("version", "ciphers"),
    [
        (ssl.TLSVersion.TLSv1, "ALL"),
        (ssl.TLSVersion.TLSv1_1, "ALL"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE+AES:!AESGCM:!AESCCM"),  # text and its check apart
        (ssl.TLSVersion.TLSv1_2, "kRSA+AESGCM"),  # who gets the key later reads it all
    ],
)
def test_old_versions_and_ciphers_refused(shared, version, ciphers):
    fastdist = shared(kind=WithRsa)
    assert isinstance(handshake_with_a_lax_server(fastdist.folder, version, ciphers), ssl.SSLSocket), (
        "this tests nothing"
    )
    failure = handshake(fastdist.port, weak_context(client_context(), version, ciphers))
    assert isinstance(failure, ssl.SSLError | ConnectionError), failure
    assert fastdist.once("GET", "/health")[0] == 200


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PATCH", "OPTIONS", "get"])
def test_plain_http_is_answered_so(shared, method):
    fastdist = shared(kind=WithRsa)
    connection = http.client.HTTPConnection("127.0.0.1", fastdist.port, timeout=20)
    connection.request(method, "/logs", BODY if method == "POST" else None)
    response = connection.getresponse()
    body = response.read()
    headers = {name.lower() for name in response.headers}
    assert (response.status, response.headers["Connection"]) == (400, "close")
    assert {"date", "content-length", "content-type"} <= headers
    if method != "HEAD":
        assert "use https:// in the URL" in json.loads(body)["detail"]
    assert fastdist.once("GET", "/health")[0] == 200


def test_large_plain_request_gets_its_answer(shared):
    """What is still being sent when the response is there must not destroy it."""
    fastdist = shared(kind=WithRsa)
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(b"POST /logs HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n" + bytes(4_000_000))
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["status"] == 400


def test_send_says_that_the_scheme_is_wrong(shared, tmp_path):
    fastdist = shared(kind=WithRsa)
    (tmp_path / "app.log").write_text("a line\n")
    url = f"http://127.0.0.1:{fastdist.port}"
    command = [sys.executable, "-m", "fastdist", "send", str(tmp_path / "app.log"), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4
    assert f"stopped: {url} answers 400 " in done.stderr
    assert "use https:// in the URL" in done.stderr


def test_garbage_is_harmless(shared):
    fastdist = shared(kind=WithRsa)
    for data in (b"\x16\x03\x01\xff\xff" + bytes(3000), bytes(range(256))):
        with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
            connection.sendall(data)
            received = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
        assert b"HTTP/" not in received
        assert fastdist.once("GET", "/health")[0] == 200
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0, 0]
    assert "Traceback" not in fastdist.output


# ---- certificates that change


def reload(fastdist, connection):
    return fastdist.ask(connection, "POST", "/admin/reload")


def test_new_certificate_keeps_connections(secure, tmp_path):
    fastdist = secure()
    before = [fastdist.connect() for _ in range(16)]  # over both workers
    for connection in before:
        assert fastdist.ask(connection)[0] == 200
    half = before[0]
    half.putrequest("POST", "/logs")
    half.putheader("Content-Length", str(len(BODY)))
    half.endheaders(BODY[:20])
    write_pair(tmp_path, NEXT)
    assert reload(fastdist, before[1])[0] == 200
    fastdist.authority = NEXT
    half.send(BODY[20:])
    response = half.getresponse()
    assert response.status == 202, "a request under way was dropped"
    response.read()
    for connection in before:
        assert fastdist.ask(connection, "POST", "/logs", BODY)[0] == 202, "an open connection was dropped"
        connection.close()
    for _ in range(16):
        assert fastdist.once("POST", "/logs", BODY)[0] == 202
        assert isinstance(handshake(fastdist.port, client_context(AUTHORITY)), ssl.SSLCertVerificationError)
    assert fastdist.wait_at_rest()["packets"]["delivered"] == 33


@pytest.mark.parametrize("fault", ["no file", "garbage", "another key"])
def test_unusable_certificate_keeps_the_old(secure, tmp_path, fault):
    fastdist = secure()
    if fault == "no file":
        (tmp_path / "cert.pem").unlink()
    elif fault == "garbage":
        (tmp_path / "cert.pem").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    else:
        (tmp_path / "cert.pem").write_bytes(NEXT.issue_cert("127.0.0.1").cert_chain_pems[0].bytes())
    connection = fastdist.connect()
    status, body = reload(fastdist, connection)
    assert status == 422
    assert str(tmp_path / "cert.pem") in json.loads(body)["errors"][0]["detail"]
    for _ in range(10):
        assert fastdist.once("GET", "/health")[0] == 200
    write_pair(tmp_path, NEXT)
    assert reload(fastdist, connection)[0] == 200
    fastdist.authority = NEXT
    for _ in range(10):
        assert fastdist.once("GET", "/health")[0] == 200


@pytest.mark.parametrize("fault", ["another key", "no key", "an encrypted key"])
def test_start_without_certificate_says_why(run, tmp_path, fault):
    write_pair(tmp_path)
    key = tmp_path / "key.pem"
    if fault == "another key":
        key.write_bytes(AUTHORITY.issue_cert("127.0.0.1").private_key_pem.bytes())
    elif fault == "no key":
        key.unlink()
    else:
        command = ["openssl", "pkey", "-in", key, "-out", tmp_path / "locked.pem", "-aes256", "-passout", "pass:word"]
        subprocess.run(command, check=True, capture_output=True)
        (tmp_path / "locked.pem").rename(key)
    config = tmp_path / "fastdist.toml"
    config.write_text(
        f'[server]\nport = 0\n[queue]\ndurability = "memory"\npath = "{tmp_path}/data"\n'
        f'[security]\ntls_cert = "{tmp_path}/cert.pem"\ntls_key = "{key}"\n'
    )
    process = run(sys.executable, "-m", "fastdist", "serve", "--config", config)
    assert process.wait() == 2
    assert str(key) in process.output
    if fault == "an encrypted key":
        assert "encrypted" in process.output


def expired_pair():
    begin, end = datetime(2019, 1, 1, tzinfo=UTC), datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC)
    return {"not_before": begin, "not_after": end}


def test_expired_certificate_fails_reload(secure, tmp_path):
    fastdist = secure()
    write_pair(tmp_path, NEXT, **expired_pair())
    status, body = reload(fastdist, fastdist.connect())
    assert status == 422
    (error,) = json.loads(body)["errors"]
    assert f"{tmp_path / 'cert.pem'} expired on 2020-02-03 04:05:06 UTC" in error["detail"]
    for _ in range(8):
        assert fastdist.once("GET", "/health")[0] == 200


def test_expired_certificate_warns_at_start(start, run, tmp_path, mocks):
    fastdist = start(Secure, tmp_path, mocks, pair=expired_pair())
    assert "2020-02-03 04:05:06" in fastdist.line_with("expired on")
    context = client_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with handshake(fastdist.port, context):
        pass
    checked = run(sys.executable, "-m", "fastdist", "check", fastdist.config)
    assert checked.wait() == 0
    assert "warning: security.tls_cert: " in checked.line_with("expired on 2020-02-03 04:05:06 UTC")
    fastdist.kill_all()


def test_certificate_near_its_end_is_told(start, run, tmp_path, mocks):
    """At the start, by `check`, at a reload; and its end is in the metrics."""
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3, hours=1)
    fastdist = start(Secure, tmp_path, mocks, pair={"not_after": ends})
    fastdist.line_with(f"cert.pem expires in 3 days, on {ends:%Y-%m-%d %H:%M:%S} UTC; renew it")
    checked = run(sys.executable, "-m", "fastdist", "check", fastdist.config)
    assert checked.wait() == 0
    assert "warning: security.tls_cert: " in checked.line_with("expires in 3 days")
    metric = 'fastdist_tls_certificate_not_after_timestamp_seconds{certificate="own"} '
    assert f"{metric}{int(ends.timestamp())}\n" in fastdist.once("GET", "/metrics")[1].decode()
    write_pair(tmp_path, not_after=ends + timedelta(days=90))
    assert reload(fastdist, fastdist.connect())[0] == 200
    renewed = int((ends + timedelta(days=90)).timestamp())
    assert f"{metric}{renewed}\n" in fastdist.once("GET", "/metrics")[1].decode()
    assert sum("expires in" in line for line in fastdist.lines) == 1
    fastdist.kill_all()


def test_replaced_worker_has_current_pair(secure, tmp_path):
    """What the files hold by then does not matter."""
    fastdist = secure({"server": {"workers": 1}})
    write_pair(tmp_path, NEXT)
    assert reload(fastdist, fastdist.connect())[0] == 200
    fastdist.authority = NEXT
    (tmp_path / "cert.pem").write_text("half a certif")
    (tmp_path / "key.pem").unlink()
    (before,) = fastdist.stats()["workers"]
    kill_worker(before["pid"])
    (after,) = fastdist.stats()["workers"]
    assert after["pid"] != before["pid"]
    assert reload(fastdist, fastdist.connect())[0] == 422
    assert fastdist.once("POST", "/logs", BODY)[0] == 202


def test_change_one_worker_rejects_is_void(secure, tmp_path):
    """One has no descriptor left for a moment, which loading a certificate takes."""
    fastdist = secure()
    connections = [fastdist.connect() for _ in range(16)]  # over both workers
    for connection in connections:
        assert fastdist.ask(connection)[0] == 200
    write_pair(tmp_path, NEXT)
    fastdist.config.write_text(fastdist.config.read_text().replace("weight = 0.1", "weight = 0.7"))
    pid = fastdist.stats()["workers"][0]["pid"]
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    status, body = reload(fastdist, connections[0])
    assert status == 422
    assert "Too many open files" in json.loads(body)["errors"][0]["detail"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    for connection in connections:
        rows = json.loads(fastdist.ask(connection, path="/analyzers")[1])["analyzers"]
        assert rows[0]["weight"] == 0.1
    for _ in range(16):
        assert fastdist.once("POST", "/logs", BODY)[0] == 202
    assert reload(fastdist, connections[0])[0] == 200
    fastdist.authority = NEXT
    for _ in range(16):
        assert fastdist.once("POST", "/logs", BODY)[0] == 202
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0, 0]


def test_file_change_in_reload_is_harmless(secure, tmp_path):
    fastdist = secure({"server": {"workers": 1}})
    over = threading.Event()

    def rotate():
        for authority in itertools.cycle((NEXT, AUTHORITY)):
            write_pair(tmp_path, authority)
            time.sleep(0.001)  # some processor time is for those who read it
            if over.is_set() and authority is AUTHORITY:
                return

    both = client_context()
    NEXT.configure_trust(both)
    rotating = threading.Thread(target=rotate)
    rotating.start()
    try:
        for _ in range(20):
            connection = fastdist.connect(both)
            assert reload(fastdist, connection)[0] in {200, 422}
            connection.close()
            with handshake(fastdist.port, both) as connection:
                assert connection.version()
    finally:
        over.set()
        rotating.join()
    assert reload(fastdist, fastdist.connect(both))[0] == 200


# ---- those who never finish


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half a hello"])
def test_missing_handshake_ends_like_a_head(secure, sent):
    fastdist = secure({"server": {"workers": 1, "header_timeout": "2s"}})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(sent)
        while connection.recv(65536):
            pass
    assert fastdist.once("GET", "/health")[0] == 200


def test_timeouts_are_as_without_tls(secure):
    timeouts = {"header_timeout": "2s", "body_timeout": "2s", "keepalive_timeout": "2s", "workers": 1}
    fastdist = secure({"server": timeouts})
    head = b"POST /logs HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    for sent, status in ((b"", b""), (head[:30], b"HTTP/1.1 408 "), (head, b"HTTP/1.1 408 ")):
        with handshake(fastdist.port, client_context()) as connection:
            connection.settimeout(20)
            connection.sendall(sent)
            received = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            assert received[:13] == status


def test_long_response_may_be_read_slowly(secure):
    """The kernel takes some megabytes of it, and takes more only when a good part of them is gone."""
    fastdist = secure({"server": {"body_timeout": "1s", "workers": 1}})
    view = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n"
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    raw.settimeout(20)
    raw.connect(("127.0.0.1", fastdist.port))
    answers = b""
    with client_context(fastdist.authority).wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        connection.sendall((view + b"\r\n") * 29 + view + b"Connection: close\r\n\r\n")
        for wait in itertools.chain([0.1] * 60, itertools.repeat(0)):  # slowly for six seconds
            time.sleep(wait)
            data = connection.recv(16384)
            if not data:
                break
            answers += data
    length = len(fastdist.once("GET", "/openapi.json")[1])
    assert answers.count(b"HTTP/1.1 200 OK") == 30
    assert len(answers) > 30 * length


def test_client_ending_tls_gets_response(secure, mocks):
    mocks.set_all(status=503)
    fastdist = secure({"server": {"workers": 1}, "retry": {"cap": "300ms"}})
    connection = handshake(fastdist.port, client_context())
    connection.settimeout(20)
    lines = b"POST /logs HTTP/1.1\r\nHost: x\r\nPrefer: wait=86400\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    connection.sendall(lines + BODY)
    wait_until(lambda: fastdist.stats()["packets"]["accepted"] == 1, "it waits")
    with connection, pytest.raises(ssl.SSLError, match=r"(?i)data after close notify"):
        connection.unwrap()  # which is told of the answer, and throws it away
    mocks.set_all(status=None)
    fastdist.wait_at_rest()
    assert "has no effect when using ssl" not in fastdist.output


def test_excess_connections_get_503_over_tls(secure):
    fastdist = secure({"server": {"workers": 1, "max_connections": 5}})
    inside = [handshake(fastdist.port, client_context()) for _ in range(5)]
    for connection in inside:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    with handshake(fastdist.port, client_context()) as connection:
        assert b"".join(iter(lambda: connection.recv(65536), b"")).startswith(b"HTTP/1.1 503 ")
    for connection in inside:
        connection.close()


def test_endless_handshakes_are_limited(secure):
    """Beyond the limit, and some that could be told so, connections are closed before they cost anything."""
    fastdist = secure({"server": {"workers": 1, "max_connections": 20, "header_timeout": "8s"}})
    silent = [socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) for _ in range(500)]
    try:
        wait_until(lambda: len(ended(silent)) >= 500 - 20 - 256, "those beyond the limit are closed")
        assert len(ended(silent)) < 400, "those within the limit have their time"
        wait_until(lambda: len(ended(silent)) == 500, "their time is over")
    finally:
        for connection in silent:
            connection.close()
    assert fastdist.once("POST", "/logs", BODY)[0] == 202
    fastdist.wait_at_rest()
    assert [row["state"] for row in fastdist.analyzers().values()] == ["online"] * 4


def test_waiting_handshakes_finish_at_end(secure):
    """The workers do not run while clients connect and SIGTERM comes."""
    fastdist = secure({"server": {"workers": 1}})
    (worker,) = fastdist.worker_pids()
    context, answers = client_context(), []
    os.kill(worker, signal.SIGSTOP)
    raw = [socket.create_connection(("127.0.0.1", fastdist.port), timeout=60) for _ in range(70)]

    def post(connection):
        with context.wrap_socket(connection, server_hostname="127.0.0.1") as secured:
            secured.sendall(b"POST /logs HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
            answers.append(secured.recv(65536)[:12])

    threads = [threading.Thread(target=post, args=[connection]) for connection in raw]
    for thread in threads:
        thread.start()
    fastdist.signal(signal.SIGTERM)
    fastdist.line_with("draining")
    os.kill(worker, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert answers == [b"HTTP/1.1 202"] * len(raw)
    assert fastdist.wait() == 0


def test_endless_handshake_delays_no_end(secure):
    fastdist = secure({"server": {"workers": 1, "header_timeout": "10m", "drain_timeout": "10m"}})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=60) as silent:
        fastdist.once("GET", "/health")
        assert fastdist.stop() == 0
        assert silent.recv(1) == b""


def test_kept_connection_does_not_delay_end(secure):
    """It does not look at the connection until then, and so does not agree to the end of TLS."""
    fastdist = secure({"server": {"workers": 1, "drain_timeout": "10m"}})
    with handshake(fastdist.port, client_context()) as kept:
        kept.sendall(b"POST /logs HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert kept.recv(65536).startswith(b"HTTP/1.1 202 ")
        assert fastdist.stop() == 0
        assert kept.recv(1) == b""


def test_client_hello_may_come_in_pieces(shared):
    fastdist = shared(kind=WithRsa)
    for chop in (lambda data: [data], in_pieces, in_records_of_a_byte):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with contextlib.suppress(ssl.SSLWantReadError):
            secured.do_handshake()
        with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as raw:
            for piece in chop(outgoing.read()):
                raw.sendall(piece)
                time.sleep(0.01)
            while True:
                try:
                    secured.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    raw.sendall(outgoing.read())
                    incoming.write(raw.recv(65536))
            secured.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            raw.sendall(outgoing.read())
            answer = b""
            while b"\r\n\r\n" not in answer:
                incoming.write(raw.recv(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += secured.read(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")


def in_pieces(hello):
    return [hello[:1], hello[1:4], hello[4:100], hello[100:]]


def in_records_of_a_byte(hello):
    """Return the records of a ClientHello that came in one."""
    return [b"".join(hello[:3] + b"\0\1" + bytes([byte]) for byte in hello[5:])]


def ended(connections):
    """Return those that the other side has closed."""
    readable = select.poll()
    for connection in connections:
        readable.register(connection, select.POLLIN)
    return readable.poll(0)
