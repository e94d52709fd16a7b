"""The compose file: of the shape that its specification asks for, pinned, closed, and in agreement with the images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources

import check_jsonschema
import jsonschema
import pytest
import yaml
from dockerfile import ROOT, setting, stages

from fastdist.config import load
from fastdist.supervisor.processes import LATE

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
CONFIG = DEPLOY / "compose" / "fastdist.toml"
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}
MOCKS = {name: service for name, service in BUILT.items() if service["build"]["target"] == "mock-analyzers"}


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text)[1])


def schema():
    schemas = resources.files(check_jsonschema) / "builtin_schemas" / "vendor"
    return json.loads((schemas / "compose-spec.json").read_text())


def test_file_follows_compose_specification():
    validator = jsonschema.validators.validator_for(schema())(schema())
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    wrong = COMPOSE | {"services": SERVICES | {"a5": {"imagee": "x"}}}
    assert list(validator.iter_errors(wrong))


def test_all_services_of_the_demo_exist():
    assert set(SERVICES) == {"fastdist", "a1", "a2", "a3", "a4", "prometheus", "grafana"}
    assert set(MOCKS) == {"a1", "a2", "a3", "a4"}


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_images_are_built_here_or_pinned(service):
    if "build" in service:
        assert service["build"]["target"] in stages()
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    else:
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"])


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_service_may_do_only_its_work(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert "network_mode" not in service
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_ports_are_for_this_machine_only(service):
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_no_two_services_want_the_same_port():
    ports = [port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(set(ports)) == len(ports)


def test_mounts_exist_and_ours_are_read_only():
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert mode == ["ro"]
            else:
                assert source in COMPOSE["volumes"]


def test_the_configuration_passes_the_check():
    command = [sys.executable, "-m", "fastdist", "check", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configured_analyzers_are_services():
    analyzers = load(CONFIG, {}, {}).config.analyzers
    (port, _) = setting("mock-analyzers", "EXPOSE").text.split()
    assert {it.id: it.endpoint for it in analyzers} == {
        service["command"][1]: f"http://{name}:{port}/analyze" for name, service in MOCKS.items()
    }


def test_there_is_time_to_drain():
    drain = load(CONFIG, {}, {}).config.server.drain_timeout
    assert seconds(SERVICES["fastdist"]["stop_grace_period"]) >= drain + LATE


def test_there_are_as_many_workers_as_cores():
    service = SERVICES["fastdist"]
    assert int(service["environment"]["WORKER_COUNT"]) == service["cpus"]


def test_prometheus_scrapes_the_distributor():
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in SERVICES
    assert port == setting("fastdist", "EXPOSE").text
    command = " ".join(SERVICES["prometheus"]["command"])
    assert "./prometheus:/etc/prometheus:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in command
