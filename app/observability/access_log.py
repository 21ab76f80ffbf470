"""The innermost of the outer layers: tells the log which request is being served, and what became of it."""

import ipaddress
import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.labels import method_of, route_of
from app.observability.logs import RequestFacts, begin

logger = logging.getLogger(__name__)

QUIET = (503,)
"""Of the statuses from 500 on, those that come by the thousand, and are counted: overload, draining, the store away."""


class AccessLog:
    """Makes every line that is logged meanwhile name the request; at its end, one line of its own.

    Args:
        every: a line at `info` for every request; else at `debug`, but for those that failed.
        generation: the one in force.
    """

    def __init__(self, app: ASGIApp, *, every: bool, generation: Callable[[], str | None]) -> None:
        self.app = app
        self.level = logging.INFO if every else logging.DEBUG
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        facts = RequestFacts(scope["state"]["request_id"], self.generation())
        begin(facts)  # and no end: what the server says of a failed reply afterwards belongs to it too
        started = time.perf_counter()
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            failed = status >= 500 and status not in QUIET
            level = logging.WARNING if failed else self.level
            if logger.isEnabledFor(level):
                method, route = method_of(scope), route_of(scope)
                told = {
                    "method": method,
                    "route": route,
                    "status": status,
                    "seconds": round(time.perf_counter() - started, 6),
                    "texts": facts.texts,
                    "key": facts.key,
                    "client": _address(scope),
                }
                logger.log(level, "%s %s: %d", method, route, status, extra=told)


def _address(scope: Scope) -> str | None:
    """The caller's address; None for what is none, since a proxy's header may say anything."""
    try:
        return str(ipaddress.ip_address((scope.get("client") or ("",))[0].partition("%")[0]))
    except ValueError:
        return None
