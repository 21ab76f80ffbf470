"""A real Redis for the whole session, a fresh model name for every test."""

import uuid
from collections.abc import Iterator

import pytest
import redis

from range_store.embedded import connect
from range_store.store import RangeStore


@pytest.fixture(scope="session")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with connect(None, tmp_path_factory.mktemp("redis")) as client:
        yield client


@pytest.fixture
def store(redis_client: redis.Redis) -> RangeStore:
    return RangeStore(redis_client, f"news-{uuid.uuid4().hex}")
