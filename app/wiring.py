"""The one module of `app` that knows `workers`: it puts a service together, and starts jobs for the command line.

Importing it loads torch; commands that only talk to the store or to a server do without it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from app.jobs import CorpusChoice, ModelChoice
from app.settings import Settings
from range_store.embedded import connect
from range_store.mirror import Mirror
from range_store.store import RangeStore
from workers.demo.demo import NAME as DEMO_NAME
from workers.demo.demo import Demo, prepare
from workers.engine.engine import Engine
from workers.engine.errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineFailed,
    QueueFull,
    RequestTooLarge,
)
from workers.engine.requests import Answer, TextAnswer
from workers.engine.settings import EngineSettings
from workers.evaluation.evaluate import Evaluation, EvaluationSettings
from workers.evaluation.evaluate import evaluate as _evaluate
from workers.fitting.corpus import Corpus, check_source, load_corpus, load_label_map, match_labels
from workers.fitting.fit import Fitted
from workers.fitting.fit import fit as _fit
from workers.models.errors import EmptyText, TextTooLong
from workers.models.loading import LoadedModel, load_model, use_threads
from workers.training import TrainReport
from workers.training import train as _train

__all__ = [
    "Answer",
    "DeadlineExceeded",
    "Demo",
    "Draining",
    "EmptyText",
    "EngineError",
    "EngineFailed",
    "Evaluation",
    "QueueFull",
    "RequestTooLarge",
    "Service",
    "TextAnswer",
    "TextTooLong",
]

Report = Callable[[str, int, int], None]
"""Told of progress: (what is being done, how much of it, out of how much)."""


@dataclass(frozen=True, eq=False)
class Service:
    """One process's parts: store, mirror of the live state, engine. Made by `open_service`."""

    settings: Settings
    model: LoadedModel
    store: RangeStore
    mirror: Mirror
    engine: Engine
    registry: CollectorRegistry
    name: str


@contextmanager
def open_service(settings: Settings, model: LoadedModel | None = None) -> Iterator[Service]:
    """A service that is ready to answer; on leaving, accepted requests are answered first.

    Args:
        model: one that is loaded already; else `settings.model` is.

    Raises:
        ModelError: the checkpoint cannot be served.
        StoreUnavailable: the private Redis cannot be started. One by URL may be away: the mirror keeps trying.
    """
    assert model is not None or settings.model is not None
    loaded = model or _load(ModelChoice.of(settings))
    with connect(settings.redis_url, settings.redis_dir) as client, _serving(settings, loaded, client) as service:
        yield service


@contextmanager
def _serving(settings: Settings, model: LoadedModel, client: redis.Redis) -> Iterator[Service]:
    name = settings.name or model.identity.id
    store = RangeStore(client, name)
    mirror = Mirror(store, model.identity.fingerprint, poll=settings.poll_seconds)
    registry = CollectorRegistry()
    limits = EngineSettings(max_batch_tokens=settings.max_batch_tokens, max_queue_tokens=settings.max_queue_tokens)
    engine = Engine(model, mirror, limits, registry)
    mirror.start()
    try:
        engine.start()
        yield Service(settings, model, store, mirror, engine, registry, name)
    finally:
        engine.close()
        mirror.close()


@contextmanager
def open_demo(settings: Settings, report: Report, *, rebuild: bool = False) -> Iterator[tuple[Service, Demo]]:
    """Make the demo in `settings.data_dir`, and a service that serves it.

    Raises:
        DemoError: its base model is missing or not the known one.
        StoreUnavailable: the private Redis cannot be started.
    """
    with connect(settings.redis_url, settings.redis_dir) as client:
        demo = prepare(settings.data_dir, RangeStore(client, DEMO_NAME), report, rebuild=rebuild)
        named = settings.model_copy(update={"name": DEMO_NAME})
        with _serving(named, demo.model, client) as service:
            yield service, demo


def fit_corpus(model: ModelChoice, data: CorpusChoice, *, report: Report, **settings: Any) -> Fitted:
    """Load model and corpus, and fit; `settings` are those of `workers.fitting.fit.fit`."""
    check_source(data.source)
    loaded = _load(model)
    corpus = _corpus(data, loaded.identity.labels)
    return _fit(loaded, corpus, progress=lambda now: report("fitting", now.rows_done, now.rows_total), **settings)


def train_model(
    base: str,
    data: CorpusChoice,
    eval_data: CorpusChoice | None,
    *args: Any,
    threads: int | None,
    report: Report,
    **settings: Any,
) -> TrainReport:
    """Load the corpora, and train; other arguments are those of `workers.training.train`."""
    use_threads(threads)
    learned = _corpus(data, ())
    held_out = _corpus(eval_data, learned.concepts) if eval_data else None
    tell = report
    return _train(
        base,
        learned,
        held_out,
        *args,
        progress=lambda now: tell("training", now.steps_done, now.steps_total),
        **settings,
    )


def evaluate_model(
    model: ModelChoice,
    data: CorpusChoice,
    test_data: CorpusChoice,
    out: Any,
    *,
    report: Report,
    **settings: Any,
) -> Evaluation:
    """Load model and corpora, fit on one, measure on the other, and write the results into `out`."""
    for each in (data, test_data):
        check_source(each.source)
    chosen = EvaluationSettings(**settings)
    loaded = _load(model)
    learned, test = _corpus(data, loaded.identity.labels), _corpus(test_data, loaded.identity.labels)
    match_labels(test.concepts, loaded.identity.labels)  # before the fit, which takes a while
    fitted = _fit(
        loaded,
        learned,
        layers=chosen.layers,
        rankings=chosen.rankings,
        batch_tokens=chosen.batch_tokens,
        progress=lambda now: report("fitting", now.rows_done, now.rows_total),
    )
    evaluation = _evaluate(
        loaded,
        fitted.range_set,
        test,
        chosen,
        progress=lambda now: report("measuring", now.rows_done, now.rows_total),
    )
    evaluation.write(out)
    return evaluation


def _load(model: ModelChoice) -> LoadedModel:
    use_threads(model.threads)
    return load_model(
        model.source,
        revision=model.revision,
        device=model.device,
        dtype=model.dtype,
        allow_pickle=model.allow_pickle,
        name=model.served_name,
    )


def _corpus(choice: CorpusChoice, labels: tuple[str, ...]) -> Corpus:
    return load_corpus(
        choice.source,
        labels=labels,
        split=choice.split,
        text_field=choice.text_field,
        label_field=choice.label_field,
        label_map=load_label_map(choice.label_map) if choice.label_map else None,
        max_rows=choice.max_rows,
    )
