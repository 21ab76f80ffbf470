"""Fixtures that run the command line in this process on a real store."""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from app.cli import run
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.store import RangeStore
from tests.range_store.builders import random_range_set


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The parsed stdout, which must be JSON only."""
        return json.loads(self.stdout)


Cli = Callable[..., Ended]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("erase", "list")`: run a command and check that it prints no control characters and no traceback."""
    for name in ("NEURONLENS_URL", "NEURONLENS_REDIS_URL", "NEURONLENS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: object) -> Ended:
        capsys.readouterr()
        exit_code = run([str(argument) for argument in arguments])
        ended = Ended(exit_code, *capsys.readouterr())
        assert "\x1b" not in ended.stdout + ended.stderr
        assert "\r" not in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        if exit_code not in (0, 130):
            *before, last = ended.stderr.splitlines()
            assert last.startswith("error: ")
            assert not any(line.startswith("error: ") for line in before)
        return ended

    return command


@dataclass(frozen=True)
class Prepared:
    """A model of three blocks with two range sets: `whole` of all blocks (active), and `last_only` of block 2."""

    store: RangeStore
    options: tuple[str, ...]
    whole: str
    last_only: str


@pytest.fixture
def prepared(redis_client: redis.Redis) -> Prepared:
    assert isinstance(redis_client, EmbeddedRedis)
    store = RangeStore(redis_client, f"cli-{uuid.uuid4().hex}")
    whole = store.range_sets.publish(*random_range_set(1))
    last_only = store.range_sets.publish(*random_range_set(2, layers=[2]))
    store.activate(whole)
    return Prepared(store, ("--redis-url", redis_client.url, "--name", store.model), whole, last_only)
