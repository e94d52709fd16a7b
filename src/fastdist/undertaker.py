"""Burying: packets become dead letters some at a time, and leave their ring when their letters are safe.

1. What cannot be written stays queued, and is tried again every ``RETRY_SECONDS``.
2. No turn of the event loop writes letters for much longer than ``PART_NS``; the rest follows in later turns.
3. With ``sync`` (durability fsync) all that one turn has written is synced together, in a thread. Only after that do
   its packets leave the ring, and is more written. A part whose sync fails is taken back from its file.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fastdist import logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist._core.counters import Counters
    from fastdist._core.ring import PacketRing
    from fastdist.deadletters import DeadLetters

RETRY_SECONDS = 1.0  # until a letter that could not be written is tried again
PART_NS = 50_000_000

log = logs.get()


class Letter(NamedTuple):
    """A dead letter to be written: the packet, why, and the last analyzer that saw it with what it said."""

    ring: PacketRing
    handle: int
    reason: str
    analyzer: str | None
    status: int | None
    error: str | None


class Undertaker:
    """Writes ``dead_letters``; ``buried(ring, sequence)`` hears of each packet that has become one.

    ``sync(done)`` has all that was written synced elsewhere and calls ``done(error)``, in the event loop.
    """

    def __init__(
        self, dead_letters: DeadLetters, counters: Counters, buried: Callable[[PacketRing, int], None]
    ) -> None:
        self.dead_letters, self.counters, self.buried = dead_letters, counters, buried
        self.sync: Callable[[Callable[[OSError | None], None]], None] | None = None
        self.unwritten: deque[Letter] = deque()
        self.unsynced: list[Letter] = []  # the part that was written and is being synced
        self.failed = False  # what was tried last
        self._next = 0  # monotonic ns

    def bury(self, *letters: Letter) -> None:
        """Have claimed packets become dead letters."""
        self.unwritten += letters
        self._write()

    def tick(self, now_ns: int) -> None:
        """Write what is left, or could not be written."""
        if self.unwritten and now_ns >= self._next:
            self._write()

    def bury_now(self, letters: list[Letter]) -> int:
        """Write these and all others here and now; return how many there were. Raises OSError. Nothing is synced."""
        self.unwritten += letters
        count = len(self.unwritten)
        while self.unwritten:
            part, problem = self._write_a_part()
            for letter in part:
                self._done(letter)
            if problem is not None:
                raise problem
        return count

    def _write(self) -> None:
        if self.unsynced:
            return  # the part before comes first
        part, problem = self._write_a_part()
        if self.sync is not None and part:
            self.unsynced = part
            self.sync(partial(self._synced, problem))
            return
        for letter in part:
            self._done(letter)
        self._judge(problem)

    def _write_a_part(self) -> tuple[list[Letter], OSError | None]:
        """Write for a while; return what was written, and what has kept the rest from it."""
        part: list[Letter] = []
        end = time.monotonic_ns() + PART_NS
        while self.unwritten and (not part or time.monotonic_ns() < end):
            ring, handle, reason, analyzer, status, error = self.unwritten[0]
            try:
                self.dead_letters.write(ring.packet(handle), reason, analyzer, status, error)
            except OSError as problem:
                return part, problem
            part.append(self.unwritten.popleft())
        return part, None

    def _synced(self, problem: OSError | None, error: OSError | None) -> None:
        part, self.unsynced = self.unsynced, []
        if error is None:
            for letter in part:
                self._done(letter)
        else:
            self.dead_letters.take_back()
            self.unwritten.extendleft(reversed(part))
        self._judge(error or problem)
        if self.unwritten and not self.failed:
            self._write()

    def _done(self, letter: Letter) -> None:
        sequence = letter.ring.sequence(letter.handle)
        letter.ring.done(letter.handle)
        self.counters.add(letter.reason)
        self.buried(letter.ring, sequence)

    def _judge(self, problem: OSError | None) -> None:
        if problem is not None:
            if not self.failed:
                log.error("cannot write dead letters; the packets stay queued", error=str(problem))
            self._next = time.monotonic_ns() + int(RETRY_SECONDS * 1e9)
        self.failed = problem is not None
