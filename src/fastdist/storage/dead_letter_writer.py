"""The dead-letter writer: has packets written in small batches; each leaves its ring when its dead letter is safe.

1. A packet leaves its ring after its dead letter was written, synced (except with durability memory) and found in a
   file that still has its name. What a failed sync covers is removed from its file and written again, as is what went
   to a file that was moved or deleted meanwhile: at worst a dead letter is written twice.
2. Dead letters that wait for their sync are synced together, in a thread, ``sync_delay`` after the first of them was
   written: at once with durability fsync. They are synced sooner where they are many, for their packets take up room
   in the ring. While a sync runs nothing is written; the next one covers what has gathered meanwhile.
3. What cannot be written or synced stays queued, and is tried again every ``RETRY_SECONDS``.
4. No event-loop iteration writes dead letters for much longer than ``PART_NS``; the rest follows in later iterations.
   So ``add`` writes at once only when few are waiting.
"""

from __future__ import annotations

import errno
import sys
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from fastdist import logs
from fastdist._core import DamagedError
from fastdist.storage.dead_letter_format import as_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastdist._core import Counters, PacketRing
    from fastdist.storage.dead_letter_files import DeadLetterFiles

    Runner = Callable[[Callable[[], None], Callable[[OSError | None], None]], None]

RETRY_SECONDS = 1.0  # until a dead letter that could not be written is tried again
MAX_DELAY = 1.0  # seconds that a dead letter waits for its sync, with whatever sync_interval
PART_NS = 8_000_000
LAST_PART_NS = 1_000_000_000  # at the end, when no other work waits: what is synced together,
LAST_PART_BYTES = 8 << 20  # and how much of that: a slow disk has to be seen to get on
AT_ONCE = 1 << 16  # dead letters that are claimed at once then: a queue may hold many millions
FEW = 16  # dead letters that wait to be written
MANY = 256  # dead letters that do not wait for others to be synced with
SHARE = 8  # nor do those of more than this part of a ring

log = logs.get()


class PendingDeadLetter(NamedTuple):
    """A dead letter to be written: the packet, why, and the last analyzer that saw it with its response."""

    ring: PacketRing
    handle: int
    reason: str
    analyzer: str | None
    status: int | None
    error: str | None
    response: bytes | None = None  # the beginning of its body


def what_is_left(ring: PacketRing) -> Iterator[PendingDeadLetter]:
    """Claim the unclaimed packets of a ring that ends with this service, one after the other; yield dead letters."""
    while handle := ring.claim():
        yield PendingDeadLetter(ring, handle, "shutdown", None, None, None)


class DeadLetterWriter:
    """Writes to ``files``; ``gone(ring, sequence)`` is called for each packet that has become a dead letter.

    With ``run`` dead letters are synced ``sync_delay`` seconds after they were written (``MAX_DELAY`` at most):
    ``run(work, done)`` does ``work`` in a thread and then calls ``done``, with the OSError it raised if any, in the
    event loop.
    """

    def __init__(
        self,
        files: DeadLetterFiles,
        counters: Counters,
        gone: Callable[[PacketRing, int], None],
        run: Runner | None = None,
        sync_delay: float = 0.0,
    ) -> None:
        self.files, self.counters, self.gone = files, counters, gone
        self._run, self._sync_delay = run, int(min(sync_delay, MAX_DELAY) * 1e9)  # ns
        self.unwritten: deque[PendingDeadLetter] = deque()
        self.written: list[PendingDeadLetter] = []  # and not known to be safe
        self.syncing = self._closed = False
        self.failed = 0  # errno of what was tried last
        self._sync_at = self._retry_at = 0  # monotonic ns
        self._problem: Exception | None = None  # with what was written last

    def add(self, *dead_letters: PendingDeadLetter) -> None:
        """Make dead letters of claimed packets."""
        self.unwritten += dead_letters
        if len(self.unwritten) <= max(FEW, len(dead_letters)):
            try:
                self._write()
            except Exception as error:  # noqa: BLE001  (whatever it is, the dead letters are recorded)
                self._judge(error)

    def tick(self, now_ns: int) -> None:
        """Write what is left or could not be written; sync what has waited for it."""
        if self.unwritten and now_ns >= self._retry_at:
            self._write()
        elif self.written and now_ns >= self._sync_at:
            self._sync()

    def look(self, now_ns: int) -> None:
        """Close the file when other processes may have it; to be called regularly."""
        self.files.tick(now_ns)

    def sync_soon(self) -> None:
        """Make the next tick sync what was written."""
        self._sync_at = 0

    def finish(self) -> None:
        """Sync what was written now; what cannot be synced stays queued. No sync may be running."""
        if self.written:
            self._settle(self._sync_now())

    def close(self) -> None:
        """Close the files, and write nothing more: unsynced, it would be a dead letter and stay queued as well."""
        self._closed = True
        self.files.close()

    def write_all(
        self, dead_letters: Iterable[PendingDeadLetter], progress: Callable[[], object] = lambda: None
    ) -> None:
        """Write these and all others now: their ring ends with this process. Raises OSError; some may be written then.

        A sync is tried, but its failure is only logged: a dead letter that is not synced is better than none. No sync
        may be running. ``progress()`` is called while each part is written and synced.
        """
        more = iter(dead_letters)
        self.unwritten += islice(more, AT_ONCE)
        self.files.bounds.gives_way = True
        while self.unwritten or self.written:
            self._write_part(LAST_PART_NS, LAST_PART_BYTES)
            progress()
            error = self._sync_now()
            if error is not None:
                log.error("dead letters cannot be synced", error=str(error))
            self._settle(None)
            if self._problem is not None:
                raise self._problem
            progress()
            if not self.unwritten:
                self.unwritten += islice(more, AT_ONCE)

    # ---- writing

    def _write(self) -> None:
        if self.syncing or self._closed:
            return
        if not self.written:
            self._sync_at = time.monotonic_ns() + self._sync_delay
        self._write_part(PART_NS)
        if self._problem is not None:
            self._judge(self._problem)
        if self._run is None:
            self._settle(None)
        elif self.written and (self._are_many() or time.monotonic_ns() >= self._sync_at):
            self._sync()

    def _write_part(self, part_ns: int, part_bytes: int = sys.maxsize) -> None:
        """Write for a while, or until so much waits for a sync."""
        self._problem = None
        end, first = time.monotonic_ns() + part_ns, True
        while self.unwritten and not self.files.wants_sync and (first or time.monotonic_ns() < end):
            first = False
            if self.files.unsettled >= part_bytes:
                return
            ring, handle, reason, analyzer, status, error, response = self.unwritten[0]
            try:
                self.files.write(as_line(ring.packet(handle), reason, analyzer, status, error, response))
            except BlockingIOError:  # room is being made for it
                return
            except DamagedError:
                self.unwritten.popleft()
                ring.discard(handle)
                continue
            except Exception as problem:  # noqa: BLE001  (OSError, nearly always; whatever it is, the dead letter waits)
                self._problem = problem
                return
            self.written.append(self.unwritten.popleft())

    # ---- syncing

    def _are_many(self) -> bool:
        if len(self.written) >= MANY or self.files.wants_sync:
            return True
        return self.files.unsettled > self.written[-1].ring.capacity // SHARE

    def _sync(self) -> None:
        if self._run is not None and not self.syncing:
            self.syncing = True
            self._run(self.files.begin_sync(), self._synced)

    def _synced(self, error: OSError | None) -> None:
        self.syncing = False
        self._settle(error)
        if self.unwritten and not self.failed:
            self._write()

    def _sync_now(self) -> OSError | None:
        try:
            self.files.begin_sync()()
        except OSError as error:
            return error
        return None

    # ---- what becomes of it

    def _settle(self, error: OSError | None) -> None:
        """Remove packets whose dead letters are safe from their ring; write the others again."""
        dead_letters, self.written = self.written, []
        failure: Exception | None = error
        try:
            safe = self.files.settle(error)
        except Exception as problem:  # noqa: BLE001  (it is not known what is safe)
            safe, failure = False, problem
        if safe:
            for dead_letter in dead_letters:
                sequence = dead_letter.ring.sequence(dead_letter.handle)
                dead_letter.ring.done(dead_letter.handle)
                self.counters.add(dead_letter.reason)
                self.gone(dead_letter.ring, sequence)
        else:
            self.unwritten.extendleft(reversed(dead_letters))
        self._judge(failure or self._problem)

    def _judge(self, problem: Exception | None) -> None:
        if problem is not None:
            if not self.failed and logs.may_log():
                log.error("cannot write dead letters; the packets stay queued", error=str(problem))
            self._retry_at = time.monotonic_ns() + int(RETRY_SECONDS * 1e9)
        self.failed = 0 if problem is None else getattr(problem, "errno", None) or errno.EIO
