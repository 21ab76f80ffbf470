"""A Ray cluster of two nodes on this machine; and, with `pytest --fleet`, every server of the tests on fleets there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest

from app.service import Service
from app.settings import Settings

if TYPE_CHECKING:
    from workers.models.loading import LoadedModel

    Opened = Callable[[Settings, LoadedModel], AbstractContextManager[Service]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Its address. Two nodes of some CPUs that count, not run: the machine has fewer."""
    import workers.cluster  # noqa: F401 (says how Ray is to be used)
    import ray  # isort: skip
    from ray.cluster_utils import Cluster

    place = tempfile.mkdtemp(prefix="nl-ray-", dir="/tmp")  # paths of sockets must be short
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", place)  # else "auto" would find this cluster, from other processes too
    os.mkdir(f"{place}/ray")
    node = {"num_cpus": 16, "object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield made.address
    finally:
        ray.shutdown()
        made.shutdown()
        patch.undo()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def on_fleet(cluster: str) -> Opened:
    """A replica takes seconds to start: servers of the same settings share one, and each begins with nothing live."""
    from app.fleet import open_fleet

    names: dict[str, str] = {}

    @contextmanager
    def opened(settings: Settings, loaded: LoadedModel) -> Iterator[Service]:
        limits = settings.model_dump(
            include={"max_batch_tokens", "max_queue_tokens", "max_queue_texts", "max_queue_seconds", "trunk_cache_mb"}
        )
        name = names.setdefault(repr((loaded.source, settings.redis_url, limits)), f"fleet-{len(names)}")
        own = {"ray": cluster, "name": name, "model": loaded.source, "threads": 1, "device": "cpu"}
        with open_fleet(settings.model_copy(update=own)) as (service,):
            service.store.set_erasures([])
            service.mirror.refresh()
            yield service

    return opened
