"""One pass over a corpus: statistics of every layer, concept and neuron at once (DESIGN "Fitting is repeatable").

A block of 1,024 rows is the unit of work: its batches form inside it, and blocks merge in index order, so that the
result is bit for bit the same whether the fit ran through or was killed and resumed.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from range_store.codec import assemble
from range_store.erasure import STATISTICAL, Ranking, Site, resolve_layers
from range_store.range_set import CorpusIdentity, FitSettings, InspectLayer, ProbeSettings, Provenance, RangeSet
from workers.fitting.checkpoint import BlockStates, Checkpoint, Counters
from workers.fitting.corpus import BLOCK_ROWS, Block, Corpus, CorpusError, match_labels
from workers.fitting.fitter import RangeFitter
from workers.fitting.probe import ProbeSample
from workers.models.loading import LoadedModel
from workers.models.tokens import length_sorted

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 15.0


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


def fit(
    model: LoadedModel,
    corpus: Corpus,
    *,
    layers: tuple[int, ...] | Literal["all"] = (-1,),
    rankings: tuple[Ranking, ...] = STATISTICAL,
    site: Site = "block_output",
    position: Literal["read", "mean"] = "read",
    correct_only: bool = False,
    rows_per_class: int | None = None,
    probe: ProbeSettings | None = None,
    bins: int = 512,
    batch_tokens: int = 4096,
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Callable[[FitProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Fitted:
    """Fit ranges of every concept of `corpus` at `layers`.

    Args:
        site: record what blocks give, or what their MLPs add.
        position: record the state at the read position, or the mean over real tokens.
        correct_only: use only texts that the unmasked model gets right (the paper's curation for Llama); concepts
            without any are left out. rows_per_class: of these, the first so many of each class.
        probe: how to train the `probe` ranking, where that is among `rankings`; None: the defaults.
        bins: of the histograms.
        batch_tokens: padded tokens of a batch; part of what makes the result repeatable.
        checkpoint_dir: where to keep what is done so far; a fit with the same arguments goes on from it.
        cancelled: asked after every batch.

    Raises:
        InvalidErasure: a layer that the model does not have.
        CorpusError: a row that cannot be used, or no text that counts.
        FitCancelled: `cancelled` said so.
    """
    started = time.monotonic()
    chosen = resolve_layers(layers, model.identity.n_layers)
    if correct_only:
        match_labels(corpus.concepts, model.identity.labels)
    settings = FitSettings(
        layers=chosen,
        rankings=rankings,
        site=site,
        position=position,
        dtype=model.dtype,
        bins=bins,
        batch_tokens=batch_tokens,
        block_rows=BLOCK_ROWS,
        threads=torch.get_num_threads(),
        texts="correct" if correct_only else "all",
        rows_per_class=rows_per_class,
        probe=(probe or ProbeSettings()) if "probe" in rankings else None,
    )
    hidden = model.identity.hidden_size
    sample = ProbeSample(len(corpus), len(chosen), hidden, settings.probe) if settings.probe else None
    fitter = RangeFitter(corpus.concepts, len(chosen), hidden, bins, sample)
    checkpoint = Checkpoint.of(checkpoint_dir, model, corpus, settings, checkpoint_seconds) if checkpoint_dir else None
    counters, under_way = checkpoint.load(fitter) if checkpoint else (Counters(), None)
    before = min(counters.next_block * BLOCK_ROWS, len(corpus))
    resumed = before + (int(under_way.done.sum()) if under_way else 0)
    for block in corpus.blocks(counters.next_block):

        def after_batch(now: BlockStates, before: int = before, counters: Counters = counters) -> None:
            if cancelled is not None and cancelled():
                raise FitCancelled
            if checkpoint and checkpoint.due:
                checkpoint.save(fitter, counters, now)
            if progress is not None:
                rows = before + int(now.done.sum())
                progress(FitProgress(rows, len(corpus), time.monotonic() - started, resumed))

        states, cut, empty = _states(model, block, settings, under_way, after_batch)
        under_way = None
        _count_in(fitter, block, states, rows_per_class)
        counters = Counters(block.index + 1, counters.truncated + cut, counters.empty + empty)
        before += len(block.texts)
        if checkpoint and checkpoint.due:
            checkpoint.save(fitter, counters, None)
    return _assemble(model, corpus, settings, fitter, counters, checkpoint.path if checkpoint else None)


def _states(
    model: LoadedModel,
    block: Block,
    settings: FitSettings,
    under_way: BlockStates | None,
    after_batch: Callable[[BlockStates], None],
) -> tuple[BlockStates, int, int]:
    """States of every text of a block; how many texts were cut, and how many have no token."""
    encoded = model.tokens.encode(block.texts, keep_empty=True)
    now = under_way or BlockStates.empty(len(encoded), len(settings.layers), model.identity.hidden_size)
    some = [row for row, text in enumerate(encoded) if text.ids]
    for places in length_sorted([len(encoded[row].ids) for row in some], settings.batch_tokens):
        rows = [some[place] for place in places]
        if now.done[rows].all():
            continue
        batch = model.tokens.pad([encoded[row].ids for row in rows], model.device)
        logits, recorded = model.steered.record(batch, settings.layers, settings.site, settings.position)
        for index, layer in enumerate(settings.layers):
            now.states[rows, index] = recorded[layer].float().cpu().numpy()
        now.kept[rows] = True
        if settings.texts == "correct":
            truth = [model.identity.labels.index(block.concepts[row]) for row in rows]
            now.kept[rows] = logits.float().argmax(dim=1).cpu().numpy() == truth
        now.done[rows] = True
        after_batch(now)
    return now, sum(text.truncated for text in encoded), len(encoded) - len(some)


def _count_in(fitter: RangeFitter, block: Block, now: BlockStates, rows_per_class: int | None) -> None:
    """Count the kept texts of a block in, each class up to its cap."""
    kept = now.kept.copy()
    index = {concept: number for number, concept in enumerate(fitter.concepts)}
    concept = np.array([index[name] for name in block.concepts], dtype=np.int64)
    if rows_per_class is not None:
        for number, name in enumerate(fitter.concepts):
            own = np.flatnonzero(kept & (concept == number))
            kept[own[max(0, rows_per_class - fitter.counts[name]) :]] = False
    if fitter.sample is not None:
        fitter.sample.update(block.index * BLOCK_ROWS, now.states, np.where(kept, concept, -1))
    fitter.update(now.states[kept], [name for name, keep in zip(block.concepts, kept, strict=True) if keep])


def _assemble(
    model: LoadedModel,
    corpus: Corpus,
    settings: FitSettings,
    fitter: RangeFitter,
    counters: Counters,
    checkpoint: Path | None,
) -> Fitted:
    """The range set of a pass that is done."""
    counts = {concept: count for concept, count in fitter.counts.items() if count}
    if not counts:
        raise CorpusError(f"{corpus.name}: no text is left to fit on")
    if dropped := sorted(set(corpus.concepts) - set(counts)):
        logger.warning("left out, since no text of theirs counts: %s", ", ".join(dropped))
    provenance = Provenance(
        model=model.identity,
        corpus=CorpusIdentity(
            name=corpus.name,
            split=corpus.split,
            selection=corpus.selection,
            sha256=corpus.sha256,
            rows=len(corpus),
            truncated=counters.truncated,
            empty=counters.empty,
            odd=corpus.odd,
            counts=counts,
        ),
        settings=settings,
        versions={name: version(name) for name in ("neuronlens", "torch", "transformers", "numpy")},
        created_at=time.time(),
    )
    concepts = tuple(counts)
    parts = {
        layer: fitter.layer(index, concepts, settings.rankings, settings.probe)
        for index, layer in enumerate(settings.layers)
    }
    inspect = {layer: part[1] for layer, part in parts.items()}
    return Fitted(assemble(provenance, {layer: part[0] for layer, part in parts.items()}, inspect), inspect, checkpoint)
