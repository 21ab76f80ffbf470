"""What event streams report besides the live state, and which streams are open."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge

KEPT_JOBS = 32
"""Jobs that streams report: the newest."""


class ChangeFeed:
    """Range sets and jobs of one model as last seen, and the streams to wake when they change. Thread-safe.

    Args:
        max_streams: open streams; at most half of them for one key, so that no key shuts the others out.
    """

    def __init__(self, max_streams: int, registry: CollectorRegistry) -> None:
        self.max_streams = max_streams
        self.range_sets: tuple[str, ...] = ()
        """Ids of the published range sets."""
        self.jobs: Mapping[str, bytes] = {}
        """The newest jobs by id, as JSON."""
        self._lock = threading.Lock()
        self._streams: dict[asyncio.Event, tuple[asyncio.AbstractEventLoop, str | None]] = {}
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

    def set_jobs(self, jobs: Mapping[str, bytes]) -> None:
        """Set the jobs by id, oldest first, each as JSON like that of `GET /v1/jobs/{id}`."""
        newest = dict(list(jobs.items())[-KEPT_JOBS:])
        if newest != self.jobs:
            self.jobs = newest
            self.wake_streams()

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
