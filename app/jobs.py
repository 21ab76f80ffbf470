"""What a job works on: the same choices for `fit`, `train`, `evaluate` and `serve`. `app.wiring` takes them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from app.settings import Settings


@dataclass(frozen=True)
class ModelChoice:
    """Which checkpoint to load, and how. `threads` None: as many as torch takes."""

    source: str
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None
    allow_pickle: bool = False
    name: str | None = None

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
        )

    @property
    def served_name(self) -> str:
        """What the model is called in the store."""
        return self.name or Path(os.path.abspath(self.source)).name  # "." has a name too


@dataclass(frozen=True)
class CorpusChoice:
    """Which labelled texts to read: a file, or a data set on the hub and its split. `label_map`: a JSON file."""

    source: str
    split: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    label_map: Path | None = None
    max_rows: int | None = None
