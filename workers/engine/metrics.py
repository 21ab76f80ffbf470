"""What Prometheus sees of the engine. Labels are bounded: never a text, a plan or a key."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workers.engine.settings import EngineSettings

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STAGES = ("tokenize", "trunk", "tail", "reply")
GIVEN_UP = ("tokenizing", "queued", "running")
MOST_CONCEPTS = 200
OTHER_CONCEPTS = "(other)"


class EngineMetrics:
    """The engine's metrics, registered in `registry`; the limits of `settings` are among them."""

    def __init__(self, registry: CollectorRegistry, settings: EngineSettings) -> None:
        self.queue_texts = Gauge("neuronlens_queue_texts", "Texts waiting for a batch.", registry=registry)
        self.queue_tokens = Gauge(
            "neuronlens_queue_tokens",
            "Tokens waiting for a batch, twice where a text passes the blocks above its split twice.",
            registry=registry,
        )
        self.queue_wait = Histogram(
            "neuronlens_queue_wait_seconds",
            "Time of a text from admission to its batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self.stage = Histogram(
            "neuronlens_stage_seconds",
            "Time of a request in the tokenizer, and of a batch in the trunk, in the tails, and until it was replied.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.forward = Histogram(
            "neuronlens_forward_seconds", "Time of a batch in the model.", buckets=SECONDS, registry=registry
        )
        self.batch_texts = Histogram(
            "neuronlens_batch_texts", "Texts per batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.batch_tokens = Histogram(
            "neuronlens_batch_tokens",
            "Real tokens per batch.",
            buckets=(16, 64, 256, 1024, 4096, 16384, 65536),
            registry=registry,
        )
        self.batch_plans = Histogram(
            "neuronlens_batch_plans",
            "Distinct plans per batch, the empty one left out.",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.tokens = Counter("neuronlens_tokens", "Real tokens of answered texts.", registry=registry)
        self.padded_tokens = Counter(
            "neuronlens_padded_tokens",
            "Tokens that trunks ran on for them, padding included; over real tokens, this is the padding ratio.",
            registry=registry,
        )
        self.texts = Counter("neuronlens_texts", "Texts answered, by source of erasure.", ["source"], registry=registry)
        self.masked_neurons = Counter(
            "neuronlens_masked_neurons", "Neurons masked at the read position of answered texts.", registry=registry
        )
        self.masked = Counter(
            "neuronlens_concept_masked_neurons",
            "Neurons at the read position that an erased concept masked.",
            ["concept"],
            registry=registry,
        )
        self.maskable = Counter(
            "neuronlens_concept_neurons",
            "Neurons at the read position of texts from which a concept was erased; under those masked, their ratio.",
            ["concept"],
            registry=registry,
        )
        self.watched = Counter(
            "neuronlens_concept_watched_texts",
            "Texts of which both the bare and the erased answer are known, by erased concept.",
            ["concept"],
            registry=registry,
        )
        self.changed = Counter(
            "neuronlens_concept_changed_labels",
            "Those of the watched texts whose label the erasure changed.",
            ["concept"],
            registry=registry,
        )
        self.rejections = Counter(
            "neuronlens_rejections", "Requests not answered, by reason.", ["reason"], registry=registry
        )
        self.cancellations = Counter(
            "neuronlens_cancellations",
            "Requests given up, by the client or the deadline, by how far they had come.",
            ["stage"],
            registry=registry,
        )
        self.trunk_cache_hits = Counter("neuronlens_trunk_cache_hits", "Texts whose trunk was kept.", registry=registry)
        self.trunk_cache_misses = Counter(
            "neuronlens_trunk_cache_misses", "Texts whose trunk was not kept, if any are.", registry=registry
        )
        self.trunk_cache_bytes = Gauge("neuronlens_trunk_cache_bytes", "Bytes of kept trunks.", registry=registry)
        for name, help_text, limit in (
            ("neuronlens_queue_texts_limit", "Texts that may wait.", settings.max_queue_texts),
            ("neuronlens_queue_tokens_limit", "Tokens that may wait.", settings.max_queue_tokens),
            ("neuronlens_batch_tokens_limit", "Tokens of one batch at most.", settings.max_batch_tokens),
        ):
            Gauge(name, help_text, registry=registry).set(limit)
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
        """Add to a counter by concept. The first `MOST_CONCEPTS` names have their own series, all others share one."""
        for concept, number in by_concept.items():
            if concept not in self._concepts:
                if len(self._concepts) >= MOST_CONCEPTS:
                    concept = OTHER_CONCEPTS
                else:
                    self._concepts.add(concept)
            counter.labels(concept).inc(number)
