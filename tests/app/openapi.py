"""The application without a model, made once per test process: its OpenAPI document and the metadata of its routes."""

import functools
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match

from app.http.problems import Dialect
from app.http.routing import RouteInfo
from app.main import create_app
from app.security.auth import default_key_scope
from app.settings import Settings


@functools.cache
def application() -> FastAPI:
    return create_app(Settings())


def openapi() -> dict[str, Any]:
    return application().openapi()


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """Every operation by method and path."""
    return {
        (method.upper(), path): operation
        for path, methods in openapi()["paths"].items()
        for method, operation in methods.items()
    }


def route_at(method: str, path: str) -> BaseRoute | None:
    """The route that takes a call."""
    scope = {
        "type": "http",
        "method": "GET" if method == "HEAD" else method,
        "path": path,
        "root_path": "",
        "headers": [],
    }
    return next((route for route in application().routes if route.matches(dict(scope))[0] is Match.FULL), None)


def key_scope_of(method: str, path: str) -> str | None:
    """The scope of the key that a call needs; None if it needs none."""
    route = route_at(method, path)
    if route is None:
        return default_key_scope(method)
    info: RouteInfo | None = getattr(route, "info", None)
    return info.key_scope if info is not None else None


def dialects_of(method: str, path: str) -> tuple[Dialect, ...]:
    """The dialects of the route that takes a call, or of one at its path."""
    route = route_at(method, path) or next(filter(None, (route_at(each, path) for each in ("GET", "POST"))), None)
    info: RouteInfo | None = getattr(route, "info", None)
    return info.dialects if info is not None else ()
