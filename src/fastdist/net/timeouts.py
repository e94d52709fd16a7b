"""Time-outs that count only time in which this process ran, not pauses of the machine."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

STEPS = 4  # a time-out is counted in so many
LATE = 0.5  # seconds: a step that ends later than this does not count


def grace(late: float, seconds: float) -> float:
    """Return for how long a time-out of ``seconds`` goes on whose timer is ``late``; 0: it may judge.

    What arrived while the process was stopped is read only after the timer has fired.
    """
    return seconds / STEPS if late >= LATE else 0.0


class running:  # noqa: N801  (a context manager, as asyncio.timeout)
    """Raise TimeoutError when the block takes longer than ``seconds``.

    Like ``asyncio.timeout``, whose timer however fires before data that arrived while the process was stopped: here
    such a step does not count, and the data are processed before the next.
    """

    __slots__ = ("_due", "_left", "_limit", "_loop", "_step", "_timer")

    def __init__(self, seconds: float) -> None:
        self._step, self._left = seconds / STEPS, STEPS

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = await asyncio.timeout(None).__aenter__()
        self._wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, traceback)

    def _wait(self) -> None:
        self._due = time.monotonic() + self._step
        self._timer = self._loop.call_later(self._step, self._over)

    def _over(self) -> None:
        self._left -= time.monotonic() - self._due < LATE
        if self._left:
            self._wait()
        else:
            self._limit.reschedule(self._loop.time())
