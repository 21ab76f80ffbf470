"""One pass over a corpus: statistics of every layer, concept and neuron at once (DESIGN "Fitting is repeatable").

A chunk of 1,024 rows is the unit of work: its batches form inside it, and chunks merge in index order, so that the
result is bit for bit the same whether the fit ran through or was killed and resumed.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch

from range_store.domain.erasure import STATISTICAL_RANKINGS, Ranking, Site, resolve_layers
from range_store.domain.range_set import (
    CorpusIdentity,
    FitSettings,
    InspectLayer,
    ModelIdentity,
    ProbeSettings,
    Provenance,
    RangeSet,
)
from range_store.storage.codec import assemble
from workers.fitting.checkpoint import Checkpoint, ChunkStates, Counters
from workers.fitting.corpus import Chunk, Corpus, match_labels
from workers.fitting.errors import CorpusError
from workers.fitting.fitter import RangeFitter
from workers.fitting.moments import Moments
from workers.fitting.probe import ProbeSample
from workers.fitting.row_sample import wanted_rows
from workers.fitting.rows import CHUNK_ROWS
from workers.models.errors import PredictsNoLabels
from workers.models.loading import LoadedModel
from workers.models.predictions import Head, predicted_labels
from workers.models.tokens import length_sorted

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 15.0
MOST_ROWS = int(np.iinfo(np.uint32).max)
"""That a fit counts: all of them may fall into one bin of a histogram."""


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


class FitOptions(TypedDict, total=False):
    """What `start_fit` is told, which says what each means."""

    layers: tuple[int, ...] | Literal["all"]
    rankings: tuple[Ranking, ...]
    site: Site
    position: Literal["read", "mean"]
    correct_only: bool
    rows_per_class: int | None
    probe: ProbeSettings | None
    bins: int
    batch_tokens: int
    checkpoint_dir: Path | None
    checkpoint_seconds: float


def fit(
    model: LoadedModel,
    corpus: Corpus,
    *,
    progress: Callable[[FitProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **choices: Unpack[FitOptions],
) -> Fitted:
    """Fit ranges of every concept of `corpus` in this process.

    Args:
        choices: those of `start_fit`.
        cancelled: asked after every batch.

    Raises:
        InvalidErasure: a layer that the model does not have.
        CorpusError: a row that cannot be used, or no text that counts.
        FitCancelled: `cancelled` said so.
    """
    under_way = start_fit(model.identity, model.dtype, model.head, torch.get_num_threads(), corpus, **choices)
    counters, fitter, checkpoint = under_way.counters, under_way.fitter, under_way.checkpoint
    if (sample := under_way.edge_sample()) is not None:

        def after_sample_batch(now: ChunkStates) -> None:
            if cancelled is not None and cancelled():
                raise FitCancelled

        under_way.set_edges(record_sample(model, sample, under_way.settings, after_sample_batch))
    before = under_way.rows_done
    resumed = before + (int(under_way.chunk.done.sum()) if under_way.chunk else 0)
    started_chunk = under_way.chunk
    for chunk in corpus.chunks(counters.next_chunk):

        def after_batch(now: ChunkStates, before: int = before) -> None:
            if cancelled is not None and cancelled():
                raise FitCancelled
            if checkpoint and checkpoint.due:
                checkpoint.save(fitter, counters, now)
            if progress is not None:
                progress(under_way.progress(before + int(now.done.sum()), resumed))

        states, cut, empty = record_states(model, chunk, under_way.settings, started_chunk, after_batch)
        started_chunk = None
        add_chunk(fitter, chunk, states, under_way.room())
        counters.next_chunk, counters.truncated, counters.empty = (
            chunk.index + 1,
            counters.truncated + cut,
            counters.empty + empty,
        )
        before += len(chunk.texts)
        if checkpoint and checkpoint.due:
            checkpoint.save(fitter, counters, None)
    return under_way.end()


@dataclass(eq=False)
class FitRun:
    """A pass over a corpus that is under way: what it is to find, and how far it is."""

    model: ModelIdentity
    corpus: Corpus
    settings: FitSettings
    fitter: RangeFitter
    counters: Counters
    checkpoint: Checkpoint | None
    chunk: ChunkStates | None
    """States of the next chunk, as far as an earlier run recorded them."""
    started: float = field(default_factory=time.monotonic)

    @property
    def rows_done(self) -> int:
        """Rows of the chunks that are counted in."""
        return min(self.counters.next_chunk * CHUNK_ROWS, len(self.corpus))

    def edge_sample(self) -> Chunk | None:
        """Texts that are to set the edges of the histograms first; None: they are set, or the first chunk sets them."""
        rows = self.settings.edge_rows
        return None if rows is None or self.fitter.edges is not None else self.corpus.sample(rows)

    def set_edges(self, states: npt.NDArray[np.float32]) -> None:
        """Set them around the states [n, L, D] of that sample's texts; if there are none, the first chunk does."""
        if len(states):
            self.fitter.set_edges(states)

    def room(self) -> dict[str, int] | None:
        """How many more texts of each concept may count; None: any number."""
        most = self.settings.rows_per_class
        return None if most is None else {name: most - count for name, count in self.fitter.counts.items()}

    def progress(self, rows: int, resumed: int) -> FitProgress:
        """How far it is when so many rows are done."""
        return FitProgress(rows, len(self.corpus), time.monotonic() - self.started, resumed)

    def end(self) -> Fitted:
        """The range set. Raises CorpusError if no text counted."""
        path = self.checkpoint.path if self.checkpoint else None
        return _assemble(self.model, self.corpus, self.settings, self.fitter, self.counters, path)


def start_fit(
    model: ModelIdentity,
    dtype: str,
    head: Head,
    threads: int,
    corpus: Corpus,
    *,
    layers: tuple[int, ...] | Literal["all"] = (-1,),
    rankings: tuple[Ranking, ...] = STATISTICAL_RANKINGS,
    site: Site = "block_output",
    position: Literal["read", "mean"] = "read",
    correct_only: bool = False,
    rows_per_class: int | None = None,
    probe: ProbeSettings | None = None,
    bins: int = 512,
    batch_tokens: int = 4096,
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> FitRun:
    """A pass over `corpus`, at its start or where a checkpoint left it.

    Args:
        dtype: of the model's parameters. head: how its logits are read. threads: that its forward passes run on.
        layers: blocks whose states are recorded.
        site: record what blocks give, or what their MLPs add.
        position: record the state at the read position, or the mean over real tokens.
        correct_only: use only texts that the unmasked model gets right (the paper's curation for Llama); concepts
            without any are left out. rows_per_class: of these, the first so many of each class.
        probe: how to train the `probe` ranking, where that is among `rankings`; None: the defaults.
        bins: of the histograms.
        batch_tokens: padded tokens of a batch; part of what makes the result repeatable.
        checkpoint_dir: where to keep what is done so far; a fit with the same arguments goes on from it.

    Raises:
        InvalidErasure: a layer that the model does not have.
        CorpusError: only correct texts are wanted, and a concept is no label of the model; or there are more texts
            than a bin of a histogram can count.
        PredictsNoLabels: only correct texts are wanted of a regression model.
    """
    chosen = resolve_layers(layers, model.n_layers)
    if len(corpus) > MOST_ROWS:
        raise CorpusError(f"{len(corpus):,} texts are more than histograms can count: --max-rows {MOST_ROWS} or fewer")
    corpus.warn_of_blank()
    if correct_only:
        if head == "none":
            raise PredictsNoLabels(model.id, "--correct-only")
        match_labels(corpus.concepts, model.labels)
    settings = FitSettings(
        layers=chosen,
        rankings=rankings,
        site=site,
        position=position,
        dtype=dtype,
        bins=bins,
        batch_tokens=batch_tokens,
        block_rows=CHUNK_ROWS,
        threads=threads,
        texts="correct" if correct_only else "all",
        rows_per_class=rows_per_class,
        probe=(probe or ProbeSettings()) if "probe" in rankings else None,
        edge_rows=wanted_rows(len(corpus)) if len(corpus) > CHUNK_ROWS else None,
    )
    hidden = model.hidden_size
    sample = ProbeSample.drawn(len(corpus), len(chosen), hidden, settings.probe) if settings.probe else None
    fitter = RangeFitter(corpus.concepts, len(chosen), hidden, bins, sample)
    checkpoint = Checkpoint.of(checkpoint_dir, model, corpus, settings, checkpoint_seconds) if checkpoint_dir else None
    counters, chunk = checkpoint.load(fitter) if checkpoint else (Counters(), None)
    return FitRun(model, corpus, settings, fitter, counters, checkpoint, chunk)


def record_states(
    model: LoadedModel,
    chunk: Chunk,
    settings: FitSettings,
    under_way: ChunkStates | None,
    after_batch: Callable[[ChunkStates], None],
) -> tuple[ChunkStates, int, int]:
    """States of every text of a chunk; how many texts were cut, and how many have no token."""
    encoded = model.tokens.encode(chunk.texts, keep_empty=True)
    now = under_way or ChunkStates.empty(len(encoded), len(settings.layers), model.identity.hidden_size)
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
            truth = [model.identity.labels.index(chunk.concepts[row]) for row in rows]
            now.kept[rows] = predicted_labels(logits.float().cpu().numpy(), model.head) == truth
        now.done[rows] = True
        after_batch(now)
    return now, sum(text.truncated for text in encoded), len(encoded) - len(some)


def record_sample(
    model: LoadedModel, sample: Chunk, settings: FitSettings, after_batch: Callable[[ChunkStates], None]
) -> npt.NDArray[np.float32]:
    """States [n, L, D] of those texts of a sample that count."""
    states, _, _ = record_states(model, sample, settings, None, after_batch)
    return states.states[states.kept]


def add_chunk(
    fitter: RangeFitter, chunk: Chunk, now: ChunkStates, room: Mapping[str, int] | None = None
) -> dict[str, Moments]:
    """Count the kept texts of a chunk in, and give their moments. room: of each concept, only the first so many."""
    kept = now.kept.copy()
    index = {concept: number for number, concept in enumerate(fitter.concepts)}
    concept = np.array([index[name] for name in chunk.concepts], dtype=np.int64)
    if room is not None:
        for number, name in enumerate(fitter.concepts):
            own = np.flatnonzero(kept & (concept == number))
            kept[own[max(0, room[name]) :]] = False
    if fitter.sample is not None:
        fitter.sample.update(chunk.index * CHUNK_ROWS, now.states, np.where(kept, concept, -1))
    return fitter.update(now.states[kept], [name for name, keep in zip(chunk.concepts, kept, strict=True) if keep])


def _assemble(
    model: ModelIdentity,
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
        model=model,
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
