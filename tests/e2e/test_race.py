"""The race runs: fastdist alone, for a second or two, and its figures are written down."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT, WEIGHTS

pytestmark = pytest.mark.processes


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed (scripts/peers.sh installs it)")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_tiny_race_writes_what_it_measured(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "race.py"), "--quick", "--contestant", "fastdist"]
    done = subprocess.run(
        [*command, "--work", "batch, memory", "--results", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    document = json.loads(written.read_text())
    assert document["works"].keys() == {
        "0.2-60 KB, batch, memory",
        "batch, memory",
        "batch, memory, long heads that stay",
        "batch, memory, long heads that vary",
        "latency, batch, memory",
    }
    assert document["versions"]["fastdist"].startswith("fastdist ")
    assert document["machine"]["cores"]
    throughput = document["works"]["batch, memory"]["contestants"]["fastdist"]
    (figures,) = throughput["rounds"]
    assert throughput["median"]["per_cpu"] > 0
    assert 0 < throughput["median"]["p99"] <= throughput["median"]["p999"] <= throughput["median"]["max"]
    assert figures["shares"] == pytest.approx(list(WEIGHTS.values()), abs=0.02)
    latency = document["works"]["latency, batch, memory"]["contestants"]["fastdist"]["median"]
    assert latency["answered"] == latency["sent"] == 1000
    assert latency["p50"] <= latency["p99"] <= latency["max"]
    assert "batch, memory" in done.stdout


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed (scripts/peers.sh installs it)")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_tree_is_compared_with_itself():
    command = [sys.executable, str(ROOT / "bench" / "pairs.py"), str(ROOT), "--rounds", "2", "--work", "batch, memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"batch, memory: \d\.\d+ ± \d\.\d+ of before \([\d,]+ and [\d,]+\)\n", done.stdout)


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed (scripts/peers.sh installs it)")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize(("minutes", "rounds"), [("10", 2), ("0", 1)])
def test_race_runs_the_rounds_time_allows(tmp_path, minutes, rounds):
    command = [sys.executable, str(ROOT / "bench" / "race.py"), "--rounds", "2", "--seconds", "1", "--minutes", minutes]
    command += ["--contestant", "fastdist", "--work", "18 KB, batch, validation none", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    (work,) = json.loads(written.read_text())["works"].values()
    assert len(work["contestants"]["fastdist"]["rounds"]) == rounds


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed (scripts/peers.sh installs it)")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_race_compares_with_another_tree(tmp_path):
    python = tmp_path / "tree" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    command = [sys.executable, str(ROOT / "bench" / "race.py"), "--quick", "--contestant", "fastdist"]
    command += ["--work", "an analyzer killed, batch", "--work", "memory, batch", "--before", str(tmp_path / "tree")]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    works = json.loads(written.read_text())["works"]
    for name in ("fastdist", "before"):
        killed = works["an analyzer killed, batch, disk"]["contestants"][name]["median"]
        assert killed["worst"] >= killed["p99"] > 0
        assert killed["errors"] == 0
        paused = works["memory, batch, disk"]["contestants"][name]["median"]
        assert paused["charged_mib"] > 10
        assert paused["pause"] > 0
    (aim,) = works["memory, batch, disk"]["aims"]
    assert aim["against"] == "before"
    assert 0.5 < aim["value"] < 2


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed (scripts/peers.sh installs it)")
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_race_counts_the_servers_of_a_stream(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "race.py"), "--quick", "--contestant", "fastdist"]
    command += ["--work", "stream, one copy, keys", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    figures = json.loads(written.read_text())["works"]["stream, one copy, keys"]["contestants"]["fastdist"]["median"]
    assert figures["per_cpu"] > figures["per_cpu_of_all"] > 0
    assert 0.9 < figures["packets_of_a_message"] < 1.1, "a key travels alone"
    assert figures["of_bare"] > 0
