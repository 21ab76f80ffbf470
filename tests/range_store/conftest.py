"""A store with a model name of its own for each test, on the shared Redis."""

import uuid

import pytest
import redis

from range_store.storage.store import RangeStore


@pytest.fixture
def store(redis_client: redis.Redis) -> RangeStore:
    return RangeStore(redis_client, f"news-{uuid.uuid4().hex}")
