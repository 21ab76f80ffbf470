"""Error replies: problem documents (RFC 9457), on the routes of other servers with the members that their clients read.

`app.errors` has the table of codes and statuses. No reply repeats a text that a user sent.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Scope

from app.errors import KINDS, kind_of
from app.observability.requests import route_of
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
MAX_FIELD_ERRORS = 20
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
    errors: list[FieldError] | None = Field(None, description=f"invalid: the first {MAX_FIELD_ERRORS} invalid fields")
    fitted: list[Any] | None = Field(None, description="not_fitted: what the range set has")
    known: list[str] | None = Field(
        None, description="unknown_concept: the concepts of the range set; unknown_model: the models of the server"
    )
    generation: str | None = Field(
        None,
        description="stale_generation: the current one; behind: the server's; not_everywhere: the one that was made",
    )
    missing: list[str] | None = Field(None, description="not_everywhere: the replicas that do not follow yet")
    checks: dict[str, bool] | None = Field(None, description="not_ready: each condition")


@dataclass(frozen=True)
class Dialect:
    """How the clients of another server read errors: by members of their own, beside those of a problem."""

    name: str
    """Of the protocol, as `/v1/capabilities` lists it."""
    schema: type[Problem]
    """A problem with the protocol's members."""
    translate: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
    """From a problem's members to the protocol's status and members."""
    unused: frozenset[int] = frozenset()
    """Statuses that the protocol replaces by others."""


class ApiError(HTTPException):
    """An error that only HTTP knows, by its code in `app.errors.ERRORS`; `members` are further ones of the problem.

    It is an HTTPException because FastAPI lets no other exception pass while it reads a body.
    """

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(KINDS[code].status, detail, headers)
        self.code, self.members = code, members


class ProblemResponse(JSONResponse):
    """A problem as a reply, in plain ASCII: field names of a client's making may hold what UTF-8 cannot express."""

    def __init__(
        self,
        code: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        *,
        request_id: str | None,
        dialect: Dialect | None = None,
        **members: Any,
    ) -> None:
        kind = KINDS[code]
        problem = Problem(
            type=f"urn:neuronlens:problem:{code}",
            title=HTTPStatus(kind.status).phrase,
            status=kind.status,
            code=code,
            detail=detail,
            request_id=request_id,
            **members,
        ).model_dump(exclude_none=True)
        headers = dict(headers or {})
        if kind.status == 503 and kind.retryable:
            headers.setdefault("Retry-After", "1")
        if dialect is None:
            super().__init__(problem, kind.status, headers, MEDIA_TYPE)
        else:
            status, own = dialect.translate(problem)
            replaced = {"status": status, "title": HTTPStatus(status).phrase}
            super().__init__({**own, **problem, **replaced}, status, headers)

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def problem_response(
    scope: Scope, code: str, detail: str, headers: Mapping[str, str] | None = None, **members: Any
) -> ProblemResponse:
    """The reply to a request, in the dialect of its route, or in the one that its body turned out to be of."""
    dialects = getattr(getattr(route_of(scope), "info", None), "dialects", ())
    dialect = scope["state"].get("dialect") or next(iter(dialects), None)
    request_id = scope["state"].get("request_id")
    return ProblemResponse(code, detail, headers, request_id=request_id, dialect=dialect, **members)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` a problem."""
    for base in (RangeStoreError, EngineError, TextError):
        app.add_exception_handler(base, _domain_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)


async def _domain_error(request: Request, error: Exception) -> ProblemResponse:
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
        logger.error("request %s failed: %s: %s", request.state.request_id, type(error).__name__, error)
    return problem_response(request.scope, kind.code, str(error), headers, **members)


async def _invalid_request(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return problem_response(request.scope, "malformed", "the body is not valid JSON")
    if isinstance(error.body, bytes):
        detail = "the body is not declared as JSON: send Content-Type: application/json"
        return problem_response(request.scope, "unsupported_media_type", detail)
    listed = [
        FieldError(loc=without_tags(each["loc"]), msg=each["msg"], type=each["type"])
        for each in found[:MAX_FIELD_ERRORS]
    ]
    where = ".".join(str(part) for part in listed[0].loc)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return problem_response(request.scope, "invalid", f"{where}: {listed[0].msg}{more}", errors=listed)


async def _http_error(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return problem_response(request.scope, error.code, error.detail, error.headers, **error.members)
    match error.status_code:  # what FastAPI and Starlette raise
        case 400:  # the body nests too deeply, or is not UTF-8
            return problem_response(request.scope, "malformed", "the body is not valid JSON")
        case 404:
            return problem_response(request.scope, "not_found", "no such path; see /docs")
        case 405:
            detail = f"this path does not take {request.method}; see /docs"
            return problem_response(request.scope, "method_not_allowed", detail, {"Allow": _allowed_methods(request)})
        case _:
            raise error


def _allowed_methods(request: Request) -> str:
    """The methods that a path takes; each is a route of its own, which does not know the others."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    methods = {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods or ()}
    return ", ".join(
        method
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE")
        if method in methods or (method == "HEAD" and "GET" in methods)
    )
