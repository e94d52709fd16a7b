"""Accepting connections on a worker's listener, and closing it without resetting any."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import struct
from typing import TYPE_CHECKING, TypedDict

from fastdist import logs
from fastdist._core import Poller, Stream
from fastdist.net.connect import SHORTAGES, Shortage
from fastdist.worker.proxy_headers import ProxyHeaders

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Unpack

    from fastdist._core import StreamCalls
    from fastdist.net.proxies import TrustedProxies

ACCEPTED_AT_ONCE = 64  # connections, before others of the loop have their turn
SHARED_AT_ONCE = 8  # the same where workers share a listener: each is to have some of many that come together
YIELD = 0.001  # seconds that a worker leaves a connection to another which has fewer
LAST_ROUNDS = 128  # of accepting when it is closed: twice the backlog
PAUSE = 0.1  # seconds without accepting when descriptors have run out
HANDSHAKE = 0.1  # seconds for clients to complete connections that were begun before we finish
LOG_INTERVAL = 10.0  # between errors of one kind

# A filter for a listener (classic BPF: code, jump if true, if false, operand): what has SYN set in its TCP flags is
# dropped, all else is passed on whole.
SO_ATTACH_FILTER = 26
NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))

log = logs.get()


class Options(TypedDict, total=False):
    """What an ``Acceptor`` need not be given."""

    handed_on: bool
    has_more: Callable[[], bool]
    shortage: Shortage


class Acceptor:
    """Accepts connections on ``listener`` and gives each to ``taken(connection, peer's address)``.

    The system completes connections by itself, and would reset those that were not accepted when the listener is
    closed. So ``finish`` first stops new ones, accepts those that are there, and only then closes.

    A listener that is ``handed_on`` stays open in the service manager; what waits on it is served by the next process.
    Workers share it, and all of them are woken for each connection: one that has several more than another
    (``has_more()``) lets that have it, if it takes it at once.

    ``first`` is called before accepting, so that closed connections make room for new ones.

    When there are no descriptors left, new connections are closed at once, with a descriptor kept in reserve for that:
    clients do not wait for a response, and connections that are gone do not fill the backlog. ``shortage`` is told.
    """

    def __init__(
        self,
        listener: socket.socket,
        taken: Callable[[socket.socket, object], None],
        first: Callable[[], object] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.listener, self.taken, self.first = listener, taken, first
        self.handed_on, self.has_more = options.get("handed_on", False), options.get("has_more", lambda: False)
        self.shortage = options.get("shortage", Shortage())
        self.loop = asyncio.get_running_loop()
        self._yielded = False
        self._headers: ProxyHeaders | None = None
        self._open = True
        self._reserve = _reserve()
        self._log_limit = logs.Throttle(LOG_INTERVAL)
        listener.setblocking(False)  # noqa: FBT003
        self._listen()

    @property
    def busy(self) -> bool:
        """Whether connections may still arrive."""
        return self._open or (self._headers is not None and self._headers.busy)

    def read_headers(self, proxies: TrustedProxies, has_room: Callable[[int], bool], patience: float) -> None:
        """Read a header of the PROXY protocol from each connection of a trusted proxy first; see ``ProxyHeaders``."""
        self.taken = self._headers = ProxyHeaders(self.taken, proxies, has_room, patience)

    def use(self, context: ssl.SSLContext | None) -> None:
        """Do the handshakes of connections from now on with this certificate; nothing to do without TLS."""

    def finish(self) -> None:
        """Stop new connections; accept those that were begun, then close. Where they are handed on, close at once."""
        if self.handed_on:
            self._stop()
            return
        _drop_syn(self.listener)
        self.loop.call_later(HANDSHAKE, self._accept_remaining)

    def close(self) -> None:
        """Accept all connections that are there, now, and no more; where they are handed on, none."""
        self._stop()
        if self._headers is not None:
            self._headers.close()

    def _stop(self) -> None:
        if not self._open:
            return
        for _ in range(0 if self.handed_on else LAST_ROUNDS):
            if not self._accept():
                break
        self._open = False
        self.loop.remove_reader(self.listener)
        self.listener.close()
        if self._reserve is not None:
            os.close(self._reserve)

    def _accept_remaining(self) -> None:
        if self._accept():
            self.loop.call_soon(self._accept_remaining)
        else:
            self._stop()

    def _listen(self) -> None:
        if self._open:
            self.loop.add_reader(self.listener, self._ready)

    def _ready(self) -> None:
        if self.handed_on and not self._yielded and self.has_more():
            self._yielded = True
            self.loop.remove_reader(self.listener)
            self.loop.call_later(YIELD, self._listen)
            return
        self._yielded = False
        if self.first is not None:
            self.first()
        self.loop.call_soon(self._accept)  # after lost connections, which are reported through the loop

    def _accept(self) -> bool:
        """Accept some connections; return whether there may be more of them now."""
        if not self._open:
            return False
        for _ in range(SHARED_AT_ONCE if self.handed_on else ACCEPTED_AT_ONCE):
            try:
                connection, peer = self.listener.accept()
            except BlockingIOError:
                return False
            except (InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                if self._log_limit.allow() and logs.may_log():
                    log.error("accept() failed, closing connections", error=error.strerror)
                if error.errno in SHORTAGES:
                    self.shortage.last = error
                    if not self._reject():
                        self.loop.remove_reader(self.listener)
                        self.loop.call_later(PAUSE, self._listen)
                        return False
            else:
                self.taken(connection, peer)
        return True

    def _reject(self) -> bool:
        """Close a connection that there is no descriptor for; return whether the next may be accepted."""
        reserve = self._reserve
        if reserve is not None:
            os.close(reserve)
            with contextlib.suppress(OSError):
                self.listener.accept()[0].close()
        self._reserve = _reserve()
        return reserve is not None or self._reserve is not None


def _drop_syn(listener: socket.socket) -> None:
    """Have the system drop SYN packets: clients retry until the listener is closed.

    Packets that complete a handshake still pass. A system that cannot do this goes on as before.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in NO_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(NO_SYN), ctypes.addressof(program))
        )


def _reserve() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def refuse(connection: socket.socket, error: OSError) -> None:
    """Close a connection that no stream can be made of: it was reset meanwhile, or the system's limits are reached."""
    if logs.may_log():
        log.error("accept() failed, connection closed", error=error.strerror)
    connection.close()


def serve(
    listener: socket.socket, poller: Poller, protocol: Callable[[], StreamCalls], **options: Unpack[Options]
) -> Acceptor:
    """Accept connections; each is read for a ``protocol()`` of its own."""

    def taken(connection: socket.socket, peer: object) -> None:
        try:
            Stream(poller, connection, peer, protocol())
        except OSError as error:
            refuse(connection, error)

    return Acceptor(listener, taken, poller.run_once, **options)
