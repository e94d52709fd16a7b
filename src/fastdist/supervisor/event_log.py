"""The log of what is turned away, given up or discarded, and of events: few lines, whatever comes.

1. Of each kind there is a line at the beginning, one a minute while it goes on, and one at the end, each with how many
   there were since the line before, and an example. So their counts add up to what the metrics say. A kind that ended
   before its second line, with nothing to add to the first, has no line at the end, but for events ("queue has room").
2. Lines are made here from counters that all workers share, not where things happen. All processes together have one
   budget for them (``SharedBlock.line_limit``): ten lines a minute. What it has no room for waits, and is counted.
3. A kind that comes and goes has a line for its return once a minute at most.
4. No line has content: see ``Examples``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from fastdist import logs
from fastdist.shm.examples import KINDS, latest_example
from fastdist.shm.snapshot import CONNECTIONS, DEAD_LETTERS, REJECTIONS, UNCONFIRMED

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.shm.snapshot import Snapshot

GATHER = 1.0  # seconds before the first line, so that it has a count
REPEAT = 60.0  # seconds between two lines of a kind, but for its last
QUIET = 10.0  # seconds without anything new, after which it is over
CALM = 2.0  # the same, of what has a state of its own

log = logs.get()


class Kind(NamedTuple):
    """What its lines say: at the beginning, while it goes on, at the end; what its count is called."""

    begins: str
    goes_on: str
    ends: str
    counted: str
    reason: str = ""
    is_event: bool = False  # its end is told in any case
    quiet: float = QUIET


def _kind(subject: str, verb: str, counted: str, reason: str) -> Kind:
    return Kind(f"{subject} {verb}", f"{subject} still {verb}", f"{subject} no longer {verb}", counted, reason)


NO_ANALYZER = "no_analyzer"
KINDS_OF_LINES = {
    NO_ANALYZER: Kind(
        "no analyzer is online; packets wait in the queue",
        "still no analyzer is online; packets wait in the queue",
        "an analyzer is online again",
        "queued",
        is_event=True,
        quiet=CALM,
    ),
    "storage": Kind(
        "storage fails; packets are rejected",
        "storage still fails; packets are rejected",
        "storage works again",
        "requests",
        "storage",
        is_event=True,
        quiet=CALM,
    ),
    "queue_full": Kind(
        "queue full; packets are rejected",
        "queue still full; packets are rejected",
        "queue has room",
        "requests",
        "queue_full",
        is_event=True,
    ),
    **{reason: _kind("packets", "given up", "packets", reason) for reason in DEAD_LETTERS},
    **{reason: _kind("dead letters", "discarded", "packets", reason) for reason in ("max_bytes", "max_age")},
    **{
        reason: _kind("requests", "rejected", "requests", reason)
        for reason in (*REJECTIONS, UNCONFIRMED)
        if reason not in ("queue_full", "storage")
    },
    CONNECTIONS: _kind("connections", "turned away", "connections", "max_connections"),
}


class _Course:
    """How one kind goes: what was counted and logged of it, and when."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.total = self.logged = 0
        self.active = self.is_open = self.lasts = False
        self.since: float | None = None  # the first thing that was not logged
        self.changed = self.last_line = float("-inf")

    def count(self, total: int, *, active: bool, now: float) -> None:
        """Take in how many there were in all."""
        if total != self.total or active:
            self.changed = now
            if self.since is None:
                self.since = now
        self.total, self.active = total, active

    def line(self, now: float, *, last: bool) -> str:
        """Return what is to be said now; empty for nothing. ``last``: nothing can be said later."""
        kind, over = self.kind, now - self.changed >= self.kind.quiet
        if self.is_open:
            if over or last:
                self.is_open = self.total > self.logged or self.lasts or (kind.is_event and over)
                return kind.ends if self.is_open else ""
            waits = self.since is None or now - self.last_line < REPEAT or (kind.is_event and self.changed != now)
            return "" if waits else kind.goes_on
        waits = self.since is None or now - self.since < GATHER or now - self.last_line < REPEAT
        if self.since is None or (waits and not last):
            return ""
        return kind.ends if kind.is_event and over else kind.begins

    def said(self, text: str, now: float) -> None:
        """Note that this was logged."""
        self.logged, self.since, self.last_line = self.total, None, now
        self.is_open, self.lasts = text != self.kind.ends, text == self.kind.goes_on


class EventLog:
    """Logs what ``look`` sees; ``allow()`` says whether there may be a line now."""

    def __init__(self, allow: Callable[[], bool]) -> None:
        self._allow = allow
        self._courses = {name: _Course(kind) for name, kind in KINDS_OF_LINES.items()}

    def look(self, snapshot: Snapshot, *, now: float | None = None, last: bool = False) -> None:
        """Log what there is to say; call this every second, and at the end (``last``)."""
        now = time.monotonic() if now is None else now
        connections = {CONNECTIONS: snapshot.rejected_connections}
        totals = snapshot.rejected | snapshot.dead_lettered | snapshot.discarded | connections
        active = {
            NO_ANALYZER: not any(figures.state == "online" for figures in snapshot.analyzers),
            "storage": bool(snapshot.storage_error),
            "queue_full": any(worker.lacking for worker in snapshot.workers),
        }
        due = []
        for name, course in self._courses.items():
            course.count(totals.get(name, 0), active=active.get(name, False) and not last, now=now)
            if text := course.line(now, last=last):
                due.append((not course.kind.is_event, course.last_line, name, text))
        due.sort()
        for number, (_, _, name, text) in enumerate(due):
            if not self._allow():
                if last:
                    self._log_rest([name for _, _, name, _ in due[number:]])
                return
            self._log(name, text, snapshot, now)

    def _log(self, name: str, text: str, snapshot: Snapshot, now: float) -> None:
        course, more = self._courses[name], {}
        kind, since = course.kind, course.last_line
        count = snapshot.queued if name == NO_ANALYZER else course.total - course.logged
        if name in KINDS and text != kind.ends:
            more = latest_example(snapshot.block, name, int(max(since, 0.0) * 1e9))
        if name == "storage" and snapshot.storage_error:
            more = more | {"error": snapshot.storage_error}
        say = log.info if text == kind.ends and kind.is_event else log.warning
        say(text, **({"reason": kind.reason} if kind.reason else {}), **{kind.counted: count}, **more)
        course.said(text, now)

    def _log_rest(self, names: list[str]) -> None:
        """Log what is left for one line, at the end."""
        left = {name: self._courses[name].total - self._courses[name].logged for name in names}
        if counts := {name: count for name, count in left.items() if count > 0}:
            log.warning("and before the end, by reason", **counts)
