"""The FastAPI application around a service."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry

from app.http import problems
from app.http.bodies import BodyLimit, BodyMemory, Compression, GzipBodies
from app.http.middleware import Faults, FullQueue, HeadAsGet, HostCheck, HttpMetrics, RequestId
from app.http.problems import Problem
from app.http.templates import Templates
from app.live.store_threads import StoreThreads
from app.live.wait_for_replicas import ReplicaWaiter
from app.observability.access_log import AccessLog
from app.observability.tracing import Traces
from app.routes import (
    activations,
    audit,
    capabilities,
    classify,
    console,
    dropin,
    erasures,
    events,
    fits,
    inspection,
    range_sets,
    replicas,
    reports,
    service,
)
from app.routes.dropin.dialect import Dialects
from app.routes.dropin.v2_binary import BinaryTensors
from app.security import auth
from app.security.auth import Authentication
from app.serving.classification import ClientGone, client_gone
from app.serving.metrics import ModelMetrics
from app.serving.models import ServedModels
from app.serving.service import Service, register_process_metrics
from app.settings import LOOPBACK, Settings

DESCRIPTION = """Classify text with a transformer while erasing chosen concepts from its activations, live.

Each concept occupies its own range of a neuron's values (arXiv 2502.06809): a neuron is zeroed only while its value
lies in the range fitted for the concept. Errors below `/v1` are `application/problem+json`; on the routes of other
servers, what their clients read."""

CLASSIFYING = ("/v1/classify", *dropin.CLASSIFYING)
"""Templates of the routes whose POST takes the model's time: what a full queue refuses, and alerts watch."""
NAMED_IN_BODY = ("/v1/classify", "/classify")
"""Those of them whose body may say which model is meant."""


def create_app(settings: Settings, running: Service | Sequence[Service] = ()) -> FastAPI:
    """The application around one service or several, each of another model; the first is meant where none is named.

    They share `settings`, and the keyring of the first. Its `state.registry` has everything that `/metrics` shows: each
    service's own registry, under a label `model`, and what is about the process. Without a service only its OpenAPI is
    of use.

    Raises:
        ValueError: two services have the same name.
    """
    services = (running,) if isinstance(running, Service) else tuple(running)
    served = ServedModels(services) if services else None
    app: FastAPI = FastAPIOffline(  # its /docs asks no other host for scripts
        title="NeuronLens",
        version=version("neuronlens"),
        description=DESCRIPTION,
        openapi_tags=[
            {"name": "classify", "description": "Answers."},
            {"name": "erasures", "description": "What is erased live."},
            {"name": "range sets", "description": "What was fitted."},
            {"name": "fits", "description": "Fitting beside the server."},
            {"name": "inspection", "description": "Neurons and their ranges."},
            {"name": "reports", "description": "What evaluations measured."},
            {"name": "service", "description": "Probes, metrics, models."},
            *dropin.TAGS,
        ],
        redoc_url=None,
        responses=problems.documented(*problems.ANY) | {500: {"model": Problem}},  # puts its schema in
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,
        # it would record paths, queries and what errors say; `app.observability.tracing` has the spans instead
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    problems.install(app)
    app.add_exception_handler(ClientGone, client_gone)
    for module in (
        service,
        capabilities,
        classify,
        erasures,
        events,
        audit,
        range_sets,
        replicas,
        fits,
        inspection,
        activations,
        reports,
        console,
    ):
        app.include_router(module.router)
    for router in dropin.ROUTERS:
        app.include_router(router)
    registry = CollectorRegistry()
    if served is not None:
        registry.register(ModelMetrics(served))
        register_process_metrics(registry)
    app.state.served = served
    app.state.registry = registry
    app.state.templates = Templates(app.routes)
    app.state.store_threads = StoreThreads()
    app.state.scrapes = CapacityLimiter(2)  # on threads of their own: others may wait for the store or for files
    app.state.replica_waiter = ReplicaWaiter(app.state.store_threads, settings.request_timeout)
    _document(app)
    # the last added is the outermost
    app.add_middleware(BinaryTensors, infers=dropin.infers)
    app.add_middleware(Faults)
    memory = BodyMemory(settings.max_held_body_bytes, registry)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.body_timeout, memory=memory)
    app.add_middleware(GzipBodies, limit=settings.max_body_bytes)
    if served is not None:
        keyring = served.default.keyring
        app.add_middleware(
            FullQueue,
            classifying=CLASSIFYING,
            named_in_body=NAMED_IN_BODY,
            default=served.default.name,
            refusal=served.refusal,
        )
        app.add_middleware(Authentication, keyring=keyring, rate_limit=settings.rate_limit, registry=registry)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=[
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
            ],
            expose_headers=[
                "ETag",
                "Location",
                "Retry-After",
                "X-NeuronLens-Erased",
                "X-NeuronLens-Generation",
                "X-NeuronLens-Range-Set",
                "X-NeuronLens-Source",
                "X-Request-ID",
                "traceresponse",
            ],
        )
    if settings.loopback and served is not None:
        app.add_middleware(HostCheck, hosts=LOOPBACK, off=lambda: keyring.in_force)
    app.add_middleware(Faults)  # of the layers above; the first one's replies go through them, and so get their headers
    app.add_middleware(Dialects, dialect_of=dropin.dialect_of)
    app.add_middleware(Compression)
    app.add_middleware(HeadAsGet)
    app.add_middleware(HttpMetrics, registry=registry, alerted=CLASSIFYING)
    app.add_middleware(AccessLog, every=settings.access_log, generation=lambda: _generation(served))
    app.add_middleware(Traces)
    app.add_middleware(RequestId)
    return app


def _generation(served: ServedModels | None) -> str | None:
    """The one in force, where there is only one model; of several, the request tells which."""
    only = served.only if served is not None else None
    snapshot = only.mirror.snapshot if only is not None else None
    return snapshot.live.generation if snapshot is not None else None


def _document(app: FastAPI) -> None:
    """Have the OpenAPI document, made once, finished before anybody sees it."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            auth.document_keys(make())
            problems.finish(make())
            dropin.document_dialects(make())
        return make()

    app.openapi = openapi  # type: ignore[method-assign]
