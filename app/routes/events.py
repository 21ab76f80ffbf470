"""`GET /v1/events`: server-sent events of what changes, at connect and from then on."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter

from app.http.problems import QUERY, documented
from app.live.event_stream import HEARTBEAT, PAUSE, RECONNECT, TICK, EventStream, event
from app.routes import QueryChecked, Serving
from app.routes.erasures import live_list
from app.security.auth import Calling
from app.serving.service import Draining, Service
from range_store.domain.live import LiveState

router = APIRouter(tags=["service"])

EXAMPLE = (
    "retry: 1000\n\n"
    'event: live\nid: 1f0c9a4e-7\ndata: {"model":"news","generation":"1f0c9a4e-7","range_set":null,"erasures":[]}\n\n'
    "event: range_sets\ndata: {}\n\n"
)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events, until somebody hangs up.", "content": {"text/event-stream": {"example": EXAMPLE}}}
}


@router.get(
    "/v1/events",
    dependencies=[QueryChecked],
    response_class=EventStream,
    responses=STREAM | documented(*QUERY, 429, 503),
)
async def stream_events(service: Serving, caller: Calling) -> EventStream:
    """Server-sent events of what changes, on this server or another one of the same store.

    `live`: what is erased now, as `GET /v1/erasures` gives it, with the generation as id; first at connect.
    `range_sets`: read `GET /v1/range-sets` again. `jobs`: a job, as `GET /v1/jobs/{id}` gives it. Every event is the
    newest state, so a client that was away has missed nothing that still matters; `Last-Event-ID` is not needed.
    """
    if service.engine.draining:
        raise Draining

    def may_go_on() -> bool:
        return not service.engine.draining and service.keyring.still_opens(caller.key, "read")

    return EventStream(
        service.news, lambda woken: messages(service, woken), may_go_on, caller.key.id if caller.key else None
    )


async def messages(service: Service, woken: asyncio.Event) -> AsyncIterator[bytes]:
    """Events as they come, and comments while none does; ends only where it is left."""
    yield RECONNECT
    told = _Told(service)
    spoken = time.monotonic()
    while True:
        woken.clear()
        news = told.what_is_new()
        if not news and time.monotonic() - spoken >= HEARTBEAT:
            news = b": no news\n\n"
        if news:
            yield news
            spoken = time.monotonic()
        await asyncio.sleep(PAUSE)
        try:
            async with asyncio.timeout(told.seconds_until_due()):
                await woken.wait()
        except TimeoutError:
            pass


class _Told:
    """What one stream has told."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._live: tuple[str, tuple[str, ...]] | None = None
        self._range_sets: object = None
        self._jobs = 0

    def what_is_new(self) -> bytes:
        """Every event that is due now."""
        service, due = self._service, []
        snapshot = service.mirror.snapshot
        if snapshot is not None:
            state = snapshot.live
            live = (state.generation, tuple(each.concept for each in state.at(service.mirror.now())))
            if live != self._live:
                due.append(self._live_event(state))
                self._live = live
            range_sets = (service.news.range_sets, state.range_set)
            if range_sets != self._range_sets:
                due.append(event("range_sets", b"{}"))
                self._range_sets = range_sets
        self._jobs, jobs = service.news.jobs_since(self._jobs)
        due.extend(event("jobs", job) for job in jobs)
        return b"".join(due)

    def seconds_until_due(self) -> float:
        """When to look again unless woken: an erasure may expire, and nobody tells while the store is away."""
        snapshot = self._service.mirror.snapshot
        expiries = [each.expires_at for each in snapshot.live.erasures if each.expires_at] if snapshot else []
        now = self._service.mirror.now()
        return min([TICK, *(at - now for at in expiries if at > now)])

    def _live_event(self, state: LiveState) -> bytes:
        return event("live", live_list(self._service, state).model_dump_json().encode(), state.generation)
