"""The compose files fit their schema, name only things that exist, and agree with each other."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.serving.metrics import TARGETS
from tests.docker.conftest import DOCKER, PASSWORDS, ROOT, check_settings, system_program

MAIN = ROOT / "docker-compose.yml"
GPU = DOCKER / "docker-compose.gpu.yml"
EXAMPLE = ROOT / ".env.example"

VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>[A-Z_]+)(?:(?P<kind>:[?-])(?P<rest>[^}]*))?\}")
LINE = re.compile(r"^#?(?P<name>[A-Z_]+)=(?P<value>.*)$", re.MULTILINE)

FILLED_IN = {f"REDIS_{user.upper()}_PASSWORD": password for user, password in PASSWORDS.items()} | {
    "GRAFANA_ADMIN_PASSWORD": "7b" * 16,
    "NEURONLENS_MODEL": "/files/model",
}


def services() -> dict[str, Any]:
    return dict(yaml.safe_load(MAIN.read_text())["services"])


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.mark.parametrize("file", [MAIN, GPU], ids=lambda file: file.name)
def test_file_fits_the_compose_schema(file: Path) -> None:
    checked = _schema_check(file)
    assert checked.returncode == 0, checked.stdout


def test_file_that_violates_the_schema_is_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(MAIN.read_text().replace("cap_drop", "capdrop"))
    assert _schema_check(wrong).returncode == 1


def _schema_check(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


def test_env_example_lists_every_variable_with_its_default() -> None:
    used: dict[str, set[str | None]] = {}
    for found in VARIABLE.finditer(_without_comments(MAIN) + _without_comments(GPU)):
        used.setdefault(found["name"], set()).add(found["rest"] if found["kind"] == ":-" else None)
    example = EXAMPLE.read_text()
    listed = {found["name"]: found for found in LINE.finditer(example)}
    assert used.keys() == listed.keys()
    for name, defaults in used.items():
        assert len(defaults) == 1, f"{name} has two defaults"
        (default,) = defaults
        if default is None:
            assert not listed[name][0].startswith("#"), f"{name} must be set, so it must not be commented out"
        else:
            assert listed[name][0] == f"#{name}={default}"


def _without_comments(file: Path) -> str:
    return "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))


def test_required_variable_says_how_to_set_it() -> None:
    for found in VARIABLE.finditer(_without_comments(MAIN) + _without_comments(GPU)):
        assert found["kind"] in (":-", ":?"), found[0]
        assert found["kind"] == ":-" or found["rest"].startswith("set it in .env"), found[0]
    for name in FILLED_IN:
        assert f"\n{name}=\n" in EXAMPLE.read_text(), f"{name} must be empty, so that nobody forgets to set it"


def test_settings_exist() -> None:
    for file in (MAIN, GPU):
        for each in yaml.safe_load(file.read_text())["services"].values():
            check_settings(list(each.get("environment", {})))


def test_mounted_files_exist_and_are_read_only() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{name} mounts {source}"
                assert volume.endswith(":ro")


def test_foreign_images_are_pinned_and_own_ones_built() -> None:
    for name, service in services().items():
        ours = service["image"].startswith("${NEURONLENS_IMAGE:-neuronlens:")
        assert ours or re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", service["image"]), name
        assert ours == ("build" in service), name


def test_containers_have_few_privileges() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert "privileged" not in service
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


def test_ports_are_published_to_this_machine_only_and_redis_has_none() -> None:
    published = {name: each["ports"] for name, each in services().items() if "ports" in each}
    assert published.keys() == {"service", "ingress", "prometheus", "grafana"}
    for ports in published.values():
        for port in ports:
            assert port.startswith(("127.0.0.1:", "${PUBLISH_ADDRESS:-127.0.0.1}:")), port
    networks = yaml.safe_load(MAIN.read_text())["networks"]
    assert networks["store"]["internal"] is True
    assert services()["redis"]["networks"] == ["store"]
    reach_redis = {name for name, each in services().items() if "store" in each["networks"]} - {"redis"}
    assert reach_redis == {"service", "fit", "cli", "ingress", "ray-worker", "ray-fit"}


def test_only_operator_commands_have_the_operator_password() -> None:
    for name, service in services().items():
        environment = str(service.get("environment", {}))
        assert ("REDIS_OPERATOR_PASSWORD" in environment) == (name in ("fit", "ray-fit", "cli", "redis")), name
        assert ("GRAFANA_ADMIN_PASSWORD" in environment) == (name == "grafana")


def test_prometheus_scrapes_the_metrics_port_of_the_service() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    (name,) = found["names"]
    scraped = services()[name]
    assert name in services()["ingress"]["networks"]["watch"]["aliases"], "service and ingress have one name"
    assert str(found["port"]) == scraped["environment"]["NEURONLENS_METRICS_PORT"]
    assert not any(str(found["port"]) in port for port in scraped["ports"]), "metrics are not published"
    (engines,) = job["http_sd_configs"]
    assert engines["url"] == f"http://{name}:{found['port']}{TARGETS}"
    assert set(services()["ray-worker"]["networks"]) & set(services()["prometheus"]["networks"])
    assert set(scraped["networks"]) & set(services()["prometheus"]["networks"])
    sources = yaml.safe_load(next((DOCKER / "grafana").glob("provisioning/datasources/*.yml")).read_text())
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    folder = yaml.safe_load(next((DOCKER / "grafana").glob("provisioning/dashboards/*.yml")).read_text())
    path = folder["providers"][0]["options"]["path"]
    assert any(volume.endswith(f":{path}:ro") for volume in services()["grafana"]["volumes"])


def test_stop_grace_period_exceeds_the_drain_time() -> None:
    service = services()["service"]
    environment = service["environment"]
    assert seconds(service["stop_grace_period"]) >= int(environment["NEURONLENS_DRAIN_SECONDS"]) + 5


def test_service_waits_for_a_healthy_store_and_requires_keys() -> None:
    service = services()["service"]
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["environment"]["NEURONLENS_REQUIRE_KEYS"] == "true"
    assert service["environment"]["NEURONLENS_HOST"] == "0.0.0.0"
    assert "healthcheck" in services()["redis"]
    assert "healthcheck" not in service, "the image has one"


def test_cluster_is_a_profile_with_a_private_network() -> None:
    networks = yaml.safe_load(MAIN.read_text())["networks"]
    assert networks["ray"]["internal"] is True
    nodes = {name for name, each in services().items() if "ray" in each["networks"]}
    assert nodes == {"ray-head", "ray-worker", "ingress", "ray-fit", "prometheus"}
    nodes -= {"prometheus"}  # not a node: it scrapes the engines
    for name, each in services().items():
        in_profile = {"ray-fit": ["fit"], "fit": ["fit"], "cli": ["cli"]}.get(name, ["cluster"] * (name in nodes))
        assert each.get("profiles", []) == in_profile, name
    reached = {name for name in nodes if {"front", "watch"} & set(services()[name]["networks"])}
    assert reached == {"ingress"}, "a holder of the token can run code through any port of Ray"
    for name in nodes:
        node = services()[name]
        assert node["environment"]["RAY_AUTH_TOKEN"] == "${RAY_AUTH_TOKEN:-}"
        assert int(node["environment"]["RAY_OBJECT_STORE_BYTES"]) < 512 << 20
        assert node["shm_size"] == "512m"
        assert node["entrypoint"][0] == "ray-node"
        assert "ray-head:6379" in node["entrypoint"]
        assert seconds(node["stop_grace_period"]) >= 30 + 15, "a node drains for up to 30 s"
    assert "ports" not in services()["ray-head"] | services()["ray-worker"]


def test_cluster_nodes_have_the_checkpoints_and_cpus_for_an_engine() -> None:
    worker, ingress = services()["ray-worker"], services()["ingress"]
    assert [each for each in worker["volumes"] if "/files" in str(each)] == [
        each for each in ingress["volumes"] if "/files" in str(each)
    ]
    engine = ingress["environment"]["NEURONLENS_THREADS"]
    assert worker["environment"]["RAY_CPUS"] == worker["deploy"]["resources"]["limits"]["cpus"]
    assert int(engine.split(":-")[1][:-1]) <= int(worker["environment"]["RAY_CPUS"].split(":-")[1][:-1])
    environment_of_service = services()["service"]["environment"]
    assert environment_of_service | {"NEURONLENS_THREADS": engine} == {
        name: value for name, value in ingress["environment"].items() if name.startswith("NEURONLENS_")
    }


def test_ray_node_does_not_start_without_a_token() -> None:
    script = DOCKER / "ray" / "node.sh"
    assert os.access(script, os.X_OK), "the image copies its mode"
    for token in ({}, {"RAY_AUTH_TOKEN": ""}):
        run = subprocess.run([script, "head", "127.0.0.1:6379"], env=token, capture_output=True, text=True)
        assert run.returncode != 0
        assert "set it in .env to the output of openssl rand -hex 32" in run.stderr


def test_local_files_are_ignored_by_git() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".env", "files/"} <= set(ignored)


@pytest.mark.system
@pytest.mark.parametrize(
    ("files", "profile"), [([MAIN], []), ([MAIN], ["--profile", "fit"]), ([MAIN, GPU], ["--profile", "cluster"])]
)
def test_docker_compose_accepts_the_files(files: list[Path], profile: list[str], tmp_path: Path) -> None:
    made = configured(files, tmp_path, profile)
    ray = {"ray-head", "ray-worker", "ray-fit", "ingress"}
    assert made["services"].keys() == {"redis", "service", "fit", "cli", "prometheus", "grafana"} | ray
    service = made["services"]["service"]
    assert service["environment"]["NEURONLENS_REDIS_PASSWORD"] == PASSWORDS["service"]
    assert service["ports"] == ["127.0.0.1:8000:8000/tcp"]
    if GPU in files:
        assert service["environment"]["NEURONLENS_DEVICE"] == "cuda"
        assert service["image"] == "neuronlens:cuda"
        assert service["build"]["args"] == {"TORCH_INDEX": ""}
        limits, reserved = (service["deploy"]["resources"][each] for each in ("limits", "reservations"))
        assert limits["memory"] == "4g"
        assert reserved["devices"][0]["capabilities"] == ["gpu"]
        worker = made["services"]["ray-worker"]
        assert worker["image"] == "neuronlens:cuda"
        assert worker["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"
        assert worker["deploy"]["resources"]["limits"]["memory"] == "6g"
        assert made["services"]["ingress"]["environment"]["NEURONLENS_DEVICE"] == "cuda"


@pytest.mark.system
def test_missing_password_is_reported_clearly(tmp_path: Path) -> None:
    compose = system_program("docker-compose")
    command = [compose, "--env-file", str(EXAMPLE), "-f", str(MAIN), "config", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.defpath})
    assert run.returncode != 0
    assert "_PASSWORD" in run.stderr
    assert "set it in .env, for example to the output of openssl rand" in run.stderr


def configured(files: list[Path], directory: Path, options: list[str], **more: str) -> dict[str, Any]:
    """The combined files as docker-compose resolves them, with `.env` filled in and extended by `more`."""
    env_file = directory / "filled.env"
    lines = [line for line in EXAMPLE.read_text().splitlines() if not line.endswith("=")]
    env_file.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in (FILLED_IN | more).items())]) + "\n")
    named = [word for file in files for word in ("-f", str(file))]
    command = [system_program("docker-compose"), "--env-file", str(env_file), *options, *named, "config"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=directory, env={"PATH": os.defpath})
    assert run.returncode == 0, run.stderr
    return dict(yaml.safe_load(run.stdout))
