"""One pass over labelled texts: the trunk once, and a tail for every erasure of every setting."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from range_store.erasure import Positions
from range_store.plan import resolve
from range_store.range_set import RangeSet
from range_store.whole_files import written_whole
from workers.engine.forward import WHOLE_PASS, PlanSweep, open_trunk
from workers.engine.masks import DevicePlan
from workers.evaluation.measures import Labels, Outcomes
from workers.evaluation.settings import EvaluationSettings, Layers, Setting
from workers.fitting.corpus import Corpus
from workers.fitting.rows import BLOCK_ROWS
from workers.models.loading import LoadedModel
from workers.models.steered import Trunk
from workers.models.tokens import TokenBatch, length_sorted

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
LONGEST = 50.0
"""Seconds between two checkpoints at most, whatever one costs."""
_ARRAYS = tuple(each.name for each in fields(Outcomes) if each.name != "tied_is_none")


@dataclass(frozen=True)
class MeasureProgress:
    """How far the measuring is; `resumed_rows` were done by an earlier run."""

    rows_done: int
    rows_total: int
    seconds: float
    resumed_rows: int


class MeasureCancelled(Exception):
    """Stopped by its caller; the checkpoint remains."""


def truth_of(corpus: Corpus, labels: Sequence[str]) -> Labels:
    """Index of the true label of every text, [N]. All concepts of the corpus are labels."""
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[concept] for block in corpus.blocks() for concept in block.concepts], dtype=np.int16)


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
        MeasureCancelled: `cancelled` said so.
    """
    started = time.monotonic()
    labels = model.identity.labels
    truth = truth_of(corpus, labels)
    sweeps = _sweeps(model, range_set, grid)
    n_erasures = sum(len(setting.erasures) for setting in grid)
    outcomes = Outcomes.empty(n_erasures, len(corpus), getattr(model.steered, "scoring", None) == "greedy")
    checkpoint = _checkpoint_path(checkpoint_dir, model, range_set, corpus, grid, settings) if checkpoint_dir else None
    if checkpoint is not None:
        outcomes = _load(checkpoint, outcomes)
    resumed = int(outcomes.done.sum())
    saver = _Saver(checkpoint, outcomes, checkpoint_seconds)
    splits = sorted({sweep.split for sweep in sweeps})
    for at, batch in batches(model, corpus, settings.batch_tokens):
        if outcomes.done[at].all():
            continue
        base, trunks = _trunks(model, batch, splits)
        log = outcomes.add_base(at, base, truth[at])
        outcomes.used[at] = (outcomes.base_predicted[at] == truth[at]) if settings.correct_only else True
        before = int(outcomes.turns[0])
        turns = [
            (sweep, turn)
            for sweep in sweeps
            for turn in sweep.plans.turns(model.steered, batch, trunks[sweep.split], settings.batch_tokens)
        ]
        for number, (sweep, turn) in enumerate(turns):
            if cancelled is not None and cancelled():
                raise MeasureCancelled
            if number >= before and outcomes.used[at].any():  # a batch that was under way goes on where it was
                logits = sweep.plans.logits(model.steered, batch, trunks[sweep.split], turn)
                outcomes.add(sweep.places[turn], at, logits.float().cpu().numpy(), log, truth[at])
                outcomes.turns[0] = number + 1
                saver.save_if_due()
        outcomes.done[at], outcomes.turns[0] = True, 0
        if progress is not None:
            done = int(outcomes.done.sum())
            progress(MeasureProgress(done, len(corpus), time.monotonic() - started, resumed))
        saver.save_if_due()
    if settings.rows_per_class is not None:
        _cap(outcomes.used, truth, settings.rows_per_class)
    return outcomes, checkpoint


def batches(
    model: LoadedModel, corpus: Corpus, batch_tokens: int
) -> Iterator[tuple[npt.NDArray[np.int64], TokenBatch]]:
    """Length-sorted batches, block by block, with the rows of their texts. Texts without a token are left out."""
    for block in corpus.blocks():
        encoded = model.tokens.encode(block.texts, keep_empty=True)
        some = [row for row, text in enumerate(encoded) if text.ids]
        for places in length_sorted([len(encoded[row].ids) for row in some], batch_tokens):
            rows = [some[place] for place in places]
            batch = model.tokens.pad([encoded[row].ids for row in rows], model.device)
            yield np.array(rows, dtype=np.int64) + block.index * BLOCK_ROWS, batch


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
    model: LoadedModel,
    range_set: RangeSet,
    corpus: Corpus,
    grid: Sequence[Setting],
    settings: EvaluationSettings,
) -> Path:
    """Named by everything that the outcomes depend on."""
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for part in (model.identity.fingerprint, model.dtype, range_set.id, corpus.sha256):
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
        loaded = Outcomes(**{name: arrays[name].copy() for name in _ARRAYS}, tied_is_none=fresh.tied_is_none)
        if loaded.predicted.shape != fresh.predicted.shape or loaded.kl.shape != fresh.kl.shape:
            raise ValueError("another shape")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("the checkpoint %s cannot be read (%s): starting over", path, error)
        return fresh
    return loaded


class _Saver:
    """Writes the checkpoint now and then: one that is slow to write less often, down to `LONGEST`; 0: at each turn."""

    def __init__(self, path: Path | None, outcomes: Outcomes, seconds: float) -> None:
        self._path, self._outcomes, self._seconds = path, outcomes, seconds
        self._saved, self._cost = time.monotonic(), 0.0

    def save_if_due(self) -> None:
        started = time.monotonic()
        every = min(max(self._seconds, 20 * self._cost), LONGEST) if self._seconds else 0.0
        if self._path is None or started - self._saved < every:
            return
        with written_whole(self._path) as partial:
            save_file({name: np.ascontiguousarray(getattr(self._outcomes, name)) for name in _ARRAYS}, partial)
        self._saved = time.monotonic()
        self._cost = self._saved - started
