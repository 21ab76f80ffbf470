"""A fit: statistics of every layer, concept and neuron, from one pass over a corpus.

A chunk of 1,024 rows is the unit of work: batches are formed within a chunk, and chunks merge in the order of their
index. So the result is the same to the last bit whether a fit ran through, was killed and resumed, or ran on a cluster.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch

from range_store.atomic_files import make_private_directory, remove_partial_files
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
from workers.corpora.corpus import Chunk, Corpus, match_labels, warn_about_blank_texts
from workers.corpora.errors import CorpusError
from workers.corpora.row_sample import sample_size
from workers.corpora.rows import CHUNK_ROWS
from workers.fitting.checkpoint import Arrays, Checkpoint, checkpoint_path
from workers.fitting.fitter import RangeFitter
from workers.fitting.moments import Moments
from workers.fitting.probe import ProbeSample
from workers.fitting.progress import Progress, ProgressCallback
from workers.fitting.recording import ChunkStates, record_chunk, record_sample
from workers.models.errors import PredictsNoLabels
from workers.models.loading import LoadedModel
from workers.models.predictions import Head

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 15.0
MAX_ROWS = int(np.iinfo(np.uint32).max)
"""All rows of a corpus may fall into one bin of a histogram, which must be able to count them."""
_COUNTERS = ("next_chunk", "truncated", "empty")
_STATES = ("states", "done", "kept")


@dataclass(frozen=True, eq=False)
class FitResult:
    """A range set, its inspection arrays by layer, and the checkpoint to discard once the range set is published."""

    range_set: RangeSet
    inspect: dict[int, InspectLayer]
    checkpoint: Path | None = None

    def discard_checkpoint(self) -> None:
        """Delete the checkpoint, if there is one."""
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)


class FitOptions(TypedDict, total=False):
    """Options of a fit; see `start_fit`."""

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
    model: LoadedModel, corpus: Corpus, *, progress: ProgressCallback | None = None, **options: Unpack[FitOptions]
) -> FitResult:
    """Fit the ranges of every concept of `corpus`, in this process.

    Args:
        progress: called after every batch.
        options: see `start_fit`.

    Raises:
        InvalidErasure: a layer that the model does not have.
        CorpusError: a row that cannot be used, or no text that counts.
    """
    run = start_fit(model.identity, model.dtype, model.head, torch.get_num_threads(), corpus, **options)
    if (sample := run.edge_sample()) is not None:
        run.set_edges(record_sample(model, sample, run.settings))
    resumed = run.rows_done

    def after_batch(states: ChunkStates) -> None:
        run.unfinished = states
        run.checkpoint.save_if_due(run.arrays)
        if progress is not None:
            progress(run.progress(resumed))

    for chunk in corpus.chunks(run.next_chunk):
        states = record_chunk(model, chunk, run.settings, run.unfinished, after_batch)
        run.unfinished = None
        add_chunk(run.fitter, chunk, states, run.remaining())
        run.next_chunk += 1
        run.truncated += states.truncated
        run.empty += states.empty
        run.checkpoint.save_if_due(run.arrays)
    return run.result()


@dataclass(eq=False)
class FitRun:
    """A fit that is under way.

    Attributes:
        next_chunk: number of chunks that are added.
        truncated, empty: texts of these that were cut, and that had no token.
        unfinished: states of the next chunk, as far as they are recorded.
    """

    model: ModelIdentity
    corpus: Corpus
    settings: FitSettings
    fitter: RangeFitter
    checkpoint: Checkpoint
    next_chunk: int = 0
    truncated: int = 0
    empty: int = 0
    unfinished: ChunkStates | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def rows_done(self) -> int:
        """Rows of the chunks that are added, and of the batches that have run since."""
        whole = min(self.next_chunk * CHUNK_ROWS, len(self.corpus))
        return whole + (int(self.unfinished.done.sum()) if self.unfinished else 0)

    def edge_sample(self) -> Chunk | None:
        """Texts that decide the edges of the histograms; None if the edges are set, or the first chunk sets them."""
        rows = self.settings.edge_rows
        return None if rows is None or self.fitter.edges is not None else self.corpus.sample(rows)

    def set_edges(self, states: npt.NDArray[np.float32]) -> None:
        """Set the edges around the states [n, L, D] of that sample. If no text counted, the first chunk sets them."""
        if len(states):
            self.fitter.set_edges(states)

    def remaining(self) -> dict[str, int] | None:
        """How many more texts of each concept may count; None: any number."""
        limit = self.settings.rows_per_class
        return None if limit is None else {name: limit - count for name, count in self.fitter.counts.items()}

    def progress(self, resumed: int) -> Progress:
        """How far the fit is. resumed: rows that an earlier run did."""
        done, total = self.rows_done, len(self.corpus)
        return Progress("fitting", done, total, time.monotonic() - self.started, resumed, done / total)

    def arrays(self) -> Arrays:
        """The state of the fit, for a checkpoint."""
        arrays = self.fitter.arrays()
        arrays |= {f"counters.{name}": np.array(getattr(self, name)) for name in _COUNTERS}
        if self.unfinished is not None:
            arrays |= {f"chunk.{name}": getattr(self.unfinished, name) for name in _STATES}
        return arrays

    def restore(self, arrays: Arrays) -> "FitRun":
        """Continue from `arrays`. Raises KeyError or ValueError if they are not of this fit."""
        counters = {name: arrays[f"counters.{name}"].item() for name in _COUNTERS}
        unfinished = None
        if "chunk.states" in arrays:
            states, done, kept = (arrays[f"chunk.{name}"].copy() for name in _STATES)
            unfinished = ChunkStates(states, done, kept)
        self.fitter.restore(arrays)
        return replace(self, unfinished=unfinished, **counters)

    def result(self) -> FitResult:
        """The range set, when all chunks are added. Raises CorpusError if no text counted."""
        counts = {concept: count for concept, count in self.fitter.counts.items() if count}
        if not counts:
            raise CorpusError(f"{self.corpus.name}: no text is left to fit on")
        if dropped := sorted(set(self.corpus.concepts) - set(counts)):
            logger.warning("concepts without any text that counts are left out: %s", ", ".join(dropped))
        corpus = self.corpus
        provenance = Provenance(
            model=self.model,
            corpus=CorpusIdentity(
                name=corpus.name,
                split=corpus.split,
                selection=corpus.selection,
                sha256=corpus.sha256,
                rows=len(corpus),
                truncated=self.truncated,
                empty=self.empty,
                odd=corpus.odd,
                counts=counts,
            ),
            settings=self.settings,
            versions={name: version(name) for name in ("neuronlens", "torch", "transformers", "numpy")},
            created_at=time.time(),
        )
        layers, inspect = {}, {}
        for index, layer in enumerate(self.settings.layers):
            layers[layer], inspect[layer] = self.fitter.layer(
                index, tuple(counts), self.settings.rankings, self.settings.probe
            )
        return FitResult(assemble(provenance, layers, inspect), inspect, self.checkpoint.path)


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
    """A fit of `corpus` at its start, or where a checkpoint left it.

    Args:
        dtype: of the model's parameters. head: how its logits are read. threads: number that its forward passes use.
        layers: blocks whose states are recorded.
        site: record the output of a block, or what its MLP adds.
        position: record the state at the read position, or the mean over real tokens.
        correct_only: use only texts that the unmasked model classifies correctly (the paper's curation for Llama);
            concepts without such a text are left out.
        rows_per_class: use only the first so many of these texts of each concept.
        probe: how to train the `probe` ranking, if `rankings` has it; None: the defaults.
        bins: of the histograms.
        batch_tokens: padded tokens of a batch; they are part of what makes the result repeatable.
        checkpoint_dir: where the checkpoint is kept; a fit with the same arguments resumes from it.

    Raises:
        InvalidErasure: a layer that the model does not have.
        CorpusError: with `correct_only`, a concept that is no label of the model; or more texts than a bin can count.
        PredictsNoLabels: `correct_only` with a regression model.
    """
    chosen = resolve_layers(layers, model.n_layers)
    if len(corpus) > MAX_ROWS:
        raise CorpusError(f"{len(corpus):,} texts are more than histograms can count: --max-rows {MAX_ROWS} or fewer")
    warn_about_blank_texts(corpus)
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
        edge_rows=sample_size(len(corpus)) if len(corpus) > CHUNK_ROWS else None,
    )
    hidden = model.hidden_size
    sample = ProbeSample.draw(len(corpus), len(chosen), hidden, settings.probe) if settings.probe else None
    fitter = RangeFitter(corpus.concepts, len(chosen), hidden, bins, sample)
    path = None
    if checkpoint_dir is not None:
        make_private_directory(checkpoint_dir)
        remove_partial_files(checkpoint_dir, "fit-*")
        inputs = (model.fingerprint, corpus.sha256, settings.model_dump(mode="json"))
        path = checkpoint_path(checkpoint_dir, "fit-", *inputs)
    run = FitRun(model, corpus, settings, fitter, Checkpoint(path, checkpoint_seconds))
    return run.checkpoint.load(run.restore, run)


def add_chunk(
    fitter: RangeFitter, chunk: Chunk, states: ChunkStates, remaining: Mapping[str, int] | None = None
) -> dict[str, Moments]:
    """Add the texts of a chunk that count to the statistics.

    Args:
        remaining: how many texts of each concept may count, the first ones; None: any number.

    Returns:
        The moments of this chunk alone.
    """
    kept = states.kept.copy()
    index = {concept: number for number, concept in enumerate(fitter.concepts)}
    concepts = np.array([index[name] for name in chunk.concepts], dtype=np.int64)
    if remaining is not None:
        for number, name in enumerate(fitter.concepts):
            own = np.flatnonzero(kept & (concepts == number))
            kept[own[max(0, remaining[name]) :]] = False
    if fitter.sample is not None:
        fitter.sample.update(chunk.index * CHUNK_ROWS, states.states, np.where(kept, concepts, -1))
    return fitter.update(states.states[kept], [name for name, keep in zip(chunk.concepts, kept, strict=True) if keep])
