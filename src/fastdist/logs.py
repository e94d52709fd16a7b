"""Logging: structlog, as text on a terminal, else as one JSON object per line. Never a line per packet."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import orjson

sys.modules.setdefault("rich", cast("ModuleType", None))  # structlog.dev would import it: 0.1 s of each start
import structlog  # noqa: E402

if sys.modules["rich"] is None:
    del sys.modules["rich"]

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable
    from types import ModuleType
    from typing import TextIO


class _Patient:
    """A stream whose errors are ignored: a closed pipe or a full disk must not end the service."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _as_json(line: dict[str, object], **_: object) -> str:
    try:
        return orjson.dumps(line, default=str).decode()
    except orjson.JSONEncodeError:  # something is not valid Unicode, such as a file's name: all is escaped then
        return json.dumps(line, default=str)


def configure(level: int = logging.INFO, *, lasting: bool = True, **context: object) -> None:
    """Set logging up for this process; ``context`` (such as ``worker="0"``) is part of every line.

    ``lasting``: it is not set up again, so loggers need not look.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
    ]
    if sys.stderr.isatty():
        shared.append(structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False))
        renderer: structlog.typing.Processor = structlog.dev.ConsoleRenderer(pad_event_to=0)
    else:
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
        shared.append(structlog.processors.EventRenamer("message"))
        renderer = structlog.processors.JSONRenderer(serializer=_as_json)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # A line is one write, its end included: several processes share the stream.
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Patient(sys.stderr))),
        cache_logger_on_first_use=lasting,
    )
    structlog.contextvars.bind_contextvars(**context)


def take_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log the errors that the event loop reports, of callbacks and tasks: by itself it writes them as plain text."""

    def report(_: object, context: dict[str, Any]) -> None:
        more = {"task": repr(context["task"])} if "task" in context else {}  # the rest may show what is in packets
        get().error(context["message"], exc_info=context.get("exception"), **more)

    loop.set_exception_handler(report)


_limits: list[Callable[[], bool]] = []  # none, or one


def limit_lines(allow: Callable[[], bool]) -> None:
    """Have ``allow`` decide, for all processes, about lines that many things may cause: see ``may_log``."""
    _limits[:] = [allow]


def may_log() -> bool:
    """Whether a line that many things may cause may be logged now; ask once for each line."""
    return all(allow() for allow in _limits)


class Throttle:
    """Lets each kind of event through once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next: dict[Hashable, float] = {}  # kind -> time.monotonic()

    def allow(self, kind: Hashable = None) -> bool:
        """Whether an event of this kind may be logged now."""
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            return False
        self._next[kind] = now + self._seconds
        return True


def get() -> structlog.typing.FilteringBoundLogger:
    """Return the logger; it follows ``configure`` even when taken before."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
