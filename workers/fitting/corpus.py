"""Labelled texts, read through the `datasets` library: local files or hub names, memory-mapped, in blocks."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

BLOCK_ROWS = 1024
"""Rows of a block: the unit of work, checkpoint and retry."""

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class CorpusError(Exception):
    """The corpus cannot be used; one line that says what to do."""


@dataclass(frozen=True)
class Block:
    """Rows `index`·1,024 and on: texts, and the concept of each."""

    index: int
    texts: tuple[str, ...]
    concepts: tuple[str, ...]


class Corpus:
    """Texts with one concept each.

    Attributes:
        name, split: what it was read from.
        selection: which rows of that, in words.
        concepts: those that occur, the model's labels first and in their order, then the others by name.
        counts: texts per concept, in that order.
        sha256: over every text and concept in order.
    """

    def __init__(
        self, name: str, split: str | None, selection: str, rows: datasets.Dataset, concepts: "_Concepts"
    ) -> None:
        self.name = name
        self.split = split
        self.selection = selection
        self._rows = rows
        self._concepts = concepts
        counts: Counter[str] = Counter()
        digest = hashlib.sha256()
        for block in self.blocks():
            counts.update(block.concepts)
            for text, concept in zip(block.texts, block.concepts, strict=True):
                for part in (text.encode("utf-8", "surrogatepass"), concept.encode("utf-8", "surrogatepass")):
                    digest.update(len(part).to_bytes(8, "little"))
                    digest.update(part)
        self.sha256 = digest.hexdigest()
        known = [label for label in concepts.labels if label in counts]
        self.concepts = (*known, *sorted(set(counts) - set(known)))
        self.counts = {concept: counts[concept] for concept in self.concepts}

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Blocks of 1,024 rows from block `start` on.

        Raises:
            CorpusError: a row without a text, or with a label that is no name or number; says which.
        """
        for index in range(start, -(-len(self) // BLOCK_ROWS)):
            first = index * BLOCK_ROWS
            try:
                rows = self._rows[first : first + BLOCK_ROWS]
            except UnicodeDecodeError:
                last = min(first + BLOCK_ROWS, len(self))
                raise CorpusError(f"{self.name}: a row between {first + 1} and {last} is not UTF-8") from None
            for offset, text in enumerate(rows["text"]):
                if not isinstance(text, str):
                    raise CorpusError(f"{self.name}: row {first + offset + 1} has no text")
            concepts = tuple(
                self._concepts.of(label, first + n + 1, self.name) for n, label in enumerate(rows["label"])
            )
            yield Block(index, tuple(rows["text"]), concepts)


@dataclass(frozen=True)
class _Concepts:
    """Turns whatever stands in the label column into a concept's name."""

    names: Sequence[str] | None
    labels: Sequence[str]
    label_map: Mapping[str, str]

    def of(self, value: Any, row: int, name: str) -> str:
        if isinstance(value, bool) or value is None or not isinstance(value, (str, int)):
            raise CorpusError(f"{name}: row {row} has no label (a name or a class number)")
        if isinstance(value, int):
            names = self.names if self.names is not None else self.labels
            if names and not 0 <= value < len(names):
                raise CorpusError(f"{name}: row {row} has label {value}, there are names for 0 to {len(names) - 1}")
            value = names[value] if names else str(value)
        return self.label_map.get(value, value)


def load_corpus(
    source: str,
    *,
    labels: Sequence[str] = (),
    split: str | None = None,
    text_field: str = "text",
    label_field: str = "label",
    label_map: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Read a corpus.

    Args:
        source: a JSONL, CSV or Parquet file, or the name of a data set on the hub.
        labels: the model's labels: they order the concepts, and name class numbers that the data leave unnamed.
        split: of a hub data set; "train" by default.
        label_map: names in the data to names of concepts.
        max_rows: use this many rows, drawn at random by `seed` and kept in their order.

    Raises:
        CorpusError: missing, unreadable, empty, or without the named columns.
    """
    rows = _open(source, split)
    for field in (text_field, label_field):
        if field not in rows.column_names:
            raise CorpusError(f"{source} has no column {field!r}; it has: {', '.join(map(repr, rows.column_names))}")
    feature = rows.features[label_field]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    others = [column for column in rows.column_names if column not in (text_field, label_field)]
    rows = rows.remove_columns(others)
    if text_field != "text":
        rows = rows.rename_column(text_field, "text")
    if label_field != "label":
        rows = rows.rename_column(label_field, "label")
    selection = "all rows"
    if max_rows is not None and max_rows < len(rows):
        selection = f"{max_rows} of {len(rows)} rows, drawn with seed {seed}"
        chosen = np.random.default_rng(seed).choice(len(rows), size=max_rows, replace=False)
        rows = rows.select(np.sort(chosen))
    if not len(rows):
        raise CorpusError(f"{source} holds no rows")
    name = source if _is_hub(source) else Path(source).name
    return Corpus(name, split, selection, rows, _Concepts(names, labels, label_map or {}))


def load_label_map(path: Path) -> dict[str, str]:
    """A JSON object of names in the data to names of the model.

    Raises:
        CorpusError: it is no such object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot read the label map {path}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise CorpusError(f'the label map {path} must be one JSON object of names, such as {{"neg": "negative"}}')
    return content


def check_source(source: str) -> None:
    """Raises CorpusError if `source` names a file that is not there: known before a model is loaded for it."""
    if not _is_hub(source) and not Path(source).is_file():
        raise CorpusError(f"no such file: {source}")


def match_labels(concepts: Sequence[str], labels: Sequence[str]) -> None:
    """Raises CorpusError, listing both sides, unless every concept is a label of the model."""
    unmatched = [concept for concept in concepts if concept not in labels]
    if unmatched:
        raise CorpusError(
            f"labels of the data that the model does not have: {', '.join(map(repr, unmatched))}; "
            f"the model has: {', '.join(map(repr, labels))}. Match them with --label-map FILE"
        )


def _is_hub(source: str) -> bool:
    return Path(source).suffix.lower() not in _READERS and not Path(source).exists()


def _open(source: str, split: str | None) -> datasets.Dataset:
    path = Path(source)
    datasets.disable_progress_bars()  # the command line has its own
    try:
        if _is_hub(source):
            return datasets.load_dataset(source, split=split or "train")
        check_source(source)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise CorpusError(f"{source}: unknown kind of file; use .jsonl, .csv or .parquet")
        if not path.stat().st_size:
            raise CorpusError(f"{source} is empty")
        return datasets.load_dataset(reader, data_files=str(path), split="train")
    except CorpusError:
        raise
    except Exception as error:  # the library raises whatever its parsers do
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        if "corresponds to no data" in reason:  # a header and nothing below it
            raise CorpusError(f"{source} holds no rows") from error
        raise CorpusError(f"cannot read {source}: {reason}") from error
