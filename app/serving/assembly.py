"""Puts a service together around whatever answers: an engine of this process, or a fleet. Without torch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from app.jobs.runner import FitRunner
from app.jobs.schemas import JobOut
from app.live.change_metrics import LiveChangeMetrics
from app.live.feed import ChangeFeed
from app.security.keyring import Keyring, memory_of
from app.serving.service import MAX_CONCEPTS, OTHER_CONCEPTS, Answerer, ModelFacts, Service
from app.settings import Settings
from range_store.domain.range_set import dtype_mismatch
from range_store.errors import RangeStoreError
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.jobs import Jobs, JobStore
from range_store.storage.mirror import Mirror, Snapshot
from range_store.storage.replicas import new_replica_name
from range_store.storage.store import RangeStore

logger = logging.getLogger(__name__)

Answering = Callable[[Mirror, CollectorRegistry], AbstractContextManager[Answerer]]
"""Makes what answers, ready to do so; on leaving it ends, when what it had accepted is answered."""


def engine_limits(settings: Settings) -> dict[str, Any]:
    """What of `workers.engine.settings.EngineSettings` does not depend on the device."""
    return {
        "max_queue_tokens": settings.max_queue_tokens,
        "max_queue_texts": settings.max_queue_texts,
        "max_queue_seconds": settings.max_queue_seconds,
        "trunk_cache_bytes": settings.trunk_cache_mb * 1_000_000,
        "watched_batches": settings.watched_batches,
    }


@contextmanager
def service_around(
    settings: Settings, model: ModelFacts, client: redis.Redis, answering: Answering
) -> Iterator[Service]:
    """A service that is ready to answer; on leaving, accepted requests are answered first."""
    name = settings.name or model.identity.id
    store = RangeStore(client, name)
    keyring = Keyring(ApiKeyStore(client), required=settings.require_keys, memory=_key_memory(settings, client))
    keyring.refresh()
    registry = CollectorRegistry()
    changes = LiveChangeMetrics(registry, MAX_CONCEPTS, OTHER_CONCEPTS)
    feed = ChangeFeed(settings.max_event_streams, registry)

    warned: str | None = None

    def changed(snapshot: Snapshot) -> None:
        nonlocal warned
        changes(snapshot)
        feed.wake_streams()
        range_set = snapshot.range_set
        if range_set is not None and range_set.id != warned:
            warned = range_set.id
            if said := dtype_mismatch(range_set.provenance, model.dtype):
                logger.warning("%s, range set %s: %s", name, range_set.id, said)

    def read_others() -> None:
        keyring.refresh()
        if mirror.store_up:  # else who waits for a store that hangs would wait once more
            with suppress(RangeStoreError):
                feed.set_range_sets(store.range_sets.ids())
                fits.refresh()

    def jobs_changed(jobs: Jobs) -> None:
        feed.set_jobs({job.id: JobOut.of(job, jobs).model_dump_json().encode() for job in reversed(jobs.jobs)})

    mirror = Mirror(
        store,
        model.identity.fingerprint,
        poll=settings.poll_seconds,
        on_change=changed,
        on_read=read_others,
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
        with answering(mirror, registry) as answerer:
            if settings.fits:
                fits.start()
            try:
                yield Service(settings, model, store, mirror, keyring, answerer, registry, name, feed, jobs, fits)
            finally:
                answerer.drain()
                mirror.withdraw()
                fits.close()
    finally:
        mirror.close()


def _key_memory(settings: Settings, client: redis.Redis) -> Path:
    where = client.connection_pool.connection_kwargs
    store = f"{where.get('host')}:{where.get('port')}/{where.get('db')}" if settings.redis_url else "private"
    return memory_of(settings.data_dir, str(where["path"]) if settings.redis_url and "path" in where else store)
