"""One pass over labelled texts: the trunk runs once, and a tail for every erasure of every setting."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from range_store.domain.erasure import Positions
from range_store.domain.plan import Plan, resolve
from range_store.domain.range_set import ModelIdentity, RangeSet
from workers.corpora.corpus import Chunk, Corpus
from workers.corpora.rows import CHUNK_ROWS
from workers.edits.slot_table import SlotTable
from workers.edits.variants import Variants
from workers.evaluation.measures import Labels, Outcomes
from workers.evaluation.settings import EvaluationSettings, Layers, Setting
from workers.fitting.checkpoint import Checkpoint, checkpoint_path
from workers.fitting.progress import Progress, ProgressCallback
from workers.models.errors import PredictsNoLabels
from workers.models.loading import LoadedModel
from workers.models.predictions import Head
from workers.models.steerable import Trunk
from workers.models.tokens import TokenBatch

CHECKPOINT_SECONDS = 30.0
CHECKPOINTS = ".measuring-*.safetensors"
"""Pattern of the names of checkpoints."""
_HEAD = 0.1
"""Cost of a head, in blocks. Only the share of the work in a progress report depends on it."""


def truth_of(corpus: Corpus, labels: Sequence[str]) -> Labels:
    """Index of the true label of every text, [N]. All concepts of the corpus are labels."""
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[concept] for chunk in corpus.chunks() for concept in chunk.concepts], dtype=np.int16)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The erasures of all settings with one group of layers and positions, at places of the outcomes' first axis."""

    split: int | None
    places: npt.NDArray[np.int64]
    plans: Sequence[Plan]
    positions: Positions


@dataclass(frozen=True, eq=False)
class MeasureTask:
    """What to measure: every text of `corpus` under every erasure of `grid`, in its order.

    Attributes:
        phase: name of the measurement in its progress.
        checkpoint_dir: None: nothing is saved.
    """

    range_set: RangeSet
    corpus: Corpus
    grid: Sequence[Setting]
    settings: EvaluationSettings
    phase: str = "measuring"
    checkpoint_dir: Path | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    progress: ProgressCallback | None = None


Measure = Callable[[MeasureTask], Outcomes]
"""`measure` of a model in this process, or its counterpart on a cluster."""


def measure(model: LoadedModel, task: MeasureTask) -> Outcomes:
    """Measure a model in this process.

    A measurement that was killed resumes from its checkpoint when it is started again with the same arguments, and ends
    in the same bits. The caller deletes the files `CHECKPOINTS` in `checkpoint_dir` at the end.

    Raises:
        NotFitted, UnknownConcept, InvalidErasure: the range set cannot serve a setting.
        PredictsNoLabels: a regression model.
    """
    run = start_measuring(model.identity, model.dtype, model.head, task)
    progress = task.progress
    measurer = Measurer(model, task.range_set, task.grid, task.settings)
    for at, batch, before, own in batches(model, task.corpus, task.settings.batch_tokens):
        if run.outcomes.done[at].all():
            continue

        def after_turn(share: float, before: float = before, own: float = own) -> None:
            run.checkpoint.save_if_due(run.outcomes.arrays)
            if progress is not None and share < 1:  # the end of a batch is reported once its texts are done
                progress(run.progress(before + share * own))

        measurer.add(run.outcomes, at, batch, run.truth[at], after_turn)
        run.checkpoint.save_if_due(run.outcomes.arrays)
        if progress is not None:
            progress(run.progress(before + own))
    return run.result()


class Measurer:
    """Measures a model under all erasures of a grid, batch by batch."""

    def __init__(
        self, model: LoadedModel, range_set: RangeSet, grid: Sequence[Setting], settings: EvaluationSettings
    ) -> None:
        self._model, self._settings = model, settings
        self._sweeps = _sweeps(model, range_set, grid)
        self._slots = SlotTable(model.identity.hidden_size, model.device)
        self._splits = list({sweep.split: None for sweep in self._sweeps})

    def add(
        self,
        outcomes: Outcomes,
        at: npt.NDArray[np.int64],
        batch: TokenBatch,
        truth: Labels,
        after_turn: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Store the model's answers to a batch, the texts with indices `at`, in `outcomes`.

        Args:
            truth: index of each text's true label.
            after_turn: called with the share of the batch's work that is done. The cost of a turn is the number of
                blocks that its tail runs.
        """
        model, settings = self._model, self._settings
        base, trunks = _trunks(model, batch, self._splits)
        log = outcomes.add_base(at, base, truth)
        outcomes.used[at] = (outcomes.base_predicted[at] == truth) if settings.correct_only else True
        before = int(outcomes.turns[0])
        turns = [
            (sweep, variants, turn)
            for sweep in self._sweeps
            for variants in [self._variants(sweep, batch, trunks[sweep.split])]
            for turn in variants.turns(settings.batch_tokens)
        ]
        n_layers = model.identity.n_layers
        above = {split: n_layers if split is None else n_layers - 1 - split for split in self._splits}
        costs = np.cumsum([(above[sweep.split] + _HEAD) * (turn.stop - turn.start) for sweep, _, turn in turns])
        for number, (sweep, variants, turn) in enumerate(turns):
            if number >= before and outcomes.used[at].any():  # earlier turns of an unfinished batch are done
                logits = variants.run(turn, counted=False).logits
                outcomes.add(sweep.places[turn], at, logits.float().cpu().numpy(), log, truth)
                outcomes.turns[0] = number + 1
                after_turn(float(costs[number] / costs[-1]))
        outcomes.done[at], outcomes.turns[0] = True, 0

    def _variants(self, sweep: _Sweep, batch: TokenBatch, trunk: Trunk) -> Variants:
        """Every text of the batch under every plan of a sweep."""
        rows = torch.arange(len(batch.ids), device=batch.ids.device).expand(len(sweep.plans), -1)
        return Variants(self._model.steered, self._slots, batch, trunk, sweep.plans, rows, sweep.positions)


@dataclass(eq=False)
class MeasureRun:
    """A measurement that is under way. resumed: texts that an earlier run measured."""

    task: MeasureTask
    truth: Labels
    outcomes: Outcomes
    checkpoint: Checkpoint
    started: float = field(default_factory=time.monotonic)
    resumed: int = field(init=False)

    def __post_init__(self) -> None:
        self.resumed = int(self.outcomes.done.sum())

    def progress(self, share: float | None = None) -> Progress:
        """How far the measurement is. share: of the work that is done; None: that of the rows."""
        done, total = int(self.outcomes.done.sum()), len(self.task.corpus)
        seconds = time.monotonic() - self.started
        return Progress(self.task.phase, done, total, seconds, self.resumed, done / total if share is None else share)

    def result(self) -> Outcomes:
        """Outcomes when all texts are measured."""
        if (limit := self.task.settings.rows_per_class) is not None:
            used = self.outcomes.used
            for label in np.unique(self.truth):
                used[np.flatnonzero(used & (self.truth == label))[limit:]] = False
        return self.outcomes


def start_measuring(model: ModelIdentity, dtype: str, head: Head, task: MeasureTask) -> MeasureRun:
    """A measurement at its start, or where a checkpoint left it.

    Args:
        dtype: of the model's parameters. head: how its logits are read.

    Raises:
        PredictsNoLabels: a regression model.
    """
    if head == "none":
        raise PredictsNoLabels(model.id, "an evaluation")
    corpus, grid = task.corpus, task.grid
    outcomes = Outcomes.empty(sum(len(setting.erasures) for setting in grid), len(corpus), head)
    path = None
    if task.checkpoint_dir is not None:
        task.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        erasures = [(each.positions, [erasure.model_dump(mode="json") for erasure in each.erasures]) for each in grid]
        inputs = (model.fingerprint, dtype, task.range_set.id, corpus.sha256, task.settings.as_json(), erasures)
        path = checkpoint_path(task.checkpoint_dir, ".measuring-", *inputs)
    checkpoint = Checkpoint(path, task.checkpoint_seconds)
    outcomes = checkpoint.load(outcomes.restored, outcomes)
    return MeasureRun(task, truth_of(corpus, model.labels), outcomes, checkpoint)


def batches(
    model: LoadedModel, corpus: Corpus, batch_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], TokenBatch, float, float]]:
    """Batches of texts of similar length, chunk by chunk: (rows, batch, share before, own share).

    The shares are of the tokens of the corpus, where every text of a later chunk counts the same. Texts without a token
    are omitted.
    """
    for chunk in corpus.chunks():
        parts = list(batches_of(model, chunk, batch_tokens))
        sizes = np.array([batch.ids.numel() for _, batch in parts], dtype=np.float64)
        shares = sizes / sizes.sum() * len(chunk.texts) / len(corpus)
        before = chunk.index * CHUNK_ROWS / len(corpus) + np.cumsum(shares) - shares
        for (rows, batch), earlier, own in zip(parts, before.tolist(), shares.tolist(), strict=True):
            yield rows + chunk.index * CHUNK_ROWS, batch, earlier, own


def batches_of(
    model: LoadedModel, chunk: Chunk, batch_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], TokenBatch]]:
    """Batches of texts of similar length of a chunk, with the indices of the texts in the chunk."""
    encoded = model.tokens.encode(chunk.texts, keep_empty=True)
    for rows, batch in model.tokens.batches(encoded, batch_tokens, model.device):
        yield np.array(rows, dtype=np.int64), batch


def _sweeps(model: LoadedModel, range_set: RangeSet, grid: Sequence[Setting]) -> list[_Sweep]:
    found: dict[tuple[Layers, Positions], tuple[list[int], list[Plan]]] = {}
    place = 0
    for setting in grid:
        places, plans = found.setdefault((setting.layers, setting.positions), ([], []))
        for erasure in setting.erasures:
            places.append(place)
            plans.append(resolve(range_set, [erasure]))
            place += 1
    return [
        _Sweep(
            model.steered.split_for(layers, plans[0].site),
            np.array(places),
            plans,
            positions,
        )
        for (layers, positions), (places, plans) in found.items()
    ]


def _trunks(
    model: LoadedModel, batch: TokenBatch, splits: list[int | None]
) -> tuple[npt.NDArray[np.float32], dict[int | None, Trunk]]:
    """The unmasked model's logits [B, K], and the trunks, from one pass."""
    trunks = model.steered.trunks(batch, splits, whole=True)
    logits = trunks[0].logits
    assert logits is not None
    return logits.float().cpu().numpy(), dict(zip(splits, trunks, strict=True))
