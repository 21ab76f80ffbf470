"""`/v1/fits` and `/v1/jobs`: a fit on the server's own machine, as a process beside it."""

import logging
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Header, Response
from filelock import Timeout

from app.http.problems import BODY, QUERY, ApiError, documented, header
from app.jobs.records import KeyReused, QueueOfFitsFull
from app.jobs.replies import JobOut, JobsOut, job_out
from app.jobs.requests import DataRefused, DataUnusable, FitIn, source_of
from app.routes.dependencies import ModelDep, QueryChecked, ServiceDep
from app.security.auth import CallerDep
from app.serving.service import KNOWN_DATA_SETS
from range_store.domain.erasure import resolve_layers

logger = logging.getLogger(__name__)
router = APIRouter(tags=["fits"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="Sent again with the same request, it gives the job that it gave; without one, the same request "
        "gives the job that is under way for it.",
    ),
]
ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"headers": header("Location", "Where the job is.")}}

Result = TypeVar("Result")


async def _of_files(work: Callable[[], Result]) -> Result:
    """What reads or writes files, on a thread; raises ApiError (503) if they cannot be written."""
    try:
        return await to_thread.run_sync(work)
    except (OSError, Timeout) as error:
        logger.error("the files of jobs cannot be written: %s", type(error).__name__, exc_info=error)
        raise ApiError("jobs_unavailable", "the server cannot keep jobs now; its log says why") from None


@router.post(
    "/v1/fits",
    status_code=202,
    dependencies=[QueryChecked],
    responses=documented(*BODY, *QUERY, 403, 409, 429, 503) | ACCEPTED,
)
async def start_fit(
    selector: ModelDep, caller: CallerDep, body: FitIn, response: Response, idempotency_key: IdempotencyKey = None
) -> JobOut:
    """Fit ranges on texts that the server can read, in a process beside it, as `neuronlens fit` would."""
    service = selector.service(body.model)
    if not service.settings.fits:
        other = "use `neuronlens fit`" if service.settings.ray else "NEURONLENS_FIT_DIRS would allow them"
        raise ApiError("fits_disabled", f"this server takes no fits: {other}")
    resolve_layers(body.layers if isinstance(body.layers, str) else tuple(body.layers), service.model.identity.n_layers)
    if body.dataset is not None and body.dataset not in KNOWN_DATA_SETS:
        raise ApiError("unusable_data", f"dataset: it is one of {', '.join(KNOWN_DATA_SETS)}, or left out")
    jobs = service.jobs

    def take() -> JobOut:
        source_of(body, service.settings)
        request = body.model_dump(mode="json", exclude={"model"})
        job = jobs.take(request, caller.by, idempotency_key, service.settings.fit_queue + 1)
        return job_out(jobs, job)

    try:
        job = await _of_files(take)
    except DataRefused as error:
        raise ApiError("fits_disabled", str(error)) from None
    except DataUnusable as error:
        raise ApiError("unusable_data", str(error)) from None
    except KeyReused:
        raise ApiError("idempotency_key_reused", "this Idempotency-Key was sent with another request") from None
    except QueueOfFitsFull:
        detail = "as many fits wait as may: try again when one has ended, or cancel one"
        raise ApiError("fit_queue_full", detail, {"Retry-After": "10"}) from None
    service.feed.set_job(job.id, job.model_dump(mode="json"))
    service.fits.wake()
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.get("/v1/jobs", dependencies=[QueryChecked], responses=documented(*QUERY, 503))
async def list_jobs(service: ServiceDep) -> JobsOut:
    """Every fit that waits or runs, and the last that are over, newest first."""
    jobs = service.jobs
    listed = await _of_files(lambda: [job_out(jobs, job) for job in jobs.list()])
    return JobsOut(model=service.name, jobs=listed)


@router.get("/v1/jobs/{job}", dependencies=[QueryChecked], responses=documented(*QUERY, 503))
async def show_job(service: ServiceDep, job: str) -> JobOut:
    """What a fit is doing, how far it is, and how it ended."""
    jobs = service.jobs
    found = await _of_files(lambda: jobs.find(job))
    if found is None:
        raise ApiError("unknown_job", "no such job of this model")
    return await _of_files(lambda: job_out(jobs, found))


@router.delete("/v1/jobs/{job}", dependencies=[QueryChecked], responses=documented(*QUERY, 409, 503))
async def cancel_job(service: ServiceDep, job: str) -> JobOut:
    """End a fit; it publishes nothing. It is `cancelling` until its process has ended. May be repeated."""
    jobs = service.jobs

    def cancel() -> JobOut:
        found = jobs.find(job)
        if found is None:
            raise ApiError("unknown_job", "no such job of this model")
        if found.state == "cancelled":
            return job_out(jobs, found)
        if found.over:
            raise ApiError("job_over", f"the job is over: it is {found.state}")
        jobs.cancel(found)
        return job_out(jobs, jobs.find(job) or found)

    cancelled = await _of_files(cancel)
    service.fits.wake()
    return cancelled
