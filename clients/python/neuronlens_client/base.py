"""What the synchronous and the asynchronous client share: options, headers and erasures of a request."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Unpack
from uuid import uuid4

import httpx

from neuronlens_client.call import API_KEY, Call, CallOptions, json_bytes, origin
from neuronlens_client.erasure_context import CONTEXT, ErasureContext, FromContext, erasures_in_context
from neuronlens_client.request_types import Erase, ErasureSettings, ErasureSpec, Wait, erase_json

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class BaseClient:
    """Options of a client, checked, and the requests that follow from them."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout: float,
        retries: int,
        model: str | None,
        headers: Mapping[str, str] | None,
        batch_size: int | None,
    ) -> None:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            parts = httpx.URL("")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError("invalid url: expected one such as http://127.0.0.1:8000")
        key = os.environ.get("NEURONLENS_API_KEY") if api_key is None else api_key
        if key and not API_KEY.fullmatch(key):
            raise ValueError("invalid api_key: it has a character that no key has, such as a space or a line break")
        if not timeout > 0:
            raise ValueError("invalid timeout: expected more than 0 seconds")
        if retries < 0:
            raise ValueError("invalid retries: expected 0 or more")
        if batch_size is not None and batch_size < 1:
            raise ValueError("invalid batch_size: expected 1 or more")
        self._url = url.rstrip("/")
        # a proxy named in the environment is for other hosts than this one
        self._trust_env = parts.host not in _LOOPBACK
        self._timeout, self._retries, self._batch_size = timeout, retries, batch_size
        self._query = {"model": model} if model else {}
        self._headers = _lower(headers) | ({"x-api-key": key} if key else {})

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {origin(self._url)}>"

    def erase(self, *concepts: str | ErasureSpec, **settings: Unpack[ErasureSettings]) -> ErasureContext:
        """A `with` block in which this client's requests erase concepts, in the current thread or task only.

        Inner blocks add to outer ones and take precedence; a block without concepts cancels the blocks around it. The
        `erase` argument of a call takes precedence over all blocks. The live erasures on the server do not change.

        >>> with client.erase("Sports", tau=2):
        ...     client.classify("The coach praised the goalkeeper.")
        """
        return ErasureContext(self, concepts, settings)

    def _new_call(self, method: str, path: str, **options: Unpack[CallOptions]) -> Call:
        timeout, if_match = options.get("timeout"), options.get("if_match")
        params, body = options.get("params", {}), options.get("body")
        headers = self._headers | _lower(options.get("headers"))
        headers.setdefault("x-request-id", uuid4().hex)
        if if_match is not None:
            headers["if-match"] = f'"{if_match}"'
        if body is not None:
            headers["content-type"] = "application/json"
        return Call(
            method,
            self._url + path,
            params=self._query | {name: value for name, value in params.items() if value is not None},
            content=None if body is None else json_bytes(body),
            headers=headers,
            deadline=time.monotonic() + (self._timeout if timeout is None else timeout),
            retries=options.get("retries", self._retries),
            repeatable=options.get("repeatable", method == "GET" or if_match is not None),
        )

    def _classify_body(self, erase: Erase | FromContext | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """The body of `POST /v1/classify` without its texts."""
        erasures = erasures_in_context(self) if erase is CONTEXT else erase
        return {**options} if erasures is None else {**options, "erase": erase_json(erasures)}

    def _batch_headers(self, headers: Mapping[str, str] | None, batches: int) -> list[dict[str, str]]:
        """Headers of each request of one call. Their ids are the call's; a number follows if there are several."""
        shared = self._headers | _lower(headers)
        call_id = shared.get("x-request-id", uuid4().hex)
        return [shared | {"x-request-id": f"{call_id}.{batch}" if batches > 1 else call_id} for batch in range(batches)]


def wait_params(wait: Wait | None, wait_seconds: float | None) -> dict[str, Any]:
    """Query parameters of a change of the live state."""
    return {"wait": wait, "wait_seconds": wait_seconds}


def in_batches(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """Texts in batches of at most `size`; no texts are one empty batch."""
    return [texts[start : start + size] for start in range(0, max(len(texts), 1), size)]


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {name.lower(): value for name, value in (headers or {}).items()}
