"""The supervisor's part in the list of problems: what only it knows, since when each lasts, and the log's lines.

The log has a line when a problem begins and one when it has ended ("resolved: ..."); of COUNTED ones the event log has.
One that comes and goes counts as ended when it has not been there for as long as its kind ``settles``, so that it makes
no line each time; one of any kind that has begun ``OFTEN`` times within a minute, when it has not been there for
``CALM`` seconds.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastdist import logs
from fastdist.shm.block import HeadWord, Step
from fastdist.shm.problems import KINDS, LEVELS, Problem, problems
from fastdist.shm.supervisor_report import Own, Report, encode
from fastdist.storage.files import files_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fastdist.shm.block import SharedBlock
    from fastdist.shm.snapshot import Snapshot
    from fastdist.shm.upkeep import Upkeep
    from fastdist.storage.directory import QueueFolder
    from fastdist.supervisor.processes import Processes
    from fastdist.supervisor.reload import Changes
    from fastdist.supervisor.systemd import ServiceManager

    class Service(Protocol):
        """What is asked of a supervisor."""

        block: SharedBlock
        upkeep: Upkeep
        folder: QueueFolder
        changes: Changes
        processes: Processes
        manager: ServiceManager

        def snapshot(self) -> Snapshot:
            """Return what all processes know now."""

        def late_workers(self) -> list[str]:
            """Return the workers that have not applied new settings in time."""


# The event log tells these, with how many there were (``event_log``).
COUNTED = {"queue_full", "storage_failing", "no_analyzer", "packets_dead_lettered", "requests_rejected"}
START = 10.0  # seconds after which workers that are not ready yet are a problem
LIST_SHARE = 10  # times as long as it takes to list problems, until they are listed again for an analyzer
LATELY = 60.0  # seconds for which packets that were rejected or given up are a problem
OFTEN = 3  # beginnings of a problem within LATELY
CALM = 20.0  # seconds
MAX_FILES = 20  # that were set aside
MAX_STATUS = 2000  # characters: a message to the service manager has 4096 bytes

log = logs.get()


class ProblemList:
    """The list of problems as the supervisor makes it, and tells it to all processes, the log and the service manager.

    Once a second is often enough, and at once when the state of an analyzer changes.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._follower, self._traffic = Follower(), Traffic()
        self._epoch = 0  # of the analyzers' states, when problems were listed last
        self._next = 0.0  # time.monotonic(): not listed again for an analyzer before that
        self._reported = b""

    def look_if_changed(self) -> None:
        """List problems if the state of an analyzer has changed."""
        if self._service.block.analyzers.epoch != self._epoch and time.monotonic() >= self._next:
            self.look()

    def look(self) -> None:
        """List problems, whatever happens."""
        began = time.monotonic()
        self._service.upkeep.run(Step.ANALYZERS, self._list)
        ended = time.monotonic()
        self._next = ended + LIST_SHARE * (ended - began)

    def _list(self) -> None:
        service = self._service
        self._epoch = service.block.analyzers.epoch
        snapshot = service.snapshot()
        service.changes.state.masked = service.changes.masked
        report = Report(service.changes.state, self._own(snapshot), self._follower.since)
        found = problems(snapshot, report)
        if self._is_logged():
            self._follower.follow(found)
            report.since = self._follower.since
        if (body := encode(report)) != self._reported:
            self._reported = body
            service.block.set_report(body)
        if not service.processes.stopping:
            service.manager.status(status_line(snapshot, found))

    def _is_logged(self) -> bool:
        """Whether changes are logged: not while the service starts or stops."""
        processes, started_ns = self._service.processes, self._service.block.head[HeadWord.STARTED_NS]
        begun = time.monotonic() - started_ns / 1e9 > START
        return (begun or processes.all_ready.is_set()) and not processes.stopping

    def _own(self, snapshot: Snapshot) -> list[Own]:
        """Return what no other process knows."""
        service = self._service
        found = [*self._traffic.problems(snapshot), *service.changes.problems(), *set_aside(service.folder.path)]
        if late := service.late_workers():
            detail = f"settings are not applied by all workers: {', '.join(late)} may go by those before the reload"
            found.append(Own("settings_not_applied", "workers", detail))
        for slot in service.processes.slots:
            if slot.crashes:
                name, ended = f"worker {slot.index}", snapshot.workers[slot.index].ended
                found.append(Own("worker_restarting", name, f"{name} dies again and again: {ended}"))
        return found


class _Followed(NamedTuple):
    problem: Problem
    begun: float  # time.monotonic(), as the next: the wall clock may be set meanwhile
    seen: float
    settles: float  # seconds it must be over for its end to count


class Follower:
    """Since when problems last, and what the log has been told of them."""

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}  # by key
        self._begun: dict[str, list[float]] = {}  # when they have begun within the last minute, by key

    @property
    def since(self) -> dict[str, int]:
        """When each problem began (wall clock, ns), by its key."""
        return {key: each.problem.since_ns for key, each in self._followed.items()}

    def follow(self, found: Iterable[Problem]) -> None:
        """Take the list of this moment, and log what has begun and what has ended."""
        now = time.monotonic()
        self._begun = {key: times for key, times in self._begun.items() if now - times[-1] < LATELY}
        for problem in found:
            before = self._followed.get(problem.key)
            begun, settles = (before.begun, before.settles) if before else (now, self._begin(problem, now))
            self._followed[problem.key] = _Followed(problem, begun, now, settles)
        for key, (problem, begun, seen, settles) in tuple(self._followed.items()):
            if seen != now and now - seen >= settles:
                del self._followed[key]
                if problem.code not in COUNTED:
                    _log_end(problem, now - begun)

    def _begin(self, problem: Problem, now: float) -> float:
        """Log that a problem has begun; return for how many seconds it must be over for its end to count."""
        if problem.code not in COUNTED:
            _log_begin(problem)
        begun = self._begun[problem.key] = [*self._begun.get(problem.key, ())[1 - OFTEN :], now]
        often = sum(now - moment < LATELY for moment in begun) >= OFTEN
        return max(KINDS[problem.code].settles, CALM if often else 0.0)


def _log_begin(problem: Problem) -> None:
    write = dict(zip(LEVELS, (log.error, log.warning, log.info), strict=True))[problem.level]
    write(KINDS[problem.code].title, problem=problem.code, subject=problem.subject, detail=problem.detail)


def _log_end(problem: Problem, lasted: float) -> None:
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
        refused = "requests were rejected within the last minute"
        return [
            *(Own("packets_dead_lettered", each, f"{dead}: {each}") for each in given_up),
            *(Own("requests_rejected", each, f"{refused}: {each.replace('_', ' ')}") for each in rejected),
        ]


def set_aside(folder: Path) -> list[Own]:
    """Return a problem for each queue file that was damaged and is kept: until it is moved elsewhere or deleted."""
    try:
        names = [path.name for path in files_in(folder, "*.damaged-*")][:MAX_FILES]
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
