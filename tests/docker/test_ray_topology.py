"""The profile `cluster` of docker-compose.yml without Docker: bubblewrap stands in for each container.

Each has its own processes, files and memory and the file's command and environment; the network is this machine's.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docker.conftest import DOCKER, PASSWORDS, ROOT
from tests.docker.image import sandboxed, send_signal
from tests.docker.test_compose import MAIN, configured, seconds
from tests.docker.test_topology import TEXT, Topology
from tests.ports import free_port
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

pytestmark = pytest.mark.full

TIMEOUT = 240.0
TOKEN = "c3" * 32  # pragma: allowlist secret
COUNT_WORKERS = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(sum(node.resources_total.get("CPU", 0) > 0 for node in nodes))
"""


class Cluster:
    """Services of the profile as sandboxes; only host names and ports are replaced."""

    def __init__(self, topology: Topology, stack: ExitStack) -> None:
        self.topology = topology
        self.directory = topology.directory
        more = {"RAY_AUTH_TOKEN": TOKEN, "REPLICAS": "2"}
        self.services = configured([MAIN], self.directory, ["--profile", "cluster"], **more)["services"]
        self.head = f"127.0.0.1:{free_port()}"
        self.agents = {"ray-head": free_port()}
        self._stack = stack

    def start(self, service: str, port: int = 0) -> subprocess.Popen[bytes]:
        """Start a container of the service. `port`: of its HTTP API, if it has one."""
        definition = self.services[service]
        hosts = {"ray-head:6379": self.head, "redis:6379": f"127.0.0.1:{self.topology.store.port}"}
        hosts |= {"8000": str(port), "8001": str(free_port()), "0.0.0.0": "127.0.0.2", "ray-node": "/bin/sh"}
        program, *arguments = definition["entrypoint"]
        words = [program, str(DOCKER / "ray" / "node.sh"), *arguments, *definition["command"]]
        environment = {name: _replaced(str(value), hosts) for name, value in definition["environment"].items()}
        environment |= {"RAY_AGENT_PORT": str(self.agents.get(service, free_port())), "PYTHONPATH": str(ROOT)}
        data = self.directory / f"data-{service}-{port}"
        data.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(data, 10001, 10001)
        command = [_replaced(word, hosts) for word in words]
        process = subprocess.Popen(
            sandboxed(command, Path(sys.prefix).resolve(), data, self.directory / "files", environment),
            stdout=(log := (self.directory / f"{service}.log").open("ab")),
            stderr=log,
        )
        log.close()
        self._stack.callback(process.wait)
        self._stack.callback(send_signal, process, signal.SIGKILL)
        return process

    def healthy(self, service: str) -> bool:
        """Run the health check of the compose file with the port replaced."""
        test = self.services[service]["healthcheck"]["test"]
        check = [sys.executable, *test[2:-1], test[-1].replace("52365", str(self.agents[service]))]
        return subprocess.run(check, capture_output=True).returncode == 0

    def accepts(self, token: str) -> bool:
        """Whether the cluster accepts the token."""
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        command = [str(Path(sys.executable).parent / "ray"), "health-check", "--address", self.head]
        check = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert check.returncode == 0 or "InvalidAuthToken" in check.stderr, check.stderr
        return check.returncode == 0

    def workers(self) -> int:
        """Number of joined nodes that offer CPUs."""
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        counted = subprocess.run(
            [sys.executable, "-c", COUNT_WORKERS, self.head], capture_output=True, text=True, env=environment
        )
        return int(counted.stdout) if counted.returncode == 0 else 0

    def log(self, service: str) -> str:
        return (self.directory / f"{service}.log").read_text()


def _replaced(word: str, hosts: dict[str, str]) -> str:
    for before, after in hosts.items():
        word = word.replace(before, after) if ":" in before or "." in before else after if word == before else word
    return word


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    save_tiny("bert", tmp_path / "files" / "model")
    write_jsonl(tmp_path / "files" / "train.jsonl", labelled_texts(90, seed=4))
    (tmp_path / "data").mkdir()
    for each in (tmp_path, *tmp_path.parents[:2], *(tmp_path / "files").rglob("*"), tmp_path / "files"):
        each.chmod(0o755 if each.is_dir() else 0o644)  # the sandbox has another user
    with ExitStack() as stack:
        yield Cluster(Topology(tmp_path, stack), stack)


def test_fleet_answers_and_survives_the_loss_of_a_node(cluster: Cluster) -> None:
    head = cluster.start("ray-head")
    token = cluster.topology.run("cli", "keys", "create", "admin", "--scope", "admin").strip()
    until(lambda: _alive(head, cluster, "ray-head") and cluster.healthy("ray-head"), TIMEOUT)
    workers = [cluster.start("ray-worker"), cluster.start("ray-worker")]
    until(lambda: cluster.workers() == 2, TIMEOUT)
    fit = cluster.start("ray-fit")
    assert not cluster.accepts("0" * 64)
    assert fit.wait(TIMEOUT) == 0, cluster.log("ray-fit")

    ports = [free_port(), free_port()]
    first, second = (f"http://127.0.0.2:{port}" for port in ports)
    ingress = cluster.start("ingress", ports[0])
    until(lambda: _alive(ingress, cluster, "ingress") and _ready(first), TIMEOUT)
    assert httpx.get(f"{first}/v1/models").status_code == 401

    with _client(first, token) as http:
        until(lambda: len(http.get("/v1/replicas/targets").json()) == 2, TIMEOUT)
        before = _classified(http)
        switched = http.put("/v1/erasures/Sports", params={"wait": "all"}, json={"top_fraction": 1.0})
        assert switched.status_code == 200, switched.text
        after = [_classified(http) for _ in range(8)]
        assert {each["erasure"]["generation"] for each in after} == {switched.json()["generation"]}, "all replicas"
        assert after[0]["results"][0]["mcounted_neurons"] > 0
        assert after[0]["results"][0]["scores"] != before["results"][0]["scores"]

        other = cluster.start("ingress", ports[1])
        until(lambda: _alive(other, cluster, "ingress") and _ready(second), TIMEOUT)
        send_signal(workers[0], signal.SIGKILL)
        ended = time.monotonic() + 5
        while time.monotonic() < ended:
            assert _classified(http)["erasure"]["concepts"] == ["Sports"], (
                "a lost request is sent to the remaining replica"
            )
        with _client(second, token) as other_http:
            assert _classified(other_http)["results"] == after[0]["results"], "the second ingress uses the same fleet"
            assert other_http.delete("/v1/erasures/Sports").status_code == 200
            until(lambda: _classified(http)["erasure"]["concepts"] == [], TIMEOUT)
            _stop(ingress, cluster.services["ingress"])
            assert _classified(other_http)["results"] == before["results"], "engines outlive an ingress"
    _stop(workers[1], cluster.services["ray-worker"])
    for service in ("ray-head", "ray-worker", "ray-fit", "ingress"):
        for secret in (*PASSWORDS.values(), token, TOKEN, TEXT):
            assert secret not in cluster.log(service)
    assert "NOPERM" not in cluster.log("ingress")
    assert "replica ready" in cluster.log("ray-worker"), "the container's log has the engines' messages"


def _client(url: str, token: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def _classified(http: httpx.Client) -> dict[str, Any]:
    answer = http.post("/v1/classify", json={"inputs": TEXT})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        time.sleep(0.2)  # leave the CPU to the server
        return False


def _alive(process: subprocess.Popen[bytes], cluster: Cluster, service: str) -> bool:
    assert process.poll() is None, cluster.log(service)
    return True


def _stop(process: subprocess.Popen[bytes], service: dict[str, Any]) -> None:
    """Send SIGTERM to process 1 as Docker does, and wait no longer than Docker would."""
    send_signal(process, signal.SIGTERM)
    process.wait(seconds(service["stop_grace_period"]))
