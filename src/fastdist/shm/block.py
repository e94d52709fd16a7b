"""The shared-memory block: the state that all processes of one fastdist share. It does not outlive them.

Laid out in 8-byte words, in this order (``w`` workers, ``n`` analyzer slots):

| part      | words              | written by |
|-----------|--------------------|------------|
| head      | 64                 | the supervisor, except ``EPOCH`` |
| samples   | 16 x 4             | the supervisor, once a second |
| documents | 16384, 8192, 256   | the supervisor: what is wrong (``report``), dead letters, the stream |
| limiter   | limiter_words      | all, by compare-and-swap |
| analyzers | n x 64             | see ``AnalyzerWord`` |
| baselines | n x 256            | the supervisor: what a slot's earlier analyzers have counted, laid out as in a row |
| workers   | w x 16             | see ``WorkerWord`` |
| rows      | w x row_words(n)   | each worker its own: counters, histograms (``core/counters.pxi``) |
| examples  | w x 1024           | each worker its own: see ``Examples`` |
| lines     | limiter_words(8)   | all, by compare-and-swap: the limit of log lines |

An analyzer keeps its slot until it has left the configuration and another needs it: ``reset_slot`` then. Words have one
writer, or are changed atomically by helpers of ``AnalyzerStates``; text is written whole and may be read torn, so it is
for people only.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum, IntFlag, auto, unique
from typing import TYPE_CHECKING

import msgspec

from fastdist._core import (
    ANALYZER_FIELDS,
    ANALYZER_WORDS,
    COUNTER_WORDS,
    HISTOGRAM_BUCKETS,
    HISTOGRAMS_PER_ROW,
    WORDS_PER_HISTOGRAM,
    AnalyzerStates,
    Counters,
    RateLimiter,
    limiter_words,
    row_words,
)
from fastdist.dead_letter_report import Report as DeadLetterReport
from fastdist.dead_letter_report import encode
from fastdist.errors import StartError
from fastdist.shm.document import Document
from fastdist.stream_figures import StreamFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAGIC = 0x0A6466_74736166  # "fastfd\n"
CLIENT_SLOTS = 16384
SAMPLES = 16
SAMPLE_WORDS = 4
REPORT_WORDS = 16384
DEAD_LETTER_WORDS = 8192  # 64 KiB, of which hundreds of analyzers need half
STREAM_WORDS = 256
BASELINE_WORDS = ANALYZER_WORDS + WORDS_PER_HISTOGRAM  # of a slot
EXAMPLE_WORDS = 1024  # 32 kinds
LINE_SLOTS = 8  # that the limiter asks for; one limit for all lines is used
LINES = 10  # in any minute: half of them at once, the others evenly
COUNTED = ("delivered", "messages_delivered", "bytes_delivered", "failed", "retries")  # the other fields are gauges
HUNG = 1000  # the status of a worker that was killed because it gave no heartbeat


@unique
class HeadWord(IntEnum):
    """Words of the head."""

    MAGIC = 0
    WORKERS = 1
    SLOTS = 2
    EPOCH = 3  # grows with every change to an analyzer's state or weight; workers compare it when they flush
    STARTED_NS = 4  # monotonic
    SUPERVISOR = 5  # pid
    DRAINING = 6  # 1 from SIGTERM on
    SAMPLED = 7  # samples taken so far; the latest is at (SAMPLED - 1) % SAMPLES
    STORAGE_FAULT = 8  # workers whose last write to disk failed
    FAILING = 9  # Steps of the supervisor that fail at present
    CLOCK_OFFSET_NS = 10  # from the monotonic clock to the one packets are stamped with; see PacketRing
    DISCARDED_FOR_SIZE = 11  # dead letters, by the supervisor (workers count theirs)
    DISCARDED_FOR_AGE = 12
    NOT_AFTER = 20  # seconds since 1970: when the certificate that emitters are shown expires; 0 without one
    HEAD_WORDS = 64


@unique
class AnalyzerWord(IntEnum):
    """Words of an analyzer. The supervisor writes all, except where workers are named."""

    STATE = 0  # AnalyzerState; workers may turn ONLINE into OFFLINE, and back after a trial
    SINCE_NS = 1  # wall clock: when STATE last changed
    ONLINE_SINCE_NS = 2  # monotonic: when it last recovered, 0 if it was never offline (slow start)
    PAUSED_UNTIL_NS = 3  # monotonic; workers: Retry-After
    DELIVERY_FAILURES = 4  # in a row; workers
    REFUSALS = 5  # packets refused in a row without a 2xx; workers
    CHECK_FAILURES = 6  # in a row
    CHECK_SUCCESSES = 7  # in a row
    LAST_CHECK_NS = 8  # wall clock
    LAST_STATUS = 9  # of the last check; 0: no reply
    WEIGHT = 10  # a double
    IN_USE = 11  # 1: the slot belongs to a configured analyzer
    DRAINING = 12  # 1: set to drain
    ERROR_NS = 13  # wall clock; workers
    WEIGHT_OVERRIDDEN = 14  # 1: WEIGHT is not the configuration's
    PROBATION_WAIT_NS = 15  # after the next trial that fails; 0: deliveries did not take it offline; workers
    NEXT_TRIAL_NS = 16  # monotonic: no trial before; workers
    TRIAL_UNTIL_NS = 17  # monotonic: until then a worker has a trial under way, 0: no trial; workers
    NOT_AFTER = 22  # seconds since 1970: when its certificate expires, as last seen; 0: none was; workers
    CLIENT_NOT_AFTER = 23  # the same of the certificate that it is shown
    ERROR = 24  # text, up to 40 words
    ANALYZER_WORDS = 64


@unique
class WorkerWord(IntEnum):
    """Words of a worker that are not counters."""

    PID = 0  # the supervisor
    STATE = 1  # WorkerState; the supervisor
    RESTARTS = 2  # the supervisor
    HEARTBEAT_NS = 3  # monotonic; the worker's event loop
    CPU_NS = 4  # user and system, of all processes that this slot had; the supervisor
    CPU_PERMILLE = 5  # of one core, over the last second; the supervisor
    RSS = 6  # bytes; the supervisor
    STARTED_NS = 7  # wall clock; the supervisor
    STORAGE_FAULT = 8  # errno of the last write to disk; ENOENT: a ring's file is not under its name; the worker
    LACKING = 9  # bytes to become free until there is room for one more packet like the last, 0: there is; the worker
    END_STATUS = 10  # of the last process that ended here unasked: as in Popen.returncode, or HUNG; the supervisor
    END_NS = 11  # wall clock: when that was, 0 if never; the supervisor
    FAILING = 12  # Steps that fail at present; the worker
    DEAD_LETTERS_FAULT = 13  # errno of the last write of dead letters; the worker
    REJECTED_CONNECTIONS = 14  # connections that were over server.max_connections; the worker
    WORKER_WORDS = 16


class Step(IntFlag):
    """Periodic upkeep of workers and the supervisor."""

    DELIVERIES = auto()  # time-outs of deliveries, retries, spilling
    DEAD_LETTERS = auto()  # what waits is written and synced; files are closed when idle
    OLD_RINGS = auto()  # their packets are moved, then they are deleted
    SYNC = auto()
    GAUGES = auto()
    TIMEOUTS = auto()  # of emitters' connections
    QUEUE_FILES = auto()  # whether rings, and the lock, are under their names
    WORKERS = auto()  # those that hang are replaced
    ANALYZERS = auto()  # problems, changes of their state among them, are listed and logged
    FIGURES = auto()  # rates; what workers use
    OVERRIDES = auto()  # whether their file is there
    SERVICE_MANAGER = auto()
    CONNECTIONS = auto()  # to analyzers: whether this process has the resources to open them
    ACCEPTING = auto()  # connections of emitters: likewise

    @property
    def word(self) -> str:
        """Its name in JSON and in the log: ``oldRings``."""
        first, *others = str(self.name).lower().split("_")
        return first + "".join(map(str.capitalize, others))


class AnalyzerState(IntEnum):
    """Whether an analyzer can be picked."""

    ONLINE = 0
    OFFLINE = 1


class WorkerState(IntEnum):
    """What a worker is doing."""

    STARTING = 0
    RUNNING = 1
    DRAINING = 2
    STOPPED = 3


class SharedBlock:
    """The block over the memfd ``fd``; made by ``create``, opened by ``attach`` in the workers."""

    def __init__(self, fd: int, workers: int, slots: int) -> None:
        self.fd, self.workers, self.slots = fd, workers, slots
        self._map = mmap.mmap(fd, self.size(workers, slots))
        view, parts, at = memoryview(self._map), list[memoryview](), 0
        for words in self._layout(workers, slots):
            parts.append(view[at : at + 8 * words])
            at += 8 * words
        head, samples, report, dead, stream, self._limiter, analyzers, baselines, *of_workers = parts
        self._report, self._dead_letters, self._stream = Document(report), Document(dead), Document(stream)
        self.head, self.samples, self.baselines = head.cast("q"), samples.cast("q"), baselines.cast("q")
        self.analyzers = AnalyzerStates(analyzers, self.head)
        self._worker_words = [part.cast("q") for part in of_workers[:workers]]
        self._rows, self._examples = of_workers[workers : 2 * workers], of_workers[2 * workers : 3 * workers]
        self._lines = of_workers[-1]
        self._last_dead_letters = DeadLetterReport()  # that was read whole
        self.rows = [Counters(row, slots) for row in self._rows]

    @staticmethod
    def _layout(workers: int, slots: int) -> list[int]:
        """Return how many words each part has."""
        documents = [REPORT_WORDS, DEAD_LETTER_WORDS, STREAM_WORDS]
        of_all = [HeadWord.HEAD_WORDS, SAMPLES * SAMPLE_WORDS, *documents, limiter_words(CLIENT_SLOTS)]
        of_analyzers = [slots * AnalyzerWord.ANALYZER_WORDS, slots * BASELINE_WORDS]
        of_workers = [*[WorkerWord.WORKER_WORDS] * workers, *[row_words(slots)] * workers, *[EXAMPLE_WORDS] * workers]
        return [*of_all, *of_analyzers, *of_workers, limiter_words(LINE_SLOTS)]

    @classmethod
    def size(cls, workers: int, slots: int) -> int:
        """Return the block's size in bytes."""
        return 8 * sum(cls._layout(workers, slots))

    @classmethod
    def create(cls, workers: int, slots: int) -> SharedBlock:
        """Make a new block. Raises StartError when there is not enough memory."""
        fd = os.memfd_create("fastdist-shared", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, cls.size(workers, slots))
        except OSError as error:
            os.close(fd)
            raise StartError(f"cannot allocate {cls.size(workers, slots)} bytes of shared memory: {error}") from error
        block = cls(fd, workers, slots)
        block.head[HeadWord.WORKERS], block.head[HeadWord.SLOTS] = workers, slots
        block.head[HeadWord.MAGIC] = MAGIC
        return block

    @classmethod
    def attach(cls, fd: int) -> SharedBlock:
        """Open the block that another process made."""
        magic, workers, slots = struct.unpack("qqq", os.pread(fd, 24, 0))
        if magic != MAGIC:
            raise StartError("the descriptor passed to this worker is not a shared block")
        return cls(fd, workers, slots)

    def report(self) -> bytes:
        """Return what the supervisor has reported last; nothing if it never has, or writes just now and goes on to."""
        return self._report.read() or b""

    def set_report(self, body: bytes) -> None:
        """Replace the report; one that is too long for the block is dropped."""
        self._report.write(body)

    def limiter(self) -> RateLimiter:
        """Return this process's view of the rate limits."""
        return RateLimiter(self._limiter)

    def line_limit(self) -> Callable[[], bool]:
        """Return what says whether one more of the lines that all processes have to limit may be logged now."""
        limiter = RateLimiter(self._lines)
        limiter.configure(LINES / 2 / 60, LINES / 2, 0, 0)
        return lambda: limiter.check("") == 0.0

    def examples(self, index: int) -> memoryview:
        """Return a worker's examples as bytes."""
        return self._examples[index]

    def worker(self, index: int) -> memoryview:
        """Return the words of a worker, indexed by ``WorkerWord``."""
        return self._worker_words[index]

    def row(self, index: int) -> memoryview:
        """Return the counters and histograms of a worker as 8-byte words."""
        return self._rows[index].cast("q")

    def reset_slot(self, slot: int) -> None:
        """Reset the figures of a slot for another analyzer, by its baseline: workers' counters never decrease."""
        analyzers = COUNTER_WORDS + HISTOGRAMS_PER_ROW * WORDS_PER_HISTOGRAM
        rows = [self.row(index)[analyzers:] for index in range(self.workers)]
        first = slot * ANALYZER_WORDS
        histogram = self.slots * ANALYZER_WORDS + slot * WORDS_PER_HISTOGRAM
        counted = (first + ANALYZER_FIELDS[field] for field in COUNTED)
        words, sums = range(histogram, histogram + WORDS_PER_HISTOGRAM), histogram + HISTOGRAM_BUCKETS + 1
        for at in (*counted, *words):
            if at != sums:
                self.baselines[at] = sum(row[at] for row in rows)
        baselines, *doubles = (view.cast("B").cast("d") for view in (self.baselines, *rows))
        baselines[sums] = sum(row[sums] for row in doubles)

    @property
    def dead_letters(self) -> DeadLetterReport:
        """What was last seen of the dead letters."""
        if body := self._dead_letters.read():
            self._last_dead_letters = msgspec.msgpack.decode(body, type=DeadLetterReport)
        return self._last_dead_letters

    @dead_letters.setter
    def dead_letters(self, report: DeadLetterReport) -> None:
        self._dead_letters.write(encode(report, self._dead_letters.room))

    def recent_samples(self) -> Iterator[tuple[int, int, int]]:
        """Yield (monotonic ns, packets accepted, packets delivered) of the last seconds, the latest first."""
        taken = self.head[HeadWord.SAMPLED]
        for age in range(min(taken, SAMPLES)):
            at = (taken - 1 - age) % SAMPLES * SAMPLE_WORDS
            yield self.samples[at], self.samples[at + 1], self.samples[at + 2]

    def add_sample(self, now_ns: int, accepted: int, delivered: int) -> None:
        """Keep a sample of the totals, over the oldest."""
        at = self.head[HeadWord.SAMPLED] % SAMPLES * SAMPLE_WORDS
        self.samples[at], self.samples[at + 1], self.samples[at + 2] = now_ns, accepted, delivered
        self.head[HeadWord.SAMPLED] += 1

    @property
    def stream(self) -> StreamFigures:
        """What is known of the stream that is the queue; as a new one while there is nothing."""
        body = self._stream.read()
        return msgspec.json.decode(body, type=StreamFigures) if body else StreamFigures()

    @stream.setter
    def stream(self, figures: StreamFigures) -> None:
        body = msgspec.json.encode(figures)
        if (over := len(body) - self._stream.room) > 0:  # the reason is the only member without a limit
            error = f"{figures.error[: max(0, len(figures.error) - over - 3)]}..."
            body = msgspec.json.encode(msgspec.structs.replace(figures, error=error))
        self._stream.write(body)
