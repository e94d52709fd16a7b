"""Check the stubs of the compiled core against what was compiled: ``python tests/stubs.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = ROOT / "tests" / "stubtest-allowlist.txt"


def main() -> int:
    """Run stubtest over the core; return its exit status."""
    # --ignore-unused-allowlist: not every version of Cython adds each of the names that are allowed.
    command = [sys.executable, "-m", "mypy.stubtest", "--allowlist", str(ALLOWED), "--ignore-unused-allowlist"]
    return subprocess.run([*command, "fastdist._core"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
