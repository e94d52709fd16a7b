"""Builds the compiled core; everything else about the package stands in pyproject.toml.

FASTDIST_BUILD chooses how: unset or ``release`` (-O3), ``quick`` (-O1, in half the time, for tests), ``debug`` (bounds
checks, line tracing, no optimisation), ``sanitize`` (AddressSanitizer and UndefinedBehaviorSanitizer; run with libasan
preloaded, see ``make sanitize``), ``fuzz`` (the release's C code with sanitizers and coverage by clang, and libFuzzer's
place in Python: see fuzz/run.py).
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

BUILD = os.environ.get("FASTDIST_BUILD", "release")
# function: Python calls what takes an object's own type by way of PyObject *.
CLANG_SANITIZERS = ["-fsanitize=address,undefined,fuzzer-no-link", "-fno-sanitize=function"]
FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "release": (["-O3", "-g0", "-fno-plt"], []),
    "quick": (["-O1", "-g0", "-fno-plt"], []),
    "debug": (["-O0", "-g", "-DCYTHON_TRACE=1", "-DCYTHON_TRACE_NOGIL=1"], []),
    "sanitize": (
        ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-fsanitize=address,undefined"],
    ),
    "fuzz": (
        ["-O1", "-g", "-w", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *CLANG_SANITIZERS],
        [*CLANG_SANITIZERS, "-shared-libasan"],
    ),
}
if BUILD not in FLAGS:
    raise SystemExit(f"FASTDIST_BUILD={BUILD}: expected one of {', '.join(FLAGS)}")

compile_args, link_args = FLAGS[BUILD]
checked = BUILD in ("debug", "sanitize")
core = Extension(
    "fastdist._core",
    ["fuzz/core.pyx" if BUILD == "fuzz" else "src/fastdist/_core.pyx"],
    include_dirs=["src/fastdist"],
    depends=[str(part) for part in sorted(Path("src/fastdist/core").iterdir())],
    define_macros=[("FASTDIST_CHECKED", "1")] if checked else [],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wno-unused-function", *compile_args],
    extra_link_args=link_args,
)

setup(
    ext_modules=cythonize(
        [core],
        include_path=["src/fastdist"],
        compiler_directives={
            "language_level": 3,
            "boundscheck": checked,
            "cdivision": True,
            "initializedcheck": checked,
            "linetrace": BUILD == "debug",
            "auto_pickle": False,  # whatever is pickled, it is nothing of the core
            "embedsignature": False,
        },
        force=checked,
    ),
)
