"""The chaos suite: see ``docs/reliability.md``. FASTDIST_CHAOS=long chooses the long form, and shows its table."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from experiment import LONG, Experiment, Verdict, table

VERDICTS = pytest.StashKey[list[Verdict]]()
EXPERIMENT = pytest.StashKey[Experiment]()
SEED = pytest.StashKey[str]()
SHOWN = 8000  # characters of a process's output


def pytest_configure(config):
    config.stash[VERDICTS] = []
    seed = os.environ.get("CHAOS_SEED") or "0"
    config.stash[SEED] = str(random.SystemRandom().randrange(10**9)) if seed == "random" else seed


def pytest_report_collectionfinish(config):
    return f"CHAOS_SEED={config.stash[SEED]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    experiment = item.stash.get(EXPERIMENT, None)
    if report.failed and experiment is not None:
        for process in experiment.processes:
            report.sections.append((type(process).__name__, process.output[-SHOWN:]))
    return report


def pytest_terminal_summary(terminalreporter, config):
    verdicts = config.stash[VERDICTS]
    if not (LONG and verdicts):
        return
    system = os.uname()
    text = f"{os.cpu_count()} cores, {system.sysname} {system.release}\n\n{table(verdicts)}"
    terminalreporter.section("what was accepted and what became of it")
    terminalreporter.write_line(text)
    target = Path("build/chaos.md")
    target.parent.mkdir(exist_ok=True)
    target.write_text(f"{text}\n")


@pytest.fixture(autouse=True)
def seeded(request):
    """Let what a test leaves to chance follow from a seed: always the same, unless CHAOS_SEED is another or "random".

    When things happen still depends on the machine; what happens does not.
    """
    seed = request.config.stash[SEED]
    random.seed(f"{seed} {request.node.name}")
    print(f"CHAOS_SEED={seed}")  # noqa: T201  (pytest shows it with what fails)


@pytest.fixture
def experiment(request, tmp_path) -> Experiment:
    """An experiment whose processes are shown if it fails, and killed at its end."""
    made = request.node.stash[EXPERIMENT] = Experiment(tmp_path, request.config.stash[VERDICTS])
    yield made
    made.close()
