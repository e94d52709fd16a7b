"""SIGTERM with emitters connected: every request gets a whole answer or none, and 202 means what it always means."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from experiment import BATCHES, DELIVERY, form, in_flight, twice_after_a_kill

DRAIN = {"drain_timeout": "1s"}


@pytest.mark.parametrize("delivery", [DELIVERY, BATCHES], ids=["single", "batch"])
def test_memory_moves_rest_to_dead_letters(experiment, delivery):
    """The analyzers are too slow for what is queued to be delivered in time."""
    experiment.analyzers("--latency", "1.5")
    fastdist = experiment.serve({"queue": {"durability": "memory"}, "delivery": delivery, "server": DRAIN})
    emitter = experiment.emitter().start().wait_for(1000)
    assert fastdist.stop() == 0
    verdict = experiment.judge(
        f"SIGTERM under load (memory, {delivery.get('mode', 'single')})", at_rest=False, bound=in_flight(delivery)
    )
    dead_letters = fastdist.dead_letters()
    assert {row["reason"] for row in dead_letters} == {"shutdown"}
    assert verdict.accepted > 1000
    check_answers(emitter)


@pytest.mark.parametrize("durability", ["disk", "fsync"])
def test_disk_keeps_the_rest_for_next_start(experiment, durability):
    mocks = experiment.analyzers("--latency", "0.2")
    settings = {"queue": {"durability": durability}, "server": DRAIN}
    times = form(1, 4)
    for turn in range(times):
        fastdist = experiment.serve(settings)
        emitter = experiment.emitter().start().wait_for(700)
        emitter.enough.clear()
        assert fastdist.stop() == 0
        emitter.stop()
        check_answers(emitter)
        assert turn or fastdist.dead_letters() == []
    mocks.set_all(latency=0)
    experiment.serve(settings)
    experiment.judge(f"SIGTERM under load ({durability})", bound=times * in_flight(DELIVERY))


@pytest.mark.parametrize("durability", ["memory", "disk"])
def test_two_signals_end_it_at_once(experiment, durability):
    experiment.analyzers("--latency", "0.1")
    settings = {"queue": {"durability": durability}, "server": {"drain_timeout": "1h"}}
    fastdist = experiment.serve(settings)
    emitter = experiment.emitter().start().wait_for(500)
    fastdist.signal(signal.SIGTERM)
    time.sleep(random.uniform(0.05, 0.3))
    fastdist.signal(signal.SIGTERM)
    fastdist.wait()
    if durability == "disk":
        experiment.serve(settings)
        emitter.wait_for(50)
    # The workers are killed: answers may be cut off.
    bound = twice_after_a_kill(DELIVERY)
    experiment.judge(f"SIGTERM twice ({durability})", at_rest=durability == "disk", bound=bound)


def test_signals_at_any_moment_of_a_start(experiment):
    """Ended or killed before it is ready, with a queue to take over: nothing of that is lost, or delivered twice."""
    mocks = experiment.analyzers()
    fastdist = experiment.serve({"server": {"drain_timeout": "1s"}})  # one that is ready by then can deliver nothing
    emitter = experiment.emitter().start().wait_for(100)
    mocks.set_all(refuse=True)
    emitter.wait_for(form(200, 2000))
    emitter.stop()
    fastdist.kill_all()
    rng = random.Random(random.random())
    turns = form(2, 25)
    for turn in range(turns):
        starting = experiment.begin_to_serve(workers=rng.randint(1, 4))
        time.sleep(rng.uniform(0, 1.2))
        if turn % 2:
            os.killpg(starting.process.pid, signal.SIGKILL)
        else:
            starting.signal(signal.SIGTERM)
        assert starting.wait() in (0, -signal.SIGKILL, -signal.SIGTERM), starting.output
        assert "Traceback" not in starting.output, starting.output
    mocks.set_all(refuse=False)
    experiment.serve()
    # What is copied from ring to ring when everything is killed is copied again.
    experiment.judge(
        f"SIGTERM or kill -9 at any moment of a start, {turns} times", bound=turns * in_flight(DELIVERY, 4)
    )


def check_answers(emitter) -> None:
    assert {*emitter.answers.values()} <= {202, 503, None}
    assert not emitter.cut_off, "half an answer"
    assert emitter.broken_when_kept == 0
    # One that connects in the instant the listeners close may be reset: what it has sent was not read.
    assert len(emitter.unknown) <= 2 * emitter.connections
