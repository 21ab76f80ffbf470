"""The services of docker-compose.yml as plain processes, from an empty store to an erasure that changes an answer.

Commands and environment are those of the file; only hosts, ports and directories are replaced.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docker.conftest import DOCKER, PASSWORDS, Store
from tests.docker.image import health_check, variables
from tests.docker.test_compose import MAIN, configured
from tests.ports import free_port
from tests.processes import Running
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

pytestmark = pytest.mark.system

TIMEOUT = 120.0
TEXT = "The striker scored twice in extra time."


class Topology:
    """The services of the compose file as processes."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.services = configured([MAIN], directory, [])["services"]
        self._stack = stack
        redis = self.services["redis"]
        command = [word.replace("/etc/neuronlens-redis", str(DOCKER / "redis")) for word in redis["entrypoint"]]
        (directory / "redis").mkdir()
        self.store = Store(directory / "redis", [*command, *(redis["command"] or [])], redis["environment"])
        self.store.start()
        stack.callback(self.store.kill)
        self.ports = {"8000": str(free_port()), "8001": str(free_port())}
        self.url, self.metrics = (f"http://127.0.0.1:{self.ports[port]}" for port in ("8000", "8001"))

    def start(self, name: str, *arguments: str) -> Running:
        """Start a service's process; `arguments` replace its command, as in `docker compose run`."""
        service = self.services[name]
        entry = self._replaced(service.get("entrypoint") or ["neuronlens"])
        assert entry[0] == "neuronlens"
        command = [*entry[1:], *(arguments or self._replaced(service["command"]))]
        code = f"import os; os.chdir({str(self.directory)!r})"
        running = Running(command, environment=self.environment(name), code=code)
        self._stack.callback(running.kill)
        return running

    def run(self, name: str, *arguments: str) -> str:
        """Run a one-shot service; returns its output."""
        running = self.start(name, *arguments)
        assert running.end() == 0, running.stderr
        return "".join(running.stdout)

    def environment(self, name: str) -> dict[str, str]:
        """The variables of the image and of the service, as Docker combines them."""
        combined = variables() | {key: str(value) for key, value in self.services[name]["environment"].items()}
        replaced = dict(zip(combined, self._replaced(list(combined.values())), strict=True))
        return replaced | {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}

    def _replaced(self, words: list[str]) -> list[str]:
        replacements = {"/data": str(self.directory / "data"), "/files": str(self.directory / "files")}
        replacements |= {
            "redis:6379": f"127.0.0.1:{self.store.port}",
            "0.0.0.0": "127.0.0.2",
        }  # loopback, but not `localhost`
        found = []
        for word in words:
            for before, after in replacements.items():
                word = word.replace(before, after)
            found.append(self.ports.get(word, word))
        return found

    def healthy(self) -> bool:
        check = [sys.executable, *health_check()[1:]]
        check[-1] = check[-1].replace("127.0.0.1", "127.0.0.2")
        return subprocess.run(check, env=self.environment("service"), capture_output=True).returncode == 0


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    save_tiny("bert", tmp_path / "files" / "model")
    write_jsonl(tmp_path / "files" / "train.jsonl", labelled_texts(90, seed=4))
    (tmp_path / "data").mkdir()
    with ExitStack() as stack:
        yield Topology(tmp_path, stack)


def test_compose_services_work_together(topology: Topology) -> None:
    url, metrics = (each.replace("127.0.0.1", "127.0.0.2") for each in (topology.url, topology.metrics))
    assert _redis_is_healthy(topology)
    service = topology.start("service")
    until(lambda: _alive(service) and topology.healthy(), TIMEOUT)
    assert httpx.get(f"{url}/readyz").status_code == 503, "nothing is fitted yet"
    assert httpx.get(f"{url}/v1/models").json()["code"] == "keys_unavailable"

    token = topology.run("cli", "keys", "create", "admin", "--scope", "admin").strip()
    topology.run("fit")
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200, TIMEOUT)
    until(lambda: httpx.get(f"{url}/v1/models").status_code == 401, TIMEOUT)

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as http:
        before = _classified(http)
        assert before["erasure"]["concepts"] == []
        # the operator's command changes the store
        topology.run("cli", "erase", "on", "Sports", "--top-fraction", "1.0", "--reason", "a trial")
        until(lambda: _classified(http)["erasure"]["concepts"] == ["Sports"], TIMEOUT)
        after = _classified(http)
        assert after["results"][0]["masked_neurons"] > 0
        assert after["results"][0]["scores"] != before["results"][0]["scores"]
        # the service's user changes it over HTTP
        assert http.delete("/v1/erasures/Sports").status_code == 200
        assert _classified(http)["results"] == before["results"]
        switched = http.put("/v1/erasures/World", json={"top_fraction": 1.0})
        assert switched.status_code == 200
        # an acknowledged change survives the end of Redis
        topology.store.kill()
        topology.store.start()
        until(lambda: httpx.get(f"{url}/readyz").json().get("checks", {}).get("store") is True, TIMEOUT)
        assert _classified(http)["erasure"]["generation"] == switched.json()["generation"]
        assert _classified(http)["erasure"]["concepts"] == ["World"]

    assert httpx.get(f"{url}/metrics").status_code == 404, "metrics have their own port"
    assert "neuronlens_queue_tokens" in httpx.get(f"{metrics}/metrics").text
    listed = topology.run("cli", "keys", "list")
    assert "admin" in listed
    assert token not in listed
    service.process.send_signal(signal.SIGTERM)
    assert service.end() == 0
    logs = "".join(service.stderr)
    for secret in (*PASSWORDS.values(), token, TEXT):
        assert secret not in logs
    assert "NOPERM" not in logs
    assert "ACL" not in logs, "the service's user has every permission that it needs"


def _classified(http: httpx.Client) -> dict[str, Any]:
    answer = http.post("/v1/classify", json={"inputs": TEXT})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _alive(running: Running) -> bool:
    assert running.process.poll() is None, running.stderr
    return True


def _redis_is_healthy(topology: Topology) -> bool:
    """Run the health check of the compose file; a wrong password fails it."""
    kind, test = topology.services["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    command = test.replace("$$", "$").replace("redis-cli", f"redis-cli -p {topology.store.port}")
    environment = topology.services["redis"]["environment"] | {"PATH": "/usr/bin:/bin"}
    wrong = environment | {"REDIS_MONITOR_PASSWORD": "wrong"}
    right, wrong_password = (
        subprocess.run(["/bin/sh", "-c", command], env=each, capture_output=True).returncode
        for each in (environment, wrong)
    )
    assert wrong_password != 0
    return right == 0
