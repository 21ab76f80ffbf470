"""The `responses` of operations in the OpenAPI document: which errors they may answer with, and which headers."""

from http import HTTPStatus
from typing import Any

from app.errors import ERRORS

Responses = dict[int | str, dict[str, Any]]

ANY = (408, 413, 421, 431, 500)
"""Statuses of every operation: a head or body too slow or too large, a foreign `Host`, a fault."""
QUERY = (404, 422)
"""Statuses of an operation whose query is checked: another model, an unknown or invalid parameter."""
BODY = (400, 415)
"""Statuses of an operation that reads a body: no JSON, or not declared as such."""


def header(name: str, description: str, kind: str = "string", required: bool = True) -> dict[str, Any]:
    """The documentation of a header that a reply always has, unless it is not `required`."""
    return {name: {"description": description, "required": required, "schema": {"type": kind}}}


_WAIT = "Seconds to wait before trying again."
_LASTING = ", ".join(kind.code for kind in ERRORS if not kind.retryable)
_HEADERS = {
    412: header("ETag", "The current generation, quoted."),
    429: header("Retry-After", _WAIT, "integer"),
    503: header("Retry-After", f"{_WAIT} None with {_LASTING}.", "integer", required=False),
}


def documented(*statuses: int) -> Responses:
    """The `responses` for error statuses.

    There is no `default`: it would make every status a documented one.
    """
    return {
        status: {"description": HTTPStatus(status).phrase}
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in sorted(statuses)
    }


AUTHENTICATION = documented(401, 403, 429, 503)
"""The `responses` of an operation that needs a key."""
for _status in (401, 403):
    AUTHENTICATION[_status]["headers"] = header("WWW-Authenticate", "How to send a key.")
