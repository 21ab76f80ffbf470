"""An evaluation on a pool of models: chunk by chunk, so in the batches of one process, and with its outcomes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from workers.cluster.model_pool import ActorFunction, ModelPool
from workers.corpora.corpus import Chunk
from workers.corpora.rows import CHUNK_ROWS
from workers.evaluation.measure import Measurer, MeasureRun, MeasureTask, batches_of, start_measuring
from workers.evaluation.measures import Labels, Outcomes
from workers.evaluation.settings import EvaluationSettings, Setting
from workers.models.loading import LoadedModel
from workers.models.predictions import Head


@dataclass(frozen=True, eq=False)
class ChunkTask:
    """A chunk to measure, and the index of each text's true label."""

    chunk: Chunk
    truth: Labels

    @property
    def rows(self) -> slice:
        """The chunk's rows of the corpus."""
        first = self.chunk.index * CHUNK_ROWS
        return slice(first, first + len(self.chunk.texts))

    def __str__(self) -> str:
        return f"rows {self.rows.start + 1:,} to {self.rows.stop:,}"


@dataclass(frozen=True, eq=False)
class _Context:
    """What all chunks have in common."""

    range_set: RangeSet
    grid: Sequence[Setting]
    settings: EvaluationSettings
    head: Head


def _chunk_measurer(model: LoadedModel, context: _Context) -> Callable[[ChunkTask], Outcomes]:
    """Runs on an actor: makes the function that measures a chunk under every erasure."""
    measurer = Measurer(model, context.range_set, context.grid, context.settings)
    erasures = sum(len(setting.erasures) for setting in context.grid)

    def measure_chunk(task: ChunkTask) -> Outcomes:
        outcomes = Outcomes.empty(erasures, len(task.truth), context.head)
        for at, batch in batches_of(model, task.chunk, context.settings.batch_tokens):
            measurer.add(outcomes, at, batch, task.truth[at])
        return outcomes

    return measure_chunk


def measure_on(pool: ModelPool, task: MeasureTask) -> Outcomes:
    """As `workers.evaluation.measure.measure`, on a pool. Each resumes from the checkpoints of the other.

    Raises:
        NotFitted, UnknownConcept, InvalidErasure: as there.
        ModelError, ClusterError: see `ModelPool`.
    """
    for setting in task.grid:  # raises what is wrong with an erasure here, and not on an actor
        for erasure in setting.erasures:
            resolve(task.range_set, [erasure])
    info = pool.model_info
    run = start_measuring(info.identity, info.dtype, info.head, task)
    outcomes = run.outcomes
    outcomes.turns[0] = 0  # repeat a batch that one process left unfinished

    context = _Context(task.range_set, tuple(task.grid), task.settings, info.head)
    measurer = ActorFunction[ChunkTask, Outcomes].of(_chunk_measurer, context)
    try:
        for chunk, part, _ in pool.map(measurer, _tasks(run)):
            for name in ("base_predicted", "base_confidence", "predicted", "confidence", "kl", "used", "done"):
                getattr(outcomes, name)[..., chunk.rows] = getattr(part, name)
            if task.progress is not None:
                task.progress(run.progress())
            run.checkpoint.save_if_due(run.outcomes.arrays)
    except BaseException:
        run.checkpoint.save(run.outcomes.arrays())
        raise
    return run.result()


def _tasks(run: MeasureRun) -> Iterator[ChunkTask]:
    """The chunks that are not done."""
    for chunk in run.task.corpus.chunks():
        rows = slice(chunk.index * CHUNK_ROWS, chunk.index * CHUNK_ROWS + len(chunk.texts))
        if not run.outcomes.done[rows].all():
            yield ChunkTask(chunk, run.truth[rows])
