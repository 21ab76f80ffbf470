"""Inspection of the active range set: concepts, ranges by rank, one neuron, overlap."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated

from fastapi import Path, Query

from app.http.problems import ApiError
from app.http.responses import QUERY
from app.http.routing import Router
from app.live.store_threads import StoreThreadsDep
from app.routes.dependencies import ConceptDep, ServiceDep
from app.schemas.replies import (
    ConceptOut,
    ConceptsOut,
    NeuronOfConcept,
    NeuronOut,
    NeuronRange,
    OverlapOut,
    RangesOut,
)
from range_store.domain.erasure import Ranking
from range_store.domain.inspection import (
    NeuronStatistics,
    block_index,
    neuron_statistics,
    ranked_ranges,
    salient_overlap,
)
from range_store.domain.range_set import InspectLayer

router = Router("inspection")

Layer = Annotated[int, Query(description="Block, from 0; negative ones from the end.")]
Tau = Annotated[float, Query(ge=0, allow_inf_nan=False, description="Half-width in standard deviations.")]


@router.operation("GET", "/v1/concepts", key_scope="read", errors=(*QUERY, 503))
def list_concepts(service: ServiceDep) -> ConceptsOut:
    """Concepts of the active range set, and whether each is erased now."""
    range_set, live = service.require_range_set(), service.require_snapshot().live
    erased = {each.concept: each.enforced for each in live.active_at(service.mirror.now())}
    return ConceptsOut(
        model=service.name,
        range_set=range_set.id,
        generation=live.generation,
        concepts=[
            ConceptOut(
                concept=concept,
                texts=count,
                label=concept in service.model.identity.labels,
                erased=concept in erased,
                enforced=erased.get(concept, False),
            )
            for concept, count in range_set.provenance.corpus.counts.items()
        ],
    )


@router.operation("GET", "/v1/concepts/{concept:rest}/ranges", key_scope="read", errors=(*QUERY, 503))
def list_ranges(
    service: ServiceDep,
    concept: ConceptDep,
    layer: Layer = -1,
    ranking: Ranking = "max",
    tau: Tau = 2.5,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
) -> RangesOut:
    """A concept's neurons by rank, each with its range and its overlap with the ranges of other concepts."""
    range_set = service.require_range_set()
    block = block_index(range_set, layer)
    start = _start(cursor, range_set.id)
    found = ranked_ranges(range_set, concept, block, ranking, tau, start, limit)
    end = start + len(found)
    more = end < range_set.provenance.model.hidden_size
    return RangesOut(
        model=service.name,
        range_set=range_set.id,
        concept=concept,
        layer=block,
        ranking=ranking,
        tau=tau,
        neurons=[NeuronRange.model_validate(vars(each)) for each in found],
        next_cursor=_cursor(range_set.id, end) if more and found else None,
    )


@router.operation("GET", "/v1/neurons/{layer}/{neuron}", key_scope="read", errors=(*QUERY, 503))
async def show_neuron(
    service: ServiceDep,
    store_threads: StoreThreadsDep,
    layer: Annotated[int, Path(description="Block, from 0; negative ones from the end.")],
    neuron: int,
    tau: Tau = 2.5,
) -> NeuronOut:
    """Every concept's statistics, range and histogram of one neuron."""
    range_set = service.require_range_set()
    block = block_index(range_set, layer)
    range_set.layer(block)

    def read() -> tuple[InspectLayer, Sequence[NeuronStatistics]]:
        inspect = service.store.range_sets.read_inspect(range_set.id, block)
        return inspect, neuron_statistics(range_set, inspect, block, neuron, tau)

    inspect, found = await store_threads.run(read)
    return NeuronOut(
        model=service.name,
        range_set=range_set.id,
        layer=block,
        neuron=neuron,
        tau=tau,
        edges=inspect.edges[neuron].tolist(),
        concepts=[NeuronOfConcept.model_validate({**vars(each), "histogram": vars(each)}) for each in found],
    )


@router.operation("GET", "/v1/overlap", key_scope="read", errors=(*QUERY, 503))
def show_overlap(
    service: ServiceDep,
    layer: Layer = -1,
    top_fraction: Annotated[float, Query(gt=0, le=1)] = 0.3,
    ranking: Ranking = "max",
) -> OverlapOut:
    """Polysemanticity: the share of salient neurons that concepts have in common (paper Figure 2)."""
    range_set = service.require_range_set()
    block = block_index(range_set, layer)
    overlap = salient_overlap(range_set, block, ranking, top_fraction)
    return OverlapOut(
        model=service.name,
        range_set=range_set.id,
        layer=block,
        ranking=ranking,
        top_fraction=top_fraction,
        neurons=overlap.k,
        concepts=list(range_set.concepts),
        share=overlap.share.tolist(),
        jaccard=overlap.jaccard.tolist(),
        chance=overlap.chance,
        shared_by_all=list(overlap.shared_by_all),
    )


def _cursor(range_set: str, rank: int) -> str:
    return base64.urlsafe_b64encode(f"{range_set}:{rank}".encode()).decode().rstrip("=")


def _start(cursor: str | None, range_set: str) -> int:
    """The rank at which a page begins. A cursor of another range set is refused: it would mix two orders."""
    if cursor is None:
        return 0
    try:
        of, _, rank = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().rpartition(":")
        start = int(rank)
    except (ValueError, binascii.Error):
        raise ApiError("invalid_cursor", "cursor: expected the next_cursor of a page, unchanged") from None
    if of != range_set or start < 0:
        raise ApiError("stale_cursor", "cursor: another range set is active now; start again without a cursor")
    return start
