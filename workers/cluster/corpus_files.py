"""Texts of any number of files, near or far, read by Ray Data in their order; the parsers are those of one process."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data.context import DataContext
from ray.exceptions import RayTaskError

from workers.corpora.data_names import is_remote
from workers.corpora.errors import CorpusError
from workers.corpora.files import is_hub_dataset, is_saved_dataset, labels_of, read_tables, texts_of
from workers.corpora.rows import CHUNK_ROWS, FileTable, Rows, TextsAndLabels

AT_ONCE = 4
"""Files at addresses that are read at once, since each takes its time to answer; their texts are taken in order."""
BLOCK_BYTES = 4 << 20
"""Of texts that travel together."""


def is_file_source(source: str) -> bool:
    """Whether a corpus's source is of files that Ray reads, and no data set of the `datasets` library."""
    return "://" in source or not (is_hub_dataset(source) or is_saved_dataset(source))


class RayFileTable(FileTable):
    """Files that Ray Data reads."""

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        return RayFileRows(self.paths, is_remote(self.paths[0]), text_field, label_field)


@dataclass(frozen=True)
class RayFileRows(Rows):
    """A text and a label per row of many files: all rows, or those with the indices `chosen`.

    Files of this machine are read on this machine, whatever nodes there are; addresses are read on any node.
    """

    paths: tuple[str, ...]
    remote: bool
    text_field: str
    label_field: str
    chosen: npt.NDArray[np.int64] | None = None
    counts: dict[int, int] = field(default_factory=dict)
    """Rows of each file, as far as they were counted; shared by all selections."""

    def __len__(self) -> int:
        return sum(self._counted()) if self.chosen is None else len(self.chosen)

    def select(self, chosen: npt.NDArray[np.int64]) -> Rows:
        return replace(self, chosen=chosen if self.chosen is None else self.chosen[chosen])

    def location(self, row: int) -> str:
        row = row if self.chosen is None else int(self.chosen[row])
        for file, path in enumerate(self.paths):
            if file not in self.counts or row < self.counts[file]:
                return f"{Path(path).name}: row {row + 1}"
            row -= self.counts[file]
        raise IndexError(row)

    def read(self, first: int = 0) -> Iterator[TextsAndLabels]:
        texts: list[Any] = []
        labels: list[Any] = []
        for table in self._selected(first):
            texts += texts_of(table)
            labels += labels_of(table)
            while len(texts) >= CHUNK_ROWS:
                yield texts[:CHUNK_ROWS], labels[:CHUNK_ROWS]
                texts, labels = texts[CHUNK_ROWS:], labels[CHUNK_ROWS:]
        if texts:
            yield texts, labels

    def _selected(self, first: int) -> Iterator[pa.Table]:
        """Tables of the rows from `first` on."""
        if self.chosen is None:
            yield from self._all(first)
            return
        chosen = self.chosen[first:]
        if not len(chosen):
            return
        at = start = int(chosen[0])
        for table in self._all(start):
            low, high = np.searchsorted(chosen, (at, at + table.num_rows))
            if high > low:
                yield table.take(pa.array(chosen[low:high] - at))
            at += table.num_rows
            if at > chosen[-1]:
                return

    def _all(self, first: int) -> Iterator[pa.Table]:
        """Tables of all rows from `first` on, in order; files that lie before it are not opened."""
        file = skip = 0
        if first:
            counts = self._counted()
            skip = first
            while file < len(counts) and skip >= counts[file]:
                skip -= counts[file]
                file += 1
            if file == len(counts):
                return
        seen = dict.fromkeys(range(len(self.paths)), 0)
        for table in self._read(file, _Texts(self.text_field, self.label_field)):
            if not first:
                files, numbers = np.unique(table.column("file").to_numpy(), return_counts=True)
                for each, number in zip(files, numbers, strict=True):
                    seen[int(each)] += int(number)
                    self.counts.update({before: seen[before] for before in range(int(each))})
            if skip >= table.num_rows:
                skip -= table.num_rows
                continue
            yield table.slice(skip)
            skip = 0
        if not first:
            self.counts.update(seen)

    def _counted(self) -> list[int]:
        """Rows of every file, counted now if they were not before."""
        if len(self.counts) < len(self.paths):
            totals = dict.fromkeys(range(len(self.paths)), 0)
            for table in self._read(0, _Count(self.text_field, self.label_field)):
                for file, rows in zip(*(table.column(name).to_pylist() for name in ("file", "rows")), strict=True):
                    totals[file] += rows
            self.counts.update(totals)
        return [self.counts[file] for file in range(len(self.paths))]

    def _read(self, first: int, parse: Any) -> Iterator[pa.Table]:
        """What `parse` makes of the files from number `first` on, in their order."""
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        context.target_max_block_size = BLOCK_BYTES
        _quiet()
        files = [{"file": number, "path": self.paths[number]} for number in range(first, len(self.paths))]
        options: dict[str, Any] = {"num_cpus": 0}  # else models that take every CPU would leave none to read for them
        if not self.remote:
            options["resources"] = {_this_node(): 0.001}
        listed = ray.data.from_items(files, override_num_blocks=len(files))
        at_once = min(AT_ONCE, len(files)) if self.remote else 1
        tables = listed.map_batches(parse, batch_size=1, batch_format="pyarrow", concurrency=at_once, **options)
        try:
            yield from tables.iter_batches(batch_size=CHUNK_ROWS, batch_format="pyarrow", prefetch_batches=4)
        except RayTaskError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, CorpusError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            if cause is None:
                raise
            raise CorpusError(str(cause)) from None


@dataclass(frozen=True)
class _Texts:
    """Parses a file: tables of `files.SCHEMA` and `file`."""

    text_field: str
    label_field: str

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        number, path = files.column("file")[0].as_py(), files.column("path")[0].as_py()
        for table in read_tables(path, self.text_field, self.label_field):
            yield table.append_column("file", pa.array(np.full(table.num_rows, number, np.int64)))


@dataclass(frozen=True)
class _Count:
    """Parses a file for its number of rows only."""

    text_field: str
    label_field: str

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        number, path = files.column("file")[0].as_py(), files.column("path")[0].as_py()
        for table in read_tables(path, self.text_field, self.label_field):
            yield pa.table({"file": [number], "rows": [table.num_rows]})


def _this_node() -> str:
    """The resource that every node of this machine has."""
    here = ray.get_runtime_context().get_node_id()
    (address,) = (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    return f"node:{address}"


def _quiet() -> None:
    """Ray Data tells of its own progress through loggers; ours is the one bar."""
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
