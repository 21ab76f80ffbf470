"""Measuring on a pool of models: chunk by chunk, so in the very batches of one process, and with its outcomes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from workers.cluster.model_pool import ActorFunction, ModelPool
from workers.corpora.corpus import Chunk, Corpus
from workers.corpora.rows import CHUNK_ROWS
from workers.evaluation.measure import Measurer, MeasureRun, batches_of, start_measuring
from workers.evaluation.measures import Labels, Outcomes
from workers.evaluation.settings import EvaluationSettings, Setting
from workers.fitting.progress import ProgressCallback
from workers.models.loading import LoadedModel
from workers.models.predictions import Head


@dataclass(frozen=True, eq=False)
class Asked:
    """A chunk to measure, and the index of each text's true label."""

    chunk: Chunk
    truth: Labels

    def __str__(self) -> str:
        first = self.chunk.index * CHUNK_ROWS
        return f"rows {first + 1:,} to {first + len(self.truth):,}"


@dataclass(frozen=True, eq=False)
class _Known:
    """What every actor needs to know."""

    range_set: RangeSet
    grid: Sequence[Setting]
    settings: EvaluationSettings
    head: Head


class Answering:
    """On an actor: outcomes of chunks under every erasure."""

    def __init__(self, model: LoadedModel, known: _Known) -> None:
        self._model, self._known = model, known
        self._measurer = Measurer(model, known.range_set, known.grid, known.settings)
        self._erasures = sum(len(setting.erasures) for setting in known.grid)

    def __call__(self, asked: Asked) -> Outcomes:
        outcomes = Outcomes.empty(self._erasures, len(asked.truth), self._known.head)
        for at, batch in batches_of(self._model, asked.chunk, self._known.settings.batch_tokens):
            self._measurer.add(outcomes, at, batch, asked.truth[at])
        return outcomes


def measure_on(
    pool: ModelPool,
    range_set: RangeSet,
    corpus: Corpus,
    grid: Sequence[Setting],
    settings: EvaluationSettings,
    *,
    phase: str,
    checkpoint_dir: Path | None,
    checkpoint_seconds: float,
    progress: ProgressCallback | None,
) -> tuple[Outcomes, Path | None]:
    """As `workers.evaluation.measure.measure`, on the pool; it goes on from the other's checkpoint, and so back.

    Raises:
        NotFitted, UnknownConcept, InvalidErasure: as there.
        ModelError, ClusterError: see `ModelPool`.
    """
    for setting in grid:  # what cannot be resolved should be known here
        for erasure in setting.erasures:
            resolve(range_set, [erasure])
    about = pool.model_info
    under_way = start_measuring(
        about.identity,
        about.dtype,
        about.head,
        range_set,
        corpus,
        grid,
        settings,
        phase=phase,
        checkpoint_dir=checkpoint_dir,
        checkpoint_seconds=checkpoint_seconds,
    )
    outcomes = under_way.outcomes
    outcomes.turns[0] = 0  # a batch that one process was at is measured anew

    job = ActorFunction[Asked, Outcomes].of(Answering, _Known(range_set, tuple(grid), settings, about.head))
    try:
        for asked, part, _ in pool.map(job, _left(under_way)):
            rows = slice(asked.chunk.index * CHUNK_ROWS, asked.chunk.index * CHUNK_ROWS + len(asked.truth))
            for name in ("base_predicted", "base_confidence", "predicted", "confidence", "kl", "used", "done"):
                getattr(outcomes, name)[..., rows] = getattr(part, name)
            if progress is not None:
                progress(under_way.progress())
            under_way.save_if_due()
    except BaseException:
        under_way.save()
        raise
    return under_way.result()


def _left(under_way: MeasureRun) -> Iterator[Asked]:
    """Chunks that are not done."""
    for chunk in under_way.corpus.chunks():
        rows = slice(chunk.index * CHUNK_ROWS, chunk.index * CHUNK_ROWS + len(chunk.texts))
        if not under_way.outcomes.done[rows].all():
            yield Asked(chunk, under_way.truth[rows])
