"""A replica's own /metrics, at its node's address: what one process tells of its engine, under the same names."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from range_store.storage.mirror import Mirror
from workers.engine.errors import DeadlineExceeded, Draining, EngineError, EngineFailed, QueueFull, RequestTooLarge
from workers.engine.live_metrics import add_model_label, live_state_metrics, model_metric, register_process_metrics
from workers.models.facts import ModelFacts

logger = logging.getLogger(__name__)

PORTS = 100
"""So many ports are tried from the first one on: each replica of a node needs one of its own."""
COUNTED_BY_INGRESSES = frozenset({"neuronlens_rejections"})
"""Requests that were not answered: told here too, they would be counted twice."""


@dataclass(frozen=True)
class MetricsAddress:
    """Where replicas serve their metrics. `host` None: at their node's address. `port`: the first; 0 takes any."""

    host: str | None
    port: int


class ReplicaMetrics(Collector):
    """The engine's registry, and what the replica's mirror knows, under a label `model` as in one process."""

    def __init__(self, model: str, engine: CollectorRegistry, mirror: Mirror, facts: ModelFacts) -> None:
        self._model = model
        self._engine, self._mirror, self._facts = engine, mirror, facts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        found = chain(self._engine.collect(), live_state_metrics(self._mirror), [model_metric(self._facts)])
        add_model_label(self._model, (each for each in found if each.name not in COUNTED_BY_INGRESSES), families)
        yield from families.values()


class MetricsServer:
    """Serves `metrics`, and what is told of this process, over HTTP until it is closed.

    Args:
        address: of the node, where `at` names none.

    Raises:
        OSError: there is no such address, or none of the ports is free.
    """

    def __init__(self, metrics: Collector, at: MetricsAddress, address: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        registry.register(metrics)
        register_process_metrics(registry)
        host = at.host or address
        ports = range(at.port, min(at.port + PORTS, 65536)) if at.port else range(1)
        for port in ports:
            try:
                self._server, self._thread = start_http_server(port, host, registry)
                break
            except OSError:
                if port == ports[-1]:
                    raise
        self.address = f"[{host}]:{self._server.server_port}" if ":" in host else f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(metrics: Collector, at: MetricsAddress | None, address: str) -> MetricsServer | None:
    """A server for them, if there is to be one. That it cannot be had is logged, and costs no answer."""
    if at is None:
        return None
    try:
        return MetricsServer(metrics, at, address)
    except OSError as error:
        logger.warning("this replica's metrics are not served: %s:%d: %s", at.host or address, at.port, error.strerror)
        return None


REASONS: dict[type[EngineError], str] = {
    QueueFull: "queue_full",
    RequestTooLarge: "too_large",
    Draining: "draining",
    DeadlineExceeded: "deadline",
    EngineFailed: "failed",
}


class FleetMetrics:
    """Registered in `registry`. `replicas`, `wanted`: tell how many take requests, and how many are to."""

    def __init__(self, registry: CollectorRegistry, replicas: Callable[[], int], wanted: Callable[[], int]) -> None:
        Gauge("neuronlens_fleet_replicas", "Replicas that take requests.", registry=registry).set_function(replicas)
        Gauge(
            "neuronlens_fleet_replicas_wanted",
            "Replicas that there are to be: as many as were asked for, or as the load asks for.",
            registry=registry,
        ).set_function(wanted)
        self.calls = Histogram(
            "neuronlens_fleet_call_requests",
            "Requests that travelled to a replica together, in one call.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.retried = Counter(
            "neuronlens_fleet_retried",
            "Requests that were sent once more, because the replica that had them was lost.",
            registry=registry,
        )
        self.lost = Counter(
            "neuronlens_fleet_lost",
            "Requests that were not answered, because the next was lost too.",
            registry=registry,
        )
        self.rejections = Counter(
            "neuronlens_rejections", "Requests not answered, by reason.", ["reason"], registry=registry
        )
        for reason in (*REASONS.values(), "cancelled", "lost"):
            self.rejections.labels(reason)

    def count(self, error: EngineError) -> None:
        """A request was not answered."""
        self.rejections.labels(REASONS.get(type(error), "lost")).inc()
