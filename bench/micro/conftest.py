"""Micro-benchmarks run on request only (``make micro``); they need pytest-benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="scripts/bench-peers.sh installs pytest-benchmark")
sys.path.insert(0, str(Path(__file__).parent.parent))  # for ``tools``, whose packets these are too
