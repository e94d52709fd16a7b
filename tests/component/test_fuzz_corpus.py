"""What fuzzing has found to be worth keeping, through the same targets: without clang, in every run of the tests.

``make fuzz`` looks for more of it (fuzz/run.py), with sanitizers and at the bytes' own memory.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fastdist._core import scan

FOLDER = Path(__file__).parents[2] / "fuzz"
UNIT_TESTS = Path(__file__).parents[1] / "unit"  # some of whose inputs the targets begin with
AGENTS = ("otlp", "loki", "ingest", "bulk", "hec", "decoding")


class Input:
    """What targets are given, as far as it can be had without the fuzzer's build."""

    def __init__(self, data):
        self.data = data

    def scan(self, strict):
        return scan(self.data, strict)

    def check_request(self, cut):
        assert 0 <= cut <= len(self.data)

    check_reply = check_request


@pytest.fixture(scope="module")
def targets():
    spec = importlib.util.spec_from_file_location("fuzz_targets", FOLDER / "targets.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(FOLDER), str(UNIT_TESTS), str(UNIT_TESTS / "protocols")])
        spec.loader.exec_module(module)
    yield module
    for ingest in module._INGEST:
        ingest.timers.__exit__(None, None, None)


@pytest.mark.parametrize("target", ["packet", "request", "reply", *AGENTS])
def test_the_corpus_finds_nothing(targets, target):
    inputs = sorted((FOLDER / "corpus" / target).glob("*"))
    assert len(inputs) > 100 or target in AGENTS
    for path in inputs:
        try:
            targets.TARGETS[target](Input(path.read_bytes()))
        except Exception as error:
            raise AssertionError(path.name) from error


@pytest.mark.parametrize("target", AGENTS)
def test_seeds_of_fuzzing_find_nothing(targets, target):
    for data in targets.seeds(target):
        targets.TARGETS[target](Input(data))


def test_a_target_that_does_not_hold_says_so(targets, monkeypatch):
    monkeypatch.setattr(targets, "check", lambda *_, **__: (7, 7))
    with pytest.raises(AssertionError, match="the scanner is wrong"):
        targets.packet(Input(b'{"emitterId":"e","messages":[{"message":"m"}]}'))
