"""Control through a running server's `/v1`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from app.cli.exits import CONFLICT, FAILED, UNREACHABLE, USAGE, CommandError
from app.settings import LOOPBACK
from range_store.erasure import Erasure
from range_store.live import AuditEntry, LiveErasure, LiveState
from range_store.published import Published
from range_store.range_set import Provenance

TIMEOUT = 30.0
"""Seconds for one answer."""

_EXIT_CODES = {
    400: USAGE,
    413: USAGE,
    422: USAGE,
    404: CONFLICT,
    409: CONFLICT,
    412: CONFLICT,
    502: UNREACHABLE,
    503: UNREACHABLE,
    504: UNREACHABLE,
}
"""Exit code by status; any other failure is FAILED."""


class ServerControl:
    """Range sets and live erasures of one model of a server; a context manager.

    Args:
        url: where it listens, with or without a path before `/v1`.
        model: its served name; None: the server's only one.
        api_key: what it asks for, if it asks.

    Raises:
        CommandError: no such URL; and, from every method, the server's problem in one line.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        try:
            parts = httpx.URL(self._url)
        except httpx.InvalidURL:
            parts = httpx.URL("")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise CommandError(f"{url!r} is no URL of a server: it must be like http://127.0.0.1:8000", USAGE)
        # a proxy of the environment is for the world outside, not for this machine
        self._client = httpx.Client(timeout=TIMEOUT, trust_env=parts.host not in LOOPBACK)
        if api_key:
            self._client.headers["X-API-Key"] = api_key
        self._model = {"model": model} if model else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def range_sets(self) -> Sequence[Published]:
        answer = self._call("GET", "range-sets")
        with _understanding(self._url):
            return [
                Published(
                    each["id"], each["published_at"], each["active"], Provenance.model_validate(each["provenance"])
                )
                for each in answer["range_sets"]
            ]

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        return self._state(self._call("PUT", "range-sets/active", {"id": range_set, "force": force}, if_match))

    def live(self) -> LiveState:
        return self._state(self._call("GET", "erasures"))

    def switch_on(self, erasure: LiveErasure, *, if_match: str | None) -> LiveState:
        body = erasure.erasure.model_dump(mode="json", exclude={"concept", "layers"})
        body |= {"layer": erasure.erasure.layers, "enforced": erasure.enforced, "reason": erasure.reason}
        if erasure.expires_at is not None:
            body["expires_in"] = max(erasure.expires_at - time.time(), 0.001)
        return self._state(self._call("PUT", f"erasures/{_path(erasure.concept)}", body, if_match))

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        named = {"reason": reason} if reason else {}
        return self._state(self._call("DELETE", f"erasures/{_path(concept)}", None, if_match, named))

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        return self._state(self._call("PUT", "erasures", {"erasures": [], "reason": reason}, if_match))

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        answer = self._call("GET", "audit", parameters={"limit": str(limit)})
        with _understanding(self._url):
            return [AuditEntry.model_validate(each) for each in answer["entries"]]

    def _state(self, answer: Any) -> LiveState:
        with _understanding(self._url):
            erasures = tuple(
                LiveErasure(
                    erasure=Erasure.model_validate({name: each[name] for name in Erasure.model_fields}),
                    **{name: each[name] for name in LiveErasure.model_fields if name != "erasure"},
                )
                for each in answer["erasures"]
            )
            return LiveState(generation=answer["generation"], range_set=answer["range_set"], erasures=erasures)

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        if_match: str | None = None,
        parameters: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        headers = {"If-Match": f'"{if_match}"'} if if_match else {}
        parameters = {**self._model, **parameters}
        try:
            answer = self._client.request(
                method, f"{self._url}/v1/{path}", params=parameters, json=body, headers=headers
            )
            decoded = answer.json() if answer.content else None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise CommandError(f"no answer from {self._url} ({reason}): is the server running?", UNREACHABLE) from None
        except ValueError:
            decoded = None
        if answer.is_success and decoded is not None:
            return decoded
        raise _problem(answer, decoded, self._url)


def _path(concept: str) -> str:
    """A concept in a path, whatever it holds."""
    return quote(concept, safe="").replace(".", "%2E")  # else clients resolve "." and ".." before they send them


@contextmanager
def _understanding(url: str) -> Iterator[None]:
    try:
        yield
    except (ValidationError, KeyError, TypeError):
        raise CommandError(f"{url} answered what this command does not understand: is it another version?") from None


def _problem(answer: httpx.Response, decoded: Any, url: str) -> CommandError:
    """A problem+json as one line; whatever else answered as what it is."""
    if not isinstance(decoded, dict) or "code" not in decoded:
        return CommandError(
            f"{url} answered {answer.status_code} {answer.reason_phrase}, and not as NeuronLens does: is it one?",
            FAILED,
        )
    code = CONFLICT if decoded["code"] == "no_range_set" else _EXIT_CODES.get(answer.status_code, FAILED)
    message = str(decoded.get("detail") or decoded.get("title") or decoded["code"])
    if answer.status_code == 401:
        message = "this server wants an API key: set NEURONLENS_API_KEY to one that is good"
    request = decoded.get("request_id")
    return CommandError(f"{message} ({decoded['code']}{f', request {request}' if request else ''})", code)
