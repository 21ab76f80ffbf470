"""Small ASGI layers around the whole application: one class, one job."""

import logging
import re
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problems import problem_response
from app.observability.logs import described

logger = logging.getLogger(__name__)

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^:@/\[\]]+))(?::[0-9]{0,5})?")


class IncompleteReply(ConnectionAbortedError):
    """A reply failed after it had started; the log has the reason, and the connection must be broken."""


class Faults:
    """Answers 500 to exceptions that nothing else handled, and logs where they came from.

    Their messages are left out: they may quote the text that caused them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_noting_start)
        except Exception as error:
            request_id = scope.get("state", {}).get("request_id")
            logger.error(
                "request %s failed: %s", request_id, type(error).__name__, extra={"exception": described(error)}
            )
            if started:
                raise IncompleteReply("a reply failed after it had started") from None
            detail = "internal error; the server's log has more under this request id"
            await problem_response(scope, "internal", detail)(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET, without the body: every layer and route inside of it sees a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_start_only(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})  # ends streams: they see a disconnect

        await self.app({**scope, "method": "GET"}, receive, send_start_only)


class HostCheck:
    """Refuses requests whose `Host` is not one of `hosts`.

    A web page can make its own name resolve to 127.0.0.1 and so reach a server that trusts everyone on its machine (DNS
    rebinding), but it cannot change the Host header.

    Args:
        disabled: returns whether any host will do; called for every request.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], disabled: Callable[[], bool] = lambda: False) -> None:
        self.app = app
        self.hosts = frozenset(hosts)
        self.disabled = disabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.disabled():
            hosts = Headers(scope=scope).getlist("host")
            host = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
            if host is None or (host["ipv6"] or host["name"]).lower() not in self.hosts:
                detail = "this server answers to loopback names only: see --host in the documentation"
                await problem_response(scope, "wrong_host", detail)(scope, receive, send)
                return
        await self.app(scope, receive, send)
