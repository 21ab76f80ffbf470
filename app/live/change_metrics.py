"""Metrics of changes to the live state, as this process applies them."""

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from range_store.domain.erasure import Erasure
from range_store.storage.mirror import Snapshot

CHANGES = ("on", "off", "settings", "range_set", "anew")


class LiveChangeMetrics:
    """Counts the differences between each snapshot it is called with and the one before.

    Args:
        max_concepts: concepts with series of their own; all others share the name `other`.
    """

    def __init__(self, registry: CollectorRegistry, max_concepts: int, other: str) -> None:
        self._max_concepts, self._other = max_concepts, other
        self._before: Snapshot | None = None
        self._concepts: set[str] = set()
        self.changes = Counter(
            "neuronlens_live_changes",
            "Changes of the live state that this process applied: erasures switched on, off or set differently, "
            "range sets activated, and a start anew after Redis had lost it.",
            ["change"],
            registry=registry,
        )
        self.changed = Gauge(
            "neuronlens_live_changed_timestamp_seconds",
            "When this process last applied such a change, by concept; empty where it is about none.",
            ["change", "concept"],
            registry=registry,
        )
        for change in CHANGES:
            self.changes.labels(change)

    def __call__(self, snapshot: Snapshot) -> None:
        before, self._before = self._before, snapshot
        if before is None:
            return
        for change, concept in _differences(before, snapshot):
            self.changes.labels(change).inc()
            self.changed.labels(change, self._bounded(concept)).set(time.time())

    def _bounded(self, concept: str) -> str:
        if concept not in self._concepts and concept:
            if len(self._concepts) >= self._max_concepts:
                return self._other
            self._concepts.add(concept)
        return concept


def _differences(before: Snapshot, after: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield (change, concept) for each difference."""
    if before.live.epoch != after.live.epoch:
        yield "anew", ""
    if before.live.range_set != after.live.range_set:
        yield "range_set", ""
    old, new = _settings(before), _settings(after)
    for concept in sorted(old.keys() | new.keys()):
        if concept not in old:
            yield "on", concept
        elif concept not in new:
            yield "off", concept
        elif old[concept] != new[concept]:
            yield "settings", concept


def _settings(snapshot: Snapshot) -> Mapping[str, tuple[Erasure, bool, float | None]]:
    return {each.concept: (each.erasure, each.enforced, each.expires_at) for each in snapshot.live.erasures}
