"""The race: fastdist against the proxies it replaces, in one run, in turn, median of rounds.

``make bench``, or ``python bench/race.py``. What is measured stands in ``works.py``, how in ``measure.py``; README.md
explains both. Every contestant gets the same load and the same analyzers. In every round each run takes place once, in
the other direction in every second round. What is not installed or fails is named, and the race goes on without it.

Prints tables, writes ``bench/results/<time>.json`` and, after a whole race, the plots in ``docs``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from contestants import CONTESTANTS, CORES, Before, Contestant, Fastdist, commit_of, first_line
from measure import MEASURES, Scene, held_back
from report import FIGURES, show, summary
from tools import HERE, compile_tools
from works import WORKS, Run, Work

if TYPE_CHECKING:
    from collections.abc import Sequence


ENOUGH_ROUNDS = 3  # for plots that are shown to people


class Results(NamedTuple):
    """What was measured, round by round, and what went wrong."""

    measured: dict[Run, list[dict[str, Any]]]
    failures: dict[Run, list[str]]


def race(works: list[Work], present: Sequence[type[Contestant]], options: argparse.Namespace) -> Results:
    """Run all contestants, round after round. Ctrl-C ends it with what there is."""
    most: dict[Run, int] = {}
    for work in works:
        for run in work.runs:
            if run.contestant in present:
                most[run] = max(most.get(run, 0), min(work.rounds, options.rounds))
    results = Results({}, {})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        compile_tools(Path(name))
        scene = Scene(Path(name), Path(name), options.seconds, options.quick)
        try:
            for number in range(options.rounds):
                runs = [run for run, rounds in most.items() if number < rounds]
                for run in runs if number % 2 == 0 else reversed(runs):
                    one(scene, run, results)
                took = time.monotonic() - began
                print(f"-- round {number + 1} of {options.rounds}, after {took:.0f} s", flush=True)
                if number + 1 < options.rounds and took * (number + 2) / (number + 1) > options.minutes * 60:
                    print(f"no further round: it would not end within {options.minutes:g} minutes", flush=True)
                    break
        except KeyboardInterrupt:
            print("interrupted: what was measured so far is", flush=True)
    return results


def one(scene: Scene, run: Run, results: Results) -> None:
    """Measure one run; a failure is noted."""
    try:
        figures = MEASURES[run.measure](scene, run)
    except Exception as error:  # noqa: BLE001  (whatever happens to one, the race goes on)
        text = f"{type(error).__name__}: {error}".strip()
        results.failures.setdefault(run, []).append(text[:1000])
        print(f"{run}: failed: {text}", flush=True)
        return
    figures["held_back"] = held_back(figures)
    results.measured.setdefault(run, []).append(figures)
    told = next(name for name in FIGURES if name in figures)
    kind, form = FIGURES[told]
    print(f"{run}: {form.format(figures[told])} {kind}", flush=True)


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    meminfo = Path("/proc/meminfo").read_text().split()
    return {
        "cores": str(CORES),
        "model": next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), platform.machine()),
        "memory": f"{int(meminfo[1]) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "?"),
        "python": platform.python_version(),
    }


def versions(present: Sequence[type[Contestant]]) -> dict[str, str]:
    """Return the versions of all that run, and of the load."""
    return {kind.name: kind.version() for kind in present} | {"wrk": first_line("wrk", "-v").split(" Copyright")[0]}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    options.add_argument("--seconds", type=int, default=3, help="seconds of load in each run (3)")
    options.add_argument(
        "--minutes", type=float, default=60, help="begin no round that would not end within so many minutes (60)"
    )
    options.add_argument(
        "--quick", action="store_true", help="one round of one second, counts a hundredth: does it work?"
    )
    options.add_argument("--work", action="append", metavar="NAME", help="only works whose name contains this")
    options.add_argument("--contestant", action="append", metavar="NAME", help="only these")
    options.add_argument(
        "--before", type=Path, metavar="TREE", help="fastdist as built in that working tree takes part too"
    )
    options.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER", help="where to write to")
    options.add_argument("--list", action="store_true", help="name the works and end")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.rounds = chosen.seconds = 1
    if chosen.rounds < 1 or chosen.seconds < 1:
        options.error("there is at least one round of one second")
    names = {kind.name.lower() for kind in CONTESTANTS if kind is not Before}
    for name in chosen.contestant or []:
        if name.lower() not in names:
            options.error(f"no contestant is called {name}: there are {', '.join(sorted(names))}")
    if chosen.before:
        try:
            Before.use(chosen.before)
        except ValueError as error:
            options.error(str(error))
    return chosen


def entrants(chosen: Sequence[str] | None) -> tuple[list[type[Contestant]], dict[str, str]]:
    """Return who runs, and who is missing with the reason."""
    names = {name.lower() for name in chosen} if chosen else {kind.name.lower() for kind in CONTESTANTS}
    names = names | {Before.name} if Before.tree else names - {Before.name}
    wanted = [kind for kind in CONTESTANTS if kind.name.lower() in names]
    missing = {kind.name: kind.missing() for kind in wanted if kind.missing()}
    return [kind for kind in wanted if kind.name not in missing], missing


def prepare_machine(works: list[Work]) -> None:
    """Allow as many open files as can be had; the contestants inherit that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = max((work.load.idle for work in works), default=0) + 1000
    if hard < needed:
        print(f"only {hard} open files are allowed: works with {needed - 1000} connections will fail (ulimit -Hn)")


def main() -> int:
    """Run the race."""
    chosen = arguments()
    works = [work for work in WORKS if not chosen.work or any(part in work.name for part in chosen.work)]
    if chosen.list:
        print("\n".join(work.name for work in WORKS))
        return 0
    if not works:
        print(f"no work is called that; --list names them: {', '.join(chosen.work)}", file=sys.stderr)
        return 2
    for program in ("wrk", os.environ.get("CC", "cc")):
        if not shutil.which(program):
            print(f"the race needs {program} (scripts/bench-peers.sh installs wrk)", file=sys.stderr)
            return 2
    present, missing = entrants(chosen.contestant)
    for why in missing.values():
        print(f"{why}; the race goes on without it")
    prepare_machine(works)
    began = time.time()
    results = race(works, present, chosen)
    document = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "took_seconds": round(time.time() - began),
        "commit": commit_of(str(HERE)),
        "options": {name: getattr(chosen, name) for name in ("rounds", "seconds", "quick", "work", "contestant")},
        "machine": machine(),
        "versions": versions(present),
        "missing": missing,
        "works": summary(works, *results),
    }
    show(document)
    target = chosen.results / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(began))}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {target}")
    whole = len(works) == len(WORKS) and not chosen.contestant and not chosen.before
    if whole and max(map(len, results.measured.values()), default=0) >= ENOUGH_ROUNDS:
        draw(target)
    return 0 if Fastdist not in present or any(run.contestant is Fastdist for run in results.measured) else 1


def draw(results: Path) -> None:
    """Draw the plots, if matplotlib is there."""
    done = subprocess.run([sys.executable, str(HERE / "plots.py"), str(results)], check=False)
    if done.returncode:
        print("no plots were drawn")


if __name__ == "__main__":
    sys.exit(main())
