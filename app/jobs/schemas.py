"""Requests and replies of `/v1/fits` and `/v1/jobs`, and the files that a request may name."""

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from app.schemas.requests import MAX_ITEMS, Block, In, Reason
from app.schemas.unions import LIST, TEXT, by_shape
from app.settings import Settings
from range_store.domain.erasure import STATISTICAL_RANKINGS, Ranking, Site
from range_store.storage.jobs import Job, Jobs, JobState
from workers.corpora.data_names import format_of, is_hub_name


class DataRefused(Exception):
    """The server's settings do not allow the data."""


class DataUnusable(Exception):
    """The data are not in a place that may be read."""


def _printable(value: str) -> str:
    """Refuse text that could garble a command line or a log."""
    if not value.isprintable():
        raise ValueError("holds a character that cannot be printed")
    return value


Word = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=1, le=2**53)]
LayersIn = Annotated[
    Annotated[list[Block], Field(min_length=1, max_length=MAX_ITEMS), LIST] | Annotated[Literal["all"], TEXT],
    by_shape("a list of layers or 'all'"),
]


class FitIn(In):
    """Texts to fit ranges on, and how; a field that is left out has the default of `neuronlens fit`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"data": "news/train.jsonl", "activate": True}]})

    data: Word | None = Field(
        None, description="A file below one of the server's fit directories, or a data set of the hub."
    )
    dataset: Word | None = Field(
        None, description="One of the paper's data sets, from the hub, or the kind of data that the file holds."
    )
    split: Word | None = None
    text_field: Word | None = None
    label_field: Word | None = None
    label_map: Annotated[dict[Word, Word], Field(max_length=MAX_ITEMS)] | None = Field(
        None, description="Labels as they stand in the data, names or class numbers, to names of concepts."
    )
    max_rows: Count | None = None
    rows_per_class: Count | None = None
    correct_only: bool = False
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    layers: LayersIn = Field([-1], description="Blocks; negative ones count from the end.")
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
    def _check_fields_together(self) -> "FitIn":
        if self.data is None and self.dataset is None:
            raise ValueError("name the texts: data, dataset or both")
        if len(set(self.rankings)) != len(self.rankings):
            raise ValueError("rankings: name each once")
        return self

    def arguments(self, source: str | None, label_map: Path | None) -> list[str]:
        """Return the arguments of `neuronlens fit`; `source` and `label_map` are where data and map are."""
        given: dict[str, object] = {
            name.replace("_", "-"): getattr(self, name)
            for name in (
                *("dataset", "split", "text_field", "label_field", "max_rows", "rows_per_class", "seed", "site"),
                *("position", "probe_l1", "probe_l2", "probe_rows", "bins", "batch_tokens"),
            )
        }
        layers = self.layers if isinstance(self.layers, str) else ",".join(map(str, self.layers))
        given |= {"data": source, "label-map": label_map, "layer": layers, "ranking": ",".join(self.rankings)}
        # joined by "=", so that a value which begins with a dash is no option
        arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return arguments + (["--correct-only"] if self.correct_only else [])


def source_of(request: FitIn, settings: Settings) -> str | None:
    """Return the `--data` of a request: a file, or the name of a data set; None if `dataset` alone names it.

    A file is searched below each of `fit_dirs` in order. Links are followed, and the real file must be below the same
    directory. The check is repeated when the fit starts, since the directory may change meanwhile. A name of the hub is
    refused if the server's working directory has a file or directory of that name, which the fit would read instead.

    Raises:
        DataRefused: the settings do not allow such data; names the setting.
        DataUnusable: there is no such file.
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
            if (found := _file_below(directory, wanted)) is not None:
                return found
    if settings.fit_hub and is_hub_name(request.data) and not os.path.lexists(request.data):
        return request.data
    raise DataUnusable(
        "data: no such file below the directories of NEURONLENS_FIT_DIRS; "
        "name one by its path below them, ending in .jsonl, .csv, .tsv or .parquet, or in .jsonl.gz and the like"
    )


def _file_below(directory: Path, wanted: PurePosixPath) -> str | None:
    """Return the real path of a readable data file below a directory, or None."""
    try:
        root = directory.resolve(strict=True)
        found = (root / wanted).resolve(strict=True)
        regular = stat.S_ISREG(found.stat().st_mode)
    except (OSError, RuntimeError, ValueError):
        return None
    readable = format_of(found.name) is not None and os.access(found, os.R_OK)
    return str(found) if regular and found.is_relative_to(root) and readable else None


class ProgressOut(BaseModel):
    """Progress of a fit. Rows that an earlier process had done count as done, but not towards the speed."""

    phase: Literal["starting", "loading", "reading", "fitting", "publishing"]
    rows_done: int
    rows_total: int = Field(description="0 until the texts are read.")
    rows_per_second: float | None
    seconds_left: float | None


_STARTING = ProgressOut(phase="starting", rows_done=0, rows_total=0, rows_per_second=None, seconds_left=None)


class JobOut(BaseModel):
    """A fit that was requested. Times are Unix seconds."""

    id: str
    kind: Literal["fit"] = "fit"
    model: str
    state: JobState
    progress: ProgressOut | None = Field(description="Of the process under way.")
    request: dict[str, Any] = Field(description="The request, with every default.")
    by: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int = Field(description="Processes that were started for it.")
    error: str | None = Field(description="One line: why it failed, or why its last attempt did.")
    exit_code: int | None = Field(description="Of `neuronlens fit`; negative: the signal that killed it.")
    range_set: str | None = Field(description="The range set that it published.")
    generation: str | None = Field(description="The generation that activating it made.")

    @classmethod
    def of(cls, job: Job, jobs: Jobs) -> "JobOut":
        """Build the reply for one of the jobs."""
        progress = jobs.progress_of(job)
        return cls(
            model=jobs.model,
            progress=None if progress is None else ProgressOut.model_validate(progress or dict(_STARTING)),
            **job.model_dump(exclude={"fingerprint", "key"}),
        )


class JobsOut(BaseModel):
    model: str
    jobs: list[JobOut]
