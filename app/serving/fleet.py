"""Serves models with engines on a Ray cluster. This process is only their ingress, and does not import torch."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from app.observability.logs import current_request
from app.observability.tracing import traceparent
from app.serving.logged_replica import LoggedReplica, Logs
from app.serving.service import Answerer, Service, assemble_service, engine_limits
from app.settings import ModelSettings, Settings
from range_store.embedded.connection import EmbeddedRedis, connect
from range_store.errors import StoreUnavailable
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import ReplicaRegistry
from workers.cluster.connection import PRIVATE, connected
from workers.cluster.errors import ClusterError
from workers.cluster.fleet import Fleet
from workers.cluster.launching import RunningFleet, delete_fleet, fleet_names, running_fleet
from workers.cluster.messages import RequestContext
from workers.cluster.metrics import MetricsAddress
from workers.cluster.plan import FleetPlan, capacity
from workers.cluster.replica import ReplicaSettings
from workers.engine.settings import EngineSettings

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Time that replicas have to finish their requests after the cluster is lost. `/readyz` answers 503 at once; after this
time, pending requests fail (503), and the server ends."""
END_SECONDS = 10.0
"""Time that the server then has to end, before it is ended without cleaning up."""


@contextmanager
def open_fleet(
    settings: Settings,
    *,
    redeploy: bool = False,
    scaling: Mapping[str, float] | None = None,
    lost_exit_code: int = 1,
    skip_cleanup: Callable[[], None] = lambda: None,
) -> Iterator[list[Service]]:
    """Open a service in front of a fleet for each model of the settings, the default first.

    A running fleet is used, else one is started. It keeps running afterwards, except on a private cluster.

    Args:
        redeploy: replace the replicas of a fleet that runs with other settings.
        scaling: changes to `workers.cluster.plan.AUTOSCALING_DEFAULTS`.
        lost_exit_code: exit code if the process hangs after the cluster is lost.
        skip_cleanup: called on exit if the cluster is lost, because exit handlers of libraries would wait for it.

    Raises:
        ClusterError: there is no such cluster, or a fleet does not start.
        ModelError: a checkpoint cannot be served.
        StoreUnavailable: Redis cannot be reached.
    """
    assert settings.ray is not None
    private = settings.ray == PRIVATE
    models = settings.per_model()
    with ExitStack() as stack:
        client = stack.enter_context(connect(**settings.redis))
        url = client.url if isinstance(client, EmbeddedRedis) else str(settings.redis_url)
        end = _End(lost_exit_code)
        cpus = len(models) * _private_cpus(settings)
        watch = stack.enter_context(connected(settings.ray, cpus, on_lost=end))
        assert watch is not None
        stack.callback(lambda: skip_cleanup() if watch.unreachable else None)
        plans = [_plan(each, url, len(models), scaling or {}) for each in models]
        services = []
        for each, plan in zip(models, plans, strict=True):
            replicas = ReplicaRegistry(client, plan.settings.name)
            fleet = stack.enter_context(
                running_fleet(
                    plan,
                    redeploy=redeploy,
                    keep=not private,
                    unreachable=lambda: watch.unreachable,
                    forget_replica=partial(_forget_replica, replicas),
                )
            )
            services.append(stack.enter_context(_service(each, fleet, client, end)))
        yield services


class _End:
    """Ends the server when the cluster is lost: see `GRACE_SECONDS`, `END_SECONDS`."""

    def __init__(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self.fleets: list[Fleet] = []

    def __call__(self, why: str) -> None:
        logger.critical("the Ray cluster is lost: %s; shutting down", why)
        for fleet in self.fleets:
            fleet.mark_lost()
        time.sleep(GRACE_SECONDS)
        for fleet in self.fleets:
            fleet.fail_pending(why)
        time.sleep(END_SECONDS)
        logger.critical("the shutdown hangs on the lost cluster; exiting")
        os._exit(self._exit_code)


def _forget_replica(replicas: ReplicaRegistry, ended: str) -> bool:
    """Remove a replica that has ended, so that no change waits for it. Returns whether it was removed."""
    try:
        return replicas.forget(ended)
    except StoreUnavailable:  # called again later; the entry also expires by itself
        return False


@contextmanager
def _service(settings: Settings, fleet: RunningFleet, client: redis.Redis, end: _End) -> Iterator[Service]:
    limits = EngineSettings(max_batch_tokens=fleet.max_batch_tokens, **engine_limits(settings))

    @contextmanager
    def engine(mirror: Mirror, registry: CollectorRegistry) -> Iterator[Answerer]:
        def generation() -> str | None:
            return mirror.snapshot.live.generation if mirror.snapshot is not None else None

        def context() -> RequestContext:
            request = current_request()
            return RequestContext(request.request_id if request is not None else None, traceparent())

        opened = Fleet(fleet.handle, limits, fleet.replicas, fleet.target_replicas, generation, registry, context)
        end.fleets.append(opened)
        yield opened

    with assemble_service(settings, fleet.facts, client, engine) as service:
        yield service


def fleets(address: str) -> list[str]:
    """Names of the models with a fleet on a cluster. Raises ClusterError."""
    with connected(address):
        return fleet_names()


def end_fleet(address: str, name: str) -> None:
    """Stop the fleet of a model. Raises ClusterError if there is no such fleet or cluster."""
    with connected(address):
        delete_fleet(name)


def _private_cpus(settings: Settings) -> int:
    """CPUs that a private cluster needs, even if the machine has fewer."""
    replicas = settings.max_replicas if settings.replicas == "auto" else settings.replicas
    return (replicas or 1) * (settings.threads or 1)


def _plan(settings: Settings, redis_url: str, models: int, scaling: Mapping[str, float]) -> FleetPlan:
    if settings.device.startswith("cuda:"):
        raise ClusterError(f"Ray chooses the GPU: use --device cuda instead of {settings.device}")
    auto = settings.replicas == "auto"
    wanted = None if settings.replicas == "auto" else settings.replicas

    def with_threads(threads: int) -> FleetPlan:
        return _plan(settings.model_copy(update={"threads": threads}), redis_url, models, scaling)

    most = capacity(settings.device, settings.threads, None if auto else models * (wanted or 1))
    return FleetPlan(
        ReplicaSettings(
            settings.served_name,
            _load_arguments(settings),
            most.threads,
            _redis(settings, redis_url),
            _engine(settings),
            settings.poll_seconds,
            _metrics(settings),
        ),
        replicas=wanted,
        max_replicas=(settings.max_replicas or max(1, most.replicas // models)) if auto else None,
        cpus=most.threads,
        gpus=most.gpus,
        drain_seconds=settings.drain_seconds,
        scaling=scaling,
        replica_class=LoggedReplica,
        replica_args=(Logs(settings.log_level, settings.log_format),),
        with_threads=None if settings.threads else with_threads,
    )


def _load_arguments(model: ModelSettings) -> dict[str, Any]:
    """Arguments of `load_model` with absolute paths: replicas work in other directories."""
    template = None if model.template is None else _absolute(model.template)
    return {**model.load_arguments(), "source": _absolute(model.source), "template": template}


def _metrics(settings: Settings) -> MetricsAddress | None:
    """Address of the replicas' metrics. On a private cluster they are no easier to reach than the server."""
    if settings.replica_metrics_port == "off":
        return None
    here_only = settings.ray == PRIVATE and settings.loopback
    return MetricsAddress("127.0.0.1" if here_only else None, settings.replica_metrics_port)


def _absolute(path: str) -> str:
    """The absolute path of an existing file or directory; other names, as those on the hub, are returned unchanged."""
    return os.path.abspath(Path(path).expanduser()) if Path(path).expanduser().exists() else path


def _redis(settings: Settings, url: str) -> dict[str, Any]:
    return {**{key: value for key, value in settings.redis.items() if key != "directory"}, "url": url}


def _engine(settings: Settings) -> dict[str, Any]:
    return {"max_batch_tokens": settings.max_batch_tokens, **engine_limits(settings)}
