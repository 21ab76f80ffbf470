"""The metrics of a process, and a server for them on a port of its own."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from app.serving.service import Service, add_model_label, conditions, live_state_metrics, model_metric
from range_store.errors import StoreUnavailable
from range_store.storage.jobs import JOB_STATES

TARGETS = "/v1/replicas/targets"
"""Path of the targets that Prometheus discovers a fleet's replicas by, on the API's port and the metrics port."""


class ModelMetrics(Collector):
    """The metrics of each model, labelled `model`: its service's registry and its current state.

    A process with one model has the label, too, so that a series does not depend on which models are served together.
    """

    def __init__(self, services: Iterable[Service]) -> None:
        self._services = tuple(services)
        # without this, each counter has a second series with its creation time
        disable_created_metrics()  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for service in self._services:
            add_model_label(service.name, chain(service.registry.collect(), _state_metrics(service)), families)
        yield from families.values()


def targets_of(services: Iterable[Service]) -> list[TargetsOut]:
    """The replicas that serve metrics of their own, as Prometheus targets. Raises StoreUnavailable."""
    return [
        TargetsOut(targets=[each.metrics], labels={"model": service.name, "replica": each.name, "node": each.host})
        for service in services
        for each in service.store.replicas.read().replicas
        if each.metrics is not None
    ]


def start_metrics_server(
    port: int, host: str, registry: CollectorRegistry, services: Iterable[Service]
) -> tuple[WSGIServer, threading.Thread]:
    """Serve the registry and `TARGETS` without API keys. Raises OSError for an address that is invalid or in use."""
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "HEAD":
            answer({**environ, "REQUEST_METHOD": "GET"}, start_response)
            return []
        if environ["PATH_INFO"] != TARGETS:
            return metrics(environ, start_response)
        try:
            found = targets_of(services)
        except StoreUnavailable:  # Prometheus keeps the targets that it has
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the store with the list of replicas cannot be reached"]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps([each.model_dump() for each in found]).encode()]

    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    kind = type("MetricsServer", (ThreadingWSGIServer,), {"address_family": family})
    server: WSGIServer = make_server(host, port, answer, kind, _Silent)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread


class _Silent(WSGIRequestHandler):
    """Closes idle connections. Logs nothing, because a log line would contain the path."""

    timeout = 10

    def handle(self) -> None:
        with suppress(TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _state_metrics(service: Service) -> Iterator[Metric]:
    """Readiness, live state, fits and model, read for every scrape."""
    checks = conditions(service)
    yield GaugeMetricFamily(
        "neuronlens_ready",
        "1 while the model takes requests; /readyz answers 200 while all do.",
        float(all(checks.values())),
    )
    yield _by_label("neuronlens_ready_condition", "1 for each condition of readiness that holds.", "condition", checks)
    yield from live_state_metrics(service.mirror)
    fits = service.fits.known
    states = Counter(job.state for job in fits.jobs)
    by_state: dict[str, int] = {state: states[state] for state in JOB_STATES}
    yield _by_label("neuronlens_fit_jobs", "Fits of this model that are kept, by state.", "state", by_state)
    progress = fits.progress if any(fits.progress_of(job) for job in fits.jobs) else {}
    yield GaugeMetricFamily(
        "neuronlens_fit_progress_ratio",
        "Share of its texts that the running fit has processed; 0 without one.",
        progress.get("rows_done", 0) / (progress.get("rows_total") or 1),
    )
    yield model_metric(service.model)


def _by_label(name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[label])
    for each, value in values.items():
        family.add_metric([each], float(value))
    return family
