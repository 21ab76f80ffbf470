"""Probes, metrics, and what is loaded."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.auth import Calling
from app.problems import QUERY, ApiError, documented
from app.readiness import conditions
from app.replies import Alive, ModelOut, ModelsOut, Ready
from app.routes import QueryChecked, Serving
from app.settings import LOOPBACK

router = APIRouter(tags=["service"])


@router.get("/livez")
async def livez() -> Alive:
    """The process lives and its event loop turns."""
    return Alive()


@router.get("/readyz", responses=documented(503))
async def readyz(service: Serving) -> Ready:
    """The model is warm, a range set is loaded, and the service is not shutting down.

    A store that is away, or has forgotten everything, does not make it unready: the last good snapshot goes on
    answering; its age is told, and what is wrong. A limit to the age can be set (`max_snapshot_age`).
    """
    mirror = service.mirror
    snapshot, checks = mirror.snapshot, conditions(service)
    problem = mirror.problem
    if problem is not None and not mirror.store_up:  # who asks may be anybody: addresses stay in the log
        problem = "the store cannot be reached, or refuses; the log says why"
    if snapshot is None or not all(checks.values()):
        failing = ", ".join(name for name, good in checks.items() if not good)
        detail = f"not ready: {failing}" + (f" ({problem})" if problem else "")
        raise ApiError(503, "not_ready", detail, checks=checks)
    checks["store"] = mirror.store_up
    return Ready(
        checks=checks, generation=snapshot.live.generation, snapshot_age=round(mirror.age(), 3), problem=problem
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **documented(404)})
async def metrics(service: Serving) -> Response:
    """For Prometheus, unless they have a port of their own."""
    if service.settings.metrics_port is not None:
        raise ApiError(404, "not_found", "metrics have a port of their own here")
    return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", dependencies=[QueryChecked], responses=documented(*QUERY))
async def list_models(service: Serving, caller: Calling, request: Request) -> ModelsOut:
    """What is loaded. Where the checkpoint lies is told to scope admin, or, without keys, on this machine."""
    model, identity = service.model, service.model.identity
    local = request.client is not None and request.client.host in LOOPBACK
    trusted = local if caller.key is None else caller.may("admin")
    return ModelsOut(
        models=[
            ModelOut(
                id=service.name,
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
        ]
    )
