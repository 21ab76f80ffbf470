"""What a command works on: texts, a new model, a cluster. The entry points in `app.serving` take these.

The checks run before torch is loaded, which takes many seconds.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.settings import ModelSettings

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a step, the number of finished items and their total (0 if unknown)."""


@dataclass(frozen=True)
class RayChoice:
    """A Ray cluster and the number of actors on it; None: one per GPU, or without GPUs one per node."""

    address: str
    actors: int | None = None


@dataclass(frozen=True)
class CorpusChoice:
    """Labelled texts and how to read them. The fields are arguments of `workers.corpora.loading.load_corpus`.

    Attributes:
        source: a file, a directory or pattern of files, or a data set on the hub; None: `dataset`, from the hub.
        label_map: a JSON file.
    """

    source: str | None
    dataset: str | None = None
    split: str | None = None
    text_field: str | None = None
    label_field: str | None = None
    label_map: Path | None = None
    max_rows: int | None = None
    rows_per_class: int | None = None
    seed: int = 0

    def same_texts(self, other: "CorpusChoice") -> bool:
        """Whether both name the same source and split; which rows of it are used does not matter."""
        return self._place == other._place

    @property
    def _place(self) -> tuple[str | None, ...]:
        if self.source is not None and os.path.exists(self.source):
            place = os.path.realpath(self.source)
            return (place, self.split or "train") if os.path.exists(f"{place}/dataset_dict.json") else (place,)
        return self.source or self.dataset, self.split or "train"


@dataclass(frozen=True)
class NewModelChoice:
    """A model to train from random weights. `config`: JSON text of further settings of transformers."""

    family: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    config: str | None = None


def check_model(model: ModelSettings, cluster: RayChoice | None = None) -> None:
    """Check that a checkpoint and its prompt template exist. On a cluster, nodes may have other directories.

    Raises:
        CheckpointError: the checkpoint or the template is missing.
    """
    from workers.models.few_shot.prompt_templates import load_template
    from workers.models.source import check_checkpoint

    if cluster is None:
        check_checkpoint(model.source, model.revision)
    if model.template is not None:
        load_template(model.template)


def check_texts(*corpora: CorpusChoice | None, cluster: RayChoice | None = None) -> None:
    """Check that files, data sets and label maps exist. A cluster also reads URLs, and checks its files itself.

    Raises:
        CorpusError: something is missing.
    """
    from workers.corpora.files import is_hub_dataset
    from workers.corpora.paper_datasets import PAPER_DATASETS
    from workers.corpora.sources import check_on_hub, check_source, load_label_map, paper_dataset

    for corpus in corpora:
        if corpus is None:
            continue
        paper_dataset(corpus.dataset)
        if corpus.label_map is not None:
            load_label_map(corpus.label_map)
        if cluster is None:
            check_source(corpus.source)
        if corpus.source is not None and corpus.source not in PAPER_DATASETS and is_hub_dataset(corpus.source):
            check_on_hub(corpus.source)
