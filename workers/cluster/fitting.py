"""A fit on a pool of models. Its result is that of one process, to the bit, however many actors there are or die.

An actor gets a *span*, a few consecutive chunks, and returns the moments of each chunk and one histogram of all. They
are added in the order of the chunks, to the same fitter and checkpoint as in one process.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Unpack

import numpy as np
import numpy.typing as npt

from range_store.domain.range_set import FitSettings
from workers.cluster.model_pool import ActorFunction, ModelPool
from workers.corpora.corpus import Chunk, Corpus
from workers.corpora.rows import CHUNK_ROWS
from workers.fitting.fit import FitOptions, FitResult, FitRun, add_chunk, start_fit
from workers.fitting.fitter import Part, RangeFitter
from workers.fitting.probe import ProbeSample
from workers.fitting.progress import ProgressCallback
from workers.fitting.recording import record_chunk, record_sample
from workers.models.loading import LoadedModel

SPAN_SECONDS = 5.0
"""Approximate duration of a span. A longer one loses more work when its actor dies, a shorter one sends more histograms
for the same texts."""
MAX_CHUNKS = 16
"""Maximum length of a span, in chunks."""


@dataclass(frozen=True)
class Span:
    """Consecutive chunks.

    Attributes:
        sampled: indices of those of their rows that the probe is trained on.
        remaining: how many more texts of each concept count; None: all.
    """

    chunks: tuple[Chunk, ...]
    sampled: npt.NDArray[np.int64] | None
    remaining: Mapping[str, int] | None

    def __str__(self) -> str:
        first, last = self.chunks[0], self.chunks[-1]
        return f"rows {first.index * CHUNK_ROWS + 1:,} to {last.index * CHUNK_ROWS + len(last.texts):,}"


@dataclass(frozen=True)
class Sample:
    """A sample of the corpus, as a chunk."""

    chunk: Chunk

    def __str__(self) -> str:
        return f"a sample of {len(self.chunk.texts):,} rows"


@dataclass(frozen=True, eq=False)
class SpanResult:
    """The statistics of a span, and its number of texts: those that count, by concept, truncated and empty ones."""

    part: Part
    counts: Mapping[str, int]
    truncated: int
    empty: int


@dataclass(frozen=True, eq=False)
class _Context:
    """What all spans have in common. `edges`: of the histograms; None: the span sets them."""

    concepts: tuple[str, ...]
    settings: FitSettings
    edges: npt.NDArray[np.float64] | None


def _span_fitter(model: LoadedModel, context: _Context) -> Callable[[Span], SpanResult]:
    """Runs on an actor: makes the function that gives the statistics of a span."""
    settings = context.settings
    hidden, layers = model.identity.hidden_size, len(settings.layers)

    def fit_span(span: Span) -> SpanResult:
        sample = None if span.sampled is None else ProbeSample(span.sampled, layers, hidden)
        fitter = RangeFitter(context.concepts, layers, hidden, settings.bins, sample)
        fitter.edges = context.edges
        moments = []
        truncated = empty = 0
        for chunk in span.chunks:
            states = record_chunk(model, chunk, settings)
            remaining = span.remaining and {name: n - fitter.counts[name] for name, n in span.remaining.items()}
            moments.append(add_chunk(fitter, chunk, states, remaining))
            truncated, empty = truncated + states.truncated, empty + states.empty
        counts = fitter.histogram if len(span.chunks) * CHUNK_ROWS >= 1 << 16 else fitter.histogram.astype(np.uint16)
        part = Part(tuple(moments), counts, fitter.edges, fitter.sample)
        return SpanResult(part, fitter.counts, truncated, empty)

    return fit_span


def _sample_recorder(model: LoadedModel, settings: FitSettings) -> Callable[[Sample], npt.NDArray[np.float32]]:
    """Runs on an actor: makes the function that records the states of a sample."""
    return lambda sample: record_sample(model, sample.chunk, settings)


def fit_on(
    pool: ModelPool,
    corpus: Corpus,
    *,
    progress: ProgressCallback | None = None,
    **options: Unpack[FitOptions],
) -> FitResult:
    """Fit ranges of every concept of the corpus on a pool.

    A fit that was stopped resumes after its last span, on a pool or in one process with as many threads as an actor.

    Args:
        options: those of `workers.fitting.fit.start_fit`.

    Raises:
        InvalidErasure, CorpusError: as `workers.fitting.fit.fit`.
        ModelError, ClusterError: see `ModelPool`.
    """
    info = pool.model_info
    run = start_fit(info.identity, info.dtype, info.head, info.threads, corpus, **options)
    run.unfinished = None  # actors repeat a chunk that was left unfinished
    spans = _Spans(run, pool.layout.actors)
    consistent = True
    try:
        for result, seconds in _results(pool, run, spans):
            consistent = False
            run.fitter.merge(result.part)
            run.next_chunk += len(result.part.moments)
            run.truncated += result.truncated
            run.empty += result.empty
            consistent = True
            spans.set_length(seconds / len(result.part.moments))
            if progress is not None:
                progress(run.progress(spans.resumed))
            run.checkpoint.save_if_due(run.arrays)
    except BaseException:
        if consistent and run.rows_done > spans.resumed:
            run.checkpoint.save(run.arrays())
        raise
    return run.result()


class _Spans:
    """Cuts the remaining chunks into spans of about `SPAN_SECONDS`. The last ones are short, so that all actors finish
    together."""

    def __init__(self, run: FitRun, actors: int) -> None:
        self._run, self._actors = run, actors
        self._chunks = run.corpus.chunks(run.next_chunk)
        self._left = -(-len(run.corpus) // CHUNK_ROWS) - run.next_chunk
        self._length = 1
        self.resumed = run.rows_done

    def set_length(self, chunk_seconds: float) -> None:
        """Choose the length of the next spans by the time that a chunk took."""
        self._length = max(1, min(MAX_CHUNKS, int(SPAN_SECONDS / max(chunk_seconds, 1e-3))))

    def next(self, length: int | None = None) -> Span | None:
        """The next span; None after the last chunk."""
        length = length or min(self._length, -(-self._left // (2 * self._actors)))
        chunks = tuple(islice(self._chunks, max(1, length)))
        if not chunks:
            return None
        self._left -= len(chunks)
        sample = self._run.fitter.sample
        first, end = chunks[0].index * CHUNK_ROWS, (chunks[-1].index + 1) * CHUNK_ROWS
        return Span(chunks, None if sample is None else sample.between(first, end).rows, self._run.remaining())


def _results(pool: ModelPool, run: FitRun, spans: _Spans) -> Iterator[tuple[SpanResult, float]]:
    """The result of every span, in order, and the seconds that it took."""
    context = _Context(run.corpus.concepts, run.settings, run.fitter.edges)
    if (sample := run.edge_sample()) is not None:  # all chunks need the edges
        recorder = ActorFunction[Sample, npt.NDArray[np.float32]].of(_sample_recorder, run.settings)
        run.set_edges(pool.call(recorder, Sample(sample)))
    while run.fitter.edges is None:  # then the first chunk with a text that counts sets them
        if (first := spans.next(1)) is None:
            return
        for _, result, seconds in pool.map(ActorFunction[Span, SpanResult].of(_span_fitter, context), iter((first,))):
            yield result, seconds
    fitter = ActorFunction[Span, SpanResult].of(_span_fitter, replace(context, edges=run.fitter.edges))
    for span, result, seconds in pool.map(fitter, iter(spans.next, None)):
        remaining = run.remaining()
        if remaining is not None and any(count > remaining[name] for name, count in result.counts.items()):
            # earlier spans took more than was known when this one was submitted: repeat it with what is left now
            result = pool.call(fitter, replace(span, remaining=remaining))
        yield result, seconds
