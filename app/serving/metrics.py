"""What a process tells Prometheus when asked: of each model readiness, live state and work; and its own figures."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.schemas.replies import TargetsOut
from app.serving.readiness import conditions
from app.serving.service import Service, add_model_label, live_state_metrics, model_metric
from range_store.errors import StoreUnavailable
from range_store.storage.jobs import JOB_STATES

TARGETS = "/v1/replicas/targets"
"""Path of what Prometheus finds the replicas of a fleet by, on the API's port and on that of the metrics."""


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
            add_model_label(service.name, chain(service.registry.collect(), _State(service).collect()), families)
        yield from families.values()


def targets_of(services: Iterable[Service]) -> list[TargetsOut]:
    """Where replicas of the models serve metrics of their own. Raises StoreUnavailable."""
    return [
        TargetsOut(targets=[each.metrics], labels={"model": service.name, "replica": each.name, "node": each.host})
        for service in services
        for each in service.store.replicas.read().replicas
        if each.metrics is not None
    ]


def start_metrics_server(
    port: int, host: str, registry: CollectorRegistry, services: Iterable[Service]
) -> tuple[WSGIServer, threading.Thread]:
    """Serve the registry, and `TARGETS`, without keys. Raises OSError: there is no such address, or it is taken."""
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "HEAD":
            answer({**environ, "REQUEST_METHOD": "GET"}, start_response)
            return []
        if environ["PATH_INFO"] != TARGETS:
            return metrics(environ, start_response)
        try:
            found = targets_of(services)
        except StoreUnavailable:  # Prometheus then keeps those that it knows
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the store does not say which replicas there are"]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps([each.model_dump() for each in found]).encode()]

    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    kind = type("MetricsServer", (ThreadingWSGIServer,), {"address_family": family})
    server: WSGIServer = make_server(host, port, answer, kind, _Silent)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread


class _Silent(WSGIRequestHandler):
    """Ends connections that stay silent, and logs no request: it would be with its path."""

    timeout = 10

    def handle(self) -> None:
        with suppress(TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class _State:
    """A model's readiness, what its mirror knows, what is erased now, and what is loaded: read for every scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield from self._readiness()
        yield from live_state_metrics(self._service.mirror)
        yield from self._fits()
        yield model_metric(self._service.model)

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

    def _fits(self) -> Iterator[Metric]:
        jobs = self._service.fits.known
        states = Counter(job.state for job in jobs.jobs)
        by_state = GaugeMetricFamily(
            "neuronlens_fit_jobs", "Fits of this model that are kept, by state.", labels=["state"]
        )
        for state in JOB_STATES:
            by_state.add_metric([state], float(states[state]))
        yield by_state
        progress = jobs.progress if any(jobs.progress_of(job) for job in jobs.jobs) else {}
        yield GaugeMetricFamily(
            "neuronlens_fit_progress_ratio",
            "Share of its texts that the fit under way has done; 0 where none is.",
            progress.get("rows_done", 0) / (progress.get("rows_total") or 1),
        )
