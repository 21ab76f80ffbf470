"""Labelled texts in chunks: of files or a hub name, memory-mapped; or of whatever else gives `Table`s."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from range_store.formatting import format_count
from workers.fitting.concepts import Concepts, LabelError
from workers.fitting.errors import CorpusError
from workers.fitting.files import is_hub, is_saved, reason_of, without_password
from workers.fitting.paper_datasets import PAPER_DATASETS, PaperDataset
from workers.fitting.row_sample import RowSample
from workers.fitting.rows import CHUNK_ROWS, Files, Loaded, Rows, Table
from workers.fitting.sources import check_source, paper_dataset

logger = logging.getLogger(__name__)

_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


@dataclass(frozen=True)
class Chunk:
    """Rows `index`·1,024 and on: texts, and the concept of each."""

    index: int
    texts: tuple[str, ...]
    concepts: tuple[str, ...]


class Corpus:
    """Texts with one concept each.

    Attributes:
        name, split: what it was read from.
        selection: which rows of that, in words.
        concepts: those that occur, in the order of `Concepts.ordered`.
        counts: texts per concept, in that order.
        odd: texts with characters that look like damage: control characters, U+FFFD, lone surrogates. They are used.
        blank: texts of nothing but spaces.
        sha256: over every text and concept in order.
    """

    def __init__(self, name: str, split: str | None, selection: str, rows: Rows, concepts: Concepts) -> None:
        self.name = name
        self.split = split
        self.selection = selection
        self._rows = rows
        self._concepts = concepts
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
        self.concepts = concepts.ordered(counts)
        self.counts = {concept: counts[concept] for concept in self.concepts}

    def __len__(self) -> int:
        return len(self._rows)

    def warn_about_empty_texts(self) -> None:
        """Log how many texts are empty, if any are."""
        if self.blank:
            logger.warning("%s: %d of %d texts are empty", self.name, self.blank, len(self))

    def sample(self, rows: int) -> Chunk:
        """So many rows of all of the corpus, at most 1,024, drawn by a fixed seed, as a chunk."""
        return Chunk(0, *self._sample.rows(rows))

    def split_off(self, fraction: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """The rest, and `fraction` of the rows, drawn by `seed`; both keep their order.

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
        for chosen, what in ((~out, "all but"), (out, "only")):
            selection = f"{self.selection}; of these {what} {n} rows, drawn with seed {seed}"
            rows = self._rows.select(np.flatnonzero(chosen))
            parts.append(Corpus(self.name, self.split, selection, rows, self._concepts))
        return parts[0], parts[1]

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """Chunks of 1,024 rows from chunk `start` on.

        Raises:
            CorpusError: a row without a text, or with a label that is no name or number; says which.
        """
        first = start * CHUNK_ROWS
        pieces = self._rows.read(first)
        while True:
            try:
                texts, labels = next(pieces)
            except StopIteration:
                return
            except UnicodeDecodeError:
                last = min(first + CHUNK_ROWS, len(self))
                raise CorpusError(f"{self.name}: a row between {first + 1} and {last} is not UTF-8") from None
            for offset, text in enumerate(texts):
                if not isinstance(text, str):
                    raise CorpusError(f"{self._rows.where(first + offset)} has no text")
            concepts = tuple(self._concept(label, first + offset) for offset, label in enumerate(labels))
            yield Chunk(first // CHUNK_ROWS, tuple(texts), concepts)
            first += CHUNK_ROWS

    def _concept(self, label: Any, row: int) -> str:
        try:
            return self._concepts.of(label)
        except LabelError as error:
            raise CorpusError(f"{self._rows.where(row)} {error}") from None


def load_corpus(
    source: str | None = None,
    *,
    table: Table | None = None,
    dataset: str | None = None,
    labels: Sequence[str] = (),
    split: str | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    label_map: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    rows_per_class: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Read a corpus.

    Args:
        source: a file, directory or pattern (`files.KINDS`), a directory of the `datasets` library, or the name of a
            data set on the hub. None: `dataset` from the hub.
        table: the data that `source` names, where they are opened already.
        dataset: one of the paper's, by name (`PAPER_DATASETS`): it names columns and classes, also for a file of it.
        labels: the model's labels: `Concepts` says what they and the next two mean for the labels of the data.
        split: of a hub data set; "train" by default.
        text_field, label_field: columns; by default those of the data set, else "text" and "label".
        label_map: names in the data to names of concepts.
        max_rows: use this many rows, drawn at random by `seed` and kept in their order.
        rows_per_class: of these, use at most so many of each class, drawn in the same way.

    Raises:
        CorpusError: missing, unreadable, empty, or without the named columns.
    """
    if dataset is None and source is not None and source in PAPER_DATASETS and is_hub(source):
        source, dataset = None, source
    known = paper_dataset(dataset)
    place = without_password(source or f"{dataset}")
    of_hub = table is None and (source is None or is_hub(source))
    if table is None:
        table = _open(source, split) if source is not None else Loaded(_from_hub(known, place, split))
    text_field = text_field or _column(table, known.text_field if known else None, "text")
    label_field = label_field or _column(table, known.label_field if known else None, "label")
    for field, flag in ((text_field, "--text-field"), (label_field, "--label-field")):
        if field not in table.column_names:
            columns = ", ".join(
                repr(column if len(column) <= 40 else f"{column[:39]}…") for column in table.column_names
            )
            raise CorpusError(f"{place} has no column {field!r}: name one of its columns with {flag}: {columns}")
    concepts = Concepts(labels, table.class_names(label_field), label_map or {}, known)
    name = place if of_hub else Path(place).name
    rows = table.rows(text_field, label_field, name)
    said = []
    chosen: npt.NDArray[np.int64] | None = None
    if max_rows is not None and max_rows < len(rows):
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size=max_rows, replace=False))
        said.append(f"{max_rows} of {len(rows)} rows")
    if rows_per_class is not None:
        chosen = _per_class(rows, np.arange(len(rows)) if chosen is None else chosen, concepts, rows_per_class, seed)
        said.append(f"at most {rows_per_class} per class")
    selection = f"{', '.join(said)}, drawn with seed {seed}" if said else "all rows"
    # a file has no splits
    corpus = Corpus(
        name, split if of_hub else None, selection, rows if chosen is None else rows.select(chosen), concepts
    )
    if not len(corpus):
        raise CorpusError(f"{place} holds no rows")
    if chosen is not None and concepts.counted_from_0():  # rows that were not chosen may have a 0
        for label in rows.labels():
            with suppress(LabelError):
                concepts.of(label)
    if (unclear := concepts.counted_from_0()) is not None:
        raise CorpusError(f"{name}: {unclear}")
    if concepts.counted and known is None:
        meanings = ", ".join(f"{number} is {concept}" for number, concept in sorted(concepts.counted.items()))
        logger.warning("%s: class numbers are taken as places in the list of labels: %s", name, meanings)
    return corpus


def match_labels(concepts: Sequence[str], labels: Sequence[str]) -> None:
    """Raises CorpusError, listing both sides, unless every concept is a label of the model."""
    unmatched = [concept for concept in concepts if concept not in labels]
    if unmatched:
        raise CorpusError(
            f"labels of the data that the model does not have: {', '.join(map(repr, unmatched))}; "
            f"the model has: {', '.join(map(repr, labels))}. Match them with --label-map FILE"
        )


def warn_about_overlap(measured: Corpus, learned: Corpus, option: str) -> None:
    """Warn of texts to measure on that are also among those that were learned from.

    Args:
        option: that named the texts to measure on.
    """
    digests = Counter(_digest(text) for chunk in measured.chunks() for text in chunk.texts)
    found = {digest for chunk in learned.chunks() for text in chunk.texts if (digest := _digest(text)) in digests}
    if shared := sum(digests[digest] for digest in found):
        logger.warning("%s: %d of %d texts of %s are also in --data", option, shared, len(measured), measured.name)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _column(table: Table, of_dataset: str | None, usual: str) -> str:
    """The data set's own column where it is there; a file of it may have the usual one."""
    return of_dataset if of_dataset in table.column_names and of_dataset is not None else usual


def _per_class(
    rows: Rows, chosen: npt.NDArray[np.int64], concepts: Concepts, most: int, seed: int
) -> npt.NDArray[np.int64]:
    """At most `most` of the chosen rows of each class, drawn by `seed`, in their order."""
    values = rows.labels()
    codes: dict[str, int] = {}

    def code_of(row: int) -> int:
        try:
            return codes.setdefault(concepts.of(values[row]), len(codes))
        except LabelError as error:
            raise CorpusError(f"{rows.where(row)} {error}") from None

    of_row = np.fromiter(map(code_of, chosen), np.int32, len(chosen))  # names would take memory, of large corpora
    rng = np.random.default_rng(seed)
    kept = []
    for concept in sorted(codes):
        own = chosen[of_row == codes[concept]]
        kept.append(own if len(own) <= most else rng.choice(own, size=most, replace=False))
    return np.sort(np.concatenate(kept)) if kept else chosen


def _quieten() -> None:
    """The command line has progress bars and errors of its own."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)


def _from_hub(known: PaperDataset | None, name: str, split: str | None) -> datasets.Dataset:
    if known is None:
        raise CorpusError("no data: name a file, or a data set")
    _quieten()
    try:
        return datasets.load_dataset(known.path, known.config, split=known.split(split or "train"))
    except Exception as error:
        raise CorpusError(
            f"cannot read the data set {name} from the hub ({known.path}): {reason_of(error)}; "
            "a file of it can be named instead"
        ) from error


def _open(source: str, split: str | None) -> Table:
    check_source(source)
    if not is_hub(source) and not is_saved(source):
        return Files.open(source)
    _quieten()
    try:
        if is_hub(source):
            return Loaded(datasets.load_dataset(source, split=split or "train"))
        saved = datasets.load_from_disk(source)
    except Exception as error:
        raise CorpusError(f"cannot read {source}: {reason_of(error)}") from error
    if isinstance(saved, datasets.Dataset):
        return Loaded(saved)
    if (split or "train") not in saved:
        raise CorpusError(f"{source} has no split {split or 'train'!r}; it has: {', '.join(map(repr, saved))}")
    return Loaded(saved[split or "train"])
