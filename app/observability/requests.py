"""The outermost layer: one record of every request, for the access log, the HTTP metrics and the trace span."""

import ipaddress
import logging
import random
import re
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability import tracing
from app.observability.logs import RequestFacts, begin

logger = logging.getLogger(__name__)

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
"""Buckets of the request times. A latency objective must be one of them, or the share that meets it is a guess."""
ALERTED = (200, 424, 429, 500, 503, 504)
"""Statuses whose counters start at 0 where alerts watch: an alert misses the first burst of a new series. 424 is how
text-embeddings-inference reports that the model failed."""
QUIET = (503,)
"""Server errors that are not logged as warnings: overload, draining and a lost store come by the thousand."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestObserver:
    """Gives a request its id, and records its route, status and time in the log, the metrics and a trace.

    Every line that is logged meanwhile names the request. Its own line, at the end, has the template of the path and
    never the path.

    Args:
        log_all: log every request at `info`; else at `debug`, except those that failed.
        generation: returns the generation in force, for lines of requests that learn of no other.
        alerted: templates of the routes whose POST alerts watch.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        *,
        log_all: bool = False,
        generation: Callable[[], str | None] = lambda: None,
        alerted: Iterable[str] = (),
    ) -> None:
        self.app = app
        self.level = logging.INFO if log_all else logging.DEBUG
        self.generation = generation
        self.requests = Counter(
            "neuronlens_http_requests", "HTTP requests.", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "neuronlens_http_request_seconds",
            "Time to answer an HTTP request, by class of its status: a refusal is quick, and says nothing of answers.",
            ["method", "route", "status_class"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "neuronlens_http_requests_in_flight", "HTTP requests that are not answered yet.", registry=registry
        )
        for route in alerted:
            for status in ALERTED:
                self.requests.labels("POST", route, str(status))
            self.seconds.labels("POST", route, "2xx")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _VALID_ID.fullmatch(given) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        method = scope["method"] if scope["method"] in _METHODS else "other"
        facts = RequestFacts(request_id, self.generation())
        # neither is taken back: what the server logs about a failed reply afterwards belongs to the request too
        begin(facts)
        span = tracing.start_request(method, Headers(scope=scope).get("traceparent", ""))
        started = time.perf_counter()
        status, counted = 500, False

        def count() -> None:
            nonlocal counted
            counted = True
            self.in_flight.dec()
            route = route_template(scope)
            self.requests.labels(method, route, str(status)).inc()
            self.seconds.labels(method, route, f"{status // 100}xx").observe(time.perf_counter() - started)

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if is_traced(scope) and (name := tracing.response_name(span)):
                    headers["traceresponse"] = name
                if headers.get("content-type", "").startswith("text/event-stream"):
                    count()  # the stream has its answer, and goes on for as long as the client listens
            await send(message)

        self.in_flight.inc()
        try:
            await self.app(scope, receive, observe)
        finally:
            if not counted:
                count()
            if not is_traced(scope):
                tracing.discard_request()
            self._log(scope, facts, method, status, time.perf_counter() - started)
            if is_traced(scope):
                tracing.end_request(span, method, route_template(scope), status, request_id)

    def _log(self, scope: Scope, facts: RequestFacts, method: str, status: int, seconds: float) -> None:
        level = logging.WARNING if status >= 500 and status not in QUIET else self.level
        if not logger.isEnabledFor(level):
            return
        route = route_template(scope)
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "texts": facts.texts,
            "key": facts.key,
            "client": _address(scope),
        }
        logger.log(level, "%s %s: %d", method, route, status, extra=fields)


def new_request_id() -> str:
    """A random id for a request that brought none."""
    return f"{random.getrandbits(128):032x}"


def route_of(scope: Scope) -> BaseRoute | None:
    """The route that took a request; None if there is none.

    Routes and the router's 404 leave their mark in the scope's state. Where they were not reached, because a layer
    before them replied, and for pages of the documentation, the router's routes are matched here.
    """
    state = scope.setdefault("state", {})
    if "route" not in state:
        state["route"] = _match({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope)
    route: BaseRoute | None = state["route"]
    return route


def _match(scope: Scope) -> BaseRoute | None:
    other = None
    for route in scope["app"].routes if "app" in scope else ():
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return route  # type: ignore[no-any-return]
        if match is Match.PARTIAL:
            other = other or route
    return other


def route_template(scope: Scope) -> str:
    """The path template of a request's route, never the path; `unmatched` if there is no route."""
    return getattr(route_of(scope), "path_format", None) or "unmatched"


def is_traced(scope: Scope) -> bool:
    """Whether a request gets a span: probes do not."""
    return getattr(getattr(route_of(scope), "info", None), "traced", True)


def _address(scope: Scope) -> str | None:
    """The caller's address; None if it is no address, since a proxy's header may hold anything."""
    try:
        return str(ipaddress.ip_address((scope.get("client") or ("",))[0].partition("%")[0]))
    except ValueError:
        return None
