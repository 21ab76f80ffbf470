"""Calls to the store from routes: on threads of their own, and never more at once than a store that hangs may hold.

A Redis that hangs instead of dying keeps every call for its whole socket timeout. On the threads that all routes share,
some dozens of toggles would then hold up routes that need no store at all.
"""

from collections.abc import Callable
from typing import Annotated, TypeVar

import anyio
from anyio import to_thread
from fastapi import Depends, Request

from range_store.errors import StoreUnavailable

AT_ONCE = 16
"""Calls at once; a healthy store answers each in a millisecond."""
PATIENCE = 2.0
"""Seconds that a further call waits for its turn."""

Result = TypeVar("Result")


class StoreCalls:
    """`await calls(work)` runs `work` on a thread. One per application."""

    def __init__(self) -> None:
        self._room = anyio.CapacityLimiter(AT_ONCE)

    async def __call__(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; what has begun is waited for, since it may have changed something.

        Raises:
            StoreUnavailable: calls before it hold all threads, and go on doing so.
        """
        try:
            with anyio.fail_after(PATIENCE):
                return await to_thread.run_sync(work, limiter=self._room)
        except TimeoutError:
            raise StoreUnavailable("the store does not keep up: other calls wait for it already") from None


async def get_store_calls(request: Request) -> StoreCalls:
    """The application's calls."""
    calls: StoreCalls = request.app.state.store_calls
    return calls


StoreCalling = Annotated[StoreCalls, Depends(get_store_calls)]
