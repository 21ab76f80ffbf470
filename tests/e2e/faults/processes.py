"""Processes to break: a Redis server, `neuronlens serve`, and clients that send requests without a pause."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import redis

from range_store.embedded.server import _executable
from tests.ports import free_port
from tests.processes import Running
from tests.range_store.waiting import until

TEXTS = ["the keeper saved a penalty", "shares of the miner fell", "a probe sent back pictures"]


class RedisProcess:
    """A Redis server that a test may kill, stop and start again.

    Writes outlive the process, but not the machine: waiting for a busy disk would delay answers.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory, self.arguments = directory, arguments
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=10)

    def start(self) -> None:
        """Start it with the data that it had written, and wait until it answers."""
        self.directory.mkdir(exist_ok=True)
        settings = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", ""]
        settings += ["--appendonly", "yes", "--appendfsync", "no", "--logfile", str(self.directory / "redis.log")]
        self.process = subprocess.Popen([_executable(), *settings, *self.arguments], stdin=subprocess.DEVNULL)
        until(self._answers)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def forget(self) -> None:
        """Delete all data. The process must not be running."""
        assert self.process is None
        shutil.rmtree(self.directory)


class Load:
    """Clients that classify without a pause, and the answers they got; a context manager."""

    def __init__(self, url: str, clients: int = 3) -> None:
        self.url = url
        self.answers: list[httpx.Response | Exception] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as http:
            while not self._stopping.is_set():
                try:
                    self.answers.append(http.post("/v1/classify", json={"inputs": TEXTS}))
                except httpx.HTTPError as error:
                    self.answers.append(error)

    def more(self, answers: int = 20) -> None:
        """Wait until so many more answers have arrived."""
        enough = len(self.answers) + answers
        until(lambda: len(self.answers) >= enough, 120)

    def bad(self) -> list[str]:
        """Errors and answers other than 200."""
        return [
            repr(each) if isinstance(each, Exception) else each.text
            for each in self.answers
            if isinstance(each, Exception) or each.status_code != 200
        ]

    def erased(self) -> set[tuple[str, ...]]:
        """The distinct lists of concepts that were erased from answers."""
        good = [each for each in self.answers if isinstance(each, httpx.Response) and each.status_code == 200]
        return {tuple(each.json()["erasure"]["concepts"]) for each in good}

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


class Served:
    """A process of `neuronlens serve` that accepts requests."""

    def __init__(self, model: str, redis_url: str | None, *options: object, code: str = "", **environment: str) -> None:
        store = ["--redis-url", redis_url] if redis_url else []
        fixed = ["--model", model, *store, "--port", "0", "--device", "cpu", "--threads", "1"]
        self.command = Running(["serve", *fixed, *options], environment=environment, code=code)
        words = self.command.says(self.command.stdout, "serving ").split()
        self.name, self.url = words[1], words[-1]
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def metric(self, name: str) -> float:
        """A sample of the metrics page, named with its labels other than `model`."""
        page = self.http.get("/metrics").text
        for label in (f'{{model="{self.name}"}}', f',model="{self.name}"', f'model="{self.name}",'):
            page = page.replace(label, "")
        return next(float(line.split()[-1]) for line in page.splitlines() if line.rsplit(" ", 1)[0] == name)

    def ready(self) -> dict[str, Any]:
        answer = self.http.get("/readyz")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def converged(self) -> bool:
        """Whether its live state is current again, after Redis was away."""
        ready = self.ready()
        return bool(ready["checks"]["store"]) and ready["problem"] is None

    def close(self) -> None:
        self.http.close()
        self.command.kill()
