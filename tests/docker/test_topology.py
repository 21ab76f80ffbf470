"""What docker-compose.yml describes, as plain processes: its own commands and environment, with only the names of hosts
and the places of directories put in other words; from an empty store to a toggle that changes an answer."""

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

from tests.docker.conftest import DOCKER, PASSWORDS, ROOT, Store
from tests.docker.image import health_check, variables
from tests.docker.test_compose import MAIN, configured, seconds
from tests.ports import free_port
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

pytestmark = pytest.mark.system

SOON = 120.0
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

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """A service's process; `arguments` stand for its command, as in `docker compose run`."""
        service = self.services[name]
        entry = self._there(service.get("entrypoint") or ["neuronlens"])
        command = [*entry, *(arguments or self._there(service["command"]))]
        process = subprocess.Popen(
            [sys.executable, "-c", "from app.cli import main; main()", *command[1:]],
            env=self.environment(name),
            stdout=subprocess.PIPE,
            stderr=(self.directory / f"{name}.log").open("a"),
            text=True,
            cwd=self.directory,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def run(self, name: str, *arguments: str) -> str:
        """What a one-shot service prints."""
        process = self.start(name, *arguments)
        output, _ = process.communicate(timeout=SOON)
        assert process.returncode == 0, (self.directory / f"{name}.log").read_text()
        return output

    def environment(self, name: str) -> dict[str, str]:
        """The image's variables, then the service's, as Docker has it; and what Python needs to find this project."""
        within = variables() | {key: str(value) for key, value in self.services[name]["environment"].items()}
        there = dict(zip(within, self._there(list(within.values())), strict=True))
        return there | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def _there(self, words: list[str]) -> list[str]:
        moved = {"/data": str(self.directory / "data"), "/files": str(self.directory / "files")}
        moved |= {"redis:6379": f"127.0.0.1:{self.store.port}", "0.0.0.0": "127.0.0.2"}  # loopback, but not by name
        found = []
        for word in words:
            for before, after in moved.items():
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


def test_from_an_empty_store_to_an_erasure(topology: Topology) -> None:
    url, metrics = (each.replace("127.0.0.1", "127.0.0.2") for each in (topology.url, topology.metrics))
    assert _redis_is_healthy(topology)
    service = topology.start("service")
    until(lambda: _lives(service, topology) and topology.healthy(), SOON)
    assert httpx.get(f"{url}/readyz").status_code == 503, "nothing is fitted yet"
    assert httpx.get(f"{url}/v1/models").json()["code"] == "keys_unavailable"

    token = topology.run("cli", "keys", "create", "admin", "--scope", "admin").strip()
    topology.run("fit")
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200, SOON)
    until(lambda: httpx.get(f"{url}/v1/models").status_code == 401, SOON)

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as http:
        before = _classified(http)
        assert before["erasure"]["concepts"] == []
        # by the operator's command, on the store
        topology.run("cli", "erase", "on", "Sports", "--top-fraction", "1.0", "--reason", "a trial")
        until(lambda: _classified(http)["erasure"]["concepts"] == ["Sports"], SOON)
        after = _classified(http)
        assert after["results"][0]["masked_neurons"] > 0
        assert after["results"][0]["scores"] != before["results"][0]["scores"]
        # by the service's own user, over HTTP
        assert http.delete("/v1/erasures/Sports").status_code == 200
        assert _classified(http)["results"] == before["results"]
        switched = http.put("/v1/erasures/World", json={"top_fraction": 1.0})
        assert switched.status_code == 200
        # an acknowledged toggle is not lost with Redis
        topology.store.kill()
        topology.store.start()
        until(lambda: httpx.get(f"{url}/readyz").json().get("checks", {}).get("store") is True, SOON)
        assert _classified(http)["erasure"]["generation"] == switched.json()["generation"]
        assert _classified(http)["erasure"]["concepts"] == ["World"]

    assert httpx.get(f"{url}/metrics").status_code == 404, "metrics are on their own port only"
    assert "neuronlens_queue_tokens" in httpx.get(f"{metrics}/metrics").text
    listed = topology.run("cli", "keys", "list")
    assert "admin" in listed
    assert token not in listed
    service.send_signal(signal.SIGTERM)
    grace = seconds(topology.services["service"]["stop_grace_period"])
    assert service.wait(grace) == 0, "before Docker would kill it"
    logs = (topology.directory / "service.log").read_text()
    for secret in (*PASSWORDS.values(), token, TEXT):
        assert secret not in logs
    assert "NOPERM" not in logs
    assert "ACL" not in logs, "the service's user may do all that the service does"


def _classified(http: httpx.Client) -> dict[str, Any]:
    answer = http.post("/v1/classify", json={"inputs": TEXT})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _lives(process: subprocess.Popen[str], topology: Topology) -> bool:
    assert process.poll() is None, (topology.directory / "service.log").read_text()
    return True


def _redis_is_healthy(topology: Topology) -> bool:
    """The compose file's own check, told the port."""
    kind, test = topology.services["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    command = test.replace("$$", "$").replace("redis-cli", f"redis-cli -p {topology.store.port}")
    environment = topology.services["redis"]["environment"] | {"PATH": "/usr/bin:/bin"}
    wrong = environment | {"REDIS_MONITOR_PASSWORD": "wrong"}
    right, refused = (
        subprocess.run(["/bin/sh", "-c", command], env=each, capture_output=True).returncode
        for each in (environment, wrong)
    )
    assert refused != 0
    return right == 0
