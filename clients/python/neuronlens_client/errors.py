"""Errors of the client, with the HTTP statuses that they stand for.

- NeuronLensError
  - ConnectionFailed: the server cannot be reached, or the connection broke
  - DeadlineExceeded (504): no answer within the timeout, by the server's clock or by the client's
  - ReplicasBehind (504): a change with `wait="all"` is made, but some replicas do not follow it yet
  - AccessDenied (401, 403): no key, a wrong one, or one without the scope; an erasure weaker than an enforced one
  - NotFound (404): no such concept, neuron, range set, model, job, report or path
  - Conflict (409): a range set of another model, an erasure that cannot be resolved, …
  - StaleGeneration (412): somebody else changed the live state first
  - TooLarge (413): more, or longer, texts than the server takes
  - InvalidRequest (400, 415, 422): a field that the server does not take
  - Overloaded (429): a full queue, or more calls than the key may make
  - ServerError (500): a fault of the server; its log says more under the request id
  - Unavailable (502, 503): starting, draining, without a range set, or cut off from the store
  - UnexpectedReply: an answer that no NeuronLens server of this version gives

A call that may be repeated has been repeated when its error is raised.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar


class NeuronLensError(Exception):
    """Base of all errors of this package.

    Attributes:
        detail: one sentence for people. It never repeats a text.
        status: HTTP status; None if there was no answer.
        code: the server's error code (docs/http.md "Errors"); None if the answer had none.
        request_id: the id of the request in the server's log.
        problem: every field of the server's problem, such as `known` or `fitted`.
        retry_after: seconds that the server asks to wait.
    """

    by_status: ClassVar[dict[int, type["NeuronLensError"]]] = {}
    """The class for each HTTP status."""

    def __init_subclass__(cls, statuses: tuple[int, ...] = ()) -> None:
        cls.by_status.update(dict.fromkeys(statuses, cls))

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        problem: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.detail, self.status, self.code, self.request_id = detail, status, code, request_id
        self.problem = dict(problem or {})
        self.retry_after = retry_after
        context = ", ".join(part for part in (code, f"request {request_id}" if request_id else None) if part)
        super().__init__(f"{detail} ({context})" if context else detail)


class ConnectionFailed(NeuronLensError):
    """The server cannot be reached, or the connection broke before the answer was complete."""


class DeadlineExceeded(NeuronLensError, statuses=(504,)):
    """No answer within the timeout, by the server's clock (504) or by the client's (`status` is None)."""


class ReplicasBehind(NeuronLensError):
    """A change with `wait="all"` is made, but some replicas did not follow it in time; they may still."""

    @property
    def generation(self) -> str | None:
        """The generation that the change made."""
        return self.problem.get("generation")

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the replicas (see `Client.replicas`). Empty: it is not certain that all have reported."""
        return tuple(self.problem.get("missing") or ())


class AccessDenied(NeuronLensError, statuses=(401, 403)):
    """No key or a wrong one (401), or one without the scope of the call (403)."""


class NotFound(NeuronLensError, statuses=(404,)):
    """No such concept, neuron, range set, model, job, report or path."""

    @property
    def known(self) -> tuple[str, ...]:
        """The names that exist, of concepts and models."""
        return tuple(self.problem.get("known") or ())


class Conflict(NeuronLensError, statuses=(409,)):
    """A range set of another model, or a live erasure that cannot be resolved on it."""


class StaleGeneration(NeuronLensError, statuses=(412,)):
    """The live state is no longer at the generation of `if_match`: another change came first.

    A repeated attempt of the same change, under the same `X-Request-ID`, is not in conflict with itself.
    """

    @property
    def generation(self) -> str | None:
        """The current generation."""
        return self.problem.get("generation")


class TooLarge(NeuronLensError, statuses=(413,)):
    """One text is too long for the server, or a request that cannot be split is too large."""


class InvalidRequest(NeuronLensError, statuses=(400, 415, 422)):
    """The server does not take a field, or cannot resolve it. `problem["fitted"]`: what the range set was fitted on."""

    @property
    def errors(self) -> tuple[Mapping[str, Any], ...]:
        """The invalid fields, each with `loc`, `msg` and `type`; never with the value."""
        return tuple(self.problem.get("errors") or ())


class Overloaded(NeuronLensError, statuses=(429,)):
    """The queue is full, or the key has made too many calls."""


class ServerError(NeuronLensError, statuses=(500,)):
    """A fault of the server."""


class Unavailable(NeuronLensError, statuses=(502, 503)):
    """The server is starting, draining, without a range set, or cut off from the store.

    A change of the live state may have been made all the same, unless `detail` says otherwise.
    """


class UnexpectedReply(NeuronLensError):
    """An answer that no NeuronLens server of this version gives: a proxy's page, or another version's reply."""


_SENT_BY_PROXIES = frozenset({413, 429, 502, 503, 504})
"""Statuses that say enough without a problem."""


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> NeuronLensError:
    """The error of a response with a status of 300 or more."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    request_id = headers.get("x-request-id")
    retry_after = _seconds(headers.get("retry-after"))
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        kind = NeuronLensError.by_status[status] if status in _SENT_BY_PROXIES else UnexpectedReply
        detail = f"status {status} without a NeuronLens error code"
        return kind(detail, status=status, request_id=request_id, retry_after=retry_after)
    kind = NeuronLensError.by_status.get(status, NeuronLensError)
    if problem["code"] == "not_everywhere":
        kind = ReplicasBehind
    return kind(
        str(problem.get("detail") or problem.get("title") or problem["code"]),
        status=status,
        code=problem["code"],
        request_id=problem.get("request_id") or request_id,
        problem=problem,
        retry_after=retry_after,
    )


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After`, a number of seconds or a date, in seconds from now."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
