"""One call of the API: what each attempt sends, and whether and when a failed attempt is repeated."""

import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from neuronlens_client.errors import ConnectionFailed, DeadlineExceeded, NeuronLensError, UnexpectedReply, error_of

R = TypeVar("R", bound=BaseModel)

GRACE = 1.0
"""Seconds that the client waits beyond the deadline, so that the server's own 504 can arrive."""
CONNECT_TIMEOUT = 5.0
"""Seconds for one attempt to connect, so that there is time for another."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Bounds of the pause between attempts, in seconds. It doubles each time, then a random part of it is taken."""
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_NOT_DONE = frozenset(
    {"draining", "keys_unavailable", "queue_full", "rate_limited", "too_many_bodies", "too_many_connections"}
)
"""Error codes of requests that were refused before anything was done, so that even a change may be repeated."""
_NEEDS_OPERATOR = frozenset({"no_range_set"})
"""Error codes with status 503 that last until somebody does something."""
API_KEY = re.compile(r"[\x21-\x7e]+")


class CallOptions(TypedDict, total=False):
    """Options of one call.

    - `params`: query parameters; those that are None are left out.
    - `body`: sent as JSON.
    - `if_match`: the generation that the live state must have.
    - `repeatable`: whether the call may be repeated when its outcome is unknown. Default: whether it is a GET, or is
      guarded by `if_match` so that it cannot be done twice.
    - `timeout`: seconds, including retries; None: the client's.
    - `retries`: default: the client's.
    """

    params: Mapping[str, Any]
    body: Mapping[str, Any]
    headers: Mapping[str, str] | None
    if_match: str | None
    repeatable: bool
    timeout: float | None
    retries: int


@dataclass(frozen=True)
class Call:
    """One call; all its attempts carry the same X-Request-ID.

    The retry loop is not a library's: httpx-retries cannot tell error codes apart nor send the time left, and tenacity
    would replace only the loop, since the rules below and the pause, which the event stream shares, would stay.
    """

    method: str
    url: str
    params: Mapping[str, Any]
    content: bytes | None
    headers: Mapping[str, str]
    deadline: float
    """By `time.monotonic`."""
    retries: int
    repeatable: bool

    def request_arguments(self) -> dict[str, Any]:
        """Arguments of `httpx.Client.request` for the next attempt, which tells the server how much time is left."""
        left = max(self.deadline - time.monotonic(), 0.001)
        return {
            "method": self.method,
            "url": self.url,
            "params": self.params,
            "content": self.content,
            "headers": {**self.headers, "x-request-timeout": f"{left:.3f}"},
            "timeout": httpx.Timeout(left + GRACE, connect=min(left, CONNECT_TIMEOUT)),
        }

    def pause_after(self, outcome: httpx.Response | httpx.RequestError, attempt: int) -> float:
        """Seconds to wait after failed attempt number `attempt`, counted from 0.

        Raises:
            NeuronLensError: the error, if the call is not repeated.
        """
        if isinstance(outcome, httpx.Response):
            error = error_of(outcome.status_code, outcome.headers, outcome.content)
            again = self._may_repeat(error)
        else:
            error = self._connection_error(outcome)
            again = isinstance(outcome, _NOT_SENT) or (
                self.repeatable and isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError)
            )
        pause = pause_before(attempt + 1, error.retry_after)
        if not again or attempt >= self.retries or time.monotonic() + pause >= self.deadline:
            raise error
        return pause

    def _may_repeat(self, error: NeuronLensError) -> bool:
        if error.code in _NEEDS_OPERATOR:
            return False
        return error.status == 429 or error.code in _NOT_DONE or (self.repeatable and error.status in (502, 503))

    def _connection_error(self, error: httpx.RequestError) -> NeuronLensError:
        request_id, server = self.headers["x-request-id"], origin(self.url)
        late = time.monotonic() >= self.deadline
        if isinstance(error, httpx.TimeoutException) and (late or not isinstance(error, _NOT_SENT)):
            return DeadlineExceeded(f"no answer from {server} in time", request_id=request_id)
        # httpx's message about a header that cannot be sent would quote the header
        reason = str(error) if isinstance(error, httpx.NetworkError) and str(error) else type(error).__name__
        return ConnectionFailed(f"cannot reach {server} ({reason})", request_id=request_id)


def origin(url: str) -> str:
    """Scheme, host and port of a URL, without a user or password."""
    parts = httpx.URL(url)
    return f"{parts.scheme}://{parts.netloc.decode()}"


def path_segment(name: str) -> str:
    """A name quoted for use as one segment of a path."""
    return quote(name, safe="").replace(".", "%2E")  # otherwise "." and ".." are resolved before they are sent


def pause_before(attempt: int, retry_after: float | None) -> float:
    """Seconds before an attempt after the first: what the server asks for plus jitter, so that clients spread out."""
    return (retry_after or 0.0) + random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """A request body as JSON."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate, which is sent escaped: the server's error names its place
        return json.dumps(body, allow_nan=False).encode()


def parse(response: httpx.Response, reply: type[R]) -> R:
    """A response as a model.

    Raises:
        UnexpectedReply: it is no such reply.
    """
    try:
        return reply.model_validate_json(response.content)
    except ValidationError:  # its message would quote the reply
        raise UnexpectedReply(
            f"the reply is not a valid {reply.__name__}: does the server have another version?",
            status=response.status_code,
            request_id=response.headers.get("x-request-id"),
        ) from None
