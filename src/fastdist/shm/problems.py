"""What is wrong with the service: the one list that /health, the dashboard, ``top``, systemd and the log show.

A list is made of a snapshot, by whichever process is asked; what only the supervisor knows, and since when each problem
lasts, stands in its report. A problem is known by its code and its subject; the rest may change while it lasts.
docs/operations.md has a row for each code. The rules:

- A detail is for a person: "what: more of it". It has no figure that changes by the second.
- Levels: ``error``: packets are refused, or none are delivered. ``warning``: an operator has to look. ``notice``: it is
  meant to be so, or passes. Without errors and warnings the service is ok.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from fastdist.shm.block import AnalyzerWord, HeadWord, Step, WorkerState, WorkerWord
from fastdist.shm.supervisor_report import key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastdist.shm.figures import AnalyzerFigures, WorkerFigures
    from fastdist.shm.snapshot import Snapshot
    from fastdist.shm.supervisor_report import Report

NEARLY_FULL = 0.8  # of a worker's part of the queue
LEVELS = ("error", "warning", "notice")
NAMED = 3  # workers


class Kind(NamedTuple):
    """A kind of problem. ``title``: the log's name of it; ``settles``: seconds it must be over for its end to count."""

    level: str
    title: str
    settles: float = 0.0


KINDS = {
    "storage_failing": Kind("error", "packets cannot be stored", 5.0),
    "queue_full": Kind("error", "queue full", 5.0),
    "no_analyzer": Kind("error", "no analyzer is online"),
    "certificate_out_of_date": Kind("error", "certificate out of date"),
    "queue_nearly_full": Kind("warning", "queue nearly full", 10.0),
    "analyzer_offline": Kind("warning", "analyzer offline"),
    "analyzer_refusing": Kind("warning", "analyzer refuses packet after packet", 10.0),
    "worker_missing": Kind("warning", "worker not running"),
    "worker_restarting": Kind("warning", "worker dies again and again"),
    "dead_letters_failing": Kind("warning", "cannot write dead letters", 5.0),
    "packets_dead_lettered": Kind("warning", "packets become dead letters"),
    "dead_letters_fill_disk": Kind("warning", "dead letters fill their file system", 10.0),
    "descriptors_short": Kind("warning", "too few file descriptors", 5.0),
    "upkeep_failing": Kind("warning", "upkeep failing", 5.0),
    "lock_lost": Kind("warning", "queue lock lost"),
    "queue_file_set_aside": Kind("warning", "queue file set aside"),
    "reload_failed": Kind("warning", "reload failed, configuration unchanged"),
    "settings_not_applied": Kind("warning", "settings not applied by all workers"),
    "overrides_ignored": Kind("warning", "overrides of earlier runs ignored"),
    "service_draining": Kind("notice", "draining"),
    "restart_needed": Kind("notice", "settings wait for a restart"),
    "connections_lowered": Kind("notice", "server.max_connections lowered"),
    "analyzer_probation": Kind("notice", "analyzer on probation"),
    "analyzer_paused": Kind("notice", "analyzer paused", 10.0),
    "analyzer_draining": Kind("notice", "analyzer draining"),
    "records_damaged": Kind("notice", "damaged records skipped"),
    "requests_rejected": Kind("notice", "requests rejected"),
}
_ORDER = {code: number for number, code in enumerate(KINDS)}

CONNECTIONS = {
    Step.CONNECTIONS: "connections to analyzers cannot be opened",
    Step.ACCEPTING: "connections of emitters cannot be accepted",
}


class Problem(NamedTuple):
    """Something that is wrong. ``since_ns``: wall clock."""

    code: str
    subject: str
    detail: str
    since_ns: int

    @property
    def level(self) -> str:
        """One of LEVELS."""
        return KINDS[self.code].level

    @property
    def key(self) -> str:
        """What distinguishes it from all others."""
        return key(self.code, self.subject)


class _Found(NamedTuple):
    code: str
    subject: str
    detail: str
    since_ns: int = 0  # if the report says nothing, which the log goes by; 0: now


def problems(snapshot: Snapshot, report: Report | None = None) -> list[Problem]:
    """Return what is wrong, the worst first. ``report``: the supervisor's, if not that of the snapshot."""
    report = snapshot.report if report is None else report
    found = [*_of_queue(snapshot), *_of_analyzers(snapshot), *_of_workers(snapshot), *_of_upkeep(snapshot)]
    found += [_Found(own.code, own.subject, own.detail) for own in report.own if own.code in KINDS]
    found.sort(key=lambda each: _ORDER[each.code])  # which keeps the order of analyzers and workers
    now = time.time_ns()
    return [
        Problem(each.code, each.subject, each.detail, report.since.get(key(*each[:2]), each.since_ns or now))
        for each in found
    ]


def status(found: Iterable[Problem]) -> str:
    """Return what a list comes to: ``ok``, ``degraded`` or ``unavailable``."""
    listed = list(found)
    if any(problem.code == "no_analyzer" for problem in listed):
        return "unavailable"
    return "degraded" if any(problem.level != "notice" for problem in listed) else "ok"


# ---- the queue


def _of_queue(it: Snapshot) -> Iterator[_Found]:
    for code, text in it.obstacles:
        yield _Found(code, "" if code == "service_draining" else "queue", text + _parts(it, code))
    if whose := _nearly_full(it):
        yield _Found("queue_nearly_full", "queue", f"the queue is nearly full: over {NEARLY_FULL:.0%} of {whose}")
    if error := it.dead_letter_error:
        detail = f"dead letters cannot be written: {error}; the packets stay queued"
        yield _Found("dead_letters_failing", "dead-letters", detail)
    if warning := it.dead_letters.warning:
        detail = f"{warning}: replay or purge them, or set dead_letters.max_bytes"
        yield _Found("dead_letters_fill_disk", "dead-letters", detail)
    if it.total("corrupt"):
        lost = it.total("lost")
        packets = f", {lost} packet{'s' if lost > 1 else ''} lost" if lost else ""
        yield _Found("records_damaged", "queue", f"damaged records of the queue were skipped{packets}: see the log")


def _nearly_full(it: Snapshot) -> str:
    """Return what of the queue is nearly full; nothing if it is not, or is full."""
    if any(worker.lacking for worker in it.workers):
        return ""
    if it.stream is not None:
        return "the stream" if it.stream.bytes >= NEARLY_FULL * it.stream.capacity > 0 else ""
    fullest = [worker for worker in it.workers if worker.queue_bytes >= NEARLY_FULL * worker.capacity_bytes > 0]
    if len(fullest) == len(it.workers):
        return "it"
    return f"the part of {_names(fullest)}" if fullest else ""


def _parts(it: Snapshot, code: str) -> str:
    """Return whose part of the queue it is about, unless it is about all of them."""
    if it.stream is not None:
        return ""
    of_code = {"storage_failing": lambda worker: worker.storage_fault, "queue_full": lambda worker: worker.lacking}
    if code not in of_code:
        return ""
    concerned = [worker for worker in it.workers if of_code[code](worker)]
    return "" if len(concerned) == len(it.workers) else f" ({_names(concerned)})"


def _names(workers: list[WorkerFigures]) -> str:
    """Return the workers' names; of many, the first."""
    names = ", ".join(str(worker.id) for worker in workers[:NAMED])
    more = f" and {len(workers) - NAMED} more" if len(workers) > NAMED else ""
    return f"worker{'s' if len(workers) > 1 else ''} {names}{more}"


# ---- analyzers


def _of_analyzers(it: Snapshot) -> Iterator[_Found]:
    if not any(figures.state == "online" for figures in it.analyzers):
        others = "packets are accepted, and wait until one comes back" if not it.obstacle else "nothing is delivered"
        yield _Found("no_analyzer", "analyzers", f"no analyzer is online: {others}")
    for figures in it.analyzers:
        yield from _of_analyzer(it, figures)


def _of_analyzer(it: Snapshot, figures: AnalyzerFigures) -> Iterator[_Found]:
    name, states, slot = figures.analyzer.id, it.block.analyzers, figures.slot
    error = states.error(slot)
    if figures.draining:
        yield _Found("analyzer_draining", name, f"{name} is draining: it gets no new packets")
        return
    if not figures.online:
        tried = ", on probation" if figures.on_probation else ""
        since = states.get(slot, AnalyzerWord.SINCE_NS)
        yield _Found("analyzer_offline", name, f"{name} is offline{tried}" + (f": {error}" if error else ""), since)
        return
    if figures.on_probation:
        detail = f"{name} is on probation: it gets one packet at a time until it takes one"
        yield _Found("analyzer_probation", name, detail)
    if states.refusals(slot) > it.config.health.fall:
        yield _Found("analyzer_refusing", name, f"{name} refuses packet after packet" + (f": {error}" if error else ""))
    if states.get(slot, AnalyzerWord.PAUSED_UNTIL_NS) > it.at:
        yield _Found("analyzer_paused", name, f"{name} is paused: it has asked for that by Retry-After")


# ---- workers and upkeep


def _of_workers(it: Snapshot) -> Iterator[_Found]:
    for worker in it.workers:
        if worker.state not in {WorkerState.RUNNING, WorkerState.DRAINING}:
            name, ended = f"worker {worker.id}", f": {worker.ended}" if worker.ended else ""
            yield _Found("worker_missing", name, f"{name} is {worker.state.name.lower()}{ended}")


def _of_upkeep(it: Snapshot) -> Iterator[_Found]:
    steps = it.block.head[HeadWord.FAILING]
    if steps & Step.QUEUE_FILES:
        steps &= ~Step.QUEUE_FILES  # of the supervisor that is the lock only
        yield _Found("lock_lost", "lock", "the lock of the queue's folder is lost: another process may use the queue")
    for index in range(it.block.workers):
        steps |= it.block.worker(index)[WorkerWord.FAILING]
    for step in (step for step in Step if step & steps):
        if step in CONNECTIONS:
            detail = f"{CONNECTIONS[step]}: raise the limit on open files (ulimit -n, LimitNOFILE)"
            yield _Found("descriptors_short", step.word, detail)
        else:
            words = str(step.name).lower().replace("_", " ")
            yield _Found("upkeep_failing", step.word, f"upkeep fails: {words}; the log says why")
