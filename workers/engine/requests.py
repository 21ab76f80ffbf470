"""Work on its way through the engine: requests with their texts, and tasks beside them.

One future per request, and one wake-up of an event loop per batch.
"""

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from range_store.domain.plan import Plan
from workers.engine.admission import Admission
from workers.engine.answers import TextAnswer
from workers.engine.errors import EngineError, EngineFailed
from workers.models.errors import TextError
from workers.models.texts import TextOrPair
from workers.models.tokens import Encoded

logger = logging.getLogger(__name__)

Stage = Literal["tokenizing", "queued", "running"]
Result = TypeVar("Result")


@dataclass(eq=False)
class Request:
    """Texts that were admitted with a plan, and their answers so far. Made on the event loop of its caller.

    Attributes:
        done: completed on `loop` when all texts are answered, or with the first error.
        missing: number of texts without an answer.
        stage: how far it has come.
        received, began: when it came, and when the batch of its first text began, by the monotonic clock.
        context: of the caller, for log lines that other threads write about it.
    """

    texts: Sequence[TextOrPair]
    admission: Admission
    compare: bool
    truncate: bool
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    abandoned: bool = False
    stage: Stage = "tokenizing"
    received: float = field(default_factory=time.monotonic)
    began: float | None = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def __post_init__(self) -> None:
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.answers: list[TextAnswer | None] = [None] * len(self.texts)
        self.missing = len(self.texts)


@dataclass(eq=False)
class Text:
    """One text that waits; satisfies `queue.Queued`."""

    request: Request
    index: int
    encoded: Encoded
    split: int | None
    variants: int
    packed: bool
    admitted: float = field(default_factory=time.monotonic)

    @property
    def plan(self) -> Plan:
        return self.request.admission.plan

    @property
    def guard(self) -> Plan | None:
        return self.request.admission.guard

    @property
    def compare(self) -> bool:
        return self.request.compare

    @property
    def tokens(self) -> int:
        return len(self.encoded.ids)

    @property
    def cost(self) -> int:
        """Tokens over all of its variants."""
        return self.tokens * self.variants

    @property
    def plan_key(self) -> str:
        return self.plan.key

    @property
    def abandoned(self) -> bool:
        return self.request.abandoned


def reply(answered: Iterable[tuple[Text, TextAnswer]], then: Callable[[], object]) -> None:
    """Hand answers to their requests, with one wake-up of each event loop; `then` is called there afterwards."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Text, TextAnswer]]] = defaultdict(list)
    for text, answer in answered:
        by_loop[text.request.loop].append((text, answer))
    for loop, own in by_loop.items():
        _call_soon(loop, _settle, own, then)


def fail(failed: Iterable[tuple[Request, Exception]]) -> None:
    """End requests with an error; those that have ended already stay as they are."""
    for request, error in failed:
        _call_soon(request.loop, _end, request.done, error)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:  # the loop is closed: nobody waits there any more
        logger.debug("dropped a result for a closed event loop")


def _settle(answered: list[tuple[Text, TextAnswer]], then: Callable[[], object]) -> None:
    for text, answer in answered:
        request = text.request
        request.answers[text.index] = answer
        request.missing -= 1
        if not request.missing and not request.done.done():
            request.done.set_result(None)
    then()


def _end(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


@dataclass(eq=False)
class Task(Generic[Result]):
    """Small work for one of the engine's threads between its batches.

    The result or error of `work` completes `done` on the event loop that made the task.
    """

    work: Callable[[], Result]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __post_init__(self) -> None:
        self.done: asyncio.Future[Result] = self.loop.create_future()

    def run(self) -> bool:
        """Do the work, unless nobody waits any more. Returns False if it failed by no fault of its texts."""
        if self.done.cancelled():
            return True
        try:
            result = self.work()
        except (TextError, EngineError) as error:
            self.fail(error)
        except Exception as error:
            logger.error("a task failed: %s", type(error).__name__, exc_info=error)
            self.fail(EngineFailed("the model failed on these texts"))
            return False
        else:
            _call_soon(self.loop, self._complete, result)
        return True

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        _call_soon(self.loop, _end, self.done, error)

    def _complete(self, result: Result) -> None:
        if not self.done.done():
            self.done.set_result(result)
