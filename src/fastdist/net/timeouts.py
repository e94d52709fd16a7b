"""Time-outs that count only time in which this process ran: a pause of the machine is nobody's delay."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEPS = 4  # that a time-out is counted in
LATE = 0.5  # seconds behind its time from which on a step does not count


@asynccontextmanager
async def running(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError when what stands within takes longer than ``seconds``.

    As ``asyncio.timeout``, whose timer however comes before what has arrived meanwhile when the process was stopped:
    here such a step counts for nothing, and what has arrived is dealt with before the next.
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
