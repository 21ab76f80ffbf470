"""Jobs of `POST /v1/fits` as files, so that they outlive the process that took them.

Each has a directory `jobs/{id}` in the data directory. `job.json` is written whole: by whoever takes the job, and from
then on by the one runner of its model only (`app.jobs.runner`), so that nobody writes over anybody. To cancel is to
leave the file `cancel`. Servers that share a data directory see each other's jobs of the model that both serve.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, get_args

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from range_store.atomic_files import atomic_write, make_private_directory, remove_partial_files

State = Literal["queued", "running", "cancelling", "cancelled", "failed", "done"]
STATES: Final = get_args(State)
OVER: Final = frozenset({"cancelled", "failed", "done"})
KEPT = 50
"""Finished jobs of a model that are remembered; older ones go."""
ABANDONED = 3600.0
"""Seconds after which a directory that no job was ever written into goes."""

_ID = re.compile("[0-9a-f]{16}")


class QueueOfFitsFull(Exception):
    """As many fits wait as may."""


class KeyReused(Exception):
    """An idempotency key came again with another request."""


class FitJob(BaseModel):
    """A fit that was asked for, and what became of it. Times are Unix seconds.

    Attributes:
        fingerprint: of the model that it is for.
        request: what was asked, as `app.jobs.requests.FitIn`.
        key: hash of who asked and of their idempotency key.
        attempts: processes that were started for it, less those that ended with their server in order.
        pid: of the process under way.
        error: one line; exit_code: of the process that gave it.
        generation: that activating the range set made.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    model: str
    fingerprint: str
    state: State
    request: dict[str, Any]
    by: str
    key: str | None = None
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    attempts: int = 0
    pid: int | None = None
    error: str | None = None
    exit_code: int | None = None
    range_set: str | None = None
    generation: str | None = None

    @property
    def over(self) -> bool:
        """Nothing more happens to it."""
        return self.state in OVER


class FitJobs:
    """The jobs of one served model in a data directory.

    Raises:
        OSError: from whatever writes.
    """

    def __init__(self, data_dir: Path, model: str, fingerprint: str) -> None:
        self.directory = (data_dir / "jobs").absolute()
        self.model, self.fingerprint = model, fingerprint
        self._named = sha256(model.encode()).hexdigest()[:16]

    def place(self, job: str) -> Path:
        """The directory of a job."""
        return self.directory / job

    @property
    def runner_lock(self) -> Path:
        """Held by the one process that runs jobs of this model."""
        return self.directory / f"{self._named}.runner"

    def list(self) -> list[FitJob]:
        """Every job of the model, newest first."""
        try:
            names = [entry.name for entry in os.scandir(self.directory)]
        except OSError:
            return []
        jobs = [job for name in names if (job := self.find(name)) is not None]
        return sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=True)

    def find(self, job: str) -> FitJob | None:
        """The job of an id; None if there is none, or it is of another model."""
        if not _ID.fullmatch(job):
            return None
        place = self.place(job)
        try:
            found = FitJob.model_validate_json((place / "job.json").read_bytes())
        except (OSError, ValidationError):
            return None
        if found.model != self.model:
            return None
        if not found.over and (place / "cancel").exists():
            found = found.model_copy(update={"state": "cancelling"})
        return found

    def take(self, request: dict[str, Any], by: str, key: str | None, most: int) -> FitJob:
        """A new job, or the one that this request already made.

        That is the one of the same caller and idempotency key, whatever became of it; without a key, one that is not
        over and is for the same.

        Args:
            most: of the jobs that are not over.

        Raises:
            QueueOfFitsFull: there are `most` already.
            KeyReused: the key was used for another request.
        """
        hashed = sha256(json.dumps([by, key]).encode()).hexdigest() if key is not None else None
        with self._taking():
            jobs = self.list()
            for job in jobs:
                if hashed is not None and job.key == hashed:
                    if job.request != request:
                        raise KeyReused
                    return job
            pending = [job for job in jobs if not job.over]
            for job in pending:
                if hashed is None and job.state != "cancelling" and job.request == request:
                    return job
            if len(pending) >= most:
                raise QueueOfFitsFull
            job = FitJob(
                id=secrets.token_hex(8),
                model=self.model,
                fingerprint=self.fingerprint,
                state="queued",
                request=request,
                by=by,
                key=hashed,
                created_at=time.time(),
            )
            self.place(job.id).mkdir(mode=0o700)
            self.write(job)
            return job

    @contextmanager
    def _taking(self) -> Iterator[None]:
        make_private_directory(self.directory)
        with FileLock(self.directory / f"{self._named}.taking", timeout=10):
            yield

    def write(self, job: FitJob) -> None:
        """Keep a job as it is now."""
        with atomic_write(self.place(job.id) / "job.json") as partial:
            partial.write_text(job.model_dump_json(), "utf-8")

    def cancel(self, job: FitJob) -> None:
        """Ask the runner to end it."""
        (self.place(job.id) / "cancel").touch(mode=0o600)

    def forget_old(self) -> None:
        """Keep the newest `KEPT` of those that are over, and nothing that was never written whole."""
        for job in [job for job in self.list() if job.over][KEPT:]:
            shutil.rmtree(self.place(job.id), ignore_errors=True)
        for place in self.directory.glob("*/"):
            with suppress(OSError):
                if not (place / "job.json").exists() and time.time() - place.stat().st_mtime > ABANDONED:
                    shutil.rmtree(place, ignore_errors=True)
                else:
                    remove_partial_files(place, "*")
