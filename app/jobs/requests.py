"""What `POST /v1/fits` asks for: fields that are `neuronlens fit`'s options, and which files they may name."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from app.schemas.requests import MOST, Block, In, Reason
from app.schemas.unions import LIST, TEXT, by_shape
from app.settings import Settings
from range_store.domain.erasure import STATISTICAL_RANKINGS, Ranking, Site

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILES = re.compile(r".*[^/.].*(\.(jsonl|json|csv|tsv)(\.(gz|bz2|xz))?|\.parquet)", re.IGNORECASE | re.DOTALL)
"""Names of files that can be read: those of `workers.fitting.files.kind_of`, which is not imported here."""


class DataRefused(Exception):
    """The data cannot be named: its settings forbid it."""


class DataUnusable(Exception):
    """The data are not where files may be read."""


def _printable(value: str) -> str:
    """What is handed on to a process, and may come back in its messages."""
    if not value.isprintable():
        raise ValueError("holds a character that cannot be printed")
    return value


Word = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Whole = Annotated[int, Field(ge=1, le=2**53)]
LayersIn = Annotated[
    Annotated[list[Block], Field(min_length=1, max_length=MOST), LIST] | Annotated[Literal["all"], TEXT],
    by_shape("a list of layers or 'all'"),
]


class FitIn(In):
    """Texts to fit ranges on, and how; what is left out has the default of `neuronlens fit`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"data": "news/train.jsonl", "activate": True}]})

    data: Word | None = Field(
        None, description="A file below one of the server's directories for this, or a data set of the hub."
    )
    dataset: Word | None = Field(
        None, description="One of the paper's, from the hub, or what kind of data the file holds."
    )
    split: Word | None = None
    text_field: Word | None = None
    label_field: Word | None = None
    label_map: Annotated[dict[Word, Word], Field(max_length=MOST)] | None = Field(
        None, description="Labels as they stand in the data, names or class numbers, to names of concepts."
    )
    max_rows: Whole | None = None
    rows_per_class: Whole | None = None
    correct_only: bool = False
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    layers: LayersIn = Field([-1], description="Blocks; negative ones from the end.")
    rankings: Annotated[list[Ranking], Field(min_length=1, max_length=5)] = Field(list(STATISTICAL_RANKINGS))
    site: Site = "block_output"
    position: Literal["read", "mean"] = "read"
    probe_l1: Annotated[float, Field(ge=0)] = 1e-3
    probe_l2: Annotated[float, Field(ge=0)] = 1e-3
    probe_rows: Annotated[int, Field(ge=2, le=2**20)] = 4096
    bins: Annotated[int, Field(ge=1, le=2**14)] = 512
    batch_tokens: Annotated[int, Field(ge=1, le=2**17)] = 4096
    activate: bool = Field(False, description="Make it the range set that erasures use.")
    force: bool = Field(False, description="Activate even if that drops live erasures that it cannot serve.")
    reason: Reason | None = Field(None, description="Why, for the audit of the activation.")
    model: str | None = None

    @model_validator(mode="after")
    def _some_texts(self) -> "FitIn":
        if self.data is None and self.dataset is None:
            raise ValueError("which texts? name data or dataset")
        if len(set(self.rankings)) != len(self.rankings):
            raise ValueError("rankings: name each once")
        return self

    def arguments(self, source: str | None, label_map: Path | None) -> list[str]:
        """Those of `neuronlens fit` for this. `source` and `label_map`: where the data and the map are."""
        given: dict[str, object] = {
            "data": source,
            "dataset": self.dataset,
            "split": self.split,
            "text-field": self.text_field,
            "label-field": self.label_field,
            "label-map": label_map,
            "max-rows": self.max_rows,
            "rows-per-class": self.rows_per_class,
            "seed": self.seed,
            "layer": _list(self.layers),
            "ranking": _list(self.rankings),
            "site": self.site,
            "position": self.position,
            "probe-l1": self.probe_l1,
            "probe-l2": self.probe_l2,
            "probe-rows": self.probe_rows,
            "bins": self.bins,
            "batch-tokens": self.batch_tokens,
        }
        # joined by "=", a value that begins with a dash is no option
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return words + (["--correct-only"] if self.correct_only else [])


def _list(of: Sequence[object] | str) -> str:
    return of if isinstance(of, str) else ",".join(map(str, of))


def source_of(request: FitIn, settings: Settings) -> str | None:
    """What `--data` is for a request; None if its data set comes from the hub by `dataset` alone.

    A file is looked for below each of `fit_dirs`, in their order, whatever links lie on the way: where it really lies
    must be below the same directory. Who may write there can still change what it is; it is looked at again when the
    fit starts. A name that a file or directory in the server's working directory has, too, is none of the hub: the fit
    would take it for that, and say what it is.

    Raises:
        DataRefused: no such data may be named here; says which setting would allow them.
        DataUnusable: no such file may be read.
    """
    if request.data is None:
        if not settings.fit_hub:
            raise DataRefused("this server reads no data sets of the hub: NEURONLENS_FIT_HUB would allow it")
        return None
    if not settings.fit_dirs and not settings.fit_hub:
        raise DataRefused("this server reads no files: NEURONLENS_FIT_DIRS would allow directories")
    wanted = PurePosixPath(request.data)
    if not wanted.is_absolute() and ".." not in wanted.parts and wanted.parts:
        for directory in settings.fit_dirs:
            if (found := _below(directory, wanted)) is not None:
                return found
    of_hub = _HUB_NAME.fullmatch(request.data) and not FILES.fullmatch(request.data)
    if settings.fit_hub and of_hub and not os.path.lexists(request.data):
        return request.data
    raise DataUnusable(
        "data: no such file below the directories of NEURONLENS_FIT_DIRS; "
        "name one by its path below them, ending in .jsonl, .csv, .tsv or .parquet, or in .jsonl.gz and the like"
    )


def _below(directory: Path, wanted: PurePosixPath) -> str | None:
    """The real path of a regular file that lies below a directory; None if there is no such file."""
    try:
        root = directory.resolve(strict=True)
        found = (root / wanted).resolve(strict=True)
        regular = stat.S_ISREG(found.stat().st_mode)
    except (OSError, RuntimeError, ValueError):
        return None
    readable = FILES.fullmatch(found.name) and os.access(found, os.R_OK)
    return str(found) if regular and found.is_relative_to(root) and readable else None
