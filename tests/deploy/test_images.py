"""What the Dockerfile runs is run, and what it makes is used: as its user, on a read-only root, with volumes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess

import dockerfile
import images
import pytest
from support import Emitter, Process, free_port, get_json, request, running, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.slow]
BUILD = dockerfile.setting("build", "WORKDIR").text
CONFIG = """
[server]
workers = 2
drain_timeout = "20s"

[[analyzers]]
id = "A1"
endpoint = "http://127.0.0.1:{}/analyze"
weight = 1
"""


class Container(Process):
    """An image's command, or its CMD with other words, run as ``docker run --read-only`` would."""

    def __init__(self, builder, name, words=None, volumes=None, **variables) -> None:
        self.image = builder.build(name)
        self.name, self.volumes = name, volumes or {}
        path = dockerfile.environment(name)["PATH"].replace("$PATH", images.PATH)
        self.variables = dockerfile.environment(name) | {"PATH": path, "HOME": "/"} | variables
        where = dockerfile.setting(name, "WORKDIR").text
        given = dockerfile.setting(name, "CMD").words if words is None else words
        super().__init__(self.inside([*dockerfile.setting(name, "ENTRYPOINT").words, *given], where))

    def inside(self, words, where="/"):
        """Return the command that runs another in this container."""
        user = dockerfile.setting(self.name, "USER").text
        options = {"user": user, "folder": where, "variables": self.variables, "volumes": self.volumes}
        return self.image.command(words, read_only=True, **options)

    def run(self, *words):
        return subprocess.run(self.inside(list(words)), capture_output=True, text=True, check=False)

    def health(self):
        """Run what HEALTHCHECK says."""
        return self.run(*json.loads(dockerfile.setting(self.name, "HEALTHCHECK").text.removeprefix("CMD ")))


@pytest.fixture(scope="module")
def analyzer(builder):
    """Return the port of a mock analyzer in a container of its image."""
    port, control = free_port(), free_port()
    container = Container(
        builder, "mock-analyzers", ["--ids", "A1", "--ports", str(port), "--control-port", str(control)]
    )
    with running(container):
        container.line_with("control listens")
        yield port


@pytest.fixture
def volume(tmp_path):
    """Return an empty volume as Docker would make it: with the owner and mode that the image's folder has."""
    folder = tmp_path / "queue"
    folder.mkdir(mode=0o700)
    user, group = map(int, dockerfile.setting("fastdist", "USER").text.split(":"))
    os.chown(folder, user, group)
    return folder


@pytest.fixture
def run(builder, tmp_path, volume, analyzer):
    """Return ``run(configuration, **environment)``: a distributor in a container of its image."""
    started = []

    def run(configuration=None, **environment):
        file = tmp_path / "fastdist.toml"
        file.write_text(CONFIG.format(analyzer) if configuration is None else configuration)
        volumes = {dockerfile.environment("fastdist")["FASTDIST_CONFIG"]: file, "/var/lib/fastdist": volume}
        container = Container(builder, "fastdist", None, volumes, PORT=str(free_port()), **environment)
        started.append(container)
        container.port = int(container.variables["PORT"])
        return container

    yield run
    for container in started:
        container.kill_all()


# ------------------------------------------------------------------------------------------------------------ the build


def test_build_makes_one_wheel_of_context(builder):
    image = builder.build("build")
    (wheel,) = (image.layer / BUILD[1:] / "dist").iterdir()
    assert re.fullmatch(r"fastdist-[\d.]+-cp\d+-cp\d+-linux_\w+\.whl", wheel.name)
    copied = {path.name for path in (image.layer / BUILD[1:]).iterdir()}
    assert {"pyproject.toml", "src"} <= copied
    assert not {"tests", "bench", ".git", "mock_analyzers"} & copied


@pytest.mark.parametrize("name", ["fastdist", "mock-analyzers"])
def test_final_image_has_no_sources_or_tools(builder, name):
    layer = builder.build(name).layer
    packages = {path.name for path in layer.glob("opt/fastdist/lib/python*/site-packages/*")}
    assert {"fastdist", "uvloop", "orjson", "nats", "nkeys"} <= packages
    assert not {"pip", "setuptools", "Cython", "cython.py", "wheel", "pytest"} & packages
    assert not (layer / BUILD[1:]).exists()
    assert not [
        path for path in layer.glob("opt/fastdist/lib/**/fastdist/**/*") if path.suffix in {".pyx", ".pxd", ".c"}
    ]
    assert not list(layer.glob("opt/fastdist/bin/pip*"))
    assert not list(layer.glob("root/.cache/pip/*"))


def test_mock_analyzers_have_their_own_image(builder):
    assert not (builder.build("fastdist").layer / "opt/fastdist/mock").exists()
    assert (builder.build("mock-analyzers").layer / "opt/fastdist/mock/mock_analyzers/cli.py").exists()


def test_only_the_queue_belongs_to_the_user(builder):
    layer = builder.build("fastdist").layer
    user = int(dockerfile.setting("fastdist", "USER").text.split(":")[0])
    mine = {path.relative_to(layer).as_posix() for path in layer.rglob("*") if path.lstat().st_uid == user}
    assert mine == {"var/lib/fastdist"}
    assert (layer / "var/lib/fastdist").stat().st_mode & 0o777 == 0o700


# --------------------------------------------------------------------------------------------------- the distributor


def test_container_takes_delivers_and_stops(run, volume):
    container = run()
    container.line_with("fastdist is ready")
    wait_until(lambda: container.health().returncode == 0, "healthy")
    emitter = Emitter(container.port).send(100)
    assert emitter.count(202) == 100
    wait_until(lambda: get_json(container.port, "/stats")["packets"]["delivered"] == 100, "all delivered")
    container.signal(getattr(signal, dockerfile.setting("fastdist", "STOPSIGNAL").text))
    assert container.wait() == 0
    assert {path.name for path in volume.glob("*.fdq")} == {"ring-0.fdq", "ring-1.fdq"}


def test_it_has_the_dashboards_files(run):
    container = run()
    container.line_with("fastdist is ready")
    status, headers, page = request(container.port, "GET", "/")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/html")
    for name in re.findall(rb'(?:src|href)="(/?[\w./-]+\.(?:js|css|svg))"', page):
        assert request(container.port, "GET", f"/{name.decode().lstrip('/')}")[0] == 200, name


def test_queued_packets_in_next_container(run):
    unreachable = CONFIG.format(free_port()).replace("20s", "100ms")
    first = run(unreachable)
    first.line_with("fastdist is ready")
    assert Emitter(first.port).send(50).count(202) == 50
    first.kill_all()
    second = run()
    second.line_with("fastdist is ready")
    wait_until(lambda: get_json(second.port, "/stats")["packets"]["delivered"] == 50, "all delivered")


def test_health_check_follows_the_config(run):
    container = run(FASTDIST_SERVER__HOST="127.0.0.1")
    container.line_with("fastdist is ready")
    done = container.health()
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "ok")


def test_health_check_speaks_tls_if_set(run, volume):
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=elsewhere -keyout key.pem -out cert.pem"
    subprocess.run(["openssl", *shlex.split(words)], cwd=volume, check=True, capture_output=True)
    for name in ("key.pem", "cert.pem"):
        os.chown(volume / name, *map(int, dockerfile.setting("fastdist", "USER").text.split(":")))
    at = "/var/lib/fastdist"
    container = run(FASTDIST_SECURITY__TLS_CERT=f"{at}/cert.pem", FASTDIST_SECURITY__TLS_KEY=f"{at}/key.pem")
    container.line_with("fastdist is ready")
    assert container.health().returncode == 0


def test_health_check_fails_without_response(run):
    container = run()
    container.line_with("fastdist is ready")
    container.signal(signal.SIGSTOP)
    for pid in [row["pid"] for row in get_json(container.port, "/stats")["workers"]]:
        os.kill(pid, signal.SIGKILL)  # and nothing replaces them
    done = container.health()
    assert done.returncode == 1
    assert "no answer" in done.stderr


def test_health_check_explains_a_bad_config(run):
    container = run()
    container.line_with("fastdist is ready")
    container.variables["PORT"] = "none"
    done = container.health()
    assert (done.returncode, done.stdout) == (1, "")
    assert "server.port" in done.stderr


def test_invalid_config_ends_with_problems(run):
    container = run("[server]\nworkers = -1\n")
    assert container.wait() == 2
    assert "server.workers: must be >= 0" in container.output


def test_missing_config_means_the_defaults(builder, volume):
    container = Container(builder, "fastdist", ["check", "/etc/fastdist/fastdist.toml"], {"/var/lib/fastdist": volume})
    assert container.wait() == 0
    assert "4 analyzers" in container.output


def test_commands_are_available_inside(run):
    container = run()
    container.line_with("fastdist is ready")
    done = container.run("fastdist", "dead-letters", "list", "/var/lib/fastdist")
    assert done.returncode == 0, done.stderr
    assert container.run("sleep", "0").returncode == 0  # Kubernetes' preStop


def test_non_root_writes_only_to_its_volume(run, volume):
    container = run()
    container.line_with("fastdist is ready")
    user = dockerfile.setting("fastdist", "USER").text
    assert container.run("sh", "-c", "echo $(id -u):$(id -g)").stdout.strip() == user
    assert container.run("touch", "/opt/fastdist/x").returncode == 1
    assert container.run("touch", "/tmp/x").returncode == 1
    assert container.run("touch", "/var/lib/fastdist/x").returncode == 0
    assert (volume / "x").exists()


# -------------------------------------------------------------------------------------------------- the mock analyzers


def test_mock_analyzer_takes_and_stops(builder):
    port, control = free_port(), free_port()
    container = Container(
        builder, "mock-analyzers", ["--ids", "A7", "--ports", str(port), "--control-port", str(control)]
    )
    with running(container):
        container.line_with("control listens")
        assert request(port, "POST", "/analyze", b"{}", {"X-Packet-Id": "one"})[0] == 200
        assert get_json(control, "/control/A7")["totals"]["acknowledged"] == 1
        container.signal(signal.SIGTERM)
        assert container.wait() == 0


def test_mock_health_check_uses_its_port(builder):
    entry = dockerfile.setting("mock-analyzers", "ENTRYPOINT").words
    port = entry[entry.index("--ports") + 1]
    check = dockerfile.setting("mock-analyzers", "HEALTHCHECK").text
    assert f"http://127.0.0.1:{port}/health" in check
    assert dockerfile.setting("mock-analyzers", "EXPOSE").text.split() == [
        port,
        entry[entry.index("--control-port") + 1],
    ]
    container = Container(builder, "mock-analyzers", ["--help"])
    assert container.wait() == 0
    free = free_port()
    container = Container(builder, "mock-analyzers", ["--ids", "A8", "--ports", str(free), "--control-port", "0"])
    with running(container):
        container.line_with("control listens")
        words = json.loads(check.removeprefix("CMD ").replace(port, str(free)))
        assert container.run(*words).returncode == 0
        container.signal(signal.SIGTERM)
        container.wait()
        assert container.run(*words).returncode == 1
