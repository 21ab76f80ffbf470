"""What is new besides the live state, and who waits for it: told from any thread, followed on event loops."""

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from app.jobs.records import OVER

KEPT_JOBS = 32
"""Jobs whose newest state is told to who connects."""


class News:
    """What streams of one model tell of besides the live state, and who waits for it. Told from any thread.

    Args:
        most: streams at once; half of them of one key, so that no key shuts the others out.
    """

    def __init__(self, most: int, registry: CollectorRegistry) -> None:
        self.most = most
        self.range_sets: tuple[str, ...] = ()
        """Ids of the published range sets, as last seen."""
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Event, tuple[asyncio.AbstractEventLoop, str | None]] = {}
        self._jobs: OrderedDict[str, tuple[int, bytes, bool]] = OrderedDict()
        self._jobs_told = 0
        gauge = Gauge("neuronlens_event_streams", "Streams of /v1/events that are open.", registry=registry)
        gauge.set_function(lambda: float(len(self._waiting)))

    def wake(self) -> None:
        """Have every stream look again."""
        with self._lock:
            waiting = tuple(self._waiting.items())
        for woken, (loop, _) in waiting:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # its loop is closed, and its stream with it
                continue

    def see_range_sets(self, ids: tuple[str, ...]) -> None:
        """These are published now."""
        if ids != self.range_sets:
            self.range_sets = ids
            self.wake()

    def tell_job(self, job: str, state: dict[str, Any]) -> None:
        """The newest state of a job, as `/v1/jobs/{id}` gives it."""
        data = json.dumps(state, allow_nan=False).encode()
        over = state.get("state") in OVER
        with self._lock:
            if not over and job in self._jobs and self._jobs[job][2]:
                return  # an older word, that came late
            self._jobs_told += 1
            self._jobs[job] = (self._jobs_told, data, over)
            self._jobs.move_to_end(job)
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
        self.wake()

    def jobs_since(self, told: int) -> tuple[int, list[bytes]]:
        """States of jobs that are newer than `told`, oldest first, and what to ask with next time."""
        with self._lock:
            return self._jobs_told, [data for number, data, _ in self._jobs.values() if number > told]

    @contextmanager
    def following(self, key: str | None = None) -> Iterator[asyncio.Event | None]:
        """An event that is set on news; None if there are too many streams already, in all or of this key."""
        woken = asyncio.Event()
        with self._lock:
            taken = len(self._waiting) < self.most
            if key is not None:
                held = sum(1 for _, other in self._waiting.values() if other == key)
                taken = taken and held < max(1, self.most // 2)
            if taken:
                self._waiting[woken] = asyncio.get_running_loop(), key
        try:
            yield woken if taken else None
        finally:
            with self._lock:
                self._waiting.pop(woken, None)
