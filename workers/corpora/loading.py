"""From the name of a source, its columns and a selection of its rows to a corpus."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt

from workers.corpora.concepts import ConceptNames, LabelError
from workers.corpora.corpus import Corpus
from workers.corpora.data_names import without_credentials
from workers.corpora.errors import CorpusError
from workers.corpora.files import is_hub_dataset, is_saved_dataset, root_cause
from workers.corpora.paper_datasets import PAPER_DATASETS, PaperDataset
from workers.corpora.rows import DatasetTable, FileTable, Rows, Table
from workers.corpora.sources import check_source, paper_dataset

logger = logging.getLogger(__name__)


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
        source: a file, directory or pattern, a directory of the `datasets` library, or the name of a data set on the
            hub. None: `dataset` from the hub.
        table: the data of `source`, if they are opened already.
        dataset: name of one of the paper's data sets, which gives columns and classes, also to a file of it.
        labels: the model's labels. `ConceptNames` says how these, `dataset` and `label_map` name a label of the data.
        split: of a hub data set; "train" by default.
        text_field, label_field: columns; by default those of the data set, else "text" and "label".
        label_map: from labels of the data to names of concepts.
        max_rows: use this many rows, drawn by `seed` and kept in their order.
        rows_per_class: of these, use at most this many of each class, drawn likewise.

    Raises:
        CorpusError: the source is missing, unreadable, empty, or has no such columns.
    """
    if dataset is None and source is not None and source in PAPER_DATASETS and is_hub_dataset(source):
        source, dataset = None, source
    paper = paper_dataset(dataset)
    place = without_credentials(source or f"{dataset}")
    on_hub = table is None and (source is None or is_hub_dataset(source))
    if table is None:
        table = _open(source, split) if source is not None else DatasetTable(_from_hub(paper, place, split))
    text_field = text_field or _default_column(table, paper.text_field if paper else None, "text")
    label_field = label_field or _default_column(table, paper.label_field if paper else None, "label")
    for field, flag in ((text_field, "--text-field"), (label_field, "--label-field")):
        if field not in table.column_names:
            columns = ", ".join(repr(name if len(name) <= 40 else f"{name[:39]}…") for name in table.column_names)
            raise CorpusError(f"{place} has no column {field!r}: name one of its columns with {flag}: {columns}")
    concept_names = ConceptNames(labels, table.class_names(label_field), label_map or {}, paper)
    name = place if on_hub else Path(place).name
    rows = table.rows(text_field, label_field, name)
    selections = []
    chosen: npt.NDArray[np.int64] | None = None
    if max_rows is not None and max_rows < len(rows):
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size=max_rows, replace=False))
        selections.append(f"{max_rows} of {len(rows)} rows")
    if rows_per_class is not None:
        everything = np.arange(len(rows)) if chosen is None else chosen
        chosen = _sample_classes(rows, everything, concept_names, rows_per_class, seed)
        selections.append(f"at most {rows_per_class} per class")
    selection = f"{', '.join(selections)}, drawn with seed {seed}" if selections else "all rows"
    selected = rows if chosen is None else rows.select(chosen)
    corpus = Corpus(name, split if on_hub else None, selection, selected, concept_names)  # files have no splits
    if not len(corpus):
        raise CorpusError(f"{place} has no rows")
    if chosen is not None and concept_names.ambiguity():  # rows that were not chosen may have class number 0
        for label in rows.labels():
            with suppress(LabelError):
                concept_names.name(label)
    if (ambiguity := concept_names.ambiguity()) is not None:
        raise CorpusError(f"{name}: {ambiguity}")
    if concept_names.positional and paper is None:
        meanings = ", ".join(f"{number} is {concept}" for number, concept in sorted(concept_names.positional.items()))
        logger.warning("%s: class numbers are taken as positions in the list of labels: %s", name, meanings)
    return corpus


def _default_column(table: Table, of_dataset: str | None, usual: str) -> str:
    """The data set's own name of a column if the table has it; a file of the data set may have the usual name."""
    return of_dataset if of_dataset is not None and of_dataset in table.column_names else usual


def _sample_classes(
    rows: Rows, chosen: npt.NDArray[np.int64], concept_names: ConceptNames, limit: int, seed: int
) -> npt.NDArray[np.int64]:
    """At most `limit` of the chosen rows of each class, drawn by `seed`, in their order."""
    labels = rows.labels()
    codes: dict[str, int] = {}

    def code_of(row: int) -> int:
        try:
            return codes.setdefault(concept_names.name(labels[row]), len(codes))
        except LabelError as error:
            raise CorpusError(f"{rows.location(row)} {error}") from None

    code_of_row = np.fromiter(map(code_of, chosen), np.int32, len(chosen))  # names would take too much memory
    rng = np.random.default_rng(seed)
    kept = []
    for concept in sorted(codes):
        own = chosen[code_of_row == codes[concept]]
        kept.append(own if len(own) <= limit else rng.choice(own, size=limit, replace=False))
    return np.sort(np.concatenate(kept)) if kept else chosen


def _silence_datasets() -> None:
    """The command line has progress bars and errors of its own."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)


def _from_hub(paper: PaperDataset | None, name: str, split: str | None) -> datasets.Dataset:
    if paper is None:
        raise CorpusError("no data: name a file, or a data set")
    _silence_datasets()
    try:
        return datasets.load_dataset(paper.path, paper.config, split=paper.split(split or "train"))
    except Exception as error:
        raise CorpusError(
            f"cannot read the data set {name} from the hub ({paper.path}): {root_cause(error)}; "
            "a file of it can be named instead"
        ) from error


def _open(source: str, split: str | None) -> Table:
    check_source(source)
    on_hub = is_hub_dataset(source)
    if not on_hub and not is_saved_dataset(source):
        return FileTable.open(source)
    split = split or "train"
    _silence_datasets()
    try:
        if on_hub:
            return DatasetTable(datasets.load_dataset(source, split=split))
        saved = datasets.load_from_disk(source)
    except Exception as error:
        raise CorpusError(f"cannot read {source}: {root_cause(error)}") from error
    if isinstance(saved, datasets.Dataset):
        return DatasetTable(saved)
    if split not in saved:
        raise CorpusError(f"{source} has no split {split!r}; it has: {', '.join(map(repr, saved))}")
    return DatasetTable(saved[split])
