"""What a job works on: the same choices for `fit`, `train`, `evaluate` and `serve`. `app.serving.wiring` takes them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from app.settings import Settings


DTypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelChoice:
    """Which checkpoint to load, and how. `threads` None: as many as torch takes."""

    source: str
    revision: str | None = None
    device: str = "auto"
    dtype: DTypeChoice = "auto"
    threads: int | None = None
    allow_pickle: bool = False
    name: str | None = None
    template: str | None = None
    scoring: Literal["restricted", "greedy"] = "restricted"
    plain: bool = False
    compile: bool = False

    @classmethod
    def of(cls, settings: "Settings") -> Self:
        """The model of the settings, which must name one."""
        assert settings.model is not None
        return cls(
            settings.model,
            settings.revision,
            settings.device,
            settings.dtype,
            settings.threads,
            settings.allow_pickle,
            settings.name,
            settings.template,
            settings.scoring,
            settings.plain,
            settings.compile,
        )

    @property
    def served_name(self) -> str:
        """What the model is called in the store."""
        return self.name or Path(os.path.abspath(self.source)).name  # "." has a name too


@dataclass(frozen=True)
class RayChoice:
    """Which cluster to work on, and how many actors there; None: one per GPU, or without GPUs one per node."""

    address: str
    actors: int | None = None


@dataclass(frozen=True)
class CorpusChoice:
    """Which labelled texts to read.

    `source`: a file, or a data set on the hub; None: `dataset`, one of the paper's, from the hub. `label_map`: a JSON
    file.
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
        """Whether both name the same place and split, whichever rows are used of it."""
        return self._place == other._place

    @property
    def _place(self) -> tuple[str | None, ...]:
        if self.source is not None and os.path.exists(self.source):
            place = os.path.realpath(self.source)
            return (place, self.split or "train") if os.path.exists(f"{place}/dataset_dict.json") else (place,)
        return self.source or self.dataset, self.split or "train"


@dataclass(frozen=True)
class NewModelChoice:
    """A model to train from random weights. `config`: JSON text of further settings."""

    family: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    config: str | None = None
