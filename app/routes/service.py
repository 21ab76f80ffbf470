"""Probes, metrics, and what is loaded."""

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.http.problems import QUERY, ApiError, documented
from app.routes.dependencies import ModelsDep, QueryChecked, log_model
from app.schemas.replies import Alive, ModelOut, ModelsOut, Ready
from app.security.auth import Caller, CallerDep
from app.serving.readiness import checks_of
from app.serving.service import Service
from app.settings import LOOPBACK
from range_store.domain.range_set import dtype_mismatch

router = APIRouter(tags=["service"])


@router.get("/livez")
async def livez() -> Alive:
    """The process lives and its event loop turns."""
    return Alive()


@router.get("/readyz", responses=documented(503))
async def readyz(models: ModelsDep) -> Ready:
    """Every model is warm and has a range set, and the service is not shutting down.

    A store that is away, or has forgotten everything, does not make it unready: the last good snapshot goes on
    answering; its age is told, and what is wrong. A limit to the age can be set (`max_snapshot_age`).
    """
    checks = checks_of(models)
    problem = next((said for service in models if (said := _problem(service)) is not None), None)
    if not all(checks.values()):
        failing = ", ".join(name for name, good in checks.items() if not good)
        detail = f"not ready: {failing}" + (f" ({problem})" if problem else "")
        raise ApiError("not_ready", detail, checks=checks)
    checks["store"] = all(service.mirror.store_up for service in models)
    snapshot = models.only.mirror.snapshot if models.only else None
    return Ready(
        checks=checks,
        generation=snapshot.live.generation if snapshot else None,
        snapshot_age=round(max(service.mirror.age() for service in models), 3),
        problem=problem,
    )


def _problem(service: Service) -> str | None:
    """What is wrong with a model's live state, or its range set. Who asks may be anybody: addresses stay in the log."""
    if service.mirror.problem is not None and not service.mirror.store_up:
        return "the store cannot be reached, or refuses; the log says why"
    snapshot = service.mirror.snapshot
    if service.mirror.problem is None and snapshot is not None and snapshot.range_set is not None:
        return dtype_mismatch(snapshot.range_set.provenance, service.model.dtype)
    return service.mirror.problem


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **documented(404)})
async def metrics(request: Request, models: ModelsDep) -> Response:
    """For Prometheus, unless they have a port of their own."""
    if models.default.settings.metrics_port is not None:
        raise ApiError("not_found", "metrics have a port of their own here")
    state = request.app.state
    written = await to_thread.run_sync(generate_latest, state.registry, limiter=state.scrapes)
    return Response(written, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", dependencies=[QueryChecked], responses=documented(*QUERY))
async def list_models(models: ModelsDep, caller: CallerDep, request: Request) -> ModelsOut:
    """What is loaded, the default first. Where it lies is told to scope admin, or, without keys, on this machine."""
    listed = [_out(service, _trusted(caller, request)) for service in models]
    return ModelsOut(models=listed, data=listed)


@router.get("/v1/models/{id:whole}", dependencies=[QueryChecked], responses=documented(*QUERY))
async def show_model(models: ModelsDep, caller: CallerDep, request: Request, id: str) -> ModelOut:
    """One model that is loaded."""
    return _out(log_model(models.named(id)), _trusted(caller, request))


def _trusted(caller: Caller, request: Request) -> bool:
    local = request.client is not None and request.client.host in LOOPBACK
    return local if caller.key is None else caller.may("admin")


def _out(service: Service, trusted: bool) -> ModelOut:
    model, identity = service.model, service.model.identity
    return ModelOut(
        id=service.name,
        created=int(service.started_at),
        kind=identity.kind,
        family=identity.family,
        fingerprint=identity.fingerprint,
        revision=identity.revision,
        labels=list(identity.labels),
        layers=identity.n_layers,
        hidden_size=identity.hidden_size,
        max_tokens=model.max_tokens,
        dtype=model.dtype,
        device=model.device,
        problem_type=model.problem_type,
        template=model.template,
        split=model.splits,
        path=model.source if trusted else None,
    )
