"""Several processes start the same fleet: there is one, with the threads that it was started with."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from app.serving.serve import open_service
from app.serving.service import Service
from app.settings import Settings
from range_store.embedded.connection import EmbeddedRedis
from tests.e2e.cluster.conftest import pids
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts
from workers.cluster.errors import OtherFleet
from workers.cluster.launching import fleet_names
from workers.models.loading import LoadedModel

pytestmark = pytest.mark.full
TOLERANCE = 2e-4
"""Largest difference of a logit of the same text in two batches."""
TEXTS = [text for text, _ in labelled_texts(8, seed=17)]
PROGRAM = """
import asyncio, json, logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s", force=True)
from app.serving.fleet import open_fleet
from app.settings import Settings
from workers.cluster import launching
settings, texts, pauses = map(json.loads, sys.argv[1:])
launching.WARN_SECONDS = 0.2
about = launching._replica_info
def pausing(plan):
    found = about(plan)
    print("half-way", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise launching.ClusterError("it does not come up")
    return found
if pauses:
    launching._replica_info = pausing
with open_fleet(Settings(**settings)) as (service,):
    answer = asyncio.run(service.engine.classify(texts, []))
    logits = json.dumps([text.logits.tolist() for text in answer.texts])
    sys.stdout.write(f"answered {logits}\\n")  # in one piece, as other threads write too
    sys.stdout.flush()
    sys.stdin.readline()
"""


class Starter:
    """A process that starts a fleet, answers with it, and waits. `pauses`: it waits for a command half-way too."""

    def __init__(self, settings: dict[str, Any], pauses: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(settings), json.dumps(TEXTS), json.dumps(pauses)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )

    def says(self, pattern: str) -> str:
        """Wait for a line that begins with the pattern; gives the rest of it."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if (found := re.match(pattern, line)) is not None:
                return line[found.end() :]
        raise AssertionError(f"the process ended; its output: {''.join(lines)}")

    def answers(self) -> Any:
        return np.array(json.loads(self.says("answered ")))

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Starting = Callable[..., Starter]


@pytest.fixture
def starting(
    cluster: str,
    redis_client: redis.Redis,
    model: LoadedModel,
    open_services: Callable[..., list[Service]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Starting]:
    """`starting(name)`: a process that starts this fleet; fleets end with the module."""
    assert isinstance(redis_client, EmbeddedRedis)
    url = redis_client.url
    with ExitStack() as stack:

        def start(name: str, **how: Any) -> Starter:
            place = str(tmp_path_factory.mktemp("starter"))
            settings = {"name": name, "ray": cluster, "model": model.source, "redis_url": url, "data_dir": place}
            made = Starter({**settings, "threads": 1, "device": "cpu", "poll_seconds": 0.2}, **how)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="module")
def expected(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the engine of one process answers."""
    with open_service(Settings(data_dir=tmp_path_factory.mktemp("alone"), name="alone"), model) as service:
        return np.stack([text.logits for text in asyncio.run(service.engine.classify(TEXTS, [])).texts])


def test_processes_that_start_the_same_fleet_wait_for_each_other(starting: Starting, expected: Any) -> None:
    """A process waits while another starts the fleet, and starts it itself if the other is killed or fails."""
    killed = starting("shared", pauses=True)
    killed.says("half-way")
    failing = starting("shared", pauses=True)
    failing.says("waiting for another process that starts or changes the fleet of 'shared'")
    os.kill(killed.process.pid, signal.SIGKILL)
    failing.says("half-way")
    first = starting("shared", pauses=True)
    first.says("waiting for another process")
    failing.tell("fail")
    first.says("half-way")
    second = starting("shared")
    second.says("waiting for another process")
    first.tell("go on")
    for each in (first, second):
        np.testing.assert_allclose(each.answers(), expected, atol=TOLERANCE)
    assert fleet_names().count("shared") == 1


def test_fleet_keeps_its_threads_unless_others_are_asked_for(open_services: Callable[..., list[Service]]) -> None:
    (first,) = open_services("shared", threads=1)
    before = set(pids(first))
    open_services("shared", threads=None)  # an equal share of the CPUs would be another number
    open_services("shared", threads=None, replicas=2)
    until(lambda: len(set(pids(first))) == 2, 300)
    assert before < set(pids(first)), "no engine was restarted"
    with pytest.raises(OtherFleet, match=r"with other settings \(threads\)"):
        open_services("shared", threads=2)
