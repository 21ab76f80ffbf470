"""`GET /v1/events`: server-sent events with the current state at connect, and with every change of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from app.http.responses import QUERY
from app.http.routing import Router
from app.live.event_stream import HEARTBEAT, PAUSE, RECONNECT, TICK, EventStream, event
from app.routes.dependencies import ServiceDep
from app.routes.erasures import live_list
from app.security.auth import CallerDep
from app.serving.service import Draining, Service

router = Router("service")

EXAMPLE = (
    "retry: 1000\n\n"
    'event: live\nid: 1f0c9a4e-7\ndata: {"model":"news","generation":"1f0c9a4e-7","range_set":null,"erasures":[]}\n\n'
    "event: range_sets\ndata: {}\n\n"
)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events until the client disconnects.",
        "content": {"text/event-stream": {"example": EXAMPLE}},
    }
}


@router.operation(
    "GET",
    "/v1/events",
    key_scope="read",
    errors=(*QUERY, 429, 503),
    feature="events",
    responses=STREAM,
    response_class=EventStream,
)
async def stream_events(service: ServiceDep, caller: CallerDep) -> EventStream:
    """Server-sent events of changes on this server or another one of the same store.

    `live`: the live erasures, as `GET /v1/erasures` returns them, with the generation as id; sent at connect.
    `range_sets`: read `GET /v1/range-sets` again. `jobs`: a job, as `GET /v1/jobs/{id}` returns it. Every event holds
    the newest state, so a client that reconnects needs no history and `Last-Event-ID` is ignored.
    """
    if service.engine.draining:
        raise Draining

    def may_go_on() -> bool:
        return not service.engine.draining and service.keyring.still_opens(caller.key, "read")

    return EventStream(
        service.feed, lambda woken: messages(service, woken), may_go_on, caller.key.id if caller.key else None
    )


async def messages(service: Service, woken: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield events as they become due, and a comment after every `HEARTBEAT` seconds of silence; never ends."""
    yield RECONNECT
    state = _StreamState(service)
    sent_at = time.monotonic()
    while True:
        woken.clear()
        message = state.due_events()
        if not message and time.monotonic() - sent_at >= HEARTBEAT:
            message = b": no news\n\n"
        if message:
            yield message
            sent_at = time.monotonic()
        await asyncio.sleep(PAUSE)
        try:
            async with asyncio.timeout(state.seconds_until_due()):
                await woken.wait()
        except TimeoutError:
            pass


class _StreamState:
    """What one stream has sent."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._live: tuple[str, tuple[str, ...]] | None = None
        self._range_sets: object = None
        self._jobs: Mapping[str, bytes] = {}

    def due_events(self) -> bytes:
        """Encode every event whose state differs from what was last sent."""
        service, due = self._service, []
        snapshot = service.mirror.snapshot
        if snapshot is not None:
            state = snapshot.live
            live = (state.generation, tuple(each.concept for each in state.active_at(service.mirror.now())))
            if live != self._live:
                due.append(event("live", live_list(service, state).model_dump_json().encode(), state.generation))
                self._live = live
            range_sets = (service.feed.range_sets, state.range_set)
            if range_sets != self._range_sets:
                due.append(event("range_sets", b"{}"))
                self._range_sets = range_sets
        jobs = service.feed.jobs
        due.extend(event("jobs", job) for id_, job in jobs.items() if job != self._jobs.get(id_))
        self._jobs = jobs
        return b"".join(due)

    def seconds_until_due(self) -> float:
        """Seconds until the next look unless woken: an erasure may expire, which wakes nobody while Redis is away."""
        snapshot = self._service.mirror.snapshot
        expiries = [each.expires_at for each in snapshot.live.erasures if each.expires_at] if snapshot else []
        now = self._service.mirror.now()
        return min([TICK, *(at - now for at in expiries if at > now)])
