"""A fit on a pool of models: the very result of one process, whatever the number of actors and whoever of them died.

An actor gets a *span*, some chunks in a row, and gives each chunk's moments and one histogram of all of them. Here they
are counted in by the order of the chunks, into the same fitter and checkpoint as in one process.
"""

from collections.abc import Iterator, Mapping
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
"""A span takes about so long: it is what a death costs, and what stands behind one histogram that is sent."""
MAX_CHUNKS = 16


@dataclass(frozen=True)
class Span:
    """Chunks in a row.

    sampled: indices of those of their rows that the probe is trained on. room: of each concept, only the first so many.
    """

    chunks: tuple[Chunk, ...]
    sampled: npt.NDArray[np.int64] | None
    room: Mapping[str, int] | None

    def __str__(self) -> str:
        first, last = self.chunks[0], self.chunks[-1]
        return f"rows {first.index * CHUNK_ROWS + 1:,} to {last.index * CHUNK_ROWS + len(last.texts):,}"


@dataclass(frozen=True)
class Sample:
    """Texts of all of the corpus, as a chunk."""

    chunk: Chunk

    def __str__(self) -> str:
        return f"a sample of {len(self.chunk.texts):,} rows"


@dataclass(frozen=True, eq=False)
class Counted:
    """What came of a span. taken: texts of each concept that count; truncated, empty: texts that were so."""

    part: Part
    taken: Mapping[str, int]
    truncated: int
    empty: int


@dataclass(frozen=True, eq=False)
class _Known:
    """What every actor needs to know of a fit. edges: of the histograms; None: the span sets them."""

    concepts: tuple[str, ...]
    settings: FitSettings
    edges: npt.NDArray[np.float64] | None


class Counting:
    """On an actor: counts spans."""

    def __init__(self, model: LoadedModel, known: _Known) -> None:
        self._model, self._known = model, known

    def __call__(self, span: Span) -> Counted:
        known, settings = self._known, self._known.settings
        hidden, layers = self._model.identity.hidden_size, len(settings.layers)
        sample = None if span.sampled is None else ProbeSample(span.sampled, layers, hidden)
        fitter = RangeFitter(known.concepts, layers, hidden, settings.bins, sample)
        fitter.edges = known.edges
        moments = []
        truncated = empty = 0
        for chunk in span.chunks:
            states = record_chunk(self._model, chunk, settings)
            room = span.room and {name: most - fitter.counts[name] for name, most in span.room.items()}
            moments.append(add_chunk(fitter, chunk, states, room))
            truncated, empty = truncated + states.truncated, empty + states.empty
        counts = fitter.histogram if len(span.chunks) * CHUNK_ROWS >= 1 << 16 else fitter.histogram.astype(np.uint16)
        part = Part(tuple(moments), counts, fitter.edges, fitter.sample)
        return Counted(part, fitter.counts, truncated, empty)


class Sampling:
    """On an actor: the states of a sample of the texts."""

    def __init__(self, model: LoadedModel, settings: FitSettings) -> None:
        self._model, self._settings = model, settings

    def __call__(self, sample: Sample) -> npt.NDArray[np.float32]:
        return record_sample(self._model, sample.chunk, self._settings)


def fit_on(
    pool: ModelPool,
    corpus: Corpus,
    *,
    progress: ProgressCallback | None = None,
    **options: Unpack[FitOptions],
) -> FitResult:
    """Fit ranges of every concept of `corpus` on the pool. Stopped, it goes on with the span that is due, here or in
    one process with as many threads as an actor.

    Args:
        options: those of `workers.fitting.fit.start_fit`.

    Raises:
        InvalidErasure, CorpusError: as `workers.fitting.fit.fit`.
        ModelError, ClusterError: see `ModelPool`.
    """
    about = pool.model_info
    under_way = start_fit(about.identity, about.dtype, about.head, about.threads, corpus, **options)
    under_way.unfinished = None  # an actor does a chunk as a whole
    spans = _Spans(under_way, pool.layout.actors)

    whole = True
    try:
        for result, seconds in _counted(pool, under_way, spans):
            whole = False
            under_way.fitter.merge(result.part)
            under_way.next_chunk += len(result.part.moments)
            under_way.truncated += result.truncated
            under_way.empty += result.empty
            whole = True
            spans.learn(seconds / len(result.part.moments))
            if progress is not None:
                progress(under_way.progress(spans.resumed))
            under_way.save_if_due()
    except BaseException:
        if whole and under_way.rows_done > spans.resumed:
            under_way.save()
        raise
    return under_way.result()


class _Spans:
    """Cuts the chunks that are left into spans, longer ones where chunks are quick."""

    def __init__(self, under_way: FitRun, actors: int) -> None:
        self._pass, self._actors = under_way, actors
        self._chunks = under_way.corpus.chunks(under_way.next_chunk)
        self._left = -(-len(under_way.corpus) // CHUNK_ROWS) - under_way.next_chunk
        self._length = 1
        self.resumed = under_way.rows_done

    def learn(self, seconds: float) -> None:
        """A chunk took so long."""
        self._length = max(1, min(MAX_CHUNKS, int(SPAN_SECONDS / max(seconds, 1e-3))))

    def next(self, most: int | None = None) -> Span | None:
        """The next span; None when all chunks are taken. Towards the end they are short, so that all end together."""
        length = most or min(self._length, -(-self._left // (2 * self._actors)))
        chunks = tuple(islice(self._chunks, max(1, length)))
        if not chunks:
            return None
        self._left -= len(chunks)
        sample = self._pass.fitter.sample
        first, end = chunks[0].index * CHUNK_ROWS, (chunks[-1].index + 1) * CHUNK_ROWS
        return Span(chunks, None if sample is None else sample.between(first, end).rows, self._pass.remaining())

    def __iter__(self) -> Iterator[Span]:
        while (span := self.next()) is not None:
            yield span


def _counted(pool: ModelPool, under_way: FitRun, spans: _Spans) -> Iterator[tuple[Counted, float]]:
    """What came of every span, in order, and in how many seconds."""
    known = _Known(under_way.corpus.concepts, under_way.settings, under_way.fitter.edges)
    if (sample := under_way.edge_sample()) is not None:  # all chunks wait for the edges
        job_of_sample = ActorFunction[Sample, npt.NDArray[np.float32]].of(Sampling, under_way.settings)
        under_way.set_edges(pool.call(job_of_sample, Sample(sample)))
        known = replace(known, edges=under_way.fitter.edges)
    while under_way.fitter.edges is None:  # then the first chunk with a text that counts sets them
        first = spans.next(1)
        if first is None:
            return
        for _, result, seconds in pool.map(ActorFunction[Span, Counted].of(Counting, known), iter((first,))):
            yield result, seconds
        known = replace(known, edges=under_way.fitter.edges)
    job = ActorFunction[Span, Counted].of(Counting, known)
    for span, result, seconds in pool.map(job, iter(spans)):
        room = under_way.remaining()
        if room is not None and any(count > room[name] for name, count in result.taken.items()):
            # spans before it took more than was known when it was handed out: with what is left now, it takes less
            result = pool.call(job, replace(span, room=room))
        yield result, seconds
