"""Where fastdist's workers spend their time: perf under the standard load.

``make profile``, or ``python bench/hotspots.py [--seconds N] [--messages N] [--connections N] [NAME=VALUE ...]``, where
names are settings as environment variables without their prefix: ``DELIVERY__MODE=batch QUEUE__DURABILITY=disk``.
Prints how the processor time splits into user and kernel, how over files, which system calls take how much (with all
they call), and the symbols at the top.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from contestants import Fastdist
from measure import WARM_UP
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tools import Load, Sink, Wrk, compile_tools, free_ports, packet

SETTINGS = {"DELIVERY__MODE": "batch", "QUEUE__DURABILITY": "memory"}
FREQUENCY = 1999  # samples a second; not a round figure, so that it does not beat with anything
ROW = re.compile(r"\s*([\d.]+)%\s+(\S+)\s+\[(.)\]\s+(.+?)\s*$")
CALL = re.compile(r"\s*([\d.]+)%\s+\[k\]\s+(?:__x64_sys|__arm64_sys|__sys|ksys)_(\w+)")


class Row(NamedTuple):
    """A symbol: its share in percent, the file it is in, whether that is the kernel."""

    share: float
    file: str
    kernel: bool
    symbol: str


class Profile(NamedTuple):
    """What perf found, and what was done meanwhile."""

    rows: list[Row]
    calls: list[tuple[float, str]]
    packets: int
    user: float
    system: float


def profile(options: argparse.Namespace, folder: Path) -> Profile:
    """Load fastdist and look where its workers are."""
    settings = SETTINGS | dict(pair.partition("=")[::2] for pair in options.setting)
    compile_tools(folder)
    ports, body, record = free_ports(4), packet(options.messages), folder / "perf.data"
    contestant = Fastdist(folder, folder / "contestant", ports, settings)
    with Sink(folder, ports) as sink:
        try:
            contestant.start()
            with Load(folder, "count", contestant.port, body, options.connections, WARM_UP) as load:
                load.line()
            workers = contestant.pids()[1:]
            command = ["perf", "record", "-q", "-g", "-F", str(FREQUENCY), "-o", str(record)]
            perf = subprocess.Popen([*command, "-p", ",".join(map(str, workers))], stderr=subprocess.PIPE, text=True)
            before, cpu = sink.packets(), contestant.cpu()
            Wrk(folder, contestant.port, [body], options.seconds, options.connections)
            packets = sink.packets() - before
            user, system = (now - then for now, then in zip(contestant.cpu(), cpu, strict=True))
            perf.terminate()
            _, said = perf.communicate()
        finally:
            contestant.stop()
        if not record.exists():
            raise SystemExit(f"perf recorded nothing: {said.strip()}")
        return Profile(symbols(record), system_calls(record), packets, user, system)


def report(record: Path, *how: str) -> list[str]:
    """Return the lines of perf report."""
    command = ["perf", "report", "-i", str(record), "--stdio", "-g", "none", "-w", "0,0,0", *how]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def symbols(record: Path) -> list[Row]:
    """Return the symbols by what they took themselves."""
    found = [ROW.match(line) for line in report(record, "--no-children", "-F", "overhead,dso,sym")]
    return [Row(float(row[1]), Path(row[2]).name, row[3] == "k", row[4]) for row in found if row]


def system_calls(record: Path) -> list[tuple[float, str]]:
    """Return the system calls by what they took with all they call."""
    found: dict[str, float] = {}
    for row in filter(None, map(CALL.match, report(record, "--children", "-F", "overhead_children,sym"))):
        found[row[2]] = max(found.get(row[2], 0.0), float(row[1]))
    return sorted(((share, name) for name, share in found.items() if share >= 0.1), reverse=True)


def show(found: Profile, top: int) -> None:
    """Print it."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    used = found.user + found.system
    console.print(
        f"{found.packets / used:,.0f} packets per CPU-second; "
        f"user {found.user / used:.0%}, kernel {found.system / used:.0%} of {used:.2f} s"
    )
    files: dict[str, float] = {}
    for row in found.rows:
        name = "kernel" if row.kernel else row.file
        files[name] = files.get(name, 0) + row.share
    by_file = sorted(((share, name) for name, share in files.items() if share >= 0.3), reverse=True)
    rows = [(row.share, f"{row.symbol}  [{'kernel' if row.kernel else row.file}]") for row in found.rows]
    for title, each in {"file": by_file, "system call": found.calls, "symbol": rows[:top]}.items():
        table = Table("%", title, title_justify="left", box=None)
        for share, name in each:
            table.add_row(f"{share:.1f}", escape(name))
        console.print()
        console.print(table)


def main() -> int:
    """Profile."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("setting", nargs="*", metavar="NAME=VALUE")
    options.add_argument("--seconds", type=int, default=5)
    options.add_argument("--messages", type=int, default=2)
    options.add_argument("--connections", type=int, default=64)
    options.add_argument("--top", type=int, default=30, help="symbols to show")
    chosen = options.parse_args()
    if wrong := [pair for pair in chosen.setting if "=" not in pair]:
        options.error(f"a setting is NAME=VALUE, this is not: {wrong[0]}")
    for program in ("perf", "wrk"):
        if not shutil.which(program):
            print(f"profiling needs {program} (Debian: linux-perf, wrk)", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        show(profile(chosen, Path(name)), chosen.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
