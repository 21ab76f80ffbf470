"""The demo, made once for all tests that look at it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from range_store.store import RangeStore
from workers.demo.demo import Demo, prepare


@pytest.fixture(scope="package")
def every_core() -> Iterator[None]:
    """Training takes a while: here, and only here, torch may use every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory, redis_client: redis.Redis, every_core: None) -> tuple[Path, Demo]:
    """The demo's directory, and what `prepare` made in it."""
    directory = tmp_path_factory.mktemp("demo")
    return directory, prepare(directory, RangeStore(redis_client, "demo-test"), lambda *now: None)
