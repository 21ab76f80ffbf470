"""What to erase, as the JSON of `erase` says it, and the blocks of code in which it is erased."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import Any, Final, Literal, Required, Self, TypedDict

Layer = int | Sequence[int] | Literal["all"]
Replacement = Literal["zero", "mean"] | Mapping[Literal["damp"], float]


class ErasureSettings(TypedDict, total=False):
    """How to erase; what is left out has the server's default (docs/method.md)."""

    method: Literal["range", "neuron"]
    rule: Literal["sigma"]
    tau: float
    top_fraction: float
    ranking: Literal["max", "probe", "probeless", "probeless_global", "selectivity"]
    layer: Layer
    replacement: Replacement


class ErasureSpec(ErasureSettings, total=False):
    """One concept to erase: `{"concept": "Sports", "tau": 2}`."""

    concept: Required[str]


class ErasuresSpec(ErasureSettings, total=False):
    """Several concepts to erase in the same way: `{"concepts": ["Sports", "World"], "tau": 2}`."""

    concepts: Required[Sequence[str]]


class LiveSpec(ErasureSpec, total=False):
    """One concept to erase live. `enforced`: from every request, whatever it asks for; `expires_in`: seconds."""

    enforced: bool
    reason: str | None
    expires_in: float | None


Erase = str | ErasureSpec | ErasuresSpec | Sequence[str | ErasureSpec]
"""A concept, one with settings, several in the same way, or a list: as in `POST /v1/classify`."""


class FromContext(Enum):
    """Stands for "what the enclosing `with client.erase(…)` says, else what is live"."""

    CONTEXT = "context"


CONTEXT: Final = FromContext.CONTEXT


def listed(erase: Erase) -> Any:
    """`erase` as JSON: a single concept becomes a list of one."""
    if isinstance(erase, str) or (isinstance(erase, Mapping) and "concept" in erase):
        return [erase]
    return erase if isinstance(erase, Mapping) else list(erase)


def specs(concepts: Sequence[str | ErasureSpec], settings: ErasureSettings) -> tuple[ErasureSpec, ...]:
    """Each concept with the settings that all share; its own, if it comes with some, win."""
    return tuple(
        ErasureSpec(**{**settings, **({"concept": each} if isinstance(each, str) else each)}) for each in concepts
    )


class ErasureContext:
    """A block of code in which one client's requests erase concepts; for `with` and for `async with`.

    It may be entered again, inside itself too, and by several threads and tasks at once: each sees its own blocks only.
    Like every context variable, it reaches tasks that are started inside the block, and not threads.
    """

    def __init__(self, of: object, erased: Sequence[ErasureSpec]) -> None:
        self._of = of
        self._erased = tuple(erased)

    def __enter__(self) -> Self:
        _ENTERED.set((*_ENTERED.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered = _ENTERED.get()
        last = max((index for index, each in enumerate(entered) if each is self), default=None)
        if last is not None:  # else a generator was closed in another context than it began in
            _ENTERED.set((*entered[:last], *entered[last + 1 :]))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


_ENTERED: ContextVar[tuple[ErasureContext, ...]] = ContextVar("neuronlens_erasing", default=())


def erased_here(of: object) -> list[ErasureSpec] | None:
    """What the blocks around the caller erase for a client; None outside of all blocks.

    Inner blocks add to outer ones and come first: where settings of one concept, or replacements of one neuron,
    differ, the inner one's hold. A block that names nothing takes back all that is around it.
    """
    merged: dict[str, ErasureSpec] | None = None
    for block in _ENTERED.get():
        if block._of is of:
            inner = {each["concept"]: each for each in block._erased}
            outer = (merged or {}) if inner else {}
            merged = inner | {concept: each for concept, each in outer.items() if concept not in inner}
    return None if merged is None else list(merged.values())
