"""`/v1/replicas`: the processes that answer for a model, their generations, and where their metrics are."""

from app.http.responses import QUERY
from app.http.routing import Router
from app.live.store_threads import StoreThreadsDep
from app.routes.dependencies import ModelDep, ServiceDep
from app.schemas.replies import ReplicaOut, ReplicasOut, TargetsOut
from app.serving.metrics import TARGETS, targets_of
from range_store.domain.live import is_at_least

router = Router("service")


@router.operation("GET", "/v1/replicas", key_scope="read", errors=(*QUERY, 503))
async def list_replicas(service: ServiceDep, store_threads: StoreThreadsDep) -> ReplicasOut:
    """The live replicas of the model, as they reported; `?wait=all` on a change waits for all of them."""
    roster = await store_threads.run(service.store.replicas.read)
    generation = service.require_snapshot().live.generation
    own = service.mirror.heartbeat
    return ReplicasOut(
        model=service.name,
        generation=generation,
        replicas=[
            ReplicaOut(
                name=each.name,
                generation=each.generation,
                range_set=each.range_set,
                age=max(0.0, roster.now - each.at),
                current=each.generation is not None and is_at_least(each.generation, generation),
                this=own is not None and each.name == own.name,
            )
            for each in roster.replicas
        ],
    )


@router.operation("GET", TARGETS, key_scope="read", errors=(*QUERY, 503))
async def list_targets(selector: ModelDep, store_threads: StoreThreadsDep) -> list[TargetsOut]:
    """For Prometheus' `http_sd_configs`: the replicas of a fleet that serve metrics of their own.

    Of every model that is served here, unless `model` names one. Empty where the engine is in the server's own process.
    """
    services = list(selector.models) if selector.query_name is None else [selector.service()]
    return await store_threads.run(lambda: targets_of(services))
