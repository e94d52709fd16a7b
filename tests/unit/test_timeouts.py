"""Time-outs that a pause of the process does not end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import uvloop

from fastdist.net import timeouts

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request):
    def run(coroutine):
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(asyncio.wait_for(coroutine, 60))

    return run


def test_events_during_a_pause_are_in_time(run, monkeypatch):
    monkeypatch.setattr(timeouts, "LATE", 0.1)

    async def scenario():
        loop, reply = asyncio.get_running_loop(), asyncio.Event()
        for _ in range(3):
            reply.clear()
            async with timeouts.running(0.05):
                threading.Timer(0.01, loop.call_soon_threadsafe, [reply.set]).start()
                time.sleep(0.6)  # noqa: ASYNC251  (as a process that is stopped)
                await reply.wait()

    run(scenario())


def test_what_never_comes_is_a_time_out(run):
    async def scenario():
        with pytest.raises(TimeoutError):
            async with timeouts.running(0.02):
                await asyncio.Event().wait()
        async with timeouts.running(60.0):
            await asyncio.sleep(0)

    run(scenario())


def test_a_cancellation_is_no_time_out(run):
    async def scenario():
        async def wait():
            async with timeouts.running(60.0):
                await asyncio.Event().wait()

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
