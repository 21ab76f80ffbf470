"""The RayCluster fits KubeRay's schema, its pods fit Kubernetes', and values in several files are equal."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from app.serving.metrics import TARGETS
from tests.docker.conftest import ROOT
from tests.docker.test_kubernetes import KUBERNETES, Manifest, check, documents

RAY = KUBERNETES / "ray"
SCHEMA = yaml.safe_load((Path(__file__).parent / "raycluster.schema.yaml").read_text())
NODE = "neuronlens.example/ray"


@pytest.fixture
def cluster() -> Manifest:
    (found,) = documents((RAY / "raycluster.yaml").read_text())
    return found


def groups(cluster: Manifest) -> dict[str, Manifest]:
    spec = cluster["spec"]
    return {"head": spec["headGroupSpec"], "worker": spec["workerGroupSpecs"][0]}


def container(group: Manifest) -> Manifest:
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


def argument(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def ingress() -> Manifest:
    return _patched(RAY / "ingress.yaml", "ingress")


def fit() -> Manifest:
    return _patched(KUBERNETES / "ray-fit" / "fit.yaml", "fit")


def _patched(file: Path, label: str) -> Manifest:
    (workload,) = documents(file.read_text())
    assert workload["spec"]["template"]["metadata"]["labels"] == {NODE: label}
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(only)


def test_cluster_fits_the_schema(cluster: Manifest) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(cluster, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["authOptions", "mode"], "password"),
        (["headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["workerGroupSpecs", 0, "maxreplicas"], 8),
        (["autoscalerOptions", "version"], "v3"),
        (["rayVersion"], 2.6),
    ],
)
def test_cluster_that_violates_the_schema_is_noticed(cluster: Manifest, path: list[str | int], value: Any) -> None:
    wrong = copy.deepcopy(cluster)
    place: Any = wrong["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize("name", ["head", "worker"])
def test_pods_fit_the_schema_and_are_locked_down(cluster: Manifest, name: str) -> None:
    template = groups(cluster)[name]["template"]
    metadata = {"name": name, "labels": template["metadata"]["labels"]}
    # KubeRay adds the autoscaler's container to the head, with these options
    options = cluster["spec"]["autoscalerOptions"]
    autoscaler = {key: options[key] for key in ("resources", "securityContext", "volumeMounts")}
    containers = [container(groups(cluster)[name])]
    containers += [{"name": "autoscaler", "image": "neuronlens", **autoscaler}] if name == "head" else []
    pod = {**template["spec"], "containers": containers}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod.get("automountServiceAccountToken", True) is (name == "head"), "only the autoscaler needs the API"
    volumes = {volume["name"] for volume in pod["volumes"]}
    for each in containers:
        assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["resources"].keys() == {"requests", "limits"}
        mounted = {mount["mountPath"]: mount["name"] for mount in each["volumeMounts"]}
        assert "/tmp" in mounted
        assert set(mounted.values()) <= volumes
    # KubeRay's default probes call wget, which the image does not have
    assert {"readinessProbe", "livenessProbe"} <= containers[0].keys()
    assert pod["terminationGracePeriodSeconds"] >= 30 + 15, "a node drains for up to 30 s"


def test_cluster_needs_a_token_and_clients_have_it(cluster: Manifest) -> None:
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for each in (ingress(), fit()):
        (token,) = [variable for variable in each["env"] if variable["name"] == "RAY_AUTH_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": cluster["metadata"]["name"], "key": "auth_token"}


def test_values_in_several_files_are_equal(cluster: Manifest) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["spec"]["rayVersion"] == pinned[1]
    head = f"{cluster['metadata']['name']}-head-svc:6379"
    for each in (ingress(), fit()):
        assert each["command"] == ["ray-node", "join", head, "neuronlens"]
        assert argument(each["args"], "--ray") == head
    worker = groups(cluster)["worker"]
    cpus = worker["rayStartParams"]["num-cpus"]
    assert cpus == container(worker)["resources"]["limits"]["cpu"]
    assert cpus == argument(ingress()["args"], "--threads") == argument(fit()["args"], "--threads")
    assert int(argument(ingress()["args"], "--max-replicas")) == worker["maxReplicas"]
    assert groups(cluster)["head"]["rayStartParams"]["num-cpus"] == "0", "the head must not run engines"
    for name, group in groups(cluster).items():
        assert group["template"]["metadata"]["labels"] == {NODE: name}
        shm = next(each for each in group["template"]["spec"]["volumes"] if each["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "512Mi"}
        assert int(group["rayStartParams"]["object-store-memory"]) < 512 << 20
    images = [
        yaml.safe_load((KUBERNETES / name / "kustomization.yaml").read_text())["images"] for name in ("base", "ray")
    ]
    assert images[0] == images[1]


def test_only_ray_nodes_reach_the_ports_of_ray() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in documents((RAY / "networkpolicy.yaml").read_text())}
    nodes = {"podSelector": {"matchExpressions": [{"key": NODE, "operator": "Exists"}]}}
    assert {"podSelector": policies["neuronlens-ray"]["podSelector"]} == nodes
    assert policies["neuronlens-ray"]["ingress"] == [{"from": [nodes]}]
    for name, spec in policies.items():
        assert name in ("neuronlens-ray", "neuronlens-ray-metrics") or "ingress" not in spec, name
    redis = next(
        each
        for each in documents((ROOT / "docker" / "redis" / "statefulset.yaml").read_text())
        if each["kind"] == "NetworkPolicy"
    )
    (_, workers) = redis["spec"]["ingress"][0]["from"]
    assert workers == {"podSelector": {"matchLabels": {NODE: "worker"}}}
    (reaching,) = policies["neuronlens-ray-store"]["podSelector"]["matchExpressions"]
    assert reaching["values"] == ["worker", "fit"], "Redis admits a fit by its name"


def test_monitoring_reaches_only_the_metrics_of_engines(cluster: Manifest) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in documents((RAY / "networkpolicy.yaml").read_text())}
    (setting,) = [each["value"] for each in ingress()["env"] if each["name"] == "NEURONLENS_REPLICA_METRICS_PORT"]
    (port,) = [each for each in container(groups(cluster)["worker"])["ports"] if each["name"] == "engine-metrics"]
    policy = policies["neuronlens-ray-metrics"]
    (rule,) = policy["ingress"]
    (ports,) = rule["ports"]
    assert policy["podSelector"] == {"matchLabels": {NODE: "worker"}}
    assert int(setting) == port["containerPort"] == ports["port"]
    assert ports["endPort"] < 8080, "Ray's own ports begin at 8080"
    (base,) = documents((KUBERNETES / "base" / "networkpolicy.yaml").read_text())
    assert rule["from"] in [each["from"] for each in base["spec"]["ingress"]], (
        "the same sources as for the service's metrics"
    )
    (scraped,) = documents((KUBERNETES / "monitoring" / "scrapeconfig.yaml").read_text())
    (service,) = documents((KUBERNETES / "base" / "service.yaml").read_text())
    (found,) = scraped["spec"]["httpSDConfigs"]
    at = {each["name"]: each["port"] for each in service["spec"]["ports"]}
    assert found["url"] == f"http://{service['metadata']['name']}.neuronlens.svc:{at['metrics']}{TARGETS}"
