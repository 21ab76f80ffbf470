"""What a job works on: the same choices for `fit`, `train` and `evaluate`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer


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

    @property
    def served_name(self) -> str:
        """What the model is called in the store."""
        return self.name or Path(self.source).name


@dataclass(frozen=True)
class CorpusChoice:
    """Which labelled texts to read: a file, or a data set on the hub and its split."""

    source: str
    split: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    label_map: Mapping[str, str] | None = None
    max_rows: int | None = None


def read_label_map(path: Path | None) -> dict[str, str] | None:
    """The label map in a JSON file.

    Raises:
        typer.BadParameter: the file cannot be read, or is not an object of strings.
    """
    if path is None:
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint="--label-map") from None
    except ValueError as error:
        raise typer.BadParameter(f"{path} is no JSON: {error}", param_hint="--label-map") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise typer.BadParameter(
            f'{path} must hold an object like {{"neg": "negative"}}', param_hint="--label-map"
        )
    return found
