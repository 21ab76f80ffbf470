"""Evaluates erasures. Importing it loads torch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.serving.inputs import CorpusChoice, OnProgress, RayChoice
from app.serving.loading import load, model_pool, read_corpus, read_corpus_on_cluster
from app.settings import ModelSettings
from range_store.atomic_files import remove_partial_files
from range_store.domain.range_set import InspectLayer, ModelIdentity, RangeSet, check_model, dtype_mismatch
from range_store.storage.store import RangeStore
from workers.corpora.corpus import Corpus, match_labels, warn_about_overlap
from workers.corpora.errors import CorpusError
from workers.corpora.sources import check_source
from workers.evaluation.evaluate import Evaluation, check_targets, evaluate_by, workload_of
from workers.evaluation.files import write
from workers.evaluation.measure import CHECKPOINTS, Measure, measure
from workers.evaluation.perplexity import check_perplexity, with_perplexity
from workers.evaluation.settings import EvaluationSettings
from workers.evaluation.workload import Estimate
from workers.fitting.fit import FitResult, fit
from workers.fitting.progress import Progress
from workers.models.loading import LoadedModel

logger = logging.getLogger(__name__)

SELECTION_SHARE = 0.1
"""Share of the fitting texts that is kept out of the fit, to select settings on."""


@dataclass(frozen=True)
class _Backend:
    """What does the work of an evaluation: a model in this process, or copies of it on a cluster.

    Attributes:
        local: the model, if it is in this process.
    """

    model: ModelIdentity
    earlier_fingerprint: str | None
    dtype: str
    template: str | None
    read_corpus: Callable[[CorpusChoice, tuple[str, ...]], Corpus]
    fit: Callable[..., FitResult]
    measure: Measure
    local: LoadedModel | None = None


def evaluate_model(
    model: ModelSettings,
    data: CorpusChoice | None,
    test_data: CorpusChoice,
    out: Path,
    *,
    selection: CorpusChoice | None,
    published: tuple[RangeStore, str] | None,
    fit_settings: dict[str, Any],
    perplexity: bool,
    on_progress: OnProgress,
    announce: Callable[[str], None],
    cluster: RayChoice | None = None,
    **settings: Any,
) -> Evaluation:
    """Load a model and corpora, fit or read ranges, measure, and write the results into `out`.

    Args:
        data: texts to fit on. A tenth is kept out to select settings on, unless `selection` names texts for that.
        published: a store and the id of a range set in it, to use instead of a fit.
        fit_settings: arguments of `workers.fitting.fit.fit` except layers and rankings.
        perplexity: measure it, too; not on a cluster.
        announce: called with lines that a user should read: the amount of work, and how long it takes.
        settings: arguments of `workers.evaluation.settings.EvaluationSettings`.

    Raises:
        CorpusError, ModelError, EvaluationError, RangeStoreError, ClusterError: see there.
    """
    chosen = EvaluationSettings(**settings)
    with _backend(model, cluster, on_progress, data, test_data, selection) as backend:
        if perplexity:
            assert backend.local is not None
            check_perplexity(backend.local, chosen)
        labels = backend.model.labels
        test = backend.read_corpus(test_data, labels)
        match_labels(test.concepts, labels)  # before the fit, which takes a while
        select_on = backend.read_corpus(selection, labels) if selection else None
        if select_on is not None and select_on.sha256 == test.sha256:
            raise CorpusError(f"--select-on: {select_on.name} has the same rows as --test-data: use other texts")
        if published is not None:
            range_set, inspect = _read_published(*published, backend, test)
            work = workload_of(chosen, backend.model.n_layers, range_set.concepts, test, select_on)
            announce(str(work))
        else:
            assert data is not None
            learned = _read_other_texts(data, test, backend)
            if select_on is None:
                learned, select_on = learned.split_off(SELECTION_SHARE, chosen.seed)
            check_targets(chosen, learned.concepts)
            work = workload_of(chosen, backend.model.n_layers, learned.concepts, test, select_on)
            announce(str(work))
            groups = chosen.resolved_layers(backend.model.n_layers)
            fitted = backend.fit(
                learned,
                layers=tuple(sorted({layer for group in groups for layer in group})),
                rankings=chosen.rankings,
                checkpoint_dir=out,
                progress=lambda now: on_progress(now.phase, now.done, now.total),
                **fit_settings,
            )
            range_set, inspect = fitted.range_set, fitted.inspect
        estimate = Estimate(work, announce)

        def measuring(now: Progress) -> None:
            on_progress(now.phase, int(now.share * now.total), now.total)
            estimate(now)

        evaluation = evaluate_by(
            backend.measure,
            backend.model,
            range_set,
            test,
            chosen,
            selection=select_on,
            checkpoint_dir=out,
            progress=measuring,
        )
        if perplexity and backend.local is not None:
            report = partial(on_progress, "perplexity")
            evaluation = with_perplexity(evaluation, backend.local, range_set, test, chosen, report)
        evaluation.run["prompt"] = {"template": backend.template, "scoring": model.scoring} if backend.template else {}
        write(out, evaluation, range_set, inspect)
    _remove_checkpoints(out)
    return evaluation


@contextmanager
def _backend(
    model: ModelSettings, cluster: RayChoice | None, on_progress: OnProgress, *corpora: CorpusChoice | None
) -> Iterator[_Backend]:
    if cluster is not None:
        with model_pool(model, cluster, on_progress, *corpora) as pool:
            from workers.cluster.evaluation import measure_on
            from workers.cluster.fitting import fit_on

            work = (read_corpus_on_cluster, partial(fit_on, pool), partial(measure_on, pool))
            about = pool.model_info
            yield _Backend(about.identity, about.earlier_fingerprint, about.dtype, about.template, *work)
        return
    for each in corpora:
        if each is not None:
            check_source(each.source)
    loaded = load(model)
    yield _Backend(
        loaded.identity,
        loaded.earlier_fingerprint,
        loaded.dtype,
        loaded.template,
        read_corpus,
        partial(fit, loaded),
        partial(measure, loaded),
        loaded,
    )


def _read_published(
    store: RangeStore, range_set_id: str, backend: _Backend, test: Corpus
) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """A published range set for the evaluation of these texts, and its statistics by layer."""
    range_set = store.range_sets.read(range_set_id)
    check_model(range_set.provenance, backend.model.fingerprint, backend.earlier_fingerprint)
    if range_set.provenance.corpus.sha256 == test.sha256:
        raise CorpusError(f"--test-data: the range set was fitted on {test.name}: use texts that it was not fitted on")
    if mismatch := dtype_mismatch(range_set.provenance, backend.dtype):
        logger.warning("range set %s: %s", range_set_id, mismatch)
    return range_set, {layer: store.range_sets.read_inspect(range_set_id, layer) for layer in range_set.layers}


def _read_other_texts(data: CorpusChoice, test: Corpus, backend: _Backend) -> Corpus:
    """The texts to fit on. Warns of texts that are also tested on; on a cluster, counting them would take a pass."""
    learned = backend.read_corpus(data, backend.model.labels)
    if learned.sha256 == test.sha256:
        raise CorpusError(f"--test-data: {test.name} has the same rows as --data: use texts that it does not have")
    if backend.local is not None:
        warn_about_overlap(test, learned, "--test-data")
    return learned


def _remove_checkpoints(out: Path) -> None:
    """Remove the checkpoints of this evaluation, and of interrupted ones in the same directory."""
    remove_partial_files(out, "*")
    for checkpoint in (*out.glob(CHECKPOINTS), *out.glob("fit-*.safetensors")):
        checkpoint.unlink(missing_ok=True)
