"""The finished OpenAPI document: what routes know of themselves, in every operation."""

import re
from typing import Any

from fastapi import FastAPI

from app.http.problems import MEDIA_TYPE
from app.http.routing import RouteInfo, routes_of

FROM_THE_PARSER = (408, 431)
"""Statuses that are sent before there is a path: they may be plain problems on every route."""
_PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where keys are in force."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same, in another header."},
}


def document(app: FastAPI) -> None:
    """Complete the OpenAPI document of an application, which is made once, when it is first asked for."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(make(), app)
        return make()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(openapi: dict[str, Any], app: FastAPI) -> None:
    components = openapi.setdefault("components", {})
    components["securitySchemes"] = _SECURITY_SCHEMES
    about = {"description": "The request's own, or a new one.", "required": True, "schema": {"type": "string"}}
    components["headers"] = {"RequestId": about}
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of a 422, which nothing answers here
        components["schemas"].pop(unused, None)
    for route in routes_of(app):
        for method in (route.methods or ()) if route.include_in_schema else ():
            _complete_operation(openapi["paths"][route.path_format][method.lower()], route.info)


def _complete_operation(operation: dict[str, Any], info: RouteInfo) -> None:
    """Add the summary, the scope of the key, the form of each error, and the header with the request's id."""
    operation["summary"] = re.split(r"[.;](?:\s|$)", operation["description"], maxsplit=1)[0]
    if info.key_scope is not None:
        operation["security"] = [{"bearer": [info.key_scope]}, {"apiKey": [info.key_scope]}]
    responses = operation["responses"]
    for status in info.dialects[0].unused if info.dialects else ():
        responses.pop(str(status), None)
    schemas = [{"$ref": f"#/components/schemas/{each.schema.__name__}"} for each in info.dialects]
    error = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    for status, response in responses.items():
        response["headers"] = response.get("headers", {}) | {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
        if int(status) >= 400 and info.dialects:
            response["content"] = error | (_PROBLEM if int(status) in FROM_THE_PARSER else {})
        elif int(status) >= 400:
            response["content"] = _PROBLEM
