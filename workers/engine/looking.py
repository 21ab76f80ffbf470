"""Looking at what the model makes of texts, beside classification: their tokens, and their states.

Neither tokenizer nor model may be used by two threads at once, so it is the engine's own that do it, in errands small
enough for requests to go on between them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Site
from workers.engine.errands import Errand, Result
from workers.engine.errors import DeadlineExceeded, EngineError, EngineFailed, QueueFull, RequestTooLarge
from workers.models.loading import LoadedModel
from workers.models.shown import ShownText
from workers.models.tokens import length_sorted

MOST_SHOWN = 16384
"""Tokens that one reply may list."""
MOST_WAITING = 32
"""Calls at once; more are refused."""

Put = Callable[[Errand[Any]], None]


class Looking:
    """Tokens and states of texts.

    Args:
        batch_tokens: padded tokens of one pass.
        to_tokenizer, to_model: hand an errand to the engine's threads.
        refusal: why the engine takes nothing new, if so.
    """

    def __init__(
        self,
        model: LoadedModel,
        batch_tokens: int,
        to_tokenizer: Put,
        to_model: Put,
        refusal: Callable[[], EngineError | None],
    ) -> None:
        self._model, self._batch_tokens = model, batch_tokens
        self._to_tokenizer, self._to_model = to_tokenizer, to_model
        self._refusal = refusal
        self._waiting = 0

    async def tokens(self, texts: Sequence[str], *, timeout: float | None = None) -> list[ShownText]:
        """The tokens of each text as the model would get them, too long ones cut.

        Raises:
            QueueFull, RequestTooLarge, Draining, DeadlineExceeded, EngineFailed: see `workers.engine.errors`.
        """
        tokenizer = self._model.tokens

        def show() -> list[ShownText]:
            tokens = sum(len(each.ids) for each in tokenizer.encode(texts, keep_empty=True))
            if tokens > MOST_SHOWN:  # known before they are looked at one by one
                raise RequestTooLarge("tokens", tokens, MOST_SHOWN, "a reply")
            return tokenizer.show(texts)

        async with self._within(timeout):
            return await self._run(show, self._to_tokenizer)

    async def states(
        self,
        texts: Sequence[str],
        layer: int,
        *,
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """Each text's state at one block before anything is erased, [N, D]; too long texts are cut.

        Batches of requests go on between the passes of this one.

        Raises:
            QueueFull, Draining, DeadlineExceeded, EngineFailed, EmptyText: as `classify` does.
        """
        model = self._model
        found = np.empty((len(texts), model.identity.hidden_size), np.float32)
        async with self._within(timeout):
            encoded = await self._run(lambda: model.tokens.encode(texts), self._to_tokenizer)
            for rows in length_sorted([len(each.ids) for each in encoded], self._batch_tokens):

                def run(rows: list[int] = rows) -> npt.NDArray[np.float32]:
                    batch = model.tokens.pad([encoded[row].ids for row in rows], model.device)
                    _, states = model.steered.record(batch, [layer], site, position)
                    array: npt.NDArray[np.float32] = states[layer].float().cpu().numpy()
                    return array

                found[rows] = await self._run(run, self._to_model)
        return found

    @asynccontextmanager
    async def _within(self, timeout: float | None) -> AsyncIterator[None]:
        """Raises what is to be refused, or is not done in time."""
        if (refusal := self._refusal()) is not None:
            raise refusal
        if self._waiting >= MOST_WAITING:
            raise QueueFull(1.0)
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            raise DeadlineExceeded(timeout or 0.0) from None
        finally:
            self._waiting -= 1

    async def _run(self, work: Callable[[], Result], put: Put) -> Result:
        errand = Errand(work)
        put(errand)
        if isinstance(refusal := self._refusal(), EngineFailed):  # nobody may do it any more
            raise refusal
        return await errand.done
