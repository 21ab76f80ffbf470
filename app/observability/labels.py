"""Labels of an HTTP request in logs, metrics and traces: bounded in number, and free of what callers put in a path."""

from starlette.types import Scope

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


def route_of(scope: Scope) -> str:
    """The template of the route that a request has reached, or was meant for; `unmatched` if there is none."""
    reached = getattr(scope.get("route"), "path_format", None)
    if reached is None and "app" in scope:  # refused on the way, for want of a key or of room
        reached = scope["app"].state.templates.of(scope["method"], scope["path"])
    return reached or "unmatched"


def method_of(scope: Scope) -> str:
    """The request's method, if it is a known one; else `other`."""
    return scope["method"] if scope["method"] in _METHODS else "other"
