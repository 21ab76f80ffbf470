"""What Prometheus sees of the engine. Labels are bounded: never a text, a plan or a key."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class EngineMetrics:
    """The engine's metrics, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.queue_texts = Gauge("neuronlens_queue_texts", "Texts waiting for a batch.", registry=registry)
        self.queue_tokens = Gauge("neuronlens_queue_tokens", "Tokens waiting for a batch.", registry=registry)
        self.queue_wait = Histogram(
            "neuronlens_queue_wait_seconds",
            "Time of a text from admission to its batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self.forward = Histogram(
            "neuronlens_forward_seconds", "Time of a batch in the model.", buckets=SECONDS, registry=registry
        )
        self.batch_texts = Histogram(
            "neuronlens_batch_texts", "Texts per batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.batch_plans = Histogram(
            "neuronlens_batch_plans",
            "Distinct plans per batch, the empty one left out.",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.tokens = Counter("neuronlens_tokens", "Real tokens run through the model.", registry=registry)
        self.padded_tokens = Counter(
            "neuronlens_padded_tokens", "Tokens run through the model, padding included.", registry=registry
        )
        self.texts = Counter("neuronlens_texts", "Texts answered, by source of erasure.", ["source"], registry=registry)
        self.masked_neurons = Counter(
            "neuronlens_masked_neurons", "Neurons masked at the read position of answered texts.", registry=registry
        )
        self.rejections = Counter(
            "neuronlens_rejections", "Requests not answered, by reason.", ["reason"], registry=registry
        )
        for source in ("live", "request", "none"):
            self.texts.labels(source)
        for reason in ("queue_full", "too_large", "draining", "deadline", "cancelled", "failed"):
            self.rejections.labels(reason)
