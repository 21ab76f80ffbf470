"""What event streams report besides the live state, and which streams are open."""

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from range_store.storage.jobs import OVER

KEPT_JOBS = 32
"""Jobs whose newest state a new stream gets."""


class ChangeFeed:
    """Range sets and jobs of one model as last seen, and the streams to wake when they change. Thread-safe.

    Args:
        max_streams: open streams; at most half of them for one key, so that no key shuts the others out.
    """

    def __init__(self, max_streams: int, registry: CollectorRegistry) -> None:
        self.max_streams = max_streams
        self.range_sets: tuple[str, ...] = ()
        """Ids of the published range sets."""
        self._lock = threading.Lock()
        self._streams: dict[asyncio.Event, tuple[asyncio.AbstractEventLoop, str | None]] = {}
        self._jobs: OrderedDict[str, tuple[int, bytes, bool]] = OrderedDict()  # number of the update, JSON, is over
        self._job_updates = 0
        gauge = Gauge("neuronlens_event_streams", "Streams of /v1/events that are open.", registry=registry)
        gauge.set_function(lambda: float(len(self._streams)))

    def wake_streams(self) -> None:
        """Have every stream compare what it last sent with the current state."""
        with self._lock:
            streams = tuple(self._streams.items())
        for woken, (loop, _) in streams:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # the loop is closed, and the stream with it
                continue

    def set_range_sets(self, ids: tuple[str, ...]) -> None:
        """Set the ids of the published range sets."""
        if ids != self.range_sets:
            self.range_sets = ids
            self.wake_streams()

    def set_job(self, job: str, state: dict[str, Any]) -> None:
        """Set the newest state of a job, as `GET /v1/jobs/{id}` returns it."""
        data = json.dumps(state, allow_nan=False).encode()
        over = state.get("state") in OVER
        with self._lock:
            if not over and job in self._jobs and self._jobs[job][2]:
                return  # an older state that arrives late
            self._job_updates += 1
            self._jobs[job] = (self._job_updates, data, over)
            self._jobs.move_to_end(job)
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
        self.wake_streams()

    def jobs_since(self, update: int) -> tuple[int, list[bytes]]:
        """Return the number of the newest update, and the jobs updated after `update`, oldest first, as JSON."""
        with self._lock:
            return self._job_updates, [data for number, data, _ in self._jobs.values() if number > update]

    @contextmanager
    def open_stream(self, key: str | None = None) -> Iterator[asyncio.Event | None]:
        """Register a stream: gives an event that is set on changes, or None if too many streams are open.

        Args:
            key: id of the caller's API key.
        """
        woken = asyncio.Event()
        with self._lock:
            free = len(self._streams) < self.max_streams
            if key is not None:
                of_key = sum(1 for _, other in self._streams.values() if other == key)
                free = free and of_key < max(1, self.max_streams // 2)
            if free:
                self._streams[woken] = asyncio.get_running_loop(), key
        try:
            yield woken if free else None
        finally:
            with self._lock:
                self._streams.pop(woken, None)
