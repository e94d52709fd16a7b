"""One analyzer of four is slow, or hangs: what becomes of the queue, of the others' shares and of the answers.

The load is an open loop, the one analyzer has 40 % of the weights, and everything else is as it comes. What is printed:
how many packets were queued over time (at most the first line's "expected" is what the rule allows: the packets of one
``spill_after``), how many went to others, what part of the rest each of the others had (10, 20 and 30 of 60 are its
weights), and how long answers took. It answers its health check and is never offline but for deliveries that fail.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from contestants import Fastdist
from measure import EMITTERS, started
from tools import WEIGHTS, Load, Sink, compile_tools, free_ports, get, packet

SLOW = 1  # index of the analyzer that is, with 40 % of the weights
STEP = 0.5  # seconds between looks at the queue


def measure(folder: Path, delay: str, rate: int, seconds: int, settings: dict[str, str]) -> dict[str, object]:
    """Load it for so long; return the figures."""
    ports = free_ports(len(WEIGHTS))
    with (
        Sink(folder, ports, late=f"{SLOW}:{delay}") as sink,
        started(Fastdist(folder, folder / "fastdist", ports, settings)) as fastdist,
    ):
        depth = []
        with Load(folder, "rate", fastdist.port, packet(2), EMITTERS, rate, seconds) as load:
            end = time.monotonic() + seconds
            while time.monotonic() < end - STEP:
                time.sleep(STEP)
                depth.append(json.loads(get(fastdist.port, "/queue"))["packets"])
            others = [count for index, count in enumerate(sink.each()) if index != SLOW]
            line = load.line()
        packets = json.loads(get(fastdist.port, "/stats"))["packets"]
        state = next(each for each in json.loads(get(fastdist.port, "/analyzers"))["analyzers"] if each["id"] == "A2")
    settled = depth[len(depth) // 3 :]  # without the time it takes until the first packets are old enough
    return {
        "sent": line["sent"],
        "depth": depth,
        "queued": (statistics.median(settled), max(settled)),
        "spilled": packets["spilled"],
        "failed": packets["retried"],
        "shares": [round(100 * count / sum(others), 2) for count in others],
        "p50": line["p50"],
        "p99": line["p99"],
        "max": line["max"],
        "state": state["state"],
    }


def main() -> None:
    """Measure what the command line asks for, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, nargs="*", default=[6000, 15000], help="packets a second")
    parser.add_argument(
        "--delay", nargs="*", default=["100", "1000", "-1"], help="milliseconds a reply takes; -1: none comes"
    )
    parser.add_argument("--mode", nargs="*", default=["single", "batch"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--depth", action="store_true", help="print the queue's depth at every look")
    parser.add_argument("settings", nargs="*", help="such as DELIVERY__SPILL_AFTER=5s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastdist-slow-") as name:
        folder = Path(name)
        compile_tools(folder)
        for mode in options.mode:
            for rate in options.rate:
                for delay in options.delay:
                    settings = dict(each.split("=", 1) for each in options.settings)
                    figures = measure(folder, delay, rate, options.seconds, {"DELIVERY__MODE": mode, **settings})
                    depth = figures.pop("depth")
                    print(f"{mode} {rate}/s {delay} ms: {json.dumps(figures)}", flush=True)
                    if options.depth:
                        print(f"  {depth}", flush=True)


if __name__ == "__main__":
    main()
