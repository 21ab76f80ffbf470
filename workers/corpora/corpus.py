"""Labelled texts in chunks, with their counts and hash."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from range_store.formatting import format_count
from workers.corpora.concepts import ConceptNames, LabelError
from workers.corpora.errors import CorpusError
from workers.corpora.row_sample import RowSample
from workers.corpora.rows import CHUNK_ROWS, Rows

logger = logging.getLogger(__name__)

_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


@dataclass(frozen=True)
class Chunk:
    """1,024 rows from row `index` · 1,024 on, or what is left of them: texts, and the concept of each."""

    index: int
    texts: tuple[str, ...]
    concepts: tuple[str, ...]


class Corpus:
    """Texts with one concept each.

    Attributes:
        name, split: what it was read from.
        selection: which rows of that, in words.
        concepts: those that occur, in the order of `ConceptNames.sort`.
        counts: texts per concept, in that order.
        odd: number of texts with characters that look like damage: control characters, U+FFFD, lone surrogates. These
            texts are used like all others.
        blank: number of texts without a character other than white space.
        sha256: of every text and concept in order.
    """

    def __init__(self, name: str, split: str | None, selection: str, rows: Rows, concept_names: ConceptNames) -> None:
        self.name = name
        self.split = split
        self.selection = selection
        self._rows = rows
        self._concept_names = concept_names
        counts: Counter[str] = Counter()
        digest = hashlib.sha256()
        self.odd = self.blank = 0
        self._sample = RowSample()
        for chunk in self.chunks():
            self._sample.update(chunk.index * CHUNK_ROWS, chunk.texts, chunk.concepts)
            counts.update(chunk.concepts)
            self.blank += sum(not text or text.isspace() for text in chunk.texts)
            self.odd += sum(_ODD.search(text) is not None for text in chunk.texts)
            for text, concept in zip(chunk.texts, chunk.concepts, strict=True):
                for part in (text.encode("utf-8", "surrogatepass"), concept.encode("utf-8", "surrogatepass")):
                    digest.update(len(part).to_bytes(8, "little"))
                    digest.update(part)
        self.sha256 = digest.hexdigest()
        self.concepts = concept_names.sort(counts)
        self.counts = {concept: counts[concept] for concept in self.concepts}

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, rows: int) -> Chunk:
        """Texts from all of the corpus as one chunk, at most 1,024, drawn by a fixed seed."""
        return Chunk(0, *self._sample.rows(rows))

    def split_off(self, fraction: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """Split into the rest and `fraction` of the rows, drawn by `seed`. Both keep their order.

        Raises:
            CorpusError: there are too few rows for both.
        """
        n = round(len(self) * fraction)
        if not 0 < n < len(self):
            raise CorpusError(
                f"{self.name} has {format_count(len(self), 'row')}: too few to keep some of them out of the fit"
            )
        out = np.zeros(len(self), dtype=np.bool_)
        out[np.random.default_rng(seed).choice(len(self), size=n, replace=False)] = True
        parts = []
        for chosen, share in ((~out, "all but"), (out, "only")):
            selection = f"{self.selection}; of these {share} {n} rows, drawn with seed {seed}"
            rows = self._rows.select(np.flatnonzero(chosen))
            parts.append(Corpus(self.name, self.split, selection, rows, self._concept_names))
        return parts[0], parts[1]

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Chunks of 1,024 rows from chunk `start` on.

        Raises:
            CorpusError: a row without a text, or with a label that is no name or number; names the row.
        """
        first = start * CHUNK_ROWS
        parts = self._rows.read(first)
        while True:
            try:
                texts, labels = next(parts)
            except StopIteration:
                return
            except UnicodeDecodeError:
                last = min(first + CHUNK_ROWS, len(self))
                raise CorpusError(f"{self.name}: a row between {first + 1} and {last} is not UTF-8") from None
            for offset, text in enumerate(texts):
                if not isinstance(text, str):
                    raise CorpusError(f"{self._rows.location(first + offset)} has no text")
            concepts = tuple(self._concept(label, first + offset) for offset, label in enumerate(labels))
            yield Chunk(first // CHUNK_ROWS, tuple(texts), concepts)
            first += CHUNK_ROWS

    def _concept(self, label: Any, row: int) -> str:
        try:
            return self._concept_names.name(label)
        except LabelError as error:
            raise CorpusError(f"{self._rows.location(row)} {error}") from None


def match_labels(concepts: Sequence[str], labels: Sequence[str]) -> None:
    """Raises CorpusError, listing both sides, unless every concept is a label of the model."""
    unmatched = [concept for concept in concepts if concept not in labels]
    if unmatched:
        raise CorpusError(
            f"labels of the data that the model does not have: {', '.join(map(repr, unmatched))}; "
            f"the model has: {', '.join(map(repr, labels))}. Match them with --label-map FILE"
        )


def warn_about_blank_texts(corpus: Corpus) -> None:
    """Log how many texts are empty, if any are."""
    if corpus.blank:
        logger.warning("%s: %d of %d texts are empty", corpus.name, corpus.blank, len(corpus))


def warn_about_overlap(test: Corpus, train: Corpus, option: str) -> None:
    """Log how many texts to measure on are also texts to learn from, if any are.

    Args:
        option: the command-line option that names `test`.
    """
    digests = Counter(_digest(text) for chunk in test.chunks() for text in chunk.texts)
    shared = {digest for chunk in train.chunks() for text in chunk.texts if (digest := _digest(text)) in digests}
    if count := sum(digests[digest] for digest in shared):
        logger.warning("%s: %d of %d texts of %s are also in --data", option, count, len(test), test.name)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
