"""Two fleets on one cluster: names, live erasures, queues, autoscaling, and a checkpoint that changes."""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.serving.service import Service
from tests.e2e.cluster.conftest import activated, pids
from tests.e2e.on_ray import over_http
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts
from workers.cluster import launching
from workers.cluster.errors import ClusterError
from workers.cluster.launching import fleet_names
from workers.cluster.serve_status import fleet_status
from workers.engine.answers import Answer
from workers.engine.errors import QueueFull, ReplicaLost
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

pytestmark = pytest.mark.full
QUICK = {
    "upscale_delay_s": 0.2,
    "downscale_delay_s": 0.5,
    "look_back_period_s": 1.0,
    "metrics_interval_s": 0.2,
    "target_tokens": 500.0,
}
TEXTS = [text for text, _ in labelled_texts(64, seed=3)]


@pytest.fixture(scope="module")
def checkpoint(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint of the model, which a test changes."""
    return Path(shutil.copytree(model.source, tmp_path_factory.mktemp("changing") / "tiny"))


Opening = Callable[[], list[Service]]


@pytest.fixture(scope="module")
def ingress(
    open_services: Callable[..., list[Service]], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Opening:
    """Opens an ingress of two models, each with one or two replicas and a short queue."""
    other = save_tiny("distilbert", tmp_path_factory.mktemp("other") / "other", labels=("Cats", "Dogs"))
    return lambda: open_services(
        "first",
        scaling=QUICK,
        model=str(checkpoint),
        also=(f"second={other}",),
        replicas="auto",
        max_replicas=2,
        max_queue_texts=512,
    )


@pytest.fixture(scope="module")
def both(ingress: Opening, fitted: FitResult) -> list[Service]:
    """The first ingress."""
    services = ingress()
    activated(services[0], fitted)
    return services


def test_each_model_has_its_own_live_erasures(both: list[Service], ingress: Opening) -> None:
    with over_http(both) as http, over_http(ingress()) as other_ingress:
        switched = http.put("/v1/erasures/Sports?wait=all&wait_seconds=50", json={"top_fraction": 1.0})
        assert switched.status_code == 200, switched.text
        generation = switched.json()["generation"]
        for asking in (http, other_ingress):
            asked = {"inputs": TEXTS[:2], "min_generation": generation}
            first = asking.post("/v1/classify", json={**asked, "model": "first"}).json()
            assert (first["model"], first["erasure"]["concepts"], first["erasure"]["generation"]) == (
                "first",
                ["Sports"],
                generation,
            )
            second = asking.post("/v1/classify", json={"inputs": TEXTS[:2], "model": "second"}).json()
            assert (second["model"], second["erasure"]["concepts"]) == ("second", [])
            assert {each["label"] for each in second["results"]} <= {"Cats", "Dogs"}
        later = generation.rsplit("-", 1)[0] + "-999"
        behind = http.post(
            "/v1/classify",
            json={"inputs": "x", "model": "first", "min_generation": later},
            headers={"X-Request-Timeout": "30"},
        )
        assert (behind.status_code, behind.json()["code"]) == (503, "behind")
        roster = http.get("/v1/replicas?model=first").json()
        assert all(each["current"] for each in roster["replicas"])
        assert http.delete("/v1/erasures/Sports?wait=all&wait_seconds=50").status_code == 200


def test_full_fleet_refuses_requests_with_a_retry_time(both: list[Service]) -> None:
    engine = both[1].engine

    async def flood() -> list[Any]:
        wanted = (engine.classify(TEXTS, []) for _ in range(80))
        return list(await asyncio.gather(*wanted, return_exceptions=True))

    answers = asyncio.run(flood())
    refused = [each for each in answers if isinstance(each, QueueFull)]
    answered = [each for each in answers if isinstance(each, Answer)]
    assert len(refused) + len(answered) == 80
    assert refused
    assert answered
    assert all(each.retry_after >= 1.0 for each in refused)
    assert all(len(each.texts) == len(TEXTS) for each in answered)
    assert isinstance(asyncio.run(engine.classify(["again"], [])), Answer)


def test_fleet_scales_up_under_load_and_down_afterwards(both: list[Service]) -> None:
    engine, registry = both[0].engine, both[0].registry

    def two_are_seen() -> bool:
        return registry.get_sample_value("neuronlens_fleet_replicas") == 2.0 and len(pids(both[0])) == 2

    async def load() -> None:
        async def client() -> None:
            while not two_are_seen():
                try:
                    await engine.classify(TEXTS, [])
                except QueueFull:
                    await asyncio.sleep(0.05)

        await asyncio.wait_for(asyncio.gather(*(client() for _ in range(12))), 300)

    asyncio.run(load())
    until(lambda: running("first") == 1, 120)
    until(lambda: len(pids(both[0])) == 1, 120)


def test_replica_of_a_changed_checkpoint_never_joins(both: list[Service], checkpoint: Path, tmp_path: Path) -> None:
    before = asyncio.run(both[0].engine.classify(TEXTS[:4], []))
    kept = Path(shutil.copytree(checkpoint, tmp_path / "kept"))
    others = save_tiny("bert", tmp_path / "others", labels=both[0].model.identity.labels, seed=7)
    shutil.copy(others / "model.safetensors", checkpoint)
    (victim,) = pids(both[0])
    seen: set[int] = set()

    def two_have_failed() -> bool:
        now = replica_processes("first") - {victim}
        seen.update(now)
        return len(seen - now) >= 2

    os.kill(victim, signal.SIGKILL)
    until(two_have_failed, 240)
    until(lambda: not both[0].engine.ready)
    with pytest.raises((ReplicaLost, TimeoutError)):
        asyncio.run(asyncio.wait_for(both[0].engine.classify(TEXTS[:4], []), 2))
    shutil.copy(kept / "model.safetensors", checkpoint)
    until(lambda: both[0].engine.ready, 180)
    after = asyncio.run(both[0].engine.classify(TEXTS[:4], []))
    assert [text.logits.tolist() for text in after.texts] == [text.logits.tolist() for text in before.texts]


def test_fleet_without_room_says_how_much_is_missing(
    both: list[Service],
    open_services: Callable[..., list[Service]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launching, "WARN_SECONDS", 0.2)
    monkeypatch.setattr(launching, "START_SECONDS", 1.0)
    with pytest.raises(ClusterError, match=r"^no replica of the fleet of 'large' started within 1 s: "):
        open_services("large", threads=17, drain_seconds=1)  # more than a node has
    (message,) = [each for each in caplog.messages if "wait for resources" in each]
    until(lambda: "large" not in fleet_names(), 60)
    free = r"\d+ CPUs and 0 GPUs are free on all .*"
    assert re.fullmatch(f"0 of 1 replicas run, others wait for resources: each needs 17 CPUs, {free}", message)


def running(name: str) -> int:
    """Number of replicas that take requests."""
    status = fleet_status(f"neuronlens:{name}")
    return status.running if status is not None else 0


def replica_processes(name: str) -> set[int]:
    """Process ids of the replicas of a fleet, including those that have not joined."""
    title = f"ServeReplica:neuronlens:{name}:"
    return {each.pid for each in psutil.process_iter(["cmdline"]) if title in "".join(each.info["cmdline"] or ())}
