"""Answers, and the interface of whatever gives them: the engine of this process, or a fleet of engines elsewhere.

Without torch: replying over HTTP needs no more than this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Erasure, Site
from workers.engine.errors import QueueFull
from workers.engine.settings import EngineSettings
from workers.models.texts import TextOrPair, TokenizedText

Logits = npt.NDArray[np.float32]
Source = Literal["live", "request", "none"]
"""Where the erasures of an answer come from."""


@dataclass(frozen=True, eq=False)
class TextAnswer:
    """One text's logits [K], those of the bare model if the request compares them, and counts."""

    logits: Logits
    baseline: Logits | None
    masked_neurons: int
    truncated: bool
    tokens: int


@dataclass(frozen=True, eq=False)
class Answer:
    """A request's answers in its order, and the plan that it was admitted with.

    Attributes:
        erasures: with their layers resolved to block indices. enforced: the concepts that an operator enforces.
        queued_seconds: until its first text's batch began. running_seconds: from then on.
        replica: of a fleet, the one that answered.
    """

    texts: tuple[TextAnswer, ...]
    source: Source
    erasures: tuple[Erasure, ...]
    enforced: frozenset[str]
    range_set: str | None
    generation: str | None
    queued_seconds: float = 0.0
    running_seconds: float = 0.0
    replica: str | None = None


@dataclass(frozen=True)
class Load:
    """How much an engine has to do.

    Attributes:
        tokens: that wait or run. retry_after: seconds, if it takes no request now.
        busy_seconds: how long its model has run since the start.
    """

    tokens: int
    retry_after: float | None
    busy_seconds: float


class TextInspector(Protocol):
    """Gives tokens and states of texts; see `workers.engine.inspector.Inspector`."""

    async def tokens(self, texts: Sequence[str], *, timeout: float | None = None) -> list[TokenizedText]:
        """The tokens of each text."""
        ...

    async def states(
        self,
        texts: Sequence[str],
        layer: int,
        *,
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Each text's state at one block, [N, D]."""
        ...


class Answerer(Protocol):
    """Answers texts under erasures; its members are described in `workers.engine.engine.Engine`."""

    @property
    def settings(self) -> EngineSettings: ...

    @property
    def inspector(self) -> TextInspector: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def ready(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    def drain(self) -> None: ...

    def refusal(self, *, counted: bool = True) -> QueueFull | None: ...

    async def classify(
        self,
        texts: Sequence[TextOrPair],
        erase: Sequence[Erasure] | None,
        *,
        compare: bool = False,
        truncate: bool = True,
        timeout: float | None = None,
        min_generation: str | None = None,
    ) -> Answer: ...
