"""A fault in a fleet fails one request or one look at the cluster, and nothing else. These tests need no cluster."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from ray.serve.schema import ApplicationStatus

from app.serving.service import engine_limits
from app.settings import Settings
from range_store.embedded.connection import EmbeddedRedis
from tests.range_store.waiting import until
from workers.cluster import fleet, serve_status
from workers.cluster.calls import ReturnedUnread
from workers.cluster.errors import ClusterError
from workers.cluster.fleet import RETURNED_SECONDS, Retries
from workers.cluster.messages import PackedAnswer, PackedError, RemoteRequest
from workers.cluster.metrics import FleetMetrics
from workers.cluster.replica import EngineReplica, ReplicaSettings
from workers.cluster.serve_status import FleetStatus, FleetWatch
from workers.engine.errors import EngineFailed, ReplicaLost
from workers.models.loading import LoadedModel

SECRET = "the striker's secret"  # pragma: allowlist secret


def test_returned_request_is_retried_however_long_it_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: clock.now))
    metrics = FleetMetrics(CollectorRegistry(), lambda: 1, lambda: 1)

    async def send_back() -> None:
        retries = Retries(metrics)
        clock.now += 60.0
        for _ in range(2):
            await retries.wait(ReturnedUnread("it drains"))
            clock.now += 0.6 * RETURNED_SECONDS
        with pytest.raises(ReplicaLost, match="it drains"):
            await retries.wait(ReturnedUnread("it drains"))

    asyncio.run(send_back())


@pytest.fixture
def replica(model: LoadedModel, redis_client: redis.Redis) -> Iterator[EngineReplica]:
    """A replica that has joined its fleet, in this process."""
    assert isinstance(redis_client, EmbeddedRedis)
    engine = {"max_batch_tokens": 1024, **engine_limits(Settings())}
    of_model = {"source": model.source, "device": "cpu"}
    made = EngineReplica(ReplicaSettings("faulty", of_model, None, {"url": redis_client.url}, engine, 0.2))
    asyncio.run(made.reconfigure({"fingerprint": model.identity.fingerprint}))
    yield made
    made.__del__()


def test_fault_in_one_request_fails_no_other_of_the_same_call(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert replica._loaded is not None
    engine = replica._loaded.engine
    classify = engine.classify

    async def failing(texts: Any, *arguments: Any, **named: Any) -> Any:
        if SECRET in texts:
            raise KeyError(SECRET)
        return await classify(texts, *arguments, **named)

    monkeypatch.setattr(engine, "classify", failing)
    calls = [RemoteRequest([text], None, False, True, None, None) for text in ("one", SECRET, "two")]
    first, fault, second = asyncio.run(replica.classify(calls)).outcomes
    assert isinstance(first, PackedAnswer)
    assert isinstance(second, PackedAnswer)
    assert isinstance(fault, PackedError)
    assert isinstance(fault.unpack(), EngineFailed)
    assert SECRET not in str(fault.unpack())
    logged = [each.getMessage() for each in caplog.records if each.name == "workers.cluster.replica"]
    assert logged == ["a request failed: KeyError"]


def test_watch_continues_after_an_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[FleetStatus | Exception] = []

    def status(name: str) -> FleetStatus:
        found = seen.pop(0) if len(seen) > 1 else seen[0]
        if isinstance(found, Exception):
            raise found
        return found

    def running(replicas: int) -> FleetStatus:
        return FleetStatus(ApplicationStatus.RUNNING, replicas, 2, 0, frozenset(), frozenset(), None, "RUNNING")

    seen += [running(2), ClusterError("it is replaced"), KeyError("replicas"), RuntimeError("changed"), running(1)]
    monkeypatch.setattr(serve_status, "fleet_status", status)
    monkeypatch.setattr(FleetWatch, "SECONDS", 0.01)
    watch = FleetWatch("neuronlens:news", lambda replica: True)
    assert watch.replicas() == 2
    watch.start()
    until(lambda: watch.replicas() == 1)
    watch.stop()
    assert [each.levelname for each in caplog.records if "could not be read" in each.message] == ["ERROR", "ERROR"]
