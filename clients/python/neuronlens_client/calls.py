"""One call without the network: what to send, when to try again, and what the answer means.

Steps are a generator that yields what is to be done (`Send`, `Pause`) and is sent what came of it, so the blocking and
the asynchronous client run the same ones.
"""

import json
import random
import re
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from neuronlens_client.errors import ConnectionFailed, DeadlineExceeded, NeuronLensError, UnexpectedReply, error_of


@dataclass(frozen=True)
class Send:
    """Send a request; the outcome is the whole response, or the error that httpx raised."""

    method: str
    url: str
    params: Mapping[str, str]
    content: bytes | None
    headers: Mapping[str, str]
    timeout: httpx.Timeout


@dataclass(frozen=True)
class Pause:
    """Wait; the outcome is None."""

    seconds: float


Outcome = httpx.Response | httpx.RequestError | None
T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)
Steps = Generator[Send | Pause, Outcome, T]

GRACE = 1.0
"""Seconds that the server's own 504 may take to arrive before this client gives up by itself."""
CONNECT = 5.0
"""Seconds that one attempt to connect may take, so that there is time for another."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Bounds of the pause between tries, in seconds: doubled each time, then any part of it (full jitter)."""
_NOTHING_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_NOTHING_DONE = frozenset(
    {"draining", "keys_unavailable", "queue_full", "rate_limited", "too_many_bodies", "too_many_connections"}
)
"""Codes of refusals that come before anything is done, so that even a change may be tried again."""
_LASTS = frozenset({"no_range_set"})
"""Codes of 503 that end when a person does something."""
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Caller:
    """Where the server is, who calls it and how patiently.

    Raises:
        ValueError: no such URL; a key that cannot be sent in a header.
    """

    def __init__(
        self, url: str, api_key: str | None, timeout: float, retries: int, model: str | None, headers: Mapping[str, str]
    ) -> None:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            parts = httpx.URL("")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError("url: it must be like http://127.0.0.1:8000")
        if api_key is not None and not _TOKEN.fullmatch(api_key):
            raise ValueError("api_key: it holds what no key does, a space or a line break perhaps")
        if not timeout > 0 or retries < 0:
            raise ValueError("timeout must be more than 0 seconds, retries 0 or more")
        self.url = url.rstrip("/")
        self.host = parts.host
        self.shown = f"{parts.scheme}://{parts.netloc.decode()}"  # without a password
        self.timeout, self.retries = timeout, retries
        self.model = {"model": model} if model else {}
        self.headers = {name.lower(): value for name, value in headers.items()} | (
            {"x-api-key": api_key} if api_key else {}
        )

    def call(
        self,
        method: str,
        path: str,
        reply: type[R],
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        if_match: str | None = None,
        repeatable: bool | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Steps[R]:
        """As `fetch`, and the answer is understood.

        Raises:
            UnexpectedReply: it is no such reply.
        """
        response = yield from self.fetch(
            method,
            path,
            params=params,
            body=body,
            headers=headers,
            if_match=if_match,
            repeatable=repeatable,
            timeout=timeout,
            retries=retries,
        )
        return _understood(response, reply)

    def fetch(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        if_match: str | None = None,
        repeatable: bool | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Steps[httpx.Response]:
        """One call with its retries, which all carry one request id.

        Args:
            params: of the query; None is left out.
            repeatable: whether it may be sent again when it is unknown what came of it; default: if it is a GET, or
                guarded by `if_match`, so that it cannot be done twice.
            timeout: seconds for the answer, retries included; None: the client's.

        Raises:
            NeuronLensError: what came of the last try.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        retries = self.retries if retries is None else retries
        repeatable = (method == "GET" or if_match is not None) if repeatable is None else repeatable
        sent = self.headers | {name.lower(): value for name, value in (headers or {}).items()}
        sent.setdefault("x-request-id", uuid.uuid4().hex)
        if if_match is not None:
            sent["if-match"] = f'"{if_match}"'
        content = None
        if body is not None:
            content, sent["content-type"] = _json(body), "application/json"
        query = self.model | {name: _word(value) for name, value in (params or {}).items() if value is not None}
        tried = 0
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            outcome = yield Send(
                method,
                self.url + path,
                query,
                content,
                sent | {"x-request-timeout": f"{left:.3f}"},
                httpx.Timeout(left + GRACE, connect=min(left, CONNECT)),
            )
            if isinstance(outcome, httpx.Response):
                if outcome.status_code < 300:
                    return outcome
                error = error_of(outcome.status_code, outcome.headers, outcome.content)
                again = _again(error, repeatable)
            else:
                assert outcome is not None
                error = self._no_answer(outcome, sent["x-request-id"], time.monotonic() >= deadline)
                again = isinstance(outcome, _NOTHING_SENT) or (
                    repeatable and isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError)
                )
            pause = pause_before(tried, error.retry_after)
            if not again or tried >= retries or time.monotonic() + pause >= deadline:
                raise error
            tried += 1
            yield Pause(pause)

    def _no_answer(self, error: httpx.RequestError, request_id: str, late: bool) -> NeuronLensError:
        if isinstance(error, httpx.TimeoutException) and (late or not isinstance(error, _NOTHING_SENT)):
            return DeadlineExceeded(f"no answer from {self.shown} in time", request_id=request_id)
        # what httpx says of a header that cannot be sent would quote it
        said = str(error) if isinstance(error, httpx.NetworkError) and str(error) else type(error).__name__
        return ConnectionFailed(f"no answer from {self.shown} ({said})", request_id=request_id)


def in_path(name: str) -> str:
    """A name as part of a path, whatever it holds."""
    return quote(name, safe="").replace(".", "%2E")  # else "." and ".." are resolved before they are sent


def _again(error: NeuronLensError, repeatable: bool) -> bool:
    """Whether a refusal may be tried again."""
    if error.code in _LASTS:
        return False
    return error.status == 429 or error.code in _NOTHING_DONE or (repeatable and error.status in (502, 503))


def pause_before(tried: int, retry_after: float | None) -> float:
    """Seconds until the next try: what the server asks for and some more, so that not all come back at once."""
    return (retry_after or 0.0) + random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**tried))


def _json(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate: the server says where
        return json.dumps(body, allow_nan=False).encode()


def _word(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _understood(response: httpx.Response, reply: type[R]) -> R:
    try:
        return reply.model_validate_json(response.content)
    except ValidationError:  # its message would quote the reply
        raise UnexpectedReply(
            f"the answer is no {reply.__name__} as this client knows it: is the server another version?",
            status=response.status_code,
            request_id=response.headers.get("x-request-id"),
        ) from None
