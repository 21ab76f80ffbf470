"""Processes to break: a Redis of one's own, a served model, and clients that never pause."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import redis

from range_store.embedded_server import _executable
from tests.ports import free_port
from tests.processes import Running
from tests.range_store.waiting import until

TEXTS = ["the keeper saved a penalty", "shares of the miner fell", "a probe sent back pictures"]


class RedisProcess:
    """A Redis server at a port of its own, to be killed, stopped and started again.

    Every write outlives its end (not the machine's: then a busy disk would hold up answers).
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
        """Start it on what it had written; returns when it answers."""
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
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def forget(self) -> None:
        """Lose everything that was written; it must be down."""
        assert self.process is None
        shutil.rmtree(self.directory)


class Forks:
    """Runs commands that need torch, one at a time, each a process of its own that starts at once (see `forking`)."""

    def __init__(self) -> None:
        self._forking = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.faults.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        assert self._said() == "ready"

    def _said(self) -> str:
        assert self._forking.stdout is not None
        return self._forking.stdout.readline().strip()

    def start(self, words: Sequence[object], stderr: Path) -> int:
        """The pid of a new process."""
        assert self._forking.stdin is not None
        self._forking.stdin.write(shlex.join(map(str, [stderr, *words])) + "\n")
        self._forking.stdin.flush()
        return int(self._said())

    def end(self) -> int:
        """Wait for it; its exit code, or minus the signal that killed it."""
        return int(self._said())

    def close(self) -> None:
        self._forking.kill()
        self._forking.communicate()


class Load:
    """Clients that classify without a pause, and what they were answered; a context manager."""

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
        """Return when so many more answers are there."""
        enough = len(self.answers) + answers
        until(lambda: len(self.answers) >= enough, 60)

    def bad(self) -> list[str]:
        """Every answer that was none."""
        return [
            repr(each) if isinstance(each, Exception) else each.text
            for each in self.answers
            if isinstance(each, Exception) or each.status_code != 200
        ]

    def erased(self) -> set[tuple[str, ...]]:
        """The different lists of concepts that answers were erased of."""
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
    """A `neuronlens serve` that answers."""

    def __init__(self, model: str, redis_url: str | None, *options: object, **environment: str) -> None:
        where = ["--redis-url", redis_url] if redis_url else []
        fixed = ["--model", model, *where, "--port", "0", "--device", "cpu", "--threads", "1"]
        self.command = Running(["serve", *fixed, *options], environment=environment)
        words = self.command.says(self.command.stdout, "serving ").split()
        self.name, self.url = words[1], words[-1]
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def metric(self, name: str) -> float:
        """A sample of the model, named as it stands on the page, with its labels but `model`."""
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
        ready = self.ready()
        return bool(ready["checks"]["store"]) and ready["problem"] is None and ready["snapshot_age"] < 2.5

    def close(self) -> None:
        self.http.close()
        self.command.kill()


def seconds_until(condition: Callable[[], object]) -> float:
    """How long it takes until `condition()` is true."""
    began = time.monotonic()
    until(condition, 30)
    return time.monotonic() - began
