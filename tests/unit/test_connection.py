"""Which of a name's addresses takes a connection; what is made of a URL, a token, and an answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import trustme

from fastdist.client import connection
from fastdist.client.connection import Connection, Response, Target, connect

TIMEOUT = 30.0


@pytest.fixture
def resolve(monkeypatch):
    """Have a name lead to addresses, in their order."""

    def resolve(*addresses):
        def found(host, port, **_):
            assert host == "logs.test"
            return [
                (
                    family,
                    socket.SOCK_STREAM,
                    6,
                    "",
                    (address, port) if family == socket.AF_INET else (address, port, 0, 0),
                )
                for address in addresses
                for family in [socket.AF_INET6 if ":" in address else socket.AF_INET]
            ]

        monkeypatch.setattr(socket, "getaddrinfo", found)

    return resolve


@pytest.fixture
def hanging():
    """Return what makes connections to an address hang: a listener that takes no more of them."""
    with contextlib.ExitStack() as stack:

        def hanging(address, port):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(0)
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    filler.connect((address, port))

        yield hanging


def target(distributor, **options):
    return Target.parse(f"http://logs.test:{distributor.server_port}", None, **options)


def test_refusing_address_yields_to_the_next(distributor, resolve, monkeypatch):
    """At once: without waiting for the delay."""
    monkeypatch.setattr(connection, "ATTEMPT_DELAY", 3600)
    resolve("127.0.0.66", "127.0.0.67", "127.0.0.1")
    assert Connection(target(distributor)).post("x", b"{}").accepted


def test_hanging_address_yields_to_the_next(distributor, resolve, hanging):
    hanging("127.0.0.66", distributor.server_port)
    resolve("127.0.0.66", "127.0.0.1")
    assert Connection(target(distributor)).post("x", b"{}").accepted


def test_unreachable_address_yields_to_next(distributor, resolve):
    """Such as one of a family that is off."""
    resolve("2001:db8::1", "255.255.255.255", "127.0.0.1")
    assert Connection(target(distributor)).post("x", b"{}").accepted


def test_failure_of_all_addresses_is_named(resolve):
    resolve("127.0.0.66", "127.0.0.67")
    with pytest.raises(ConnectionRefusedError, match="Connection refused"):
        connect("logs.test", 1, TIMEOUT)


def test_when_all_addresses_hang_time_is_up(resolve, hanging):
    with socket.create_server(("127.0.0.65", 0)) as free:
        port = free.getsockname()[1]
    hanging("127.0.0.66", port)
    hanging("127.0.0.67", port)
    resolve("127.0.0.66", "127.0.0.67")
    with pytest.raises(TimeoutError):
        connect("logs.test", port, 0.5)


def test_the_families_of_a_name_come_in_turn(resolve, monkeypatch):
    resolve("::1", "::2", "::3", "127.0.0.1", "127.0.0.2")
    tried = []

    async def refuse(*arguments):
        tried.append(arguments[-1][0])
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", refuse)
    with pytest.raises(ConnectionRefusedError):
        connect("logs.test", 1, TIMEOUT)
    assert tried == [
        "::1",
        "127.0.0.1",
        "::2",
        "127.0.0.2",
        "::3",
    ]


def test_next_address_is_tried_with_tls_too(distributor, resolve, hanging, tmp_path):
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("logs.test").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    distributor.socket = context.wrap_socket(distributor.socket, server_side=True)
    hanging("127.0.0.66", distributor.server_port)
    resolve("127.0.0.66", "127.0.0.67", "127.0.0.1")
    there = Target.parse(f"https://logs.test:{distributor.server_port}", None, str(tmp_path / "ca.pem"))
    assert Connection(there).post("x", b"{}").accepted


def test_address_failing_tls_comes_last(distributor, resolve, tmp_path):
    """Two accept connections and leave the handshake unanswered."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("logs.test").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    distributor.socket = context.wrap_socket(distributor.socket, server_side=True)
    resolve("127.0.0.66", "127.0.0.67", "127.0.0.1")
    there = Target.parse(f"https://logs.test:{distributor.server_port}", None, str(tmp_path / "ca.pem"))
    with (
        socket.create_server(("127.0.0.66", distributor.server_port)),
        socket.create_server(("127.0.0.67", distributor.server_port)),
    ):
        for _ in range(9):  # a busy machine may keep the third one waiting as well
            with contextlib.suppress(TimeoutError):
                Connection(there, 0.5).post("x", b"{}")
                break
    assert "x" in distributor.accepted


def test_time_out_is_for_a_part_of_a_body(monkeypatch):
    time_out, body, arrived = 2.0, bytes(range(256)) * (1 << 14), bytearray()

    def connect_with_little_room(*arguments):
        sock = connect(*arguments)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
        return sock

    def take_slowly(server):
        sock, _ = server.accept()
        with sock, sock.makefile("rb") as file:
            while file.readline().strip():
                pass
            end = time.monotonic() + 1.5 * time_out
            while len(arrived) < len(body) and (data := file.read1(1 << 15)):
                arrived.extend(data)
                if time.monotonic() < end:
                    time.sleep(time_out / 20)
            sock.sendall(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")

    monkeypatch.setattr(connection, "connect", connect_with_little_room)
    with socket.socket() as server, ThreadPoolExecutor() as pool:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = pool.submit(take_slowly, server)
        there = Target.parse(f"http://127.0.0.1:{server.getsockname()[1]}", None)
        assert Connection(there, time_out).post("x", body).accepted
        taken.result()
    assert arrived == body


# ---- what a distributor says


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, None), ("0", 0.0), ("17", 17.0), ("9" * 400, 1e9), ("soon", None), ("-1", None)]
)
def test_retry_after_becomes_a_pause(text, seconds):
    assert Response(503, b"", text).pause == seconds


def test_retry_after_as_a_date():
    when = datetime.now(UTC) + timedelta(seconds=100)
    assert 50 < Response(503, b"", format_datetime(when, usegmt=True)).pause < 101
    assert Response(503, b"", "Wed, 21 Oct 2015 07:28:00 GMT").pause == 0.0


@pytest.mark.parametrize("url", ["127.0.0.1:3000", "ftp://a", "http://user:secret@a", "http://a:99999"])
def test_an_invalid_url_is_refused(url):
    with pytest.raises(ValueError, match="must"):
        Target.parse(url, None)


def test_a_token_that_would_break_the_head():
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        Target.parse("http://a", "secret\r\nX: y")
    assert "secret" not in str(caught.value)


def test_https_is_spoken_where_url_says_so():
    there = Connection(Target.parse("https://a", None))
    assert type(there._connection).__name__ == "HTTPSConnection"
