"""A distributor as a client sees it: one keep-alive connection, and the responses that come on it.

Of a name's addresses each is tried, the next one 250 ms after the one before or as soon as that fails; the first that
accepts the connection wins (RFC 8305, Happy Eyeballs). One whose last TLS handshake failed comes after the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection, RemoteDisconnected, responses
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import aiohappyeyeballs
import msgspec

from fastdist import __version__
from fastdist.errors import UNDECODABLE
from fastdist.retry_after import parse_retry_after
from fastdist.units import Endpoint, parse_endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

Address: TypeAlias = tuple[Any, ...]  # as a socket has it

TIMEOUT = 30.0  # seconds without a byte of a response, or until the system takes the next PART of a body
PART = 1 << 14  # bytes: less than the least that a distributor takes in that time, 1 KiB/s
ATTEMPT_DELAY = 0.25  # seconds before the next address is tried beside the one before
MAX_RESPONSE = 1 << 16  # bytes of a response that are read
TLS_ALERT = b"\x15\x03"  # how one begins


class TLSAlertError(HTTPException):
    """The other side speaks TLS, and this connection does not."""


class _Problem(msgspec.Struct):
    detail: str = ""


class Response(NamedTuple):
    """An HTTP response: status, content (no more than was asked for) and Retry-After as it was written."""

    status: int
    content: bytes = b""
    retry_after: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the distributor has taken the packet over."""
        return 200 <= self.status < 300  # noqa: PLR2004  (the class of the status)

    @property
    def pause(self) -> float | None:
        """Seconds after which the distributor wants the next request; None when it does not say."""
        return None if self.retry_after is None else parse_retry_after(self.retry_after)

    @property
    def text(self) -> str:
        """The status, and the detail of a problem (RFC 9457) on one line, for a person."""
        detail = self.detail or responses.get(self.status, "")
        return f"{self.status} ({detail})" if detail else str(self.status)

    @property
    def detail(self) -> str:
        """The detail of a problem (RFC 9457) on one line; empty without one."""
        try:
            detail = msgspec.json.decode(self.content, type=_Problem).detail
        except UNDECODABLE:
            return ""
        return on_a_line(detail)

    @property
    def verdict(self) -> str:
        """The same behind the name of the distributor."""
        return f"answers {self.text}"


class Target(msgspec.Struct, frozen=True):
    """Where to go, and with what bearer token; ``context`` is for https.

    ``failed``: addresses whose last TLS handshake failed, of whichever connection, and when (``time.monotonic()``).
    """

    url: str
    endpoint: Endpoint
    token: str | None
    context: ssl.SSLContext | None = None
    failed: dict[Address, float] = {}

    @classmethod
    def parse(cls, url: str, token: str | None, ca_file: str | None = None) -> Target:
        """Return the target at ``url`` (what stands before /logs); ``ca_file`` is trusted instead of the system's.

        Raises ValueError, whose text shows no token, and OSError for a file that cannot be used.
        """
        if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token):
            raise ValueError("the token must be of visible ASCII characters")
        endpoint = parse_endpoint(url)
        return cls(url, endpoint, token, _context(ca_file) if endpoint.scheme == "https" else None)


def _context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"{ca_file}: no certificates in PEM form ({error.reason})") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, ca_file) from None


class Connection:
    """One keep-alive connection to a distributor, opened when it is needed. Not for two threads at once."""

    def __init__(self, target: Target, timeout: float | None = None) -> None:
        endpoint, self._timeout = target.endpoint, timeout or TIMEOUT
        self._context = target.context
        self._failed = target.failed
        self._path = endpoint.path_and_query.rstrip("/")
        self._headers = {"User-Agent": f"fastdist/{__version__}"}
        if target.token:
            self._headers["Authorization"] = f"Bearer {target.token}"
        self._connection = (
            HTTPSConnection(endpoint.host, endpoint.port, context=target.context)
            if endpoint.scheme == "https"
            else HTTPConnection(endpoint.host, endpoint.port)
        )

    @property
    def is_open(self) -> bool:
        """Whether it is there already; the other side may have closed it since."""
        return self._connection.sock is not None

    def post(self, packet_id: str, body: bytes) -> Response:
        """Post a packet under its id. Raises OSError or HTTPException when there is no response."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": packet_id}
        return self.request("POST", "/logs", body, headers, MAX_RESPONSE)

    def request(self, method: str, path: str, body: bytes | None, headers: dict[str, str], limit: int) -> Response:
        """Send a request and read ``limit`` bytes of the response. Raises OSError or HTTPException without one."""
        connection, parts = self._connection, None
        if body is not None:  # in parts: each has the time-out, as all of it would have it together
            whole, headers = memoryview(body), headers | {"Content-Length": str(len(body))}
            parts = (whole[at : at + PART] for at in range(0, len(body), PART))
        try:
            if connection.sock is None:
                connection.sock = self._opened()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
                connection.request(method, self._path + path, parts, self._headers | headers)
            self._expect_http(connection.sock)
            response = connection.getresponse()
            content = response.read(limit)
            if not response.isclosed():  # the rest is of no use
                connection.close()
        except BaseException:
            connection.close()
            raise
        return Response(response.status, content, response.getheader("Retry-After"))

    def _expect_http(self, sock: socket.socket) -> None:
        """Raise TLSAlertError for an alert; reading a line would tell the reset that may follow it instead."""
        if self._context is None and sock.recv(len(TLS_ALERT), socket.MSG_PEEK) == TLS_ALERT:
            raise TLSAlertError("it speaks TLS")

    def _opened(self) -> socket.socket:
        """Return a new connection, with TLS where that is wanted."""
        connection = self._connection
        sock = connect(connection.host, connection.port, self._timeout, self._failed)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._secured(sock, self._context) if self._context is not None else sock
        except BaseException:
            sock.close()
            raise

    def _secured(self, sock: socket.socket, context: ssl.SSLContext) -> socket.socket:
        address = sock.getpeername()
        try:
            secured = context.wrap_socket(sock, server_hostname=self._connection.host)
        except BaseException:
            self._failed[address] = time.monotonic()
            raise
        self._failed.pop(address, None)
        return secured

    def close(self) -> None:
        """Close it."""
        self._connection.close()


def connect(host: str, port: int, timeout: float, failed: Mapping[Address, float] | None = None) -> socket.socket:
    """Return a connection to the first of a name's addresses that accepts it, with this time-out (seconds).

    Those that have ``failed`` come last, the latest at the end. Raises OSError: why the addresses refused, TimeoutError
    when none has accepted in time.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if failed:
        addresses.sort(key=lambda address: failed.get(address[4], 0.0))
    interleave = 0 if failed else 1  # 1: families come in turn, whatever the order

    async def race() -> socket.socket:
        async with asyncio.timeout(timeout):
            return await aiohappyeyeballs.start_connection(
                addresses, happy_eyeballs_delay=ATTEMPT_DELAY, interleave=interleave
            )

    try:
        sock = asyncio.run(race())
    except TimeoutError:
        raise TimeoutError("timed out") from None
    except OSError as error:  # asyncio's text names the address, not the reason
        raise OSError(error.errno, os.strerror(error.errno)) if error.errno else error from None
    sock.settimeout(timeout)
    return sock


def on_a_line(text: str) -> str:
    """Return text of another program as it can be shown: on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def describe(error: Exception, timeout: float | None = None) -> str:
    """Return why there was no response."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout or TIMEOUT:.0f} s"
    if isinstance(error, RemoteDisconnected):
        return "it closes the connection without an answer"
    return (isinstance(error, OSError) and error.strerror) or on_a_line(str(error)) or type(error).__name__
