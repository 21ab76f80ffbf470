"""Gauges of the live state, read when Prometheus asks."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from range_store.mirror import Mirror


class LiveMetrics(Collector):
    """What a mirror knows: generation, age of the snapshot, whether the store answers, how much is erased."""

    def __init__(self, mirror: Mirror, registry: CollectorRegistry) -> None:
        self._mirror = mirror
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        snapshot = self._mirror.snapshot
        live = snapshot.live if snapshot else None
        yield GaugeMetricFamily(
            "neuronlens_store_up", "Whether the store answered last time.", float(self._mirror.store_up)
        )
        yield GaugeMetricFamily(
            "neuronlens_snapshot_age_seconds",
            "Time since the live state was last known to be the newest.",
            self._mirror.age(),
        )
        yield GaugeMetricFamily(
            "neuronlens_live_erasures", "Concepts that are erased live.", float(len(live.erasures) if live else 0)
        )
        yield GaugeMetricFamily(
            "neuronlens_generation", "Counter of the live state's generation.", float(live.counter if live else 0)
        )
        info = GaugeMetricFamily("neuronlens_live_info", "Epoch and active range set.", labels=["epoch", "range_set"])
        if live:
            info.add_metric([live.epoch, live.range_set or ""], 1.0)
        yield info
