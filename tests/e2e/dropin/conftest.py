"""Servers that several tests of the drop-in protocols share."""

from collections.abc import Iterator

import pytest

from range_store.api_keys import KeyStore
from range_store.embedded import connect
from tests.processes import end_redis
from tests.servers import RunningServer, starting, with_ranges
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel

KeyedServer = tuple[RunningServer, dict[str, str]]


@pytest.fixture(scope="package")
def keyed_server(
    request: pytest.FixtureRequest, model: LoadedModel, fitted: Fitted, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedServer]:
    """A server that requires API keys, and a token of each scope. Tests leave nothing erased on it."""
    directory = tmp_path_factory.mktemp("keyed")
    with connect(None, directory) as client, starting(request, client, model, directory) as start:
        keys = KeyStore(client)
        tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
        yield with_ranges(start(), fitted), tokens
    end_redis(directory)
