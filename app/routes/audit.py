"""`/v1/audit`: who changed what is live, and when."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.http.problems import QUERY, documented
from app.live.store_threads import StoreThreadsDep
from app.routes.dependencies import QueryChecked, ServiceDep
from app.schemas.replies import AuditEntryOut, AuditOut

router = APIRouter(tags=["erasures"])

Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries.")]


@router.get("/v1/audit", dependencies=[QueryChecked], responses=documented(*QUERY, 503))
async def list_audit(service: ServiceDep, store_threads: StoreThreadsDep, limit: Limit = 100) -> AuditOut:
    """The last changes of the live state, newest first."""
    entries = await store_threads.run(lambda: service.store.audit(limit))
    return AuditOut(
        model=service.name, entries=[AuditEntryOut.model_validate(each.model_dump(mode="json")) for each in entries]
    )
