"""Blocks of code in which the requests of one client erase concepts."""

from collections.abc import Sequence
from contextvars import ContextVar
from enum import Enum
from typing import Final, Self

from neuronlens_client.request_types import ErasureSettings, ErasureSpec


class FromContext(Enum):
    """The type of `CONTEXT`."""

    CONTEXT = "context"


CONTEXT: Final = FromContext.CONTEXT
"""Erase what the enclosing `with client.erase(…)` blocks name; outside of them, what is live."""


class ErasureContext:
    """A block of code in which one client's requests erase concepts; for `with` and for `async with`.

    It may be entered repeatedly, inside itself, and by several threads and tasks at once, which do not share blocks.
    As with every context variable, tasks that are started inside the block inherit it, and threads do not.
    """

    def __init__(self, client: object, concepts: Sequence[str | ErasureSpec], settings: ErasureSettings) -> None:
        self.client = client
        self.erasures = tuple(
            ErasureSpec(**{**settings, **({"concept": each} if isinstance(each, str) else each)}) for each in concepts
        )

    def __enter__(self) -> Self:
        _ENTERED.set((*_ENTERED.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        entered = _ENTERED.get()
        last = max((index for index, each in enumerate(entered) if each is self), default=None)
        if last is not None:  # else a generator was closed in another context than the one it began in
            _ENTERED.set((*entered[:last], *entered[last + 1 :]))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self.__exit__(*error)


_ENTERED: ContextVar[tuple[ErasureContext, ...]] = ContextVar("neuronlens_erasures", default=())


def erasures_in_context(client: object) -> list[ErasureSpec] | None:
    """What the enclosing blocks of a client erase; None outside of all blocks.

    Inner blocks add to outer ones and come first, so that their settings of a concept, and their replacement of a
    neuron, take precedence. A block without concepts cancels all blocks around it.
    """
    merged: dict[str, ErasureSpec] | None = None
    for block in _ENTERED.get():
        if block.client is client:
            inner = {each["concept"]: each for each in block.erasures}
            outer = (merged or {}) if inner else {}
            merged = inner | {concept: each for concept, each in outer.items() if concept not in inner}
    return None if merged is None else list(merged.values())
