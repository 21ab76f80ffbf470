"""Routes that carry what the layers around them need to know, and what happens between the router and an endpoint.

`Router.operation` declares a route with its metadata, a `RouteInfo`. Authentication, the full queue, error replies,
traces, metrics, capabilities and the OpenAPI document read it there, so that no table of paths is kept beside it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIRouter
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from app.http.problems import MAX_FIELD_ERRORS, ApiError, Dialect, FieldError, Problem
from app.http.responses import ANY, AUTHENTICATION, Responses, documented
from range_store.storage.api_keys import Scope as KeyScope

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True)
class RouteInfo:
    """What the layers around a route need to know of it."""

    key_scope: KeyScope | None
    """Scope of the API key that a call needs; None: it needs no key."""
    dialects: tuple[Dialect, ...] = ()
    """In which its errors are written, instead of as problems: the first, unless the body is of another one."""
    strict_query: bool = True
    """Refuse query parameters that are unknown or repeated."""
    classifies: bool = False
    """A call takes the model's time: it is refused while the queue is full, and alerts watch it."""
    model_in_body: bool = False
    """The body may name the model."""
    traced: bool = True
    """A call gets a span."""
    feature: str | None = None
    """As `/v1/capabilities` lists it."""
    decode_body: Callable[[Scope, Receive], Receive] | None = None
    """Turns the body into JSON as it is read."""


Check = Callable[[Scope, RouteInfo | None], None]
"""Raises an error if a request must be refused before its body is read; None: no route takes it."""


class Route(APIRoute):
    """Refuses a request by its metadata before the body is read, and bounds the body while the endpoint reads it.

    The application's state has `checks`, called in order, and `bodies`.
    """

    info: RouteInfo

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        scope["state"]["route"] = self
        taken = scope["method"] in (self.methods or ())
        for check in state.checks:
            check(scope, self.info if taken else None)
        if taken and self.info.strict_query:
            self._check_query(QueryParams(scope["query_string"]))
        with state.bodies.bounded(scope, receive) as bounded:
            if taken and self.info.decode_body is not None:
                bounded = self.info.decode_body(scope, bounded)
            await super().handle(scope, bounded, send)  # 405 if not taken

    def _check_query(self, query: QueryParams) -> None:
        """Raises ApiError (422) for parameters that are unknown or given twice.

        A query model with `extra="forbid"` would do neither here: FastAPI hands each dependency the whole query, so
        that the model of one would refuse the parameters of another; and it takes the last of repeated ones.
        """
        if unknown := [name for name in query if name not in self._query_names]:
            detail = f"query.{unknown[0]}: no such parameter; this path has {', '.join(sorted(self._query_names))}"
            errors = [
                FieldError(loc=["query", name], msg="no such parameter", type="extra_forbidden") for name in unknown
            ]
            raise ApiError("invalid", detail, errors=errors[:MAX_FIELD_ERRORS])
        if repeated := [name for name in query if len(query.getlist(name)) > 1]:
            errors = [FieldError(loc=["query", name], msg="given more than once", type="repeated") for name in repeated]
            raise ApiError("invalid", f"query.{repeated[0]}: given more than once", errors=errors)

    @cached_property
    def _query_names(self) -> frozenset[str]:
        return frozenset(_query_names(self.dependant))


def _query_names(dependant: Dependant) -> Iterable[str]:
    yield from (field.alias for field in dependant.query_params)
    for each in dependant.dependencies:
        yield from _query_names(each)


class Router(APIRouter):
    """A router whose operations have metadata; `dialects` and `strict_query` hold for all of them."""

    def __init__(
        self,
        *tags: str,
        dialects: tuple[Dialect, ...] = (),
        strict_query: bool = True,
        include_in_schema: bool = True,
    ) -> None:
        super().__init__(
            tags=list(tags),
            route_class=Route,
            include_in_schema=include_in_schema,
            generate_unique_id_function=lambda route: route.name,
        )
        self.dialects, self.strict_query = dialects, strict_query

    def operation(
        self,
        method: str,
        path: str,
        *,
        key_scope: KeyScope | None,
        errors: Iterable[int] = (),
        responses: Responses | None = None,
        classifies: bool = False,
        model_in_body: bool = False,
        traced: bool = True,
        strict_query: bool | None = None,
        feature: str | None = None,
        decode_body: Callable[[Scope, Receive], Receive] | None = None,
        **options: Any,
    ) -> Callable[[Endpoint], Endpoint]:
        """Declare an operation: a decorator for its endpoint.

        Args:
            errors: statuses of the errors it may answer with, besides those of every operation and of authentication.
            responses: of the OpenAPI document, beside or instead of those of `errors`.
            options: of FastAPI's `add_api_route`. The others are those of `RouteInfo`.
        """
        info = RouteInfo(
            key_scope,
            self.dialects,
            self.strict_query if strict_query is None else strict_query,
            classifies,
            model_in_body,
            traced,
            feature,
            decode_body,
        )
        schema = self.dialects[0].schema if self.dialects else Problem
        all_responses = {
            **documented(*ANY),
            **(AUTHENTICATION if key_scope else {}),
            **documented(*errors),
            500: {"model": schema},  # puts the schema into the document
            **(responses or {}),
        }

        def declare(endpoint: Endpoint) -> Endpoint:
            self.add_api_route(path, endpoint, methods=[method], responses=all_responses, **options)
            route = self.routes[-1]
            assert isinstance(route, Route)
            route.info = info
            return endpoint

        return declare


def add_routers(app: FastAPI, routers: Iterable[Router]) -> None:
    """Add every route of the routers to the application, and refuse requests for other paths as routes do.

    `include_router` would match each request twice: once to choose the router, and once more inside of it.
    """
    for router in routers:
        app.router.routes.extend(router.routes)
    not_found = app.router.default

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["route"] = None
            for check in scope["app"].state.checks:
                check(scope, None)
        await not_found(scope, receive, send)

    app.router.default = refuse


def routes_of(app: FastAPI) -> list[Route]:
    """The application's own routes, in order; not those of the documentation pages."""
    return [route for route in app.routes if isinstance(route, Route)]
