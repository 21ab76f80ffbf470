"""A fault costs what it must and no more: one request, one look at the cluster. No cluster is needed to see that."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from ray.serve.schema import ApplicationStatus

from app.parts import engine_limits
from app.settings import Settings
from range_store.embedded import EmbeddedRedis
from tests.range_store.waiting import until
from workers.cluster import fleet, serve_status
from workers.cluster.errors import ClusterError
from workers.cluster.fleet import LEAVING_SECONDS, _SentBack, _Trials
from workers.cluster.messages import Answered, Refused, Wanted
from workers.cluster.metrics import FleetMetrics
from workers.cluster.replica import Replica, ReplicaSettings
from workers.cluster.serve_status import FleetStatus, Watch
from workers.engine.errors import EngineFailed, ReplicaLost
from workers.models.loading import LoadedModel

SECRET = "the striker's secret"  # pragma: allowlist secret


def test_a_request_that_was_long_under_way_is_sent_anew_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: clock.now))
    metrics = FleetMetrics(CollectorRegistry(), lambda: 1, lambda: 1)

    async def trials() -> None:
        made = _Trials(metrics)
        clock.now += 60.0
        for _ in range(2):
            await made.again(_SentBack("it leaves"))
            clock.now += 0.6 * LEAVING_SECONDS
        with pytest.raises(ReplicaLost, match="it leaves"):
            await made.again(_SentBack("it leaves"))

    asyncio.run(trials())


@pytest.fixture
def replica(model: LoadedModel, redis_client: redis.Redis) -> Iterator[Replica]:
    """One that joined, in this process."""
    assert isinstance(redis_client, EmbeddedRedis)
    engine = {"max_batch_tokens": 1024, **engine_limits(Settings())}
    of_model = {"source": model.source, "device": "cpu"}
    made = Replica(ReplicaSettings("faulty", of_model, None, {"url": redis_client.url}, engine, 0.2))
    asyncio.run(made.reconfigure({"fingerprint": model.identity.fingerprint}))
    yield made
    made.__del__()


def test_a_fault_with_one_request_fails_no_other_of_the_same_call(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert replica._engine is not None
    classify = replica._engine.classify

    async def stumbling(texts: Any, *arguments: Any, **named: Any) -> Any:
        if SECRET in texts:
            raise KeyError(SECRET)
        return await classify(texts, *arguments, **named)

    monkeypatch.setattr(replica._engine, "classify", stumbling)
    calls = [Wanted([text], None, False, True, None, None) for text in ("one", SECRET, "two")]
    first, fault, second = asyncio.run(replica.classify(calls)).outcomes
    assert isinstance(first, Answered)
    assert isinstance(second, Answered)
    assert isinstance(fault, Refused)
    assert isinstance(fault.error(), EngineFailed)
    assert SECRET not in str(fault.error())
    said = [each.getMessage() for each in caplog.records if each.name == "workers.cluster.replica"]
    assert said == ["a request failed: KeyError"]


def test_a_watch_that_stumbles_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    told: list[FleetStatus | Exception] = []

    def status(name: str) -> FleetStatus:
        found = told.pop(0) if len(told) > 1 else told[0]
        if isinstance(found, Exception):
            raise found
        return found

    def running(replicas: int) -> FleetStatus:
        return FleetStatus(ApplicationStatus.RUNNING, replicas, 2, frozenset(), frozenset(), None, "RUNNING")

    told += [running(2), ClusterError("it is replaced"), KeyError("replicas"), RuntimeError("changed"), running(1)]
    monkeypatch.setattr(serve_status, "status_of", status)
    monkeypatch.setattr(Watch, "SECONDS", 0.01)
    watch = Watch("neuronlens:news", lambda replica: True)
    assert watch.replicas() == 2
    watch.start()
    until(lambda: watch.replicas() == 1)
    watch.stop()
    assert [each.levelname for each in caplog.records if "stumbled" in each.message] == ["ERROR", "ERROR"]
