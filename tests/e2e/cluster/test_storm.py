"""Toggles that are waited for, at two ingress processes at once, over a fleet under load that loses a replica."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app.service import Service
from range_store.embedded import EmbeddedRedis
from range_store.live import reaches
from range_store.replicas import LEASE_SECONDS
from tests.e2e.cluster.conftest import activated
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts
from workers.cluster.messages import Answered
from workers.cluster.serve_status import status_of
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]  # processes that load torch, on a busy machine
TEXTS = [text for text, _ in labelled_texts(32, seed=9)]
TOGGLES = 24
"""At each ingress; a third of them before the replica is killed."""
PATIENT = {"max_queue_seconds": 600.0}


@pytest.fixture(scope="module")
def fleet(open_services: Callable[..., list[Service]], fitted: Fitted) -> Service:
    """Of three replicas; its ingress is in this process."""
    return activated(open_services("storm", replicas=3, **PATIENT)[0], fitted)


@pytest.fixture(scope="module")
def ingresses(
    fleet: Service,
    cluster: str,
    redis_client: redis.Redis,
    model: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[str]]:
    """URLs of two more, each a process."""
    assert isinstance(redis_client, EmbeddedRedis)
    what = ["--model", model.source, "--name", "storm", "--threads", "1", "--device", "cpu", "--port", "0"]
    command = [sys.executable, "-m", "app.cli", "serve", *what, "--ray", cluster, "--redis-url", redis_client.url]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    env |= {"NEURONLENS_POLL_SECONDS": "0.2", "NEURONLENS_MAX_QUEUE_SECONDS": "600"}
    started = []
    try:
        for _ in range(2):
            place = ["--data-dir", str(tmp_path_factory.mktemp("ingress"))]
            made = subprocess.Popen(
                [*command, *place], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
            )
            started.append(made)
        urls = []
        for each in started:
            assert each.stdout is not None
            urls.append(each.stdout.readline().strip().removeprefix("serving storm at "))
        yield urls
    finally:
        for each in started:
            each.send_signal(signal.SIGTERM)
        for each in started:
            each.communicate(timeout=60)


def test_a_storm_of_toggles_reaches_every_replica_and_nobody_hangs(
    fleet: Service, ingresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = fleet.store.replicas.read
    until(lambda: len(roster().replicas) == 6, 60)  # three that answer, three in front of them
    victim = sorted(engines_of(fleet))[0]
    toggles = [0, 0]
    killed_at: list[float] = []
    gone_after: list[float] = []
    stop = threading.Event()

    def toggler(which: int) -> list[int]:
        """Switches a concept on and off, and asks at both ingresses after each change."""
        statuses = []
        with (
            httpx.Client(base_url=ingresses[which], timeout=30) as own,
            httpx.Client(base_url=ingresses[1 - which], timeout=30) as other,
        ):
            for step in range(TOGGLES):
                change = own.put if step % 2 == 0 else own.delete
                reply = change(f"/v1/erasures/{('Sports', 'World')[which]}", params={"wait": "all"})
                told: dict[str, Any] = reply.json()
                statuses.append(reply.status_code)
                if reply.status_code == 504:
                    assert killed_at, told
                    assert time.monotonic() - killed_at[0] < LEASE_SECONDS + 5, told
                    assert told["missing"] == [victim], told
                else:
                    assert reply.status_code == 200, told
                    assert not roster().missing(told["generation"])
                for asking in (own, other):
                    wanted = {"inputs": TEXTS[step % 32], "min_generation": told["generation"]}
                    answer = asking.post("/v1/classify", json=wanted)
                    assert answer.status_code == 200, answer.text
                    assert reaches(answer.json()["erasure"]["generation"], told["generation"])
                toggles[which] = step + 1
        return statuses

    def load(which: int) -> int:
        """Asks as fast as it is answered; under what is live, whatever that is."""
        asked = 0
        with httpx.Client(base_url=ingresses[which], timeout=30) as client:
            while not stop.is_set():
                answer = client.post("/v1/classify", json={"inputs": TEXTS[asked % 28 : asked % 28 + 4]})
                assert answer.status_code == 200, answer.text
                asked += 1
        return asked

    replied: list[tuple[str, str]] = []
    remote = fleet.engine._remote  # type: ignore[attr-defined]

    async def heard(method: str, *arguments: Any, **more: Any) -> Any:
        reply = await remote(method, *arguments, **more)
        replied.extend((reply.replica, each.generation) for each in reply.outcomes if isinstance(each, Answered))
        return reply

    monkeypatch.setattr(fleet.engine, "_remote", heard)

    def one_by_one() -> None:
        """One request at a time at the third ingress, so that its replies are in the order of their admission."""

        async def ask() -> None:
            while not stop.is_set():
                await fleet.engine.classify(TEXTS[:1], None)

        asyncio.run(ask())

    def look() -> None:
        """What each replica reports never goes back; nor is who was forgotten back."""
        seen: dict[str, str] = {}
        while not stop.is_set():
            now = roster()
            for each in now.replicas:
                if each.generation is not None:
                    assert reaches(each.generation, seen.get(each.name, each.generation)), each
                    seen[each.name] = each.generation
            present = victim in {each.name for each in now.replicas}
            if killed_at and not present and not gone_after:
                gone_after.append(time.monotonic() - killed_at[0])
            assert not (gone_after and present)
            time.sleep(0.02)

    with ThreadPoolExecutor(10) as pool:
        beside = [pool.submit(load, which) for which in (0, 0, 1, 1)]
        beside += [pool.submit(one_by_one), pool.submit(look)]
        toggling = [pool.submit(toggler, which) for which in (0, 1)]
        try:
            until(lambda: min(toggles) >= TOGGLES // 3 or any(each.done() for each in toggling), 120)
            os.kill(int(victim.split(":")[1]), signal.SIGKILL)
            killed_at.append(time.monotonic())
            statuses = [each.result(300) for each in toggling]
            until(lambda: gone_after or any(each.done() for each in beside), 30)
        finally:
            stop.set()
        assert all(each.result(60) or True for each in beside)
    assert [*statuses[0], *statuses[1]].count(504) <= 4
    assert statuses[0][-1] == statuses[1][-1] == 200
    assert gone_after[0] < LEASE_SECONDS - 1, "Serve knew, and so did an ingress"
    by_replica: dict[str, str] = {}
    assert len(replied) > 20
    for replica, generation in replied:
        assert reaches(generation, by_replica.get(replica, generation)), "an answer of a replica went back"
        by_replica[replica] = generation


def engines_of(service: Service) -> set[str]:
    """Names of the replicas that hold a model: Serve's."""
    status = status_of(f"neuronlens:{service.name}")
    assert status is not None
    return {each.name for each in service.store.replicas.read().replicas if each.name.split(":")[2] in status.replicas}
