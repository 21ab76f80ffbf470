"""What comes all at once: cancellations, toggles under load, more than there is room for. Nothing is left hanging."""

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from range_store.erasure import Erasure
from range_store.live import LiveErasure
from tests.workers.checkpoints import LABELS
from tests.workers.engine.running import NEAR, TEXTS, TOLERANCE, Running, alone
from tests.workers.texts import labelled_texts
from workers.engine.answers import Answer
from workers.engine.errors import DeadlineExceeded, QueueFull, RequestTooLarge
from workers.engine.requests import Request, Text
from workers.models.errors import TextTooLong


def waiting(service: Running) -> tuple[int, int, int]:
    """Texts and tokens in the queue, and texts that are still to be tokenized."""
    engine = service.engine
    return len(engine._queue), engine._queue.tokens, engine._untokenized


def test_a_storm_of_cancellations_leaves_nothing_behind(start: Callable[..., Running]) -> None:
    """Clients that hang up at any moment, and deadlines of any length: the others are answered rightly."""
    service = start(max_batch_tokens=300, max_queue_seconds=1e9)
    rng = random.Random(1)
    known = {text: alone(service, text, [])[0] for text in TEXTS}

    async def one(number: int) -> str:
        texts = rng.choices(TEXTS, k=rng.randrange(1, 4))
        timeout = rng.choice([None, None, 0.0005, 0.005, 0.05])
        task = asyncio.create_task(service.engine.classify(texts, [], timeout=timeout))
        if number % 3 == 0:
            for _ in range(rng.randrange(1, 40)):
                await asyncio.sleep(0)
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            return "cancelled"
        except DeadlineExceeded:
            return "late"
        for text, given in zip(texts, answer.texts, strict=True):
            assert np.abs(known[text] - given.logits).max() < TOLERANCE
        return "answered"

    async def storm() -> list[str]:
        found: list[str] = []
        for _ in range(4):
            found += await asyncio.gather(*(one(number) for number in range(500)))
        for _ in range(2):  # whatever was given up is behind the first, or dropped by it; the second is read alone
            last = await service.engine.classify(TEXTS[:3], [])
            assert len(last.texts) == 3
        return found

    ends = asyncio.run(storm())
    assert set(ends) == {"answered", "cancelled", "late"}
    assert waiting(service) == (0, 0, 0)
    assert service.metric("neuronlens_queue_texts") == service.metric("neuronlens_queue_tokens") == 0
    given_up = [service.metric("neuronlens_cancellations_total", stage=s) for s in ("tokenizing", "queued", "running")]
    assert sum(given_up) == ends.count("cancelled") + ends.count("late")
    assert service.engine.ready
    gc.collect()
    left = [each for each in gc.get_objects() if type(each) in (Request, Text)]
    assert len(left) <= 8, "requests that ended are kept"


def test_a_toggle_storm_under_load_changes_no_request_that_was_admitted(start: Callable[..., Running]) -> None:
    """Promise 4: every answer is that of the erasures of the generation that it names."""
    service = start(max_batch_tokens=300, max_queue_seconds=1e9, max_batch_plans=2, plan_cache=4)
    rng = random.Random(2)
    by_generation: dict[str, list[Erasure]] = {service.store.live().generation: []}
    over = threading.Event()

    def toggle() -> None:
        while not over.is_set():
            wanted = [
                Erasure(concept=concept, tau=rng.choice([0.5, 1.0, 2.5]), top_fraction=rng.choice([0.3, 1.0]))
                for concept in sorted(rng.sample(LABELS, rng.randrange(0, 3)))
            ]
            live = service.store.set_erasures([LiveErasure(erasure=erasure) for erasure in wanted])
            by_generation[live.generation] = wanted
            service.mirror.refresh()

    seen: set[str | None] = set()
    give_up = time.monotonic() + 60

    async def load() -> list[tuple[list[str], Answer]]:
        async def ask() -> list[tuple[list[str], Answer]]:
            found = []
            while len(found) < 25 or (len(seen) <= 5 and time.monotonic() < give_up):
                texts = rng.choices(TEXTS, k=2)
                found.append((texts, await service.engine.classify(texts, None)))
                seen.add(found[-1][1].generation)
            return found

        return [each for some in await asyncio.gather(*(ask() for _ in range(24))) for each in some]

    operator = threading.Thread(target=toggle)
    operator.start()
    try:
        answers = asyncio.run(load())
    finally:
        over.set()
        operator.join()
    assert len(seen) > 5, "toggles came between requests"
    known: dict[tuple[str, str], tuple[np.ndarray, float]] = {}
    for texts, answer in answers:
        assert answer.generation is not None
        erasures = by_generation[answer.generation]
        assert [e.concept for e in answer.erasures] == [e.concept for e in erasures]
        for text, given in zip(texts, answer.texts, strict=True):
            key = (answer.generation, text)
            if key not in known:
                known[key] = alone(service, text, erasures)
            logits, gap = known[key]
            assert np.abs(logits - given.logits).max() < TOLERANCE or gap < NEAR
    assert service.metric("neuronlens_batch_plans_bucket", le="2.0") == service.metric("neuronlens_batch_plans_count")
    assert len(service.engine._planner._plans) <= 4


def test_more_than_there_is_room_for_is_refused_whole_and_the_rest_answered(start: Callable[..., Running]) -> None:
    """Many times what the queue may hold: it never holds more, and each request is answered or refused, never half."""
    service = start(max_batch_tokens=300, max_queue_tokens=2000, max_queue_texts=100)
    seen = [0, 0]
    add = service.engine._queue.add

    def watched(text: Any) -> None:
        add(text)
        seen[0], seen[1] = max(seen[0], len(service.engine._queue)), max(seen[1], service.engine._queue.tokens)

    service.engine._queue.add = watched  # type: ignore[method-assign]
    rng = random.Random(3)

    async def flood() -> list[Any]:
        asks = [service.engine.classify(rng.choices(TEXTS, k=rng.randrange(1, 6)), []) for _ in range(1500)]
        return await asyncio.gather(*asks, return_exceptions=True)

    ends = asyncio.run(flood())
    refused = [end for end in ends if isinstance(end, QueueFull)]
    answered = [end for end in ends if isinstance(end, Answer)]
    assert len(refused) + len(answered) == len(ends)
    assert refused
    assert answered
    assert all(end.retry_after >= 1 for end in refused)
    assert seen[0] <= 100
    assert seen[1] <= 2000
    assert waiting(service) == (0, 0, 0)
    assert service.metric("neuronlens_rejections_total", reason="queue_full") == len(refused)
    assert len(asyncio.run(service.engine.classify(TEXTS[:4], [])).texts) == 4


def test_how_long_what_waits_may_take_is_bounded_at_the_measured_rate(start: Callable[..., Running]) -> None:
    service = start(max_queue_seconds=0.01)
    texts = [text for text, _ in labelled_texts(400, seed=2)]
    service.ask(texts[:300], [])  # a backlog of several batches: the rate is known now
    rate = service.engine._tokens_per_second
    assert rate > 0

    async def flood() -> list[Any]:
        async with service.held():
            first = asyncio.create_task(service.engine.classify(texts, []))
            while not len(service.engine._queue):
                await asyncio.sleep(0)
            with pytest.raises(QueueFull) as full:
                await service.engine.classify(["one more"], [])
        await first
        return [full.value.retry_after]

    (seconds,) = asyncio.run(flood())
    tokens = sum(len(each.ids) for each in service.model.tokens.encode(texts))
    assert seconds == max(1.0, np.ceil((tokens - 0.01 * rate) / rate))


def test_what_is_compared_above_the_split_counts_twice(start: Callable[..., Running]) -> None:
    tokens = sum(len(each.ids) for each in start().model.tokens.encode(TEXTS[:3]))
    service = start(max_queue_tokens=2 * tokens - 1)
    deep = [Erasure(concept="Sports", layers=(0,))]
    assert len(service.ask(TEXTS[:3], deep).texts) == 3
    assert len(service.ask(TEXTS[:3], [Erasure(concept="Sports")], compare=True).texts) == 3, "no block above the split"
    with pytest.raises(RequestTooLarge, match=f"{2 * tokens} tokens"):
        service.ask(TEXTS[:3], deep, compare=True)


def test_a_request_that_cannot_be_tokenized_fails_alone(start: Callable[..., Running]) -> None:
    """Requests are tokenized together; one with a text that is too long touches no other."""
    service = start()
    short = [" ".join(text.split()[:5]) for text in TEXTS[:5]]

    async def ends() -> list[object]:
        async with service.held():
            asks = [service.engine.classify([text], [], truncate=False) for text in [*short, "goal " * 500]]
            tasks = [asyncio.create_task(ask) for ask in asks]
        return await asyncio.gather(*tasks, return_exceptions=True)

    *good, long = asyncio.run(ends())
    assert isinstance(long, TextTooLong), repr(long)
    assert [repr(each) for each in good if isinstance(each, BaseException)] == []
    assert waiting(service) == (0, 0, 0)
