"""The manifests: valid for the versions in use, restricted, and in agreement with the image and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from dockerfile import ROOT, environment, setting

from fastdist.config import load
from fastdist.supervisor.processes import LATE, START
from fastdist.units import parse_size

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.29", "1.31", "1.33", "1.35")
CONFIG = FOLDER / "base" / "fastdist.toml"
KUSTOMIZATIONS = {name: yaml.safe_load((FOLDER / name / "kustomization.yaml").read_text()) for name in ("base", "demo")}
MANIFESTS = {
    f"{name}/{file}": list(yaml.safe_load_all((FOLDER / name / file).read_text()))
    for name, kustomization in KUSTOMIZATIONS.items()
    for file in kustomization["resources"]
    if file.endswith(".yaml")
}
OBJECTS = [each for objects in MANIFESTS.values() for each in objects]


def identity(manifest):
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def find(kind, name="fastdist"):
    return next(each for each in OBJECTS if identity(each) == f"{kind}/{name}")


STATEFUL = find("StatefulSet")
POD = STATEFUL["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
DEPLOYMENTS = [each for each in OBJECTS if each["kind"] == "Deployment"]
PODS = {identity(each): each["spec"]["template"]["spec"] for each in [STATEFUL, *DEPLOYMENTS]}


def settings():
    return load(CONFIG, {}, {}).config


def binary(text):
    """Return a Kubernetes quantity of bytes."""
    return parse_size(f"{text}B")


# ---------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OBJECTS, ids=identity)
def test_a_manifest_is_valid(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_manifest_that_is_wrong_is_found():
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(STATEFUL | {"spec": STATEFUL["spec"] | {"replica": 2}}, VERSIONS[-1], strict=True)


def test_every_file_is_in_a_kustomization():
    named = {f"{name}/{file}" for name, it in KUSTOMIZATIONS.items() for file in it["resources"]}
    there = {
        path.relative_to(FOLDER).as_posix() for name in ("base", "demo") for path in (FOLDER / name).rglob("*.yaml")
    }
    assert there - {"base/kustomization.yaml", "demo/kustomization.yaml"} == named - {"demo/../base"}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kustomize_builds_it(name):
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(FOLDER / name)]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build", str(FOLDER / name)]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    sources = [each for file, objects in MANIFESTS.items() if file.startswith(("base", name)) for each in objects]
    assert {identity(each) for each in sources} == {identity(each) for each in built if each["kind"] != "ConfigMap"}
    for each in built:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "fastdist"
    (config,) = [each for each in built if each["kind"] == "ConfigMap"]
    assert config["data"]["fastdist.toml"] == CONFIG.read_text()
    (stateful,) = [each for each in built if each["kind"] == "StatefulSet"]
    (volume,) = stateful["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    images = re.findall(r"image: (\S+)", done.stdout)
    assert images
    assert all(re.fullmatch(r"fastdist(-mock-analyzers)?:\d+\.\d+\.\d+", image) for image in images)


# ------------------------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pod_keeps_to_restricted_standard(pod):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for volume in pod.get("volumes", []):
        assert "hostPath" not in volume
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_namespace_enforces_the_standard():
    assert find("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_a_pod_runs_as_the_images_user(pod):
    user, group = map(int, setting("fastdist", "USER").text.split(":"))
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (user, group)
    assert context.get("fsGroup", group) == group


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_services_set_no_variables(pod):
    """A Service called fastdist would set FASTDIST_PORT and others, of which some could be taken for settings."""
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_a_pod_says_what_it_needs(pod):
    for container in pod["containers"]:
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert container["imagePullPolicy"] == "IfNotPresent"


# -------------------------------------------------------------------------------------------------------- configuration


def test_the_configuration_passes_the_check():
    command = [sys.executable, "-m", "fastdist", "check", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (generator,) = KUSTOMIZATIONS["base"]["configMapGenerator"]
    assert generator["files"] == [CONFIG.name]


def test_config_is_mounted_where_it_is_read():
    (mount,) = [each for each in CONTAINER["volumeMounts"] if each["name"] == "config"]
    assert f"{mount['mountPath']}/{CONFIG.name}" == environment("fastdist")["FASTDIST_CONFIG"]


def test_the_queue_is_on_the_volume():
    (mount,) = [each for each in CONTAINER["volumeMounts"] if each["name"] == "queue"]
    path = mount["mountPath"]
    assert path == settings().queue.path == environment("fastdist")["FASTDIST_QUEUE__PATH"]
    (claim,) = STATEFUL["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "queue"
    assert binary(claim["spec"]["resources"]["requests"]["storage"]) >= 4 * settings().queue.capacity
    kept = STATEFUL["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert kept == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_workers_match_requested_processors():
    assert settings().server.workers == int(CONTAINER["resources"]["requests"]["cpu"])


def test_configured_analyzers_are_the_demos():
    expected = {}
    for analyzer in settings().analyzers:
        name, port = re.fullmatch(r"http://([\w-]+):(\d+)/analyze", analyzer.endpoint).groups()
        service = find("Service", name)
        assert service["spec"]["ports"][0]["port"] == int(port)
        expected[analyzer.id] = service["spec"]["selector"]
    for analyzer, labels in expected.items():
        (deployment,) = [each for each in DEPLOYMENTS if each["metadata"]["labels"] == labels]
        assert deployment["spec"]["template"]["spec"]["containers"][0]["args"] == ["--ids", analyzer]


# ------------------------------------------------------------------------------------------------------ life and probes


def test_drain_ends_before_the_kill():
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert CONTAINER["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"
    assert POD["terminationGracePeriodSeconds"] >= pause + settings().server.drain_timeout + LATE


def test_probes_ask_for_what_they_are_for():
    paths = {kind: CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert {CONTAINER[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} <= ports.keys()
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3 * START


def test_pre_stop_outlasts_readiness_probe():
    probe = CONTAINER["readinessProbe"]
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]


def test_ports_are_those_of_the_image():
    port = int(setting("fastdist", "EXPOSE").text)
    assert [each["containerPort"] for each in CONTAINER["ports"]] == [port] == [settings().server.port]
    for name in ("fastdist", "fastdist-pods"):
        assert find("Service", name)["spec"]["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
    assert STATEFUL["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    mock_ports = list(map(int, setting("mock-analyzers", "EXPOSE").text.split()))
    for each in DEPLOYMENTS:
        (container,) = each["spec"]["template"]["spec"]["containers"]
        assert [port["containerPort"] for port in container["ports"]] == mock_ports


def test_selectors_select_the_pods_they_mean():
    labels = STATEFUL["spec"]["template"]["metadata"]["labels"]
    assert STATEFUL["spec"]["selector"]["matchLabels"] == labels
    assert find("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert find("Service")["spec"]["selector"] == labels
    headless = find("Service", STATEFUL["spec"]["serviceName"])
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["selector"] == labels
    (spread,) = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels


def test_only_the_autoscaler_sets_replicas():
    spec = find("HorizontalPodAutoscaler")["spec"]
    target = spec["scaleTargetRef"]
    assert f"{target['kind']}/{target['name']}" == identity(STATEFUL)
    assert target["apiVersion"] == STATEFUL["apiVersion"]
    assert "replicas" not in STATEFUL["spec"]
    assert spec["minReplicas"] >= 2  # a disruption budget of one, and still one there
    down = spec["behavior"]["scaleDown"]
    assert sum(policy["value"] for policy in down["policies"]) == 1
