"""`/v1/erasures`: what is erased when a request names nothing. Every change is one generation."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response

from app.problems import documented
from app.replies import ErasureOut, LiveListOut, LiveOut
from app.requests import LiveListIn, Reason, SwitchOnIn
from app.routes import QueryChecked, Serving, check_model_name, snapshot_of
from app.wiring import Service
from range_store.errors import StaleGeneration
from range_store.live import LiveState

router = APIRouter(tags=["erasures"])
IfMatch = Annotated[str | None, Header(description="Change only if the live state is at this generation.")]
_ETAG = {"description": "The generation, quoted.", "schema": {"type": "string"}}
WITH_ETAG: dict[int | str, dict[str, Any]] = {200: {"headers": {"ETag": _ETAG}}}
CHANGES = documented(404, 409, 412) | WITH_ETAG
BY = "http"
"""Who the audit says did it, while there are no keys to tell callers apart."""


async def required_generation(service: Serving, if_match: IfMatch = None) -> str | None:
    """The generation that the caller insists on; None for any.

    Raises:
        StaleGeneration: `If-Match` names none that is current.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    named = [tag.strip().removeprefix("W/").strip('"') for tag in if_match.split(",")]
    if len(named) == 1:
        return named[0]
    current = service.store.live().generation
    if current not in named:
        raise StaleGeneration(" or ".join(named), current)
    return current


Required = Annotated[str | None, Depends(required_generation)]


@router.get("/v1/erasures", dependencies=[QueryChecked], responses=documented(404) | WITH_ETAG)
def list_erasures(service: Serving, response: Response) -> LiveListOut:
    """What is erased now, as this process applies it. The ETag is the generation."""
    return listing(service, snapshot_of(service).live, response)


@router.put("/v1/erasures", dependencies=[QueryChecked], responses=CHANGES)
def replace_erasures(service: Serving, body: LiveListIn, required: Required, response: Response) -> LiveListOut:
    """Replace all live erasures in one generation."""
    check_model_name(service, body.model)
    now = time.time()
    wanted = [each.live(each.concept, now, BY) for each in body.erasures]
    return applied(service, service.store.set_erasures(wanted, required, BY, body.reason), response)


@router.put("/v1/erasures/{concept:whole}", dependencies=[QueryChecked], responses=CHANGES)
def switch_on(
    service: Serving, concept: str, required: Required, response: Response, body: SwitchOnIn | None = None
) -> LiveListOut:
    """Erase a concept from every request that names nothing, or change how."""
    body = body or SwitchOnIn()
    check_model_name(service, body.model)
    wanted = body.live(concept, time.time(), BY)
    return applied(service, service.store.set_erasure(wanted, required), response)


@router.delete("/v1/erasures/{concept:whole}", dependencies=[QueryChecked], responses=CHANGES)
def switch_off(
    service: Serving,
    concept: str,
    required: Required,
    response: Response,
    reason: Annotated[Reason | None, Query()] = None,
) -> LiveListOut:
    """Erase a concept no more. Where it is off already, nothing changes."""
    return applied(service, service.store.remove_erasure(concept, required, BY, reason), response)


def applied(service: Service, state: LiveState, response: Response) -> LiveListOut:
    """The reply to a change: this process's next admitted request sees it."""
    service.mirror.refresh()
    return listing(service, state, response)


def listing(service: Service, state: LiveState, response: Response) -> LiveListOut:
    """The live state as a reply."""
    response.headers["ETag"] = f'"{state.generation}"'
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
            for live in state.at(time.time())
        ],
    )
