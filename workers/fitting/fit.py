"""One pass over a corpus: statistics of every layer, concept and neuron at once (DESIGN "Fitting is repeatable").

A block of 1,024 rows is the unit of work: its batches form inside it, and blocks merge in index order, so that the
result is bit for bit the same whether the fit ran through or was killed and resumed.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from range_store.codec import assemble
from range_store.erasure import RANKINGS, Ranking, resolve_layers
from range_store.range_set import CorpusIdentity, FitSettings, InspectLayer, Provenance, RangeSet, ServeLayer
from range_store.rankings import saliency
from workers.fitting.corpus import BLOCK_ROWS, Block, Corpus
from workers.fitting.histograms import count, edges_from
from workers.fitting.moments import Moments
from workers.models.loading import LoadedModel
from workers.models.tokens import length_sorted

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 15.0
_MOMENTS = tuple(field.name for field in fields(Moments) if field.name != "count")


class FitCancelled(Exception):
    """Stopped by its caller; the checkpoint remains."""


@dataclass(frozen=True)
class FitProgress:
    """How far a fit is. `resumed_rows` were done by an earlier run, before `seconds` began."""

    rows_done: int
    rows_total: int
    seconds: float
    resumed_rows: int


@dataclass(frozen=True, eq=False)
class Fitted:
    """A range set, the rest of its statistics, and the checkpoint that is no longer needed once it is published."""

    range_set: RangeSet
    inspect: dict[int, InspectLayer]
    checkpoint: Path | None = None

    def discard_checkpoint(self) -> None:
        """Call when the range set is published."""
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)


class RangeFitter:
    """Statistics so far: moments [L, D] per concept and histograms [L, C, D, B + 2]; memory does not grow with rows.

    Args:
        concepts: C of them; n_layers: L layers; hidden: D; bins: B.
    """

    def __init__(self, concepts: tuple[str, ...], n_layers: int, hidden: int, bins: int) -> None:
        self.concepts = concepts
        self.bins = bins
        self.moments = {concept: Moments.empty((n_layers, hidden)) for concept in concepts}
        self.edges: npt.NDArray[np.float64] | None = None
        self.histogram = np.zeros((n_layers, len(concepts), hidden, bins + 2), dtype=np.int64)

    def update(self, states: npt.NDArray[np.floating], concepts: tuple[str, ...]) -> None:
        """Count a block in. states: [n, L, D]; concepts: of each row. The first block sets the histograms' edges."""
        n, layers, hidden = states.shape
        if self.edges is None:
            self.edges = edges_from(states.reshape(n, layers * hidden), self.bins).reshape(layers, hidden, -1)
        of_row = np.array(concepts)
        for c, concept in enumerate(self.concepts):
            own = states[of_row == concept]
            if len(own):
                self.moments[concept] = self.moments[concept].merge(Moments.of(own))
                for layer in range(layers):
                    self.histogram[layer, c] += count(own[:, layer], self.edges[layer])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays, for a checkpoint."""
        assert self.edges is not None
        arrays: dict[str, npt.NDArray[Any]] = {"edges": self.edges, "histogram": self.histogram}
        for c, concept in enumerate(self.concepts):
            arrays[f"{c}.count"] = np.array(self.moments[concept].count)
            for name in _MOMENTS:
                arrays[f"{c}.{name}"] = getattr(self.moments[concept], name)
        return arrays

    def restore(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Undo `arrays`. Raises KeyError or ValueError if they are not of this fit."""
        if arrays["histogram"].shape != self.histogram.shape:
            raise ValueError("another shape")
        self.edges, self.histogram = arrays["edges"].copy(), arrays["histogram"].copy()
        for c, concept in enumerate(self.concepts):
            floats = {name: arrays[f"{c}.{name}"].copy() for name in _MOMENTS}
            self.moments[concept] = Moments(count=arrays[f"{c}.count"].item(), **floats)

    def layer(self, index: int, rankings: tuple[Ranking, ...]) -> tuple[ServeLayer, InspectLayer]:
        """Statistics of the `index`-th layer."""
        assert self.edges is not None
        moments = [self.moments[concept] for concept in self.concepts]
        counts = np.array([each.count for each in moments], dtype=np.int64)
        mean, std = _rows([each.mean[index] for each in moments]), _rows([each.std[index] for each in moments])
        mean_abs = _rows([each.mean_abs[index] for each in moments])
        serve = ServeLayer(mean, std, {name: saliency(name, counts, mean, std, mean_abs) for name in rankings})
        inspect = InspectLayer(
            mean_abs=mean_abs,
            m3=_rows([each.central(3)[index] for each in moments]),
            m4=_rows([each.central(4)[index] for each in moments]),
            minimum=_rows([each.minimum[index] for each in moments]),
            maximum=_rows([each.maximum[index] for each in moments]),
            edges=self.edges[index],
            histogram=self.histogram[index].astype(np.uint32),
        )
        return serve, inspect


def fit(
    model: LoadedModel,
    corpus: Corpus,
    *,
    layers: tuple[int, ...] | Literal["all"] = (-1,),
    rankings: tuple[Ranking, ...] = RANKINGS,
    bins: int = 512,
    batch_tokens: int = 4096,
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Callable[[FitProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Fitted:
    """Fit ranges of every concept of `corpus` at `layers`.

    Args:
        bins: of the histograms.
        batch_tokens: padded tokens of a batch; part of what makes the result repeatable.
        checkpoint_dir: where to keep what is done so far; a fit with the same arguments goes on from it.
        cancelled: asked after every batch.

    Raises:
        InvalidErasure: a layer that the model does not have.
        CorpusError: a row that cannot be used.
        FitCancelled: `cancelled` said so.
    """
    started = time.monotonic()
    chosen = resolve_layers(layers, model.identity.n_layers)
    settings = FitSettings(
        layers=chosen,
        rankings=rankings,
        dtype=model.dtype,
        bins=bins,
        batch_tokens=batch_tokens,
        block_rows=BLOCK_ROWS,
        threads=torch.get_num_threads(),
    )
    fitter = RangeFitter(corpus.concepts, len(chosen), model.identity.hidden_size, bins)
    checkpoint = _Checkpoint.of(checkpoint_dir, model, corpus, settings)
    next_block, truncated = checkpoint.load(fitter) if checkpoint else (0, 0)
    resumed = done = min(next_block * BLOCK_ROWS, len(corpus))
    saved = time.monotonic()

    def tell(before: int, rows: int) -> None:
        if cancelled is not None and cancelled():
            raise FitCancelled
        if progress is not None:
            progress(FitProgress(before + rows, len(corpus), time.monotonic() - started, resumed))

    for block in corpus.blocks(next_block):
        states, cut = _states(model, block, chosen, batch_tokens, partial(tell, done))
        fitter.update(states, block.concepts)
        truncated += cut
        done += len(block.texts)
        if checkpoint and time.monotonic() - saved >= checkpoint_seconds:
            checkpoint.save(fitter, block.index + 1, truncated)
            saved = time.monotonic()
    provenance = Provenance(
        model=model.identity,
        corpus=CorpusIdentity(
            name=corpus.name,
            split=corpus.split,
            selection=corpus.selection,
            sha256=corpus.sha256,
            rows=len(corpus),
            truncated=truncated,
            counts=corpus.counts,
        ),
        settings=settings,
        versions={name: version(name) for name in ("neuronlens", "torch", "transformers", "numpy")},
        created_at=time.time(),
    )
    parts = {layer: fitter.layer(index, rankings) for index, layer in enumerate(chosen)}
    inspect = {layer: part[1] for layer, part in parts.items()}
    range_set = assemble(provenance, {layer: part[0] for layer, part in parts.items()}, inspect)
    return Fitted(range_set, inspect, checkpoint.path if checkpoint else None)


def _states(
    model: LoadedModel, block: Block, layers: tuple[int, ...], batch_tokens: int, tell: Callable[[int], None]
) -> tuple[npt.NDArray[np.float32], int]:
    """States at the read position of every text of a block, [n, L, D], and how many texts were cut."""
    encoded = model.tokens.encode(block.texts)
    states = np.empty((len(encoded), len(layers), model.identity.hidden_size), dtype=np.float32)
    done = 0
    for rows in length_sorted([len(text.ids) for text in encoded], batch_tokens):
        _, recorded = model.steered.record(model.tokens.pad([encoded[row].ids for row in rows], model.device), layers)
        for index, layer in enumerate(layers):
            states[rows, index] = recorded[layer].float().cpu().numpy()
        done += len(rows)
        tell(done)
    return states, sum(text.truncated for text in encoded)


def _rows(values: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.stack(values)


@dataclass(frozen=True)
class _Checkpoint:
    """A fit's statistics so far in one file, named by everything that the result depends on."""

    path: Path

    @classmethod
    def of(
        cls, directory: Path | None, model: LoadedModel, corpus: Corpus, settings: FitSettings
    ) -> "_Checkpoint | None":
        if directory is None:
            return None
        directory.mkdir(parents=True, exist_ok=True)
        what = json.dumps([model.identity.fingerprint, corpus.sha256, settings.model_dump(mode="json")])
        return cls(directory / f"fit-{hashlib.sha256(what.encode()).hexdigest()[:20]}.safetensors")

    def load(self, fitter: RangeFitter) -> tuple[int, int]:
        """Put the saved statistics into `fitter`; gives the next block and how many texts were cut so far."""
        if not self.path.exists():
            return 0, 0
        try:
            arrays = load_file(self.path)
            fitter.restore(arrays)
            return arrays["next_block"].item(), arrays["truncated"].item()
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("the checkpoint %s cannot be read (%s): starting over", self.path, error)
            return 0, 0

    def save(self, fitter: RangeFitter, next_block: int, truncated: int) -> None:
        unfinished = self.path.with_suffix(f".{os.getpid()}.partial")
        counters = {"next_block": np.array(next_block), "truncated": np.array(truncated)}
        save_file({name: np.ascontiguousarray(a) for name, a in (fitter.arrays() | counters).items()}, unfinished)
        os.replace(unfinished, self.path)
