"""`--redeploy` replaces the engines under load: no request is lost or answered wrongly."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.serving.logged_replica import LoggedReplica
from app.serving.service import Service
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from tests.e2e.cluster.conftest import activated, pids
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts
from workers.cluster.errors import ClusterError, OtherFleet
from workers.engine.answers import Answer
from workers.fitting.fit import FitResult
from workers.models.errors import ModelError

pytestmark = pytest.mark.full
TEXTS = [text for text, _ in labelled_texts(24, seed=21)]
TOLERANCE = 2e-4
"""Largest difference of a logit of the same text in two batches."""
PATIENT = {"max_queue_seconds": 600.0}
BROKEN = 888
"""As `max_queue_texts`: engines with this setting do not start."""


@contextmanager
def load_on(service: Service) -> Iterator[list[Answer]]:
    """Eight clients send requests all the time. Yields their answers; an error of a client is raised at the end."""
    stop = threading.Event()
    answers: list[Answer] = []

    async def client(first: int) -> None:
        at = first
        while not stop.is_set():
            answers.append(await service.engine.classify(TEXTS[at % 24 : at % 24 + 1], None, timeout=60.0))
            at += 8

    async def clients() -> None:
        await asyncio.gather(*(client(first) for first in range(8)))

    with ThreadPoolExecutor(1) as pool:
        asking: Future[None] = pool.submit(asyncio.run, clients())
        try:
            until(lambda: len(answers) > 50 or asking.done(), 120)
            yield answers
            enough = len(answers) + 50
            until(lambda: len(answers) > enough or asking.done(), 120)
        finally:
            stop.set()
            asking.result(120)


def check(answers: list[Answer], expected: list[Answer], generation: str) -> None:
    """Every answer has the logits of an expected one, and the generation."""
    assert {answer.generation for answer in answers} == {generation}
    known = np.stack([answer.texts[0].logits for answer in expected])
    for answer in answers:
        assert np.abs(known - answer.texts[0].logits).max(axis=1).min() <= TOLERANCE


Opening = Callable[..., list[Service]]


@pytest.fixture(scope="module", autouse=True)
def break_some_engines() -> Iterator[None]:
    """Let engines with the setting `BROKEN` fail when they start."""

    class SometimesBroken(LoggedReplica):
        async def reconfigure(self, config: dict[str, Any]) -> None:
            if self._settings.engine["max_queue_texts"] == BROKEN:
                raise ClusterError("it is broken")
            await super().reconfigure(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.serving.fleet.LoggedReplica", SometimesBroken)
        yield


@pytest.fixture(scope="module")
def fleet(open_services: Opening, fitted: FitResult) -> Service:
    """A fleet of two replicas, with a live erasure."""
    service = activated(open_services("rolling", replicas=2, **PATIENT)[0], fitted)
    service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0)))
    service.mirror.refresh()
    return service


def each_alone(service: Service) -> list[Answer]:
    async def ask() -> list[Answer]:
        return list(await asyncio.gather(*(service.engine.classify([text], None) for text in TEXTS)))

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def expected(fleet: Service) -> list[Answer]:
    return each_alone(fleet)


def test_redeploy_with_other_settings_replaces_every_engine(
    fleet: Service, expected: list[Answer], open_services: Opening
) -> None:
    before = set(pids(fleet))
    with load_on(fleet) as answers:
        (second,) = open_services("rolling", redeploy=True, max_queue_texts=777, **PATIENT)
        until(lambda: len(set(pids(fleet))) == 2)
        assert not before & set(pids(fleet)), "every engine was replaced before the new ingress answers"
    check(answers, expected, fleet.store.live_state().generation)
    assert fleet.registry.get_sample_value("neuronlens_fleet_lost_total") == 0.0
    assert second.engine.settings.max_queue_texts == 777
    with pytest.raises(OtherFleet, match="engine"):
        open_services("rolling", **PATIENT)


def test_redeploy_with_the_same_settings_replaces_no_engine(
    fleet: Service, expected: list[Answer], open_services: Opening
) -> None:
    before = set(pids(fleet))
    open_services("rolling", redeploy=True, max_queue_texts=777, **PATIENT)
    open_services("rolling", replicas=3, max_queue_texts=777, **PATIENT)
    until(lambda: len(set(pids(fleet))) == 3, 60)
    assert before < set(pids(fleet))
    open_services("rolling", replicas=2, max_queue_texts=777, **PATIENT)
    until(lambda: len(set(pids(fleet))) == 2, 60)


def test_redeploy_with_another_checkpoint_is_refused(
    fleet: Service, expected: list[Answer], open_services: Opening, tmp_path: Path
) -> None:
    before = set(pids(fleet))
    other = save_tiny("bert", tmp_path / "other", labels=fleet.model.identity.labels, seed=7)
    (tmp_path / "none").mkdir()
    with load_on(fleet) as answers:
        with pytest.raises(
            OtherFleet, match=f"^the fleet of 'rolling' serves another checkpoint than {other}, .* --name"
        ):
            open_services("rolling", redeploy=True, model=str(other), max_queue_texts=777, **PATIENT)
        with pytest.raises(ModelError):
            open_services("rolling", redeploy=True, model=str(tmp_path / "none"), max_queue_texts=777, **PATIENT)
    assert set(pids(fleet)) == before
    check(answers, expected, fleet.store.live_state().generation)


def test_redeploy_without_spare_room_ends_an_engine_before_it_starts_another(
    open_services: Opening, fitted: FitResult
) -> None:
    choices: dict[str, Any] = {"replicas": 2, "threads": 9, **PATIENT}  # of the 16 CPUs of each of two nodes
    full = activated(open_services("full", **choices)[0], fitted)
    expected, before = each_alone(full), set(pids(full))
    with load_on(full) as answers:
        open_services("full", redeploy=True, max_queue_texts=777, **choices)
        until(lambda: len(set(pids(full))) == 2)
        assert not before & set(pids(full))
    check(answers, expected, full.store.live_state().generation)
    assert full.registry.get_sample_value("neuronlens_fleet_lost_total") == 0.0


def test_failed_redeploy_keeps_the_old_engines_and_settings(
    fleet: Service, expected: list[Answer], open_services: Opening
) -> None:
    before = set(pids(fleet))
    with (
        load_on(fleet) as answers,
        pytest.raises(ClusterError, match=r"those that are left continue: .*it is broken"),
    ):
        open_services("rolling", redeploy=True, max_queue_texts=BROKEN, **PATIENT)
    assert set(pids(fleet)) == before
    check(answers, expected, fleet.store.live_state().generation)
    with load_on(fleet) as answers:
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(pids(fleet)) - {victim}) == 2, 120)
    assert before - {victim} < set(pids(fleet)), "its replacement has the old settings, and joined"
    check(answers, expected, fleet.store.live_state().generation)
    open_services("rolling", max_queue_texts=777, **PATIENT)  # its settings are what they were
