"""Services whose engines run on a Ray cluster of two nodes; with `pytest --fleet`, every server of the tests is one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn

from app.main import create_app
from app.serving.service import Service
from app.settings import Settings
from tests.range_store.waiting import until

if TYPE_CHECKING:
    from workers.models.loading import LoadedModel

    Opened = Callable[[Settings, LoadedModel], AbstractContextManager[Service]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster. Its two nodes offer more CPUs than the machine has: they are counted, not used."""
    import workers.cluster  # noqa: F401 (sets environment variables that Ray reads when it is imported)
    import ray  # isort: skip
    from ray.cluster_utils import Cluster

    directory = tempfile.mkdtemp(prefix="nl-ray-", dir="/tmp")  # paths of sockets must be short
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", directory)  # otherwise other processes would find this cluster as "auto"
    os.mkdir(f"{directory}/ray")
    node = {"num_cpus": 16, "object_store_memory": 100 << 20}
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    started.add_node(**node)
    ray.init(address=started.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield started.address
    finally:
        ray.shutdown()
        started.shutdown()
        patch.undo()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def on_fleet(cluster: str) -> Opened:
    """Opens a service in front of a fleet, with nothing erased.

    A replica takes seconds to start, so services with the same settings share a fleet.
    """
    from app.serving.fleet import open_fleet

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


@contextmanager
def over_http(services: list[Service]) -> Iterator[httpx.Client]:
    """A client of a server in front of these services."""
    app = create_app(services[0].settings, services)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", timeout_keep_alive=services[0].settings.keep_alive
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
