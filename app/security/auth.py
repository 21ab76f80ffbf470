"""Who may call what (docs/http.md "Keys"): one table, and the layer that keeps it before a body is read."""

import time
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from app.http.problems import documented, header, problem_response
from app.observability.logs import note
from app.rates import rate
from app.security.keyring import REASONS, Keyring, Refused
from range_store.storage.api_keys import ApiKey, Scope

OPEN = frozenset({"/livez", "/readyz", "/metrics", "/openapi.json", "/health", "/v2/health/live", "/v2/health/ready"})
"""Paths that never need a key, besides the documentation below /docs and /static-offline-docs."""
INFER = frozenset({"/v1/classify", "/v1/tokenize", "/v1/activations", "/", "/predict", "/classify", "/tokenize"})
"""Paths whose POST computes answers and changes nothing."""
ADMIN = frozenset({"/v1/audit"})
"""Paths that only `admin` may read."""


def scope_of(method: str, path: str) -> Scope | None:
    """The scope that a call needs; None if it is open. What is not known to be harmless needs `admin`."""
    if path in OPEN or path == "/docs" or path.startswith(("/docs/", "/static-offline-docs/")):
        return None
    if method in ("GET", "HEAD") and (path == "/" or path.startswith("/console/")):
        return None  # the console: a page that asks for a key itself
    if method == "POST" and (path in INFER or (path.startswith("/v2/models/") and path.endswith("/infer"))):
        return "infer"
    return "read" if method in ("GET", "HEAD") and path not in ADMIN else "admin"


@dataclass(frozen=True)
class Caller:
    """Who calls: a key, or whoever reaches a server that needs none."""

    key: ApiKey | None

    @property
    def by(self) -> str:
        """What the audit calls them."""
        return f"key:{self.key.name}" if self.key else "http"

    def may(self, scope: Scope) -> bool:
        """Whether they have a scope."""
        return self.key is None or self.key.may(scope)


ANYONE = Caller(None)


async def get_caller(request: Request) -> Caller:
    """The caller that `Authentication` found."""
    return getattr(request.state, "caller", ANYONE)


CallerDep = Annotated[Caller, Depends(get_caller)]


def check_compare(caller: Caller, enforced: bool) -> None:
    """Raises ApiError (403) if an answer without erasure is asked for where an operator enforces one."""
    check_shown(caller, enforced, "compare")


def check_shown(caller: Caller, enforced: bool, what: str) -> None:
    """Raises ApiError (403) if `what` shows what an operator hides by an enforced erasure."""
    if enforced and not caller.may("admin"):
        detail = f"{what}: an erasure is enforced, so only a key with scope admin may ask"
        raise Refused("wrong_scope", detail)


class Authentication:
    """Lets in who has a key with the scope of the call, as long as keys are in force, and within the key's rate.

    Args:
        rate_limit: calls per time of one key that has no limit of its own, like "600/minute"; None: no limit. Where no
            keys are in force, of one address. Each server counts for itself.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, rate_limit: str | None, registry: CollectorRegistry) -> None:
        self.app = app
        self.keyring = keyring
        self.rate_limit = rate(rate_limit) if rate_limit else None
        self.limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self.rejections = Counter(
            "neuronlens_auth_rejections",
            "Calls refused before they were read, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in REASONS:
            self.rejections.labels(reason)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            needed = scope_of(scope["method"], scope["path"])
            if needed is not None:
                try:
                    scope.setdefault("state", {})["caller"] = self._admit(scope, needed)
                except Refused as error:
                    self.rejections.labels(error.code).inc()
                    request_id = scope.get("state", {}).get("request_id")
                    await problem_response(error.code, error.detail, request_id, error.headers)(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _admit(self, scope: AsgiScope, needed: Scope) -> Caller:
        if not self.keyring.in_force:
            self._count((scope.get("client") or ("",))[0], self.rate_limit)
            return ANYONE
        key = self.keyring.identify(token_of(Headers(scope=scope)))
        note(key=key.name)
        self._count(key.id, rate(key.rate_limit) if key.rate_limit else self.rate_limit)
        if not key.may(needed):
            have = ", ".join(key.scopes)
            raise Refused("wrong_scope", f"this call needs a key with scope {needed}; this one has {have}")
        return Caller(key)

    def _count(self, who: str, limit: RateLimitItem | None) -> None:
        if limit is not None and not self.limiter.hit(limit, who):
            stats = self.limiter.get_window_stats(limit, who)
            seconds = max(1, round(stats.reset_time - time.time()))
            raise Refused("rate_limited", f"too many calls: the limit is {limit}; try again in {seconds} s", seconds)


def token_of(headers: Headers) -> str | None:
    """The token of a request, by either header; None without one."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


_ASKS = header("WWW-Authenticate", "How to send a key.")
_REFUSALS = {
    status: said | ({"headers": _ASKS} if status in (401, 403) else {})
    for status, said in documented(401, 403, 429, 503).items()
}


def document_keys(openapi: dict[str, Any]) -> None:
    """Write into an OpenAPI document which calls need a key, of which scope, and how they are refused."""
    openapi.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where keys are in force."},
        "apiKey": {
            "type": "apiKey",
            "in": "header",
            "name": "X-API-Key",
            "description": "The same, in another header.",
        },
    }
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            scope = scope_of(method.upper(), path)
            if scope is not None:
                operation["security"] = [{"bearer": [scope]}, {"apiKey": [scope]}]
                operation["responses"] = {
                    **{str(status): said for status, said in _REFUSALS.items()},
                    **operation["responses"],
                }
