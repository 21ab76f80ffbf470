"""Small pure-ASGI layers around the application: one class, one job."""

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problems import domain_problem, new_request_id, problem_response
from app.observability.labels import method_of, route_of
from app.observability.logs import described

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^:@/\[\]]+))(?::[0-9]{0,5})?")
_INFERRED = re.compile(r"/v2/models/(.+?)(?:/versions/[^/]+)?/infer", re.DOTALL)
"""A path of the Open Inference Protocol, and the model in it."""


class RequestId:
    """Takes a sane `X-Request-ID` or makes one, and echoes it on every reply."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def echo(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self.app(scope, receive, echo)


class HalfReply(ConnectionAbortedError):
    """A reply failed half-way, and that is logged: breaking the connection is all that is left to do."""


class Faults:
    """Answers 500 to what nothing else caught, and logs where it came from.

    Not what it said: the message of an exception may quote the text that caused it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note)
        except HalfReply:
            raise
        except Exception as error:
            request_id = scope.get("state", {}).get("request_id")
            logger.error(
                "request %s failed: %s", request_id, type(error).__name__, extra={"exception": described(error)}
            )
            if started:  # half a reply is out: only breaking the connection can still tell the client
                raise HalfReply("a reply failed half-way") from None
            detail = "this is a fault of the service; its log says more under the request id"
            await problem_response("internal", detail, request_id)(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET, without the body: every layer and route inside of it sees a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def only_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})  # a stream then sees that its client is gone

        await self.app({**scope, "method": "GET"}, receive, only_start)


class HostCheck:
    """Refuses requests whose `Host` is not one of `hosts`.

    A page in a browser can make its own name resolve to 127.0.0.1 and so reach a server that trusts whoever is on the
    machine (DNS rebinding); but it cannot change the Host header. `off`: asked each time whether any host will do.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], off: Callable[[], bool] = lambda: False) -> None:
        self.app = app
        self.hosts = frozenset(hosts)
        self.off = off

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.off():
            hosts = Headers(scope=scope).getlist("host")
            host = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
            if host is None or (host["ipv6"] or host["name"]).lower() not in self.hosts:
                request_id = scope.get("state", {}).get("request_id")
                detail = "this server answers to loopback names only: see --host in the documentation"
                await problem_response("wrong_host", detail, request_id)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class FullQueue:
    """Refuses what is posted to routes that take a model's time while that model is full, before the body is read.

    Args:
        classifying: the templates of these routes.
        named_in_body: those of them whose body may name the model.
        default: the model of the other ones where nothing names one.
        refusal: why a model takes no request now; asked with None where only the body can name the model.
    """

    def __init__(
        self,
        app: ASGIApp,
        classifying: Collection[str],
        named_in_body: Collection[str],
        default: str,
        refusal: Callable[[str | None], Exception | None],
    ) -> None:
        self.app = app
        self.classifying = classifying
        self.named_in_body = named_in_body
        self.default = default
        self.refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (route := route_of(scope)) in self.classifying:
            full = self.refusal(self._model(scope, route))  # asking counts
            if full is not None:
                await domain_problem(full, scope.get("state", {}).get("request_id"))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _model(self, scope: Scope, route: str) -> str | None:
        """Which model is meant, as far as can be told without the body; None: that says it."""
        if in_path := _INFERRED.fullmatch(scope["path"]):
            return in_path[1]
        in_query = QueryParams(scope["query_string"]).get("model")
        return in_query or (None if route in self.named_in_body else self.default)


class HttpMetrics:
    """Counts requests by route template, method and status, times them, and tells how many are under way.

    Args:
        alerted: templates of routes whose POST alerts watch.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry, alerted: Iterable[str] = ()) -> None:
        self.app = app
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
        self.under_way = Gauge(
            "neuronlens_http_requests_in_flight", "HTTP requests that are not answered yet.", registry=registry
        )
        for route in alerted:
            for status in ALERTED:  # a counter that is born at its first burst hides it: rates see what comes after
                self.requests.labels("POST", route, str(status))
            self.seconds.labels("POST", route, "2xx")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status, answered = 500, False

        def count() -> None:
            nonlocal answered
            answered = True
            self.under_way.dec()
            method, route = method_of(scope), route_of(scope)
            self.requests.labels(method, route, str(status)).inc()
            self.seconds.labels(method, route, f"{status // 100}xx").observe(time.perf_counter() - started)

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream"):
                    count()  # it has its answer, which goes on for as long as somebody listens
            await send(message)

        self.under_way.inc()
        try:
            await self.app(scope, receive, note)
        finally:
            if not answered:
                count()


ALERTED = (200, 424, 429, 500, 503, 504)
"""Statuses that are counted from 0 on where alerts watch; 424 is how `/predict` says that the model failed."""
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
"""Edges of the times: a latency objective must lie on one of them, or the share that meets it is a guess."""
