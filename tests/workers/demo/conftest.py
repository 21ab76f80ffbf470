"""The real demo, made once for all tests that look at it."""

import os
from collections.abc import Iterator

import pytest
import redis
import torch

from range_store.storage.store import RangeStore
from workers.demo.demo import Demo, prepare


@pytest.fixture(scope="package")
def every_core() -> Iterator[None]:
    """Let torch use every core: this training takes a minute."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory, redis_client: redis.Redis, every_core: None) -> Demo:
    """The demo as `neuronlens demo` makes it."""
    return prepare(tmp_path_factory.mktemp("demo"), RangeStore(redis_client, "demo-test"), lambda *now: None)
