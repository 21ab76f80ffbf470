"""A Ray cluster of two nodes on this machine, and services whose engines run on it."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
import redis
from ray.cluster_utils import Cluster

from app.fleet import end_fleet, fleets, open_fleet
from app.service import Service
from app.settings import Settings
from range_store.embedded import EmbeddedRedis
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Its address. Two nodes of three CPUs that count, not run: the machine has fewer."""
    place = tempfile.mkdtemp(prefix="nl-ray-", dir="/tmp")  # paths of sockets must be short
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", place)  # else "auto" would find this cluster, from other processes too
    os.mkdir(f"{place}/ray")
    node = {"num_cpus": 3, "object_store_memory": 100 << 20}
    made = Cluster(
        initialize_head=True,
        head_node_args={**node, "include_dashboard": False},
    )
    made.add_node(**node)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield made.address
    finally:
        ray.shutdown()
        made.shutdown()
        patch.undo()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def open_service(
    cluster: str, redis_client: redis.Redis, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Service]]:
    """`open_service(name, …settings)`: in front of a fleet of that name, of one replica; fleets end with the module."""
    assert isinstance(redis_client, EmbeddedRedis)
    with ExitStack() as stack:

        def end_all() -> None:
            for name in fleets(cluster):
                end_fleet(cluster, name)

        stack.callback(end_all)

        def start(name: str, scaling: Any = None, redeploy: bool = False, **settings: Any) -> Service:
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
            return stack.enter_context(opened)[0]

        yield start


def activated(service: Service, fitted: Fitted) -> Service:
    """Publish and activate ranges, and have every replica follow."""
    service.store.activate(service.store.publish(fitted.range_set, fitted.inspect))
    service.mirror.refresh()
    return service


def copied(model: LoadedModel, where: Path) -> Path:
    """The checkpoint at another place, to be changed there."""
    return Path(shutil.copytree(model.source, where))
