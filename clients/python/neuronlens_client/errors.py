"""What can go wrong with a call, as one tree."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


class NeuronLensError(Exception):
    """Base of all errors of this package.

    - NeuronLensError
      - ConnectionFailed: the server cannot be reached, or the connection broke
      - DeadlineExceeded (504): no answer within the timeout, by the server's clock or by the client's
      - ReplicasBehind (504): a change with `wait="all"` is made, but some replicas do not follow it yet
      - AccessDenied (401, 403): no key, a wrong one, or one without the scope; an erasure below an enforced one
      - NotFound (404): no such concept, neuron, range set, model, job or path
      - Conflict (409): a range set of another model, an erasure that cannot be resolved, …
      - StaleGeneration (412): somebody changed the live state first
      - TooLarge (413): more, or longer, texts than the server takes
      - InvalidRequest (400, 415, 422): a field that the server does not take
      - Overloaded (429): a full queue, or more calls than the key may make
      - Unavailable (502, 503): starting, draining, without a range set, or cut off from the store
      - ServerError (500): a fault of the server; its log says more under the request id
      - UnexpectedReply: an answer that no NeuronLens server of this version gives

    What could be retried has been by the time that it is raised.

    Attributes:
        status: HTTP status; None if there was no answer.
        code: the server's own word for it (docs/http.md "Errors"); None if the answer held none.
        detail: one sentence for people. It never repeats a text.
        request_id: what the server's log calls the request.
        problem: every field of the server's problem, such as `known` or `fitted`.
    """

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
        said = ", ".join(word for word in (code, f"request {request_id}" if request_id else None) if word)
        super().__init__(f"{detail} ({said})" if said else detail)


class ConnectionFailed(NeuronLensError):
    """The server cannot be reached, or the connection broke before the answer was whole."""


class DeadlineExceeded(NeuronLensError):
    """No answer within the timeout, by the server's clock (504) or by the client's (`status` is None)."""


class ReplicasBehind(NeuronLensError):
    """A change with `wait="all"` is made, but some replicas did not follow it in time; they may still."""

    @property
    def generation(self) -> str | None:
        """What the change made."""
        return self.problem.get("generation")

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the replicas; `Client.replicas` tells more. None: it is not certain that all had reported."""
        return tuple(self.problem.get("missing") or ())


class AccessDenied(NeuronLensError):
    """No key or a wrong one (401), or one without the scope of the call (403)."""


class NotFound(NeuronLensError):
    """No such concept, neuron, range set, model, job or path. `known`: those there are, of concepts and models."""

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(self.problem.get("known") or ())


class Conflict(NeuronLensError):
    """A range set of another model, or a live erasure that cannot be resolved on it."""


class StaleGeneration(NeuronLensError):
    """The live state is no longer at the generation named by `if_match`: another change came first.

    One's own change does not count where it is sent again, by this client or under the same `X-Request-ID`.
    """

    @property
    def generation(self) -> str | None:
        """Where it is now."""
        return self.problem.get("generation")


class TooLarge(NeuronLensError):
    """One text is too long for the server, or what cannot be sent in smaller parts is too large."""


class InvalidRequest(NeuronLensError):
    """The server does not take a field, or cannot resolve it. `errors`: the invalid fields; `fitted`: what there is."""

    @property
    def errors(self) -> tuple[Mapping[str, Any], ...]:
        """Each with `loc`, `msg` and `type`; never with the value."""
        return tuple(self.problem.get("errors") or ())


class Overloaded(NeuronLensError):
    """A full queue, or too many calls with this key. `retry_after`: seconds that the server asks to wait."""


class Unavailable(NeuronLensError):
    """Starting, draining, without a range set, or cut off from the store.

    A change of the live state that was answered so may have been made all the same, unless `detail` says otherwise.
    """


class ServerError(NeuronLensError):
    """A fault of the server."""


class UnexpectedReply(NeuronLensError):
    """An answer that no NeuronLens server of this version gives: a proxy's page, or another version's reply."""


_KINDS: Mapping[int, type[NeuronLensError]] = {
    400: InvalidRequest,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    409: Conflict,
    412: StaleGeneration,
    413: TooLarge,
    415: InvalidRequest,
    422: InvalidRequest,
    429: Overloaded,
    500: ServerError,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}
_OF_PROXIES = frozenset({413, 429, 502, 503, 504})
"""Statuses that say enough even from a proxy, without a problem."""


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> NeuronLensError:
    """The error that a reply with a status of 300 or more means."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    request_id = headers.get("x-request-id")
    retry_after = _seconds(headers.get("retry-after"))
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        kind = _KINDS[status] if status in _OF_PROXIES else UnexpectedReply
        detail = f"answered {status}, and not as NeuronLens does"
        return kind(detail, status=status, request_id=request_id, retry_after=retry_after)
    detail = str(problem.get("detail") or problem.get("title") or problem["code"])
    kind = ReplicasBehind if problem["code"] == "not_everywhere" else _KINDS.get(status, NeuronLensError)
    return kind(
        detail,
        status=status,
        code=problem["code"],
        request_id=problem.get("request_id") or request_id,
        problem=problem,
        retry_after=retry_after,
    )


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds from now; it may be a number or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(int(retry_after)))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
