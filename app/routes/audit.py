"""`/v1/audit`: who changed the live state, and when."""

from typing import Annotated

from fastapi import Query

from app.http.responses import QUERY
from app.http.routing import Router
from app.live.store_threads import StoreThreadsDep
from app.routes.dependencies import ServiceDep
from app.schemas.replies import AuditEntryOut, AuditOut

router = Router("erasures")

Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries.")]


@router.operation("GET", "/v1/audit", key_scope="admin", errors=(*QUERY, 503))
async def list_audit(service: ServiceDep, store_threads: StoreThreadsDep, limit: Limit = 100) -> AuditOut:
    """The last changes of the live state, newest first."""
    entries = await store_threads.run(lambda: service.store.audit(limit))
    return AuditOut(
        model=service.name, entries=[AuditEntryOut.model_validate(each.model_dump(mode="json")) for each in entries]
    )
