"""The FastAPI application around a service."""

from collections.abc import Sequence
from importlib.metadata import version

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry

from app.http import documentation
from app.http.bodies import BodyLimits, Compression
from app.http.middleware import Faults, HeadAsGet, HostCheck
from app.http.problems import install_error_handlers
from app.http.routing import Check, add_routers, routes_of
from app.live.store_threads import StoreThreads
from app.live.wait_for_replicas import ReplicaWaiter
from app.observability.requests import RequestObserver
from app.routes import (
    activations,
    audit,
    capabilities,
    classify,
    console,
    erasures,
    events,
    fits,
    inspection,
    range_sets,
    replicas,
    reports,
    service,
)
from app.routes.dropin import health, hf, tei, tokenize, v2, vllm
from app.security.auth import Authentication
from app.serving.classification import ClientDisconnected, client_disconnected
from app.serving.metrics import ModelMetrics
from app.serving.models import ServedModels
from app.serving.service import Service, register_process_metrics
from app.settings import LOOPBACK, Settings

DESCRIPTION = """Classify text with a transformer while erasing chosen concepts from its activations, live.

Each concept occupies its own range of a neuron's values (arXiv 2502.06809): a neuron is zeroed only while its value
lies in the range fitted for the concept. Errors below `/v1` are `application/problem+json`; on the routes of other
servers' protocols they have the members that clients of those servers read."""

TAGS = {
    "classify": "Classification of texts.",
    "erasures": "Live erasures.",
    "range sets": "Published range sets.",
    "fits": "Fits in a process beside the server.",
    "inspection": "Neurons and their ranges.",
    "reports": "Reports of evaluations.",
    "service": "Probes, metrics, models.",
    "Hugging Face": "The protocol of Inference Endpoints.",
    "text-embeddings-inference": "The protocol of its classifiers.",
    "vLLM": "The protocol of its classifiers.",
    "Open Inference Protocol": "The protocol of KServe, Triton and MLServer.",
}
ROUTERS = (
    service.router,
    capabilities.router,
    classify.router,
    erasures.router,
    events.router,
    audit.router,
    range_sets.router,
    replicas.router,
    inspection.router,
    activations.router,
    reports.router,
    fits.router,
    console.router,
    hf.router,
    tei.router,
    vllm.router,
    tokenize.router,
    health.router,
    v2.router,
)
CORS_REQUEST_HEADERS = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "Last-Event-ID",
    "traceparent",
    "tracestate",
    "X-API-Key",
    "X-NeuronLens-Min-Generation",
    "X-Request-ID",
    "X-Request-Timeout",
)
CORS_RESPONSE_HEADERS = (
    "ETag",
    "Location",
    "Retry-After",
    "X-NeuronLens-Erased",
    "X-NeuronLens-Generation",
    "X-NeuronLens-Range-Set",
    "X-NeuronLens-Source",
    "X-Request-ID",
    "traceresponse",
)


def create_app(settings: Settings, running: Service | Sequence[Service] = ()) -> FastAPI:
    """The application around one service or several, each of another model; the first is the default one.

    They share `settings`, and the keyring of the first. `state.registry` of the application has everything that
    `/metrics` shows: each service's own registry, under a label `model`, and metrics of the process. Without a service
    only its OpenAPI document is of use.

    Raises:
        ValueError: two services have the same name.
    """
    services = (running,) if isinstance(running, Service) else tuple(running)
    models = ServedModels(services) if services else None
    app: FastAPI = FastAPIOffline(  # its /docs loads no scripts from other hosts
        title="NeuronLens",
        version=version("neuronlens"),
        description=DESCRIPTION,
        openapi_tags=[{"name": name, "description": description} for name, description in TAGS.items()],
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI's own would record paths, queries and messages of errors; `app.observability` records none of those
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    add_routers(app, ROUTERS)
    documentation.document(app)
    install_error_handlers(app)
    app.add_exception_handler(ClientDisconnected, client_disconnected)
    registry = CollectorRegistry()
    checks: list[Check] = []
    if models is not None:
        registry.register(ModelMetrics(models))
        register_process_metrics(registry)
        authentication = Authentication(models.default.keyring, settings.rate_limit, registry)
        checks = [authentication.check, models.refuse_if_full]
    app.state.models = models
    app.state.registry = registry
    app.state.checks = checks
    app.state.bodies = BodyLimits(
        registry,
        max_bytes=settings.max_body_bytes,
        max_seconds=settings.body_timeout,
        max_held_bytes=settings.max_held_body_bytes,
    )
    app.state.store_threads = StoreThreads()
    app.state.scrapes = CapacityLimiter(2)  # threads of their own: the others may all wait for the store or for files
    app.state.replica_waiter = ReplicaWaiter(app.state.store_threads, settings.request_timeout)
    _add_layers(app, settings, models)
    return app


def _add_layers(app: FastAPI, settings: Settings, models: ServedModels | None) -> None:
    """Add the layers around the router; the last one added is the outermost."""
    if settings.loopback and models is not None:
        keyring = models.default.keyring
        app.add_middleware(HostCheck, hosts=LOOPBACK, disabled=lambda: keyring.in_force)
    app.add_middleware(Compression)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Faults)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_RESPONSE_HEADERS,
        )
    app.add_middleware(
        RequestObserver,
        registry=app.state.registry,
        log_all=settings.access_log,
        generation=lambda: _generation(models),
        alerted=[route.path_format for route in routes_of(app) if route.info.classifies],
    )


def _generation(models: ServedModels | None) -> str | None:
    """The generation in force, if there is only one model; of several, the request decides."""
    snapshot = models.only.mirror.snapshot if models is not None and models.only is not None else None
    return snapshot.live.generation if snapshot is not None else None
