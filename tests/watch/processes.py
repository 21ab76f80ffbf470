"""Processes that a test can break: a Redis of the system, and replicas of the service."""

import signal
import subprocess
from pathlib import Path

import httpx
import pytest
import redis

from range_store.storage.store import RangeStore
from tests.ports import free_port
from tests.processes import Running, answers
from tests.range_store.waiting import until

NAME = "watched"
FAIL_ON_LONG_TEXTS = """
import app.serving.serve
from contextlib import contextmanager
opened = app.serving.serve.open_service
@contextmanager
def open_service(settings):
    with opened(settings) as service:
        forward = service.engine._runner._forward
        def failing(batch):
            if any(text.tokens > 60 for text in batch):
                raise RuntimeError("a kernel that is wrong for long texts")
            return forward(batch)
        service.engine._runner._forward = failing
        yield service
app.serving.serve.open_service = open_service
"""
LOSE_REQUESTS = """
import os
from workers.cluster.calls import ReplicaCalls
from workers.engine.errors import ReplicaLost
call = ReplicaCalls.call
async def losing(self, method, *arguments):
    if os.path.exists(os.environ["NEURONLENS_DATA_DIR"] + "/lose"):
        raise ReplicaLost("as if it was killed")
    return await call(self, method, *arguments)
ReplicaCalls.call = losing
"""
LONG_TEXT = "the keeper saved a penalty and " * 40


class Redis:
    """A redis-server process that keeps acknowledged changes across restarts; each replica has its own user."""

    def __init__(self, directory: Path) -> None:
        binary = Path("/usr/bin/redis-server")
        if not binary.exists():
            pytest.skip("redis-server is not installed")
        self._directory, self.port = directory, free_port()
        self._command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", directory, "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "no", "--loglevel", "warning"]
        self.client = redis.Redis(port=self.port)
        self.store = RangeStore(self.client, NAME)
        self.start()

    def start(self) -> None:
        with (self._directory / "redis.log").open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until(lambda: answers(self.client), 60)

    def allow(self, user: str) -> None:
        self.client.execute_command("ACL", "SETUSER", user, "on", "nopass", "~*", "&*", "+@all")

    def deny(self, user: str) -> None:
        """Disable a user and close its connections."""
        self.client.execute_command("ACL", "SETUSER", user, "off")
        self.client.execute_command("CLIENT", "KILL", "USER", user)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Replica:
    """A `neuronlens serve` process on a fixed port, with its own user in Redis.

    Args:
        code: Python that the process runs first, to break something in it.
    """

    def __init__(
        self, user: str, model: Path, store: Redis, directory: Path, *, code: str = "", **settings: object
    ) -> None:
        self.target = f"127.0.0.1:{free_port()}"
        self._code = code
        store.allow(user)
        values = {
            "model": model,
            "name": NAME,
            "host": "127.0.0.1",
            "port": self.target.rpartition(":")[2],
            "redis_url": f"redis://{user}@127.0.0.1:{store.port}",
            "data_dir": directory / user,
            "device": "cpu",
            "threads": 1,
            "poll_seconds": 0.3,
            "watched_batches": 0.5,
            **settings,
        }
        self._environment = {f"NEURONLENS_{name.upper()}": str(value) for name, value in values.items()}
        self.http = httpx.Client(base_url=f"http://{self.target}", timeout=300, trust_env=False)
        self.start()

    def start(self) -> None:
        self.running = Running(["serve"], environment=self._environment, code=self._code)

    @property
    def alive(self) -> bool:
        assert self.running.process.poll() is None, self.running.stderr[-30:]
        try:
            return self.http.get("/livez").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def ready(self) -> bool:
        return self.alive and self.http.get("/readyz").status_code == 200

    def classify(self, inputs: object, timeout: str | None = None, **fields: object) -> int:
        """Classify; returns the status code."""
        headers = {} if timeout is None else {"X-Request-Timeout": timeout}
        return self.http.post("/v1/classify", json={"inputs": inputs, **fields}, headers=headers).status_code

    def stop(self) -> None:
        """End it by SIGTERM."""
        self.running.process.send_signal(signal.SIGTERM)
        self.running.end()

    def kill(self) -> None:
        self.running.kill()
