"""Tokens and states of texts, beside classification.

Neither tokenizer nor model may be used by two threads at once, so the engine's own threads do the work, in tasks small
enough for requests to go on between them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Site
from workers.engine.errors import DeadlineExceeded, EngineError, EngineFailed, QueueFull, RequestTooLarge
from workers.engine.requests import Result, Task
from workers.models.loading import LoadedModel
from workers.models.texts import TokenizedText

MAX_LISTED_TOKENS = 16384
"""Most tokens that one reply lists."""
MAX_CALLS = 32
"""Most calls at once; more are refused."""

AddTask = Callable[[Task[Any]], None]


class Inspector:
    """Tokens and states of texts.

    Args:
        batch_tokens: padded tokens of one pass.
        to_tokenizer, to_model: hand a task to the engine's threads.
        unavailable: why the engine takes nothing new, or None.
    """

    def __init__(
        self,
        model: LoadedModel,
        batch_tokens: int,
        to_tokenizer: AddTask,
        to_model: AddTask,
        unavailable: Callable[[], EngineError | None],
    ) -> None:
        self._model, self._batch_tokens = model, batch_tokens
        self._to_tokenizer, self._to_model = to_tokenizer, to_model
        self._unavailable = unavailable
        self._calls = 0

    async def tokens(self, texts: Sequence[str], *, timeout: float | None = None) -> list[TokenizedText]:
        """The tokens of each text as the model would get them; texts that are too long are cut.

        Raises:
            QueueFull, RequestTooLarge, Draining, DeadlineExceeded, EngineFailed: see `workers.engine.errors`.
        """
        tokenizer = self._model.tokens

        def describe() -> list[TokenizedText]:
            tokens = sum(len(each.ids) for each in tokenizer.encode(texts, keep_empty=True))
            if tokens > MAX_LISTED_TOKENS:  # checked before the slow part
                raise RequestTooLarge("tokens", tokens, MAX_LISTED_TOKENS, "a reply")
            return tokenizer.describe(texts)

        async with self._call(timeout):
            return await self._run(describe, self._to_tokenizer)

    async def states(
        self,
        texts: Sequence[str],
        layer: int,
        *,
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Each text's state at one block before anything is erased, [N, D]; texts that are too long are cut.

        Raises:
            QueueFull, Draining, DeadlineExceeded, EngineFailed, EmptyText: see `Engine.classify`.
        """
        model = self._model
        found = np.empty((len(texts), model.identity.hidden_size), np.float32)
        async with self._call(timeout):
            encoded = await self._run(lambda: model.tokens.encode(texts), self._to_tokenizer)
            batches = model.tokens.batches(encoded, self._batch_tokens, model.device)

            def record_next() -> int:
                rows, batch = next(batches)
                states = model.steered.record(batch, [layer], site, position)[1][layer]
                found[rows] = states.float().cpu().numpy()
                return len(rows)

            recorded = 0
            while recorded < len(texts):
                recorded += await self._run(record_next, self._to_model)
        return found

    @asynccontextmanager
    async def _call(self, timeout: float | None) -> AsyncIterator[None]:
        """One call; raises why it is refused, or that it was not done in time."""
        if (error := self._unavailable()) is not None:
            raise error
        if self._calls >= MAX_CALLS:
            raise QueueFull(1.0)
        self._calls += 1
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            raise DeadlineExceeded(timeout or 0.0) from None
        finally:
            self._calls -= 1

    async def _run(self, work: Callable[[], Result], add: AddTask) -> Result:
        task = Task(work)
        add(task)
        if isinstance(error := self._unavailable(), EngineFailed):  # the threads may have ended before
            raise error
        return await task.done
