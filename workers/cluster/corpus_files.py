"""Labelled texts of any number of files, read by Ray Data in a stream: the corpus is never kept as a whole.

The parsers are those of one process. Generator tasks of Ray would need less code than Ray Data, but Ray 2.60 ends the
driver if a task is cancelled just as it completes.
"""

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

from workers.cluster.connection import own_node
from workers.corpora.data_names import is_remote
from workers.corpora.errors import CorpusError
from workers.corpora.files import is_hub_dataset, is_saved_dataset, labels_of, read_tables, texts_of
from workers.corpora.rows import CHUNK_ROWS, FileTable, Rows, TextsAndLabels

REMOTE_FILES = 4
"""Files at addresses that are read at once, since each takes a while to answer. Their texts are taken in order."""
BLOCK_BYTES = 4 << 20
"""Size of the blocks in which texts are sent."""


def is_file_source(source: str) -> bool:
    """Whether a corpus's source names files, and not a data set of the `datasets` library."""
    return "://" in source or not (is_hub_dataset(source) or is_saved_dataset(source))


class RayFileTable(FileTable):
    """Files that are read by Ray Data."""

    def rows(self, text_field: str, label_field: str, name: str) -> Rows:
        return RayFileRows(self.paths, is_remote(self.paths[0]), text_field, label_field)


@dataclass(frozen=True)
class RayFileRows(Rows):
    """A text and a label of each row of many files, or of the rows with the indices `chosen`.

    Files on this machine are read on this machine only, files at addresses on any node.
    """

    paths: tuple[str, ...]
    remote: bool
    text_field: str
    label_field: str
    chosen: npt.NDArray[np.int64] | None = None
    counts: dict[int, int] = field(default_factory=dict)
    """Rows of each file that has been read to its end; shared with all selections."""

    def __len__(self) -> int:
        return sum(self._all_counts()) if self.chosen is None else len(self.chosen)

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
        for table in self._tables(first) if self.chosen is None else self._chosen_tables(self.chosen[first:]):
            texts += texts_of(table)
            labels += labels_of(table)
            while len(texts) >= CHUNK_ROWS:
                yield texts[:CHUNK_ROWS], labels[:CHUNK_ROWS]
                texts, labels = texts[CHUNK_ROWS:], labels[CHUNK_ROWS:]
        if texts:
            yield texts, labels

    def _chosen_tables(self, chosen: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
        """Tables of the rows with these indices, which ascend."""
        if not len(chosen):
            return
        start = int(chosen[0])
        for table in self._tables(start):
            low, high = np.searchsorted(chosen, (start, start + table.num_rows))
            if high > low:
                yield table.take(pa.array(chosen[low:high] - start))
            start += table.num_rows
            if start > chosen[-1]:
                return

    def _tables(self, first: int) -> Iterator[pa.Table]:
        """Tables of all rows from row `first` on, in order. Files before that row are not opened."""
        counts = self._all_counts() if first else []
        file, skip = 0, first
        while file < len(counts) and skip >= counts[file]:
            file, skip = file + 1, skip - counts[file]
        if file == len(self.paths):
            return
        seen = dict.fromkeys(range(len(self.paths)), 0)
        for table in self._read(file, count=False):
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

    def _all_counts(self) -> list[int]:
        """The rows of every file. Those that are unknown are counted now."""
        if len(self.counts) < len(self.paths):
            totals = dict.fromkeys(range(len(self.paths)), 0)
            for table in self._read(0, count=True):
                for file, rows in zip(*(table.column(name).to_pylist() for name in ("file", "rows")), strict=True):
                    totals[file] += rows
            self.counts.update(totals)
        return [self.counts[file] for file in range(len(self.paths))]

    def _read(self, first: int, count: bool) -> Iterator[pa.Table]:
        """Tables of the files from number `first` on, in their order: see `_Parser`."""
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        context.target_max_block_size = BLOCK_BYTES
        for name in ("ray.data", "ray"):  # the command has a progress bar of its own
            logging.getLogger(name).setLevel(logging.ERROR)
        files = [{"file": number, "path": self.paths[number]} for number in range(first, len(self.paths))]
        options: dict[str, Any] = {"num_cpus": 0}  # else models that take every CPU would leave none to read for them
        if not self.remote:
            options["resources"] = {f"node:{own_node()['NodeManagerAddress']}": 0.001}
        listed = ray.data.from_items(files, override_num_blocks=len(files))
        at_once = min(REMOTE_FILES, len(files)) if self.remote else 1
        parse = _Parser(self.text_field, self.label_field, count)
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
class _Parser:
    """Parses a file: tables of `files.SCHEMA` with the number of the `file`, or with `count` its number of rows."""

    text_field: str
    label_field: str
    count: bool

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        number, path = files.column("file")[0].as_py(), files.column("path")[0].as_py()
        for table in read_tables(path, self.text_field, self.label_field):
            if self.count:
                yield pa.table({"file": [number], "rows": [table.num_rows]})
            else:
                yield table.append_column("file", pa.array(np.full(table.num_rows, number, np.int64)))
