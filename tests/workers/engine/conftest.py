"""Engines on a real Redis and tiny models with fitted ranges."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry

from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.workers.checkpoints import LABELS
from tests.workers.engine.running import Running
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.engine.engine import Engine
from workers.engine.settings import EngineSettings
from workers.fitting.fit import FitResult, fit
from workers.models.loading import LoadedModel

Tiny = Callable[[str], LoadedModel]


@pytest.fixture(scope="module")
def fitted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FitResult]:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", labelled_texts(80, seed=1))
    cache: dict[str, FitResult] = {}

    def of(family: str) -> FitResult:
        if family not in cache:
            cache[family] = fit(tiny(family), load_corpus(str(path), labels=LABELS), layers="all")
        return cache[family]

    return of


@pytest.fixture
def start(
    redis_client: redis.Redis, tiny: Tiny, fitted: Callable[[str], FitResult]
) -> Iterator[Callable[..., Running]]:
    """`start(family, **settings)` starts an engine with a store of its own."""
    running: list[Running] = []

    def make(family: str = "bert", publish: bool = True, **limits: Any) -> Running:
        model = tiny(family)
        store = RangeStore(redis_client, f"{family}-{uuid.uuid4().hex}")
        if publish:
            store.activate(store.range_sets.publish(fitted(family).range_set, fitted(family).inspect))
        mirror = Mirror(store, model.identity.fingerprint, poll=0.2)
        mirror.start()
        mirror.refresh()
        registry = CollectorRegistry()
        engine = Engine(model, mirror, EngineSettings(**limits), registry)
        engine.start()
        running.append(Running(engine, store, mirror, fitted(family).range_set, model, registry))
        return running[-1]

    yield make
    for each in running:
        each.engine.close()
        each.mirror.close()
