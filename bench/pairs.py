"""fastdist of two working trees at the same time: which of them does more in a second of processor.

Both run from the beginning to the end, each with analyzers of its own, and are loaded in turn for a second at a time.
So whatever else the machine does meets both, and a few minutes show a difference of some hundredths, which two runs of
the race hide. For works of the race that measure throughput; their names are those of ``race.py --list``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from contestants import Before, Fastdist
from measure import Scene, closed_loop, started, warm_up
from race import prepare_machine
from tools import Sink, compile_tools, free_ports
from works import WORKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from works import Run

WORK = "throughput"  # the measure of works that can be compared so


def enter(stack: ExitStack, scene: Scene, run: Run) -> Callable[[int], float]:
    """Start one side; return what loads it for so many seconds and says its packets per second of processor."""
    ports = free_ports(run.load.analyzers)
    sink = stack.enter_context(Sink(scene.tools, ports, step=run.load.step))
    contestant = stack.enter_context(started(scene.contestant(run, ports)))
    warm_up(scene, run, contestant, sink)

    def load(seconds: int) -> float:
        return float(closed_loop(contestant, sink, run, scene.folder, seconds)["per_cpu"])

    return load


def compare(folder: Path, run: Run, rounds: int, seconds: int) -> list[tuple[float, float]]:
    """Return packets per second of processor, here and before, of each round; every second one goes backwards."""
    found = []
    with ExitStack() as stack:
        sides = []
        for kind in (Fastdist, Before):
            (folder / kind.name).mkdir(exist_ok=True)
            scene = Scene(folder, folder / kind.name, seconds, short=False)
            sides.append(enter(stack, scene, run._replace(contestant=kind)))
        for number in range(rounds):
            order = (0, 1) if number % 2 else (1, 0)
            measured = {side: sides[side](seconds) for side in order}
            found.append((measured[0], measured[1]))
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("before", type=Path, metavar="TREE", help="the other working tree, built with `make build`")
    options.add_argument("--rounds", type=int, default=30, help="windows of each side (30)")
    options.add_argument("--seconds", type=int, default=1, help="seconds of a window (1)")
    options.add_argument("--work", action="append", metavar="NAME", help="only works of this name")
    chosen = options.parse_args()
    if chosen.rounds < 2 or chosen.seconds < 1:
        options.error("there are at least two rounds of one second")
    try:
        Before.use(chosen.before)
    except ValueError as error:
        options.error(str(error))
    return chosen


def main() -> int:
    """Compare works, one after the other."""
    chosen = arguments()
    works = [work for work in WORKS if not chosen.work or work.name in chosen.work]
    runs = [(work, run) for work in works for run in work.runs if (run.contestant, run.measure) == (Fastdist, WORK)]
    if not runs:
        print(f"no work of throughput is called that; race.py --list names them: {chosen.work}", file=sys.stderr)
        return 2
    prepare_machine(works)
    failed = 0
    for work, run in runs:
        try:
            with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
                compile_tools(Path(folder))
                found = compare(Path(folder), run, chosen.rounds, chosen.seconds)
        except RuntimeError as error:
            failed += 1
            print(f"{work.name}: {error}", file=sys.stderr)
            continue
        ratios = [here / before for here, before in found]
        here, before = (round(statistics.median(side)) for side in zip(*found, strict=True))
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        ratio = f"{statistics.mean(ratios):.3f} ± {error:.3f}"
        print(f"{work.name}: {ratio} of before ({here:,} and {before:,})", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
