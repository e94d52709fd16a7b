"""Time-outs that count only time in which this process ran, not pauses of the machine."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEPS = 4  # a time-out is counted in so many
LATE = 0.5  # seconds: a step that ends later than this does not count


@asynccontextmanager
async def running(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError when the block takes longer than ``seconds``.

    Like ``asyncio.timeout``, whose timer however fires before data that arrived while the process was stopped: here
    such a step does not count, and the data are processed before the next.
    """
    loop, step, left = asyncio.get_running_loop(), seconds / STEPS, STEPS
    async with asyncio.timeout(None) as limit:
        timer: asyncio.TimerHandle

        def over(due: float) -> None:
            nonlocal left, timer
            left -= time.monotonic() - due < LATE
            if left:
                timer = wait()
            else:
                limit.reschedule(loop.time())

        def wait() -> asyncio.TimerHandle:
            return loop.call_later(step, over, time.monotonic() + step)

        timer = wait()
        try:
            yield
        finally:
            timer.cancel()
