"""Sockets that the service manager listens on for us: systemd's protocol, sd_listen_fds(3), without its library.

- LISTEN_PID says for which process they are, LISTEN_FDS how many there are, from descriptor 3 on, and LISTEN_FDNAMES
  what each is called. The variables are removed from the environment, and the descriptors closed in other programs:
  workers get theirs by their numbers.
- The manager keeps the sockets open. What waits on one while no process accepts is served by the next.
- A socket that cannot be served is an error, as its clients would wait for ever; so is a list that cannot be read.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.errors import StartError

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

FIRST = 3  # descriptor
ALL = {"0.0.0.0", "::"}  # noqa: S104  (compared with, not bound to)
ADMIN = "admin"  # what the socket of admin.listen is called; any other name is that of one for packets

log = logs.get()


def inherited(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """Return the sockets that were passed to this process, by their names. Raises StartError."""
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if not count or pid != str(os.getpid()):
        return {}
    if not count.isdecimal():
        raise StartError(f"LISTEN_FDS is not a number: {count[:60]!r}")
    named = names.split(":") if names else []
    found: dict[str, list[socket.socket]] = {}
    for index in range(int(count)):
        name = named[index] if index < len(named) else ""
        found.setdefault(ADMIN if name == ADMIN else "", []).append(_listener(FIRST + index, name))
    return found


def _listener(fd: int, name: str) -> socket.socket:
    """Return the socket with this descriptor. Raises StartError if it cannot be served."""
    what = (
        f'the socket that was passed as descriptor {fd}, "{name}",' if name else f"what was passed as descriptor {fd}"
    )
    try:
        os.set_inheritable(fd, False)  # noqa: FBT003  (no program that is started gets it unasked)
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise StartError(f"{what} is no socket: {error.strerror}") from error
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
        kind = f"{_word(listener.family)}, {_word(listener.type)}"
        raise StartError(f"{what} is not for TCP ({kind}): ListenStream= needs a port, or an address and a port")
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartError(f"{what} does not listen: Accept= must be no")
    return listener


def _word(number: int) -> str:
    return getattr(number, "name", str(number))


def check(listeners: Sequence[socket.socket], workers: int, host: str, port: int) -> None:
    """Warn where the sockets are elsewhere than the settings say. Raises StartError if there are too many of them."""
    if len(listeners) > workers:
        raise StartError(
            f"{len(listeners)} sockets were passed for {workers} workers: each has to be a worker's; "
            "raise server.workers, or have fewer ListenStream= in the socket unit"
        )
    for listener in listeners:
        address = listener.getsockname()
        if port not in (0, address[1]) or not _is_at(host, address[0]):
            log.warning(
                "the service manager listens elsewhere than the settings say; its socket is used",
                listens_on=f"{address[0]} port {address[1]}",
                settings=f"{host} port {port}",
            )


def _is_at(host: str, address: str) -> bool:
    """Whether a host is, or resolves to, this address of a listener; all of IPv4 and all of IPv6 are the same here."""
    if host in ALL or address in ALL:
        return {host, address} <= ALL
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return address in {info[4][0] for info in infos}
