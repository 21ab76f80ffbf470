"""Which route a request is meant for, whichever layer answered it before it came there."""

from collections.abc import Sequence

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute


class Templates:
    """The templates of an application's routes, tried in its order."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = [(route.path_regex, route.path_format, route.methods) for route in iter_route_contexts(routes)]

    def of(self, method: str, path: str) -> str | None:
        """The template of the route at a path; of several, of the one that takes the method. None: there is none."""
        method = "GET" if method == "HEAD" else method
        other = None
        for regex, template, methods in self._routes:
            if regex.match(path):
                if methods is None or method in methods:
                    return template
                other = other or template
        return other
