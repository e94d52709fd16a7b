"""Processes that are killed or stopped under load: workers, the supervisor, everything at once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time

import psutil
import pytest
from experiment import BATCHES, DELIVERY, SOME, form, in_flight, twice_after_a_kill, wait_for_restarts
from support import kill_worker, wait_until

EVERY_WAY = list(itertools.product(["memory", "disk", "fsync"], ["single", "batch"]))
MODES = {"single": DELIVERY, "batch": BATCHES}


def kill_a_worker(fastdist) -> None:
    while True:
        try:
            pids = [row["pid"] for row in fastdist.stats()["workers"] if row["state"] == "running"]
            kill_worker(random.choice([pid for pid in pids if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]))
        except (OSError, IndexError, psutil.Error):  # asked a worker that dies
            time.sleep(0.05)
        else:
            return


@pytest.mark.parametrize(("durability", "mode"), form([("memory", "single"), ("disk", "batch")], EVERY_WAY))
def test_a_worker_is_killed_each_second(experiment, durability, mode):
    kills, delivery = form(3, 12), MODES[mode]
    experiment.analyzers("--latency", "0.002")
    fastdist = experiment.serve({"queue": {"durability": durability}, "delivery": delivery})
    emitter = experiment.emitter().start()
    for _ in range(kills):
        time.sleep(form(0.7, 1.0))
        kill_a_worker(fastdist)
    wait_for_restarts(fastdist, kills)
    emitter.wait_for(200)
    # Each kill hits one of two workers.
    most = kills * in_flight(delivery, 1)
    bound = most if durability == "memory" else kills * twice_after_a_kill(delivery, 1)
    experiment.judge(f"worker kill -9 each second ({durability}, {mode})", bound=bound)
    assert len(emitter.unknown) <= kills * emitter.connections
    # In the file what was delivered last may not be marked done; in memory a worker's successor sees each mark.
    recovered = fastdist.stats()["packets"]["recovered"]
    assert recovered <= (0 if durability == "memory" else most)


def test_a_stopped_worker_is_replaced(experiment):
    experiment.analyzers("--latency", "0.002")
    fastdist = experiment.serve()
    emitter = experiment.emitter(connections=16).start().wait_for(200)
    victim = random.choice(fastdist.worker_pids())
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: "worker hung, sending SIGKILL" in fastdist.output, "it is found out", 60)
    assert 8 < time.monotonic() - stopped < 60
    wait_for_restarts(fastdist, 1)
    emitter.wait_for(200)
    experiment.judge("worker SIGSTOP (replaced after 10 s)", bound=twice_after_a_kill(DELIVERY, 1))
    assert victim not in fastdist.worker_pids()


def test_workers_are_stopped_for_a_moment(experiment):
    """Too short to be replaced, but all their time-outs would be over at once when they wake up."""
    experiment.analyzers("--close-every", "3", "--latency", "0.002")
    fastdist = experiment.serve({"delivery": DELIVERY | {"timeout": "3s"}})
    emitter = experiment.emitter().start().wait_for(100)
    times = form(2, 8)
    for _ in range(times):
        pids = fastdist.worker_pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(random.uniform(3.2, 4.0))
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        emitter.wait_for(200)
    # Replies that came while no process could read them count, so nothing is sent again.
    experiment.judge("workers SIGSTOP for a moment", bound=0)
    assert {*emitter.answers.values()} == {202}
    assert sum(row["restarts"] for row in fastdist.stats()["workers"]) == 0


@pytest.mark.parametrize("durability", form(["disk"], ["memory", "disk", "fsync"]))
def test_supervisor_is_killed_and_restarted(experiment, durability):
    times = form(1, 4)
    experiment.analyzers("--latency", "0.002")
    settings = {"queue": {"durability": durability}}
    experiment.serve(settings)
    emitter = experiment.emitter().start()
    for _ in range(times):
        emitter.wait_for(500)
        old = experiment.fastdist
        tree = [psutil.Process(pid) for pid in old.worker_pids()]
        os.kill(old.process.pid, signal.SIGKILL)
        old.process.wait()
        experiment.serve(settings)
        _, alive = psutil.wait_procs(tree, 5)
        assert not alive, "workers outlive their supervisor"
    emitter.wait_for(500)
    # They end in good order: deliveries under way are cut off at most.
    experiment.judge(f"supervisor kill -9 ({durability})", bound=times * in_flight(DELIVERY))
    # Who loses one worker may turn to the other, which ends a moment later.
    assert len(emitter.unknown) <= 2 * times * emitter.connections


@pytest.mark.parametrize(("durability", "mode"), form([("disk", "single"), ("fsync", "batch")], EVERY_WAY[2:]))
def test_all_killed_and_worker_count_changed(experiment, durability, mode):
    delivery = MODES[mode]
    experiment.analyzers("--latency", "0.002")
    queue = {"durability": durability}
    numbers = form([2, 1, 3], [2, 1, 3, 2, 4, 1])
    for turn, workers in enumerate(numbers):
        fastdist = experiment.serve({"queue": queue, "delivery": delivery, "server": {"workers": workers}})
        if turn == 0:
            emitter = experiment.emitter(connections=32).start()
        emitter.wait_for(form(500, 1500))
        if turn + 1 < len(numbers):
            time.sleep(random.uniform(0, 0.5))
            fastdist.kill_all()
    # What is being copied from old rings may come again too: as many packets once more.
    bound = sum(2 * twice_after_a_kill(delivery, max(2, workers)) for workers in numbers[:-1])
    verdict = experiment.judge(
        f"everything kill -9 {len(numbers) - 1} times, 2, 1, 3 … workers ({durability}, {mode})",
        bound=bound,
    )
    assert verdict.accepted > len(numbers) * 300
    wait_until(lambda: not list(experiment.data.glob("adopt-*")), "the old rings are deleted")


@pytest.mark.parametrize("durability", form(["fsync"], ["disk", "fsync"]))
def test_all_killed_writing_dead_letters(experiment, durability):
    """A dead letter is written before its packet is removed: at worst twice, for a packet that was still queued."""
    experiment.analyzers("--latency", "0.002").set_all(rejects=SOME)
    settings = {"queue": {"durability": durability}}
    fastdist = experiment.serve(settings)
    emitter = experiment.emitter().start()
    kills, recovered = form(2, 8), 0
    for _ in range(kills):
        emitter.wait_for(300)
        time.sleep(random.uniform(0, 0.3))
        fastdist.kill_all()
        fastdist = experiment.serve(settings)
        recovered += fastdist.stats()["packets"]["recovered"]
    emitter.wait_for(100)
    bound = kills * twice_after_a_kill(DELIVERY)
    experiment.judge(f"everything kill -9, a share refused ({durability})", bound=bound)
    dead_letters = [row["id"] for row in fastdist.dead_letters()]
    assert len({*dead_letters}) > 100 * kills
    assert len(dead_letters) - len({*dead_letters}) <= recovered
