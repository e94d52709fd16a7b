#!/bin/sh
# Build the wheel, install it into an empty environment, and use it there with the source tree out of the way.
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

echo "wheel: building"
# A copy of what belongs to the project: nothing that was built before gets into the wheel, or is left behind, but for the
# core, which was compiled from the same files with the same flags; setuptools sees whether it is older than these. Not in
# an environment of its own: there Cython is newer than what it wrote, and all begins again. That is tested where the
# Dockerfile is (tests/deploy/test_images.py).
mkdir "$work/source"
cp "$root/pyproject.toml" "$root/setup.py" "$root/LICENSE" "$root/README.md" "$work/source/"
(cd "$root" && find src -type f ! -name '*.so' ! -path '*/__pycache__/*' ! -path 'src/build/*' ! -path '*.egg-info/*') |
	(cd "$root" && tar -cf - -T -) | tar -xf - -C "$work/source"
compiled=$("$python" -c 'from setuptools import Distribution
command = Distribution().get_command_obj("build")
command.ensure_finalized()
print(command.build_platlib)')
mkdir -p "$work/source/$compiled/fastdist"
cp -p "$root"/src/fastdist/_core*.so "$work/source/$compiled/fastdist/"
"$python" -m build --quiet --wheel --no-isolation --outdir "$work/dist" "$work/source"

echo "wheel: installing into an empty environment"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$work"/dist/*.whl

cd "$work"
echo "wheel: $("$work/venv/bin/fastdist" --version)"
"$work/venv/bin/python" -I - <<'PYTHON'
"""What is in the wheel: all that is needed to run and to check types, and no sources of the compiled core."""
from pathlib import Path

import fastdist

package = Path(fastdist.__file__).parent
suffixes = {path.suffix for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
assert not suffixes & {".pyx", ".pxi", ".c", ".h"}, suffixes
assert list(package.glob("_core*.so")) and (package / "_core.pyi").exists()
assert (package / "py.typed").exists()
assert (package / "http" / "openapi.json").exists()
PYTHON
"$work/venv/bin/python" -I "$root/tests/wheel_smoke.py" "$work/venv/bin/fastdist"
echo "wheel: works"
