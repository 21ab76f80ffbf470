"""Requests that insist on a generation: admitted only under a snapshot that has it, or told what there is."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from range_store.errors import GenerationNotReached, RangeStoreError
from range_store.storage.mirror import Mirror, Snapshot

PATIENCE = 3.0
"""Seconds that a request waits at most for a generation that the store itself does not have yet."""
SHARE = 0.9
"""Of the time that a request has: the rest is for saying what there is."""
LAPSED_PATIENCE = 0.25
"""Seconds that a request waits for the read that a silent replica owes; then the snapshot that is held counts."""
PAUSE = 0.05
"""Seconds between two reads for one request."""
MOST_WAITING = 1000
"""Requests that may wait at once; a queue does not count them yet."""


class Following:
    """Brings a mirror's snapshot to where a request wants it. Used from event loops; reads on a thread of its own."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._reader = ThreadPoolExecutor(1, "following")  # has no thread until something is to be read
        self._lock = threading.Lock()
        self._next: Future[Snapshot] | None = None
        self._waiting = 0

    async def reach(self, wanted: str | None, timeout: float | None = None) -> None:
        """Return when the snapshot may be used for a request: when it is at generation `wanted` or later.

        Args:
            timeout: seconds that the request has.

        Raises:
            GenerationNotReached: it is not, and the store has no such generation, or could not be read in time.
        """
        if self._mirror.lapsed:
            with suppress(TimeoutError, RangeStoreError):
                async with asyncio.timeout(LAPSED_PATIENCE):
                    await self._read()
        if wanted is None or self._holds(wanted):
            return
        if self._waiting >= MOST_WAITING:
            raise self._behind(wanted, "too many requests wait for the store already")
        self._waiting += 1
        try:
            await self._wait(wanted, min(PATIENCE, SHARE * timeout) if timeout is not None else PATIENCE)
        finally:
            self._waiting -= 1

    async def _wait(self, wanted: str, patience: float) -> None:
        ends = time.monotonic() + patience
        why = "the store does not answer"
        try:
            async with asyncio.timeout(patience):
                while not self._holds(wanted):
                    try:
                        found = (await self._read()).live
                    except RangeStoreError as error:
                        why = str(error)
                    else:
                        if found.is_at_least(wanted):
                            return
                        if found.epoch != wanted.split("-")[0]:
                            raise self._behind(wanted, "the live state is of another epoch: it was created anew since")
                        why = f"the store has no later one within {patience:g} s"
                    await asyncio.sleep(min(PAUSE, max(0.0, ends - time.monotonic())))
        except TimeoutError:
            raise self._behind(wanted, why) from None

    async def _read(self) -> Snapshot:
        """A snapshot that was read after this call. Who asks while another read is under way shares the next one."""
        with self._lock:
            if self._next is None or self._next.running() or self._next.done():
                self._next = self._reader.submit(self._mirror.catch_up)
            coming = self._next
        return await asyncio.shield(asyncio.wrap_future(coming))

    def _holds(self, wanted: str) -> bool:
        snapshot = self._mirror.snapshot
        return snapshot is not None and snapshot.live.is_at_least(wanted)

    def _behind(self, wanted: str, why: str) -> GenerationNotReached:
        snapshot = self._mirror.snapshot
        return GenerationNotReached(wanted, snapshot.live.generation if snapshot else None, why)
