"""The compose file: of the shape that its specification asks for, pinned, closed, and in agreement with the images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources

import check_jsonschema
import yaml
from dockerfile import ROOT, setting

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


def test_all_services_of_the_demo_exist():
    assert set(SERVICES) == {"fastdist", "a1", "a2", "a3", "a4", "prometheus", "grafana"}
    assert set(MOCKS) == {"a1", "a2", "a3", "a4"}


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
