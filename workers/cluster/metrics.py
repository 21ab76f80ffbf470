"""Prometheus metrics of a fleet: an ingress has `FleetMetrics`, and each replica serves those of its engine over HTTP.

Ray's own metrics (`ray.util.metrics`) would appear under other names and without the label `model`, so dashboards and
alerts could not be the ones of a single process.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from range_store.storage.mirror import Mirror
from workers.engine.errors import EngineError
from workers.engine.live_metrics import add_model_label, live_state_metrics, model_metric, register_process_metrics
from workers.models.facts import ModelFacts

logger = logging.getLogger(__name__)

PORTS = 100
"""Number of ports that are tried, from the first one on: each replica of a node needs its own."""
COUNTED_BY_INGRESSES = frozenset({"neuronlens_rejections"})
"""Metrics that replicas leave out: requests that were not answered would be counted twice."""


@dataclass(frozen=True)
class MetricsAddress:
    """Where replicas serve their metrics. `host` None: their node's address. `port`: the first; 0: any free port."""

    host: str | None
    port: int


class ReplicaMetrics(Collector):
    """The metrics of a replica's engine, mirror and model, with the label `model`."""

    def __init__(self, model: str, engine: CollectorRegistry, mirror: Mirror, facts: ModelFacts) -> None:
        self._model = model
        self._engine, self._mirror, self._facts = engine, mirror, facts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        found = chain(self._engine.collect(), live_state_metrics(self._mirror), [model_metric(self._facts)])
        add_model_label(self._model, (each for each in found if each.name not in COUNTED_BY_INGRESSES), families)
        yield from families.values()


class MetricsServer:
    """Serves metrics, and those of this process, over HTTP until it is closed.

    Args:
        node_address: used where `address` has no host.

    Raises:
        OSError: there is no such address, or none of the ports is free.
    """

    def __init__(self, metrics: Collector, address: MetricsAddress, node_address: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        registry.register(metrics)
        register_process_metrics(registry)
        host = address.host or node_address
        ports = range(address.port, min(address.port + PORTS, 65536)) if address.port else range(1)
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


def serve_metrics(metrics: Collector, address: MetricsAddress | None, node_address: str) -> MetricsServer | None:
    """Serve metrics if there is an address. A failure is logged, and the replica answers without metrics."""
    if address is None:
        return None
    try:
        return MetricsServer(metrics, address, node_address)
    except OSError as error:
        host = address.host or node_address
        logger.warning("cannot serve this replica's metrics at %s:%d: %s", host, address.port, error.strerror)
        return None


class FleetMetrics:
    """Metrics of an ingress. `replicas`, `target_replicas`: return how many take requests, and how many are the aim."""

    def __init__(
        self, registry: CollectorRegistry, replicas: Callable[[], int], target_replicas: Callable[[], int]
    ) -> None:
        Gauge("neuronlens_fleet_replicas", "Replicas that take requests.", registry=registry).set_function(replicas)
        Gauge(
            "neuronlens_fleet_replicas_wanted",
            "Target number of replicas: as configured, or as autoscaling chose.",
            registry=registry,
        ).set_function(target_replicas)
        self.calls = Histogram(
            "neuronlens_fleet_call_requests",
            "Requests sent to a replica together, in one call.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.retried = Counter(
            "neuronlens_fleet_retried",
            "Requests sent again because their replica was lost.",
            registry=registry,
        )
        self.lost = Counter(
            "neuronlens_fleet_lost",
            "Requests not answered because a second replica was lost too.",
            registry=registry,
        )
        self.rejections = Counter(
            "neuronlens_rejections", "Requests not answered, by reason.", ["reason"], registry=registry
        )
        for reason in (*(kind.reason for kind in EngineError.__subclasses__()), "cancelled"):
            self.rejections.labels(reason)

    def count(self, error: EngineError) -> None:
        """Count a request that was not answered."""
        self.rejections.labels(error.reason).inc()
