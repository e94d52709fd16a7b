"""``fastdist top``: polls a distributor and shows its figures until it is interrupted.

A thread asks, so that keys are heard while a server takes its time. A server that is away is asked on; its last
figures stay, and say how old they are.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from datetime import UTC, datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.live import Live

from fastdist.client.connection import Connection, describe
from fastdist.client.top_view import Frame, History, Responses, render
from fastdist.errors import UNDECODABLE
from fastdist.http.models import Analyzers, Health, Queue, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastdist.client.connection import Target

TIMEOUT = 5.0  # seconds without a response
MAX_RESPONSE = 1 << 24  # bytes
REDRAW = 0.25  # seconds, at most
PLAIN_WIDTH = 160  # columns where no terminal says
ENDING_KEYS = {b"q", b"Q", b"\x04", b""}  # Ctrl-D; nothing: the terminal is gone

Kind = TypeVar("Kind", Health, Stats, Queue, Analyzers)


class NoResponseError(Exception):
    """The server does not answer, or not as a distributor does; the text says why."""


class Watcher:
    """Asks one distributor."""

    def __init__(self, target: Target) -> None:
        self._connection = Connection(target, TIMEOUT)
        self.frame = Frame(target.url, datetime.now(UTC))

    def look(self) -> Frame:
        """Ask for everything; return (and keep) what is known now."""
        try:
            health, stats, queue = self._get("/health", Health), self._get("/stats", Stats), self._get("/queue", Queue)
            responses = Responses(health, stats, queue, self._get("/analyzers", Analyzers).analyzers)
        except NoResponseError as error:
            self.frame = self.frame._replace(at=datetime.now(UTC), trouble=str(error))
        else:
            now = datetime.now(UTC)
            self.frame = Frame(self.frame.url, now, responses, now)
        return self.frame

    def _get(self, path: str, kind: type[Kind]) -> Kind:
        try:
            reply = self._connection.request("GET", path, None, {}, MAX_RESPONSE)
        except (OSError, HTTPException) as error:
            raise NoResponseError(describe(error, TIMEOUT)) from None
        if reply.status != 200:  # noqa: PLR2004  (what it answers when it serves)
            why = f": {reply.detail}" if reply.detail else "; is that the URL of a distributor?"
            raise NoResponseError(f"{path} is answered {reply.status}{why}")
        try:
            return msgspec.json.decode(reply.content, type=kind)
        except UNDECODABLE as error:
            raise NoResponseError(f"{path}: {error}; is that the URL of a distributor?") from None


def print_once(target: Target) -> bool:
    """Print a frame; return whether there was a response."""
    frame = Watcher(target).look()
    if frame.responses is None:
        typer.echo(f"fastdist: {target.url}: {frame.trouble}", err=True)
        return False
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(render(frame, console.width))
        return True
    console = Console(highlight=False, width=PLAIN_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(render(frame, PLAIN_WIDTH))
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
    return True


def watch(target: Target, interval: float) -> bool:
    """Show frames until q or Ctrl-C; return True, for it has shown what there was."""
    watcher, history, enough = Watcher(target), History(), threading.Event()

    def ask() -> None:
        while not enough.is_set():
            frame = watcher.look()
            if frame.responses is not None and not frame.trouble:
                history.add(frame.responses)
            enough.wait(interval)

    threading.Thread(target=ask, daemon=True).start()
    console = Console(highlight=False)
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as key,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while key(min(interval, REDRAW)) not in ENDING_KEYS:
            live.update(render(watcher.frame, console.width, console.height, history), refresh=True)
    enough.set()
    return True


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bytes | None]]:
    """Yield what returns the key that is pressed within some seconds, None without one; a lost terminal is b"".

    Keys come at once and are not shown. Afterwards, SIGTERM included, the terminal is as it was.
    """
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: os.read(fd, 1) if select.select([fd], [], [], seconds)[0] else None
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, handler)
