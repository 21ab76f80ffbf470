"""Routes of the HTTP API, one module per noun, and what they share: the service and the model that is meant."""

from typing import Annotated

from fastapi import Depends, Query, Request

from app.problems import ApiError
from app.wiring import Service
from range_store.errors import NoRangeSet, StoreUnavailable
from range_store.mirror import Snapshot
from range_store.range_set import RangeSet


def get_service(request: Request) -> Service:
    """The process's service."""
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(get_service)]


def check_model_name(service: Service, model: str | None) -> None:
    """Raises ApiError (404) if a request means another model than the one that is served."""
    if model is not None and model != service.name:
        raise ApiError(404, "unknown_model", f"no such model; this server has {service.name!r}")


def _named(service: Serving, model: Annotated[str | None, Query(description="Default: the only one.")] = None) -> None:
    check_model_name(service, model)


ModelNamed = Depends(_named)


def snapshot_of(service: Service) -> Snapshot:
    """The snapshot that answers come from; raises StoreUnavailable if there never was one."""
    snapshot = service.mirror.snapshot
    if snapshot is None:
        raise StoreUnavailable("the live state was never read: the store cannot be reached")
    return snapshot


def active_range_set(service: Service) -> RangeSet:
    """The active range set; raises NoRangeSet if there is none."""
    range_set = snapshot_of(service).range_set
    if range_set is None:
        raise NoRangeSet("no range set is active: fit one with `neuronlens fit … --activate`")
    return range_set
