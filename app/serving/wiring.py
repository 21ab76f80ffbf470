"""The one module of `app` that loads models: it puts a service together, and starts jobs for the command line.

Importing it loads torch; the routes, and commands that only talk to the store or to a server, do without it.
"""

import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from prometheus_client import CollectorRegistry

from app.choices import CorpusChoice, ModelChoice, NewModelChoice, RayChoice
from app.serving.assembly import engine_limits, service_around
from app.serving.service import Service
from app.settings import Settings
from range_store.atomic_files import remove_partial_files
from range_store.domain.range_set import ModelIdentity, check_model, dtype_mismatch
from range_store.embedded.connection import connect
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from workers.demo.demo import NAME as DEMO_NAME
from workers.demo.demo import Demo, prepare
from workers.engine.engine import Engine
from workers.engine.settings import EngineSettings, batch_tokens_for
from workers.evaluation.evaluate import Evaluation, Measure, check_targets, evaluate_by, workload_of
from workers.evaluation.files import write as write_evaluation
from workers.evaluation.measure import measure
from workers.evaluation.measures import Row
from workers.evaluation.perplexity import check_perplexity, with_perplexity
from workers.evaluation.settings import EvaluationSettings
from workers.evaluation.workload import Estimate
from workers.fitting.corpus import Corpus, load_corpus, match_labels, warn_about_overlap
from workers.fitting.errors import CorpusError
from workers.fitting.fit import CHECKPOINT_SECONDS, FitResult
from workers.fitting.fit import fit as _fit
from workers.fitting.progress import Progress
from workers.fitting.rows import Table
from workers.fitting.sources import check_source, load_label_map
from workers.models.loading import LoadedModel, load_model, use_threads
from workers.training.scratch import NewModel
from workers.training.train import Epoch, TrainReport, TrainSettings
from workers.training.train import train as _train

if TYPE_CHECKING:
    from workers.cluster.model_pool import ModelPool

__all__ = ["CHECKPOINT_SECONDS", "Demo", "Evaluation", "Row"]

logger = logging.getLogger(__name__)

KEPT_FOR_CHOOSING = 0.1
"""Share of the fitting texts that is kept out of the fit, to choose settings on."""

Report = Callable[[str, int, int], None]
"""Told of progress: (what is being done, how much of it, out of how much)."""


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
    with connect(**settings.redis) as client:  # what is wrong with it should be known before minutes of loading
        loaded = model or _load_aside(ModelChoice.of(settings))
        with _serving(settings, loaded, client) as service:
            yield service


@contextmanager
def _serving(settings: Settings, model: LoadedModel, client: redis.Redis) -> Iterator[Service]:
    limits = EngineSettings(
        max_batch_tokens=settings.max_batch_tokens or batch_tokens_for(model.device.type), **engine_limits(settings)
    )

    @contextmanager
    def engine(mirror: Mirror, registry: CollectorRegistry) -> Iterator[Engine]:
        made = Engine(model, mirror, limits, registry)
        made.start()
        try:
            yield made
        finally:
            made.close()

    with service_around(settings, model.facts, client, engine) as service:
        yield service


@contextmanager
def open_demo(settings: Settings, report: Report, *, rebuild: bool = False) -> Iterator[tuple[Service, Demo]]:
    """Make the demo in `settings.data_dir`, and a service that serves it.

    Raises:
        DemoError: its base model is missing or not the known one.
        StoreUnavailable: the private Redis cannot be started.
    """
    with connect(**settings.redis) as client:
        demo = prepare(settings.data_dir, RangeStore(client, DEMO_NAME), report, rebuild=rebuild)
        named = settings.model_copy(update={"name": DEMO_NAME})
        with _serving(named, demo.model, client) as service:
            yield service, demo


def fit_corpus(
    model: ModelChoice, data: CorpusChoice, *, report: Report, cluster: RayChoice | None = None, **settings: Any
) -> FitResult:
    """Load model and corpus, and fit, here or on a cluster; `settings` are those of `workers.fitting.fit.start_fit`."""

    def fitting(now: Progress) -> None:
        report(now.phase, now.done, now.total)

    if cluster is not None:
        with _pool(model, cluster, report, data) as pool:
            from workers.cluster.fitting import fit_on

            labels = pool.model_info.identity.labels
            report("reading the texts", 0, 0)
            return fit_on(pool, _corpus_on_cluster(data, labels), progress=fitting, **settings)
    check_source(data.source)
    loaded = _load(model)
    report("reading the texts", 0, 0)
    corpus = _corpus(data, loaded.identity.labels)
    return _fit(loaded, corpus, progress=fitting, **settings)


@contextmanager
def _pool(model: ModelChoice, cluster: RayChoice, report: Report, *data: CorpusChoice | None) -> Iterator["ModelPool"]:
    """Models on a cluster, as soon as one is loaded; only now is Ray imported.

    Raises:
        ClusterError, ModelError: see `workers.cluster.model_pool`.
        CorpusError: data that are not there.
    """
    from workers.cluster.connection import PRIVATE, connected
    from workers.cluster.corpus_files import is_file_source
    from workers.cluster.model_pool import ModelPool, PoolLayout
    from workers.fitting.files import files_of

    for each in data:
        if each is not None and each.source is not None and is_file_source(each.source):
            files_of(each.source)  # known before a cluster is started for it
    report("starting a cluster" if cluster.address == PRIVATE else "joining the cluster", 0, 0)
    # Ray prints on stdout what its nodes say of processes that died; a command's result stands there
    with redirect_stdout(io.StringIO()), connected(cluster.address, (cluster.actors or 1) * (model.threads or 1)):
        layout = PoolLayout.of(cluster.actors, model.threads, model.device)
        source, choices = _how_to_load(model)
        choices["device"] = "cuda" if layout.gpu else "cpu" if model.device == "auto" else model.device
        local = Path(source).expanduser()
        with ModelPool(str(local.absolute()) if local.is_dir() else source, choices, layout) as pool:
            report(f"loading the model ({layout})", 0, 0)
            yield pool


def _corpus_on_cluster(choice: CorpusChoice, labels: tuple[str, ...]) -> Corpus:
    """The corpus, of files on the nodes through Ray Data; a data set of the hub is read here."""
    from workers.cluster.corpus_files import FileTable, is_file_source

    files = choice.source is not None and is_file_source(choice.source)
    return _corpus(choice, labels, FileTable.open(choice.source or "") if files else None)


def train_model(
    base: str | NewModelChoice,
    data: CorpusChoice,
    eval_data: CorpusChoice | None,
    out: Path,
    *,
    threads: int | None,
    overwrite: bool,
    report: Report,
    say: Callable[[str], None],
    **settings: Any,
) -> TrainReport:
    """Load the corpora, and train; `settings` are those of `workers.training.train.TrainSettings`.

    Args:
        say: told in words where it goes on, and what each epoch came to.
    """
    use_threads(threads)
    learned = _corpus(data, ())
    held_out = _corpus(eval_data, learned.concepts) if eval_data else None
    if held_out is not None:
        warn_about_overlap(held_out, learned, "--eval-data")
    chosen = TrainSettings(**settings)

    def progress(now: Progress) -> None:
        if now.phase == "training" and now.done == now.resumed + 1:
            begun = f"goes on from step {now.resumed:,} of {now.total:,}" if now.resumed else "begins"
            say(f"the training {begun}; stopped with Ctrl-C, it goes on when the same command is started again")
        report(now.phase, now.done, now.total)

    def epoch(done: Epoch) -> None:
        say(f"epoch {done.number} of {chosen.epochs:g}: loss {done.loss:.3f}, accuracy {done.accuracy:.3f}")

    return _train(
        base if isinstance(base, str) else _new_model(base),
        learned,
        held_out,
        out,
        chosen,
        overwrite=overwrite,
        progress=progress,
        epoch=epoch,
    )


def _new_model(choice: NewModelChoice) -> NewModel:
    sizes = (choice.layers, choice.hidden, choice.heads, choice.vocabulary)
    return NewModel(choice.family, *sizes, config=choice.config)


def evaluate_model(
    model: ModelChoice,
    data: CorpusChoice | None,
    test_data: CorpusChoice,
    out: Path,
    *,
    selection: CorpusChoice | None,
    published: tuple[RangeStore, str] | None,
    fit_settings: dict[str, Any],
    perplexity: bool,
    report: Report,
    tell: Callable[[str], None],
    cluster: RayChoice | None = None,
    **settings: Any,
) -> Evaluation:
    """Load model and corpora, fit or read the ranges, measure, and write the results into `out`.

    Args:
        data: texts to fit on; a tenth is kept to choose settings on, unless `selection` names texts for that.
        published: a store, and the id of a range set in it to use instead of a fit.
        fit_settings: those of `workers.fitting.fit.fit`, but for layers and rankings.
        perplexity: measure it too; not on a cluster.
        tell: called with lines that a user should read at once: how much work it is, and how long that takes.
        settings: those of `workers.evaluation.settings.EvaluationSettings`.

    Raises:
        CorpusError, ModelError, EvaluationError, RangeStoreError: see there.
    """
    chosen = EvaluationSettings(**settings)
    choices = (data, test_data, selection)
    if cluster is not None:
        with _pool(model, cluster, report, *choices) as pool:
            from workers.cluster.evaluation import measure_on
            from workers.cluster.fitting import fit_on

            about = pool.model_info
            work = (_corpus_on_cluster, partial(fit_on, pool), partial(measure_on, pool))
            hands = _Hands(
                about.identity, about.earlier_fingerprint, about.dtype, about.template, *work, counts_overlap=False
            )
            return _evaluated(hands, *choices, out, chosen, published, fit_settings, model.scoring, None, report, tell)
    for each in choices:
        if each is not None:
            check_source(each.source)
    loaded = _load(model)
    if perplexity:
        check_perplexity(loaded, chosen)
    work = (_corpus, partial(_fit, loaded), partial(measure, loaded))
    hands = _Hands(
        loaded.identity, loaded.earlier_fingerprint, loaded.dtype, loaded.template, *work, counts_overlap=True
    )
    asked = loaded if perplexity else None
    return _evaluated(hands, *choices, out, chosen, published, fit_settings, model.scoring, asked, report, tell)


@dataclass(frozen=True)
class _Hands:
    """Who does the work of an evaluation: a model in this process, or many on a cluster."""

    model: ModelIdentity
    earlier_fingerprint: str | None
    dtype: str
    template: str | None
    corpus: Callable[[CorpusChoice, tuple[str, ...]], Corpus]
    fit: Callable[..., FitResult]
    measure: Measure
    counts_overlap: bool
    """Whether a further pass over the texts, to count those that are in both corpora, costs little."""


def _evaluated(
    hands: _Hands,
    data: CorpusChoice | None,
    test_data: CorpusChoice,
    selection: CorpusChoice | None,
    out: Path,
    chosen: EvaluationSettings,
    published: tuple[RangeStore, str] | None,
    fit_settings: dict[str, Any],
    scoring: str,
    perplexity_of: LoadedModel | None,
    report: Report,
    tell: Callable[[str], None],
) -> Evaluation:
    labels = hands.model.labels
    test = hands.corpus(test_data, labels)
    match_labels(test.concepts, labels)  # before the fit, which takes a while
    choosing = hands.corpus(selection, labels) if selection else None
    if choosing is not None and choosing.sha256 == test.sha256:
        raise CorpusError(f"--select-on: {choosing.name} has the same rows as --test-data: name texts of its own")
    if published is not None:
        store, range_set_id = published
        range_set = store.read(range_set_id)
        check_model(range_set.provenance, hands.model.fingerprint, hands.earlier_fingerprint)
        if range_set.provenance.corpus.sha256 == test.sha256:
            raise CorpusError(f"--test-data: the range set was fitted on {test.name}: name texts that it does not have")
        if said := dtype_mismatch(range_set.provenance, hands.dtype):
            logger.warning("range set %s: %s", range_set_id, said)
        inspect = {layer: store.read_inspect(range_set_id, layer) for layer in range_set.layers}
        work = workload_of(chosen, hands.model.n_layers, range_set.concepts, test, choosing)
        tell(str(work))
    else:
        assert data is not None
        learned = hands.corpus(data, labels)
        if learned.sha256 == test.sha256:
            raise CorpusError(f"--test-data: {test.name} has the same rows as --data: name texts that it does not have")
        if hands.counts_overlap:
            warn_about_overlap(test, learned, "--test-data")
        if choosing is None:
            learned, choosing = learned.split_off(KEPT_FOR_CHOOSING, chosen.seed)
        check_targets(chosen, learned.concepts)
        work = workload_of(chosen, hands.model.n_layers, learned.concepts, test, choosing)
        tell(str(work))
        groups = chosen.resolved_layers(hands.model.n_layers)
        fitted = hands.fit(
            learned,
            layers=tuple(sorted({layer for group in groups for layer in group})),
            rankings=chosen.rankings,
            checkpoint_dir=out,
            progress=lambda now: report(now.phase, now.done, now.total),
            **fit_settings,
        )
        range_set, inspect = fitted.range_set, fitted.inspect
    estimate = Estimate(work, tell)

    def measuring(now: Progress) -> None:
        report(now.phase, int(now.share * now.total), now.total)
        estimate(now)

    evaluation = evaluate_by(
        hands.measure,
        hands.model,
        range_set,
        test,
        chosen,
        selection=choosing,
        checkpoint_dir=out,
        progress=measuring,
    )
    if perplexity_of is not None:
        evaluation = with_perplexity(
            evaluation, perplexity_of, range_set, test, chosen, lambda done, total: report("perplexity", done, total)
        )
    evaluation.run["prompt"] = {"template": hands.template, "scoring": scoring} if hands.template else {}
    write_evaluation(out, evaluation, range_set, inspect)
    _remove_checkpoints(out)
    return evaluation


def _remove_checkpoints(out: Path) -> None:
    """Of this evaluation, and of any that was stopped before it in the same directory."""
    remove_partial_files(out, "*")
    for checkpoint in (*out.glob(".measuring-*.safetensors"), *out.glob("fit-*.safetensors")):
        checkpoint.unlink(missing_ok=True)


def _load_aside(model: ModelChoice) -> LoadedModel:
    """Load on a thread that then ends, and with it the OpenMP team that its forward passes started.

    A team that lingers beside the engine's own makes more threads than cores, and OpenMP then lets them sleep between
    any two operations: a short text took 7 ms instead of 5.
    """
    with ThreadPoolExecutor(1, "loader") as loader:
        return loader.submit(_load, model).result()


def _load(model: ModelChoice) -> LoadedModel:
    use_threads(model.threads)
    source, choices = _how_to_load(model)
    return load_model(source, **choices)


def _how_to_load(model: ModelChoice) -> tuple[str, dict[str, Any]]:
    """Arguments of `load_model`."""
    return model.source, {
        "revision": model.revision,
        "device": model.device,
        "dtype": model.dtype,
        "allow_pickle": model.allow_pickle,
        "name": model.served_name,
        "template": model.template,
        "scoring": model.scoring,
        "plain": model.plain,
        "compiled": model.compile,
    }


def _corpus(choice: CorpusChoice, labels: tuple[str, ...], table: Table | None = None) -> Corpus:
    return load_corpus(
        choice.source,
        table=table,
        dataset=choice.dataset,
        labels=labels,
        split=choice.split,
        text_field=choice.text_field,
        label_field=choice.label_field,
        label_map=load_label_map(choice.label_map) if choice.label_map else None,
        max_rows=choice.max_rows,
        rows_per_class=choice.rows_per_class,
        seed=choice.seed,
    )
