"""The retry policy of ``send`` and ``replay``: which responses are final, how long to back off, when to give up.

A response is that of a distributor; what a stream says of a packet has the shape of one (``StreamResponse``).

The rules:

1. 2xx accepts a packet. What may get better is tried again, with the same id: no response, 408, 425, 429 and 5xx.
2. All connections back off together: as long as Retry-After says, else exponentially with jitter. A run is given up
   when no packet was accepted for ``patience`` seconds, or would not be until a back-off is over.
3. What is about the URL, the token or the certificate, and not about the packet, ends the run at once. Any other
   response refuses that one packet.
"""

from __future__ import annotations

import math
import random
import threading
import time
from http.client import HTTPException
from ssl import SSLCertVerificationError, SSLError
from typing import TYPE_CHECKING

import msgspec

from fastdist.client.connection import TLSAlertError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.client.connection import Connection, Response

MIN_BACK_OFF, MAX_BACK_OFF = 0.1, 10.0  # seconds of the first and the longest without a Retry-After
BUSY = {408, 425, 429}  # and every 5xx
UNAUTHORIZED = 401
NOT_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"}  # OpenSSL's, of a response that is HTTP
PLAIN = b"plain HTTP request was sent to"  # in the 400 of fastdist's port with TLS, and of nginx's
REDIRECTION, CLIENT_ERROR, SERVER_ERROR = 300, 400, 500  # redirections are not followed


class Summary(msgspec.Struct, kw_only=True):
    """How a run went. ``stopped``: why it ended early; ``permanent``: trying again will not help."""

    retries: int = 0
    stopped: str | None = None
    permanent: bool = False


class BackOff:
    """When to leave a distributor alone, for all connections together. Not for two threads at once, but for ``left``.

    One begins at a time: what the other connections meet meanwhile has the same cause.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._in_a_row = 0  # without a success in between
        self._failing_since = 0.0  # time.monotonic(); while there are any
        self._until = 0.0

    def left(self) -> float:
        """Return the seconds to wait before the next request, spread a little so that not all come at once."""
        left = self._until - time.monotonic()
        return left + random.uniform(0, 0.1 * left) if left > 0 else 0.0  # noqa: S311  (no secret)

    def begin(self, asked: float | None) -> float | None:
        """Begin one, as long as was asked for; return its seconds, or None when patience would be over by then."""
        now = time.monotonic()
        if now >= self._until:
            self._failing_since = self._failing_since if self._in_a_row else now
            self._in_a_row += 1
            longest = min(MAX_BACK_OFF, MIN_BACK_OFF * 2 ** min(self._in_a_row - 1, 20))
            self._until = now if asked is not None else now + random.uniform(longest / 2, longest)  # noqa: S311
        if asked is not None:
            self._until = max(self._until, now + max(asked, MIN_BACK_OFF))
        return None if self._until - self._failing_since > self._patience else self._until - now

    def end(self) -> None:
        """Note a success."""
        self._in_a_row = 0


def _other_scheme(error: Exception) -> str:
    """Return what to do where the other side speaks TLS and this one does not, or the reverse; else nothing."""
    if isinstance(error, SSLError) and error.reason in NOT_TLS:
        return "does not speak TLS; use http:// in the URL"
    if isinstance(error, TLSAlertError):
        return "speaks TLS; use https:// in the URL"
    return ""


def _advice(response: Response, *, has_token: bool) -> str:
    """Return what to look at after a response that any packet would get; nothing for all others."""
    status = response.status
    if status == CLIENT_ERROR and PLAIN in response.content:
        return "it speaks TLS"
    if status == UNAUTHORIZED and not has_token:
        return "give one with --token, or in FASTDIST_TOKEN"
    if status in {401, 403}:
        return "is the token right?"
    if REDIRECTION <= status < CLIENT_ERROR or status in {404, 405}:
        return "is that the URL of a distributor?"
    return ""


class Run:
    """Sends packets over several connections, each in a thread, until they are accepted or the run ends.

    ``name``: of what they are sent to, for people. ``waiting`` is called with the reason for a back-off and its
    seconds. ``max_failures``: attempts at a packet without a response, after which the run is given up before
    ``patience`` ends. ``lock`` (reentrant) is held for what is shown, and for all that the threads share.
    """

    summary: Summary
    has_token = True

    def __init__(
        self, name: str, patience: float, waiting: Callable[[str, float], None], max_failures: float = math.inf
    ) -> None:
        self._name, self._waiting, self._max_failures = name, waiting, max_failures
        self.lock = threading.RLock()
        self.halt = threading.Event()  # nothing more may be sent
        self._back_off = BackOff(patience)

    def end(self, why: str | None = None, *, permanent: bool = False) -> None:
        """End the run, for the reason that came first; without one because all is done."""
        with self.lock:
            if why and not self.summary.stopped:
                self.summary.stopped, self.summary.permanent = why, permanent
            self.halt.set()

    def post(self, connection: Connection, packet_id: str, body: bytes) -> Response | None:
        """Post a packet until it is accepted or refused; None when the run ends before that."""
        return self.repeat(lambda: connection.post(packet_id, body), lambda: connection.is_open)

    def repeat(self, attempt: Callable[[], Response], is_reused: Callable[[], bool]) -> Response | None:
        """Try until a response is final, and return it; None when the run ends before that.

        ``is_reused``: whether the next attempt is made over a connection that may have been closed meanwhile.
        """
        failures = 0
        while not self.halt.wait(self._back_off.left()):
            reused = is_reused()
            try:
                response = attempt()
            except SSLCertVerificationError as error:
                self.end(f"{self._name} cannot be trusted: {describe(error)}", permanent=True)
                return None
            except (OSError, HTTPException) as error:
                if advice := _other_scheme(error):
                    self.end(f"{self._name} {advice}", permanent=True)
                    return None
                if not reused:  # else it may only have been idle for too long
                    failures += 1
                    self._failed(f"cannot be reached: {describe(error)}", None, give_up=failures >= self._max_failures)
            else:
                if advice := _advice(response, has_token=self.has_token):
                    self.end(f"{self._name} {response.verdict}; {advice}", permanent=True)
                    return None
                if response.status not in BUSY and response.status < SERVER_ERROR:
                    if response.accepted:
                        with self.lock:
                            self._back_off.end()
                    return response
                self._failed(response.verdict, response.pause)
            with self.lock:
                self.summary.retries += 1
        return None

    def _failed(self, why: str, asked: float | None, *, give_up: bool = False) -> None:
        """Have all connections back off; end the run when that has lasted for too long."""
        with self.lock:
            seconds = self._back_off.begin(asked)
            if give_up or seconds is None:
                asks = f" and asks to wait {asked:.0f} s" if asked else ""
                self.end(f"{self._name} {why}{asks}; given up, try again later")
            else:
                self._waiting(why, seconds)
