"""Probes, metrics, and the models that are loaded."""

from anyio import to_thread
from fastapi import Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.http.problems import ApiError
from app.http.responses import QUERY
from app.http.routing import Router
from app.routes.dependencies import ModelsDep, log_model, select_model
from app.schemas.replies import Alive, ModelOut, ModelsOut, Ready
from app.security.auth import Caller, CallerDep
from app.serving.service import Service, conditions_of_all
from app.settings import LOOPBACK
from range_store.domain.range_set import dtype_mismatch

router = Router("service")


@router.operation("GET", "/livez", key_scope=None, traced=False, strict_query=False)
async def livez() -> Alive:
    """The process is alive and its event loop runs."""
    return Alive()


@router.operation("GET", "/readyz", key_scope=None, traced=False, strict_query=False, errors=(503,))
async def readyz(models: ModelsDep) -> Ready:
    """Every model is warm and has a range set, and the service is not shutting down.

    An unreachable or emptied store does not make it unready: the last good snapshot goes on answering, and the reply
    has its age and the problem. `max_snapshot_age` limits the age.
    """
    checks = conditions_of_all(models)
    problem = next((each for service in models if (each := _problem(service)) is not None), None)
    if not all(checks.values()):
        failing = ", ".join(name for name, holds in checks.items() if not holds)
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
    """The problem of a model's live state or range set. Addresses stay in the log, since anyone may probe."""
    if service.mirror.problem is not None and not service.mirror.store_up:
        return "the store cannot be reached, or refuses; the log has the reason"
    snapshot = service.mirror.snapshot
    if service.mirror.problem is None and snapshot is not None and snapshot.range_set is not None:
        return dtype_mismatch(snapshot.range_set.provenance, service.model.dtype)
    return service.mirror.problem


@router.operation(
    "GET",
    "/metrics",
    key_scope=None,
    errors=(404,),
    traced=False,
    strict_query=False,
    responses={200: {"content": {"text/plain": {}}}},
    response_class=Response,
)
async def metrics(request: Request, models: ModelsDep) -> Response:
    """Metrics for Prometheus, unless they have a port of their own."""
    if models.default.settings.metrics_port is not None:
        raise ApiError("not_found", "metrics have a port of their own here")
    state = request.app.state
    text = await to_thread.run_sync(generate_latest, state.registry, limiter=state.scrapes)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.operation("GET", "/v1/models", key_scope="read", errors=QUERY, dependencies=[Depends(select_model)])
async def list_models(models: ModelsDep, caller: CallerDep, request: Request) -> ModelsOut:
    """The loaded models, the default first. `path` is for scope admin or, without keys, for this machine only."""
    listed = [_out(service, _trusted(caller, request)) for service in models]
    return ModelsOut(models=listed, data=listed)


@router.operation("GET", "/v1/models/{id:rest}", key_scope="read", errors=QUERY, dependencies=[Depends(select_model)])
async def show_model(models: ModelsDep, caller: CallerDep, request: Request, id: str) -> ModelOut:
    """One loaded model."""
    return _out(log_model(models.find(id)), _trusted(caller, request))


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
