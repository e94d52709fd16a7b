"""The sockets to listen on: one for each worker, or those of the service manager (see ``activation``).

- New ones share their port (SO_REUSEPORT): the kernel spreads connections over the workers. No other instance may share
  it, so the port has to be free before.
- They stay open in the supervisor: what is queued on a dead worker's socket waits for its successor.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.errors import StartError
from fastdist.supervisor import activation
from fastdist.units import split_listen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdist.settings import Config

BACKLOG = 4096
KEEPALIVE = (  # inherited by accepted connections: a client that vanished is noticed after two minutes
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
PORT_TIMEOUT = 1.0  # seconds to wait until another process has released our port

log = logs.get()


def for_packets(config: Config, inherited: Mapping[str, list[socket.socket]], workers: int) -> list[socket.socket]:
    """Return a listener for each worker; those of the service manager may be fewer, and workers share them.

    Raises StartError.
    """
    return _listen(inherited.get("", []), config.server.host, config.server.port, workers)


def for_views(config: Config, inherited: Mapping[str, list[socket.socket]], workers: int) -> list[socket.socket]:
    """Return those of admin.listen; none if it is not set. Raises StartError."""
    passed, listen = inherited.get(activation.ADMIN, []), config.admin.listen
    if passed and not listen:
        raise StartError(f'a socket called "{activation.ADMIN}" was passed, and admin.listen is not set')
    return _listen(passed, *split_listen(listen), workers) if listen else []


def url(listener: socket.socket, *, secure: bool) -> str:
    """Return the URL under which this machine reaches a listener."""
    host, port = listener.getsockname()[:2]
    if host in activation.ALL:
        host = "127.0.0.1"
    return f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}:{port}"


def _listen(passed: list[socket.socket], host: str, port: int, workers: int) -> list[socket.socket]:
    """Return the service manager's sockets, ready to be used, or a new one for each worker. Raises StartError."""
    if not passed:
        return _open(host, port, workers)
    activation.check(passed, workers, host, port)
    for listener in passed:
        _set_options(listener)
        listener.listen(BACKLOG)
    log.info("the service manager listens", sockets=len(passed))
    return passed


def _open(host: str, port: int, workers: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        family, _, _, _, address = info
        port = _free_port(family, address)
        for _ in range(workers):
            listener = _socket(family)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _set_options(listener)
            listener.bind((address[0], port, *address[2:]))
        for listener in listeners:
            listener.listen(BACKLOG)
    except OSError as error:
        raise StartError(f'cannot listen on "{host}" port {port}: {error.strerror or error}') from error
    return listeners


def _free_port(family: socket.AddressFamily, address: tuple[object, ...]) -> int:
    """Return the port of ``address`` (any free one for 0), once it is free. Raises OSError.

    SO_REUSEPORT would let us share it with another instance. Workers whose supervisor was killed release it soon.
    """
    end = time.monotonic() + PORT_TIMEOUT
    while True:
        with _socket(family) as probe:
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    raise
            else:
                return int(probe.getsockname()[1])
        time.sleep(0.05)


def _socket(family: socket.AddressFamily) -> socket.socket:
    """Return a socket to listen with; one of ``::`` takes IPv4 as well, whatever the system's ``bindv6only``."""
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return made


def _set_options(listener: socket.socket) -> None:
    for level, option, value in KEEPALIVE:
        listener.setsockopt(level, option, value)
    listener.settimeout(0)
