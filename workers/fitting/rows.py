"""Where rows come from: a table of columns, and of these a text and a label per row, read 1,024 at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 1024
"""Rows of a block: the unit of work, checkpoint and retry."""


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
        for start in range(first, len(self.dataset), BLOCK_ROWS):
            rows = self.dataset[start : start + BLOCK_ROWS]
            yield rows[self.text_field], rows[self.label_field]

    def select(self, chosen: npt.NDArray[np.int64]) -> Rows:
        return replace(self, dataset=self.dataset.select(chosen))

    def labels(self) -> Sequence[Any]:
        values: Sequence[Any] = self.dataset[self.label_field]
        return values

    def where(self, row: int) -> str:
        return f"{self.name}: row {row + 1}"
