"""`/v1/range-sets`: the published range sets, and which one is active."""

from fastapi import Response
from starlette.convertors import StringConvertor, register_url_convertor

from app.http.responses import BODY, QUERY
from app.http.routing import Router
from app.live.store_threads import StoreThreadsDep
from app.live.wait_for_replicas import WaitDep
from app.routes.dependencies import ModelDep, ServiceDep
from app.routes.erasures import (
    CHANGE_ERRORS,
    CHANGE_RESPONSES,
    ChangeIdDep,
    IfMatchDep,
    apply_change,
    expected_generation,
)
from app.schemas.replies import LiveListOut, RangeSetOut, RangeSetsOut
from app.schemas.requests import ActivateIn
from app.security.auth import CallerDep
from range_store.domain.live import LiveState
from range_store.domain.range_set import check_dtype, check_model
from range_store.errors import UnknownRangeSet
from range_store.storage.range_sets import PublishedRangeSet
from range_store.storage.store import RangeStore

router = Router("range sets")


class _RangeSetId(StringConvertor):
    """A path segment other than `active`, which is a path of its own and not an id."""

    regex = "(?!active$)[^/]+"


register_url_convertor("range_set_id", _RangeSetId())


@router.operation("GET", "/v1/range-sets", key_scope="read", errors=(*QUERY, 503))
async def list_range_sets(service: ServiceDep, store_threads: StoreThreadsDep) -> RangeSetsOut:
    """Every published range set of the model, newest first."""
    published = await store_threads.run(service.store.range_sets.list)
    active = next((each.id for each in published if each.active), None)
    return RangeSetsOut(model=service.name, active=active, range_sets=[_out(each) for each in published])


@router.operation("GET", "/v1/range-sets/{range_set:range_set_id}", key_scope="read", errors=(*QUERY, 503))
async def show_range_set(service: ServiceDep, store_threads: StoreThreadsDep, range_set: str) -> RangeSetOut:
    """The provenance of a range set: model, corpus, settings, versions."""
    for each in await store_threads.run(service.store.range_sets.list):
        if each.id == range_set:
            return _out(each)
    raise UnknownRangeSet(range_set)


@router.operation(
    "PUT", "/v1/range-sets/active", key_scope="admin", errors=(*CHANGE_ERRORS, *BODY), responses=CHANGE_RESPONSES
)
async def activate(
    selector: ModelDep,
    store_threads: StoreThreadsDep,
    caller: CallerDep,
    body: ActivateIn,
    required: IfMatchDep,
    change_id: ChangeIdDep,
    wait_for_replicas: WaitDep,
    response: Response,
) -> LiveListOut:
    """Activate a range set: erasures are resolved on it. An older one may be activated again."""
    service = selector.service(body.model)

    def change(store: RangeStore) -> LiveState:
        provenance = store.range_sets.provenance(body.id)
        check_model(provenance, service.model.identity.fingerprint, service.model.earlier_fingerprint)
        if not body.force:
            check_dtype(provenance, (service.model.dtype,))
        return store.activate(
            body.id, body.force, expected_generation(store, required), caller.by, body.reason, change_id
        )

    return await apply_change(service, store_threads, change, change_id, wait_for_replicas, response)


def _out(each: PublishedRangeSet) -> RangeSetOut:
    return RangeSetOut(
        id=each.id,
        published_at=each.published_at,
        active=each.active,
        provenance=each.provenance.model_dump(mode="json"),
    )
