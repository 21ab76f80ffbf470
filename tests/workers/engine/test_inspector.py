"""Tokens and states of texts on the engine's threads: requests end when the engine ends."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from tests.workers.engine.running import Running
from workers.engine.errors import Draining, EngineFailed
from workers.models.texts import TokenizedText

Start = Callable[..., Running]
TEXTS = ["a goal in the last minute of the final", "shares fell", "a probe sent back pictures"] * 20


def test_states_do_not_depend_on_how_they_are_batched(start: Start) -> None:
    running = start()

    async def ask() -> tuple[np.ndarray, list[np.ndarray]]:
        inspector = running.engine.inspector
        return await inspector.states(TEXTS[:6], 1), [await inspector.states([text], 1) for text in TEXTS[:6]]

    together, alone = asyncio.run(ask())
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_closing_engine_answers_or_rejects_every_request(start: Start) -> None:
    running = start(max_batch_tokens=16)

    async def ask() -> list[object]:
        inspector = running.engine.inspector
        asked = [asyncio.ensure_future(inspector.states(TEXTS, 0)) for _ in range(4)]
        asked.append(asyncio.ensure_future(inspector.tokens(TEXTS)))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(asyncio.to_thread(running.engine.close))
        async with asyncio.timeout(60):
            ended = await asyncio.gather(*asked, return_exceptions=True)
            await closing
            ended += await asyncio.gather(inspector.tokens(["late"]), return_exceptions=True)
        return ended

    *ended, tokens, late = asyncio.run(ask())
    assert all(isinstance(each, np.ndarray | Draining) for each in ended), ended
    assert isinstance(tokens, list)
    assert all(isinstance(each, TokenizedText) for each in tokens)
    assert isinstance(late, Draining)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_fail_when_the_engine_dies(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the device is gone")

    async def ask() -> list[object]:
        inspector = running.engine.inspector
        async with asyncio.timeout(60):
            asked = [inspector.states(TEXTS, 0) for _ in range(3)]
            ended = await asyncio.gather(*asked, return_exceptions=True)
            while running.engine.failure is None:
                await asyncio.sleep(0.01)
            return ended + await asyncio.gather(inspector.tokens(["late"]), return_exceptions=True)

    with monkeypatch.context() as patched:
        patched.setattr(running.model.steered, "record", broken)
        patched.setattr(running.model.steered, "logits", broken)
        ended = asyncio.run(ask())
    assert isinstance(ended[0], EngineFailed)
    assert all(isinstance(each, EngineFailed | Draining) for each in ended), ended
    assert isinstance(ended[-1], EngineFailed)
