"""What a process tells Prometheus when asked: of each model readiness, live state and work; and its own figures."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import chain
from typing import get_args

from prometheus_client import CollectorRegistry, Info, PlatformCollector, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.fit_jobs import STATES
from app.fit_process import progress_of
from app.readiness import conditions
from app.service import MOST_CONCEPTS, OTHER_CONCEPTS, Service
from range_store.live import LiveErasure
from range_store.mirror import Trouble


class ModelMetrics(Collector):
    """Everything that is told of each model, under a label `model`: its service's own registry, and its state.

    A process of one model has the label too, so that a series is the same one whoever else is served beside it.
    """

    def __init__(self, services: Iterable[Service]) -> None:
        self._services = tuple(services)
        # else a second series beside each counter says when that was made
        disable_created_metrics()  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for service in self._services:
            for found in chain(service.registry.collect(), _State(service).collect()):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                family.samples += [
                    each._replace(labels={"model": service.name, **each.labels}) for each in found.samples
                ]
        yield from families.values()


def register_process(registry: CollectorRegistry) -> None:
    """Register what is told of the process itself."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    build = Info("neuronlens_build", "Version of this software.", registry=registry)
    build.info({"version": version("neuronlens")})


class _State:
    """A model's readiness, what its mirror knows, what is erased now, and what is loaded: read for every scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield from self._readiness()
        yield from self._live_state()
        yield from self._fits()
        yield self._loaded()

    def _readiness(self) -> Iterator[Metric]:
        checks = conditions(self._service)
        yield GaugeMetricFamily(
            "neuronlens_ready",
            "1 while the model takes requests; /readyz answers 200 while all do.",
            float(all(checks.values())),
        )
        by_condition = GaugeMetricFamily(
            "neuronlens_ready_condition", "1 for each condition of readiness that holds.", labels=["condition"]
        )
        for condition, holds in checks.items():
            by_condition.add_metric([condition], float(holds))
        yield by_condition

    def _live_state(self) -> Iterator[Metric]:
        mirror = self._service.mirror
        snapshot, trouble = mirror.snapshot, mirror.trouble
        live = snapshot.live if snapshot else None
        erased = live.at(time.time()) if live else ()
        yield GaugeMetricFamily("neuronlens_store_up", "1 if the store answered last time.", float(mirror.store_up))
        yield GaugeMetricFamily(
            "neuronlens_snapshot_age_seconds",
            "Time since the live state was last known to be the newest.",
            mirror.age(),
        )
        yield GaugeMetricFamily(
            "neuronlens_replicas",
            "Live replicas of the model, this one too, at its last report; 0 while it makes none.",
            float(mirror.reporter.live if mirror.reporter else 0),
        )
        problem = GaugeMetricFamily(
            "neuronlens_live_state_problem",
            "1 for the reason why the live state is not known to be the newest, if there is one.",
            labels=["problem"],
        )
        for kind in get_args(Trouble):
            problem.add_metric([kind], float(kind == trouble))
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

    def _fits(self) -> Iterator[Metric]:
        jobs = self._service.jobs
        found = jobs.list()
        states = Counter(job.state for job in found)
        by_state = GaugeMetricFamily(
            "neuronlens_fit_jobs", "Fits of this model that are remembered, by state.", labels=["state"]
        )
        for state in STATES:
            by_state.add_metric([state], float(states[state]))
        yield by_state
        done = 0.0
        for progress in (progress_of(jobs.place(job.id)) for job in found if job.pid is not None):
            done = progress.get("rows_done", 0) / (progress.get("rows_total") or 1)
        yield GaugeMetricFamily(
            "neuronlens_fit_progress_ratio",
            "Share of its texts that the fit under way has done; 0 where none is.",
            done,
        )

    def _loaded(self) -> Metric:
        model, identity = self._service.model, self._service.model.identity
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


def _by_concept(erased: tuple[LiveErasure, ...]) -> Metric:
    """The first concepts by name have series of their own, all others are counted together."""
    family = GaugeMetricFamily(
        "neuronlens_live_erasure",
        f"1 for each concept that is erased live; beyond {MOST_CONCEPTS} concepts, how many more.",
        labels=["concept", "method", "enforced"],
    )
    series = Counter[tuple[str, str, str]]()
    for n, each in enumerate(erased):
        concept = each.concept if n < MOST_CONCEPTS else OTHER_CONCEPTS
        series[concept, each.erasure.method, str(each.enforced).lower()] += 1
    for labels, number in series.items():
        family.add_metric(labels, float(number))
    return family
