"""Toggles at two ingresses at once, over a fleet under load that loses a replica."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from app.serving.service import Service
from range_store.domain.live import is_at_least
from range_store.embedded.connection import EmbeddedRedis
from tests.e2e.cluster.conftest import activated, pids
from tests.processes import Running
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts
from workers.cluster.messages import PackedAnswer
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

pytestmark = pytest.mark.full
TEXTS = [text for text, _ in labelled_texts(32, seed=9)]
TOGGLES = 24
"""At each ingress; a third of them before the replica is killed."""
PATIENT = {"max_queue_seconds": 600.0}
HOUR = 3600.0


@pytest.fixture(scope="module")
def fleet(open_services: Callable[..., list[Service]], fitted: FitResult) -> Service:
    """A fleet of three replicas; its ingress is in this process."""
    return activated(open_services("storm", replicas=3, **PATIENT)[0], fitted)


@pytest.fixture(scope="module")
def ingresses(
    fleet: Service,
    cluster: str,
    redis_client: redis.Redis,
    model: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[str]]:
    """URLs of two more ingresses, each a process of its own."""
    assert isinstance(redis_client, EmbeddedRedis)
    command = ["serve", "--model", model.source, "--name", "storm", "--threads", "1", "--device", "cpu", "--port", "0"]
    command += ["--ray", cluster, "--redis-url", redis_client.url]
    environment = {"NEURONLENS_POLL_SECONDS": "0.2", "NEURONLENS_MAX_QUEUE_SECONDS": "600"}
    started = [
        Running([*command, "--data-dir", tmp_path_factory.mktemp("ingress")], environment=environment) for _ in range(2)
    ]
    try:
        yield [each.says(each.stdout, "serving storm at ").split()[-1] for each in started]
    finally:
        for each in started:
            each.process.send_signal(signal.SIGTERM)
        for each in started:
            each.end()


def test_toggles_reach_every_replica_while_one_is_killed(
    fleet: Service, ingresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = fleet.store.replicas.read
    until(lambda: len(roster().replicas) == 6)  # three replicas and three ingresses
    victim = min(pids(fleet).values())
    toggles = [0, 0]
    stop = threading.Event()

    def toggle(which: int) -> None:
        """Switch a concept on and off, and classify at both ingresses after each change."""
        with (
            httpx.Client(base_url=ingresses[which], timeout=120) as own,
            httpx.Client(base_url=ingresses[1 - which], timeout=120) as other,
        ):
            for step in range(TOGGLES):
                change = own.put if step % 2 == 0 else own.delete
                url = f"/v1/erasures/{('Sports', 'World')[which]}"
                reply = change(url, params={"wait": "all", "wait_seconds": 60})
                assert reply.status_code == 200, reply.text
                generation = reply.json()["generation"]
                assert not roster().missing(generation)
                for client in (own, other):
                    asked = {"inputs": TEXTS[step % 32], "min_generation": generation}
                    answer = client.post("/v1/classify", json=asked)
                    assert answer.status_code == 200, answer.text
                    assert is_at_least(answer.json()["erasure"]["generation"], generation)
                toggles[which] = step + 1

    def load(which: int) -> None:
        """Classify under the live erasures, one request after the other."""
        sent = 0
        with httpx.Client(base_url=ingresses[which], timeout=120) as client:
            while not stop.is_set():
                answer = client.post("/v1/classify", json={"inputs": TEXTS[sent % 28 : sent % 28 + 4]})
                assert answer.status_code == 200, answer.text
                sent += 1

    generations: list[tuple[str, str]] = []
    """Replica and generation of each answer at the ingress of this process, in the order of admission."""
    calls = fleet.engine.calls  # type: ignore[attr-defined]
    call = calls.call

    async def recorded(method: str, *arguments: Any) -> Any:
        reply = await call(method, *arguments)
        generations.extend(
            (reply.replica, each.generation) for each in reply.outcomes if isinstance(each, PackedAnswer)
        )
        return reply

    monkeypatch.setattr(calls, "call", recorded)

    def one_by_one() -> None:
        async def ask() -> None:
            while not stop.is_set():
                await fleet.engine.classify(TEXTS[:1], None)

        asyncio.run(ask())

    def watch_roster() -> None:
        """What a replica reports never goes back, and the killed replica does not come back."""
        seen: dict[str, str] = {}
        forgotten = False
        while not stop.wait(0.02):
            now = roster()
            for each in now.replicas:
                if each.generation is not None:
                    assert is_at_least(each.generation, seen.get(each.name, each.generation)), each
                    seen[each.name] = each.generation
            present = victim in {each.name for each in now.replicas}
            assert not (forgotten and present)
            forgotten = not present

    with ThreadPoolExecutor(10) as pool:
        beside = [pool.submit(load, which) for which in (0, 0, 1, 1)]
        beside += [pool.submit(one_by_one), pool.submit(watch_roster)]
        toggling = [pool.submit(toggle, which) for which in (0, 1)]
        try:
            until(lambda: min(toggles) >= TOGGLES // 3 or any(each.done() for each in toggling), 240)
            kill(fleet, victim)
            for each in toggling:
                each.result(300)
            until(lambda: len(generations) > 20 or any(each.done() for each in beside))
        finally:
            stop.set()
        for each in beside:
            each.result(60)
    assert victim not in {each.name for each in roster().replicas}, "an ingress removed its report"
    last: dict[str, str] = {}
    for replica, generation in generations:
        assert is_at_least(generation, last.get(replica, generation)), "an answer of a replica went back"
        last[replica] = generation


def kill(service: Service, replica: str) -> None:
    """Kill a replica whose report would hold for an hour: toggles wait until somebody sees that the process ended."""
    pid = int(replica.split(":")[1])
    os.kill(pid, signal.SIGSTOP)  # it does not renew its report any more
    (held,) = [each for each in service.store.replicas.read().replicas if each.name == replica]
    service.store.replicas.report(replica, held.generation, held.range_set, HOUR, held.metrics)
    os.kill(pid, signal.SIGKILL)
