"""The Kubernetes manifests, as committed and as rendered by kustomize, fit the schemas of several versions."""

import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from tests.docker.conftest import ROOT, check_settings, system_program
from workers.engine.metrics import EngineMetrics
from workers.engine.settings import EngineSettings

KUBERNETES = ROOT / "docker" / "kubernetes"
VERSIONS = ("1.30", "1.34", "1.37")
OVERLAYS = ("base", "cli", "fit", "gpu", "ray", "ray-fit", "trial")
CUSTOM = ("Kustomization", "RayCluster", "ScrapeConfig", "ServiceMonitor")
"""Kinds without a schema in Kubernetes itself (for RayCluster's see test_ray_cluster.py)."""
WORKLOADS = ("Deployment", "StatefulSet", "Job", "Pod")

Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each]


def committed() -> list[tuple[str, Manifest]]:
    found = []
    for file in sorted([*KUBERNETES.rglob("*.yaml"), *(ROOT / "docker" / "redis").glob("*.yaml")]):
        found += [(f"{file.name}:{each['kind']}", each) for each in documents(file.read_text()) if "kind" in each]
    return found


def patches() -> list[str]:
    """Files that hold a patch each, not a whole object."""
    kustomizations = [yaml.safe_load(file.read_text()) for file in KUBERNETES.rglob("kustomization.yaml")]
    return [patch["path"] for each in kustomizations for patch in each.get("patches", [])]


def check(manifest: Manifest) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """The rendered manifests of every overlay by name."""
    kubectl = system_program("kubectl")
    directory = tmp_path_factory.mktemp("manifests")
    for name in ("kubernetes", "redis"):
        shutil.copytree(ROOT / "docker" / name, directory / name)
    version = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True).stdout
    if "Kustomize Version" not in version:  # Debian's kubectl has kustomize 2, whose fields have older names
        for file in directory.rglob("kustomization.yaml"):
            file.write_text(_for_kustomize_2(file.read_text()))
    made = {}
    for name in (*OVERLAYS, "monitoring"):
        run = subprocess.run(
            [kubectl, "kustomize", str(directory / "kubernetes" / name)], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        made[name] = documents(run.stdout)
    return made


def _for_kustomize_2(text: str) -> str:
    document = yaml.safe_load(text)
    folders = [each for each in document["resources"] if not each.endswith(".yaml")]
    document["bases"], document["resources"] = folders, [each for each in document["resources"] if each not in folders]
    document["patchesStrategicMerge"] = [each["path"] for each in document.pop("patches", [])]
    return yaml.safe_dump({key: value for key, value in document.items() if value})


def has_schema(name: str, manifest: Manifest) -> bool:
    return manifest["kind"] not in CUSTOM and name.split(":")[0] not in patches()


@pytest.mark.parametrize(("name", "manifest"), [each for each in committed() if has_schema(*each)])
def test_manifest_fits_its_schema(name: str, manifest: Manifest) -> None:
    check(manifest)


def test_manifest_that_violates_the_schema_is_noticed() -> None:
    (deployment,) = documents((KUBERNETES / "base" / "deployment.yaml").read_text())
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(deployment)


@pytest.mark.system
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_manifests_fit_their_schema(rendered: dict[str, list[Manifest]], overlay: str) -> None:
    assert (
        len(rendered[overlay])
        == {"base": 7, "cli": 1, "fit": 1, "gpu": 7, "ray": 12, "ray-fit": 1, "trial": 11}[overlay]
    )
    for manifest in rendered[overlay]:
        if manifest["kind"] not in CUSTOM:
            check(manifest)
        assert manifest["metadata"]["namespace"] == "neuronlens"


@pytest.mark.system
def test_rendered_manifests_fit_together(rendered: dict[str, list[Manifest]]) -> None:
    """Selectors match the pods, and every name that is referred to exists."""
    trial = {(each["kind"], each["metadata"]["name"]): each for each in rendered["trial"]}
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in rendered["trial"]
        if each["kind"] in ("Deployment", "StatefulSet")
    }
    for (kind, name), manifest in trial.items():
        chosen = {"Service": ["selector"], "PodDisruptionBudget": ["selector", "matchLabels"]}.get(kind)
        chosen = ["podSelector", "matchLabels"] if kind == "NetworkPolicy" else chosen
        if chosen:
            selector = manifest["spec"]
            for step in chosen:
                selector = selector[step]
            assert selector.items() <= pods[name].items(), (kind, name)
    ports = {each["name"]: each["containerPort"] for each in _container(trial["Deployment", "neuronlens"])["ports"]}
    assert {each["targetPort"] for each in trial["Service", "neuronlens"]["spec"]["ports"]} == set(ports)
    assert ports["metrics"] == int(trial["ConfigMap", "neuronlens"]["data"]["NEURONLENS_METRICS_PORT"])
    scaled = trial["HorizontalPodAutoscaler", "neuronlens"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) in trial
    (settings,) = [name for kind, name in trial if kind == "ConfigMap" and name != "neuronlens"]
    redis = trial["StatefulSet", "neuronlens-redis"]["spec"]["template"]["spec"]
    assert settings in [each["configMap"]["name"] for each in redis["volumes"] if "configMap" in each]
    url = trial["ConfigMap", "neuronlens"]["data"]["NEURONLENS_REDIS_URL"]
    assert re.fullmatch(r"redis://(.+):6379/0", url)[1] == "neuronlens-redis"  # type: ignore[index]
    (rule,) = trial["NetworkPolicy", "neuronlens-redis"]["spec"]["ingress"]
    (allowed,) = rule["from"][0]["podSelector"]["matchExpressions"]  # for the second see test_ray_cluster.py
    clients = [each for each in (*rendered["trial"], *rendered["fit"], *rendered["cli"]) if each["kind"] in WORKLOADS]
    using = {each["metadata"]["name"] for each in clients} - {"neuronlens-redis"}
    assert using == set(allowed["values"])
    (gpu,) = [each for each in rendered["gpu"] if each["kind"] == "Deployment"]
    assert _container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "NEURONLENS_DEVICE", "value": "cuda"} in _container(gpu)["env"]
    assert {each["name"] for each in _container(gpu)["env"]} > {"NEURONLENS_REDIS_PASSWORD"}


@pytest.mark.system
def test_ray_overlay_extends_the_base(rendered: dict[str, list[Manifest]]) -> None:
    ray, base = (
        {(each["kind"], each["metadata"]["name"]): each for each in rendered[name]} for name in ("ray", "base")
    )
    assert base.keys() - ray.keys() == {("HorizontalPodAutoscaler", "neuronlens")}, "Ray scales the engines"
    cluster = ray["RayCluster", "neuronlens-ray"]["spec"]
    nodes = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {each["template"]["spec"]["containers"][0]["image"] for each in nodes}
    assert images == {_container(ray["Deployment", "neuronlens"])["image"]}, "all nodes need the same versions"
    assert "/" in images.pop(), "the image is in a registry"
    pod = _pod(ray["Deployment", "neuronlens"])
    assert {each["mountPath"] for each in _container(ray["Deployment", "neuronlens"])["volumeMounts"]} >= {
        "/dev/shm",
        "/files",
        "/tmp",
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    names = {each["name"] for each in _container(ray["Deployment", "neuronlens"])["env"]}
    own = {"RAY_AUTH_TOKEN", "NEURONLENS_REPLICA_METRICS_PORT"}
    assert names == {"NEURONLENS_REDIS_USERNAME", "NEURONLENS_REDIS_PASSWORD", "NEURONLENS_THREADS", *own}
    (fit,) = rendered["ray-fit"]
    assert "RAY_AUTH_TOKEN" in {each["name"] for each in _container(fit)["env"]}
    labels = fit["spec"]["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "neuronlens-fit", "neuronlens.example/ray": "fit"}
    budget = ray["PodDisruptionBudget", "neuronlens-ray-worker"]["spec"]["selector"]["matchLabels"]
    assert budget.items() <= cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"].items()


def test_pods_are_locked_down_and_have_time_to_drain() -> None:
    for name, manifest in committed():
        if manifest["kind"] not in WORKLOADS or name.split(":")[0] in patches():
            continue
        pod = _pod(manifest)
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, "a Service's name would become NEURONLENS_PORT"
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        for container in pod["containers"]:
            locked = container["securityContext"]
            assert locked["readOnlyRootFilesystem"] is True, name
            assert locked["capabilities"] == {"drop": ["ALL"]}, name
            assert locked["allowPrivilegeEscalation"] is False, name
            assert container["resources"].keys() >= {"requests", "limits"}, name
    (deployment,) = documents((KUBERNETES / "base" / "deployment.yaml").read_text())
    (settings,) = documents((KUBERNETES / "base" / "configmap.yaml").read_text())
    probes = _container(deployment)
    before_stop = probes["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = before_stop + int(settings["data"]["NEURONLENS_DRAIN_SECONDS"])
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= needed + 5
    assert probes["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert {probes[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")} == {"/livez"}


def test_settings_exist_and_no_secret_is_committed() -> None:
    for _, manifest in committed():
        assert manifest["kind"] != "Secret"
        if manifest["kind"] == "ConfigMap":
            check_settings(list(manifest["data"]))
        if manifest["kind"] in WORKLOADS:
            for each in _container(manifest)["env"]:
                check_settings([each["name"]])
                assert "value" not in each or "PASSWORD" not in each["name"]


def test_autoscaler_and_adapter_use_a_metric_of_the_server() -> None:
    (scaler,) = documents((KUBERNETES / "base" / "horizontalpodautoscaler.yaml").read_text())
    (adapter,) = documents((KUBERNETES / "monitoring" / "prometheus-adapter.yaml").read_text())
    (metric,) = [each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"]]
    assert adapter["rules"]["custom"][0]["seriesQuery"].startswith(metric + "{")
    registry = CollectorRegistry()
    EngineMetrics(registry, EngineSettings())
    assert metric in {family.name for family in registry.collect()}


def _container(manifest: Manifest) -> Manifest:
    (container,) = _pod(manifest)["containers"]
    return dict(container)


def _pod(manifest: Manifest) -> Manifest:
    return dict(manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"])


def test_images_are_pinned() -> None:
    for name, manifest in committed():
        for image in manifest.get("images", []) if manifest["kind"] == "Kustomization" else []:
            assert image["newTag"] not in ("", "latest"), name
        if manifest["kind"] == "StatefulSet":
            assert "@sha256:" in _container(manifest)["image"], name


def test_every_overlay_is_tested() -> None:
    assert {each.parent.name for each in KUBERNETES.rglob("kustomization.yaml")} == {*OVERLAYS, "monitoring"}
