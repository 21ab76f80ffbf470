"""A real Prometheus watches a fleet: it finds the replicas by itself, and every panel and alert has its data."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.range_store.waiting import until
from tests.servers import LABELS
from tests.watch.expressions import Query, queries, selectors
from tests.watch.processes import LOSE_REQUESTS, NAME, Redis, Replica
from tests.watch.prometheus import Prometheus
from tests.watch.test_faults import TEXTS
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.fitting.fit import fit
from workers.models.loading import load_model

pytestmark = pytest.mark.full


@dataclass
class Watched:
    """A fleet of two replicas under traffic: one replica is killed, then a request is lost."""

    prometheus: Prometheus
    began: float
    killed: str
    ended: float = 0.0


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("fleet")
    checkpoint = save_tiny("bert", directory / "tiny-news", labels=LABELS)
    corpus = write_jsonl(directory / "train.jsonl", labelled_texts(90, seed=4))
    loaded = load_model(str(checkpoint), device="cpu", name="tiny-news")
    labels = ("World", "Sports", "Business", "SciTech")
    fitted = fit(loaded, load_corpus(str(corpus), labels=labels), layers=(-2, -1), bins=64)
    with ExitStack() as stack:
        store = Redis(directory)
        stack.callback(lambda: store.kill())
        store.store.activate(store.store.range_sets.publish(fitted.range_set, fitted.inspect))
        ingress = Replica(
            "ingress",
            checkpoint,
            store,
            directory,
            code=LOSE_REQUESTS,
            ray="local",
            replicas=2,
            trunk_cache_mb=1,
        )
        stack.callback(ingress.kill)
        stack.callback(ingress.stop)  # its cluster ends with it
        prometheus = Prometheus(directory, [ingress.target], ingress.target)
        stack.callback(prometheus.stop)
        until(lambda: ingress.ready, 240)
        run = Watched(prometheus, time.time(), "")

        def traffic() -> None:
            assert ingress.classify(TEXTS[:3]) == 200
            assert ingress.classify(TEXTS[3], erase=["Sports"], compare=True) == 200
            assert ingress.classify(TEXTS[:4], erase=["World"]) == 200
            assert ingress.classify(TEXTS[4], erase=[]) == 200

        def engines() -> set[str]:
            traffic()
            now = time.time()
            return {labels["replica"] for labels, _ in prometheus.over('up{replica!=""} == 1', now, now)}

        ingress.http.put("/v1/erasures/Sports", json={"top_fraction": 1.0}).raise_for_status()
        until(lambda: len(engines()) == 2, 60)
        first = engines()
        ingress.http.put("/v1/erasures/World", json={}, params={"wait": "all"}).raise_for_status()
        run.killed = min(first)
        weights = checkpoint / "model.safetensors"
        aside = weights.rename(directory / "aside")  # without weights no replica can replace it
        os.kill(int(run.killed.split(":")[1]), signal.SIGKILL)
        until(lambda: "NeuronLensFleetShort" in prometheus.firing(), 60)
        aside.rename(weights)
        until(lambda: run.killed not in engines() and len(engines()) == 2, 240)
        until(lambda: not prometheus.firing(), 60)
        lose = directory / "ingress" / "lose"
        lose.parent.mkdir(exist_ok=True)
        lose.touch()
        assert ingress.classify(TEXTS[0]) == 503
        until(lambda: "NeuronLensRequestsLost" in prometheus.firing(), 60)
        fired = time.time()
        until(lambda: time.time() > fired + 2)  # queries look at whole seconds
        run.ended = time.time()
        yield run


def test_engine_metrics_are_labelled_by_model_node_and_replica(watched: Watched) -> None:
    found = watched.prometheus.over("neuronlens_texts_total", watched.began, watched.ended)
    assert {labels["model"] for labels, _ in found} == {NAME}
    assert not any("exported_model" in labels for labels, _ in found)
    assert len({labels["replica"] for labels, _ in found}) == 3, "two replicas and a replacement"
    assert all(labels["replica"].startswith(labels["node"]) for labels, _ in found)
    by_replica = {labels["instance"] for labels, values in found if max(values) > 0}
    assert len(by_replica) == 3
    both = watched.prometheus.over("count(neuronlens_generation)", watched.ended - 1, watched.ended)
    assert both[0][1][-1] == 3, "an ingress and two replicas"


def test_killed_replica_is_no_longer_a_target(watched: Watched) -> None:
    ((_, values),) = watched.prometheus.over('count(up{replica!=""})', watched.ended - 1, watched.ended)
    assert values[-1] == 2
    assert not watched.prometheus.over(f'up{{replica="{watched.killed}"}}', watched.ended, watched.ended)


@pytest.mark.parametrize("query", [each for each in queries() if each.reads_fleet], ids=str)
def test_every_query_about_fleets_gave_data(watched: Watched, query: Query) -> None:
    found = watched.prometheus.over(query.expr, watched.began, watched.ended)
    assert [value for _, values in found for value in values if math.isfinite(value)], query.expr
    assert not query.labels - {name for labels, _ in found for name in labels}, query.expr


def test_every_series_of_panels_and_alerts_exists_on_a_fleet(watched: Watched) -> None:
    names = {name.partition("{")[0] for each in queries() for name in selectors(each.expr)}
    there = {
        name for name in names if watched.prometheus.over(f"last_over_time({name}[10m])", watched.ended, watched.ended)
    }
    assert names - there == set()
