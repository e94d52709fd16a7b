"""Behind proxies: the PROXY protocol with and without TLS, and X-Forwarded-For, on real connections."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import time

import pytest
import trustme
from proxying import BAD, GOOD, inet, version_2
from support import BODY, free_port, request, wait_until

TRUSTED = {"trusted_proxies": ["127.0.0.1"], "workers": 1}
HEADERS = {"proxy_protocol": "on"} | TRUSTED
ADMIN = {"admin": {"listen": "127.0.0.1:0"}}  # where no header is asked for
ONE_EACH = {"client_rate": 0.001, "client_burst": 1}
REQUEST = f"POST /logs HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY


def exchange(port, *pieces, source="127.0.0.1", context=None, header=b""):
    """Send pieces, each by itself, on a new connection; return the status, or "" if there is no answer.

    With a ``context`` the ``header`` is sent before the handshake.
    """
    connection = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connection.sendall(header)
            connection = context.wrap_socket(connection, server_hostname="127.0.0.1")
        for piece in pieces:
            connection.sendall(piece)
            if len(pieces) > 1:
                time.sleep(0.002)
        return connection.recv(65536)[9:12].decode()
    except ConnectionError:
        return ""
    finally:
        connection.close()


def test_clients_of_a_proxy_are_told_apart(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": HEADERS, "limits": ONE_EACH})
    first, second = GOOD["TCP4"][0], version_2(addresses=inet("192.0.2.8", 1))
    assert exchange(fastdist.port, first + REQUEST) == "202"
    assert exchange(fastdist.port, first + REQUEST) == "429"
    assert exchange(fastdist.port, GOOD["IPv4"][0] + REQUEST) == "429", "the same client, in the other version"
    assert exchange(fastdist.port, second + REQUEST) == "202"
    assert exchange(fastdist.port, GOOD["LOCAL"][0] + REQUEST) == "202", "the proxy itself"
    assert exchange(fastdist.port, GOOD["UNIX"][0] + REQUEST) == "429", "which is all that is known of that"
    assert exchange(fastdist.port, REQUEST, source="127.0.0.2") == "202"


def test_pieces_of_a_header_are_put_together(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": HEADERS})
    for kind in ("TCP6", "IPv6"):
        data = GOOD[kind][0] + REQUEST
        for end in range(1, len(GOOD[kind][0]) + 2):
            assert exchange(fastdist.port, data[:end], data[end:]) == "202"
    assert fastdist.stats()["packets"]["rejected"] == 0


def test_a_header_is_needed_of_proxies_only(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": HEADERS})
    for kind in ("HTTP", "TLS", "command", "too large"):
        assert exchange(fastdist.port, BAD[kind] + REQUEST) == ""
    line = json.loads(fastdist.line_with("has no PROXY header and is closed"))
    assert (line["proxy"], line["error"]) == ("127.0.0.1", "it does not begin with a PROXY header")
    assert exchange(fastdist.port, REQUEST, source="127.0.0.2") == "202"
    assert exchange(fastdist.port, GOOD["TCP4"][0] + REQUEST, source="127.0.0.2") == "400"
    assert exchange(fastdist.port, GOOD["IPv4"][0] + REQUEST, source="127.0.0.2") == "400"


def test_missing_header_is_given_up(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": HEADERS | {"header_timeout": "2s"}})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(b"PROXY TCP4 ")
        assert connection.recv(1) == b""
    assert exchange(fastdist.port, GOOD["TCP4"][0] + REQUEST) == "202"


def test_header_comes_before_tls(mocks, serve, tmp_path):
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    (tmp_path / "key.pem").write_bytes(pair.private_key_pem.bytes())
    security = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    fastdist = serve(mocks, ADMIN | {"server": HEADERS, "limits": ONE_EACH, "security": security})
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    for kind, status in (("TCP4", "202"), ("IPv4, with TLVs", "429"), ("TCP6", "202")):
        assert exchange(fastdist.port, REQUEST, context=context, header=GOOD[kind][0]) == status
    assert exchange(fastdist.port, REQUEST, context=context, source="127.0.0.2") == "202"
    fastdist.kill_all()


def test_header_may_come_while_it_drains(mocks, serve):
    fastdist = serve(mocks, ADMIN | {"server": HEADERS})
    with socket.create_connection(("127.0.0.1", fastdist.port), timeout=20) as connection:
        connection.sendall(GOOD["TCP4"][0][:20])
        assert exchange(fastdist.port, GOOD["TCP4"][0] + REQUEST) == "202"
        fastdist.signal(signal.SIGTERM)
        fastdist.line_with("draining")
        connection.sendall(GOOD["TCP4"][0][20:] + REQUEST)
        assert connection.recv(65536).startswith(b"HTTP/1.1 202 ")
    assert fastdist.wait() == 0
    assert len(mocks.delivered()) == 2


def test_no_changes_by_a_proxys_clients(mocks, serve):
    fastdist = serve(mocks, {"server": TRUSTED})
    change = ("PATCH", "/analyzers/A1", b'{"weight": 0.5}')
    assert request(fastdist.port, *change, {"X-Forwarded-For": "192.0.2.1"})[0] == 403
    assert request(fastdist.port, *change, {"X-Forwarded-For": "127.0.0.1, 192.0.2.1"})[0] == 403
    assert request(fastdist.port, *change)[0] == 200


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
@pytest.mark.parametrize("way", ["send-proxy", "send-proxy-v2", "option forwardfor"])
def test_haproxy_names_its_clients(mocks, serve, run, tmp_path, way):
    port, file = free_port(), tmp_path / "haproxy.cfg"
    mode, line, send = ("http", way, "") if way.startswith("option") else ("tcp", "", way)
    fastdist = serve(mocks, ADMIN | {"server": TRUSTED if mode == "http" else HEADERS, "limits": ONE_EACH})
    file.write_text(
        f"defaults\n mode {mode}\n {line}\n timeout connect 5s\n timeout client 20s\n timeout server 20s\n"
        f"listen logs\n bind 127.0.0.1:{port}\n server fastdist 127.0.0.1:{fastdist.port} {send}\n"
    )
    run("haproxy", "-f", file, "-db")

    def listens():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, "HAProxy")
    for client in ("127.0.0.2", "127.0.0.3"):
        assert exchange(port, REQUEST, source=client) == "202"
        assert exchange(port, REQUEST, source=client) == "429"
