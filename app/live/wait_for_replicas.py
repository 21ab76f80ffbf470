"""`?wait=all`: a change is answered once every replica of the model follows it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request

from app.http.problems import ApiError
from app.http.responses import documented, header
from app.live.store_threads import StoreThreads
from range_store.errors import StoreUnavailable
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import ReplicaWait, Roster
from range_store.storage.store import RangeStore

FIRST_PAUSE, LAST_PAUSE = 0.004, 0.05
"""Seconds between two reads of the roster while a request waits."""
DEFAULT_WAIT_SECONDS = 5.0

WAIT_RESPONSES: dict[int | str, dict[str, Any]] = documented(504)
WAIT_RESPONSES[504] |= {"headers": header("ETag", "The generation that the change made, quoted.")}
"""The `responses` of an operation that takes `?wait=all`."""


class ReplicaWaiter:
    """Waits for replicas. Requests that wait for the same model at the same time share each read of its roster.

    Args:
        max_seconds: longest wait of a request.
    """

    def __init__(self, threads: StoreThreads, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._threads = threads
        self._reading: dict[str, asyncio.Lock] = {}
        self._next_read: dict[str, asyncio.Task[Roster | StoreUnavailable]] = {}

    async def wait(self, store: RangeStore, mirror: Mirror, generation: str, seconds: float) -> None:
        """Return when every live replica reports `generation` or a later one of its epoch.

        Args:
            mirror: of this process, whose own replica must be among those that report.

        Raises:
            ApiError: some replicas do not after `seconds` (504 `not_everywhere`, with their names).
            StoreUnavailable: the roster cannot be read.
        """
        heartbeat = mirror.heartbeat
        follow = ReplicaWait(generation, lambda: None if heartbeat is None or heartbeat.withdrawn else heartbeat.name)
        ends = time.monotonic() + seconds
        pause = FIRST_PAUSE
        roster = await self._read(store)  # however short the wait, the reply tells what a read found
        while not (isinstance(roster, Roster) and follow.done(roster)):
            try:
                async with asyncio.timeout(ends - time.monotonic()):
                    await asyncio.sleep(pause)
                    roster = await self._read(store)
            except TimeoutError:
                roster = await self._read(store)  # this process, and not the replicas, may have been paused
                break
            pause = min(1.5 * pause, LAST_PAUSE)
        if isinstance(roster, Roster) and follow.done(roster):
            return
        made = f"the change is made, as generation {generation}"
        if isinstance(roster, StoreUnavailable):
            raise StoreUnavailable(f"{made}, but the replicas that follow it cannot be read: {roster}")
        raise ApiError(
            "not_everywhere",
            f"{made}, but not in force on every replica after {seconds:g} s: {follow.why()}",
            {"ETag": f'"{generation}"'},
            generation=generation,
            missing=list(follow.missing),
        )

    async def _read(self, store: RangeStore) -> Roster | StoreUnavailable:
        """Read the roster, by a read that starts after this call."""
        if store.model not in self._next_read:
            self._next_read[store.model] = asyncio.create_task(self._read_alone(store))
        return await asyncio.shield(self._next_read[store.model])

    async def _read_alone(self, store: RangeStore) -> Roster | StoreUnavailable:
        async with self._reading.setdefault(store.model, asyncio.Lock()):
            del self._next_read[store.model]  # later callers need a read that starts later
            try:
                return await self._threads.run(store.replicas.read)
            except StoreUnavailable as error:  # returned, since all who wait may have been cancelled
                return error


WaitForReplicas = Callable[[RangeStore, Mirror, str], Awaitable[None]]
"""Waits, if the request asks for it, until every replica follows a generation."""


async def _get_wait(
    request: Request,
    wait: Annotated[
        Literal["all"] | None,
        Query(description="`all`: answer when every replica of the model follows the change; 504 names the others."),
    ] = None,
    wait_seconds: Annotated[
        float,
        Query(gt=0, allow_inf_nan=False, description="How long to wait; at most the server's own time limit."),
    ] = DEFAULT_WAIT_SECONDS,
) -> WaitForReplicas:
    waiter: ReplicaWaiter = request.app.state.replica_waiter

    async def wait_for_replicas(store: RangeStore, mirror: Mirror, generation: str) -> None:
        if wait is not None:
            await waiter.wait(store, mirror, generation, min(wait_seconds, waiter.max_seconds))

    return wait_for_replicas


WaitDep = Annotated[WaitForReplicas, Depends(_get_wait)]
