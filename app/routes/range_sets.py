"""`/v1/range-sets`: what was fitted, and which of it is active."""

from fastapi import APIRouter, Response

from app.problems import documented
from app.replies import LiveListOut, RangeSetOut, RangeSetsOut
from app.requests import ActivateIn
from app.routes import QueryChecked, Serving, check_model_name
from app.routes.erasures import BY, CHANGES, Required, applied
from range_store.errors import UnknownRangeSet
from range_store.published import Published
from range_store.range_set import check_model

router = APIRouter(tags=["range sets"])


@router.get("/v1/range-sets", dependencies=[QueryChecked], responses=documented(404))
def list_range_sets(service: Serving) -> RangeSetsOut:
    """Every published range set of the model, newest first."""
    published = service.store.list()
    active = next((each.id for each in published if each.active), None)
    return RangeSetsOut(model=service.name, active=active, range_sets=[_out(each) for each in published])


@router.get("/v1/range-sets/{range_set}", dependencies=[QueryChecked], responses=documented(404))
def show_range_set(service: Serving, range_set: str) -> RangeSetOut:
    """Where a range set comes from: model, corpus, settings, versions."""
    for each in service.store.list():
        if each.id == range_set:
            return _out(each)
    raise UnknownRangeSet(range_set)


@router.put("/v1/range-sets/active", dependencies=[QueryChecked], responses=CHANGES)
def activate(service: Serving, body: ActivateIn, required: Required, response: Response) -> LiveListOut:
    """Make a range set the one that erasures are resolved on, or go back to an older one."""
    check_model_name(service, body.model)
    check_model(service.store.provenance(body.id), service.model.identity.fingerprint)
    state = service.store.activate(body.id, body.force, required, BY, body.reason)
    return applied(service, state, response)


def _out(each: Published) -> RangeSetOut:
    return RangeSetOut(
        id=each.id,
        published_at=each.published_at,
        active=each.active,
        provenance=each.provenance.model_dump(mode="json"),
    )
