"""The process: analyzers, the control port and the ledger file, from the first line printed to the last flush."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import uvloop

from mock_analyzers.analyzer import Analyzer
from mock_analyzers.connection import Connection
from mock_analyzers.control import Control
from mock_analyzers.ledger_file import LedgerFile
from mock_analyzers.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mock_analyzers.options import Options

CANNOT_START = 3
"""Exit status when a port is taken or the ledger file cannot be opened."""

_RARELY = 100_000  # allocations between collections: a request leaves no cycle behind


class Settings(NamedTuple):
    """What the command line says. There are as many ids as ports."""

    host: str
    ports: Sequence[int]
    ids: Sequence[str]
    control_port: int
    ledger: Path | None
    quiet: bool
    seed: int | None
    options: Options


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status."""
    try:
        return uvloop.run(_serve(settings))
    except KeyboardInterrupt:  # a second Ctrl-C, while the first is being obeyed
        return 0


async def _serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    _allow_many_connections()
    log: LedgerFile | None = None
    analyzers: list[Analyzer] = []
    control_listener = Listener(
        partial(Connection, None, Control(every=analyzers)), settings.host, settings.control_port
    )
    try:
        if settings.ledger is not None:
            log = LedgerFile(settings.ledger)
            log.start(loop)
        for name, port in zip(settings.ids, settings.ports, strict=True):
            analyzers.append(_start(name, port, settings, log))
        control_listener.open()
        if not settings.quiet:
            _announce(analyzers, control_listener)
        gc.freeze()
        gc.set_threshold(_RARELY, 50, 50)
        await stop.wait()
    except OSError as error:
        sys.stderr.write(f"mock_analyzers: cannot start: {error}\n")
        return CANNOT_START
    finally:
        control_listener.close()
        for analyzer in analyzers:
            analyzer.stop()
        if log is not None:
            log.close()
    return 0


def _start(name: str, port: int, settings: Settings, log: LedgerFile | None) -> Analyzer:
    analyzer = Analyzer(name, settings.options, settings.seed, log)
    factory = partial(Connection, analyzer, Control(own=analyzer))
    analyzer.listener = Listener(factory, settings.host, port)
    try:
        analyzer.start()
    except OSError as error:
        raise OSError(f"{name} on {settings.host}:{port}: {error.strerror or error}") from error
    return analyzer


def _announce(analyzers: Sequence[Analyzer], control_listener: Listener) -> None:
    for analyzer in analyzers:
        verb = "refuses" if analyzer.options.refuse else "listens on"
        sys.stdout.write(f"{analyzer.id} {verb} {analyzer.listener.origin}/analyze\n")
    sys.stdout.write(f"control listens on {control_listener.origin}/control\n")
    sys.stdout.flush()


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
