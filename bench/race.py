"""The race: packets delivered per CPU-second of each contestant's own processes, in one run, in turn, median of rounds.

``make bench``, or ``python bench/race.py [--rounds N] [--seconds S] [--work NAME ...]``. Every contestant gets the same
load (wrk, 64 connections) and the same analyzers (``sink.c``); its processor time is counted from the first request
until its queue is empty. Prints a table and writes ``bench/results/<time>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from contestants import WEIGHTS, Analyzers, Contestant, Fastdist, Haproxy, Nginx, build_sink, free_port, wait_for_port

HERE = Path(__file__).parent
MESSAGE = {
    "timestamp": "2026-01-02T03:04:05.678Z",
    "level": "info",
    "message": "GET /cart/checkout 200 in 12.8 ms, cached",
    "source": "frontend",
    "metadata": {"region": "eu-west-1", "trace": "4bf92f3577b34da6"},
}


def packet(messages: int) -> bytes:
    """Return a packet of that many messages (2: about 450 bytes, 100: about 18 KB)."""
    document = {"emitterId": "web-42", "messages": [MESSAGE] * messages, "metadata": {"host": "web-42.example"}}
    return json.dumps(document, separators=(",", ":")).encode()


class Work(NamedTuple):
    """What is sent, and how fastdist is set up for it."""

    name: str
    messages: int
    settings: dict[str, str]


SINGLE = {"DELIVERY__MODE": "single"}
WORKS = [
    Work("single, memory", 2, {**SINGLE, "QUEUE__DURABILITY": "memory"}),
    Work("single, disk", 2, {**SINGLE, "QUEUE__DURABILITY": "disk"}),
    Work("single, pipeline 8, memory", 2, {**SINGLE, "DELIVERY__PIPELINE": "8", "QUEUE__DURABILITY": "memory"}),
    Work("batch, memory", 2, {"DELIVERY__MODE": "batch", "QUEUE__DURABILITY": "memory"}),
    Work("batch, disk", 2, {"DELIVERY__MODE": "batch", "QUEUE__DURABILITY": "disk"}),
    Work("batch, fsync", 2, {"DELIVERY__MODE": "batch", "QUEUE__DURABILITY": "fsync"}),
    Work("18 KB, batch, memory", 100, {"DELIVERY__MODE": "batch", "QUEUE__DURABILITY": "memory"}),
    Work(
        "18 KB, batch, memory, validation none",
        100,
        {"DELIVERY__MODE": "batch", "QUEUE__DURABILITY": "memory", "SERVER__VALIDATION": "none"},
    ),
]
PEERS: list[type[Contestant]] = [Nginx, Haproxy]


class Measured(NamedTuple):
    """One contestant's run: packets per CPU-second and per second of wall time until all was delivered."""

    per_cpu: float
    per_second: float
    accepted_per_second: float
    shares: list[float]


def run(contestant: Contestant, body: bytes, seconds: int, connections: int = 64) -> Measured:
    """Load a started contestant for ``seconds`` and wait until everything is delivered."""
    script = contestant.folder / "post.lua"
    quoted = body.decode().replace("\\", "\\\\").replace("'", "\\'")
    script.write_text(f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = '{quoted}'\n")
    before, cpu, began = contestant.analyzers.each(), contestant.cpu(), time.monotonic()
    url = f"http://127.0.0.1:{contestant.port}/logs"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s", str(script), url]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loaded = time.monotonic() - began
    if "Non-2xx" in output:
        raise RuntimeError(f"{contestant.name} answered errors:\n{output}")
    answered = int(output.split(" requests in ")[0].split()[-1])
    delivered = wait_until_delivered(contestant, sum(before), answered)
    after = contestant.analyzers.each()
    took = time.monotonic() - began
    gained = [now - then for now, then in zip(after, before, strict=True)]
    shares = [count / delivered for count in gained]
    return Measured(delivered / (contestant.cpu() - cpu), delivered / took, answered / loaded, shares)


def wait_until_delivered(contestant: Contestant, before: int, answered: int) -> int:
    """Return how many packets arrived, once none is left (wrk may have sent a few whose answers it did not count)."""
    last, since = -1, time.monotonic()
    while True:
        arrived = contestant.analyzers.packets() - before
        if arrived != last:
            last, since = arrived, time.monotonic()
        elif arrived >= answered and time.monotonic() - since > 0.3:
            return arrived
        elif time.monotonic() - since > 30:
            raise RuntimeError(f"{contestant.name} answered {answered} packets and delivered {arrived}")
        time.sleep(0.05)


def race(work: Work, analyzers: Analyzers, folder: Path, rounds: int, seconds: int) -> dict[str, Measured]:
    """Run everybody ``rounds`` times in turn; return each one's median."""
    body = packet(work.messages)
    results: dict[str, list[Measured]] = {}
    for _ in range(rounds):
        for kind in (Fastdist, *PEERS):
            if kind.missing():
                continue
            contestant = kind(folder / kind.name, analyzers)
            if isinstance(contestant, Fastdist):
                contestant.settings = work.settings
            contestant.start()
            try:
                run(contestant, body, 1)  # warm-up
                results.setdefault(kind.name, []).append(run(contestant, body, seconds))
            finally:
                contestant.stop()
    return {name: sorted(runs)[len(runs) // 2] for name, runs in results.items()}


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return {
        "cores": str(os.cpu_count()),
        "model": model,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": version("nginx", "-v"),
        "haproxy": version("haproxy", "-v"),
        "wrk": version("wrk", "-v"),
    }


def version(name: str, flag: str) -> str:
    """Return the first line a program says of its version."""
    if not shutil.which(name):
        return "not installed"
    done = subprocess.run([name, flag], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()[0]


def main() -> int:
    """Run the race."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=int, default=4)
    options.add_argument("--work", action="append", help="only works whose name contains this")
    chosen = options.parse_args()
    if not shutil.which("wrk"):
        print("the race needs wrk: scripts/peers.sh installs it", file=sys.stderr)
        return 2
    for kind in PEERS:
        if kind.missing():
            print(f"{kind.name} is not installed (scripts/peers.sh installs it); the race goes on without it")
    works = [work for work in WORKS if not chosen.work or any(part in work.name for part in chosen.work)]
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        folder = Path(name)
        ports = tuple(free_port() for _ in WEIGHTS)
        sink = subprocess.Popen([str(build_sink(folder)), *map(str, ports)], stdout=subprocess.DEVNULL)
        try:
            for port in ports:
                wait_for_port(port)
            results = {}
            for work in works:
                results[work.name] = race(work, Analyzers(ports), folder, chosen.rounds, chosen.seconds)
                show(work, results[work.name])
        finally:
            sink.kill()
    target = HERE / "results" / f"{time.strftime('%Y%m%dT%H%M%S')}.json"
    target.parent.mkdir(exist_ok=True)
    figures = {work: {name: result._asdict() for name, result in each.items()} for work, each in results.items()}
    target.write_text(json.dumps({"machine": machine(), "options": vars(chosen), "works": figures}, indent=2) + "\n")
    print(f"written to {target.relative_to(HERE.parent)}")
    return 0


def show(work: Work, results: dict[str, Measured]) -> None:
    """Print a work's rows."""
    ours = results["fastdist"].per_cpu
    print(f"\n{work.name} ({len(packet(work.messages))} bytes)")
    for name, result in results.items():
        ratio = "" if name == "fastdist" else f"  fastdist is {ours / result.per_cpu:.2f} times that"
        print(
            f"  {name:10} {result.per_cpu:9,.0f} packets/CPU-s  {result.per_second:9,.0f} delivered/s"
            f"  {result.accepted_per_second:9,.0f} answered/s{ratio}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
