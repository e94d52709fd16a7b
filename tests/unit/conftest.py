"""The command line as tests run it, and what stands in for a distributor."""

from __future__ import annotations

import os

import pytest
from fakes import Distributor
from ring_disk import Disk
from typer.testing import CliRunner

from fastdist.cli import main


@pytest.fixture
def run(monkeypatch):
    """Run the command line in an environment without any setting."""
    for name in list(os.environ):
        if name in {"PORT", "WORKER_COUNT"} or name.startswith("FASTDIST_"):
            monkeypatch.delenv(name)
    return lambda *arguments, **environ: CliRunner().invoke(main.app, list(arguments), env=environ)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fastdist.toml"
    path.write_text("[server]\nport = 2000\nworkers = 2\n")
    return path


@pytest.fixture
def distributor():
    """What answers packets as the test says."""
    server = Distributor()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["memfd", "file"])
def disk(request, tmp_path):
    """A ring's file of 64 KiB, and what was pushed to it."""
    if request.param == "memfd":
        return Disk(os.memfd_create("ring"))
    return Disk(os.open(tmp_path / "ring.fdq", os.O_RDWR | os.O_CREAT, 0o600))
