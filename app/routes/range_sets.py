"""`/v1/range-sets`: what was fitted, and which of it is active."""

from fastapi import APIRouter, Response
from starlette.convertors import StringConvertor, register_url_convertor

from app.http.problems import BODY, QUERY, documented
from app.live.store_threads import StoreThreadsDep
from app.live.wait_for_replicas import WaitDep
from app.routes.dependencies import ModelDep, QueryChecked, ServiceDep
from app.routes.erasures import CHANGES, ChangeId, Required, applied, one_of
from app.schemas.replies import LiveListOut, RangeSetOut, RangeSetsOut
from app.schemas.requests import ActivateIn
from app.security.auth import CallerDep
from range_store.domain.live import LiveState
from range_store.domain.range_set import check_dtype, check_model
from range_store.errors import UnknownRangeSet
from range_store.storage.range_sets import PublishedRangeSet
from range_store.storage.store import RangeStore

router = APIRouter(tags=["range sets"])


class _Named(StringConvertor):
    """A path segment other than `active`, which is no id of a range set but a path of its own."""

    regex = "(?!active$)[^/]+"


register_url_convertor("named", _Named())


@router.get("/v1/range-sets", dependencies=[QueryChecked], responses=documented(*QUERY, 503))
async def list_range_sets(service: ServiceDep, store_threads: StoreThreadsDep) -> RangeSetsOut:
    """Every published range set of the model, newest first."""
    published = await store_threads.run(service.store.list)
    active = next((each.id for each in published if each.active), None)
    return RangeSetsOut(model=service.name, active=active, range_sets=[_out(each) for each in published])


@router.get("/v1/range-sets/{range_set:named}", dependencies=[QueryChecked], responses=documented(*QUERY, 503))
async def show_range_set(service: ServiceDep, store_threads: StoreThreadsDep, range_set: str) -> RangeSetOut:
    """Where a range set comes from: model, corpus, settings, versions."""
    for each in await store_threads.run(service.store.list):
        if each.id == range_set:
            return _out(each)
    raise UnknownRangeSet(range_set)


@router.put("/v1/range-sets/active", dependencies=[QueryChecked], responses=CHANGES | documented(*BODY))
async def activate(
    selector: ModelDep,
    store_threads: StoreThreadsDep,
    caller: CallerDep,
    body: ActivateIn,
    required: Required,
    change_id: ChangeId,
    wait_for_replicas: WaitDep,
    response: Response,
) -> LiveListOut:
    """Make a range set the one that erasures are resolved on, or go back to an older one."""
    service = selector.service(body.model)

    def change(store: RangeStore) -> LiveState:
        provenance = store.provenance(body.id)
        check_model(provenance, service.model.identity.fingerprint, service.model.earlier_fingerprint)
        if not body.force:
            check_dtype(provenance, (service.model.dtype,))
        return store.activate(body.id, body.force, one_of(store, required), caller.by, body.reason, change_id)

    return await applied(service, store_threads, change, change_id, wait_for_replicas, response)


def _out(each: PublishedRangeSet) -> RangeSetOut:
    return RangeSetOut(
        id=each.id,
        published_at=each.published_at,
        active=each.active,
        provenance=each.provenance.model_dump(mode="json"),
    )
