"""Traces (OpenTelemetry): the caller's `traceparent` is kept; spans are exported if the `OTEL_…` variables say where.

A span holds numbers, identifiers and templates: no text, no path, no query, no header, no message of an error.
FastAPI's own telemetry records those, so it is off (`app.main`). Without the extra `otel` the API alone is there: a
request then belongs to its caller's trace in the log, and nothing is exported.
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
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.labels import method_of, route_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

UNTRACED = frozenset({"/livez", "/readyz", "/metrics", "/health", "/v2/health/live", "/v2/health/ready"})
"""Asked every few seconds by machines, and of no interest one by one."""
FLUSH_SECONDS = 5.0
"""Longest wait, when the server ends, for spans that are not sent yet."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Traces are exported if one of these is set."""
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_propagator = TraceContextTextMapPropagator()
_tracer: Tracer = NoOpTracer()


class TracesUnavailable(Exception):
    """Traces are asked for, but cannot be exported; says what to do."""


class Traces:
    """A span for every request, a child of the caller's. The reply names it in `traceresponse`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            otel_context.attach(otel_context.Context())  # it may begin while the one before it on its connection ends
            await self.app(scope, receive, send)
            return
        # `tracestate` is for those who call on; here it would only be a way for a caller's words into the traces
        carrier = {"traceparent": Headers(scope=scope).get("traceparent", "")}
        span = _tracer.start_span(
            method_of(scope), _propagator.extract(carrier, otel_context.Context()), kind=SpanKind.SERVER
        )
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if name := _name(span):
                    MutableHeaders(scope=message)["traceresponse"] = name
            await send(message)

        # not taken back: what the server says of a failed reply afterwards belongs to it too
        otel_context.attach(trace.set_span_in_context(span))
        try:
            await self.app(scope, receive, note)
        finally:
            method, route = method_of(scope), route_of(scope)
            span.update_name(f"{method} {route}")
            told: dict[str, str | int] = {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
            }
            span.set_attributes(told)
            span.set_attribute("neuronlens.request_id", scope["state"]["request_id"])
            if status >= 500:
                span.set_attribute("error.type", str(status))
                span.set_status(StatusCode.ERROR)
            span.end()


def _name(span: Span) -> str | None:
    known = span.get_span_context()
    if not known.is_valid or known.is_remote:  # none of ours
        return None
    return f"00-{trace.format_trace_id(known.trace_id)}-{trace.format_span_id(known.span_id)}-{known.trace_flags:02x}"


def traceparent() -> str | None:
    """The current place in a trace, for others who work for this request; None outside of any."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent")


def follow(traceparent: str | None) -> None:
    """From here on, what this task does belongs to a trace of another process, if to any."""
    otel_context.attach(_propagator.extract({"traceparent": traceparent or ""}, otel_context.Context()))


@contextmanager
def step(name: str) -> Iterator[Span]:
    """A span for a part of what the current one does. If it fails, it holds the error's type and not what it says."""
    with _tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield span
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise


def step_done(name: str, seconds_ago: float, seconds: float) -> None:
    """A span for a part that is over: it began so long ago, and took so long."""
    began = time.time_ns() - round(seconds_ago * 1e9)
    _tracer.start_span(name, start_time=began).end(began + round(seconds * 1e9))


def wanted() -> bool:
    """Whether the standard variables ask for traces."""
    on = any(os.environ.get(name) for name in ENDPOINTS)
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return on and not off and os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() != "none"


def _asking() -> str:
    return next(name for name in ENDPOINTS if os.environ.get(name))


class _Telling:
    """An exporter that says when it begins to fail and when that is over, and not why in the collector's words."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self._lost = 0

    def export(self, spans: Sequence["ReadableSpan"]) -> "SpanExportResult":
        result = self._exporter.export(spans)
        if result.name == "SUCCESS":
            if self._lost:
                logger.info("the collector takes traces again; %d spans were lost", self._lost)
            self._lost = 0
        else:
            if not self._lost:
                logger.warning("the collector of %s takes no traces; requests are answered all the same", _asking())
            self._lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


@contextmanager
def exported() -> Iterator[None]:
    """Export traces while this lasts, if the `OTEL_…` variables ask for them; then send what is left.

    The collector may be away: nothing waits for it but the end, and that for `FLUSH_SECONDS` at most.

    Raises:
        TracesUnavailable: they are asked for, and the extra `otel` is missing or what is asked for is not offered.
    """
    global _tracer
    if not wanted():
        yield
        return
    for name in PROTOCOLS:
        if os.environ.get(name) not in (None, "", "http/protobuf"):
            raise TracesUnavailable(f"{name}: traces are sent as http/protobuf only; leave it unset")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracesUnavailable(
            f"{_asking()} asks for traces, which need an extra; in a checkout of NeuronLens: pip install '.[otel]'"
        ) from None
    about = {"service.name": "neuronlens", "service.version": version("neuronlens")}
    resource = Resource.get_empty().merge(Resource(about)).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    try:
        exporter = _Telling(OTLPSpanExporter())
        provider.add_span_processor(BatchSpanProcessor(exporter))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:  # not what it says: that may be a header with a key
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
            logger.warning("the last spans were not taken within %g s, and are given up", FLUSH_SECONDS)
            exporter.shutdown()
            ending.join(1.0)
