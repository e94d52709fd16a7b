"""The command as it is installed: exit statuses, where settings come from, and a start as in the README."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support import BODY, ROOT, free_port, get_json, request, wait_until

PYTHON = sys.executable
COMMAND = (PYTHON, "-m", "fastdist")
FASTDIST = Path(PYTHON).with_name("fastdist")
BAD = """
[server]
port = 70000
prot = 1

[[analyzers]]
id = "A1"
endpoint = "ftp://nowhere/"
weight = 0.5

[[analyzers]]
id = "A1"
endpoint = "http://127.0.0.1:1/"
weight = -1
"""
PROBLEMS = ["server.port: ", "server.prot: unknown key", "analyzers[0].endpoint: ", "analyzers[1].weight: must be >= 0"]


def is_free(port):
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


@pytest.fixture
def config(tmp_path):
    """A configuration file that names port and workers, and no analyzer that is there."""
    file = tmp_path / "fastdist.toml"
    file.write_text(
        f'[server]\nhost = "127.0.0.1"\nport = {free_port()}\nworkers = 1\n'
        f'[queue]\ndurability = "memory"\ncapacity = "8MiB"\npath = "{tmp_path}/data"\n'
    )
    return file


def port_in(file):
    return int(file.read_text().split("port = ")[1].split("\n")[0])


def started(process):
    """Return (port, workers) of a distributor that has started."""
    ready = json.loads(process.line_with("fastdist is ready"))
    port = int(ready["url"].rsplit(":", 1)[1])
    assert len(get_json(port, "/stats")["workers"]) == ready["workers"]
    return port, ready["workers"]


@pytest.mark.parametrize("command", ["check", "serve"])
def test_bad_config_lists_all_and_exits_2(run, tmp_path, command):
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    process = run(*COMMAND, command, *([] if command == "check" else ["--config"]), file)
    assert process.wait() == 2
    for problem in PROBLEMS:
        assert any(line.startswith(problem) for line in process.lines), (problem, process.output)
    assert "Traceback" not in process.output


def test_a_good_configuration_passes(run, config):
    process = run(*COMMAND, "check", config)
    assert process.wait() == 0
    assert ": ok (4 analyzers" in process.output


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["serve", "--config", "/nowhere/at/all.toml"], {}),
        (["serve"], {"FASTDIST_CONFIG": "/nowhere/at/all.toml"}),
        (["serve"], {"FASTDIST_SERVER__WORKERS": "many"}),
        (["serve"], {"FASTDIST_SERVER__WORKER": "1"}),
        (["serve", "--port", "-1"], {}),
        (["serve", "--no-such-option"], {}),
        (["no-such-command"], {}),
    ],
)
def test_what_cannot_be_used_exits_2(run, arguments, environment):
    process = run(*COMMAND, *arguments, **environment)
    assert process.wait() == 2
    assert "Traceback" not in process.output


def test_a_port_in_use_exits_3(run, config):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = run(*COMMAND, "serve", "--config", config, "--port", port)
        assert process.wait() == 3
    assert f"port {port}" in process.output
    assert "Traceback" not in process.output


def test_port_of_another_fastdist_exits_3(run, config):
    """Workers share their port with SO_REUSEPORT; two services must not."""
    first = run(*COMMAND, "serve", "--config", config)
    port, _ = started(first)
    second = run(*COMMAND, "serve", "--config", config)
    assert second.wait() == 3
    assert f"port {port}" in second.output
    assert get_json(port, "/health")["workers"] == {"running": 1, "configured": 1}


def test_unallocatable_queue_exits_3(run, config, tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    (tmp_path / "link").symlink_to("nowhere")
    for name, what in (("data", "not a folder"), ("link", "a link to nothing"), ("link/data", "a link to nothing")):
        path = tmp_path / name
        environment = {"FASTDIST_QUEUE__DURABILITY": "disk", "FASTDIST_QUEUE__PATH": str(path)}
        process = run(*COMMAND, "serve", "--config", config, **environment)
        assert process.wait() == 3
        at_fault = tmp_path / name.split("/")[0]
        assert f"cannot use {path} for the queue: {at_fault} is {what}" in process.output
        assert "Traceback" not in process.output


def test_invalid_address_exits_3(run, config):
    process = run(*COMMAND, "serve", "--config", config, "--host", "not a host")
    assert process.wait() == 3
    assert f'cannot listen on "not a host" port {port_in(config)}: ' in process.output


@pytest.mark.parametrize("command", ["check", "serve"])
def test_check_and_serve_report_bad_cert(run, config, tmp_path, command):
    text = config.read_text()
    config.write_text(f'{text}[security]\ntls_cert = "{tmp_path}/cert.pem"\ntls_key = "{tmp_path}/key.pem"\n')
    process = run(*COMMAND, command, *([] if command == "check" else ["--config"]), config)
    assert process.wait() == 2
    assert process.lines == [
        f"security.tls_{name}: {tmp_path}/{name}.pem cannot be read: No such file or directory"
        for name in ("cert", "key")
    ]


def test_the_file_is_used(run, config):
    assert started(run(*COMMAND, "serve", "--config", config)) == (port_in(config), 1)


def test_the_environment_wins_over_the_file(run, config):
    port = free_port()
    process = run(*COMMAND, "serve", FASTDIST_CONFIG=str(config), PORT=str(port), WORKER_COUNT="2")
    assert started(process) == (port, 2)


def test_long_names_win_over_short_ones(run, config):
    port = free_port()
    environment = {"PORT": str(free_port()), "FASTDIST_SERVER__PORT": str(port), "WORKER_COUNT": "3"}
    process = run(*COMMAND, "serve", "--config", config, FASTDIST_SERVER__WORKERS="2", **environment)
    assert started(process) == (port, 2)


def test_flags_win_over_everything(run, config):
    port = free_port()
    environment = {"PORT": str(free_port()), "FASTDIST_SERVER__PORT": str(free_port()), "FASTDIST_SERVER__WORKERS": "3"}
    process = run(*COMMAND, "serve", "--config", config, "--port", port, "--workers", "2", **environment)
    assert started(process) == (port, 2)


def test_the_installed_command_is_the_same(run, config):
    if not FASTDIST.exists():
        pytest.skip(f"{FASTDIST} is not there: the project is not installed")
    assert started(run(FASTDIST, "serve", "--config", config)) == (port_in(config), 1)
    version = run(FASTDIST, "--version")
    assert version.wait() == 0
    assert version.output.startswith("fastdist ")


def test_working_directory_code_is_not_run(run, config, tmp_path):
    for name in ("uvloop.py", "random.py", "fastdist.py"):
        (tmp_path / name).write_text("raise SystemExit('this is not the module you are looking for')\n")
    process = run(PYTHON, "-P", "-m", "fastdist", "serve", "--config", config, cwd=tmp_path)
    assert started(process) == (port_in(config), 1)


def test_a_start_with_nothing_set(run, tmp_path):
    """As ``make run`` does it: the mock analyzers' default ports, no configuration, and a first packet."""
    taken = [port for port in (3000, 3001, 3002, 3003, 3004, 3100) if not is_free(port)]
    if taken:
        pytest.skip(f"ports {taken} are taken")
    mocks = run(PYTHON, "-m", "mock_analyzers", cwd=ROOT)
    mocks.line_with("control")
    fastdist = run(*COMMAND, "serve", cwd=tmp_path)
    assert started(fastdist)[0] == 3000
    assert get_json(3000, "/queue")["durability"] == "disk"
    assert get_json(3000, "/health")["analyzers"] == {"online": 4, "total": 4}
    body = b'{"emitterId":"me","messages":[{"message":"hello"}]}'
    status, _, answer = request(3000, "POST", "/logs", body, {"Content-Type": "application/json"})
    assert status == 202
    accepted = json.loads(answer)
    assert (accepted["status"], accepted["messages"], len(accepted["packetId"])) == ("accepted", 1, 36)
    assert request(3000, "POST", "/logs", BODY)[0] == 202, "no Content-Type is taken as JSON"
    wait_until(lambda: get_json(3000, "/stats")["packets"]["delivered"] == 2, "both are delivered")
    fastdist.signal(2)
    assert fastdist.wait() == 0
    mocks.signal(2)
    assert mocks.wait() == 0
    assert (tmp_path / "fastdist-data").is_dir()
