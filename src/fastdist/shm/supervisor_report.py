"""What the supervisor tells all processes in words, in the shared block: what no counter can say.

It is written whole whenever it has changed, and read when a view needs it. What is too long for the block is cut.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct, field

from fastdist.errors import Fault  # noqa: TC001  (decoding needs it)

MAX_FAULTS = 20  # of a configuration
MAX_OWN = 50
MAX_SINCE = 400  # problems, of which there may be one for each analyzer


class Own(Struct, frozen=True):
    """A problem that only the supervisor knows of: see ``problems``."""

    code: str
    subject: str
    detail: str


class Configuration(Struct):
    """The state of the configuration. Times are wall clock, ns; 0: never."""

    file: str = ""
    success_ns: int = 0  # the start, or the last reload that succeeded
    attempt_ns: int = 0  # the last reload
    faults: list[Fault] = field(default_factory=list)  # of the last reload; empty if it succeeded
    needs_restart: list[str] = field(default_factory=list)  # settings in the file that are not in force yet
    masked: list[str] = field(default_factory=list)  # analyzers whose weight in the file is overridden


class Report(Struct):
    """All of it. ``since``: when each problem began (wall clock, ns), by ``key``."""

    configuration: Configuration = field(default_factory=Configuration)
    own: list[Own] = field(default_factory=list)
    since: dict[str, int] = field(default_factory=dict)


def key(code: str, subject: str) -> str:
    """Return what distinguishes a problem from all others."""
    return f"{code} {subject}"


def encode(report: Report) -> bytes:
    """Return a report as bytes, cut to what is bounded."""
    configuration = msgspec.structs.replace(report.configuration, faults=report.configuration.faults[:MAX_FAULTS])
    since = dict(list(report.since.items())[:MAX_SINCE])
    return msgspec.json.encode(Report(configuration, report.own[:MAX_OWN], since))


def decode(data: bytes) -> Report:
    """Return the report; an empty one for no bytes."""
    return msgspec.json.decode(data, type=Report) if data else Report()
