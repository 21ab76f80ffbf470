"""What `/v1/fits` and `/v1/jobs` reply, and what `event: jobs` tells."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.jobs.process import progress_of
from app.jobs.records import FitJob, FitJobs, State


class ProgressOut(BaseModel):
    """How far a fit is. Rows that an earlier process of it had done count as done, not as speed."""

    phase: Literal["starting", "loading", "reading", "fitting", "publishing"]
    rows_done: int
    rows_total: int = Field(description="0 until the texts are read.")
    rows_per_second: float | None
    seconds_left: float | None


class JobOut(BaseModel):
    """A fit that was asked for. Times are Unix seconds."""

    id: str
    kind: Literal["fit"] = "fit"
    model: str
    state: State
    progress: ProgressOut | None = Field(description="Of a process under way.")
    request: dict[str, Any] = Field(description="What was asked, with every default.")
    by: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int = Field(description="Processes that were started for it.")
    error: str | None = Field(description="One line: why it failed, or why its last attempt did.")
    exit_code: int | None = Field(description="That of `neuronlens fit`; negative: the signal that killed it.")
    range_set: str | None = Field(description="What it published.")
    generation: str | None = Field(description="What activating that made.")


class JobsOut(BaseModel):
    model: str
    jobs: list[JobOut]


def job_out(jobs: FitJobs, job: FitJob) -> JobOut:
    """A job as it is replied. Reads the file with its progress."""
    progress = None
    if job.pid is not None and not job.over:
        known = {"phase": "starting", "rows_done": 0, "rows_total": 0, "rows_per_second": None, "seconds_left": None}
        progress = ProgressOut.model_validate(known | progress_of(jobs.place(job.id)))
    shown = job.model_dump(exclude={"fingerprint", "key", "pid"})
    return JobOut(progress=progress, **shown)
