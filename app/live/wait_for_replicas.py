"""`?wait=all`: a change is answered when every replica of the model follows it, or has been waited for."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request

from app.http.problems import ApiError, documented, header
from app.live.store_calls import StoreCalls
from app.serving.service import Service
from range_store.errors import StoreUnavailable
from range_store.storage.replicas import Follow, Roster

FIRST_PAUSE, LAST_PAUSE = 0.004, 0.05
"""Seconds between two looks at who follows, for one who waits."""
WAIT_SECONDS = 5.0
"""How long a change waits unless it says so."""

NOT_EVERYWHERE: dict[int | str, dict[str, Any]] = documented(504)
NOT_EVERYWHERE[504] |= {"headers": header("ETag", "The generation that the change made, quoted.")}
"""The `responses` of an operation that may be waited for."""


class Everywhere:
    """Waits for replicas. One per application; those who wait for a model at a time share each look at it."""

    def __init__(self, calls: StoreCalls) -> None:
        self._calls = calls
        self._looking: dict[str, asyncio.Lock] = {}
        self._next: dict[str, asyncio.Task[Roster | StoreUnavailable]] = {}

    async def reached(self, service: Service, generation: str, seconds: float) -> None:
        """Return when every live replica reports `generation` or a later one of its epoch.

        Raises:
            ApiError: some do not after `seconds` (504 `not_everywhere`, which names them).
            StoreUnavailable: the store does not say who does.
        """
        reporter = service.mirror.reporter
        follow = Follow(generation, lambda: None if reporter is None or reporter.withdrawn else reporter.name)
        ends = time.monotonic() + seconds
        pause = FIRST_PAUSE
        seen = await self._look(service)  # however short the wait: what it tells is what is answered
        while not (isinstance(seen, Roster) and follow.done(seen)):
            try:
                async with asyncio.timeout(ends - time.monotonic()):
                    await asyncio.sleep(pause)
                    seen = await self._look(service)
            except TimeoutError:
                seen = await self._look(service)  # it may be this process that stood still, and not they
                break
            pause = min(1.5 * pause, LAST_PAUSE)
        if isinstance(seen, Roster) and follow.done(seen):
            return
        made = f"the change is made, as generation {generation}"
        if isinstance(seen, StoreUnavailable):
            raise StoreUnavailable(f"{made}, but the store does not say who follows it: {seen}")
        raise ApiError(
            504,
            "not_everywhere",
            f"{made}, but not in force everywhere after {seconds:g} s: {follow.why()}",
            {"ETag": f'"{generation}"'},
            generation=generation,
            missing=list(follow.missing),
        )

    async def _look(self, service: Service) -> Roster | StoreUnavailable:
        """The roster as it was after this call began."""
        if service.name not in self._next:
            self._next[service.name] = asyncio.create_task(self._read(service))
        return await asyncio.shield(self._next[service.name])

    async def _read(self, service: Service) -> Roster | StoreUnavailable:
        async with self._looking.setdefault(service.name, asyncio.Lock()):
            del self._next[service.name]  # who asks from now on must have a look that begins later
            try:
                return await self._calls(service.store.replicas.read)
            except StoreUnavailable as error:  # not raised: those who asked may have gone
                return error


Until = Callable[[Service, str], Awaitable[None]]


async def _waiting(
    request: Request,
    wait: Annotated[
        Literal["all"] | None,
        Query(description="`all`: answer when every replica of the model follows the change; 504 names who does not."),
    ] = None,
    wait_seconds: Annotated[
        float,
        Query(gt=0, allow_inf_nan=False, description="How long to wait; no longer than the server's own time limit."),
    ] = WAIT_SECONDS,
) -> Until:
    everywhere: Everywhere = request.app.state.everywhere

    async def until(service: Service, generation: str) -> None:
        if wait is not None:
            await everywhere.reached(service, generation, min(wait_seconds, service.settings.request_timeout))

    return until


Waiting = Annotated[Until, Depends(_waiting)]
"""Waits, where the caller asks for it, until a generation is in force everywhere."""
