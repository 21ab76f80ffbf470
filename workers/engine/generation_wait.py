"""Waiting until a mirror's snapshot has reached the generation that a request names."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from range_store.errors import GenerationNotReached, RangeStoreError
from range_store.storage.mirror import Mirror, Snapshot

MAX_SECONDS = 3.0
"""Most seconds that a request waits for a generation that the store itself does not have yet."""
SHARE_OF_TIMEOUT = 0.9
"""Most of a request's time that it waits; the rest is for the reply."""
LAPSED_SECONDS = 0.25
"""Most seconds that a request waits for the read that a silent replica owes; then the snapshot at hand counts."""
PAUSE = 0.05
"""Seconds between two reads for one request."""
MAX_WAITING = 1000
"""Most requests that wait at once; the engine's queue does not count them yet."""


class GenerationWait:
    """Brings a mirror's snapshot to a generation. Used from event loops; reads on a thread of its own."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._reader = ThreadPoolExecutor(1, "generation-wait")  # starts its thread on the first read
        self._lock = threading.Lock()
        self._next_read: Future[Snapshot] | None = None
        self.waiting = 0
        """Requests that wait now."""

    async def reach(self, wanted: str | None, timeout: float | None = None) -> None:
        """Return when the snapshot may be used for a request: when it is at generation `wanted` or later.

        Args:
            timeout: seconds that the request has.

        Raises:
            GenerationNotReached: it is not, and the store has no such generation, or could not be read in time.
        """
        if self._mirror.lapsed:
            with suppress(TimeoutError, RangeStoreError):
                async with asyncio.timeout(LAPSED_SECONDS):
                    await self._read()
        if wanted is None or self._reached(wanted):
            return
        if self.waiting >= MAX_WAITING:
            raise self._behind(wanted, "too many requests wait for the store already")
        self.waiting += 1
        try:
            await self._wait(wanted, MAX_SECONDS if timeout is None else min(MAX_SECONDS, SHARE_OF_TIMEOUT * timeout))
        finally:
            self.waiting -= 1

    async def _wait(self, wanted: str, seconds: float) -> None:
        ends = time.monotonic() + seconds
        reason = "the store does not answer"
        try:
            async with asyncio.timeout(seconds):
                while not self._reached(wanted):
                    try:
                        live = (await self._read()).live
                    except RangeStoreError as error:
                        reason = str(error)
                    else:
                        if live.is_at_least(wanted):
                            return
                        if live.epoch != wanted.split("-")[0]:
                            raise self._behind(wanted, "the live state was created anew since, in another epoch")
                        reason = f"the store has no later one within {seconds:g} s"
                    await asyncio.sleep(min(PAUSE, max(0.0, ends - time.monotonic())))
        except TimeoutError:
            raise self._behind(wanted, reason) from None

    async def _read(self) -> Snapshot:
        """A snapshot that was read after this call. Callers during a read share the next one."""
        with self._lock:
            if self._next_read is None or self._next_read.running() or self._next_read.done():
                self._next_read = self._reader.submit(self._mirror.catch_up)
            read = self._next_read
        return await asyncio.shield(asyncio.wrap_future(read))

    def _reached(self, wanted: str) -> bool:
        snapshot = self._mirror.snapshot
        return snapshot is not None and snapshot.live.is_at_least(wanted)

    def _behind(self, wanted: str, reason: str) -> GenerationNotReached:
        snapshot = self._mirror.snapshot
        return GenerationNotReached(wanted, snapshot.live.generation if snapshot else None, reason)
