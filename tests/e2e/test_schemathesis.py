"""schemathesis, with all its checks, against a live service: to good and to bad data it answers what is described.

Its requests are made from the description alone. What it finds is a fault of the service or of the description.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from openapi_description import DOCUMENT as WHOLE
from openapi_description import PATHS

HERE = Path(__file__).parent
PROGRAM = shutil.which("schemathesis", path=Path(sys.executable).parent) or "schemathesis"
TOKEN = "for-packets-and-for-changes"

DOCUMENT = WHOLE | {"paths": PATHS}
AGENTS = WHOLE | {"paths": {path: item for path, item in WHOLE["paths"].items() if path not in PATHS}}

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def schemathesis(run, folder, document, port, *options, phases=("Examples", "Coverage", "Fuzzing", "Stateful")):
    """Run it; return how many requests it has made. Fails with its report if it found anything."""
    location = folder / "openapi.json"  # served, it would leave out the path it comes from
    location.write_text(json.dumps(document))
    url = f"http://127.0.0.1:{port}"
    shared = ("--mode", "all", "--continue-on-failure", "--seed", "7", "--max-failures", "20")
    command = [PROGRAM, "--config-file", HERE / "schemathesis.toml", "run", location, "--url", url, *shared, *options]
    hooks = str(HERE / "schemathesis_hooks.py")
    process = run(*command, cwd=folder, NO_COLOR="1", COLUMNS="160", SCHEMATHESIS_HOOKS=hooks)
    status = process.wait(800)
    assert status == 0, process.output
    for phase in phases:
        assert re.search(rf"✅ +{phase}", process.output), process.output
    tested = re.search(r"Tested: (\d+)", process.output)
    operations = sum(method in item for item in document["paths"].values() for method in METHODS)
    assert int(tested[1]) == operations, process.output
    return int(re.search(r"(\d+) generated", process.output)[1])


METHODS = ("get", "head", "options", "post", "put", "patch", "delete")


def of_a_service_with_tokens():
    """Return the description without the choice to send no token."""
    document = json.loads(json.dumps(DOCUMENT))
    for item in document["paths"].values():
        for operation in item.values():
            if {} in operation.get("security", []):
                operation["security"].remove({})
    return document


def test_open_service_matches_description(mocks, serve, run, tmp_path):
    fastdist = serve(mocks)
    assert schemathesis(run, tmp_path, DOCUMENT, fastdist.port, "--max-examples", "12") > 300
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["accepted"] > 20
    assert stats["packets"]["rejected"] > 20
    assert [row["restarts"] for row in stats["workers"]] == [0, 0]
    assert not [line for line in fastdist.lines if json.loads(line)["level"] == "error"]


def test_service_with_tokens_requires_one(mocks, serve, run, tmp_path):
    fastdist = serve(mocks, {"security": {"tokens": [TOKEN], "admin_tokens": [TOKEN]}})
    options = ("--header", f"Authorization: Bearer {TOKEN}", "--max-examples", "5")
    assert schemathesis(run, tmp_path, of_a_service_with_tokens(), fastdist.port, *options) > 200
    stats = fastdist.wait_at_rest()
    assert stats["rejected"]["unauthorized"] > 0
    assert stats["packets"]["accepted"] > 10
    assert TOKEN not in fastdist.output


def test_agents_paths_have_no_fault(mocks, serve, run, tmp_path):
    """Their bodies are not described in full: whatever is sent there is answered, and by no fault of the program."""
    fastdist = serve(mocks)
    options = ("--checks", "not_a_server_error", "--max-examples", "8")
    assert schemathesis(run, tmp_path, AGENTS, fastdist.port, *options, phases=("Coverage", "Fuzzing")) > 100
    stats = fastdist.wait_at_rest()
    assert [row["restarts"] for row in stats["workers"]] == [0, 0]
    assert not [line for line in fastdist.lines if json.loads(line)["level"] == "error"]
