"""Requests on their way through the engine, and their answers: one future a request, one wake-up a batch."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from range_store.erasure import Erasure
from workers.engine.admission import Source
from workers.engine.errors import EngineError
from workers.engine.masks import DevicePlan
from workers.models.tokens import Encoded

logger = logging.getLogger(__name__)

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TextAnswer:
    """One text's logits [K], those of the bare model if `compare` was asked for, and what was done to it."""

    logits: Logits
    baseline: Logits | None
    masked_neurons: int
    truncated: bool
    tokens: int


@dataclass(frozen=True, eq=False)
class Answer:
    """A request's answers in its order, and the plan that it was admitted with.

    `erasures` have their layers resolved to block indices; `enforced` names the concepts that an operator enforces.
    """

    texts: tuple[TextAnswer, ...]
    source: Source
    erasures: tuple[Erasure, ...]
    enforced: frozenset[str]
    range_set: str | None
    generation: str | None


@dataclass(eq=False)
class Request:
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    answers: list[TextAnswer | None]
    missing: int
    abandoned: bool = False
    running: bool = False


@dataclass(eq=False)
class Text:
    """One text that waits; satisfies `queue.Queued`."""

    request: Request
    index: int
    encoded: Encoded
    plan: DevicePlan
    compare: bool
    split: int
    variants: int
    packed: bool
    admitted: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        return len(self.encoded.ids)

    @property
    def plan_key(self) -> str:
        return self.plan.plan.key

    @property
    def abandoned(self) -> bool:
        return self.request.abandoned


def reply(answered: list[tuple[Text, TextAnswer | EngineError]], then: Callable[[], object] = lambda: None) -> None:
    """Hand answers to their requests, with one wake-up of each event loop; `then` is called there afterwards."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Text, TextAnswer | EngineError]]] = defaultdict(list)
    for text, answer in answered:
        by_loop[text.request.loop].append((text, answer))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(settle, own, then)
        except RuntimeError:  # the loop is closed: nobody waits there any more
            logger.debug("answers for a closed event loop dropped")


def settle(answered: list[tuple[Text, TextAnswer | EngineError]], then: Callable[[], object]) -> None:
    """On the event loop: fill in answers and complete the requests that have all of theirs."""
    for text, answer in answered:
        request = text.request
        if request.done.done():
            continue
        if isinstance(answer, EngineError):
            request.done.set_exception(answer)
            continue
        request.answers[text.index] = answer
        request.missing -= 1
        if not request.missing:
            request.done.set_result(None)
    then()
