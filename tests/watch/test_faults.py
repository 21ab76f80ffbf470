"""A real Prometheus scrapes two live replicas under traffic while the test breaks Redis, the model and a replica.

Each alert fires in its fault and is silent while everything works. Every query of every dashboard and rule gives data
at some time of the run, under the labels that its legend or columns name.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import LABELS
from tests.watch.expressions import Query, queries, selectors
from tests.watch.processes import FAIL_ON_LONG_TEXTS, LONG_TEXT, Redis, Replica
from tests.watch.prometheus import Prometheus, rules
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.fitting.fit import fit
from workers.models.loading import load_model

pytestmark = pytest.mark.full
TEXTS = [text for text, _ in labelled_texts(4000, seed=6) if len(text) < 60][:1024]
TIMEOUT = 180.0


@dataclass
class Watched:
    """What is running, and the alerts that fired in each fault."""

    prometheus: Prometheus
    store: Redis
    small: Replica
    slow: Replica
    began: float
    fired: set[str] = field(default_factory=set)
    ended: float = 0.0

    def during(self, fault: str, alerts: set[str], action: Callable[[], object] = lambda: None) -> None:
        """Repeat the action until all of `alerts` have fired since the fault began."""
        seen: set[str] = set()
        began, give_up = time.time(), time.monotonic() + TIMEOUT
        while not alerts <= seen:
            action()  # may take longer than an alert fires, so the query covers the whole time
            fired = self.prometheus.over('ALERTS{alertstate="firing"}', began, time.time())
            seen |= {labels["alertname"] for labels, _ in fired}
            if time.monotonic() > give_up:
                pytest.fail(f"{fault}: {', '.join(sorted(alerts - seen))} did not fire, only {sorted(seen)}")
            threading.Event().wait(0.2)  # Prometheus evaluates once a second
        self.fired |= alerts

    def recover(self, action: Callable[[], object] = lambda: None) -> None:
        """Repeat the action until both replicas are ready and no alert fires any more."""
        give_up = time.monotonic() + TIMEOUT
        action()
        while not (self.small.ready and self.slow.ready) or self.prometheus.firing():
            action()
            if time.monotonic() > give_up:
                pytest.fail(f"nothing is wrong any more, but alerts fire: {self.prometheus.firing()}")
            threading.Event().wait(0.2)

    def traffic(self) -> None:
        """A little of each kind of request."""
        for replica in (self.small, self.slow):
            replica.classify(TEXTS[:3])
            replica.classify(TEXTS[3], erase=["Sports"], compare=True)
            replica.classify(TEXTS[:4], erase=[{"concept": "World", "top_fraction": 1.0, "layer": 1}, "Business"])
            replica.classify(TEXTS[4], erase=[])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("watched")
    checkpoint = save_tiny("bert", directory / "tiny-news", labels=LABELS)
    with ExitStack() as stack:
        store = Redis(directory)
        stack.callback(lambda: store.kill())
        small = Replica("small", checkpoint, store, directory, max_queue_texts=8, trunk_cache_mb=1)
        stack.callback(lambda: small.kill())
        slow = Replica(
            "slow",
            checkpoint,
            store,
            directory,
            code=FAIL_ON_LONG_TEXTS,
            max_batch_tokens=64,
            max_queue_seconds=600,
            request_timeout=300,
        )
        stack.callback(lambda: slow.kill())
        prometheus = Prometheus(directory, [small.target, slow.target])
        stack.callback(prometheus.stop)
        run = Watched(prometheus, store, small, slow, time.time())
        break_everything(run, checkpoint, directory)
        run.ended = time.time()
        yield run


def break_everything(run: Watched, checkpoint: Path, directory: Path) -> None:
    """Break one thing after the other."""
    corpus = write_jsonl(directory / "train.jsonl", labelled_texts(90, seed=4))
    labels = ("World", "Sports", "Business", "SciTech")
    loaded = load_model(str(checkpoint), device="cpu", name="tiny-news")
    fitted = fit(loaded, load_corpus(str(corpus), labels=labels), layers=(-2, -1), bins=64)
    until(lambda: run.small.alive and run.slow.alive, 180)
    run.during("no range set yet", {"NeuronLensNotReady", "NeuronLensNoReplicaReady"})

    store = run.store.store
    ours = store.range_sets.publish(fitted.range_set, fitted.inspect)
    store.activate(ours)
    until(lambda: run.small.ready and run.slow.ready, 180)
    run.small.http.put("/v1/erasures/Sports", json={"top_fraction": 1.0}).raise_for_status()
    run.small.http.put("/v1/erasures/World", json={"method": "neuron", "enforced": True}).raise_for_status()
    run.small.http.put("/v1/erasures/Sports", json={"top_fraction": 0.5}).raise_for_status()
    run.recover(run.traffic)

    with ThreadPoolExecutor(16) as pool:

        def flood() -> None:
            list(pool.map(lambda n: run.small.classify(TEXTS[n : n + 6]), range(200)))

        run.during("more than a queue holds", {"NeuronLensOverload"}, flood)

        def many() -> None:
            list(pool.map(lambda _: run.slow.classify(TEXTS), range(6)))

        burning = {"NeuronLensQueueWait", "NeuronLensLatencyBurnFast", "NeuronLensLatencyBurnSlow"}
        run.during("a replica that is too slow", burning, many)

    def failing() -> None:
        assert run.slow.classify(LONG_TEXT) == 500
        assert run.small.classify(TEXTS[0], timeout="0.0001") == 504
        assert run.slow.classify("x", erase=["no such concept"]) == 404

    run.during("a model that fails", {"NeuronLensErrors", "NeuronLensModelFails"}, failing)
    run.recover(run.traffic)

    run.store.deny("slow")
    until(lambda: not run.slow.http.get("/readyz").json()["checks"]["store"])
    run.small.http.delete("/v1/erasures/Sports").raise_for_status()
    behind = {"NeuronLensReplicasDisagree", "NeuronLensStoreDown", "NeuronLensSnapshotOld"}
    run.during("a replica that Redis refuses", behind)
    run.store.allow("slow")
    run.recover()

    run.store.process.send_signal(signal.SIGSTOP)
    run.during("a Redis that hangs", {"NeuronLensSnapshotOld"})
    run.store.process.send_signal(signal.SIGCONT)
    run.recover()

    run.store.kill()

    def toggle() -> None:
        assert run.small.http.put("/v1/erasures/Sports", json={}).status_code == 503
        assert run.small.classify(TEXTS[0]) == 200

    run.during("a Redis that is gone", {"NeuronLensStoreDown"}, toggle)
    run.store.start()
    run.store.allow("small")
    run.store.allow("slow")
    run.recover()

    run.store.client.flushall()
    run.during("a Redis that came back empty", {"NeuronLensLiveStateLost"})
    assert store.range_sets.publish(fitted.range_set, fitted.inspect) == ours
    store.activate(ours)
    run.recover()
    until(
        lambda: [live.concept for live in store.live_state().erasures] == ["World"]
    )  # the replicas restore what was erased

    store.set_erasures([])
    foreign, inspect = random_range_set(1)
    store.activate(store.range_sets.publish(foreign, inspect))
    run.during("a range set of another model", {"NeuronLensRangeSetRefused"})
    store.activate(ours)
    store.set_erasure(LiveErasure(erasure=Erasure(concept="Sports")))
    run.recover()

    run.slow.kill()
    run.during("a replica that was killed", {"NeuronLensDown"})
    run.slow.start()
    until(lambda: run.slow.ready, 180)
    run.during("a replica that starts again", {"NeuronLensRestarting"})

    run.prometheus.watch([])
    run.during("no replica to be found", {"NeuronLensAbsent", "NeuronLensNoReplicaReady"})


def test_every_alert_fired_in_its_fault(watched: Watched) -> None:
    of_a_fleet = {name for name, rule in rules("alert").items() if "neuronlens_fleet" in rule["expr"]}
    assert watched.fired == rules("alert").keys() - of_a_fleet


@pytest.mark.parametrize("query", [each for each in queries() if not each.reads_fleet], ids=str)
def test_every_query_gave_data(watched: Watched, query: Query) -> None:
    """Each series that the query reads exists too, so `or` hides no missing metric."""
    where = f"{query.where}: {query.expr}"
    for selector in selectors(query.expr):
        assert watched.prometheus.over(selector, watched.began, watched.ended), f"{where}: nothing writes {selector}"
    found = watched.prometheus.over(query.expr, watched.began, watched.ended)
    numbers = [value for _, values in found for value in values if math.isfinite(value)]
    assert numbers, f"{where}: no data"
    missing = query.labels - {name for labels, _ in found for name in labels}
    assert not missing, f"{where}: shows {', '.join(sorted(missing))}, but no series has it"
    if query.share:
        assert max(numbers) <= 1.5, f"{where}: a share of {max(numbers)}"  # few scrapes make rates inexact
        assert min(numbers) >= 0, where


@pytest.mark.parametrize("expr", ["rate(neuronlens_imagined_total[4s]) or vector(0)", "neuronlens_ready > 1"])
def test_query_without_data_is_noticed(watched: Watched, expr: str) -> None:
    with pytest.raises(AssertionError, match=r"nothing writes neuronlens_imagined_total|no data"):
        test_every_query_gave_data(watched, Query("a panel", expr))


def test_both_replicas_have_their_own_series(watched: Watched) -> None:
    found = watched.prometheus.over("neuronlens_generation", watched.began, watched.ended)
    assert {labels["instance"] for labels, _ in found} == {watched.small.target, watched.slow.target}
