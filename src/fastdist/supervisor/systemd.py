"""Notifying the service manager: systemd's protocol, sd_notify(3), without systemd's library.

- A message is one datagram to the socket that NOTIFY_SOCKET names; without that variable nothing is sent.
- The variables are removed from the environment: the workers, which inherit it, do not speak for the service.
- A message that cannot be sent within ``PATIENCE`` is dropped; that is logged once.
- READY=1 is sent once, and again only to end a reload; never after STOPPING=1.
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

PATIENCE = 1.0  # seconds that a manager which does not read may block us
HEARTBEATS = 3  # within the watchdog's time: one may be late

log = logs.get()


class ServiceManager:
    """The service manager, if systemd or one that speaks its protocol has started us; else nothing is sent."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""))
        self.interval = _interval(environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""))
        self._phase = "starting"
        self._patient_until = 0.0  # the manager, once we are stopping; time.monotonic()
        self._status = ""
        self._last_heartbeat = -self.interval
        self._failing = False

    def ready(self) -> None:
        """Report that the service is up."""
        if self._phase == "starting":
            self._phase = "ready"
            self._send("READY=1")

    @asynccontextmanager
    async def reloading(self) -> AsyncIterator[None]:
        """Report a reload, and at the end that it is done."""
        if self._phase == "ready":
            # By this time Type=notify-reload (systemd 253) distinguishes reloads.
            self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self._phase == "ready":
                self._send("READY=1")

    def stopping(self, seconds: float) -> None:
        """Report that the service is ending, which may take so long, whatever the unit's TimeoutStopSec."""
        self._phase = "stopping"
        self._patient_until = time.monotonic() + seconds
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def extend(self, seconds: float) -> None:
        """Report that the end may take so long from now, once half of that is left; may be called at any rate."""
        now = time.monotonic()
        if self._phase == "stopping" and self._patient_until - now < seconds / 2:
            self._patient_until = now + seconds
            self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows; nothing is sent unless it has changed."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + text.replace("\n", " "))

    def heartbeat(self) -> None:
        """Send the watchdog's heartbeat when it is due; may be called at any rate."""
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
                log.error("the service manager cannot be notified", notification=message, error=str(error))
            self._failing = True
        else:
            self._failing = False


def _address(name: str) -> str:
    """Return the address of the socket: a path, or a name in the abstract namespace, which begins with an @."""
    if name.startswith("@"):
        return "\0" + name[1:]
    if name and not name.startswith("/"):
        log.warning(
            "NOTIFY_SOCKET is neither a path nor an abstract name; the service manager is not notified", value=name
        )
        return ""
    return name


def _interval(microseconds: str, pid: str) -> float:
    """Return the seconds between two heartbeats for the watchdog; 0 if it expects none from this process."""
    if not microseconds or (pid and pid != str(os.getpid())):
        return 0.0
    if not microseconds.isdecimal():
        log.warning("WATCHDOG_USEC is not a number; the watchdog gets no heartbeat", value=microseconds)
        return 0.0
    return int(microseconds) / 1e6 / HEARTBEATS
