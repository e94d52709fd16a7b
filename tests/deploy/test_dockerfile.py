"""The Dockerfile and what goes into it, read; test_images.py runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfile import ROOT, context, environment, instructions, lineage, setting, stages

IMAGES = ("fastdist", "mock-analyzers")
STAGES = stages()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPILERS = re.compile(r"\b(gcc|g\+\+|clang|build-essential|cython|python3-dev|make)\b", re.IGNORECASE)


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    found = shutil.which("hadolint") or (str(hadolint) if hadolint.exists() else None)
    if found is None:
        pytest.skip("hadolint is not installed; there is no wheel of it for this machine")
    done = subprocess.run([found, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile_reader_reads_them():
    text = (
        '# comment\nFROM a AS b\nRUN one \\\n    && two\n# between\nCOPY --from=x --chown=1:2 /a /b\nCMD ["c", "d"]\n'
    )
    first, run, copy, command = instructions(text)
    assert (first.word, first.text) == ("FROM", "a AS b")
    assert (run.text, run.words) == ("one && two", None)
    assert (copy.flags, copy.text) == ({"from": "x", "chown": "1:2"}, "/a /b")
    assert command.words == ["c", "d"]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_base_images_are_pinned_to_a_version(stage):
    if stage.image not in STAGES:
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-(slim-)?\w+", stage.image)


def test_both_images_have_one_interpreter():
    images = {stage.image.replace("slim-", "") for stage in STAGES.values() if stage.image not in STAGES}
    assert len(images) == 1
    version = re.search(r":(\d+)\.(\d+)\.", images.pop())
    assert f"Programming Language :: Python :: {version[1]}.{version[2]}" in PROJECT["project"]["classifiers"]


def test_distributor_is_the_default_target():
    assert list(STAGES)[-1] == "fastdist"


@pytest.mark.parametrize("name", IMAGES)
def test_image_is_slim_without_compiler(name):
    stages_of_it = lineage(name)
    assert "slim" in stages_of_it[0].image
    for stage in stages_of_it:
        for run in stage.all("RUN"):
            assert not COMPILERS.search(run.text)
            assert "pip" not in run.text
            assert "apt" not in run.text
        for copy in stage.all("COPY"):
            if "from" in copy.flags:
                assert copy.text == "/opt/fastdist /opt/fastdist"


@pytest.mark.parametrize("name", IMAGES)
def test_image_runs_non_root_from_last_run(name):
    words = [each for stage in lineage(name) for each in stage.instructions if each.word in {"RUN", "USER"}]
    assert words[-1].word == "USER"
    assert re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", words[-1].text)  # a number: Kubernetes cannot tell of a name


@pytest.mark.parametrize("name", IMAGES)
def test_image_runs_programs_not_shells(name):
    assert setting(name, "ENTRYPOINT").words
    assert setting(name, "CMD").words
    assert setting(name, "STOPSIGNAL").text == "SIGTERM"
    check = setting(name, "HEALTHCHECK")
    assert {"interval", "timeout", "start-period", "retries"} <= check.flags.keys()
    assert re.match(r'CMD \["python", ', check.text)
    assert not re.search(r"curl|wget", check.text)


def test_nothing_foreign_or_unneeded_added():
    for stage in STAGES.values():
        assert not stage.all("ADD")
        assert not any(copy.text.startswith(". ") for copy in stage.all("COPY"))
        assert not any(re.search(r"curl|wget|git clone|https?://", run.text) for run in stage.all("RUN"))
        assert not any("sudo" in run.text for run in stage.all("RUN"))


def test_pip_keeps_no_cache():
    runs = [run.text for stage in STAGES.values() for run in stage.all("RUN")]
    for run in runs:
        assert run.count("pip install") + run.count("pip wheel") <= run.count("--no-cache-dir")


def test_the_queue_is_a_volume():
    assert setting("fastdist", "VOLUME").words == [environment("fastdist")["FASTDIST_QUEUE__PATH"]]


def test_mock_analyzers_use_the_same_parser():
    (run,) = STAGES["build-mock-analyzers"].all("RUN")
    wanted = next(entry for entry in PROJECT["project"]["dependencies"] if entry.startswith("httptools"))
    assert f'"{wanted}"' in run.text


def test_no_secret_is_set():
    for stage in STAGES.values():
        for each in [*stage.all("ENV"), *stage.all("ARG")]:
            assert not re.search(r"token|password|secret|key", each.text, re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------- the context


def test_copied_files_are_the_files_let_in():
    files = context()
    sources = {source for stage in STAGES.values() for copy in stage.all("COPY") for source in copy.text.split()[:-1]}
    sources -= {"/opt/fastdist"}
    for source in sources:
        assert any(name == source or name.startswith(f"{source}/") for name in files), source
    for name in files:
        assert any(name == source or name.startswith(f"{source}/") for source in sources), name


def test_only_sources_are_let_in():
    files = context()
    if shutil.which("git"):
        tracked = subprocess.run(  # nothing, where this is no clone
            ["git", "ls-files", "src", "mock_analyzers"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.split()
        assert set(tracked) <= set(files)
    assert not [name for name in files if re.search(r"\.(so|c|pyc)$|__pycache__|egg-info|\.git|\.venv", name)]
