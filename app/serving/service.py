"""The service of one model, how it is put together, and whether it is ready.

Nothing here imports torch. Names of `workers` that the routes need are exported here.

`app.serving.serve` opens one with an engine in this process, `app.serving.fleet` one with engines on Ray.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from app.jobs.runner import FitRunner
from app.jobs.schemas import JobOut
from app.live.change_metrics import LiveChangeMetrics
from app.live.feed import ChangeFeed
from app.security.keyring import Keyring, memory_of
from app.settings import Settings
from range_store.domain.range_set import RangeSet, dtype_mismatch
from range_store.errors import NoRangeSet, RangeStoreError, StoreUnavailable
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.jobs import Jobs, JobStore
from range_store.storage.mirror import Mirror, Snapshot
from range_store.storage.replicas import new_replica_name
from range_store.storage.store import RangeStore
from workers.corpora.paper_datasets import PAPER_DATASETS
from workers.engine.answers import Answer, Answerer, Logits, TextAnswer
from workers.engine.errors import Draining
from workers.engine.live_metrics import add_model_label, live_state_metrics, model_metric, register_process_metrics
from workers.engine.metrics import MAX_CONCEPTS, OTHER_CONCEPTS
from workers.models.facts import ModelFacts
from workers.models.predictions import CHANCE, Activation
from workers.models.texts import TextOrPair, TokenInfo, characters

__all__ = [
    "CHANCE",
    "KNOWN_DATA_SETS",
    "MAX_CONCEPTS",
    "OTHER_CONCEPTS",
    "Activation",
    "Answer",
    "Answerer",
    "Draining",
    "Logits",
    "ModelFacts",
    "Service",
    "TextAnswer",
    "TextOrPair",
    "TokenInfo",
    "add_model_label",
    "characters",
    "live_state_metrics",
    "model_metric",
    "register_process_metrics",
]

logger = logging.getLogger(__name__)

KNOWN_DATA_SETS = tuple(PAPER_DATASETS)
"""Names that a job's `dataset` may be."""


@dataclass(frozen=True, eq=False)
class Service:
    """Everything that serves one model: store, mirror of the live state, keys, engine, fits.

    A process may have several, each with a registry of its own; they may share the keyring.
    """

    settings: Settings
    model: ModelFacts
    store: RangeStore
    mirror: Mirror
    keyring: Keyring
    engine: Answerer
    registry: CollectorRegistry
    name: str
    feed: ChangeFeed
    jobs: JobStore
    fits: FitRunner
    started_at: float = field(default_factory=time.time)
    """Unix seconds."""

    def require_snapshot(self) -> Snapshot:
        """The current snapshot; raises StoreUnavailable if the live state was never read."""
        if (snapshot := self.mirror.snapshot) is None:
            raise StoreUnavailable("the live state was never read: the store cannot be reached")
        return snapshot

    def require_range_set(self) -> RangeSet:
        """The active range set; raises NoRangeSet if there is none."""
        if (range_set := self.require_snapshot().range_set) is None:
            raise NoRangeSet()
        return range_set

    def drain(self) -> None:
        """Accept no new requests, and leave the replicas that changes wait for. Safe in a signal handler."""
        self.engine.drain()
        self.mirror.withdraw()


def conditions_of_all(services: Iterable[Service]) -> dict[str, bool]:
    """The conditions of all models of a process; where there are several, each is named `model: condition`."""
    by_model = {service.name: conditions(service) for service in services}
    if len(by_model) == 1:
        return next(iter(by_model.values()))
    return {f"{model}: {name}": holds for model, found in by_model.items() for name, holds in found.items()}


def conditions(service: Service) -> dict[str, bool]:
    """Each condition of readiness, and whether it holds now. A service is ready if all do.

    An unreachable store is no condition: the last good snapshot goes on answering, until it is older than
    `max_snapshot_age`, if that is set.
    """
    snapshot, max_age = service.mirror.snapshot, service.settings.max_snapshot_age
    return {
        "engine": service.engine.ready,
        "live_state": snapshot is not None,
        "range_set": snapshot is not None and snapshot.range_set is not None,
        "snapshot_fresh": snapshot is not None and (max_age is None or service.mirror.age() <= max_age),
    }


OpenEngine = Callable[[Mirror, CollectorRegistry], AbstractContextManager[Answerer]]
"""Opens an engine that is ready to answer. On exit, the engine first answers the requests that it has accepted."""


def engine_limits(settings: Settings) -> dict[str, Any]:
    """The arguments of `workers.engine.settings.EngineSettings` that do not depend on the device."""
    return {
        "max_queue_tokens": settings.max_queue_tokens,
        "max_queue_texts": settings.max_queue_texts,
        "max_queue_seconds": settings.max_queue_seconds,
        "trunk_cache_bytes": settings.trunk_cache_mb * 1_000_000,
        "watched_batches": settings.watched_batches,
    }


@contextmanager
def assemble_service(
    settings: Settings, model: ModelFacts, client: redis.Redis, open_engine: OpenEngine
) -> Iterator[Service]:
    """A service around an engine, ready to answer. On exit it first answers the requests that it has accepted."""
    name = settings.name or model.identity.id
    store = RangeStore(client, name)
    keyring = Keyring(ApiKeyStore(client), required=settings.require_keys, memory=_key_memory(settings, client))
    keyring.refresh()
    registry = CollectorRegistry()
    changes = LiveChangeMetrics(registry, MAX_CONCEPTS, OTHER_CONCEPTS)
    feed = ChangeFeed(settings.max_event_streams, registry)

    warned_about: str | None = None

    def on_change(snapshot: Snapshot) -> None:
        nonlocal warned_about
        changes(snapshot)
        feed.wake_streams()
        range_set = snapshot.range_set
        if range_set is not None and range_set.id != warned_about:
            warned_about = range_set.id
            if mismatch := dtype_mismatch(range_set.provenance, model.dtype):
                logger.warning("%s, range set %s: %s", name, range_set.id, mismatch)

    def on_read() -> None:
        keyring.refresh()
        if mirror.store_up:  # a store that hangs would take another timeout
            with suppress(RangeStoreError):
                feed.set_range_sets(store.range_sets.ids())
                fits.refresh()

    def jobs_changed(jobs: Jobs) -> None:
        feed.set_jobs({job.id: JobOut.of(job, jobs).model_dump_json().encode() for job in reversed(jobs.jobs)})

    mirror = Mirror(
        store,
        model.identity.fingerprint,
        poll=settings.poll_seconds,
        on_change=on_change,
        on_read=on_read,
        replica=new_replica_name(),
        earlier_fingerprint=model.earlier_fingerprint,
    )
    store.before_change = mirror.before_change
    jobs = JobStore(client, name)
    fits = FitRunner(jobs, settings, model, store, mirror, jobs_changed)
    assert mirror.heartbeat is not None
    mirror.heartbeat.dtype = model.dtype
    mirror.start()
    try:
        with open_engine(mirror, registry) as engine:
            if settings.fits:
                fits.start()
            try:
                yield Service(settings, model, store, mirror, keyring, engine, registry, name, feed, jobs, fits)
            finally:
                engine.drain()
                mirror.withdraw()
                fits.close()
    finally:
        mirror.close()


def _key_memory(settings: Settings, client: redis.Redis) -> Path:
    where = client.connection_pool.connection_kwargs
    store = f"{where.get('host')}:{where.get('port')}/{where.get('db')}" if settings.redis_url else "private"
    return memory_of(settings.data_dir, str(where["path"]) if settings.redis_url and "path" in where else store)
