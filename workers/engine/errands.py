"""Small work for one of the engine's threads beside its batches: looking at tokens, and at activations."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from workers.engine.errors import EngineError, EngineFailed
from workers.models.errors import TextError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(eq=False)
class Errand(Generic[Result]):
    """`work`, whose result or error completes `done` on the event loop that asked."""

    work: Callable[[], Result]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __post_init__(self) -> None:
        self.done: asyncio.Future[Result] = self.loop.create_future()

    def run(self) -> bool:
        """Do it, unless nobody waits any more. Gives False if it failed by no fault of its texts."""
        if self.done.cancelled():
            return True
        try:
            result = self.work()
        except (TextError, EngineError) as error:
            self.fail(error)
        except Exception as error:
            logger.error("an errand failed: %s", type(error).__name__, exc_info=error)
            self.fail(EngineFailed("the model failed on these texts"))
            return False
        else:
            self._tell(lambda: self.done.set_result(result))
        return True

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self._tell(lambda: self.done.set_exception(error))

    def _tell(self, end: Callable[[], None]) -> None:
        try:
            self.loop.call_soon_threadsafe(lambda: None if self.done.done() else end())
        except RuntimeError:
            logger.debug("a result for a closed event loop dropped")
