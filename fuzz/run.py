"""Coverage-guided fuzzing of everything that reads bytes of others, under AddressSanitizer: ``make fuzz``.

The core is built by clang and with its sanitizers, into build/fuzz; libFuzzer is loaded into Python with it
(``engine.pxi``), sees which branches of the C code an input takes, and keeps those that take new ones. A run begins
with the corpus in this folder and the inputs of the tests. It ends with an error at the first input for which a target
(``targets.py``) does not hold or a sanitizer objects; that input is kept in build/fuzz/findings.

``--keep`` puts what a run has found to reach more branches into the corpus, as few inputs as do.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
BUILD = ROOT / "build" / "fuzz"
LIBRARY = BUILD / "lib"
FINDINGS = BUILD / "findings"
NAMES = ("packet", "request", "reply", "otlp", "loki", "ingest", "bulk", "hec", "decoding")
MAX_BYTES = 2048  # the limits that inputs meet are set below that
NEWEST_CLANG = 30


class CannotFuzzError(Exception):
    """Something is missing on this machine."""


def find_clang() -> tuple[str, Path, Path]:
    """Return clang, its libFuzzer and its AddressSanitizer, of the first version that has all three."""
    names = ["clang", *(f"clang-{version}" for version in range(NEWEST_CLANG, 12, -1))]
    found = [path for name in names if (path := shutil.which(name))]
    machine = platform.machine()
    for clang in found:
        libraries = []
        wanted = (("fuzzer_no_main", "a"), ("asan", "so"))
        for name, end in wanted:
            for file in (f"libclang_rt.{name}-{machine}.{end}", f"libclang_rt.{name}.{end}"):
                command = [clang, f"-print-file-name={file}"]
                path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
                if path.is_absolute() and path.exists():
                    libraries.append(path)
                    break
        if len(libraries) == len(wanted):
            return clang, libraries[0], libraries[1]
    missing = f"{found[0]} has no libFuzzer or AddressSanitizer library" if found else "there is no clang"
    raise CannotFuzzError(f"{missing}; Debian has both: apt-get install clang libclang-rt-dev")


def build(clang: str, fuzzer: Path) -> Path:
    """Build core and engine with sanitizers and coverage; return the library that holds libFuzzer."""
    version = subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout
    stamp = BUILD / "built-by"
    if not stamp.exists() or stamp.read_text() != version:  # setuptools only looks at what is newer
        for folder in (LIBRARY, *BUILD.glob("temp*")):
            shutil.rmtree(folder, ignore_errors=True)
    LIBRARY.mkdir(parents=True, exist_ok=True)
    stamp.write_text(version)
    runtime = BUILD / "libfuzzer.so"
    whole = ["-Wl,--whole-archive", str(fuzzer), "-Wl,--no-whole-archive"]
    subprocess.run([clang, "-shared", "-o", str(runtime), *whole, "-lstdc++", "-lm", "-lpthread"], check=True)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(BUILD), "--build-lib", str(LIBRARY)]
    environment = os.environ | {"FASTDIST_BUILD": "fuzz", "CC": clang}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return runtime


class Fuzzer:
    """Runs libFuzzer on a target, in a process of its own."""

    def __init__(self, preload: list[Path]) -> None:
        paths = [
            LIBRARY,
            FOLDER,
            *(ROOT / "tests" / each for each in ("component", "unit", "unit/protocols", "")),
            ROOT,
        ]
        self.environment = os.environ | {
            "LD_PRELOAD": " ".join(map(str, preload)),
            # libFuzzer has to come first: AddressSanitizer has empty functions for coverage too.
            "ASAN_OPTIONS": "verify_asan_link_order=0:detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": ":".join(map(str, paths)),
        }

    def call(self, target: str, *arguments: str) -> int:
        """Run it; show the lines that tell something, and return its exit status."""
        command = [sys.executable, str(Path(__file__)), "--inside", target, *arguments]
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        telling = re.compile(r"INITED|pulse|DONE|Done|#[0-9]+\s+BINGO")
        last: list[str] = []
        for line in process.stdout:
            last = [*last[-80:], line]
            if telling.search(line):
                print(f"  {line.rstrip()}", flush=True)
        status = process.wait()
        if status:
            print("".join(last))
        return status

    def fuzz(self, target: str, seconds: int) -> bool:
        """Look for faults for so long; say whether there are none."""
        corpus, grown = FOLDER / "corpus" / target, BUILD / "corpus" / target
        grown.mkdir(parents=True, exist_ok=True)
        FINDINGS.mkdir(exist_ok=True)
        corpus.mkdir(parents=True, exist_ok=True)
        print(f"fuzz: {target}, for {seconds} s, from {len(list(corpus.iterdir()))} inputs", flush=True)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_BYTES}",
            f"-dict={FOLDER / f'{target}.dict'}",
            f"-artifact_prefix={FINDINGS}/{target}-",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-detect_leaks=0",
            "-print_final_stats=1",
            "-use_value_profile=1",
        ]
        status = self.call(target, *options, str(grown), str(corpus), str(BUILD / "seeds" / target))
        if status:
            print(f"fuzz: {target}: a fault; its input is in {FINDINGS}", file=sys.stderr)
        return status == 0

    def keep(self, target: str) -> bool:
        """Put as few inputs into the corpus as take all branches that are known to be reached."""
        corpus, fewest = FOLDER / "corpus" / target, BUILD / "merged" / target
        shutil.rmtree(fewest, ignore_errors=True)
        fewest.mkdir(parents=True)
        sources = [str(BUILD / "corpus" / target), str(corpus), str(BUILD / "seeds" / target)]
        if self.call(target, "-set_cover_merge=1", f"-max_len={MAX_BYTES}", "-detect_leaks=0", str(fewest), *sources):
            return False
        if not any(fewest.iterdir()):
            print(f"fuzz: {target}: the corpus could not be merged", file=sys.stderr)
            return False
        shutil.rmtree(corpus, ignore_errors=True)
        shutil.copytree(fewest, corpus)
        print(f"fuzz: {target}: {len(list(corpus.iterdir()))} inputs are kept")
        return True


def write_seeds() -> None:
    """Write the inputs of the tests, each to a file."""
    from targets import TARGETS, seeds  # noqa: PLC0415  (needs what was built)

    for target in TARGETS:
        folder = BUILD / "seeds" / target
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, data in enumerate(seeds(target)):
            (folder / str(number)).write_bytes(data)


def inside(target: str, arguments: list[str]) -> None:
    """Be the process that libFuzzer runs in."""
    if target == "seeds":
        write_seeds()
        return
    from targets import TARGETS  # noqa: PLC0415  (needs what was built)

    from fastdist import _core  # noqa: PLC0415

    again = BUILD / f"again-{target}"
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", target]
    again.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    again.chmod(0o755)
    _core.fuzz(TARGETS[target], str(again), arguments)


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description="Fuzz what reads the bytes of others.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--target", choices=NAMES, action="append", help="only this one (all)")
    parser.add_argument("--keep", action="store_true", help="put what was found into the corpus")
    parser.add_argument("--or-skip", action="store_true", help="where there is no clang say so, and be content")
    options = parser.parse_args()
    try:
        clang, fuzzer, asan = find_clang()
    except CannotFuzzError as error:
        print(f"fuzz: {'skipped: ' if options.or_skip else ''}{error}", file=sys.stderr)
        return 0 if options.or_skip else 1
    print(f"fuzz: building with {clang}", flush=True)
    runtime = build(clang, fuzzer)
    runner = Fuzzer([runtime, asan])
    if runner.call("seeds"):
        return 1
    targets = options.target or NAMES
    good = all([runner.fuzz(target, options.seconds) for target in targets])  # noqa: C419  (each of them)
    if good and options.keep:
        good = all(runner.keep(target) for target in targets)
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
