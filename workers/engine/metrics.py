"""Metrics of the engine. Labels are bounded: never a text, a plan or a key."""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workers.engine.settings import EngineSettings

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STAGES = ("tokenize", "trunk", "tail", "reply")
GIVEN_UP = ("tokenizing", "queued", "running")
MAX_CONCEPTS = 200
OTHER_CONCEPTS = "(other)"


class EngineMetrics:
    """The engine's metrics, registered in `registry`; the limits of `settings` are among them."""

    def __init__(self, registry: CollectorRegistry, settings: EngineSettings) -> None:
        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"neuronlens_{name}", description, registry=registry)

        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(f"neuronlens_{name}", description, labels, registry=registry)

        def histogram(name: str, description: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"neuronlens_{name}", description, labels, buckets=buckets, registry=registry)

        self.queue_texts = gauge("queue_texts", "Texts waiting for a batch.")
        self.queue_tokens = gauge(
            "queue_tokens", "Tokens waiting for a batch, twice where a text passes the blocks above its split twice."
        )
        self.queue_wait = histogram("queue_wait_seconds", "Time of a text from admission to its batch.", SECONDS)
        self.stage = histogram(
            "stage_seconds",
            "Time of a request in the tokenizer, and of a batch in the trunk, in the tails, and until it was replied.",
            SECONDS,
            "stage",
        )
        self.forward = histogram("forward_seconds", "Time of a batch in the model.", SECONDS)
        self.batch_texts = histogram("batch_texts", "Texts per batch.", (1, 2, 4, 8, 16, 32, 64, 128))
        self.batch_tokens = histogram("batch_tokens", "Real tokens per batch.", (16, 64, 256, 1024, 4096, 16384, 65536))
        self.batch_plans = histogram(
            "batch_plans", "Distinct plans per batch, the empty one left out.", (0, 1, 2, 4, 8, 16, 32, 64)
        )
        self.tokens = counter("tokens", "Real tokens of answered texts.")
        self.padded_tokens = counter(
            "padded_tokens",
            "Tokens that trunks ran on for them, padding included; over real tokens, this is the padding ratio.",
        )
        self.texts = counter("texts", "Texts answered, by source of erasure.", "source")
        self.masked_neurons = counter("masked_neurons", "Neurons masked at the read position of answered texts.")
        self.masked = counter(
            "concept_masked_neurons", "Neurons at the read position that an erased concept masked.", "concept"
        )
        self.maskable = counter(
            "concept_neurons",
            "Neurons at the read position of texts from which a concept was erased; under those masked, their ratio.",
            "concept",
        )
        self.watched = counter(
            "concept_watched_texts",
            "Texts of which both the bare and the erased answer are known, by erased concept.",
            "concept",
        )
        self.changed = counter(
            "concept_changed_labels", "Those of the watched texts whose label the erasure changed.", "concept"
        )
        self.rejections = counter("rejections", "Requests not answered, by reason.", "reason")
        self.cancellations = counter(
            "cancellations", "Requests given up, by the client or the deadline, by how far they had come.", "stage"
        )
        self.trunk_cache_hits = counter("trunk_cache_hits", "Texts whose trunk was kept.")
        self.trunk_cache_misses = counter("trunk_cache_misses", "Texts whose trunk was not kept, if any are.")
        self.trunk_cache_bytes = gauge("trunk_cache_bytes", "Bytes of kept trunks.")
        for name, description, limit in (
            ("queue_texts_limit", "Texts that may wait.", settings.max_queue_texts),
            ("queue_tokens_limit", "Tokens that may wait.", settings.max_queue_tokens),
            ("batch_tokens_limit", "Tokens of one batch at most.", settings.max_batch_tokens),
        ):
            gauge(name, description).set(limit)
        self._concepts: set[str] = set()
        for source in ("live", "request", "none"):
            self.texts.labels(source)
        for reason in ("queue_full", "too_large", "draining", "deadline", "cancelled", "failed"):
            self.rejections.labels(reason)
        for stage in STAGES:
            self.stage.labels(stage)
        for stage in GIVEN_UP:
            self.cancellations.labels(stage)

    def count(self, counter: Counter, by_concept: Mapping[str, int]) -> None:
        """Add to a counter by concept. The first `MAX_CONCEPTS` names have a series each, all others share one."""
        for concept, number in by_concept.items():
            if concept not in self._concepts:
                if len(self._concepts) >= MAX_CONCEPTS:
                    concept = OTHER_CONCEPTS
                else:
                    self._concepts.add(concept)
            counter.labels(concept).inc(number)
