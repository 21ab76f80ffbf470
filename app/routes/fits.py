"""`/v1/fits` and `/v1/jobs`: fits on the server's own machine, each in a process beside it."""

from typing import Annotated, Any

from fastapi import Header, Response

from app.http.problems import ApiError
from app.http.responses import BODY, QUERY, header
from app.http.routing import Router
from app.jobs.schemas import DataRefused, DataUnusable, FitIn, JobOut, JobsOut, source_of
from app.live.store_threads import StoreThreadsDep
from app.routes.dependencies import ModelDep, ServiceDep
from app.security.auth import CallerDep
from app.serving.service import KNOWN_DATA_SETS
from range_store.domain.erasure import resolve_layers

router = Router("fits")

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="A request that is sent again with the same key returns the job of the first one. Without a key, a "
        "repeated request returns its job while that has not ended.",
    ),
]
ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"headers": header("Location", "Where the job is.")}}


@router.operation(
    "POST",
    "/v1/fits",
    key_scope="admin",
    feature="fits",
    errors=(*BODY, *QUERY, 403, 409, 429, 503),
    responses=ACCEPTED,
    status_code=202,
)
async def start_fit(
    selector: ModelDep,
    caller: CallerDep,
    store_threads: StoreThreadsDep,
    body: FitIn,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobOut:
    """Fit ranges on texts that the server can read, in a process beside it, as `neuronlens fit` would."""
    service = selector.service(body.model)
    if not service.settings.fits:
        other = "use `neuronlens fit`" if service.settings.ray else "NEURONLENS_FIT_DIRS would allow them"
        raise ApiError("fits_disabled", f"this server takes no fits: {other}")
    identity = service.model.identity
    resolve_layers(body.layers if isinstance(body.layers, str) else tuple(body.layers), identity.n_layers)
    if body.dataset is not None and body.dataset not in KNOWN_DATA_SETS:
        raise ApiError("unusable_data", f"dataset: it is one of {', '.join(KNOWN_DATA_SETS)}, or left out")

    def add() -> JobOut:
        source_of(body, service.settings)
        request = body.model_dump(mode="json", exclude={"model"})
        max_pending = service.settings.fit_queue + 1
        job = service.jobs.add(request, caller.by, idempotency_key, identity.fingerprint, max_pending)
        return JobOut.of(job, service.fits.refresh())

    try:
        job = await store_threads.run(add)
    except DataRefused as error:
        raise ApiError("fits_disabled", str(error)) from None
    except DataUnusable as error:
        raise ApiError("unusable_data", str(error)) from None
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.operation("GET", "/v1/jobs", key_scope="read", errors=(*QUERY, 503))
async def list_jobs(service: ServiceDep, store_threads: StoreThreadsDep) -> JobsOut:
    """List every fit that waits or runs, and the last that have ended, newest first."""
    jobs = await store_threads.run(service.jobs.read)
    return JobsOut(model=service.name, jobs=[JobOut.of(job, jobs) for job in jobs.jobs])


@router.operation("GET", "/v1/jobs/{job}", key_scope="read", errors=(*QUERY, 503))
async def show_job(service: ServiceDep, store_threads: StoreThreadsDep, job: str) -> JobOut:
    """Show the state of a fit, its progress, and how it ended."""
    jobs = await store_threads.run(service.jobs.read)
    return JobOut.of(jobs.get(job), jobs)


@router.operation("DELETE", "/v1/jobs/{job}", key_scope="admin", errors=(*QUERY, 409, 503))
async def cancel_job(service: ServiceDep, store_threads: StoreThreadsDep, job: str) -> JobOut:
    """Cancel a fit, so that it publishes nothing. It is `cancelling` until its process has ended. May be repeated."""

    def cancel() -> JobOut:
        return JobOut.of(service.jobs.cancel(job), service.fits.refresh())

    return await store_threads.run(cancel)
