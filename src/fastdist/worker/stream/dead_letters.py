"""Dead letters of a worker whose queue is a stream: each is stored in a stream of its own, then its packet is done.

What cannot be stored stays queued, and is tried again every RETRY_SECONDS; what is too large for a message, seldom, and
by itself. At the end others get its packet. The same calls as those of ``storage.dead_letter_writer.DeadLetterWriter``.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist._core import DamagedError
from fastdist.storage.dead_letter_format import as_line
from fastdist.storage.jetstream.connection import background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastdist._core import Counters, PacketRing
    from fastdist.storage.dead_letter_writer import PendingDeadLetter
    from fastdist.storage.jetstream.dead_stream import DeadStream

RETRY_SECONDS = 1.0
TOO_LARGE_SECONDS = 60.0  # until one that is too large is tried again: the servers' limit may have been raised
MAX_UNDER_WAY = 256

log = logs.get()


class DeadLetterPublisher:
    """Stores in ``stream``.

    ``place(sequence)``: the sequence of a packet's message, which of its packets it is, and when that was stored.

    ``gone(ring, sequence)`` is called for each packet that has become a dead letter.
    """

    def __init__(
        self,
        stream: DeadStream,
        counters: Counters,
        place: Callable[[int], tuple[int, int, int]],
        gone: Callable[[PacketRing, int], None],
    ) -> None:
        self.stream, self.counters, self.gone = stream, counters, gone
        self.failed = 0  # errno of what was tried last
        self.syncing = False
        self._place = place
        self._waiting: deque[PendingDeadLetter] = deque()
        self._too_large: deque[tuple[int, PendingDeadLetter]] = deque()  # when to try each again (monotonic ns)
        self._log_limit = logs.Throttle(TOO_LARGE_SECONDS)
        self._under_way = 0
        self._retry_at = 0  # monotonic ns

    @property
    def undone(self) -> int:
        """Dead letters that are not stored yet."""
        return len(self._waiting) + len(self._too_large) + self._under_way

    def add(self, *dead_letters: PendingDeadLetter) -> None:
        """Make dead letters of claimed packets."""
        self._waiting += dead_letters
        self._go_on()

    def tick(self, now_ns: int) -> None:
        """Store what waits, or could not be stored."""
        while self._too_large and now_ns >= self._too_large[0][0]:
            self._waiting.append(self._too_large.popleft()[1])
        if now_ns >= self._retry_at:
            self._go_on()

    def give_back(self) -> None:
        """Let go the packets of those that cannot be stored now: they go back to the ring."""
        unstored = [dead_letter for _, dead_letter in self._too_large]
        self._too_large.clear()
        if self.failed:
            unstored += self._waiting
            self._waiting.clear()
        for dead_letter in unstored:
            dead_letter.ring.release(dead_letter.handle)

    def look(self, _now_ns: int) -> None:
        """There are no files."""

    def sync_soon(self) -> None:
        """There is nothing to sync."""

    def finish(self) -> None:
        """Do nothing: what is not stored by now comes again, here or elsewhere."""

    def write_all(self, dead_letters: Iterable[PendingDeadLetter], progress: Callable[[], object]) -> None:
        """Nothing ends with this process."""

    def close(self) -> None:
        """Store nothing more."""
        self._waiting.clear()

    def _go_on(self) -> None:
        while self._waiting and self._under_way < MAX_UNDER_WAY and time.monotonic_ns() >= self._retry_at:
            self._under_way += 1
            background(self._store(self._waiting.popleft()))

    async def _store(self, dead_letter: PendingDeadLetter) -> None:
        ring, handle, reason, analyzer, status, error, response = dead_letter
        why, too_large = "", False
        try:
            line = as_line(ring.packet(handle), reason, analyzer, status, error, response)
            outcome = await self.stream.put(line, *self._place(ring.sequence(handle)))
            why = "" if outcome.stored == "yes" else outcome.detail or outcome.reason
            too_large = outcome.reason == "tooLarge"
        except DamagedError:
            ring.discard(handle)
            return
        except Exception as problem:  # noqa: BLE001  (whatever it is, the dead letter waits)
            why = str(problem) or type(problem).__name__
        finally:
            self._under_way -= 1
        if too_large:
            self._too_large.append((time.monotonic_ns() + int(TOO_LARGE_SECONDS * 1e9), dead_letter))
            if self._log_limit.allow():
                log.error("cannot store a dead letter; its packet stays queued", id=ring.packet(handle).id, error=why)
            return
        if why:
            self._waiting.appendleft(dead_letter)
            self._retry_at = time.monotonic_ns() + int(RETRY_SECONDS * 1e9)
            if not self.failed:
                log.error("cannot store dead letters; the packets stay queued", error=why)
            self.failed = errno.EIO
            return
        self.failed = 0
        sequence = ring.sequence(handle)
        ring.done(handle)
        self.counters.add(reason)
        self.gone(ring, sequence)
        self._go_on()
