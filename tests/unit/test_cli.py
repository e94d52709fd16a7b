"""The command line: exit statuses, what goes to which stream, and what reaches the supervisor."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

import fastdist
from fastdist import __version__, cli
from fastdist.errors import StartError


@pytest.fixture
def run(monkeypatch):
    """Run the command line in an environment without any setting."""
    for name in list(os.environ):
        if name in {"PORT", "WORKER_COUNT"} or name.startswith("FASTDIST_"):
            monkeypatch.delenv(name)
    return lambda *arguments, **environ: CliRunner().invoke(cli.app, list(arguments), env=environ)


class FakeSupervisor(ModuleType):
    """Stands in for the service: notes what it is given, returns or raises what it is told."""

    def __init__(self):
        super().__init__("fastdist.supervisor")
        self.loaded = None
        self.outcome = 0

    def serve(self, loaded):
        self.loaded = loaded
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def supervisor(monkeypatch):
    fake = FakeSupervisor()
    monkeypatch.setitem(sys.modules, "fastdist.supervisor", fake)
    monkeypatch.setattr(fastdist, "supervisor", fake, raising=False)
    return fake


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fastdist.toml"
    path.write_text("[server]\nport = 2000\nworkers = 2\n")
    return path


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"fastdist {__version__}\n")


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.exit_code == 2
    assert "serve" in result.output
    assert "check" in result.output


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["serve", "--help"], ["check", "--help"]])
def test_every_help_has_an_example_on_a_line_of_its_own(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    assert any(line.strip().startswith("fastdist ") for line in result.stdout.splitlines())


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


def test_check_prints_every_problem_on_a_line_of_its_own(run, file):
    file.write_text("[server]\nport = -1\nprot = 1\n")
    result = run("check", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "server.port: must be >= 0\nserver.prot: unknown key; did you mean 'port'?\n"


def test_check_judges_the_environment_too(run, file):
    result = run("check", str(file), PORT="x")
    assert result.exit_code == 2
    assert result.stderr == 'server.port: expected an integer, got string "x" (environment PORT)\n'


def test_check_takes_the_file_it_is_given_not_that_of_the_environment(run, file):
    assert run("check", str(file), FASTDIST_CONFIG="/nowhere").exit_code == 0


def test_check_of_a_file_that_is_not_there(run):
    result = run("check", "/nowhere.toml")
    assert result.exit_code == 2
    assert result.stderr == "/nowhere.toml: cannot be read: No such file or directory\n"


def test_check_needs_a_file(run):
    assert run("check").exit_code == 2


def test_check_of_an_empty_name_is_no_success(run):
    assert run("check", "").exit_code == 2


def test_serve_hands_over_what_it_loaded(run, file, supervisor):
    result = run("serve", "--config", str(file), "--host", "::1", "--port", "1", WORKER_COUNT="3")
    assert result.exit_code == 0
    server = supervisor.loaded.config.server
    assert (server.host, server.port, server.workers) == ("::1", 1, 3)
    assert supervisor.loaded.path == file


def test_serve_without_options_uses_the_defaults(run, supervisor):
    assert run("serve").exit_code == 0
    assert supervisor.loaded.path is None
    assert supervisor.loaded.config.server.port == 3000


def test_serve_remembers_the_flags_for_a_reload(run, file, supervisor):
    run("serve", "--config", str(file), "--port", "1", "--workers", "4")
    file.write_text("[server]\nport = 9\nhost = 'new'\n")
    server = supervisor.loaded.reload().config.server
    assert (server.host, server.port, server.workers) == ("new", 1, 4)


def test_serve_takes_the_file_that_the_environment_names(run, file, supervisor):
    assert run("serve", FASTDIST_CONFIG=str(file)).exit_code == 0
    assert supervisor.loaded.config.server.port == 2000


@pytest.mark.parametrize("status", [0, 1, 3])
def test_serve_exits_with_the_status_of_the_supervisor(run, supervisor, status):
    supervisor.outcome = status
    assert run("serve").exit_code == status


def test_serve_with_problems_prints_them_and_never_starts(run, file, supervisor):
    file.write_text("[server]\nport = -1\n[zzz]\n")
    result = run("serve", "--config", str(file))
    assert result.exit_code == 2
    assert result.stderr == "server.port: must be >= 0\nzzz: unknown section\n"
    assert supervisor.loaded is None


def test_serve_with_a_flag_out_of_bounds(run, supervisor):
    result = run("serve", "--port", "65536")
    assert result.exit_code == 2
    assert result.stderr == "server.port: must be <= 65535 (flag --port)\n"
    assert supervisor.loaded is None


def test_serve_that_cannot_start_says_why_without_a_traceback(run, supervisor):
    supervisor.outcome = StartError("port 3000 is in use")
    result = run("serve")
    assert result.exit_code == 3
    assert result.stderr == "fastdist: port 3000 is in use\n"
    assert result.stdout == ""


def test_tracebacks_show_no_local_variables():
    assert cli.app.pretty_exceptions_show_locals is False


def test_main_runs_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdist", "--version"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fastdist {__version__}\n"


def test_check_imports_nothing_of_the_service(run, file):
    before = sys.modules.pop("fastdist.supervisor", None)
    try:
        run("check", str(file))
        assert "fastdist.supervisor" not in sys.modules
    finally:
        if before is not None:
            sys.modules["fastdist.supervisor"] = before
