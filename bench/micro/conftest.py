"""Micro-benchmarks run on request only (``make micro``)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for ``tools``, whose packets these are too
