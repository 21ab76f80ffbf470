"""Tables of labelled texts, and their rows: a text and a label each, read 1,024 at a time."""

import mmap
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from workers.corpora.data_names import without_credentials
from workers.corpora.errors import CorpusError
from workers.corpora.files import SCHEMA, columns_of, files_of, labels_of, read_tables, texts_of

CHUNK_ROWS = 1024
"""Rows of a chunk: the unit of work, checkpoint and retry."""
MAX_BYTES_IN_MEMORY = 64 << 20
"""Larger tables are kept in a file that is mapped into memory."""

TextsAndLabels = tuple[list[Any], list[Any]]


class Rows(ABC):
    """Texts and labels as they are in the data."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, first: int = 0) -> Iterator[TextsAndLabels]:
        """Texts and labels from row `first` on, 1,024 rows at a time. Raises UnicodeDecodeError or CorpusError."""

    @abstractmethod
    def select(self, chosen: npt.NDArray[np.int64]) -> "Rows":
        """The rows with these indices, which are in ascending order."""

    @abstractmethod
    def location(self, row: int) -> str:
        """Where a row that was read is, for an error message: "train.jsonl: row 3"."""

    def labels(self) -> Sequence[Any]:
        """The label of every row."""
        return [label for _, labels in self.read() for label in labels]


class Table(Protocol):
    """Data of which two columns are still to be chosen."""

    @property
    def column_names(self) -> Sequence[str]: ...

    def class_names(self, label_field: str) -> Sequence[str] | None:
        """Names of class numbers, if the data have them."""
        ...

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        """Texts and labels. name: that of the data, for error messages."""
        ...


@dataclass(frozen=True)
class DatasetTable:
    """A data set of the `datasets` library, which maps it from files into memory."""

    dataset: datasets.Dataset

    @property
    def column_names(self) -> Sequence[str]:
        names: list[str] = self.dataset.column_names
        return names

    def class_names(self, label_field: str) -> Sequence[str] | None:
        feature = self.dataset.features[label_field]
        return feature.names if isinstance(feature, datasets.ClassLabel) else None

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        columns = self.dataset.select_columns(list(dict.fromkeys((text_field, label_field))))
        return DatasetRows(columns, text_field, label_field, name)


@dataclass(frozen=True)
class DatasetRows(Rows):
    """Rows of a `DatasetTable`."""

    dataset: datasets.Dataset
    text_field: str
    label_field: str
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, first: int = 0) -> Iterator[TextsAndLabels]:
        for start in range(first, len(self.dataset), CHUNK_ROWS):
            rows = self.dataset[start : start + CHUNK_ROWS]
            yield rows[self.text_field], rows[self.label_field]

    def select(self, chosen: npt.NDArray[np.int64]) -> Rows:
        return replace(self, dataset=self.dataset.select(chosen))

    def labels(self) -> Sequence[Any]:
        values: Sequence[Any] = self.dataset[self.label_field]
        return values

    def location(self, row: int) -> str:
        return f"{self.name}: row {row + 1}"


@dataclass(frozen=True)
class FileTable:
    """Files in the order of their names. The columns are those of the first file with any rows."""

    paths: tuple[str, ...]
    column_names: Sequence[str]
    _class_names: dict[str, list[str]]

    @classmethod
    def open(cls, source: str) -> Self:
        """The files of a path, directory, pattern or address. Raises CorpusError if there are no files or no rows."""
        paths = files_of(source)
        columns = columns_of(paths)
        if columns is None:
            raise CorpusError(f"{without_credentials(source)} has no rows")
        return cls(paths, *columns)

    def class_names(self, label_field: str) -> Sequence[str] | None:
        return self._class_names.get(label_field)

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        starts = [0]

        def all_tables() -> Iterator[pa.Table]:
            for path in self.paths:
                starts.append(starts[-1])
                for table in read_tables(path, text_field, label_field):
                    starts[-1] += table.num_rows
                    yield table

        table = _concatenated(all_tables())
        return FileRows(table, np.arange(table.num_rows), tuple(Path(path).name for path in self.paths), tuple(starts))


@dataclass(frozen=True)
class FileRows(Rows):
    """Rows `chosen` of a table of files. starts: the first row of each file, and the end of the last."""

    table: pa.Table
    chosen: npt.NDArray[np.int64]
    names: tuple[str, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, first: int = 0) -> Iterator[TextsAndLabels]:
        for start in range(first, len(self.chosen), CHUNK_ROWS):
            rows = self.chosen[start : start + CHUNK_ROWS]
            part = self.table.slice(rows[0], rows[-1] - rows[0] + 1).take(pa.array(rows - rows[0]))
            yield texts_of(part), labels_of(part)

    def select(self, chosen: npt.NDArray[np.int64]) -> Rows:
        return replace(self, chosen=self.chosen[chosen])

    def location(self, row: int) -> str:
        index = int(self.chosen[row])
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.names[file]}: row {index - self.starts[file] + 1}"


def _concatenated(tables: Iterable[pa.Table]) -> pa.Table:
    """One table of all: in memory if it is small, else in a file."""
    tables = iter(tables)
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size > MAX_BYTES_IN_MEMORY:
            return _memory_mapped(chain(held, tables))
    return pa.concat_tables(held) if held else SCHEMA.empty_table()


def _memory_mapped(tables: Iterable[pa.Table]) -> pa.Table:
    """One table of all in a file without a name, which disappears when it is no longer used."""
    directory = Path(datasets.config.HF_DATASETS_CACHE)  # not /tmp, which may be memory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()
