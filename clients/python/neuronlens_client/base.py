"""What both clients are made of."""

import os
from collections.abc import Mapping
from typing import Final, Unpack

from neuronlens_client.api import Api
from neuronlens_client.calls import Caller
from neuronlens_client.erasing import ErasureContext, ErasureSettings, ErasureSpec, specs

Texts = list[str] | tuple[str, ...]
"""Not any sequence of str: a str is one, and is answered otherwise."""

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class BaseClient:
    """What both clients are made of.

    Args:
        url: where the server listens, with or without a path before `/v1`.
        api_key: None: what `NEURONLENS_API_KEY` holds, if anything.
        timeout: seconds for each request, its retries included. The server is told, and gives up then too.
        retries: how often a request is tried again: after 429 and 503, and after a lost connection if it changes
            nothing or is guarded by `if_match`. Pauses grow from ¼ s to 8 s at random, on top of `Retry-After`.
        model: the served name that is meant; None: the server's first, or only, one.
        headers: for every request; `traceparent` is passed on by the server.
        batch_size: texts of one request; None: as many as the server takes.

    Raises:
        ValueError: no such URL, key, timeout or number of retries.
    """

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
        if batch_size is not None and batch_size < 1:
            raise ValueError("batch_size must be 1 or more")
        key = os.environ.get("NEURONLENS_API_KEY") if api_key is None else api_key
        self._caller = Caller(url, key or None, timeout, retries, model, headers or {})
        self._api = Api(self._caller, batch_size)

    @property
    def _trust_env(self) -> bool:
        # a proxy of the environment is for the world outside, not for this machine
        return self._caller.host not in _LOOPBACK

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._caller.shown}>"

    def erase(self, *concepts: str | ErasureSpec, **settings: Unpack[ErasureSettings]) -> ErasureContext:
        """A `with` block in which this client's requests erase concepts, in this thread or task only.

        Inner blocks add to outer ones, and win where they differ; a block without concepts erases nothing. An `erase=`
        of a single call wins over all blocks. What is live on the server is never changed.

        >>> with client.erase("Sports", tau=2):
        ...     client.classify("The coach praised the goalkeeper.")
        """
        return ErasureContext(self._api, specs(concepts, settings))
