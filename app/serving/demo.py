"""Serves the demo. Importing it loads torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from app.serving.inputs import OnProgress
from app.serving.serve import serve_model
from app.serving.service import Service
from app.settings import Settings
from range_store.embedded.connection import connect
from range_store.storage.store import RangeStore
from workers.demo.demo import NAME, Demo, prepare


@contextmanager
def open_demo(settings: Settings, on_progress: OnProgress, *, rebuild: bool = False) -> Iterator[tuple[Service, Demo]]:
    """Build the demo in `settings.data_dir`, and open a service for it.

    Raises:
        DemoError: its base model is missing or not the expected one.
        StoreUnavailable: the private Redis cannot be started.
    """
    with connect(**settings.redis) as client:
        demo = prepare(settings.data_dir, RangeStore(client, NAME), on_progress, rebuild=rebuild)
        with serve_model(settings.model_copy(update={"name": NAME}), demo.model, client) as service:
            yield service, demo
