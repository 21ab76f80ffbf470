"""The time that all servers of a store share: Redis's, so that a machine with a wrong clock ends no erasure."""

import time

import redis

from range_store.redis_errors import translate_redis_errors


class StoreClock:
    """Unix time by Redis's clock.

    Between reads, and while Redis is away, it advances by this machine's monotonic clock. Before the first read it is
    this machine's own time.
    """

    def __init__(self) -> None:
        self._offset: float | None = None

    def get(self, client: redis.Redis, key: str) -> bytes | None:
        """Read a key and, in the same round trip, the time.

        Raises:
            StoreUnavailable: Redis cannot be reached or refuses.
        """
        began = time.monotonic()
        with translate_redis_errors(), client.pipeline(transaction=False) as pipeline:
            pipeline.get(key)
            pipeline.time()
            value, (seconds, microseconds) = pipeline.execute()
        self.set(seconds + microseconds / 1e6, began)
        return value if isinstance(value, bytes) else None

    def set(self, redis_time: float, began: float) -> None:
        """Set the time to Redis's reply to a call that began at `began` by the monotonic clock."""
        self._offset = redis_time - (began + time.monotonic()) / 2

    def now(self) -> float:
        """Return Unix time in seconds."""
        return time.time() if self._offset is None else self._offset + time.monotonic()
