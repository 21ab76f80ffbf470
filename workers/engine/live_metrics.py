"""Metrics of a model's live state, for a server or a replica of a fleet."""

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import get_args

from prometheus_client import CollectorRegistry, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from range_store.domain.live import LiveErasure
from range_store.storage.mirror import Mirror, ProblemKind
from workers.engine.metrics import MAX_CONCEPTS, OTHER_CONCEPTS
from workers.models.facts import ModelFacts


def add_model_label(model: str, found: Iterable[Metric], families: dict[str, Metric]) -> None:
    """Add samples to the families of their names, with a label `model`."""
    for each in found:
        family = families.setdefault(each.name, Metric(each.name, each.documentation, each.type))
        family.samples += [sample._replace(labels={"model": model, **sample.labels}) for sample in each.samples]


def register_process_metrics(registry: CollectorRegistry) -> None:
    """Register the metrics of the process itself."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    build = Info("neuronlens_build", "Version of this software.", registry=registry)
    build.info({"version": version("neuronlens")})


def model_metric(model: ModelFacts) -> Metric:
    """The model that is served."""
    identity = model.identity
    return InfoMetricFamily(
        "neuronlens_model",
        "What is served.",
        {
            "kind": identity.kind,
            "family": identity.family,
            "fingerprint": identity.fingerprint,
            "dtype": model.dtype,
            "device": model.device,
        },
    )


def live_state_metrics(mirror: Mirror) -> Iterator[Metric]:
    """The state of a mirror, and the live erasures."""
    snapshot = mirror.snapshot
    live = snapshot.live if snapshot else None
    erased = live.active_at(mirror.now()) if live else ()
    yield GaugeMetricFamily("neuronlens_store_up", "1 if the store answered last time.", float(mirror.store_up))
    yield GaugeMetricFamily(
        "neuronlens_snapshot_age_seconds",
        "Time since the live state was last known to be the newest.",
        mirror.age(),
    )
    yield GaugeMetricFamily(
        "neuronlens_replicas",
        "Live replicas of the model, this one too, at its last report; 0 while it makes none.",
        float(mirror.heartbeat.live_replicas if mirror.heartbeat else 0),
    )
    problem = GaugeMetricFamily(
        "neuronlens_live_state_problem",
        "1 for the reason why the live state is not known to be the newest, if there is one.",
        labels=["problem"],
    )
    for kind in get_args(ProblemKind):
        problem.add_metric([kind], float(kind == mirror.problem_kind))
    yield problem
    yield GaugeMetricFamily("neuronlens_live_erasures", "Concepts that are erased live.", float(len(erased)))
    yield _by_concept(erased)
    yield GaugeMetricFamily(
        "neuronlens_generation", "Counter of the live state's generation.", float(live.counter if live else 0)
    )
    info = GaugeMetricFamily("neuronlens_live_info", "Epoch and active range set.", labels=["epoch", "range_set"])
    if live:
        info.add_metric([live.epoch, live.range_set or ""], 1.0)
    yield info
    created = GaugeMetricFamily(
        "neuronlens_range_set_created_timestamp_seconds", "When the active range set was fitted, if there is one."
    )
    if snapshot and snapshot.range_set:
        created.add_metric([], snapshot.range_set.provenance.created_at)
    yield created


def _by_concept(erased: tuple[LiveErasure, ...]) -> Metric:
    """The first concepts by name have a series each, all others share one."""
    family = GaugeMetricFamily(
        "neuronlens_live_erasure",
        f"1 for each concept that is erased live; beyond {MAX_CONCEPTS} concepts, how many more.",
        labels=["concept", "method", "enforced"],
    )
    series = Counter[tuple[str, str, str]]()
    for n, each in enumerate(erased):
        concept = each.concept if n < MAX_CONCEPTS else OTHER_CONCEPTS
        series[concept, each.erasure.method, str(each.enforced).lower()] += 1
    for labels, number in series.items():
        family.add_metric(labels, float(number))
    return family
