"""One pass over labelled texts: the trunk once, and a tail for every erasure of every setting."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from range_store.atomic_files import atomic_write
from range_store.domain.erasure import Positions
from range_store.domain.plan import resolve
from range_store.domain.range_set import ModelIdentity, RangeSet
from workers.engine.forward import WHOLE_PASS, PlanSweep, open_trunk
from workers.engine.masks import DevicePlan
from workers.evaluation.measures import Labels, Outcomes
from workers.evaluation.settings import EvaluationSettings, Layers, Setting
from workers.fitting.corpus import Chunk, Corpus
from workers.fitting.rows import CHUNK_ROWS
from workers.models.errors import PredictsNoLabels
from workers.models.loading import LoadedModel
from workers.models.predictions import Head
from workers.models.steered import Trunk
from workers.models.tokens import TokenBatch, length_sorted

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
LONGEST = 50.0
"""Seconds between two checkpoints at most, whatever one costs."""
_HEAD = 0.1
"""What a head costs, in blocks; only shares of progress depend on it."""
_ARRAYS = tuple(each.name for each in fields(Outcomes) if each.name != "head")


@dataclass(frozen=True)
class MeasureProgress:
    """How far the measuring is; `resumed_rows` were done by an earlier run.

    `share`: of the work, in [0, 1]; a row of a long text is more work than one of a short text.
    """

    rows_done: int
    rows_total: int
    seconds: float
    resumed_rows: int
    share: float


class MeasureCancelled(Exception):
    """Stopped by its caller; the checkpoint remains."""


def truth_of(corpus: Corpus, labels: Sequence[str]) -> Labels:
    """Index of the true label of every text, [N]. All concepts of the corpus are labels."""
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[concept] for chunk in corpus.chunks() for concept in chunk.concepts], dtype=np.int16)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The erasures of all settings with one group of layers and positions, at places of the outcomes' first axis."""

    split: int
    places: npt.NDArray[np.int64]
    plans: PlanSweep


def measure(
    model: LoadedModel,
    range_set: RangeSet,
    corpus: Corpus,
    grid: Sequence[Setting],
    settings: EvaluationSettings,
    *,
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Callable[[MeasureProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[Outcomes, Path | None]:
    """Outcomes of every text under every erasure of `grid`, in its order; and the checkpoint, to be removed at the end.

    Killed and started again with the same arguments, it goes on from the checkpoint and ends in the very same bits.

    Raises:
        NotFitted, UnknownConcept, InvalidErasure: the range set cannot serve a setting.
        PredictsNoLabels: a regression model.
        MeasureCancelled: `cancelled` said so.
    """
    under_way = start_measuring(
        model.identity,
        model.dtype,
        model.head,
        range_set,
        corpus,
        grid,
        settings,
        checkpoint_dir=checkpoint_dir,
        checkpoint_seconds=checkpoint_seconds,
    )
    outcomes = under_way.outcomes
    measurer = Measurer(model, range_set, grid, settings)

    def before_turn() -> None:
        if cancelled is not None and cancelled():
            raise MeasureCancelled

    for at, batch, before, own in batches(model, corpus, settings.batch_tokens):
        if outcomes.done[at].all():
            continue

        def after_turn(share: float, before: float = before, own: float = own) -> None:
            under_way.save_if_due()
            if progress is not None and share < 1:  # the end of a batch is told when it is stored
                progress(under_way.progress(before + share * own))

        measurer.add(outcomes, at, batch, under_way.truth[at], before_turn, after_turn)
        if progress is not None:
            progress(under_way.progress(before + own))
        under_way.save_if_due()
    return under_way.end()


class Measurer:
    """A model, and all erasures of a grid, ready to be measured."""

    def __init__(
        self, model: LoadedModel, range_set: RangeSet, grid: Sequence[Setting], settings: EvaluationSettings
    ) -> None:
        self._model, self._settings = model, settings
        self._sweeps = _sweeps(model, range_set, grid)
        self._splits = sorted({sweep.split for sweep in self._sweeps})

    def add(
        self,
        outcomes: Outcomes,
        at: npt.NDArray[np.int64],
        batch: TokenBatch,
        truth: Labels,
        before_turn: Callable[[], None] = lambda: None,
        after_turn: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Put what the model says of a batch, texts `at`, into `outcomes`.

        Args:
            truth: index of each text's true label.
            after_turn: told which share of the batch's work is done; a turn costs the blocks that its tail runs.
        """
        model, settings = self._model, self._settings
        base, trunks = _trunks(model, batch, self._splits)
        log = outcomes.add_base(at, base, truth)
        outcomes.used[at] = (outcomes.base_predicted[at] == truth) if settings.correct_only else True
        before = int(outcomes.turns[0])
        turns = [
            (sweep, turn)
            for sweep in self._sweeps
            for turn in sweep.plans.turns(model.steered, batch, trunks[sweep.split], settings.batch_tokens)
        ]
        blocks = model.identity.n_layers - 1
        costs = np.cumsum([(blocks - sweep.split + _HEAD) * (turn.stop - turn.start) for sweep, turn in turns])
        for number, (sweep, turn) in enumerate(turns):
            before_turn()
            if number >= before and outcomes.used[at].any():  # a batch that was under way goes on where it was
                logits = sweep.plans.logits(model.steered, batch, trunks[sweep.split], turn)
                outcomes.add(sweep.places[turn], at, logits.float().cpu().numpy(), log, truth)
                outcomes.turns[0] = number + 1
                after_turn(float(costs[number] / costs[-1]))
        outcomes.done[at], outcomes.turns[0] = True, 0


@dataclass(eq=False)
class MeasureRun:
    """A measuring that is under way."""

    corpus: Corpus
    settings: EvaluationSettings
    truth: Labels
    outcomes: Outcomes
    checkpoint: Path | None
    seconds: float
    resumed: int
    started: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def progress(self, share: float | None = None) -> MeasureProgress:
        """How far it is; without a share of the work, that of the rows."""
        done, total = int(self.outcomes.done.sum()), len(self.corpus)
        seconds = time.monotonic() - self.started
        return MeasureProgress(done, total, seconds, self.resumed, done / total if share is None else share)

    def save_if_due(self) -> None:
        """Write the checkpoint now and then: one that is slow to write less often, down to `LONGEST`; 0: always."""
        every = min(max(self.seconds, 20 * self._cost), LONGEST) if self.seconds else 0.0
        if time.monotonic() - self._saved >= every:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        if self.checkpoint is None:
            return
        started = time.monotonic()
        with atomic_write(self.checkpoint) as partial:
            save_file({name: np.ascontiguousarray(getattr(self.outcomes, name)) for name in _ARRAYS}, partial)
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def end(self) -> tuple[Outcomes, Path | None]:
        """Outcomes of a measuring that is done, and its checkpoint."""
        if self.settings.rows_per_class is not None:
            _cap(self.outcomes.used, self.truth, self.settings.rows_per_class)
        return self.outcomes, self.checkpoint


def start_measuring(
    model: ModelIdentity,
    dtype: str,
    head: Head,
    range_set: RangeSet,
    corpus: Corpus,
    grid: Sequence[Setting],
    settings: EvaluationSettings,
    *,
    checkpoint_dir: Path | None,
    checkpoint_seconds: float,
) -> MeasureRun:
    """A measuring at its start, or where a checkpoint left it.

    Args:
        dtype: of the model's parameters. head: how its logits are read.

    Raises:
        PredictsNoLabels: it is a regression model.
    """
    if head == "none":
        raise PredictsNoLabels(model.id, "an evaluation")
    n_erasures = sum(len(setting.erasures) for setting in grid)
    outcomes = Outcomes.empty(n_erasures, len(corpus), head)
    checkpoint = None
    if checkpoint_dir:
        checkpoint = _checkpoint_path(checkpoint_dir, model, dtype, range_set, corpus, grid, settings)
        outcomes = _load(checkpoint, outcomes)
    truth = truth_of(corpus, model.labels)
    return MeasureRun(corpus, settings, truth, outcomes, checkpoint, checkpoint_seconds, int(outcomes.done.sum()))


def batches(
    model: LoadedModel, corpus: Corpus, batch_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], TokenBatch, float, float]]:
    """Length-sorted batches, chunk by chunk, with the rows of their texts. Texts without a token are left out.

    Beside each stand the share of the corpus' tokens before it and its own; every text counts as long as the mean of
    its chunk until the chunk is read.
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
    """Length-sorted batches of a chunk, with the places of their texts in it."""
    encoded = model.tokens.encode(chunk.texts, keep_empty=True)
    some = [row for row, text in enumerate(encoded) if text.ids]
    for places in length_sorted([len(encoded[row].ids) for row in some], batch_tokens):
        rows = [some[place] for place in places]
        yield np.array(rows, dtype=np.int64), model.tokens.pad([encoded[row].ids for row in rows], model.device)


def _sweeps(model: LoadedModel, range_set: RangeSet, grid: Sequence[Setting]) -> list[_Sweep]:
    found: dict[tuple[Layers, Positions], tuple[list[int], list[DevicePlan]]] = {}
    place = 0
    for setting in grid:
        places, plans = found.setdefault((setting.layers, setting.positions), ([], []))
        for erasure in setting.erasures:
            places.append(place)
            plans.append(DevicePlan.of(resolve(range_set, [erasure]), model.device))
            place += 1
    return [
        _Sweep(
            min(layers) if plans[0].plan.site == "block_output" else WHOLE_PASS,
            np.array(places),
            PlanSweep(plans, positions),
        )
        for (layers, positions), (places, plans) in found.items()
    ]


def _trunks(
    model: LoadedModel, batch: TokenBatch, splits: list[int]
) -> tuple[npt.NDArray[np.float32], dict[int, Trunk]]:
    """The unmasked model's logits [B, K], and the trunks, from one pass."""
    if WHOLE_PASS in splits:
        trunks = [open_trunk(model.steered, batch, WHOLE_PASS, whole=True)]
    else:
        trunks = model.steered.trunks(batch, splits, whole=True)
    logits = trunks[0].logits
    assert logits is not None
    return logits.float().cpu().numpy(), dict(zip(splits, trunks, strict=True))


def _cap(used: npt.NDArray[np.bool_], truth: Labels, most: int) -> None:
    """Leave the first `most` used texts of each class."""
    for label in np.unique(truth):
        used[np.flatnonzero(used & (truth == label))[most:]] = False


def _checkpoint_path(
    directory: Path,
    model: ModelIdentity,
    dtype: str,
    range_set: RangeSet,
    corpus: Corpus,
    grid: Sequence[Setting],
    settings: EvaluationSettings,
) -> Path:
    """Named by everything that the outcomes depend on."""
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for part in (model.fingerprint, dtype, range_set.id, corpus.sha256):
        digest.update(part.encode())
    digest.update(json.dumps(settings.as_json(), sort_keys=True).encode())
    for setting in grid:
        digest.update(repr((setting.positions, [erasure.model_dump_json() for erasure in setting.erasures])).encode())
    return directory / f".measuring-{digest.hexdigest()[:20]}.safetensors"


def _load(path: Path, fresh: Outcomes) -> Outcomes:
    if not path.exists():
        return fresh
    try:
        arrays = load_file(path)
        loaded = Outcomes(**{name: arrays[name].copy() for name in _ARRAYS}, head=fresh.head)
        if loaded.predicted.shape != fresh.predicted.shape or loaded.kl.shape != fresh.kl.shape:
            raise ValueError("another shape")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("the checkpoint %s cannot be read (%s): starting over", path, error)
        return fresh
    return loaded
