"""Where rows come from: a table of columns, and of these a text and a label per row, read 1,024 at a time."""

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from workers.fitting.errors import CorpusError
from workers.fitting.files import SCHEMA, columns_of, files_of, labels_of, tables, texts_of

CHUNK_ROWS = 1024
"""Rows of a chunk: the unit of work, checkpoint and retry."""
IN_MEMORY = 64 << 20
"""Bytes of texts that are kept in memory; more are kept in a file, which is mapped into it."""


class Rows(Protocol):
    """Rows of a text and a label each, as they stand in the data."""

    def __len__(self) -> int: ...

    def read(self, first: int = 0) -> Iterator[tuple[list[Any], list[Any]]]:
        """Texts and labels from row `first` on, 1,024 rows at a time. Raises UnicodeDecodeError or CorpusError."""
        ...

    def select(self, chosen: npt.NDArray[np.int64]) -> "Rows":
        """Those rows, which are in ascending order."""
        ...

    def labels(self) -> Sequence[Any]:
        """The label of every row."""
        ...

    def where(self, row: int) -> str:
        """A row that was read, in the words of an error: "train.jsonl: row 3"."""
        ...


class Table(Protocol):
    """Data whose columns are not chosen yet."""

    @property
    def column_names(self) -> Sequence[str]: ...

    def class_names(self, label_field: str) -> Sequence[str] | None:
        """Names of class numbers, where the data know them."""
        ...

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        """Texts and labels. name: what the data are called."""
        ...


class Loaded:
    """A data set of the `datasets` library, which keeps it in files and maps these into memory."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._dataset = dataset

    @property
    def column_names(self) -> Sequence[str]:
        names: list[str] = self._dataset.column_names
        return names

    def class_names(self, label_field: str) -> Sequence[str] | None:
        feature = self._dataset.features[label_field]
        return feature.names if isinstance(feature, datasets.ClassLabel) else None

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        return LoadedRows(
            self._dataset.select_columns(list(dict.fromkeys((text_field, label_field)))), text_field, label_field, name
        )


@dataclass(frozen=True)
class LoadedRows:
    """Two of its columns."""

    dataset: datasets.Dataset
    text_field: str
    label_field: str
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, first: int = 0) -> Iterator[tuple[list[Any], list[Any]]]:
        for start in range(first, len(self.dataset), CHUNK_ROWS):
            rows = self.dataset[start : start + CHUNK_ROWS]
            yield rows[self.text_field], rows[self.label_field]

    def select(self, chosen: npt.NDArray[np.int64]) -> Rows:
        return replace(self, dataset=self.dataset.select(chosen))

    def labels(self) -> Sequence[Any]:
        values: Sequence[Any] = self.dataset[self.label_field]
        return values

    def where(self, row: int) -> str:
        return f"{self.name}: row {row + 1}"


@dataclass(frozen=True)
class Files:
    """Files of this machine, in the order of their names; columns are those of the first with any rows."""

    paths: tuple[str, ...]
    column_names: Sequence[str]
    _class_names: dict[str, list[str]]

    @classmethod
    def open(cls, source: str) -> "Files":
        """Files of a path, directory or pattern. Raises CorpusError if there are none, or none with rows."""
        paths = files_of(source)
        found = columns_of(paths)
        if found is None:
            empty = len(paths) == 1 and not Path(paths[0]).stat().st_size
            raise CorpusError(f"{source} is empty" if empty else f"{source} holds no rows")
        return cls(paths, *found)

    def class_names(self, label_field: str) -> Sequence[str] | None:
        return self._class_names.get(label_field)

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        starts = [0]

        def all_tables() -> Iterator[pa.Table]:
            for path in self.paths:
                starts.append(starts[-1])
                for table in tables(path, text_field, label_field):
                    starts[-1] += table.num_rows
                    yield table

        kept = _kept(all_tables())
        return FileRows(kept, np.arange(kept.num_rows), tuple(Path(path).name for path in self.paths), tuple(starts))


@dataclass(frozen=True)
class FileRows:
    """Rows `chosen` of a table of files. starts: the first row of each file, and the end of the last."""

    table: pa.Table
    chosen: npt.NDArray[np.int64]
    names: tuple[str, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, first: int = 0) -> Iterator[tuple[list[Any], list[Any]]]:
        for start in range(first, len(self.chosen), CHUNK_ROWS):
            rows = self.chosen[start : start + CHUNK_ROWS]
            part = self.table.slice(rows[0], rows[-1] - rows[0] + 1).take(pa.array(rows - rows[0]))
            yield texts_of(part), labels_of(part)

    def select(self, chosen: npt.NDArray[np.int64]) -> Rows:
        return replace(self, chosen=self.chosen[chosen])

    def labels(self) -> Sequence[Any]:
        return [label for _, labels in self.read() for label in labels]

    def where(self, row: int) -> str:
        place = int(self.chosen[row])
        file = int(np.searchsorted(self.starts, place, side="right")) - 1
        return f"{self.names[file]}: row {place - self.starts[file] + 1}"


def _kept(parts: Iterable[pa.Table]) -> pa.Table:
    """One table of all, in memory if it is small."""
    parts = iter(parts)
    held: list[pa.Table] = []
    size = 0
    for table in parts:
        held.append(table)
        size += table.nbytes
        if size > IN_MEMORY:
            return _mapped(chain(held, parts))
    return pa.concat_tables(held) if held else SCHEMA.empty_table()


def _mapped(parts: Iterable[pa.Table]) -> pa.Table:
    """One table of all in a file without a name, which goes when nobody uses it any more."""
    place = Path(datasets.config.HF_DATASETS_CACHE)  # where there is room: /tmp may be memory
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place) as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for table in parts:
                writer.write_table(table)
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()
