"""What holds for each compose file: the shape that its specification asks for, pinned images, closed services."""

from __future__ import annotations

import re

import jsonschema
import pytest
import test_compose
import test_compose_cluster
from dockerfile import ROOT, stages
from test_compose import schema

DEPLOY = ROOT / "deploy"
FILES = {"plain": test_compose, "cluster": test_compose_cluster}
ALL = [(each, name) for each, file in FILES.items() for name in file.SERVICES]

each_file = pytest.mark.parametrize("file", FILES.values(), ids=FILES)


@pytest.fixture
def service(request):
    file, name = request.param
    return FILES[file].SERVICES[name]


each_service = pytest.mark.parametrize("service", ALL, ids=" ".join, indirect=True)


@each_file
def test_file_follows_compose_specification(file):
    validator = jsonschema.validators.validator_for(schema())(schema())
    assert [error.message for error in validator.iter_errors(file.COMPOSE)] == []
    wrong = file.COMPOSE | {"services": file.SERVICES | {"a5": {"imagee": "x"}}}
    assert list(validator.iter_errors(wrong))


@each_service
def test_images_are_built_here_or_pinned(service):
    if "build" in service:
        assert service["build"]["target"] in stages()
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    else:
        alpine = "-alpine" if service["image"].startswith(("nats:", "haproxy:")) else ""
        assert re.fullmatch(rf"[\w/-]+:v?\d+\.\d+\.\d+{alpine}", service["image"])


@each_service
def test_service_may_do_only_its_work(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert "network_mode" not in service
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@each_service
def test_ports_are_for_this_machine_only(service):
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@each_file
def test_no_two_services_want_the_same_port(file):
    ports = [port.split(":")[1] for service in file.SERVICES.values() for port in service.get("ports", [])]
    assert len(set(ports)) == len(ports)


@each_file
def test_mounts_exist_and_ours_are_read_only(file):
    for service in file.SERVICES.values():
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert mode == ["ro"]
            else:
                assert source in file.COMPOSE["volumes"]
