"""The supervisor's part in the list of problems: what only it knows, since when each lasts, and the log's lines.

The log has a line when a problem begins and one when it has ended ("resolved: ..."); of COUNTED ones the event log has.
One that comes and goes counts as ended when it has not been there for as long as its kind ``settles``, so that it makes
no line each time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from fastdist import logs
from fastdist.shm.problems import KINDS, LEVELS, Problem
from fastdist.shm.report import Own

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fastdist.shm.snapshot import Snapshot

# The event log tells these, with how many there were (``event_log``).
COUNTED = {"queue_full", "storage_failing", "no_analyzer", "packets_dead_lettered", "requests_rejected"}
LATELY = 60.0  # seconds for which packets that were rejected or given up are a problem
MAX_FILES = 20  # that were set aside
MAX_STATUS = 2000  # characters: a message to the service manager has 4096 bytes

log = logs.get()


class _Followed(NamedTuple):
    problem: Problem
    seen: float  # time.monotonic()


class Follower:
    """Since when problems last, and what the log has been told of them."""

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}  # by key

    @property
    def since(self) -> dict[str, int]:
        """When each problem began (wall clock, ns), by its key."""
        return {key: each.problem.since_ns for key, each in self._followed.items()}

    def follow(self, found: Iterable[Problem]) -> None:
        """Take the list of this moment, and log what has begun and what has ended."""
        now = time.monotonic()
        for problem in found:
            if problem.key not in self._followed and problem.code not in COUNTED:
                _log_begin(problem)
            self._followed[problem.key] = _Followed(problem, now)
        for key, (problem, seen) in tuple(self._followed.items()):
            if seen != now and now - seen >= KINDS[problem.code].settles:
                del self._followed[key]
                if problem.code not in COUNTED:
                    _log_end(problem)


def _log_begin(problem: Problem) -> None:
    write = dict(zip(LEVELS, (log.error, log.warning, log.info), strict=True))[problem.level]
    write(KINDS[problem.code].title, problem=problem.code, subject=problem.subject, detail=problem.detail)


def _log_end(problem: Problem) -> None:
    lasted = max(0.0, time.time() - problem.since_ns / 1e9)
    title = f"resolved: {KINDS[problem.code].title}"
    log.info(title, problem=problem.code, subject=problem.subject, lasted_seconds=round(lasted, 1))


class Growth:
    """Which of some counts have grown lately."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._grown: dict[str, float] = {}  # when, time.monotonic()

    def lately(self, counts: Mapping[str, int]) -> list[str]:
        """Return the names of those that have grown within the last minute, as far as this was asked meanwhile."""
        now = time.monotonic()
        for name, count in counts.items():
            if count > self._counts.get(name, 0):
                self._grown[name] = now
        self._counts = dict(counts)
        return [name for name, grown in self._grown.items() if now - grown < LATELY]


class Traffic:
    """Packets that were rejected or given up within the last minute, as problems."""

    def __init__(self) -> None:
        self._rejected, self._given_up = Growth(), Growth()

    def problems(self, snapshot: Snapshot) -> list[Own]:
        """Return one for each reason."""
        given_up = self._given_up.lately(snapshot.dead_lettered)
        rejected = self._rejected.lately(snapshot.rejected)
        dead = "packets became dead letters within the last minute"
        turned_away = "requests were rejected within the last minute"
        return [
            *(Own("packets_dead_lettered", each, f"{dead}: {each}") for each in given_up),
            *(Own("requests_rejected", each, f"{turned_away}: {each.replace('_', ' ')}") for each in rejected),
        ]


def set_aside(folder: Path) -> list[Own]:
    """Return a problem for each queue file that was damaged and is kept: until it is moved elsewhere or deleted."""
    try:
        names = sorted(path.name for path in folder.glob("*.damaged-*"))[:MAX_FILES]
    except OSError:  # which other problems tell
        return []
    detail = "a queue file could not be read and was set aside: {}; move it elsewhere, or delete it"
    return [Own("queue_file_set_aside", name, detail.format(name)) for name in names]


def status_line(snapshot: Snapshot, found: Iterable[Problem]) -> str:
    """Return the status line that the service manager shows: what there is, and what is wrong."""
    states = [figures.state for figures in snapshot.analyzers]
    running = sum(worker.running for worker in snapshot.workers)
    workers, online = f"{running} of {len(snapshot.workers)} workers running", states.count("online")
    line = f"{workers}, {online} of {len(states)} analyzers online"
    left = list(found)
    while left and len(line) + len(left[0].detail) < MAX_STATUS:
        line += f"; {left.pop(0).detail}"
    return f"{line}; and {len(left)} more problems" if left else line
