"""A reload: what it does not take for left to its default, and files that are being written while they are read."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from fastdist import tomlfile
from fastdist.config import QUIET, load
from fastdist.errors import ConfigError

ANALYZERS = '[[analyzers]]\nid = "mine"\nendpoint = "http://127.0.0.1:1/"\nweight = 1\n'
TOKENS = '[security]\ntokens = ["secret-one"]\nadmin_tokens = ["secret-two"]\n'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fastdist.toml"


@pytest.fixture
def written_while_read(monkeypatch):
    """Return ``written_while_read(*writers)``: each is called once, after a reading and before the next look."""

    def patch(*writers):
        waiting = iter(writers)
        monkeypatch.setattr(tomlfile, "time", SimpleNamespace(sleep=lambda _: next(waiting, lambda: None)()))

    return patch


def loaded(file, text):
    file.write_text(text)
    return load(file, {}, {})


def problems_of(reload):
    with pytest.raises(ConfigError) as error:
        reload()
    assert "secret" not in str(error.value)
    return [problem.partition(":")[0] for problem in error.value.problems]


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("", ["analyzers", "security.tokens", "security.admin_tokens"]),
        (TOKENS, ["analyzers"]),
        (ANALYZERS, ["security.tokens", "security.admin_tokens"]),
        (f'{ANALYZERS}[security]\ntokens = ["secret-one"]\n', ["security.admin_tokens"]),
        (f'{ANALYZERS}[security]\nadmin_tokens = ["secret-two"]\n', ["security.tokens"]),
    ],
)
def test_reload_keeps_every_given_setting(file, text, left_out):
    before = loaded(file, ANALYZERS + TOKENS)
    file.write_text(text)
    assert problems_of(before.reload) == left_out


def test_empty_list_removes_tokens(file):
    before = loaded(file, ANALYZERS + TOKENS)
    file.write_text(f"{ANALYZERS}[security]\ntokens = []\nadmin_tokens = []\n")
    without = before.reload()
    assert (without.config.security.tokens, without.config.security.admin_tokens) == ((), ())
    file.write_text(ANALYZERS)
    assert without.reload().config.security.tokens == ()


def test_setting_never_given_may_be_absent(file):
    before = loaded(file, "[limits]\nrate = 1\n")
    file.write_text("")
    assert before.reload().config.limits.rate == 0.0


def test_start_takes_defaults_of_empty_file(file):
    assert len(loaded(file, "").config.analyzers) == 4


def test_file_written_while_read_is_reread(file, written_while_read):
    file.write_text("[limits]\nrate = 1\n")
    written_while_read(lambda: file.write_text("[limits]\nrate = 1\nburst = 7\n"))
    assert load(file, {}, {}).config.limits.burst == 7


def test_file_replaced_while_read_is_reread(file, tmp_path, written_while_read):
    """By another of the same length and time: only its inode tells."""

    def replace():
        beside = tmp_path / "beside"
        beside.write_text("[limits]\nrate = 2\n")
        os.utime(beside, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        beside.rename(file)

    file.write_text("[limits]\nrate = 1\n")
    written_while_read(replace)
    assert load(file, {}, {}).config.limits.rate == 2


def test_credential_being_written_is_reread(file, tmp_path, monkeypatch):
    credential = tmp_path / "credential"
    credential.write_text("old")
    before = loaded(file, f'{ANALYZERS}[analyzers.headers]\nX = {{ file = "{credential}" }}\n')
    credential.write_text("Bearer ne")
    waits = iter([lambda: None, lambda: credential.write_text("Bearer new-one")])  # of the configuration; of this one

    def sleep(seconds):
        if seconds >= QUIET:
            next(waits, lambda: None)()

    monkeypatch.setattr(tomlfile, "time", SimpleNamespace(sleep=sleep))
    assert before.reload().config.analyzers[0].headers[0].value == b"Bearer new-one"


def test_ever_changing_file_is_not_used(file, written_while_read):
    texts = ("#" * number for number in range(1000))  # times may be too coarse to tell them apart, lengths are not
    file.write_text("")
    written_while_read(*[lambda: file.write_text(next(texts))] * 1000)
    with pytest.raises(ConfigError, match="changes while it is read; try again when it is written"):
        load(file, {}, {})


def test_configuration_can_come_from_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"[limits]\nrate = 3\n")
    os.close(writer)
    try:
        assert load(f"/dev/fd/{reader}", {}, {}).config.limits.rate == 3
    finally:
        os.close(reader)
