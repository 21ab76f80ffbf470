"""What Prometheus sees of a fleet from an ingress. What happens in an engine, its replica counts."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workers.engine.errors import DeadlineExceeded, Draining, EngineError, EngineFailed, QueueFull, RequestTooLarge

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
