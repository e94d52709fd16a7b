"""What docs/operations.md shows is there, agrees with the files, and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import yaml
from dockerfile import ROOT, setting
from support import BODY, Process, free_port, request, running, wait_until

from fastdist import __version__

TEXT = (ROOT / "docs" / "operations.md").read_text()
README = (ROOT / "README.md").read_text()
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")


@pytest.mark.parametrize("text", [TEXT, README], ids=["operations", "readme"])
def test_the_files_that_are_named_exist(text):
    named = set(re.findall(r"\bdeploy/[\w./-]*\w/?", text))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_version_is_the_same_everywhere():
    """Where it cannot be read from the package: images have it as their tag."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    tags = {
        service["image"] for service in compose["services"].values() if service.get("image", "").startswith("fastdist")
    }
    for folder in ("base", "demo", "cluster"):
        kustomization = yaml.safe_load((ROOT / "deploy" / "kubernetes" / folder / "kustomization.yaml").read_text())
        named = [image for image in kustomization["images"] if image["name"] != "nats"]
        tags |= {f"{image['newName']}:{image['newTag']}" for image in named}
    for text in (TEXT, README, (ROOT / "Dockerfile").read_text()):
        tags |= set(re.findall(r"\bfastdist(?:-mock-analyzers)?:\d[\w.]*\w", text))
    assert tags == {f"fastdist:{__version__}", f"fastdist-mock-analyzers:{__version__}"}


def test_docker_run_has_what_the_image_needs():
    block = next(block for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) if "docker run" in block)
    (queue,) = setting("fastdist", "VOLUME").words
    assert f"--volume queue:{queue} " in block
    port = setting("fastdist", "EXPOSE").text
    assert f"--publish {port}:{port}" in block


def test_installation_matches_the_unit():
    block = next(block for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) if "systemctl enable" in block)
    unit = (ROOT / "deploy" / "systemd" / "fastdist.service").read_text()
    (program, file) = re.search(r"^ExecStart=(\S+)/bin/fastdist serve --config (\S+)$", unit, re.MULTILINE).groups()
    assert f"python3 -m venv {program}\n" in block
    assert f"fastdist.example.toml {file}\n" in block


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed; scripts/peers.sh installs it")
def test_shown_proxy_passes_only_packets(live, tmp_path):
    (shown,) = re.findall(r"```nginx\n(.*?)```", TEXT, re.DOTALL)
    port = free_port()
    shown = shown.replace("127.0.0.1:3000", f"127.0.0.1:{live.port}").replace("listen 8080", f"listen 127.0.0.1:{port}")
    configuration = tmp_path / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
    configuration.write_text(f"{head}http {{ access_log off;\n{temporary}{shown}}}\n")
    checked = subprocess.run([NGINX, "-t", "-c", str(configuration)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    proxy = Process([NGINX, "-c", str(configuration)])
    with running(proxy):

        def ready():
            try:
                return request(port, "GET", "/ready")[0] == 200
            except OSError:
                return False

        wait_until(ready, "the proxy answers")
        accepted = live.stats()["packets"]["accepted"]
        for _ in range(5):
            assert request(port, "POST", "/logs", BODY, {"Content-Type": "application/json"})[0] == 202
        assert live.stats()["packets"]["accepted"] == accepted + 5
        assert request(port, "POST", "/logs", b"[]", {"Content-Type": "application/json"})[0] == 400
        for method, path in (
            ("GET", "/stats"),
            ("GET", "/metrics"),
            ("POST", "/admin/reload"),
            ("PATCH", "/analyzers/A1"),
        ):
            assert request(port, method, path)[0] == 403
