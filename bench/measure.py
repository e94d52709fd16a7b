"""How each figure of the race is measured.

Throughput: packets delivered per second of processor (user and system) that all processes of the contestant used, from
the first packet until its queue is empty, under wrk's closed loop. The other measures say what they do below.

Every run has a new process with a new queue, and before it is measured no more packets than open its connections.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from agent_requests import RECORDS, REQUESTS
from closed_loop import Order, wrk
from cluster import cluster
from contestants import CORES, Contestant
from tools import WEIGHTS, Load, Sink, Wrk, free_ports, get, idle_seconds, memory_available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from works import Run

RATE = 10_000  # packets a second of the open loop
EMITTERS = 256  # connections of the open loop: enough for one to be free whenever a packet is due
WARM_UP = 1000  # packets: enough to open all connections, to analyzers too
FIRST_CHECKS = 4.0  # seconds: two rounds of health checks
BACKLOG = 1_000_000
BACKLOG_RATE = 15_000  # packets a second while the backlog stays
BACKLOG_MEMORY = 5 << 30
OUTAGE = (3, 7, 12)  # seconds: when an analyzer goes, when it is back, the end
GONE = 1  # index of that analyzer, which has 40 % of the weights
PAUSE = 60  # seconds
Figures = dict[str, Any]


class Scene(NamedTuple):
    """Where a run takes place. ``seconds`` is how long it is loaded; ``short``: smaller than the real thing."""

    tools: Path
    folder: Path
    seconds: int
    short: bool

    def contestant(self, run: Run, ports: tuple[int, ...]) -> Contestant:
        """Return who runs, not started."""
        return run.contestant(self.tools, self.folder / "contestant", ports, dict(run.settings))

    def load(self, mode: str, contestant: Contestant, body: bytes, connections: int, *more: float) -> Load:
        """Start ``load.c``."""
        return Load(self.tools, mode, contestant.port, body, connections, *more)

    def shorter(self, seconds: float) -> float:
        """Return the seconds, or a sixth of them in a short run."""
        return seconds / 6 if self.short else seconds

    def smaller(self, count: int) -> int:
        """Return the count, or a hundredth of it in a short run."""
        return count // 100 if self.short else count


@contextlib.contextmanager
def started(contestant: Contestant) -> Iterator[Contestant]:
    """Start a contestant and stop it."""
    try:
        contestant.start()
        yield contestant
    finally:
        contestant.stop()


@contextlib.contextmanager
def open_and_idle(scene: Scene, contestant: Contestant, body: bytes, connections: int) -> Iterator[None]:
    """Keep connections open that have sent a packet each and do nothing more; none of them may be closed."""
    if not connections:
        yield
        return
    with scene.load("hold", contestant, body, connections) as held:
        held.line()
        yield
        closed = held.finish()["closed"]
    if closed:
        raise RuntimeError(f"{contestant.name} closed {closed} of {connections} idle connections")


def settle(sink: Sink, seconds: float = 0.3) -> int:
    """Return how many packets arrived, once none has for a while."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        now = sink.packets()
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.05)
    return last


def wait_until_delivered(contestant: Contestant, sink: Sink, before: int, answered: int) -> int:
    """Return how many packets arrived, once none is left (wrk may have sent a few whose answers it did not count)."""
    last, since = -1, time.monotonic()
    while True:
        arrived = sink.packets() - before
        if arrived != last:
            last, since = arrived, time.monotonic()
        elif arrived >= answered and time.monotonic() - since > 0.3:
            return arrived
        elif time.monotonic() - since > 30:
            raise RuntimeError(f"{contestant.name} answered {answered} packets and delivered {arrived}")
        time.sleep(0.05)


def throughput(scene: Scene, run: Run) -> Figures:
    """Load it in a closed loop; count until everything is delivered."""
    ports = free_ports(run.load.analyzers)
    step = run.load.step
    with Sink(scene.tools, ports, step=step) as sink, started(scene.contestant(run, ports)) as contestant:
        warm_up(scene, run, contestant, sink)
        with open_and_idle(scene, contestant, run.load.bodies[0], scene.smaller(run.load.idle)):
            settle(sink)
            return closed_loop(contestant, sink, run, scene.folder, scene.seconds)


def warm_up(scene: Scene, run: Run, contestant: Contestant, sink: Sink) -> None:
    """Have it open its connections. Where there are many analyzers let it first find all of them well."""
    bodies, connections, seconds = run.load.bodies, run.load.connections, contestant.warm_up
    if run.load.analyzers > len(WEIGHTS):
        _wait_until_online(contestant, run.load.analyzers)
        time.sleep(1 if scene.short else FIRST_CHECKS)
        seconds = 2
    if seconds:
        answered = Wrk(scene.folder, contestant.port, bodies, seconds, connections).answered
    else:
        with scene.load("count", contestant, bodies[0], connections, WARM_UP) as load:
            answered = load.line()["answered"]
    if not contestant.counts_itself:
        wait_until_delivered(contestant, sink, 0, answered)


def closed_loop(contestant: Contestant, sink: Sink, run: Run, folder: Path, seconds: float) -> Figures:
    """Load it with wrk for so long; count until everything is delivered."""
    before, cpu, sink_cpu, idle = sink.each(), contestant.cpu(), sink.cpu(), idle_seconds()
    began = time.monotonic()
    wrk = Wrk(folder, contestant.port, run.load.bodies, seconds, run.load.connections, step=run.load.step)
    idle, sink_cpu = idle_seconds() - idle, sink.cpu() - sink_cpu
    delivered = wrk.answered
    if not contestant.counts_itself:
        delivered = wait_until_delivered(contestant, sink, sum(before), wrk.answered)
    took = time.monotonic() - began
    user, system = (now - then for now, then in zip(contestant.cpu(), cpu, strict=True))
    figures: Figures = {
        "per_cpu": delivered / (user + system),
        "delivered_per_second": delivered / took,
        "accepted_per_second": wrk.answered / wrk.seconds,
        "system_share": system / (user + system),
        "wrk_busy": wrk.busy,
        "sink_busy": sink_cpu / wrk.seconds,
        "idle_cores": idle / wrk.seconds,
        "charged_mib": contestant.charged_memory() / 2**20,
        **wrk.latency,
    }
    if len(before) == len(WEIGHTS) and not contestant.counts_itself:
        gained = [now - then for now, then in zip(sink.each(), before, strict=True)]
        figures["shares"] = [count / delivered for count in gained]
    return figures


def latency(scene: Scene, run: Run) -> Figures:
    """Send at a fixed rate, whatever the answers do; milliseconds from when a packet was due until its answer."""
    ports = free_ports(run.load.analyzers)
    body, rate = run.load.bodies[0], RATE // 10 if scene.short else RATE
    with Sink(scene.tools, ports) as sink, started(scene.contestant(run, ports)) as contestant:
        with scene.load("rate", contestant, body, EMITTERS, rate, 1) as load:  # warm-up
            load.line()
        settle(sink)
        cpu, idle, began = sum(contestant.cpu()), idle_seconds(), time.monotonic()
        with scene.load("rate", contestant, body, EMITTERS, rate, scene.seconds) as load:
            figures = load.line()
        if figures["answered"] < figures["sent"]:
            raise RuntimeError(f"{contestant.name} answered {figures['answered']} of {figures['sent']} packets")
        took = time.monotonic() - began
        return {
            **figures,
            "cpu_per_second": (sum(contestant.cpu()) - cpu) / took,
            "idle_cores": (idle_seconds() - idle) / took,
        }


def outage(scene: Scene, run: Run) -> Figures:
    """Load it in a closed loop while an analyzer is killed and comes back; milliseconds of the longest answer.

    ``errors``: answers other than 2xx, and requests whose connection broke. An answer that never came is not seen.
    """
    ports, (gone, back, end) = free_ports(run.load.analyzers), map(scene.shorter, OUTAGE)
    body, *others = run.load.bodies
    with Sink(scene.tools, ports) as sink, started(scene.contestant(run, ports)) as contestant:
        warm_up(scene, run, contestant, sink)
        before = sink.packets()
        order = Order(f"http://127.0.0.1:{contestant.port}/logs", body, end, run.load.connections, timeout=60)
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(wrk, scene.folder, order._replace(others=others))
            time.sleep(gone)
            sink.close(GONE)
            time.sleep(back - gone)
            sink.open(GONE)
            answers = loaded.result()
        wait_until_delivered(contestant, sink, before, answers.taken)
        return {
            "worst": answers.max,
            "errors": answers.refused + sum(answers.errors.values()),
            "accepted_per_second": answers.taken / answers.seconds,
            "p50": answers.p50,
            "p99": answers.p99,
            "p999": answers.p999,
        }


def pause(scene: Scene, run: Run) -> Figures:
    """Load it in a closed loop; milliseconds of the longest time for which a worker's event loop did one thing."""
    ports = free_ports(run.load.analyzers)
    with Sink(scene.tools, ports) as sink, started(scene.contestant(run, ports)) as contestant:
        warm_up(scene, run, contestant, sink)
        before = loop_lags(contestant.port)
        figures = closed_loop(contestant, sink, run, scene.folder, scene.shorter(PAUSE))
        return figures | {"pause": longest_since(before, loop_lags(contestant.port))}


class Lag(NamedTuple):
    """A worker's event loop since its start: the longest lag, and {upper bound: how many}, in milliseconds."""

    max: float
    buckets: dict[float, int]


def loop_lags(port: int) -> list[Lag]:
    """Return what /stats and /metrics say of each worker's event loop."""
    workers = json.loads(get(port, "/stats"))["workers"]
    found = LAG.findall(get(port, "/metrics"))
    result = []
    for worker in workers:
        below = {float(bound) * 1e3: int(count) for name, bound, count in found if int(name) == worker["id"]}
        counts = [now - then for now, then in zip(below.values(), [0, *below.values()], strict=False)]
        result.append(Lag(worker["loopLagMs"]["max"] or 0.0, dict(zip(below, counts, strict=True))))
    return result


LAG = re.compile(r'^fastdist_worker_loop_lag_seconds_bucket\{worker="(\d+)",le="([^"]+)"\} (\d+)$', re.MULTILINE)


def longest_since(before: list[Lag], after: list[Lag]) -> float:
    """Return the longest lag between two looks.

    It is exact if it is a worker's longest since its start. Otherwise no more is known than the bucket it is in: then
    that one's upper bound, a power of two of nanoseconds.
    """
    longest = 0.0
    for then, now in zip(before, after, strict=True):
        if now.max > then.max:
            longest = max(longest, now.max)
        else:
            grown = [bound for bound, count in now.buckets.items() if count > then.buckets[bound]]
            longest = max(longest, min(max(grown, default=0.0), now.max))
    return longest


def _steady(scene: Scene, run: Run, backlog: int) -> Figures:
    """Packets come and go at the same rate, with a backlog and without.

    The backlog is loaded while nothing listens at the analyzers' ports. Then analyzers start that take BACKLOG_RATE
    packets a second in all, and emitters send as many: the backlog stays what it is. Without a backlog everything else
    is the same. What is compared is packets through (the mean of accepted and delivered) per second of processor.
    """
    body, ports = run.load.bodies[0], free_ports(run.load.analyzers)
    rate = BACKLOG_RATE // 5 if scene.short else BACKLOG_RATE
    if backlog and not scene.short and memory_available() < BACKLOG_MEMORY:
        raise RuntimeError(f"{BACKLOG_MEMORY >> 30} GiB of memory have to be available")
    with started(scene.contestant(run, ports)) as contestant:
        loading = 0.0
        if backlog:
            cpu = sum(contestant.cpu())
            with scene.load("count", contestant, body, run.load.connections, backlog) as load:
                load.line()
            loading = sum(contestant.cpu()) - cpu
        with Sink(scene.tools, ports, rate) as sink:
            _wait_until_online(contestant, len(ports))
            with scene.load("rate", contestant, body, EMITTERS, rate, 1) as load:  # until all is as it will stay
                load.line()
            figures = _both_ways(scene, contestant, sink, body, rate)
            if backlog:
                figures["accepted_while_loading_per_cpu"] = backlog / loading
            return figures


def _wait_until_online(contestant: Contestant, analyzers: int) -> None:
    """Wait until all analyzers are online, whether they were seen offline or not."""
    end = time.monotonic() + 15
    while f'"online":{analyzers}' not in get(contestant.port, "/health").replace(" ", ""):
        if time.monotonic() > end:
            raise RuntimeError(f"the analyzers do not come online: {get(contestant.port, '/health')}")
        time.sleep(0.05)


def _both_ways(scene: Scene, contestant: Contestant, sink: Sink, body: bytes, rate: int) -> Figures:
    began, cpu, before = time.monotonic(), sum(contestant.cpu()), sink.packets()
    with scene.load("rate", contestant, body, EMITTERS, rate, scene.seconds) as load:
        sent = load.line()
    cpu, delivered = sum(contestant.cpu()) - cpu, sink.packets() - before
    took = time.monotonic() - began
    return {
        "per_cpu": (sent["answered"] + delivered) / 2 / cpu,
        "accepted_per_second": sent["answered"] / took,
        "delivered_per_second": delivered / took,
        "p99": sent["p99"],
    }


def empty(scene: Scene, run: Run) -> Figures:
    """Measure ``_steady`` with an empty queue."""
    return _steady(scene, run, 0)


def backlog(scene: Scene, run: Run) -> Figures:
    """Measure ``_steady`` with a long queue."""
    return _steady(scene, run, scene.smaller(BACKLOG))


def memory(scene: Scene, run: Run) -> Figures:
    """Private memory of all processes with idle keep-alive connections, less that without, for each of them.

    Each connection has sent a packet. What the kernel keeps for a socket is not part of it.
    """
    ports, bodies, connections = free_ports(run.load.analyzers), run.load.bodies, scene.smaller(run.load.idle)
    with Sink(scene.tools, ports) as sink, started(scene.contestant(run, ports)) as contestant:
        wrk = Wrk(scene.folder, contestant.port, bodies, 1, run.load.connections)
        wait_until_delivered(contestant, sink, 0, wrk.answered)
        before = contestant.memory()
        with open_and_idle(scene, contestant, bodies[0], connections):
            settle(sink, 1.0)
            with_them = contestant.memory()
        return {"bytes_each": (with_them - before) / connections, "connections": connections, "bytes_before": before}


def records(scene: Scene, run: Run) -> Figures:
    """Load it with requests of a log agent in a closed loop; count until all is delivered.

    ``of_decoding``: its processor time, divided by what decoding the same requests alone takes.
    """
    ports, request = free_ports(run.load.analyzers), REQUESTS[run.load.agent]
    with Sink(scene.tools, ports), started(scene.contestant(run, ports)) as contestant:
        url, headers = f"http://127.0.0.1:{contestant.port}{request.path}", {"Content-Type": request.content_type}
        order = Order(url, request.body, 1, run.load.connections, headers=headers, timeout=20)
        wrk(scene.folder, order)  # opens the connections, to analyzers too
        _wait_until_empty(contestant)
        before, cpu = accepted_messages(contestant), sum(contestant.cpu())
        answers = wrk(scene.folder, order._replace(seconds=scene.seconds))
        if answers.refused or answers.errors:
            raise RuntimeError(f"{url}: {answers.refused} answers were errors, {answers.errors or 'no'} others")
        _wait_until_empty(contestant)
        cpu, taken = sum(contestant.cpu()) - cpu, accepted_messages(contestant) - before
        return {
            "records_per_cpu": taken / cpu,
            "of_decoding": cpu / taken * RECORDS / request.decoded_in(),
            "records_per_second": answers.taken * RECORDS / answers.seconds,
            "p99": answers.p99,
        }


def accepted_messages(contestant: Contestant) -> int:
    """Return how many messages fastdist has accepted."""
    return int(json.loads(get(contestant.port, "/stats"))["messages"]["accepted"])


def _wait_until_empty(contestant: Contestant) -> None:
    """Wait until fastdist has delivered all that it has accepted."""
    end = time.monotonic() + 30
    while (packets := json.loads(get(contestant.port, "/stats"))["packets"])["queued"] + packets["inFlight"]:
        if time.monotonic() > end:
            raise RuntimeError(f"{contestant.name} does not deliver: {packets}")
        time.sleep(0.05)


MEASURES: dict[str, Callable[[Scene, Run], Figures]] = {
    "throughput": throughput,
    "latency": latency,
    "outage": outage,
    "pause": pause,
    "empty": empty,
    "backlog": backlog,
    "memory": memory,
    "records": records,
    "cluster": cluster,
}


def held_back(figures: Figures) -> bool:
    """Return whether the load was the bottleneck of a run: wrk's one thread was busy, and a processor had time."""
    return float(figures.get("wrk_busy", 0)) > 0.95 and float(figures.get("idle_cores", 0)) > 0.1 * CORES
