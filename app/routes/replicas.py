"""`/v1/replicas`: which processes answer for the model, and under which generation."""

from fastapi import APIRouter

from app.problems import QUERY, documented
from app.replies import ReplicaOut, ReplicasOut
from app.routes import QueryChecked, Serving, snapshot_of
from app.store_calls import StoreCalling
from range_store.live import reaches

router = APIRouter(tags=["service"])


@router.get("/v1/replicas", dependencies=[QueryChecked], responses=documented(*QUERY, 503))
async def list_replicas(service: Serving, calls: StoreCalling) -> ReplicasOut:
    """The live replicas of the model, as they reported; `?wait=all` on a change waits for all of them."""
    roster = await calls(service.store.replicas.read)
    generation = snapshot_of(service).live.generation
    own = service.mirror.reporter
    return ReplicasOut(
        model=service.name,
        generation=generation,
        replicas=[
            ReplicaOut(
                name=each.name,
                generation=each.generation,
                range_set=each.range_set,
                age=max(0.0, roster.now - each.at),
                current=each.generation is not None and reaches(each.generation, generation),
                this=own is not None and each.name == own.name,
            )
            for each in roster.replicas
        ],
    )
