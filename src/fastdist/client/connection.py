"""A distributor as a client sees it, for the command line: one keep-alive connection, and what is answered on it.

Of a name's addresses each is tried, the next one 250 ms after the one before or as soon as that fails; the first that
takes the connection has it (RFC 8305, Happy Eyeballs).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import ssl
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPSConnection, RemoteDisconnected, responses
from typing import Any, NamedTuple

import msgspec

from fastdist import __version__
from fastdist.units import Endpoint, parse_endpoint

TIMEOUT = 30.0  # seconds without a sign of life
ATTEMPT_DELAY = 0.25  # seconds before the next address is tried beside the one before
LARGEST_ANSWER = 1 << 16  # bytes of an answer that are read


class Answer(NamedTuple):
    """What a distributor answers: a status, what it says for itself, and when (seconds) one may come again."""

    status: int
    detail: str
    retry_after: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether the packet is now in its hands."""
        return 200 <= self.status < 300  # noqa: PLR2004  (the class of the status)

    @property
    def text(self) -> str:
        """The status, and what there is to it, for a person."""
        return f"{self.status} ({self.detail})" if self.detail else str(self.status)

    @property
    def advice(self) -> str:
        """What to look at when no packet at all is accepted."""
        return "is the token right?" if self.status in (401, 403) else "is that the URL of a distributor?"


class Target(msgspec.Struct, frozen=True):
    """Where to go, and with what bearer token; ``context`` is for https."""

    url: str
    endpoint: Endpoint
    token: str | None
    context: ssl.SSLContext | None = None

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


class Reply(NamedTuple):
    """An HTTP response: status, content (no more than was asked for) and Retry-After as it was written."""

    status: int
    content: bytes
    retry_after: str | None


class Connection:
    """One keep-alive connection to a distributor, opened when it is needed. Not for two threads at once."""

    def __init__(self, target: Target, timeout: float | None = None) -> None:
        endpoint, self._timeout = target.endpoint, timeout or TIMEOUT
        self._context = target.context
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

    def request(self, method: str, path: str, body: bytes | None, headers: dict[str, str], most: int) -> Reply:
        """Send a request and read ``most`` bytes of what comes back. Raises OSError or HTTPException without answer."""
        connection = self._connection
        try:
            if connection.sock is None:
                connection.sock = self._opened()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
                connection.request(method, self._path + path, body, self._headers | headers)
            response = connection.getresponse()
            content = response.read(most)
            if not response.isclosed():  # there is more than anybody wants to read
                connection.close()
        except BaseException:
            connection.close()
            raise
        return Reply(response.status, content, response.getheader("Retry-After"))

    def _opened(self) -> socket.socket:
        """Return a new connection, with TLS where that is wanted."""
        connection = self._connection
        sock = connect(connection.host, connection.port, self._timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._context.wrap_socket(sock, server_hostname=connection.host) if self._context else sock
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Close it."""
        self._connection.close()


class Sender(Connection):
    """A connection for packets."""

    def post(self, packet_id: str, body: bytes) -> Answer:
        """Post a packet under its id. Raises OSError or HTTPException when there is no answer."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": packet_id}
        reply = self.request("POST", "/logs", body, headers, LARGEST_ANSWER)
        detail = _detail(reply.content) or responses.get(reply.status, "")
        return Answer(reply.status, detail, _seconds(reply.retry_after))


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Return a connection to the first of a name's addresses that takes it, with this time-out (seconds).

    Raises OSError: that of the last address which failed, TimeoutError when none has in time.
    """
    waiting = _interleaved(host, port)
    end = time.monotonic() + timeout
    error: OSError = TimeoutError("timed out")
    with selectors.DefaultSelector() as race, contextlib.ExitStack() as losers:
        while waiting or race.get_map():
            if waiting:
                family, address = waiting.pop(0)
                try:
                    sock = losers.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    sock.settimeout(0)
                    sock.connect(address)
                except BlockingIOError:
                    pass
                except OSError as failure:  # there is no way to it
                    error = failure
                    continue
                race.register(sock, selectors.EVENT_WRITE, sock)
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            for key, _ in race.select(min(ATTEMPT_DELAY, left) if waiting else left):
                race.unregister(key.fileobj)
                code = key.data.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    winner: socket.socket = key.data.dup()
                    winner.settimeout(timeout)
                    return winner
                error = OSError(code, os.strerror(code))
    raise error


def _interleaved(host: str, port: int) -> list[tuple[int, Any]]:
    """Return family and address of all addresses of a name, the families in turn. Raises OSError."""
    families: dict[int, list[tuple[int, Any]]] = {}
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        families.setdefault(family, []).append((family, address))
    return [found for row in itertools.zip_longest(*families.values()) for found in row if found is not None]


def describe(error: Exception, timeout: float | None = None) -> str:
    """Return why there was no answer."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout or TIMEOUT:.0f} s"
    if isinstance(error, RemoteDisconnected):
        return "it closes the connection without an answer"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _detail(content: bytes) -> str:
    """Return the detail of a problem (RFC 9457), on one line; nothing if that is none."""
    try:
        problem = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return " ".join("".join(c if c.isprintable() else " " for c in detail).split()) if isinstance(detail, str) else ""


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds that a Retry-After (seconds or a date) asks for; None when it is neither."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return min(float(retry_after), 1e9)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
