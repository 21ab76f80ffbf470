"""A fresh model name for every test, on the session's Redis."""

import uuid

import pytest
import redis

from range_store.store import RangeStore


@pytest.fixture
def store(redis_client: redis.Redis) -> RangeStore:
    return RangeStore(redis_client, f"news-{uuid.uuid4().hex}")
