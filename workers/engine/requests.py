"""Requests on their way through the engine: one future a request, one wake-up a batch."""

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.engine.admission import Admission
from workers.engine.answers import TextAnswer
from workers.engine.masks import DevicePlan
from workers.models.texts import TextOrPair
from workers.models.tokens import Encoded

logger = logging.getLogger(__name__)

Stage = Literal["tokenizing", "queued", "running"]


@dataclass(eq=False)
class Request:
    """Texts that were admitted with a plan, and the answers that are there already.

    `done` is completed on `loop` when all are, or with the first error. `stage`: how far it has come. `context`: of the
    caller, for what other threads log about it. `began`: when its first text's batch did, by the monotonic clock.
    """

    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    texts: Sequence[TextOrPair]
    admission: Admission
    compare: bool
    truncate: bool
    answers: list[TextAnswer | None]
    missing: int
    abandoned: bool = False
    stage: Stage = "tokenizing"
    received: float = field(default_factory=time.monotonic)
    began: float | None = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


@dataclass(eq=False)
class Text:
    """One text that waits; satisfies `queue.Queued`."""

    request: Request
    index: int
    encoded: Encoded
    split: int
    variants: int
    packed: bool
    admitted: float = field(default_factory=time.monotonic)

    @property
    def plan(self) -> DevicePlan:
        return self.request.admission.plan

    @property
    def guard(self) -> DevicePlan | None:
        return self.request.admission.guard

    @property
    def compare(self) -> bool:
        return self.request.compare

    @property
    def tokens(self) -> int:
        return len(self.encoded.ids)

    @property
    def plan_key(self) -> str:
        return self.plan.plan.key

    @property
    def abandoned(self) -> bool:
        return self.request.abandoned


def reply(answered: Iterable[tuple[Text, TextAnswer]], then: Callable[[], object]) -> None:
    """Hand answers to their requests, with one wake-up of each event loop; `then` is called there afterwards."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Text, TextAnswer]]] = defaultdict(list)
    for text, answer in answered:
        by_loop[text.request.loop].append((text, answer))
    for loop, own in by_loop.items():
        _soon(loop, _settle, own, then)


def fail(failed: Iterable[tuple[Request, Exception]]) -> None:
    """End requests with an error; those that are ended already stay as they are."""
    for request, error in failed:
        _soon(request.loop, _end, request, error)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:  # the loop is closed: nobody waits there any more
        logger.debug("answers for a closed event loop dropped")


def _settle(answered: list[tuple[Text, TextAnswer]], then: Callable[[], object]) -> None:
    for text, answer in answered:
        request = text.request
        request.answers[text.index] = answer
        request.missing -= 1
        if not request.missing and not request.done.done():
            request.done.set_result(None)
    then()


def _end(request: Request, error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)
