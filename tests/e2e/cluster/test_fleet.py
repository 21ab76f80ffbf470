"""A fleet of two replicas on two nodes answers as the engine of one process does, also when a replica is killed."""

import asyncio
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.schemas.replies import TargetsOut
from app.serving.logged_replica import LoggedReplica
from app.serving.metrics import targets_of
from app.serving.service import Service
from range_store.domain.erasure import Erasure, Method
from range_store.domain.live import LiveErasure
from range_store.errors import NotFitted, UnknownConcept
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import Roster
from tests.e2e.cluster.conftest import activated, pids
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts
from workers.cluster.errors import OtherFleet
from workers.cluster.messages import CallReply, RemoteRequest
from workers.engine.answers import Answer
from workers.engine.engine import Engine
from workers.engine.errors import DeadlineExceeded, RequestTooLarge
from workers.engine.settings import EngineSettings
from workers.fitting.fit import FitResult
from workers.models.errors import TextTooLong
from workers.models.loading import LoadedModel

pytestmark = pytest.mark.full
TOLERANCE = 2e-4
"""Largest difference of a logit of the same text in two batches."""
PATIENT = {"max_queue_seconds": 600.0}
"""No request is refused because the machine is slow."""
TEXTS = [text for text, _ in labelled_texts(60, seed=12)]
METRICS_PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
CONCEPTS = ("World", "Sports", "Business", "Sci/Tech", "Météo & co")


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: the next engine that receives several requests in one call renames it and stops itself."""
    return tmp_path_factory.mktemp("stopping") / "stops"


@pytest.fixture(scope="module")
def fleet(open_services: Callable[..., list[Service]], fitted: FitResult, stops: Path) -> Service:
    """Two replicas, one on each node."""

    class Stopping(LoggedReplica):
        async def classify(self, wanted: Sequence[RemoteRequest]) -> CallReply:
            if len(wanted) > 1:
                with suppress(FileNotFoundError):
                    stops.rename(stops.with_suffix(f".{os.getpid()}"))
                    os.kill(os.getpid(), signal.SIGSTOP)
            return await super().classify(wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.serving.fleet.LoggedReplica", Stopping)
        service = activated(open_services("two", replicas=2, **PATIENT)[0], fitted)
        until(lambda: len(pids(service)) == 2 and not behind(service), 300)
        return service


def behind(service: Service) -> tuple[str, ...]:
    """Names of the replicas that do not report the live generation."""
    return roster(service).missing(service.store.live_state().generation)


@pytest.fixture
def engine(fleet: Service, model: LoadedModel) -> Iterator[Engine]:
    """An engine in this process, on the same store."""
    mirror = Mirror(fleet.store, model.identity.fingerprint, poll=0.2)
    mirror.start()
    made = Engine(model, mirror, EngineSettings(**PATIENT), CollectorRegistry())
    made.start()
    yield made
    made.close()
    mirror.close()


def random_request(
    rng: random.Random, methods: Sequence[Method] = ("range", "neuron")
) -> tuple[list[Any], list[Erasure] | None, bool]:
    texts: list[Any] = rng.sample(TEXTS, rng.choice((1, 1, 2, 8)))
    if rng.random() < 0.2:
        texts = [(text, rng.choice(TEXTS)) for text in texts]
    erasures = [
        Erasure(
            concept=concept,
            method=rng.choice(methods),
            tau=rng.choice([0.5, 2.5]),
            top_fraction=rng.choice([0.3, 1.0]),
            layers=rng.choice([(-1,), (-2, -1)]),
            replacement=rng.choice(["zero", "mean"]),
        )
        for concept in rng.sample(CONCEPTS, rng.randrange(0, 3))
    ]
    return texts, rng.choice((None, erasures, erasures)), rng.random() < 0.5


def same(one: Answer, other: Answer) -> bool:
    """Whether both answers agree, within what two batches of the same text may differ by."""
    assert (one.source, one.erasures, one.enforced, one.range_set) == (
        other.source,
        other.erasures,
        other.enforced,
        other.range_set,
    )
    assert len(one.texts) == len(other.texts)
    near = True
    for a, b in zip(one.texts, other.texts, strict=True):
        assert (a.tokens, a.truncated, a.baseline is None) == (b.tokens, b.truncated, b.baseline is None)
        near &= a.masked_neurons == b.masked_neurons and bool(np.abs(a.logits - b.logits).max() <= TOLERANCE)
        if a.baseline is not None and b.baseline is not None:
            near &= bool(np.abs(a.baseline - b.baseline).max() <= TOLERANCE)
    return near


async def all_of(answerer: Any, requests: list[Any]) -> list[Answer]:
    return list(
        await asyncio.gather(*(answerer.classify(texts, erase, compare=compare) for texts, erase, compare in requests))
    )


def test_fleet_answers_as_one_engine_does(fleet: Service, engine: Engine) -> None:
    requests = [random_request(random.Random(seed)) for seed in range(120)]
    expected = asyncio.run(all_of(engine, requests))
    # a state within rounding of a bound of a range may be inside in one batch and outside in another
    differ = [not same(*pair) for pair in zip(asyncio.run(all_of(fleet.engine, requests)), expected, strict=True)]
    assert sum(differ) <= 2
    calls = fleet.registry.get_sample_value("neuronlens_fleet_call_requests_count")
    assert calls is not None
    assert calls < 120 / 2, "requests that arrive together are sent in one call"


def metrics_of(target: TargetsOut) -> list[Metric]:
    return list(text_string_to_metric_families(httpx.get(f"http://{target.targets[0]}/metrics", timeout=60).text))


def sum_of(name: str, families: list[Metric]) -> float:
    return sum(each.value for family in families for each in family.samples if each.name == name)


def test_replicas_serve_the_metrics_of_their_engines(fleet: Service) -> None:
    """Together with the metrics of the ingress these are all metrics, none of them twice."""
    found = targets_of([fleet])
    assert {each.labels["replica"] for each in found} == set(pids(fleet).values())
    before, names = sum(sum_of("neuronlens_texts_total", metrics_of(target)) for target in found), set()
    asyncio.run(all_of(fleet.engine, [([text], [], False) for text in TEXTS]))
    texts = 0.0
    for target in found:
        families = metrics_of(target)
        names |= {family.name for family in families}
        of_model = [each for family in families for each in family.samples if each.name.startswith("neuronlens")]
        assert {each.labels["model"] for each in of_model if "build_info" not in each.name} == {"two"}
        texts += sum_of("neuronlens_texts_total", families)
        (generation,) = [each.value for each in of_model if each.name == "neuronlens_generation"]
        assert fleet.mirror.snapshot is not None
        assert generation == fleet.mirror.snapshot.live.counter
        assert any(family.name == "process_resident_memory_bytes" for family in families)
    assert texts - before == len(TEXTS)
    rows = re.findall(r"^\| `(neuronlens_\w+)`", METRICS_PAGE.read_text("utf-8"), re.MULTILINE)
    documented = {name.removesuffix("_total") for name in rows}
    assert {name for name in names if name.startswith("neuronlens")} <= documented
    assert {"neuronlens_forward_seconds", "neuronlens_queue_tokens", "neuronlens_live_erasures"} <= names
    assert not {"neuronlens_rejections", "neuronlens_ready"} & names, "the ingress counts these"


def test_errors_of_a_replica_reach_only_their_own_request(fleet: Service) -> None:
    async def ask() -> list[Any]:
        answering = fleet.engine.classify
        requests = (
            answering(["fine"], []),
            answering(["x"], [Erasure(concept="Weather")]),
            answering(["x"], [Erasure(concept="Sports", layers=(0,))]),
            answering(["a " * 100], [], truncate=False),
            answering(["x"] * 16385, []),
            answering(["fine too"], []),
            answering(["late"], [], timeout=1e-9),
        )
        return list(await asyncio.gather(*requests, return_exceptions=True))

    fine, unknown, missing, too_long, too_large, too, late = asyncio.run(ask())
    assert isinstance(fine, Answer)
    assert isinstance(too, Answer)
    assert isinstance(unknown, UnknownConcept)
    assert (unknown.concept, unknown.known) == ("Weather", list(fleet_concepts(fleet)))
    assert isinstance(missing, NotFitted)
    assert missing.fitted == [1, 2]
    assert isinstance(too_long, TextTooLong)
    assert (too_long.index, too_long.limit) == (0, fleet.model.max_tokens)
    assert isinstance(too_large, RequestTooLarge)
    assert isinstance(late, DeadlineExceeded)


def fleet_concepts(fleet: Service) -> tuple[str, ...]:
    assert fleet.mirror.snapshot is not None
    assert fleet.mirror.snapshot.range_set is not None
    return tuple(fleet.mirror.snapshot.range_set.concepts)


def test_cancelled_request_cancels_no_other(fleet: Service) -> None:
    async def ask() -> list[Any]:
        tasks = [asyncio.ensure_future(fleet.engine.classify([text], [])) for text in TEXTS]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    answers = asyncio.run(ask())
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    assert all(isinstance(answer, Answer) for answer in answers[1::2])


def test_fleet_shows_the_tokens_and_states_of_one_engine(fleet: Service, engine: Engine) -> None:
    async def look(looker: Any) -> Any:
        return await looker.tokens(TEXTS[:3]), await looker.states(TEXTS[:3], 1)

    (tokens, states), (own, own_states) = asyncio.run(look(fleet.engine.inspector)), asyncio.run(look(engine.inspector))
    assert tokens == own
    np.testing.assert_allclose(states, own_states, atol=1e-5)


def test_ingress_answers_under_its_own_change_at_once(fleet: Service) -> None:
    async def ask() -> list[Answer]:
        return list(await asyncio.gather(*(fleet.engine.classify([text], None) for text in TEXTS[:8])))

    for top_fraction in (0.1, 0.2, 0.3, 0.4, 0.5):
        live = LiveErasure(erasure=Erasure(concept="Sports", top_fraction=top_fraction))
        generation = fleet.store.set_erasure(live).generation
        fleet.mirror.refresh()  # as a route does after its change; it does not wait for the replicas
        assert {answer.generation for answer in asyncio.run(ask())} == {generation}
    fleet.store.set_erasures([])
    fleet.mirror.refresh()


def roster(service: Service) -> Roster:
    return service.store.replicas.read()


def test_killed_replica_loses_no_request(fleet: Service, engine: Engine, stops: Path) -> None:
    # neuron masking only: it has no bounds that a state could be within rounding of
    requests = [random_request(random.Random(seed), ["neuron"]) for seed in range(40)]
    long: Any = (TEXTS * 8, None, True)  # long enough for a call of its own, and short enough for one queue
    whole, *expected = asyncio.run(all_of(engine, [long, *requests]))
    retried = fleet.registry.get_sample_value("neuronlens_fleet_retried_total") or 0.0
    stops.touch()

    async def storm() -> tuple[int, list[list[Answer]]]:
        async def client(asked: list[Any]) -> list[Answer]:
            return [await fleet.engine.classify(texts, erase, compare=compare) for texts, erase, compare in asked]

        asking = [[long, *requests]] * 4 + [requests] * 12
        clients = [asyncio.ensure_future(client(asked)) for asked in asking]
        while (victim := stopped(stops)) is None:
            await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        return victim, list(await asyncio.gather(*clients))

    victim, answered = asyncio.run(storm())
    wanted = [whole, *expected]
    agree = [same(*pair) for answers in answered for pair in zip(answers, wanted[-len(answers) :], strict=True)]
    assert len(agree) == 4 * 41 + 12 * 40
    assert all(agree)
    sent_again = (fleet.registry.get_sample_value("neuronlens_fleet_retried_total") or 0.0) - retried
    assert sent_again >= 2, "it was processing several requests"
    assert fleet.registry.get_sample_value("neuronlens_fleet_lost_total") == 0.0
    # another replica replaces it
    until(lambda: len(set(pids(fleet)) - {victim}) == 2, 120)


def stopped(stops: Path) -> int | None:
    """The process id of the engine that has stopped while it processed requests."""
    for each in stops.parent.glob(f"{stops.name}.*"):
        victim = int(each.suffix[1:])
        if psutil.Process(victim).status() == psutil.STATUS_STOPPED:
            return victim
    return None


def test_second_ingress_finds_the_fleet_unless_its_settings_differ(
    fleet: Service, open_services: Callable[..., list[Service]], fitted: FitResult
) -> None:
    (second,) = open_services("two", **PATIENT)
    with pytest.raises(OtherFleet, match="engine"):
        open_services("two", max_queue_texts=5, **PATIENT)
    live = LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0), since=0.0)
    generation = fleet.store.set_erasure(live).generation
    until(lambda: not roster(fleet).missing(generation))
    for ingress in (fleet, second):
        answers = asyncio.run(all_of(ingress.engine, [([text], None, False) for text in TEXTS]))
        assert {answer.generation for answer in answers} == {generation}
        assert all(answer.source == "live" for answer in answers)
    fleet.store.set_erasures([])
