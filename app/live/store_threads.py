"""Runs the store calls of routes on threads of their own, with a bound on how many run at once.

A Redis that hangs blocks every call for the whole socket timeout. On the threads that all routes share, a few dozen
such calls would also block routes that need no store.
"""

from collections.abc import Callable
from typing import Annotated, TypeVar

import anyio
from anyio import to_thread
from fastapi import Depends, Request

from range_store.errors import StoreUnavailable

MAX_THREADS = 16
"""Store calls that run at once; a healthy store answers each in a millisecond."""
PATIENCE = 2.0
"""Seconds that a call waits for a free thread."""

Result = TypeVar("Result")


class StoreThreads:
    """A bounded set of threads for store calls. One per application."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(MAX_THREADS)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` on a thread and return its result. Once begun it is not cancelled: it may change something.

        Raises:
            StoreUnavailable: no thread became free in time.
        """
        try:
            with anyio.fail_after(PATIENCE):
                return await to_thread.run_sync(work, limiter=self._limiter)
        except TimeoutError:
            raise StoreUnavailable("the store is too slow: earlier calls still wait for it; try again later") from None


async def get_store_threads(request: Request) -> StoreThreads:
    """Return the application's store threads."""
    threads: StoreThreads = request.app.state.store_threads
    return threads


StoreThreadsDep = Annotated[StoreThreads, Depends(get_store_threads)]
