"""A server process and its Redis, shared by all tests of a process that leave them running."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.store import RangeStore
from tests.e2e.faults.processes import RedisProcess, Served
from tests.range_store.waiting import until
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("faults") / "redis")
    yield process
    process.kill()


@pytest.fixture(scope="session")
def server_process(redis_process: RedisProcess, model: LoadedModel) -> Iterator[Served]:
    served = Served(model.source, redis_process.url)
    yield served
    served.close()


@pytest.fixture
def store(redis_process: RedisProcess, server_process: Served) -> Iterator[RangeStore]:
    """The store of the server process, reached directly, as another process would."""
    with redis_process.client() as client:
        yield RangeStore(client, server_process.name)


@pytest.fixture
def served(server_process: Served, store: RangeStore, fitted: FitResult) -> Served:
    """The server process, with an active range set and Sports erased."""
    store.activate(store.range_sets.publish(fitted.range_set, fitted.inspect))
    state = store.set_erasures([LiveErasure(erasure=Erasure(concept="Sports"))])
    until(lambda: server_process.http.get("/readyz").json().get("generation") == state.generation)
    return server_process


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisProcess]]:
    """`start_redis("--maxmemory", "1mb")`: another Redis server, for one test."""
    started: list[RedisProcess] = []

    def start(*arguments: str) -> RedisProcess:
        started.append(RedisProcess(tmp_path / f"redis-{len(started)}", *arguments))
        return started[-1]

    yield start
    for each in started:
        each.kill()
