"""The command line: exit statuses, what goes to which stream, and what reaches the supervisor."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
from typer.testing import CliRunner

import fastdist.supervisor
from fastdist import __version__
from fastdist._core import Packet
from fastdist.cli import main
from fastdist.client import held_file, output, replay
from fastdist.errors import StartError
from fastdist.shm.snapshot import DEAD_LETTERS
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import UNREADABLE, as_line


class FakeSupervisor(ModuleType):
    """Stands in for the service: notes what it is given, returns or raises what it is told."""

    def __init__(self):
        super().__init__("fastdist.supervisor.main")
        self.loaded = None
        self.outcome = 0

    def serve(self, loaded, pair):
        self.loaded, self.pair = loaded, pair
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def supervisor(monkeypatch):
    fake = FakeSupervisor()
    monkeypatch.setitem(sys.modules, "fastdist.supervisor.main", fake)
    monkeypatch.setattr(fastdist.supervisor, "main", fake, raising=False)
    return fake


def test_version_is_printed_alone(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"fastdist {__version__}\n")


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.exit_code == 2
    assert "serve" in result.output
    assert "check" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["serve", "--help"],
        ["check", "--help"],
        ["config", "--help"],
        ["send", "--help"],
        ["top", "--help"],
        ["reload", "--help"],
        ["analyzers"],
        ["analyzers", "list", "--help"],
        ["analyzers", "drain", "--help"],
        ["analyzers", "online", "--help"],
        ["analyzers", "weight", "--help"],
        ["analyzers", "reset", "--help"],
        ["dead-letters"],
        ["dead-letters", "-h"],
        ["dead-letters", "list", "--help"],
        ["dead-letters", "replay", "--help"],
        ["dead-letters", "purge", "--help"],
        ["queue"],
        ["queue", "verify", "--help"],
        ["queue", "show", "--help"],
    ],
)
def test_each_help_has_an_example_line(run, arguments):
    result = run(*arguments)
    assert result.exit_code == (0 if arguments[-1].startswith("-") else 2)
    assert any(line.strip().startswith("fastdist ") for line in result.output.splitlines())


def test_check_prints_the_shares(run, file):
    result = run("check", str(file))
    assert result.exit_code == 0
    assert result.stdout == f"{file}: ok (4 analyzers: A1 10 %, A2 40 %, A3 20 %, A4 30 %)\n"
    assert result.stderr == ""


def test_check_normalises_the_weights(run, file):
    file.write_text("".join(f"[[analyzers]]\nid='a{i}'\nendpoint='http://a'\nweight={i}\n" for i in range(3)))
    assert run("check", str(file)).stdout == f"{file}: ok (3 analyzers: a0 0 %, a1 33.33 %, a2 66.67 %)\n"
    file.write_text("[[analyzers]]\nid='a'\nendpoint='http://a'\nweight=7\n")
    assert run("check", str(file)).stdout == f"{file}: ok (1 analyzer: a 100 %)\n"


def test_check_prints_one_problem_per_line(run, file):
    file.write_text("[server]\nport = -1\nprot = 1\n")
    result = run("check", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"server.port: must be >= 0 ({file}:2)\nserver.prot: unknown key; did you mean 'port'? ({file}:3)\n"
    )


def test_check_warns_of_likely_mistakes(run, file):
    file.write_text("[delivery]\nmode = 'batch'\nbatch_packets = 121\n")
    result = run("check", str(file))
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{file}: ok ")
    assert result.stderr.startswith(f"{file}: warning: delivery.batch_packets: with more than 120 ")
    assert result.stderr.count("\n") == 1


def test_check_judges_the_environment_too(run, file):
    result = run("check", str(file), PORT="x")
    assert result.exit_code == 2
    assert result.stderr == 'server.port: expected an integer, got string "x" (environment PORT)\n'


def test_check_prefers_its_file_argument(run, file):
    assert run("check", str(file), FASTDIST_CONFIG="/nowhere").exit_code == 0


def test_check_of_a_file_that_is_not_there(run):
    result = run("check", "/nowhere.toml")
    assert result.exit_code == 2
    assert result.stderr == "/nowhere.toml: cannot be read: No such file or directory\n"


def test_check_needs_a_file(run):
    assert run("check").exit_code == 2


def test_check_of_an_empty_name_fails(run):
    assert run("check", "").exit_code == 2


def test_serve_hands_over_what_it_loaded(run, file, supervisor):
    result = run("serve", "--config", str(file), "--host", "::1", "--port", "1", WORKER_COUNT="3")
    assert result.exit_code == 0
    server = supervisor.loaded.config.server
    assert (server.host, server.port, server.workers) == ("::1", 1, 3)
    assert supervisor.loaded.path == file


def test_serve_without_options_has_defaults(run, supervisor):
    assert run("serve").exit_code == 0
    assert supervisor.loaded.path is None
    assert supervisor.loaded.config.server.port == 3000


def test_serve_keeps_the_flags_for_a_reload(run, file, supervisor):
    run("serve", "--config", str(file), "--port", "1", "--workers", "4")
    file.write_text("[server]\nport = 9\nhost = 'new'\n")
    server = supervisor.loaded.reload().config.server
    assert (server.host, server.port, server.workers) == ("new", 1, 4)


def test_serve_reads_the_environments_file(run, file, supervisor):
    assert run("serve", FASTDIST_CONFIG=str(file)).exit_code == 0
    assert supervisor.loaded.config.server.port == 2000


@pytest.mark.parametrize("status", [0, 1, 3])
def test_serve_exits_with_supervisor_status(run, supervisor, status):
    supervisor.outcome = status
    assert run("serve").exit_code == status


def test_serve_with_problems_never_starts(run, file, supervisor):
    file.write_text("[server]\nport = -1\n[zzz]\n")
    result = run("serve", "--config", str(file))
    assert result.exit_code == 2
    assert result.stderr == f"server.port: must be >= 0 ({file}:2)\nzzz: unknown section ({file}:3)\n"
    assert supervisor.loaded is None


def test_serve_with_a_flag_out_of_bounds(run, supervisor):
    result = run("serve", "--port", "65536")
    assert result.exit_code == 2
    assert result.stderr == "server.port: must be <= 65535 (flag --port)\n"
    assert supervisor.loaded is None


def test_failed_serve_prints_no_traceback(run, supervisor):
    supervisor.outcome = StartError("port 3000 is in use")
    result = run("serve")
    assert result.exit_code == 3
    assert result.stderr == "fastdist: port 3000 is in use\n"
    assert result.stdout == ""


def test_check_tests_certificate_as_serve(run, file):
    file.write_text("[security]\ntls_cert = '/nowhere.pem'\ntls_key = '/nowhere.pem'\n")
    result = run("check", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "security.tls_cert: /nowhere.pem cannot be read: No such file or directory\n"
        "security.tls_key: /nowhere.pem cannot be read: No such file or directory\n"
    )


def test_check_names_every_file_at_fault(run, file, tmp_path):
    (tmp_path / "empty.pem").touch()
    analyzer = 'endpoint = "https://127.0.0.1:1/"\nweight = 1\n'
    file.write_text(
        f"""
        [security]
        tls_cert = "/nowhere.pem"
        tls_key = "/nowhere.pem"
        [queue]
        backend = "jetstream"
        [jetstream]
        servers = ["tls://127.0.0.1:4222"]
        tls_ca = "/nowhere.pem"
        [[analyzers]]
        id = "A1"
        ca_file = "/nowhere.pem"
        client_cert = "/nowhere.pem"
        client_key = "/nowhere.pem"
        {analyzer}
        [[analyzers]]
        id = "A2"
        ca_file = "{tmp_path}/empty.pem"
        {analyzer}
        """
    )
    result = run("check", str(file))
    assert result.exit_code == 2
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        "security.tls_cert",
        "security.tls_key",
        "analyzers[0].ca_file",
        "analyzers[0].client_cert",
        "analyzers[0].client_key",
        "analyzers[1].ca_file",
        "jetstream.tls_ca",
    ]


# ---- dead letters (what becomes of them: test_replay.py)


RESPONSE = b'{"error":\n  "no such\x1bfield", "fields": ["' + b"a" * 100


@pytest.fixture
def dead_letters(tmp_path):
    """A queue's folder with two dead letters and a torn line."""
    writer = DeadLetterFiles(tmp_path, "w0-1")
    writer.write(
        as_line(
            Packet(1, "first", b'{"n":1}', 3, time.time_ns(), 2, 0, 0), "refused", "A1", 422, "it says no", RESPONSE
        )
    )
    writer.write(as_line(Packet(2, "second", b"\xff", 0, time.time_ns(), 1, 0, 0), "shutdown", None, None, None))
    writer.close()
    (path,) = tmp_path.glob("dead-letters/*.ndjson")
    with path.open("ab") as file:
        file.write(b'{"id":"torn')
    return tmp_path


def test_list_has_a_line_for_each_and_a_sum(run, dead_letters):
    result = run("dead-letters", "list", str(dead_letters))
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == [
        "ID",
        "REASON",
        "ANALYZER",
        "STATUS",
        "ATTEMPTS",
        "ACCEPTED",
        "DEAD",
        "SINCE",
        "SIZE",
        "RESPONSE",
    ]
    assert lines[1][:5] == ["first", "refused", "A1", "422", "3"]
    assert lines[1][7:9] == ["7", "B"]
    assert " ".join(lines[1][9:]) == '{"error": "no such?field", "fields": ["' + "a" * 20 + "…"
    assert lines[2][:5] == ["second", "shutdown", "-", "-", "0"]
    assert lines[3][:2] == ["-", "unreadable"]
    assert " ".join(lines[4]).startswith("2 dead letters and 1 unreadable line, 19 B, the oldest of 20")


def test_list_as_json_has_one_line_each(run, dead_letters):
    result = run("dead-letters", "list", str(dead_letters), "--json")
    first, second, torn = map(json.loads, result.stdout.splitlines())
    for dead_letter in (first, second):
        assert dead_letter.pop("acceptedAt").endswith("Z")
        assert dead_letter.pop("deadLetteredAt").endswith("Z")
    (path,) = dead_letters.glob("dead-letters/*.ndjson")
    assert first == {
        "id": "first",
        "reason": "refused",
        "analyzer": "A1",
        "status": 422,
        "error": "it says no",
        "response": RESPONSE.decode(),
        "attempts": 3,
        "messages": 2,
        "file": str(path),
        "bytes": 7,
    }
    assert (second["id"], second["analyzer"], second["status"], second["bytes"]) == ("second", None, None, 1)
    assert second["response"] is None
    assert torn == {"id": None, "reason": "unreadable", "file": str(path), "bytes": 11}


@pytest.mark.parametrize("verb", ["list", "replay", "purge"])
def test_dead_letters_are_in_one_place(run, dead_letters, verb):
    for where in ([], [str(dead_letters), "--config", "fastdist.toml"]):
        result = run("dead-letters", verb, *where, *(["--yes"] if verb == "purge" else []))
        assert result.exit_code == 2
        assert result.stderr == "fastdist: where are the dead letters? Name PATH or --config FILE, one of them\n"


def test_configuration_says_where_they_are(run, dead_letters, tmp_path):
    file = tmp_path / "fastdist.toml"
    file.write_text(f'[queue]\npath = "{dead_letters}"\n')
    assert (
        run("dead-letters", "list", "--config", str(file)).stdout
        == run("dead-letters", "list", str(dead_letters)).stdout
    )
    file.write_text(f'[dead_letters]\npath = "{dead_letters}/dead-letters"\n')
    assert (
        run("dead-letters", "list", "--config", str(file)).stdout
        == run("dead-letters", "list", str(dead_letters)).stdout
    )
    file.write_text("[queue]\npath = 1\n")
    result = run("dead-letters", "list", "--config", str(file))
    assert result.exit_code == 2
    assert result.stderr.startswith("queue.path: expected a string, got integer 1")


def test_folder_of_dead_letters_is_as_set(run, dead_letters, tmp_path):
    """Also if there is a folder in it that has the usual name."""
    (path,) = dead_letters.glob("dead-letters/*.ndjson")
    path.rename(tmp_path / path.name)
    file = tmp_path / "fastdist.toml"
    file.write_text(f'[dead_letters]\npath = "{tmp_path}"\n')
    assert f'"file":"{tmp_path / path.name}"' in run("dead-letters", "list", "--json", "--config", str(file)).stdout
    file.write_text(f'[dead_letters]\npath = "{tmp_path}/nowhere"\n')
    result = run("dead-letters", "list", "--config", str(file))
    assert (result.exit_code, result.stderr) == (2, f"fastdist: {tmp_path}/nowhere: No such file or directory\n")


def test_a_stream_needs_its_client(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdist.storage.jetstream.find_spec", lambda _: None)
    file = tmp_path / "fastdist.toml"
    file.write_text('[queue]\nbackend = "jetstream"\n')
    result = run("dead-letters", "list", "--config", str(file))
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith("pip install 'fastdist[jetstream]'\n")


def test_list_selects_by_reason_and_time(run, dead_letters):
    assert "1 dead letter, 1 B" in run("dead-letters", "list", str(dead_letters), "--reason", "shutdown").stdout
    assert "2 dead letters" in run("dead-letters", "list", str(dead_letters), "--since", "1h").stdout
    assert run("dead-letters", "list", str(dead_letters), "--reason", "exhausted", "--json").stdout == ""
    for since in ("99999999d", "3600"):
        assert "2 dead letters" in run("dead-letters", "list", str(dead_letters), "--since", since).stdout


def test_list_of_many_shows_each_line(run, tmp_path):
    writer = DeadLetterFiles(tmp_path, "w0-1")
    for i in range(2500):
        writer.write(as_line(Packet(1, f"p-{i}", b"", 0, time.time_ns(), 2, 0, 0), "refused", "A1", 422, None))
    for options in ([], ["--json"]):
        lines = run("dead-letters", "list", str(tmp_path), *options).stdout.splitlines()
        assert [line for line in lines if "p-" in line] == [line for line in lines if "refused" in line]
        assert sum("p-" in line for line in lines) == 2500


@pytest.mark.parametrize("command", [["list"], ["replay"], ["purge", "--yes"]])
def test_dead_letters_where_there_are_none(run, tmp_path, command):
    result = run("dead-letters", command[0], str(tmp_path), *command[1:])
    assert result.exit_code == 0
    assert result.stdout.startswith("no dead letters")


@pytest.mark.parametrize("command", [["list"], ["replay"], ["purge", "--yes"]])
def test_dead_letters_at_an_unusable_path(run, tmp_path, file, command):
    result = run("dead-letters", command[0], str(tmp_path / "nowhere"), *command[1:])
    assert result.exit_code == 2
    assert result.stderr == f"fastdist: {tmp_path / 'nowhere'}: No such file or directory\n"
    result = run("dead-letters", command[0], str(file), *command[1:])
    assert result.exit_code == 2
    assert "neither a folder nor a file of dead letters" in result.stderr
    assert file.exists()


@pytest.mark.parametrize("arguments", [["list", "--since", "1x"], ["purge", "--yes", "--older-than", "-3d"]])
def test_dead_letters_with_a_bad_duration(run, dead_letters, arguments):
    result = run("dead-letters", arguments[0], str(dead_letters), *arguments[1:])
    assert result.exit_code == 2
    assert f"fastdist: {arguments[-2]}: expected a duration such as" in result.stderr
    assert "2 dead letters" in run("dead-letters", "list", str(dead_letters)).stdout


def test_replay_with_an_invalid_url(run, dead_letters):
    result = run("dead-letters", "replay", str(dead_letters), "--url", "localhost:3000")
    assert (result.exit_code, result.stderr) == (2, "fastdist: --url: must be an http:// or https:// URL\n")


def test_replay_that_finds_no_distributor(run, dead_letters):
    result = run("dead-letters", "replay", str(dead_letters), "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stdout == "replayed 0, refused 0, left 3\n"
    why = "cannot be reached: Connection refused"
    assert result.stderr.splitlines() == [
        f"the distributor {why}; trying again",
        f"stopped: http://127.0.0.1:1 {why}; given up, try again later",
    ]


@pytest.fixture
def seen(monkeypatch):
    """Stands in for replaying: what it is told to do, and (``outcome``) what it says of it."""
    seen = {"outcome": replay.Summary()}

    class Fake:
        def __init__(self, files, selection, target, view):
            seen.update(files=files, selection=selection, target=target, view=view)

        def run(self, connections, limit):
            seen.update(connections=connections, limit=limit)
            for i in range(seen["outcome"].refused):
                seen["view"].refused(SimpleNamespace(id=f"p-{i}"), SimpleNamespace(text="400 (no)"))
            return seen["outcome"]

    monkeypatch.setattr(replay, "Replay", Fake)
    return seen


@pytest.mark.parametrize(("left", "stopped"), [(0, None), (2, None), (0, "no room")])
def test_replay_exits_with_what_is_left(run, seen, tmp_path, left, stopped):
    seen["outcome"] = replay.Summary(3, 25, left, stopped=stopped)
    result = run("dead-letters", "replay", str(tmp_path))
    assert result.exit_code == (1 if left or stopped else 0)
    assert result.stdout == f"replayed 3, refused 25, left {left}\n"
    assert "refused p-0: 400 (no)\n" in result.stderr
    assert result.stderr.count("400 (no)") == 20
    assert ("stopped: no room" in result.stderr) == bool(stopped)


def test_replay_does_as_the_options_say(run, seen, dead_letters):
    options = ["--url", "http://h:1", "--connections", "9", "--limit", "5", "--reason", "shutdown"]
    run("dead-letters", "replay", str(dead_letters), *options, FASTDIST_TOKEN="from-environment")
    assert (seen["target"].url, seen["target"].token) == ("http://h:1", "from-environment")
    assert (seen["connections"], seen["limit"], seen["selection"].reason) == (9, 5, "shutdown")
    assert len(seen["files"]) == 1
    run("dead-letters", "replay", str(dead_letters), "--token", "given", FASTDIST_TOKEN="from-environment")
    assert seen["target"].token == "given"
    run("dead-letters", "replay", str(dead_letters))
    assert (seen["target"].url, seen["target"].token) == ("http://127.0.0.1:3000", None)
    assert (seen["connections"], seen["limit"]) == (4, None)


def test_a_token_is_not_shown(run, dead_letters):
    result = run("dead-letters", "replay", str(dead_letters), "--token", "secret\n", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "secret" not in result.output


def test_purge_without_terminal_needs_yes(run, dead_letters):
    result = run("dead-letters", "purge", str(dead_letters))
    assert result.exit_code == 2
    assert "say --yes" in result.stderr
    assert "2 dead letters" in run("dead-letters", "list", str(dead_letters)).stdout
    result = run("dead-letters", "purge", str(dead_letters), "--yes", "--older-than", "1h")
    assert (result.exit_code, result.stdout) == (0, "no dead letters removed\n")
    result = run("dead-letters", "purge", str(dead_letters), "--yes", "--reason", "shutdown")
    assert (result.exit_code, result.stdout) == (0, "removed 1 dead letter\n")
    result = run("dead-letters", "purge", str(dead_letters), "-y")
    assert (result.exit_code, result.stdout) == (0, "removed 1 dead letter and 1 unreadable line\n")
    assert list(dead_letters.glob("dead-letters/*")) == []


def test_foreign_lines_are_called_unreadable(run, tmp_path):
    (tmp_path / "a.ndjson").write_text("{torn\n\n{torn too\n")
    assert "\n2 unreadable lines, 16 B, the oldest of" in run("dead-letters", "list", str(tmp_path)).stdout
    result = run("dead-letters", "purge", str(tmp_path), "--yes", "--reason", "unreadable")
    assert (result.exit_code, result.stdout) == (0, "removed 2 unreadable lines\n")


def test_options_reasons_are_all_reasons():
    assert get_args(main.Reason) == DEAD_LETTERS
    assert get_args(main.LineReason) == (*DEAD_LETTERS, UNREADABLE)


@pytest.mark.parametrize(
    ("command", "reason"), [("list", "bogus"), ("purge", "bogus"), ("replay", "bogus"), ("replay", "unreadable")]
)
def test_unknown_reason_lists_the_known_ones(run, dead_letters, command, reason):
    result = run("dead-letters", command, str(dead_letters), "--reason", reason)
    assert result.exit_code == 2
    assert "--reason" in result.stderr
    for known in get_args(main.LineReason if command != "replay" else main.Reason):
        assert f"'{known}'" in result.stderr
        assert known in run("dead-letters", command, "--help").output


@pytest.mark.parametrize(("answer", "status", "left"), [("n", 1, 1), ("\n", 1, 1), ("y", 0, 0)])
def test_purge_asks_at_a_terminal(dead_letters, monkeypatch, answer, status, left):
    monkeypatch.setattr(main, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = CliRunner().invoke(main.app, ["dead-letters", "purge", str(dead_letters)], input=answer + "\n")
    assert result.exit_code == status
    assert "Delete 2 dead letters and 1 unreadable line, 19 B, the oldest of" in result.output
    assert ("nothing was deleted" in result.output) == bool(left)
    assert len(list(dead_letters.glob("dead-letters/*"))) == left


def test_purge_skips_files_in_use(run, tmp_path, monkeypatch):
    monkeypatch.setattr(held_file, "LOCK_PATIENCE", 0.05)
    writer = DeadLetterFiles(tmp_path, "w0-1")
    writer.write(as_line(Packet(1, "first", b"", 3, time.time_ns(), 2, 0, 0), "refused", "A1", 422, None))
    result = run("dead-letters", "purge", str(tmp_path), "--yes")
    assert result.exit_code == 1
    assert "skipped, a worker is writing to it" in result.stderr
    assert result.stdout == "no dead letters removed\n"


def test_purge_notes_what_it_skips_at_once(run, dead_letters, monkeypatch):
    def purge(files, _selection, note):
        note("skipped")
        raise OSError(errno.EIO, "Input/output error", files[0].path.name)

    monkeypatch.setattr("fastdist.client.purge.purge", purge)
    result = run("dead-letters", "purge", str(dead_letters), "--yes")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "skipped"
    assert "Input/output error" in result.stderr


def at_a_terminal(*arguments, columns="120"):
    """Run the command line with a terminal for its output; return its exit status and what it shows."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "fastdist", *arguments]
    environ = os.environ | {"COLUMNS": columns, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environ)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    return process.wait(30), shown.decode()


def test_a_terminal_gets_a_table_and_a_bar(dead_letters):
    status, shown = at_a_terminal("dead-letters", "list", str(dead_letters))
    assert status == 0
    assert "\x1b[1m" in shown
    assert "dead since" in shown
    assert "unreadable" in shown
    status, shown = at_a_terminal("dead-letters", "replay", str(dead_letters), "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "replaying" in shown
    assert "0/2" in shown
    assert "cannot be reached" in shown


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 29, "2.5 GiB"), (3 << 50, "3072.0 TiB")]
)
def test_sizes_are_for_people(size, text):
    assert output.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (0.4, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (864_000, "10 d")]
)
def test_ages_are_for_people(seconds, text):
    assert output.age_text(seconds) == text


def test_tracebacks_show_no_local_variables():
    assert main.app.pretty_exceptions_show_locals is False


def test_main_runs_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdist", "--version"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fastdist {__version__}\n"


def test_check_imports_no_service_module(run, file):
    before = sys.modules.pop("fastdist.supervisor.main", None)
    try:
        run("check", str(file))
        assert "fastdist.supervisor.main" not in sys.modules
    finally:
        if before is not None:
            sys.modules["fastdist.supervisor.main"] = before
