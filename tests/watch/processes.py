"""The processes of a run: a Redis of the system, and replicas of the service that one can hurt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import redis

from range_store.store import RangeStore
from tests.ports import free_port
from tests.processes import answers
from tests.range_store.waiting import until

NAME = "watched"
SERVE = """
import sys
from app import cli
sys.exit(cli.run(["serve"]))
"""
SERVE_A_MODEL_THAT_FAILS_ON_LONG_TEXTS = """
import sys
import app.wiring
opened = app.wiring.open_service
from contextlib import contextmanager
@contextmanager
def open_service(settings):
    with opened(settings) as service:
        forward = service.engine._forward
        def failing(batch):
            if any(text.tokens > 60 for text in batch):
                raise RuntimeError("a kernel that is wrong for long texts")
            return forward(batch)
        service.engine._forward = failing
        yield service
app.wiring.open_service = open_service
from app import cli
sys.exit(cli.run(["serve"]))
"""
SERVE_A_FLEET_THAT_LOSES_REQUESTS = """
import os, sys
from workers.cluster.fleet import Fleet
from workers.engine.errors import ReplicaLost
remote = Fleet._remote
async def losing(self, method, *arguments, **named):
    if os.path.exists(os.environ["NEURONLENS_DATA_DIR"] + "/lose"):
        raise ReplicaLost("as if it was killed")
    return await remote(self, method, *arguments, **named)
Fleet._remote = losing
from app import cli
sys.exit(cli.run(["serve"]))
"""
LONG = "the keeper saved a penalty and " * 40


class Redis:
    """A redis-server process, which has every acknowledged change when it is started again.

    Each replica has a user of its own.
    """

    def __init__(self, directory: Path) -> None:
        binary = Path("/usr/bin/redis-server")
        if not binary.exists():
            pytest.skip("no redis-server on this machine")
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

    def let_in(self, user: str, *, in_: bool) -> None:
        """Let a user in, or throw it out and close its connections."""
        state = ["on", "nopass", "~*", "&*", "+@all"] if in_ else ["off"]
        self.client.execute_command("ACL", "SETUSER", user, *state)
        if not in_:
            self.client.execute_command("CLIENT", "KILL", "USER", user)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Replica:
    """A `neuronlens serve` process on a fixed port, as a user of its own in Redis."""

    def __init__(
        self, user: str, model: Path, store: Redis, directory: Path, *, script: str, **settings: object
    ) -> None:
        self.target = f"127.0.0.1:{free_port()}"
        self._script = script
        self._log = directory / f"{user}.log"
        store.let_in(user, in_=True)
        given = {
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
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NEURONLENS_")}
        self._environment = kept | {f"NEURONLENS_{name.upper()}": str(value) for name, value in given.items()}
        self.http = httpx.Client(base_url=f"http://{self.target}", timeout=300, trust_env=False)
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self._script], env=self._environment, stdout=log, stderr=log
            )

    @property
    def alive(self) -> bool:
        assert self.process.poll() is None, self._log.read_text("utf-8")[-3000:]
        try:
            return self.http.get("/livez").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def ready(self) -> bool:
        return self.alive and self.http.get("/readyz").status_code == 200

    def classify(self, inputs: object, timeout: str | None = None, **fields: object) -> int:
        """Ask; gives the status."""
        headers = {} if timeout is None else {"X-Request-Timeout": timeout}
        return self.http.post("/v1/classify", json={"inputs": inputs, **fields}, headers=headers).status_code

    def signal(self, which: signal.Signals) -> None:
        self.process.send_signal(which)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
