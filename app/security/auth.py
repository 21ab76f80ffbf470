"""Authentication of requests by API keys, before their bodies are read (docs/http.md "Keys")."""

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers
from starlette.types import Scope

from app.http.routing import RouteInfo
from app.observability.logs import note
from app.rates import rate
from app.security.keyring import REASONS, Keyring, Refused
from range_store.storage.api_keys import ApiKey
from range_store.storage.api_keys import Scope as KeyScope


def default_key_scope(method: str) -> KeyScope:
    """The scope that a call needs which no route takes: what is not known to be harmless needs `admin`."""
    return "read" if method in ("GET", "HEAD") else "admin"


@dataclass(frozen=True)
class Caller:
    """The caller of a request: an API key, or None on a server that needs none."""

    key: ApiKey | None

    @property
    def by(self) -> str:
        """The caller's name in the audit."""
        return f"key:{self.key.name}" if self.key else "http"

    def may(self, scope: KeyScope) -> bool:
        """Whether the caller has a scope."""
        return self.key is None or self.key.allows(scope)


ANYONE = Caller(None)


async def get_caller(request: Request) -> Caller:
    """The caller that `Authentication` noted; anyone where a route needs no key."""
    return getattr(request.state, "caller", ANYONE)


CallerDep = Annotated[Caller, Depends(get_caller)]


def check_may_see(caller: Caller, enforced: bool, what: str) -> None:
    """Raises Refused (403) if `what` shows what an enforced erasure hides, and the caller is not an admin."""
    if enforced and not caller.may("admin"):
        raise Refused("wrong_scope", f"{what}: an erasure is enforced, so this needs a key with scope admin")


class Authentication:
    """Refuses calls without an API key of the route's scope, while keys are in force, or beyond the key's rate.

    Args:
        rate_limit: calls per time of a key that has no limit of its own, such as "600/minute"; None: no limit. While no
            keys are in force it holds for each address. Each server counts for itself.
    """

    def __init__(self, keyring: Keyring, rate_limit: str | None, registry: CollectorRegistry) -> None:
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

    def check(self, scope: Scope, route: RouteInfo | None) -> None:
        """Note the caller in the state of a request; raises Refused if it must not go on."""
        needed = route.key_scope if route is not None else default_key_scope(scope["method"])
        if needed is None:
            return
        try:
            scope["state"]["caller"] = self._admit(scope, needed)
        except Refused as error:
            self.rejections.labels(error.code).inc()
            raise

    def _admit(self, scope: Scope, needed: KeyScope) -> Caller:
        if not self.keyring.in_force:
            self._count((scope.get("client") or ("",))[0], self.rate_limit)
            return ANYONE
        key = self.keyring.identify(token_of(Headers(scope=scope)))
        note(key=key.name)
        self._count(key.id, rate(key.rate_limit) if key.rate_limit else self.rate_limit)
        if not key.allows(needed):
            have = ", ".join(key.scopes)
            raise Refused("wrong_scope", f"this call needs a key with scope {needed}; this one has {have}")
        return Caller(key)

    def _count(self, who: str, limit: RateLimitItem | None) -> None:
        if limit is not None and not self.limiter.hit(limit, who):
            stats = self.limiter.get_window_stats(limit, who)
            seconds = max(1, round(stats.reset_time - time.time()))
            raise Refused("rate_limited", f"too many calls: the limit is {limit}; try again in {seconds} s", seconds)


def token_of(headers: Headers) -> str | None:
    """The token of a request, from either header; None if there is none."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None
