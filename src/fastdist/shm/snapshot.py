"""The shared block at one moment, over all workers: the source of every view of the service's figures.

- It does not matter which process takes a snapshot. Counters are read once, when it is made; histograms, which are
  long, only when a view asks for them.
- A worker's deliveries are read before its acceptances: figures taken under load may be some packets behind, but show
  nothing delivered that was not accepted.
- Slots of analyzers that have left the configuration still count in every total. What is shown of one analyzer begins
  at its slot's baseline, which is what earlier ones have counted there.
"""

from __future__ import annotations

import errno
import math
import os
import time
from functools import cached_property
from typing import TYPE_CHECKING

from fastdist._core import (
    ANALYZER_FIELDS,
    ANALYZER_WORDS,
    COUNTER_WORDS,
    FIELDS,
    FIRST_PROTOCOL_WORD,
    HISTOGRAMS_PER_ROW,
    STATUSES_COUNTED,
    WORDS_PER_HISTOGRAM,
    WORDS_PER_PROTOCOL,
)
from fastdist.settings import PROTOCOLS
from fastdist.shm.block import AnalyzerWord, HeadWord, Step, WorkerState, WorkerWord
from fastdist.shm.figures import AnalyzerFigures, ProtocolFigures, Rates, WorkerFigures
from fastdist.shm.histograms import Histogram, merge
from fastdist.shm.supervisor_report import Report, decode
from fastdist.shm.weights import effective_weights, normalised, seems_online

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fastdist.dead_letter_report import Report as DeadLetterReport
    from fastdist.settings import Analyzer, Config
    from fastdist.shm.block import SharedBlock
    from fastdist.stream_figures import StreamFigures

REJECTIONS = (
    "malformed",
    "invalid",
    "too_large",
    "head_too_large",
    "unsupported_media_type",
    "unauthorized",
    "rate_limited",
    "queue_full",
    "draining",
    "storage",
    "timeout",
)
UNCONFIRMED = "unconfirmed"  # the reason that only a stream has
CONNECTIONS = "connections"  # that were turned away
DEAD_LETTERS = ("refused", "exhausted", "oversized", "shutdown")
RATE_WINDOW_NS = 10_000_000_000
STREAM_FAULTS = {  # errno -> what it means where the queue is a stream
    errno.ENOTCONN: "no NATS server is connected",
    errno.EAGAIN: "the stream has no leader that sees a majority",
    errno.ETIMEDOUT: "the stream does not acknowledge",
}
MAX_WAIT = 30  # seconds, of Retry-After
MIN_WINDOW_NS = 1_000_000_000  # one packet a millisecond after a sample is not a thousand a second

_INGEST = COUNTER_WORDS  # where the histograms of a row begin
_QUEUE_WAIT = _INGEST + WORDS_PER_HISTOGRAM
_LOOP_LAG = _QUEUE_WAIT + WORDS_PER_HISTOGRAM
_PUBLISH = _LOOP_LAG + WORDS_PER_HISTOGRAM
_ANALYZERS = _INGEST + HISTOGRAMS_PER_ROW * WORDS_PER_HISTOGRAM


class Snapshot:
    """The shared block at one moment, over all workers.

    ``analyzers`` maps slots to the configured analyzers, in the order they are shown in; ``at`` is the moment times are
    counted from (monotonic, ns; now, unless a test says otherwise).
    """

    def __init__(
        self,
        block: SharedBlock,
        config: Config,
        analyzers: Mapping[int, Analyzer],
        version: str,
        at: int | None = None,
    ) -> None:
        self.block, self.config, self.configured, self.version = block, config, analyzers, version
        self.at = time.monotonic_ns() if at is None else at
        self._rows = [block.row(index) for index in range(block.workers)]
        histograms = _ANALYZERS + block.slots * ANALYZER_WORDS
        self._histograms = [row[histograms:] for row in self._rows]  # of each worker: those of all analyzers
        self._baselines = block.baselines[block.slots * ANALYZER_WORDS :]
        self._by_slot: list[list[int]] = []  # of each worker: the counters of all analyzers, end to end
        self._counters: list[list[int]] = []
        for row in self._rows:
            self._by_slot.append(row[_ANALYZERS:histograms].tolist())
            self._counters.append(row[:COUNTER_WORDS].tolist())

    # ---- totals

    def total(self, field: str) -> int:
        """Return a counter of ``FIELDS`` over all workers."""
        at = FIELDS[field]
        return sum(counters[at] for counters in self._counters)

    def total_of_analyzers(self, field: str) -> int:
        """Return a counter of ``ANALYZER_FIELDS`` over all workers and all slots, also of analyzers that have left."""
        return sum(self._over_slots(index, field) for index in range(len(self._rows)))

    def _over_slots(self, worker: int, field: str) -> int:
        return sum(self._by_slot[worker][ANALYZER_FIELDS[field] :: ANALYZER_WORDS])

    @cached_property
    def _analyzer_totals(self) -> list[int]:
        baselines = self.block.baselines  # it may have risen since the counters were read
        return [max(sum(words) - baselines[at], 0) for at, words in enumerate(zip(*self._by_slot, strict=True))]

    @property
    def accepted(self) -> int:
        """Packets that were answered 202 or 200."""
        return self.total("accepted")

    @property
    def delivered(self) -> int:
        """Packets that an analyzer has taken."""
        return self.total_of_analyzers("delivered")

    @cached_property
    def rejected(self) -> dict[str, int]:
        """Requests that brought no packet, by reason."""
        reasons = REJECTIONS if self.stream is None else (*REJECTIONS, UNCONFIRMED)
        return {reason: self.total(reason) for reason in reasons}

    @cached_property
    def protocols(self) -> dict[str, ProtocolFigures]:
        """What has come of requests of log agents, by protocol."""
        return {name: self._protocol(number) for number, name in enumerate(PROTOCOLS)}

    def _protocol(self, number: int) -> ProtocolFigures:
        start = FIRST_PROTOCOL_WORD + number * WORDS_PER_PROTOCOL
        rows = (counters[start : start + WORDS_PER_PROTOCOL] for counters in self._counters)
        records, *responses = map(sum, zip(*rows, strict=True))
        counts = zip(STATUSES_COUNTED, responses, strict=False)
        return ProtocolFigures(records, {status: count for status, count in counts if count})

    @cached_property
    def dead_lettered(self) -> dict[str, int]:
        """Packets that became dead letters, by reason."""
        return {reason: self.total(reason) for reason in DEAD_LETTERS}

    @cached_property
    def dead_letters(self) -> DeadLetterReport:
        """The dead letters that are there, as of the supervisor's last look: a second ago, or somewhat more."""
        return self.block.dead_letters

    @property
    def rejected_connections(self) -> int:
        """Connections that were over ``server.max_connections``."""
        return sum(self.block.worker(index)[WorkerWord.REJECTED_CONNECTIONS] for index in range(self.block.workers))

    @property
    def discarded(self) -> dict[str, int]:
        """Dead letters that were discarded, by the bound that they were over."""
        head = self.block.head
        return {
            "max_bytes": self.total("discarded") + head[HeadWord.DISCARDED_FOR_SIZE],
            "max_age": head[HeadWord.DISCARDED_FOR_AGE],
        }

    @property
    def received(self) -> int:
        """Accepted, rejected, or known already."""
        return self.accepted + sum(self.rejected.values()) + self.total("duplicates")

    @property
    def in_flight(self) -> int:
        """Packets sent to an analyzer that has not replied yet; with a stream, those that were claimed from it."""
        if self.stream is not None:
            return self.total("undone")
        return self.total_of_analyzers("packets_in_flight")

    @cached_property
    def stream(self) -> StreamFigures | None:
        """The stream that is the queue; None: each worker has its own."""
        return self.block.stream if self.config.queue.backend == "jetstream" else None

    @property
    def packets_per_message(self) -> float:
        """How many packets a message of the stream holds, of those that were published or claimed here."""
        messages = self.total("stream_messages")
        return self.total("stream_packets") / messages if messages else 1.0

    @property
    def queued(self) -> int:
        """Packets that wait; with a stream, in all of it, and an estimate where its messages hold several."""
        if self.stream is not None:
            return round(self.stream.queued * self.packets_per_message)
        return sum(worker.queued for worker in self.workers)

    @property
    def queue_bytes(self) -> int:
        """Bytes of the queue in use, old rings included."""
        return self.total("queue_bytes") if self.stream is None else self.stream.bytes

    @property
    def queue_capacity(self) -> int:
        """Bytes that the queue can hold."""
        return self.total("queue_capacity") if self.stream is None else self.stream.capacity

    @property
    def drain_rate(self) -> float:
        """Packets that leave the queue a second."""
        if self.stream is not None:
            return self.stream.settled_per_second * self.packets_per_message
        return self.rates.delivered

    @property
    def oldest_age(self) -> float:
        """For how many seconds the oldest packet has been in the queue; 0 when it is empty."""
        if self.stream is not None:
            return max(time.time() - self.stream.oldest, 0.0) if self.stream.oldest else 0.0
        return max(self.age(worker.oldest_ns) for worker in self.workers)

    @property
    def uptime(self) -> float:
        """Seconds since the service started."""
        return (self.at - self.block.head[HeadWord.STARTED_NS]) / 1e9

    def age(self, accepted_ns: int) -> float:
        """Return the seconds since a packet was accepted, by its stamp; 0 for none.

        Never negative, although the clock may have been set back since an earlier run that has accepted it.
        """
        now = self.at + self.block.head[HeadWord.CLOCK_OFFSET_NS]
        return max(now - accepted_ns, 0) / 1e9 if accepted_ns else 0.0

    @cached_property
    def rates(self) -> Rates:
        """What was accepted and delivered a second, over the last 10 seconds or as far back as there are samples."""
        samples = list(self.block.recent_samples())
        recent = [sample for sample in samples if self.at - sample[0] <= RATE_WINDOW_NS]
        if not samples:
            return Rates(0.0, 0.0)
        since_ns, accepted, delivered = recent[-1] if recent else samples[0]
        seconds = max(self.at - since_ns, MIN_WINDOW_NS) / 1e9
        return Rates(max(self.accepted - accepted, 0) / seconds, max(self.delivered - delivered, 0) / seconds)

    # ---- histograms

    @property
    def ingest(self) -> Histogram:
        """From the end of a request's reading until its packet is safe (with fsync: synced) and the response sent."""
        return merge(row[_INGEST:_QUEUE_WAIT] for row in self._rows)

    @property
    def queue_wait(self) -> Histogram:
        """From acceptance to the first attempt."""
        return merge(row[_QUEUE_WAIT:_LOOP_LAG] for row in self._rows)

    def loop_lag(self, worker: int) -> Histogram:
        """How long a worker's event loop was blocked: the longest time in each tick, see ``LoopLag``."""
        return merge([self._rows[worker][_LOOP_LAG:_PUBLISH]])

    @property
    def publish(self) -> Histogram:
        """From the sending of a message to the stream until its acknowledgement."""
        return merge(row[_PUBLISH:_ANALYZERS] for row in self._rows)

    def delivery(self, slots: Iterable[int] | None = None) -> Histogram:
        """From an attempt to its reply, for the analyzers in ``slots`` (None: for all, also removed ones)."""
        starts = [slot * WORDS_PER_HISTOGRAM for slot in (range(self.block.slots) if slots is None else slots)]
        all_time = merge(row[start : start + WORDS_PER_HISTOGRAM] for row in self._histograms for start in starts)
        if slots is None:
            return all_time
        return all_time.since(merge(self._baselines[start : start + WORDS_PER_HISTOGRAM] for start in starts))

    # ---- workers and analyzers

    @cached_property
    def workers(self) -> list[WorkerFigures]:
        """All workers, by number."""
        return [self._worker(index) for index in range(self.block.workers)]

    def _worker(self, index: int) -> WorkerFigures:
        words, counters = self.block.worker(index), self._counters[index]
        return WorkerFigures(
            id=index,
            pid=words[WorkerWord.PID],
            state=WorkerState(words[WorkerWord.STATE]),
            restarts=words[WorkerWord.RESTARTS],
            cpu_ns=words[WorkerWord.CPU_NS],
            cpu_percent=words[WorkerWord.CPU_PERMILLE] / 10,
            rss_bytes=words[WorkerWord.RSS],
            accepted=counters[FIELDS["accepted"]],
            delivered=self._over_slots(index, "delivered"),
            queued=max(counters[FIELDS["undone"]] - self._over_slots(index, "packets_in_flight"), 0),
            queue_bytes=counters[FIELDS["queue_bytes"]],
            capacity_bytes=counters[FIELDS["queue_capacity"]],
            undone=counters[FIELDS["undone"]],
            oldest_ns=counters[FIELDS["oldest_ns"]],
            storage_fault=words[WorkerWord.STORAGE_FAULT],
            dead_letters_fault=words[WorkerWord.DEAD_LETTERS_FAULT],
            lacking=words[WorkerWord.LACKING],
            end_status=words[WorkerWord.END_STATUS],
            end_ns=words[WorkerWord.END_NS],
        )

    @cached_property
    def analyzers(self) -> list[AnalyzerFigures]:
        """The configured analyzers, in the configuration's order."""
        states = self.block.analyzers
        weights = {slot: float(states.weight(slot)) for slot in self.configured}
        target = normalised(weights)
        effective = normalised(effective_weights(states, self.configured, self.config.health, self.at))
        unit = {"packets": "delivered", "messages": "messages_delivered", "bytes": "bytes_delivered"}
        actual = normalised({slot: self._of(slot, unit[self.config.distribution.by]) for slot in self.configured})
        return [
            AnalyzerFigures(
                slot=slot,
                analyzer=analyzer,
                weight=weights[slot],
                online=seems_online(states, slot, self.config.health.rise),
                on_probation=states.is_on_probation(slot, self.config.health.rise),
                draining=bool(states.get(slot, AnalyzerWord.DRAINING)),
                weight_overridden=bool(states.get(slot, AnalyzerWord.WEIGHT_OVERRIDDEN)),
                target_share=target[slot],
                effective_share=effective.get(slot, 0.0),
                actual_share=actual[slot],
                delivered=self._of(slot, "delivered"),
                failed=self._of(slot, "failed"),
                retried=self._of(slot, "retries"),
                in_flight=self._of(slot, "packets_in_flight"),
                connections=self._of(slot, "connections"),
            )
            for slot, analyzer in self.configured.items()
        ]

    @property
    def certificates(self) -> list[tuple[str, str, int]]:
        """Certificates: of whom (own, analyzer, client), the analyzer's id, and when they expire (s since 1970)."""
        states, word = self.block.analyzers, AnalyzerWord
        found = [("own", "", self.block.head[HeadWord.NOT_AFTER])]
        for slot, analyzer in self.configured.items():
            found.append(("analyzer", analyzer.id, states.get(slot, word.NOT_AFTER)))
            found.append(("client", analyzer.id, states.get(slot, word.CLIENT_NOT_AFTER)))
        return [each for each in found if each[2]]

    def _of(self, slot: int, field: str) -> int:
        at: int = slot * ANALYZER_WORDS + ANALYZER_FIELDS[field]
        return self._analyzer_totals[at]

    @property
    def failing(self) -> list[str]:
        """The steps of the upkeep that fail at present, in any process."""
        steps = self.block.head[HeadWord.FAILING]
        for index in range(self.block.workers):
            steps |= self.block.worker(index)[WorkerWord.FAILING]
        return [step.word for step in Step if step & steps]

    @property
    def storage_error(self) -> str:
        """Why packets cannot be stored; empty when they can."""
        fault = next((worker.storage_fault for worker in self.workers if worker.storage_fault), 0)
        if fault and self.stream is not None:
            return self.stream.error or STREAM_FAULTS.get(fault, os.strerror(fault))
        if fault == errno.ENOENT:
            return "the queue's file was deleted or renamed"
        return os.strerror(fault) if fault else ""

    @property
    def dead_letter_error(self) -> str:
        """Why dead letters cannot be written; empty when they can. Packets are accepted all the same."""
        fault = next((worker.dead_letters_fault for worker in self.workers if worker.dead_letters_fault), 0)
        if fault and self.stream is not None:
            return "their stream does not take them"
        return os.strerror(fault) if fault else ""

    @cached_property
    def obstacles(self) -> list[tuple[str, str]]:
        """Why the service should get no packets now: codes of problems, and texts."""
        found = []
        if self.block.head[HeadWord.DRAINING]:
            found.append(("service_draining", "the service is draining: it is about to end"))
        if self.storage_error:
            found.append(("storage_failing", f"packets cannot be stored: {self.storage_error}"))
        if any(worker.lacking for worker in self.workers):
            found.append(("queue_full", "the queue is full"))
        return found

    @property
    def obstacle(self) -> str:
        """The first of them; empty when it is ready."""
        return self.obstacles[0][1] if self.obstacles else ""

    @cached_property
    def report(self) -> Report:
        """What the supervisor has said last."""
        return decode(self.block.report())

    @property
    def retry_after(self) -> int:
        """In how many seconds there will be room in the queue, at the present rate of deliveries; 1 to MAX_WAIT."""
        workers, stream = self.workers, self.stream
        if stream is not None:
            lacking = max(worker.lacking for worker in workers)
            return _seconds_until_room(lacking, stream.bytes, stream.messages, stream.settled_per_second)
        rate = self.rates.delivered / len(workers)
        return max(_seconds_until_room(each.lacking, each.queue_bytes, each.undone, rate) for each in workers)


def _seconds_until_room(lacking: int, size: int, records: int, records_per_second: float) -> int:
    if not (lacking and records):  # or there is room as soon as the file is synced
        return 1
    seconds = lacking / (size / records) / max(records_per_second, 1e-9)
    return max(1, math.ceil(min(seconds, MAX_WAIT)))
