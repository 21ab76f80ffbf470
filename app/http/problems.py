"""Errors as `application/problem+json` (RFC 9457). `app.errors` has the table of codes and statuses.

No problem ever repeats a text that a user sent.
"""

import json
import logging
import random
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.errors import ERRORS, KINDS, kind_of
from app.schemas.unions import without_tags
from range_store.errors import (
    GenerationNotReached,
    JobQueueFull,
    NotFitted,
    RangeStoreError,
    StaleGeneration,
    UnknownConcept,
)
from workers.engine.errors import Draining, EngineError, QueueFull
from workers.models.errors import TextError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 20
"""Most invalid fields that a problem lists; a body can hold a million."""


class FieldError(BaseModel):
    """One invalid field: where it is, what is wrong with it, and the kind of error. Never what it holds."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """An error. `code` is stable and meant for programs, `detail` for people; further members depend on the code."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None
    errors: list[FieldError] | None = Field(None, description=f"invalid: the first {MOST_ERRORS} invalid fields")
    fitted: list[Any] | None = Field(None, description="not_fitted: what the range set has")
    known: list[str] | None = Field(
        None, description="unknown_concept: the concepts of the range set; unknown_model: the models of the server"
    )
    generation: str | None = Field(
        None,
        description="stale_generation: the current one; behind: what is held; not_everywhere: what the change made",
    )
    missing: list[str] | None = Field(None, description="not_everywhere: the replicas that do not follow yet")
    checks: dict[str, bool] | None = Field(None, description="not_ready: each condition")


class ApiError(HTTPException):
    """An error that only HTTP knows, by its code in `app.errors.ERRORS`; `members` are further ones of the problem.

    It is an HTTPException because FastAPI lets no other exception pass while it reads a body.
    """

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(KINDS[code].status, detail, headers)
        self.code, self.members = code, members


_FRAMEWORK_CODES = {400: "malformed", 404: "not_found", 405: "method_not_allowed"}
"""Codes of the errors that FastAPI and Starlette raise."""


class _ProblemResponse(JSONResponse):
    """Plain ASCII: field names that a client made up may hold what UTF-8 cannot say."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def problem_response(
    code: str,
    detail: str,
    request_id: str | None,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> JSONResponse:
    """A problem as a reply."""
    kind = KINDS[code]
    problem = Problem(
        type=f"urn:neuronlens:problem:{code}",
        title=HTTPStatus(kind.status).phrase,
        status=kind.status,
        code=code,
        detail=detail,
        request_id=request_id,
        **members,
    )
    sent = dict(headers or {})
    if kind.status == 503 and kind.retryable:
        sent.setdefault("Retry-After", "1")
    if request_id:
        sent["X-Request-ID"] = request_id
    return _ProblemResponse(problem.model_dump(exclude_none=True), kind.status, headers=sent)


def new_request_id() -> str:
    """An id for a request that brought none."""
    return f"{random.getrandbits(128):032x}"


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem."""
    for base in (RangeStoreError, EngineError, TextError):
        app.add_exception_handler(base, _domain_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


ANY = (408, 413, 421, 431, 500)
"""Statuses that every operation may answer with: a head or body too slow or too large, a foreign `Host`, a fault."""
QUERY = (404, 422)
"""Those of an operation whose query is checked: another model, an unknown or invalid parameter."""
BODY = (400, 415)
"""Those of an operation that reads a body: no JSON, or not declared as such."""


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation: which statuses it may answer with, each a problem.

    There is no `default`: it would make every status a documented one.
    """
    return {code: _documented(code) for code in sorted(codes)}


def finish(openapi: dict[str, Any]) -> None:
    """Say of every operation what it does, of every error that it is a problem, of every reply that it has an id."""
    about = {"description": "The request's own, or a new one.", "required": True, "schema": {"type": "string"}}
    openapi["components"]["headers"] = {"RequestId": about}
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of a 422, which nothing answers here
        openapi["components"]["schemas"].pop(unused, None)
    for operations in openapi["paths"].values():
        for operation in operations.values():
            operation["summary"] = re.split(r"[.;](?:\s|$)", operation["description"], maxsplit=1)[0]
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    response["content"] = _CONTENT
                said = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
                response["headers"] = response.get("headers", {}) | said


def header(name: str, description: str, kind: str = "string", required: bool = True) -> dict[str, Any]:
    """A header that a reply always has, unless it is not `required`, as the document says it."""
    return {name: {"description": description, "required": required, "schema": {"type": kind}}}


_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_WAIT = "Seconds to wait before trying again."
_LASTING = ", ".join(kind.code for kind in ERRORS if not kind.retryable)
_HEADERS = {
    412: header("ETag", "The current generation, quoted."),
    429: header("Retry-After", _WAIT, "integer"),
    503: header(
        "Retry-After",
        f"{_WAIT} None with {_LASTING}.",
        "integer",
        required=False,
    ),
}


def _documented(status: int) -> dict[str, Any]:
    return {"description": HTTPStatus(status).phrase} | ({"headers": _HEADERS[status]} if status in _HEADERS else {})


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


async def _domain_error(request: Request, error: Exception) -> JSONResponse:
    return domain_problem(error, _request_id(request))


def domain_problem(error: Exception, request_id: str | None) -> JSONResponse:
    """The reply to an error of the range store, the engine or a model; raises it again if HTTP does not know it."""
    kind = kind_of(error)
    if kind is None:
        raise error
    members: dict[str, Any] = {}
    headers: dict[str, str] = {}
    match error:
        case NotFitted():
            members["fitted"] = error.fitted
        case UnknownConcept():
            members["known"] = error.known
        case StaleGeneration():
            members["generation"] = error.current
            headers["ETag"] = f'"{error.current}"'
        case GenerationNotReached():
            members["generation"] = error.held
        case Draining():
            headers["Connection"] = "close"  # a new connection may lead to another replica
        case QueueFull() | JobQueueFull():
            headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if kind.status == 500:
        logger.error("request %s failed: %s: %s", request_id, type(error).__name__, error)
    return problem_response(kind.code, str(error), request_id, headers, **members)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return problem_response("malformed", "the body cannot be read as JSON", _request_id(request))
    if isinstance(error.body, bytes):
        detail = "the body is not declared as JSON: send Content-Type: application/json"
        return problem_response("unsupported_media_type", detail, _request_id(request))
    listed = [
        FieldError(loc=without_tags(each["loc"]), msg=each["msg"], type=each["type"]) for each in found[:MOST_ERRORS]
    ]
    where = ".".join(str(part) for part in listed[0].loc)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    detail = f"{where}: {listed[0].msg}{more}"
    return problem_response("invalid", detail, _request_id(request), errors=listed)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    request_id = _request_id(request)
    if isinstance(error, ApiError):
        return problem_response(error.code, error.detail, request_id, error.headers, **error.members)
    code, headers = _FRAMEWORK_CODES[error.status_code], error.headers
    match code:
        case "malformed":
            detail = "the body cannot be read as JSON"  # it nests too deeply, or is no text at all
        case "not_found":
            detail = "no such path; see /docs"
        case _:
            detail = f"this path does not take {request.method}; see /docs"
            headers = {"Allow": ", ".join(_methods(request))}
    return problem_response(code, detail, request_id, headers)


def _methods(request: Request) -> list[str]:
    """What the path of a request takes; each of its methods is a route of its own, and knows nothing of the others."""
    scope = {"type": "http", "path": request.scope["path"], "root_path": request.scope["root_path"], "headers": []}
    found = [
        method
        for method in ("GET", "POST", "PUT", "DELETE")
        if any(route.matches(scope | {"method": method})[0] is Match.FULL for route in request.app.routes)
    ]
    return ["GET", "HEAD", *found[1:]] if "GET" in found else found
