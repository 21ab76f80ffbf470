"""Services whose engines run on a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from app.serving.fleet import end_fleet, fleets, open_fleet
from app.serving.service import Service
from app.settings import Settings
from range_store.embedded.connection import EmbeddedRedis
from workers.cluster.serve_status import fleet_status
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel


@pytest.fixture(scope="module")
def open_services(
    cluster: str, redis_client: redis.Redis, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., list[Service]]]:
    """`open_services(name, **settings)`: services in front of fleets of one replica each, which end with the module."""
    assert isinstance(redis_client, EmbeddedRedis)
    with ExitStack() as stack:

        def end_all() -> None:
            for name in fleets(cluster):
                end_fleet(cluster, name)

        stack.callback(end_all)

        def start(name: str, scaling: Any = None, redeploy: bool = False, **settings: Any) -> list[Service]:
            chosen: dict[str, Any] = {
                "name": name,
                "ray": cluster,
                "model": model.source,
                "redis_url": redis_client.url,
                "data_dir": tmp_path_factory.mktemp("fleet"),
                "poll_seconds": 0.2,
                "threads": 1,
                "device": "cpu",
            }
            opened = open_fleet(Settings(**{**chosen, **settings}), scaling=scaling, redeploy=redeploy)
            return stack.enter_context(opened)

        yield start


def activated(service: Service, fitted: FitResult) -> Service:
    """Publish and activate ranges."""
    service.store.activate(service.store.range_sets.publish(fitted.range_set, fitted.inspect))
    service.mirror.refresh()
    return service


def pids(service: Service) -> dict[int, str]:
    """Process id and name of each replica of the fleet in the roster: Serve knows the last parts of their names."""
    status = fleet_status(f"neuronlens:{service.name}")
    ids = status.replicas if status is not None else ()
    names = [each.name for each in service.store.replicas.read().replicas]
    return {int(name.split(":")[1]): name for name in names if name.split(":")[2] in ids}
