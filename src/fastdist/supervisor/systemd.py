"""What the service manager is told: systemd's notification protocol, sd_notify(3), without systemd's library.

- A message is one datagram to the socket that NOTIFY_SOCKET names; without that variable nothing is ever sent.
- The variables are taken out of the environment: the workers, which inherit it, do not speak for the service.
- No message is worth the service. One that cannot be sent within ``PATIENCE`` is given up; the log tells of it once.
- What is said is true at any moment: nothing is ready twice, and after STOPPING=1 nothing is ready again.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastdist import logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

PATIENCE = 1.0  # seconds that a manager which reads nothing may hold us up
HEARTBEATS = 3  # within the watchdog's time: one may be late

log = logs.get()


class ServiceManager:
    """Whoever has started us, if that is systemd or speaks its protocol; nobody otherwise."""

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        environ = os.environ if environment is None else environment
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""))
        self.interval = _interval(environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""))
        self._phase = "starting"
        self._status = ""
        self._last_heartbeat = -self.interval
        self._failing = False

    def ready(self) -> None:
        """Say that the service is up."""
        if self._phase == "starting":
            self._phase = "ready"
            self._send("READY=1")

    @asynccontextmanager
    async def reloading(self) -> AsyncIterator[None]:
        """Say that settings are read again, and at the end that this is over."""
        if self._phase == "ready":
            # The time is what Type=notify-reload (systemd 253) tells this reload from others by.
            self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self._phase == "ready":
                self._send("READY=1")

    def stopping(self, seconds: float) -> None:
        """Say that the service is ending, which may take so long, whatever the unit's TimeoutStopSec."""
        self._phase = "stopping"
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """Have ``systemctl status`` show a line of text; nothing is sent unless it is a new one."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + text.replace("\n", " "))

    def alive(self) -> None:
        """Give the watchdog its sign; may be called as often as one likes."""
        now = time.monotonic()
        if self.interval and now - self._last_heartbeat >= self.interval:
            self._last_heartbeat = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(PATIENCE)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._failing:
                log.error("the service manager cannot be told", message=message, error=str(error))
            self._failing = True
        else:
            self._failing = False


def _address(name: str) -> str:
    """Return the address of the socket: a path, or a name in the abstract namespace, which begins with an @."""
    if name.startswith("@"):
        return "\0" + name[1:]
    if name and not name.startswith("/"):
        log.warning("NOTIFY_SOCKET is neither a path nor an abstract name; the service manager is not told", value=name)
        return ""
    return name


def _interval(microseconds: str, pid: str) -> float:
    """Return the seconds between two signs for the watchdog; 0 when it expects none, or not from this process."""
    if not microseconds or (pid and pid != str(os.getpid())):
        return 0.0
    if not microseconds.isdecimal():
        log.warning("WATCHDOG_USEC is no number; the watchdog gets no sign", value=microseconds)
        return 0.0
    return int(microseconds) / 1e6 / HEARTBEATS
