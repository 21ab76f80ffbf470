"""Fits started over HTTP: their state in Redis, shared by all servers of a model.

All jobs of a model are one JSON document, changed by compare-and-set. The server that runs them holds a lease, which
expires unless it is renewed and carries the progress of the fit under way.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, cast, get_args

import redis
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from range_store.errors import IdempotencyKeyReused, JobOver, JobQueueFull, StoreUnavailable, UnknownJob
from range_store.redis_errors import translate_redis_errors
from range_store.storage.schema import CHANGE_DOCUMENT, CHANGES, HOLD_LEASE, ModelKeys

JobState = Literal["queued", "running", "cancelling", "cancelled", "failed", "done"]
JOB_STATES: Final[tuple[JobState, ...]] = get_args(JobState)
OVER: Final = frozenset({"cancelled", "failed", "done"})
KEPT_JOBS = 50
"""Ended jobs of a model that are kept; older ones are removed."""
LEASE_SECONDS = 10.0
"""How long a lease lasts that is not renewed."""
ATTEMPTS = 50
"""Tries of one change while others change the document too."""


class Job(BaseModel):
    """A fit that was requested. Times are Unix seconds.

    Attributes:
        fingerprint: of the model to fit on.
        key: hash of caller and idempotency key.
        attempts: processes started for it, except those that ended in order with their server.
        error: one line; why it failed, or why its last attempt did.
        exit_code: of the last process that ended by itself.
        generation: that activating the range set made.
    """

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    fingerprint: str
    state: JobState
    request: dict[str, Any]
    by: str
    key: str | None = None
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    attempts: int = 0
    error: str | None = None
    exit_code: int | None = None
    range_set: str | None = None
    generation: str | None = None

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.state in OVER


_DOCUMENT = TypeAdapter(tuple[Job, ...])


@dataclass(frozen=True)
class Jobs:
    """All jobs of a model, newest first, and the progress of the one under way.

    Attributes:
        model: its name.
        runner: name of the server that holds the lease; None if there is none.
    """

    model: str
    jobs: tuple[Job, ...] = ()
    runner: str | None = None
    running: str | None = None
    progress: dict[str, Any] = field(default_factory=dict)

    def find(self, id_: str) -> Job | None:
        """Return the job with this id, or None."""
        return next((job for job in self.jobs if job.id == id_), None)

    def get(self, id_: str) -> Job:
        """Return the job with this id. Raises UnknownJob."""
        if (job := self.find(id_)) is None:
            raise UnknownJob(id_)
        return job

    def progress_of(self, job: Job) -> dict[str, Any] | None:
        """Return the progress of a job, empty before its process reports any; None while it has no process."""
        return None if job.over or job.id != self.running else self.progress


class JobStore:
    """The jobs of one model in Redis. Thread-safe; every method raises StoreUnavailable if Redis is away."""

    def __init__(self, client: redis.Redis, model: str) -> None:
        self.model = model
        self._client = client
        self._keys = ModelKeys(model)
        self._change_document = client.register_script(CHANGE_DOCUMENT)
        self._hold_lease = client.register_script(HOLD_LEASE)

    def read(self) -> Jobs:
        """Read all jobs and the progress."""
        with translate_redis_errors(), self._client.pipeline(transaction=False) as both:
            both.get(self._keys.jobs)
            both.get(self._keys.job_lease)
            document, lease = both.execute()
        jobs = sorted(_parse(document).values(), key=lambda job: (job.created_at, job.id), reverse=True)
        try:
            report = json.loads(lease or b"{}")
            return Jobs(self.model, tuple(jobs), report.get("runner"), report.get("job"), report.get("progress") or {})
        except (ValueError, AttributeError):
            return Jobs(self.model, tuple(jobs))

    def add(
        self, request: dict[str, Any], by: str, idempotency_key: str | None, fingerprint: str, max_pending: int
    ) -> Job:
        """Add a job, or return the one that the same request made before.

        That is the caller's job with the same idempotency key, whatever its state; without a key, one for the same
        request that has not ended.

        Raises:
            JobQueueFull: `max_pending` jobs have not ended.
            IdempotencyKeyReused: the key was used for another request.
        """
        key = None if idempotency_key is None else sha256(json.dumps([by, idempotency_key]).encode()).hexdigest()
        new = Job(
            id=secrets.token_hex(8),
            fingerprint=fingerprint,
            state="queued",
            request=request,
            by=by,
            key=key,
            created_at=time.time(),
        )

        def decide(jobs: dict[str, Job]) -> Job:
            pending = [job for job in jobs.values() if not job.over]
            if key is not None:
                same = next((job for job in jobs.values() if job.key == key), None)
                if same is not None and same.request != request:
                    raise IdempotencyKeyReused
            else:
                same = next((job for job in pending if job.state != "cancelling" and job.request == request), None)
            if same is not None:
                return same
            if len(pending) >= max_pending:
                raise JobQueueFull
            return new

        return self._change(decide)

    def cancel(self, id_: str) -> Job:
        """Cancel a job and return it. One that has a process is `cancelling` until that ends.

        Raises:
            UnknownJob: there is no such job.
            JobOver: it is done, or has failed.
        """
        found = self.read()
        job = found.get(id_)

        def decide(jobs: dict[str, Job]) -> Job:
            current = jobs.get(id_, job)
            if current.over and current.state != "cancelled":
                raise JobOver(current.state)
            if current.over:
                return current
            if current.state == "queued" or found.runner is None:
                return current.model_copy(update={"state": "cancelled", "ended_at": time.time()})
            return current.model_copy(update={"state": "cancelling"})

        return self._change(decide)

    def update(self, job: Job, **changes: Any) -> Job:
        """Change a job on behalf of its runner, add it if Redis has lost it, and return it.

        A job that has ended stays as it is, and a cancellation that was requested meanwhile is kept.
        """

        def decide(jobs: dict[str, Job]) -> Job:
            current = jobs.get(job.id, job)
            if current.over:
                return current
            changed = current.model_copy(update=changes)
            if current.state == "cancelling" and not changed.over:
                changed = changed.model_copy(update={"state": "cancelling"})
            return changed

        return self._change(decide)

    def hold_lease(
        self, runner: str, job: str | None, progress: dict[str, Any], seconds: float = LEASE_SECONDS
    ) -> bool:
        """Take or renew the lease, and report progress. Returns False while another runner holds the lease."""
        report = json.dumps({"runner": runner, "job": job, "progress": progress})
        with translate_redis_errors():
            return bool(self._hold_lease([self._keys.job_lease], [runner, report, max(1, int(seconds * 1000))]))

    def release_lease(self, runner: str) -> None:
        """End the lease, if `runner` holds it."""
        self.hold_lease(runner, None, {}, seconds=0)

    def _change(self, decide: Callable[[dict[str, Job]], Job]) -> Job:
        """Put the job that `decide` returns; `decide` may be called again with newer jobs."""
        for _ in range(ATTEMPTS):
            with translate_redis_errors():
                raw = cast(bytes, self._client.get(self._keys.jobs) or b"")
            jobs = _parse(raw)
            job = decide(jobs)
            if jobs.get(job.id) == job:
                return job
            jobs[job.id] = job
            ended = sorted((each for each in jobs.values() if each.over), key=lambda each: -each.created_at)
            for old in ended[KEPT_JOBS:]:
                del jobs[old.id]
            document = _DOCUMENT.dump_json(tuple(jobs.values()))
            arguments: list[bytes | str] = [raw, document, CHANGES, self._keys.hint]
            with translate_redis_errors():
                if self._change_document([self._keys.jobs], arguments) == b"done":
                    return job
        raise StoreUnavailable("the jobs change too fast: try again")


def _parse(document: bytes | None) -> dict[str, Job]:
    try:
        return {job.id: job for job in _DOCUMENT.validate_json(document or b"[]")}
    except ValidationError:
        message = "the jobs in Redis are unreadable: did another application or a newer version write them?"
        raise StoreUnavailable(message, "ERR") from None
