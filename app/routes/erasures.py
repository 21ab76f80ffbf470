"""`/v1/erasures`: the live erasures, which apply to requests that name none. Every change is one generation."""

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response

from app.http.responses import BODY, QUERY, header
from app.http.routing import Router
from app.live.store_threads import StoreThreads, StoreThreadsDep
from app.live.wait_for_replicas import WAIT_RESPONSES, WaitDep, WaitForReplicas
from app.observability.logs import note
from app.routes.dependencies import ConceptDep, ModelDep, ServiceDep
from app.schemas.replies import ErasureOut, LiveListOut, LiveOut
from app.schemas.requests import LiveListIn, Reason, SwitchOnIn
from app.security.auth import CallerDep
from app.serving.service import Service
from range_store.domain.live import LiveState
from range_store.errors import RangeStoreError, StaleGeneration, StoreUnavailable
from range_store.storage.store import RangeStore

router = Router("erasures")
IfMatch = Annotated[str | None, Header(description="Change only if the live state is at this generation.")]
WITH_ETAG: dict[int | str, dict[str, Any]] = {200: {"headers": header("ETag", "The generation, quoted.")}}
CHANGE_ERRORS = (*QUERY, 409, 412, 503)
CHANGE_RESPONSES = WAIT_RESPONSES | WITH_ETAG


async def named_generations(if_match: IfMatch = None) -> tuple[str, ...]:
    """The generations that the client accepts; empty: any. A weak tag is kept as it is, and matches none."""
    if if_match is None or if_match.strip() == "*":
        return ()
    tags = (tag.strip() for tag in if_match.split(","))
    return tuple(tag if tag.startswith("W/") else tag.strip('"') for tag in tags)


IfMatchDep = Annotated[tuple[str, ...], Depends(named_generations)]


async def change_id(request: Request, caller: CallerDep) -> str:
    """Identifies a change: the same id if a client repeats its request, and a different one for every other change."""
    identity = (
        request.state.request_id,  # made here for each request, unless the client names its own
        caller.by,
        request.method,
        request.url.path,
        request.url.query,
        request.headers.get("if-match"),
    )
    return hashlib.sha256(json.dumps(identity).encode() + await request.body()).hexdigest()[:32]


ChangeIdDep = Annotated[str, Depends(change_id)]


def expected_generation(store: RangeStore, named: tuple[str, ...]) -> str | None:
    """The generation that a change requires; None: any.

    Raises:
        StaleGeneration: none of the named generations is current.
    """
    if len(named) <= 1:
        return named[0] if named else None
    current = store.live_state().generation
    if current not in named:
        raise StaleGeneration(" or ".join(named), current)
    return current


@router.operation("GET", "/v1/erasures", key_scope="read", errors=(*QUERY, 503), responses=WITH_ETAG)
async def list_erasures(service: ServiceDep, response: Response) -> LiveListOut:
    """The live erasures, as this process applies them. The ETag is the generation."""
    return listing(service, service.require_snapshot().live, response)


@router.operation("PUT", "/v1/erasures", key_scope="admin", errors=(*CHANGE_ERRORS, *BODY), responses=CHANGE_RESPONSES)
async def replace_erasures(
    selector: ModelDep,
    store_threads: StoreThreadsDep,
    caller: CallerDep,
    body: LiveListIn,
    required: IfMatchDep,
    change_id: ChangeIdDep,
    wait_for_replicas: WaitDep,
    response: Response,
) -> LiveListOut:
    """Replace all live erasures in one generation."""
    service = selector.service(body.model)
    now = service.mirror.now()
    wanted = [each.live(each.concept, now, caller.by) for each in body.erasures]

    def change(store: RangeStore) -> LiveState:
        return store.set_erasures(wanted, expected_generation(store, required), caller.by, body.reason, change_id)

    return await apply_change(service, store_threads, change, change_id, wait_for_replicas, response)


@router.operation(
    "PUT", "/v1/erasures/{concept:rest}", key_scope="admin", errors=(*CHANGE_ERRORS, *BODY), responses=CHANGE_RESPONSES
)
async def switch_on(
    selector: ModelDep,
    store_threads: StoreThreadsDep,
    caller: CallerDep,
    concept: ConceptDep,
    required: IfMatchDep,
    change_id: ChangeIdDep,
    wait_for_replicas: WaitDep,
    response: Response,
    body: SwitchOnIn | None = None,
) -> LiveListOut:
    """Erase a concept from every request that names no erasures, or change how."""
    body = body or SwitchOnIn()
    service = selector.service(body.model)
    wanted = body.live(concept, service.mirror.now(), caller.by)

    def change(store: RangeStore) -> LiveState:
        return store.set_erasure(wanted, expected_generation(store, required), change_id)

    return await apply_change(service, store_threads, change, change_id, wait_for_replicas, response)


@router.operation(
    "DELETE", "/v1/erasures/{concept:rest}", key_scope="admin", errors=CHANGE_ERRORS, responses=CHANGE_RESPONSES
)
async def switch_off(
    service: ServiceDep,
    store_threads: StoreThreadsDep,
    caller: CallerDep,
    concept: ConceptDep,
    required: IfMatchDep,
    change_id: ChangeIdDep,
    wait_for_replicas: WaitDep,
    response: Response,
    reason: Annotated[Reason | None, Query()] = None,
) -> LiveListOut:
    """Stop erasing a concept. If it is off already, nothing changes."""

    def change(store: RangeStore) -> LiveState:
        return store.remove_erasure(concept, expected_generation(store, required), caller.by, reason, change_id)

    return await apply_change(service, store_threads, change, change_id, wait_for_replicas, response)


async def apply_change(
    service: Service,
    store_threads: StoreThreads,
    change: Callable[[RangeStore], LiveState],
    change_id: str,
    wait_for_replicas: WaitForReplicas,
    response: Response,
) -> LiveListOut:
    """Change the live state and reply with it. The next request that this process admits follows the change.

    A client that lost the reply may repeat the request; if the change was made by then, the reply says so, instead of
    refusing it as stale.

    Raises:
        ApiError: the change was made, but not all replicas follow it in time (504).
        StoreUnavailable: the change was not made; or it was, as the message then says, but this process cannot follow.
        RangeStoreError: the change was not made.
    """

    def work() -> LiveState:
        try:
            state = change(service.store)
        except StaleGeneration:
            if not service.store.has_change_for(change_id):
                raise
            state = service.store.live_state()
        note(generation=state.generation)
        try:
            service.mirror.refresh()
        except RangeStoreError as error:
            raise StoreUnavailable(
                f"the change is made, as generation {state.generation}, but this process cannot follow it yet: {error}"
            ) from error
        return state

    state = await store_threads.run(work)
    await wait_for_replicas(service.store, service.mirror, state.generation)
    return listing(service, state, response)


def listing(service: Service, state: LiveState, response: Response) -> LiveListOut:
    """The live state as a reply."""
    response.headers["ETag"] = f'"{state.generation}"'
    return live_list(service, state)


def live_list(service: Service, state: LiveState) -> LiveListOut:
    """The live state, without what has expired."""
    n_layers = service.model.identity.n_layers
    return LiveListOut(
        model=service.name,
        generation=state.generation,
        range_set=state.range_set,
        erasures=[
            LiveOut(
                **ErasureOut.values(live.erasure, n_layers),
                enforced=live.enforced,
                reason=live.reason,
                expires_at=live.expires_at,
                since=live.since,
                by=live.by,
            )
            for live in state.active_at(service.mirror.now())
        ],
    )
