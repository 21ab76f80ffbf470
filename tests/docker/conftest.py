"""The files of the deployment, the programs of the system, and a Redis started as in its container."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from app.settings import Settings
from tests.ports import free_port
from tests.range_store.waiting import until

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

PASSWORDS = {"service": "5e" * 32, "operator": "09" * 32, "monitor": "3a" * 32}
"""Passwords of the Redis users in tests."""


def system_program(name: str) -> str:
    """Path of a program of the operating system, not of one that a Python or npm package installed."""
    found = shutil.which(name, path=f"{os.defpath}:/usr/local/bin:/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check_settings(environment: list[str]) -> None:
    """Assert that every NEURONLENS_ variable is a setting."""
    for name in environment:
        if name.startswith("NEURONLENS_"):
            assert name.removeprefix("NEURONLENS_").lower() in Settings.model_fields, name


class Store:
    """A Redis of the system, started as in its container: by start.sh with the committed redis.conf and users.acl."""

    def __init__(self, directory: Path, command: list[str], environment: dict[str, str]) -> None:
        self.directory = directory
        self.port = free_port()
        system_program("redis-server")
        self._command = [*command, "--port", str(self.port), "--bind", "127.0.0.1"]
        places = {"REDIS_ACL_FILE": str(directory / "users.acl"), "REDIS_DATA_DIR": str(directory)}
        self._environment = environment | places | {"PATH": "/usr/bin:/bin"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        until(self._answers, 120)

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def url(self, user: str) -> str:
        return f"redis://{user}:{PASSWORDS[user]}@127.0.0.1:{self.port}/0"

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "redis.log").read_text()
        try:
            with redis.Redis.from_url(self.url("monitor")) as client:
                return bool(client.ping())
        except redis.ConnectionError:  # still starting; a refused password is another error
            return False


@contextmanager
def started_store(directory: Path) -> Iterator[Store]:
    environment = {f"REDIS_{user.upper()}_PASSWORD": password for user, password in PASSWORDS.items()}
    directory.mkdir()
    server = Store(directory, ["/bin/sh", str(DOCKER / "redis" / "start.sh")], environment)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def shared_store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One Redis for the tests that leave nothing in it; no user may empty it."""
    with started_store(tmp_path_factory.mktemp("shared") / "redis") as server:
        yield server


@pytest.fixture
def store_server(tmp_path: Path) -> Iterator[Store]:
    with started_store(tmp_path / "redis") as server:
        yield server
