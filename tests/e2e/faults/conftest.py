"""A served model and its Redis, one pair for all tests that leave it as it was."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from range_store.erasure import Erasure
from range_store.live import LiveErasure
from range_store.store import RangeStore
from tests.e2e.faults.processes import Forks, RedisProcess, Served
from tests.range_store.waiting import until
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("faults") / "redis")
    yield process
    process.kill()


@pytest.fixture(scope="session")
def whole_server(redis_process: RedisProcess, model: LoadedModel) -> Iterator[Served]:
    served = Served(model.source, redis_process.url)
    yield served
    served.close()


@pytest.fixture
def store(redis_process: RedisProcess, whole_server: Served) -> Iterator[RangeStore]:
    """The server's store, reached directly, as another process would."""
    with redis_process.client() as client:
        yield RangeStore(client, whole_server.name)


@pytest.fixture
def served(whole_server: Served, store: RangeStore, fitted: Fitted) -> Served:
    """The server, with a range set active and Sports erased."""
    store.activate(store.publish(fitted.range_set, fitted.inspect))
    state = store.set_erasures([LiveErasure(erasure=Erasure(concept="Sports"))])
    until(lambda: whole_server.http.get("/readyz").json().get("generation") == state.generation)
    return whole_server


@pytest.fixture
def redis_of_its_own(tmp_path: Path) -> Iterator[Callable[..., RedisProcess]]:
    """`redis_of_its_own("--maxmemory", "1mb")`: one more Redis, for one test."""
    started: list[RedisProcess] = []

    def start(*arguments: str) -> RedisProcess:
        started.append(RedisProcess(tmp_path / f"redis-{len(started)}", *arguments))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    process = Forks()
    yield process
    process.close()
