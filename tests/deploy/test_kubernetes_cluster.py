"""The overlay of several replicas with NATS: valid, restricted, and in agreement with the base and with itself."""

from __future__ import annotations

import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from clusters import check, jetstream, loaded, nats_accepts, needs_nats_server
from dockerfile import ROOT, environment, setting
from test_kubernetes import CONTAINER as BASE_CONTAINER
from test_kubernetes import VERSIONS, binary, identity
from test_kubernetes import find as find_in_base

from fastdist.config import load
from fastdist.supervisor.processes import LATE

FOLDER = ROOT / "deploy" / "kubernetes" / "cluster"
CONFIG = FOLDER / "fastdist.toml"
NATS_CONF = (FOLDER / "nats.conf").read_text()
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
FILES = [name for name in KUSTOMIZATION["resources"] if name.endswith(".yaml")]
OBJECTS = [each for file in FILES for each in yaml.safe_load_all((FOLDER / file).read_text())]
PATCHES = [yaml.safe_load(each["patch"]) for each in KUSTOMIZATION["patches"]]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.cluster.yaml").read_text())


def find(kind, name, objects=OBJECTS):
    return next(each for each in objects if identity(each) == f"{kind}/{name}")


DEPLOYMENT = find("Deployment", "fastdist")
STATEFUL = find("StatefulSet", "nats")
PODS = {identity(each): each["spec"]["template"]["spec"] for each in (DEPLOYMENT, STATEFUL)}
POD, NATS_POD = PODS.values()
(CONTAINER,) = POD["containers"]
(NATS,) = NATS_POD["containers"]


def settings():
    return loaded(CONFIG)


def seconds(key):
    return int(re.search(rf"{key}: (\d+)s", NATS_CONF)[1])


def gigabytes(key):
    return int(re.search(rf"{key}: (\d+)GB", NATS_CONF)[1]) << 30


@pytest.fixture(scope="module")
def built():
    """Return all objects, as kustomize makes them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


# ---------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OBJECTS, ids=identity)
def test_a_manifest_is_valid(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_every_file_is_used():
    files = {name for each in KUSTOMIZATION["configMapGenerator"] for name in each["files"]}
    there = {path.name for path in FOLDER.iterdir()}
    assert there == {"kustomization.yaml", *FILES, *files}


def test_kustomize_builds_it(built):
    names = {identity(each).split("-config")[0] for each in built}
    of_base = {"Namespace/fastdist", "ServiceAccount/fastdist", "Service/fastdist", "PodDisruptionBudget/fastdist"}
    expected = of_base | {"HorizontalPodAutoscaler/fastdist", "ConfigMap/fastdist", "ConfigMap/nats"}
    assert names == expected | {identity(each) for each in OBJECTS}
    for each in built:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "fastdist"
    maps = {each["metadata"]["name"]: each["data"] for each in built if each["kind"] == "ConfigMap"}
    for kind, name, key, source in (
        ("Deployment", "fastdist", "fastdist.toml", CONFIG.read_text()),
        ("StatefulSet", "nats", "nats.conf", NATS_CONF),
    ):
        volumes = find(kind, name, built)["spec"]["template"]["spec"]["volumes"]
        (used,) = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
        assert maps[used][key] == source
    assert find("Deployment", "fastdist", built)["spec"]["template"]["spec"]["containers"][0]["image"] == (
        find_in_base("StatefulSet")["spec"]["template"]["spec"]["containers"][0]["image"] + ":0.1.0"
    )


def test_autoscaler_goes_both_ways(built):
    base, spec = (
        find_in_base("HorizontalPodAutoscaler")["spec"],
        find("HorizontalPodAutoscaler", "fastdist", built)["spec"],
    )
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "fastdist"}
    assert (spec["minReplicas"], spec["metrics"]) == (base["minReplicas"], base["metrics"])
    assert spec["behavior"]["scaleUp"] == base["behavior"]["scaleUp"]
    down, slow = spec["behavior"]["scaleDown"], base["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] < slow["stabilizationWindowSeconds"]
    assert down["policies"][0]["periodSeconds"] < slow["policies"][0]["periodSeconds"]
    assert "replicas" not in DEPLOYMENT["spec"]


# ------------------------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pod_keeps_to_restricted_standard(pod):
    user, group = map(int, setting("fastdist", "USER").text.split(":"))
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, user, group)
    assert context["fsGroup"] == group
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]


def test_password_is_in_the_secret_only():
    secret = find("Secret", "fastdist-nats")
    source = {"secretKeyRef": {"name": "fastdist-nats", "key": "password"}}
    variables = {each["name"]: each.get("valueFrom") for each in [*CONTAINER["env"], *NATS["env"]]}
    assert variables["FASTDIST_JETSTREAM__PASSWORD"] == variables["NATS_PASSWORD"] == source
    assert variables["NATS_ADMIN_PASSWORD"] == {"secretKeyRef": {"name": "fastdist-nats", "key": "admin-password"}}
    assert secret["stringData"].keys() == {"password", "admin-password"}
    for password in secret["stringData"].values():
        assert "change-me" in password
        for path in FOLDER.iterdir():
            assert path.name == "secret.yaml" or password not in path.read_text()
    assert "password: $NATS_PASSWORD\n" in NATS_CONF
    assert f"user: {jetstream(CONFIG).user}\n" in NATS_CONF


# ------------------------------------------------------------------------------------------------------------ replicas


def test_pods_are_those_of_the_base():
    """But for what the queue on a volume needs, and the password."""
    theirs = {"env", "volumeMounts"}
    assert {key: CONTAINER[key] for key in CONTAINER.keys() - theirs} == {
        key: BASE_CONTAINER[key] for key in BASE_CONTAINER.keys() - theirs
    }
    assert CONTAINER["volumeMounts"] == BASE_CONTAINER["volumeMounts"]
    base = find_in_base("StatefulSet")["spec"]["template"]
    assert DEPLOYMENT["spec"]["template"]["metadata"] == base["metadata"]
    assert POD["topologySpreadConstraints"] == base["spec"]["topologySpreadConstraints"]


def test_pods_have_no_volume_claims():
    kinds = {volume["name"]: set(volume) - {"name"} for volume in POD["volumes"]}
    assert kinds == {"config": {"configMap"}, "queue": {"emptyDir"}}
    assert settings().queue.path == environment("fastdist")["FASTDIST_QUEUE__PATH"]


def test_the_configuration_passes_the_check():
    assert check(CONFIG) == ""
    base = load(FOLDER.parent / "base" / "fastdist.toml", {}, {}).config
    assert (settings().analyzers, settings().delivery) == (base.analyzers, base.delivery)
    assert settings().server.workers == int(CONTAINER["resources"]["requests"]["cpu"])


def test_drain_ends_before_the_kill():
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= pause + settings().server.drain_timeout + LATE
    rolling = DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


# ---------------------------------------------------------------------------------------------------------------- NATS


@needs_nats_server
def test_nats_server_takes_its_configuration():
    assert "configuration file" in nats_accepts(FOLDER / "nats.conf")


def test_servers_are_where_others_look():
    name, count = STATEFUL["metadata"]["name"], STATEFUL["spec"]["replicas"]
    service = STATEFUL["spec"]["serviceName"]
    hosts = [f"{name}-{number}.{service}" for number in range(count)]
    assert list(jetstream(CONFIG).servers) == [f"nats://{host}:4222" for host in hosts]
    assert re.findall(r"nats://([\w.-]+):6222", NATS_CONF) == hosts
    ports = find("Service", service)["spec"]
    assert ports["clusterIP"] == "None"
    assert ports["publishNotReadyAddresses"] is True  # or they would not find each other to get ready
    assert {each["targetPort"]: each["port"] for each in ports["ports"]} == {
        each["name"]: each["containerPort"] for each in NATS["ports"]
    }
    assert jetstream(CONFIG).replicas == count == 3


def test_no_two_servers_share_a_node():
    (term,) = NATS_POD["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = STATEFUL["spec"]["template"]["metadata"]["labels"]
    assert term == {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}
    budget = find("PodDisruptionBudget", "nats")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    assert STATEFUL["spec"]["selector"]["matchLabels"] == labels
    assert STATEFUL["spec"]["podManagementPolicy"] == "Parallel"  # alone, none gets ready


def test_what_is_stored_fits_the_volume():
    (claim,) = STATEFUL["spec"]["volumeClaimTemplates"]
    volume = binary(claim["spec"]["resources"]["requests"]["storage"])
    assert volume > gigabytes("max_file_store") > 2 * jetstream(CONFIG).max_bytes
    (mount,) = [each for each in NATS["volumeMounts"] if each["name"] == claim["metadata"]["name"]]
    assert f"store_dir: {mount['mountPath']}\n" in NATS_CONF
    kept = STATEFUL["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert kept == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert int(re.search(r"max_payload: (\d+)MB", NATS_CONF)[1]) << 20 > settings().server.max_body
    assert "  sync_interval: always\n" in NATS_CONF


def test_server_leaves_before_it_is_killed():
    signal = NATS["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert f"pid_file: {signal.removeprefix('ldm=')}\n" in NATS_CONF
    assert NATS_POD["terminationGracePeriodSeconds"] > seconds("lame_duck_grace_period") + seconds("lame_duck_duration")


def test_ready_server_has_caught_up():
    assert NATS["readinessProbe"]["httpGet"]["path"] == "/healthz"
    assert NATS["livenessProbe"]["httpGet"]["path"] == "/healthz?js-enabled-only=true"
    assert NATS["startupProbe"]["httpGet"]["path"] == "/healthz?js-server-only=true"


def test_server_has_the_version_of_compose():
    (image,) = [each for each in KUSTOMIZATION["images"] if each["name"] == "nats"]
    assert f"{image['newName']}:{image['newTag']}" == COMPOSE["services"]["nats-1"]["image"]
    compose = (ROOT / "deploy" / "compose" / "nats.conf").read_text()
    allowed = re.compile(r"permissions \{.*?\}", re.DOTALL)
    assert allowed.search(compose)[0] == allowed.search(NATS_CONF)[0]
