"""Traces (OpenTelemetry): the caller's `traceparent` is kept; spans are exported if the `OTEL_…` variables say where.

A span holds numbers, identifiers and templates: no text, no path, no query, no header, no message of an error.
FastAPI's own telemetry records those, so it is off (`app.main`). Without the extra `otel` nothing is exported, and log
lines name the caller's trace alone.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Longest wait for unsent spans when the server stops."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Traces are exported if one of these variables is set."""
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_propagator = TraceContextTextMapPropagator()
_tracer: Tracer = NoOpTracer()


class TracesUnavailable(Exception):
    """Traces are requested, but cannot be exported; the message says what to do."""


def start_request(method: str, traceparent: str) -> Span:
    """Start the span of a request, a child of the caller's, and make it the current one.

    The caller's `tracestate` is not read: it would only let a caller's words into the traces.
    """
    context = _propagator.extract({"traceparent": traceparent}, otel_context.Context())
    span = _tracer.start_span(method, context, kind=SpanKind.SERVER)
    otel_context.attach(trace.set_span_in_context(span))
    return span


def response_name(span: Span) -> str | None:
    """The header `traceresponse`: the span's name; None if this process exports no traces."""
    context = span.get_span_context()
    if not context.is_valid or context.is_remote:
        return None
    flags = f"{context.trace_flags:02x}"
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{flags}"


def end_request(span: Span, method: str, route: str, status: int, request_id: str) -> None:
    """End the span of a request, named for its route."""
    span.update_name(f"{method} {route}")
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "neuronlens.request_id": request_id,
    }
    span.set_attributes(attributes)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)
    span.end()


def discard_request() -> None:
    """Leave a request out of the traces: its span is not ended, so it is never exported, and is no longer current."""
    otel_context.attach(otel_context.Context())


def traceparent() -> str | None:
    """The header `traceparent` of the current span, for other processes; None outside of a trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent")


def follow(traceparent: str | None) -> None:
    """Continue the trace of another process in this task; None: no trace."""
    otel_context.attach(_propagator.extract({"traceparent": traceparent or ""}, otel_context.Context()))


@contextmanager
def step(name: str) -> Iterator[Span]:
    """A span within the current one. If it fails, it records the type of the error and not its message."""
    with _tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield span
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise


def step_done(name: str, seconds_ago: float, seconds: float) -> None:
    """Record a span that is over: how long ago it began, and how long it took."""
    began = time.time_ns() - round(seconds_ago * 1e9)
    _tracer.start_span(name, start_time=began).end(began + round(seconds * 1e9))


def requested() -> bool:
    """Whether the standard environment variables request traces."""
    on = any(os.environ.get(name) for name in ENDPOINTS)
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return on and not off and os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() != "none"


def _endpoint_variable() -> str:
    return next(name for name in ENDPOINTS if os.environ.get(name))


class _LoggingExporter:
    """Logs when an exporter begins to fail and when it recovers, without the collector's own messages."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self._lost = 0

    def export(self, spans: Sequence["ReadableSpan"]) -> "SpanExportResult":
        result = self._exporter.export(spans)
        if result.name == "SUCCESS":
            if self._lost:
                logger.info("the trace collector accepts spans again; %d spans were lost", self._lost)
            self._lost = 0
        else:
            if not self._lost:
                logger.warning(
                    "the trace collector (%s) accepts no spans; requests are not affected", _endpoint_variable()
                )
            self._lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


@contextmanager
def exported() -> Iterator[None]:
    """Export traces inside the context, if the `OTEL_…` variables request them; on leaving, send what is left.

    Requests never wait for the collector; leaving waits for `FLUSH_SECONDS` at most.

    Raises:
        TracesUnavailable: the extra `otel` is missing, or a variable is unusable.
    """
    global _tracer
    if not requested():
        yield
        return
    for name in PROTOCOLS:
        if os.environ.get(name) not in (None, "", "http/protobuf"):
            raise TracesUnavailable(f"{name}: only http/protobuf is supported; leave it unset")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracesUnavailable(
            f"{_endpoint_variable()} needs an extra; in a checkout of NeuronLens: pip install '.[otel]'"
        ) from None
    about = {"service.name": "neuronlens", "service.version": version("neuronlens")}
    resource = Resource.get_empty().merge(Resource(about)).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    try:
        exporter = _LoggingExporter(OTLPSpanExporter())
        provider.add_span_processor(BatchSpanProcessor(exporter))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:  # its message is left out: it may quote a header with a key
        raise TracesUnavailable(
            f"an OTEL_… variable is unusable ({type(error).__name__}): see docs/observing.md"
        ) from None
    before, _tracer = _tracer, provider.get_tracer("neuronlens", version("neuronlens"))
    try:
        yield
    finally:
        _tracer = before
        ending = threading.Thread(target=provider.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)
        if ending.is_alive():
            logger.warning("the last spans were not sent within %g s and are dropped", FLUSH_SECONDS)
            exporter.shutdown()
            ending.join(1.0)
