"""Fits a range set. Importing it loads torch."""

from typing import Any

from app.serving.inputs import CorpusChoice, OnProgress, RayChoice
from app.serving.loading import load, model_pool, read_corpus, read_corpus_on_cluster
from app.settings import ModelSettings
from workers.corpora.sources import check_source
from workers.fitting.fit import CHECKPOINT_SECONDS, FitResult, fit
from workers.fitting.progress import Progress


def fit_corpus(
    model: ModelSettings,
    data: CorpusChoice,
    *,
    on_progress: OnProgress,
    cluster: RayChoice | None = None,
    checkpoint_seconds: float | None = None,
    **settings: Any,
) -> FitResult:
    """Load a model and a corpus, and fit, in this process or on a cluster.

    Args:
        checkpoint_seconds: least time between two checkpoints; None: that of `workers.fitting.fit`.
        settings: the other arguments of `workers.fitting.fit.fit`.

    Raises:
        CorpusError, ModelError, ClusterError: see there.
    """
    settings["checkpoint_seconds"] = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds

    def report(now: Progress) -> None:
        on_progress(now.phase, now.done, now.total)

    if cluster is not None:
        with model_pool(model, cluster, on_progress, data) as pool:
            from workers.cluster.fitting import fit_on

            labels = pool.model_info.identity.labels
            on_progress("reading the texts", 0, 0)
            return fit_on(pool, read_corpus_on_cluster(data, labels), progress=report, **settings)
    check_source(data.source)
    loaded = load(model)
    on_progress("reading the texts", 0, 0)
    return fit(loaded, read_corpus(data, loaded.identity.labels), progress=report, **settings)
