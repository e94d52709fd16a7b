"""The commands config, send and top: options, exit statuses, and what goes to which stream; shell completion."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections import Counter

import pytest
from fakes import Distributor

from fastdist.client import logfile, packing, send
from fastdist.client.offsets import OffsetFile

# ---- config (what it prints: test_effective.py)


def test_config_prints_what_serve_would_use(run, file):
    result = run("config", str(file), "--workers", "5", FASTDIST_LIMITS__RATE="7")
    assert result.exit_code == 0
    document = tomllib.loads(result.stdout)
    assert (document["server"]["port"], document["server"]["workers"], document["limits"]["rate"]) == (2000, 5, 7)
    assert result.stderr == ""
    assert run("config", FASTDIST_CONFIG=str(file)).stdout == run("config", str(file)).stdout


def test_config_can_print_only_what_is_set(run, file):
    assert tomllib.loads(run("config", str(file), "--changed").stdout) == {"server": {"port": 2000, "workers": 2}}
    assert tomllib.loads(run("config", "--changed").stdout) == {}


def test_bad_config_prints_only_problems(run, file):
    file.write_text("[server]\nport = -1\n")
    result = run("config", str(file))
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"server.port: must be >= 0 ({file}:2)\n")


# ---- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_commands_and_options(shell):
    def completed(line, word):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(word), "_TYPER_COMPLETE_ARGS": line}
        environ = (
            os.environ | words | {"_FASTDIST_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        )
        program = "from fastdist.cli.main import app; app(prog_name='fastdist')"
        return subprocess.run(
            [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
        ).stdout

    assert {"serve", "send", "top", "config", "check"} <= set(re.findall(r"[\w-]+", completed("fastdist ", 1)))
    assert "--offset-file" in completed("fastdist send --off", 2)


# ---- send and top (what becomes of them: test_sender.py, test_topview.py, e2e)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "app.log"
    path.write_text("one\ntwo\n")
    return path


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--url", "localhost:3000"], "--url: must be an http:// or https:// URL"),
        (["--url", "https://h", "--ca-file", "/nowhere.pem"], "/nowhere.pem: No such file or directory"),
        (["--emitter", ""], "--emitter: expected 1 to 256 printable characters"),
        (["--emitter", "x" * 257], "--emitter: expected 1 to 256"),
        (["--source", "a\nb"], "--source: expected 1 to 256 printable"),
        (["--level", "loud"], "--level: expected one of trace, debug"),
        (["--batch-bytes", "1x"], "--batch-bytes: expected a size such as"),
        (["--batch-bytes", "1KiB"], "--batch-bytes: must be from 64KiB to 1GiB"),
        (["--batch-bytes", "2GiB"], "--batch-bytes: must be from 64KiB to 1GiB"),
        (["--patience", "soon"], "--patience: expected a duration such as"),
        (["--token", "ü"], "the token must be of visible ASCII characters"),
        (["--offset-file", "/nowhere/x"], "/nowhere/x: No such file or directory"),
    ],
)
def test_send_with_an_unusable_option(run, log, options, problem):
    result = run("send", str(log), "--url", "http://127.0.0.1:1", *options)
    assert result.exit_code == 2
    assert f"fastdist: {problem}" in result.stderr or f"fastdist: --url: {problem}" in result.stderr
    assert "ü" not in result.output


@pytest.mark.parametrize(
    "options", [["--format", "xml"], ["--batch", "0"], ["--concurrency", "0"], ["--concurrency", "65"]]
)
def test_send_with_an_unknown_choice(run, log, options):
    assert run("send", str(log), *options).exit_code == 2


def test_send_of_what_cannot_be_read(run, tmp_path):
    assert run("send", str(tmp_path)).stderr == f"fastdist: {tmp_path}: is a folder\n"
    result = run("send", str(tmp_path / "nowhere"))
    assert (result.exit_code, result.stderr) == (2, f"fastdist: {tmp_path / 'nowhere'}: No such file or directory\n")


def test_send_of_stdin_has_no_offsets(run, tmp_path):
    result = run("send", "-", "--offset-file", str(tmp_path / "x"))
    assert result.exit_code == 2
    assert "standard input cannot be read again" in result.stderr


def test_send_with_a_file_without_offsets(run, log, tmp_path):
    (tmp_path / "x").write_text("something of value")
    result = run("send", str(log), "--offset-file", str(tmp_path / "x"))
    assert result.exit_code == 2
    assert "not a file of offsets" in result.stderr
    assert (tmp_path / "x").read_text() == "something of value"


def test_send_with_offsets_held_by_another(run, log, tmp_path):
    with OffsetFile(tmp_path / "x"):
        result = run("send", str(log), "--offset-file", str(tmp_path / "x"))
    assert (result.exit_code, result.stderr) == (3, f"fastdist: {tmp_path / 'x'}: in use by another fastdist send\n")


def test_send_gives_up_when_patience_is_over(run, log):
    result = run("send", str(log), "--url", "http://127.0.0.1:1", "--patience", "0.2s")
    assert result.exit_code == 1
    assert "stopped: http://127.0.0.1:1 cannot be reached: Connection refused; given up" in result.stderr
    assert result.stdout.startswith("sent 0 messages in 0 packets")


def test_send_does_as_the_options_say(run, log, monkeypatch):
    seen = {}

    class Fake:
        def __init__(self, target, connections, patience, _):
            seen.update(target=target, connections=connections, patience=patience)
            self.is_stopping = None
            self.summary = send.Summary(packets=1, messages=2, tally=Counter({"empty": 3}))
            self.stopping = False

        def run(self, sources, offsets, *, follow):
            seen.update(source=next(iter(sources)), offsets=offsets, follow=follow)

    monkeypatch.setattr(send, "Shipper", Fake)
    result = run("send", str(log), FASTDIST_TOKEN="from-environment")
    assert result.exit_code == 0
    assert result.stdout.startswith("sent 2 messages in 1 packet, 0 B in 0.0 s (")
    assert "empty lines left out: 3\n" in result.stdout
    assert (seen["target"].url, seen["target"].token) == ("http://127.0.0.1:3000", "from-environment")
    assert (seen["connections"], seen["patience"], seen["follow"], seen["offsets"]) == (8, 300, False, None)
    assert (seen["source"]._recipe.max_messages, seen["source"]._recipe.max_bytes) == (500, 1 << 20)
    assert seen["source"]._recipe.style == packing.Style(socket.gethostname(), "app.log")
    options = ["--emitter", "e", "--format", "ndjson", "--level", "WARN", "--source", "s", "--stamp", "--follow"]
    limits = ["--batch", "7", "--batch-bytes", "65536", "--concurrency", "3", "--patience", "never", "--token", "t"]
    run("send", str(log), *options, *limits, "--url", "http://h:1")
    assert seen["source"]._recipe.style == packing.Style("e", "app.log", packing.Format.NDJSON, "WARN", "s", stamp=True)
    assert (seen["source"]._recipe.max_messages, seen["source"]._recipe.max_bytes) == (7, 65536)
    assert (seen["connections"], seen["patience"], seen["follow"]) == (3, math.inf, True)
    assert (seen["target"].url, seen["target"].token) == ("http://h:1", "t")
    run("send", "-")
    assert isinstance(seen["source"], logfile.Stream)
    assert seen["source"]._packer._file == b'"stdin"'


@pytest.mark.parametrize(
    ("summary", "status"),
    [({}, 0), ({"stopped": "x"}, 1), ({"stopped": "x", "permanent": True}, 4), ({"unsent": 5, "stopped": "x"}, 1)],
)
def test_send_exits_with_what_became_of_it(run, log, monkeypatch, summary, status):
    class Fake(send.Shipper):
        def run(self, *_, **__):
            self.summary = send.Summary(**summary)

    monkeypatch.setattr(send, "Shipper", Fake)
    result = run("send", str(log))
    assert result.exit_code == status
    assert ("stopped: x\n" in result.stderr) == bool(summary)
    assert ("read but NOT sent: 5 messages at least" in result.stdout) == ("unsent" in summary)


def test_top_without_any_response(run):
    result = run("top", "--once", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "fastdist: http://127.0.0.1:1: Connection refused\n"


def test_top_without_terminal_prints_once(run):
    result = run("top")
    assert result.exit_code == 2
    assert "say --once" in result.stderr


def test_top_with_an_unusable_option(run):
    assert run("top", "--once", "--interval", "x").stderr.startswith("fastdist: --interval: expected a duration")
    assert run("top", "--once", "--url", "x").stderr == "fastdist: --url: must be an http:// or https:// URL\n"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((200, {}, b"<html>"), "/health: JSON is malformed"),
        ((200, {}, b"{}"), "/health: Object missing required field `status`; is that the URL of a distributor?"),
        ((404, {}, b""), "/health is answered 404; is that the URL of a distributor?"),
        ((400, {}, b'{"detail": "use https:// in the URL"}'), "/health is answered 400: use https:// in the URL\n"),
    ],
)
def test_top_of_what_is_no_distributor(run, answer, problem):
    class Other(Distributor):
        def answer(self, *_):
            return answer

    server = Other()
    server.says = {}
    try:
        result = run("top", "--once", "--url", server.url)
    finally:
        server.shutdown()
        server.server_close()
    assert result.exit_code == 1
    assert problem in result.stderr
