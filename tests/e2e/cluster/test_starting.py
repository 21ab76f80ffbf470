"""Whoever starts a fleet, when and beside whom: there is one, with the threads that it has, and it answers rightly."""

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

from app.service import Service
from app.settings import Settings
from app.wiring import open_service
from range_store.embedded import EmbeddedRedis
from tests.e2e.cluster.conftest import pids
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts
from workers.cluster.errors import OtherFleet
from workers.cluster.launching import names
from workers.models.loading import LoadedModel

pytestmark = pytest.mark.timeout(600)  # processes that load torch, on a busy machine
TOLERANCE = 2e-4
"""Largest difference of a logit between two batches that a text is in (promise 2)."""
TEXTS = [text for text, _ in labelled_texts(8, seed=17)]
START = """
import asyncio, json, logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s", force=True)
from app.fleet import open_fleet
from app.settings import Settings
from workers.cluster import launching, lease
settings, texts, stops = map(json.loads, sys.argv[1:])
lease.TELL_SECONDS = 0.2
about = launching._about
def stopping(plan):
    told = about(plan)
    print("half-way", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise launching.ClusterError("as if it did not come up")
    return told
if stops:
    launching._about = stopping
with open_fleet(Settings(**settings)) as (service,):
    answer = asyncio.run(service.engine.classify(texts, []))
    logits = json.dumps([text.logits.tolist() for text in answer.texts])
    sys.stdout.write(f"answered {logits}\\n")  # in one piece, whoever else writes
    sys.stdout.flush()
    sys.stdin.readline()
"""


class Starter:
    """A process that starts a fleet and answers with it until it is told to go. `stops`: half-way, until it is told."""

    def __init__(self, settings: dict[str, Any], stops: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(settings), json.dumps(TEXTS), json.dumps(stops)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )

    def says(self, pattern: str) -> str:
        """The rest of the first line that begins so."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if (found := re.match(pattern, line)) is not None:
                return line[found.end() :]
        raise AssertionError(f"it ended, and said: {''.join(lines)}")

    def answers(self) -> Any:
        return np.array(json.loads(self.says("answered ")))

    def told(self, what: str) -> None:
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
    """`starting(name)`: in another process; fleets end with the module."""
    assert isinstance(redis_client, EmbeddedRedis)
    url = redis_client.url
    with ExitStack() as stack:

        def start(name: str, **how: Any) -> Starter:
            place = str(tmp_path_factory.mktemp("starter"))
            settings = {"name": name, "ray": cluster, "model": model.source, "redis_url": url, "data_dir": place}
            made = Starter({**settings, "threads": 1, "device": "cpu"}, **how)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="module")
def expected(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process answers."""
    with open_service(Settings(data_dir=tmp_path_factory.mktemp("alone"), name="alone"), model) as service:
        return np.stack([text.logits for text in asyncio.run(service.engine.classify(TEXTS, [])).texts])


def test_two_that_start_the_same_fleet_at_once_serve_one(starting: Starting, expected: Any) -> None:
    first = starting("together", stops=True)
    first.says("half-way")
    second = starting("together")
    second.says("another process starts or changes the fleet of 'together', and is waited for")
    first.told("go on")
    for each in (first, second):
        np.testing.assert_allclose(each.answers(), expected, atol=TOLERANCE)
    assert names().count("together") == 1


@pytest.mark.parametrize("ends", ["killed", "fails"])
def test_who_waited_for_one_that_does_not_finish_starts_the_fleet_itself(
    starting: Starting, expected: Any, ends: str
) -> None:
    first = starting(ends, stops=True)
    first.says("half-way")
    second = starting(ends)
    second.says("another process starts")
    if ends == "killed":
        os.kill(first.process.pid, signal.SIGKILL)
    else:
        first.told("fail")
    np.testing.assert_allclose(second.answers(), expected, atol=TOLERANCE)


def test_a_fleet_keeps_its_threads_unless_others_are_asked_for(open_services: Callable[..., list[Service]]) -> None:
    (first,) = open_services("sharing", threads=1)
    before = set(pids(first))
    open_services("sharing", threads=None)  # whose equal share of the CPUs is another
    open_services("sharing", threads=None, replicas=2)
    until(lambda: len(set(pids(first))) == 2, 300)
    assert before < set(pids(first)), "no engine was restarted"
    with pytest.raises(OtherFleet, match=r"with other settings \(threads\)"):
        open_services("sharing", threads=2)
