"""Bursts of requests: cancellations, toggles under load, and more than the queue holds. No request is left hanging."""

import asyncio
import gc
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from tests.workers.engine.running import NEAR, TEXTS, TOLERANCE, Running, alone
from tests.workers.texts import labelled_texts
from workers.engine.answers import Answer
from workers.engine.errors import DeadlineExceeded, QueueFull, RequestTooLarge
from workers.engine.requests import Request, Text
from workers.models.errors import TextTooLong


def waiting(service: Running) -> tuple[int, int, int]:
    """Texts and tokens in the queue, and texts that are not yet tokenized."""
    engine = service.engine
    return len(engine._scheduler.queue), engine._scheduler.queue.tokens, engine._scheduler.untokenized


def kept_requests() -> int:
    gc.collect()
    return sum(type(each) in (Request, Text) for each in gc.get_objects())


def test_cancelled_and_late_requests_leave_nothing_behind(start: Callable[..., Running]) -> None:
    """A third of the requests is cancelled, a third has a short deadline, and a third must be answered.

    While the model is held, none of the first two thirds can be answered; later rounds leave that to chance.
    """
    service = start(max_batch_tokens=300, max_queue_seconds=1e9)
    rng = random.Random(1)
    known = {text: alone(service, text, [])[0] for text in TEXTS}
    kept_before = kept_requests()

    async def request(number: int) -> str:
        texts = rng.choices(TEXTS, k=rng.randrange(1, 4))
        timeout = rng.choice([0.0005, 0.005, 0.05]) if number % 3 == 1 else None
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
        async with service.held():
            tasks = [asyncio.create_task(request(number)) for number in range(150)]
            await asyncio.gather(*tasks[0::3], *tasks[1::3])
        ends = await asyncio.gather(*tasks)
        assert ends == ["cancelled", "late", "answered"] * 50
        for _ in range(3):
            raced = await asyncio.gather(*(request(number) for number in range(150)))
            assert raced[2::3] == ["answered"] * 50
            ends += raced
        for _ in range(2):  # abandoned texts leave the queue before the first; the second runs alone
            assert len((await service.engine.classify(TEXTS[:3], [])).texts) == 3
        return ends

    ends = asyncio.run(storm())
    assert waiting(service) == (0, 0, 0)
    assert service.metric("neuronlens_queue_texts") == service.metric("neuronlens_queue_tokens") == 0
    given_up = [service.metric("neuronlens_cancellations_total", stage=s) for s in ("tokenizing", "queued", "running")]
    assert sum(given_up) == ends.count("cancelled") + ends.count("late")
    assert service.engine.ready
    assert kept_requests() - kept_before <= 8, "ended requests are kept"


def test_toggles_under_load_change_no_admitted_request(start: Callable[..., Running]) -> None:
    """Every answer is that of the erasures of the generation it names, while live erasures change ten times.

    The next change waits until a request has been answered with the last one.
    """
    service = start(max_batch_tokens=300, max_queue_seconds=1e9, max_batch_plans=2, plan_cache_bytes=6000)
    settings = [
        [],
        [Erasure(concept="World")],
        [Erasure(concept="Sports")],
        [Erasure(concept="Business", method="neuron")],
        [Erasure(concept="Business", method="neuron"), Erasure(concept="Sports")],
    ]
    reference: dict[str, list[np.ndarray]] = {}
    for text in TEXTS[:16]:
        logits, gaps = zip(*(alone(service, text, erasures) for erasures in settings), strict=True)
        closest = min(np.abs(one - other).max() for one, other in itertools.combinations(logits, 2))
        if min(gaps) >= NEAR and closest > 10 * TOLERANCE:
            reference[text] = list(logits)
    assert len(reference) >= 8, "too few texts tell all settings apart"
    setting_of: dict[str | None, int] = {service.store.live_state().generation: 0}
    answered: defaultdict[str | None, asyncio.Event] = defaultdict(asyncio.Event)
    found: list[tuple[list[str], Answer]] = []
    rng = random.Random(2)

    def toggle(setting: int) -> str:
        live = service.store.set_erasures([LiveErasure(erasure=erasure) for erasure in settings[setting]])
        service.mirror.refresh()
        return live.generation

    async def toggle_ten_times() -> None:
        for setting in (1, 2, 3, 4, 0) * 2:
            generation = await asyncio.to_thread(toggle, setting)
            setting_of[generation] = setting
            await asyncio.wait_for(answered[generation].wait(), 60)

    async def load() -> None:
        async def send() -> None:
            while not toggles.done():
                texts = rng.choices(list(reference), k=2)
                found.append((texts, await service.engine.classify(texts, None)))
                answered[found[-1][1].generation].set()

        toggles = asyncio.create_task(toggle_ten_times())
        await asyncio.gather(toggles, *(send() for _ in range(12)))

    asyncio.run(load())
    assert len(setting_of) == 11
    for texts, answer in found:
        setting = setting_of[answer.generation]
        assert {e.concept for e in answer.erasures} == {e.concept for e in settings[setting]}
        for text, given in zip(texts, answer.texts, strict=True):
            assert np.abs(reference[text][setting] - given.logits).max() < TOLERANCE
    assert service.metric("neuronlens_batch_plans_bucket", le="2.0") == service.metric("neuronlens_batch_plans_count")
    assert len(service.engine._planner._plans) <= 4


def test_requests_beyond_the_queue_limit_are_rejected_whole(start: Callable[..., Running]) -> None:
    """The queue never exceeds its limits, and each request is answered or rejected as a whole."""
    service = start(max_batch_tokens=300, max_queue_tokens=2000, max_queue_texts=100)
    largest_texts = largest_tokens = 0
    add = service.engine._scheduler.queue.add

    def watched(text: Any) -> None:
        nonlocal largest_texts, largest_tokens
        add(text)
        largest_texts = max(largest_texts, len(service.engine._scheduler.queue))
        largest_tokens = max(largest_tokens, service.engine._scheduler.queue.tokens)

    service.engine._scheduler.queue.add = watched  # type: ignore[method-assign]
    rng = random.Random(3)

    async def flood() -> list[Any]:
        asks = [service.engine.classify(rng.choices(TEXTS, k=rng.randrange(1, 6)), []) for _ in range(400)]
        return await asyncio.gather(*asks, return_exceptions=True)

    ends = asyncio.run(flood())
    refused = [end for end in ends if isinstance(end, QueueFull)]
    answered = [end for end in ends if isinstance(end, Answer)]
    assert len(refused) + len(answered) == len(ends)
    assert refused
    assert answered
    assert all(end.retry_after >= 1 for end in refused)
    assert 0 < largest_texts <= 100
    assert 0 < largest_tokens <= 2000
    assert waiting(service) == (0, 0, 0)
    assert service.metric("neuronlens_rejections_total", reason="queue_full") == len(refused)
    assert len(asyncio.run(service.engine.classify(TEXTS[:4], [])).texts) == 4


def test_queue_time_is_bounded_at_the_measured_rate(start: Callable[..., Running]) -> None:
    service = start(max_queue_seconds=0.01)
    texts = [text for text, _ in labelled_texts(100, seed=2)]
    service.ask(texts, [])  # several batches: the engine has measured its rate
    assert service.engine._scheduler.tokens_per_second > 0

    async def flood() -> float:
        async with service.held():
            service.engine._scheduler.tokens_per_second = 100.0
            first = asyncio.create_task(service.engine.classify(texts, []))
            while not len(service.engine._scheduler.queue):
                await asyncio.sleep(0)
            with pytest.raises(QueueFull) as full:
                await service.engine.classify(["one more"], [])
        await first
        return full.value.retry_after

    tokens = sum(len(each.ids) for each in service.model.tokens.encode(texts))
    assert tokens > 1000
    assert asyncio.run(flood()) == np.ceil((tokens - 0.01 * 100) / 100)


def test_compared_texts_count_twice_below_the_last_block(start: Callable[..., Running]) -> None:
    tokens = sum(len(each.ids) for each in start().model.tokens.encode(TEXTS[:3]))
    service = start(max_queue_tokens=2 * tokens - 1)
    deep = [Erasure(concept="Sports", layers=(0,))]
    assert len(service.ask(TEXTS[:3], deep).texts) == 3
    assert len(service.ask(TEXTS[:3], [Erasure(concept="Sports")], compare=True).texts) == 3, (
        "no block follows the last one"
    )
    with pytest.raises(RequestTooLarge, match=f"{2 * tokens} tokens"):
        service.ask(TEXTS[:3], deep, compare=True)


def test_request_with_a_too_long_text_fails_alone(start: Callable[..., Running]) -> None:
    """Requests are tokenized together; one that fails does not affect the others."""
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
