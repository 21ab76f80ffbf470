"""Serves a model with an engine in this process. Importing it loads torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from prometheus_client import CollectorRegistry

from app.serving.loading import load_on_thread
from app.serving.service import Service, assemble_service, engine_limits
from app.settings import Settings
from range_store.embedded.connection import connect
from range_store.storage.mirror import Mirror
from workers.engine.engine import Engine
from workers.engine.settings import EngineSettings, batch_tokens_for
from workers.models.loading import LoadedModel


@contextmanager
def open_service(settings: Settings, model: LoadedModel | None = None) -> Iterator[Service]:
    """A service that is ready to answer. On exit it first answers the requests that it has accepted.

    Args:
        model: a loaded model; by default, `settings.model` is loaded.

    Raises:
        ModelError: the checkpoint cannot be served.
        StoreUnavailable: the private Redis cannot be started. A Redis by URL may be down: the mirror keeps trying.
    """
    with connect(**settings.redis) as client:  # first, because loading can take minutes
        loaded = model or load_on_thread(settings)
        with serve_model(settings, loaded, client) as service:
            yield service


@contextmanager
def serve_model(settings: Settings, model: LoadedModel, client: redis.Redis) -> Iterator[Service]:
    """As `open_service`, for a loaded model and a connected store."""
    limits = EngineSettings(
        max_batch_tokens=settings.max_batch_tokens or batch_tokens_for(model.device.type), **engine_limits(settings)
    )

    @contextmanager
    def engine(mirror: Mirror, registry: CollectorRegistry) -> Iterator[Engine]:
        started = Engine(model, mirror, limits, registry)
        started.start()
        try:
            yield started
        finally:
            started.close()

    with assemble_service(settings, model.facts, client, engine) as service:
        yield service
