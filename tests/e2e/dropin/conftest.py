"""A server with API keys that all tests of the drop-in protocols share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from range_store.api_keys import KeyStore
from range_store.embedded import connect
from tests.processes import end_redis
from tests.servers import RunningServer, starting, with_ranges
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel

KeyedServer = tuple[RunningServer, dict[str, str]]


@contextmanager
def serving_with_keys(
    request: pytest.FixtureRequest, model: LoadedModel, fitted: Fitted, directory: Path
) -> Iterator[KeyedServer]:
    """A server that requires API keys, and a token of each scope."""
    with connect(None, directory) as client, starting(request, client, model, directory) as start:
        keys = KeyStore(client)
        tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
        yield with_ranges(start(), fitted), tokens
    end_redis(directory)


@pytest.fixture(scope="package")
def shared_keyed_server(
    request: pytest.FixtureRequest, model: LoadedModel, fitted: Fitted, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedServer]:
    with serving_with_keys(request, model, fitted, tmp_path_factory.mktemp("keyed")) as found:
        yield found


@pytest.fixture
def keyed_server(shared_keyed_server: KeyedServer) -> KeyedServer:
    """A server that requires API keys, and a token of each scope; nothing is erased."""
    shared_keyed_server[0].reset()
    return shared_keyed_server
