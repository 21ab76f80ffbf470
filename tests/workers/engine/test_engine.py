"""The engine on a real Redis and tiny models: exact answers, stable admissions, and no request left hanging."""

import asyncio
import random
import threading
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import redis
import torch
from prometheus_client import CollectorRegistry

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.workers.checkpoints import LABELS, save_tiny
from tests.workers.engine.running import NEAR, TEXTS, TOLERANCE, Running, alone, random_erasures
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.engine.answers import Answer
from workers.engine.engine import Engine
from workers.engine.errors import DeadlineExceeded, Draining, EngineFailed, QueueFull, RequestTooLarge
from workers.engine.requests import Request, Task
from workers.engine.settings import EngineSettings
from workers.fitting.fit import fit
from workers.models.errors import TextTooLong
from workers.models.loading import LoadedModel, load_model
from workers.models.texts import TextOrPair

Tiny = Callable[[str], LoadedModel]

BF16_TOLERANCE = 0.05
"""Largest difference of a logit in bfloat16, whose spacing is 0.008 between 1 and 2."""


def test_no_erasure_equals_the_bare_model_bit_for_bit(start: Callable[..., Running]) -> None:
    service = start(max_batch_tokens=4096)  # all texts in one batch
    answer = service.ask(TEXTS, [])
    encoded = sorted((len(e.ids), n) for n, e in enumerate(service.model.tokens.encode(TEXTS)))
    order = [n for _, n in encoded]
    batch = service.model.tokens.batch([service.model.tokens.encode([TEXTS[n]])[0] for n in order])
    bare = service.model.steered.logits(batch).numpy()
    assert answer.source == "none"
    assert answer.erasures == ()
    for row, n in enumerate(order):
        assert np.array_equal(answer.texts[n].logits, bare[row])
        assert answer.texts[n].masked_neurons == 0


def test_baseline_of_an_erased_answer_equals_the_bare_model_bit_for_bit(start: Callable[..., Running]) -> None:
    service = start(max_batch_tokens=65536)  # one batch with and without comparison
    bare = service.ask(TEXTS, [])
    for layer in range(3):
        erasure = Erasure(concept="Sports", top_fraction=1.0, layers=(layer,))
        compared = service.ask(TEXTS, [erasure], compare=True)
        for one, other in zip(bare.texts, compared.texts, strict=True):
            assert other.baseline is not None
            assert np.array_equal(one.logits, other.baseline)
        assert any(not np.array_equal(text.logits, text.baseline) for text in compared.texts)
        assert sum(text.masked_neurons for text in compared.texts) > 0


@pytest.mark.parametrize(
    ("family", "number"),
    [
        ("bert", 150),
        ("gpt2", 60),
        pytest.param("bert", 3000, marks=pytest.mark.full),
        pytest.param("gpt2", 600, marks=pytest.mark.full),
    ],
)
def test_concurrent_requests_answer_as_each_alone(start: Callable[..., Running], family: str, number: int) -> None:
    """Random requests of texts and pairs, with random plans, some with the baseline beside the erased answer."""
    service = start(family, max_batch_tokens=400, max_batch_plans=3, max_queue_seconds=600.0, max_queue_tokens=10**7)
    rng = random.Random(5)
    texts: list[TextOrPair] = [*TEXTS, "Goal", *(" ".join(rng.sample(TEXTS, n)) for n in (2, 3, 4, 5))]
    texts += zip(TEXTS[:12], reversed(TEXTS), strict=False)
    plans = [[], *(random_erasures(rng) for _ in range(50))]
    requests = [
        (rng.choices(range(len(texts)), k=rng.randrange(1, 5)), rng.randrange(len(plans)), rng.random() < 0.3)
        for _ in range(number)
    ]

    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(
            *(
                service.engine.classify([texts[n] for n in some], plans[plan], compare=compare)
                for some, plan, compare in requests
            )
        )

    answers = asyncio.run(all_at_once())
    by_itself = cache(lambda text, plan: alone(service, texts[text], plans[plan]))
    beyond = 0
    for (some, plan, compare), answer in zip(requests, answers, strict=True):
        assert [e.concept for e in answer.erasures] == [e.concept for e in plans[plan]]
        for text, given in zip(some, answer.texts, strict=True):
            logits, gap = by_itself(text, plan)
            if np.abs(logits - given.logits).max() > TOLERANCE:
                beyond += 1
                assert gap < NEAR, "an answer differs although no state lies near a bound"
            elif np.diff(np.sort(logits)[-2:])[0] > 2 * TOLERANCE:
                assert given.logits.argmax() == logits.argmax()
            assert (given.baseline is not None) == compare
            if given.baseline is not None:
                assert np.abs(given.baseline - by_itself(text, 0)[0]).max() < TOLERANCE
    assert beyond < 0.05 * sum(len(some) for some, _, _ in requests)
    plans_of_batches = service.metric("neuronlens_batch_plans_bucket", le="4.0")
    assert plans_of_batches == service.metric("neuronlens_batch_plans_count")


def test_bfloat16_answers_agree_within_its_tolerance(redis_client: redis.Redis, tmp_path: Path) -> None:
    """Uses neuron masking: it has no bounds, to either side of which a bfloat16 state could round."""
    model = load_model(str(save_tiny("bert", tmp_path / "model")), device="cpu", dtype="bfloat16")
    data = write_jsonl(tmp_path / "train.jsonl", labelled_texts(60, seed=1))
    made = fit(model, load_corpus(str(data), labels=LABELS), layers="all")
    store = RangeStore(redis_client, f"bf16-{uuid.uuid4().hex}")
    store.activate(store.range_sets.publish(made.range_set, made.inspect))
    mirror = Mirror(store, model.identity.fingerprint)
    mirror.start()
    registry = CollectorRegistry()
    engine = Engine(model, mirror, EngineSettings(max_batch_tokens=300), registry)
    engine.start()
    service = Running(engine, store, mirror, made.range_set, model, registry)
    rng = random.Random(3)
    requests = [
        (text, [Erasure(concept=rng.choice(LABELS), method="neuron", layers=(rng.randrange(3),))] * (n % 3 > 0))
        for n, text in enumerate(TEXTS)
    ]

    async def all_at_once() -> list[Answer]:
        async with service.held():  # the same texts share a batch in every run
            asked = [asyncio.create_task(engine.classify([text], erase)) for text, erase in requests]
            while len(engine._scheduler.queue) < len(asked):
                await asyncio.sleep(0)
        return await asyncio.gather(*asked)

    for (text, erase), answer in zip(requests, asyncio.run(all_at_once()), strict=True):
        logits, _ = alone(service, text, erase)
        given = answer.texts[0].logits
        assert np.abs(logits - given).max() < BF16_TOLERANCE
        best, second = np.sort(logits)[[-1, -2]]
        assert given.argmax() == logits.argmax() or best - second < 2 * BF16_TOLERANCE
    engine.close()
    mirror.close()


def test_toggle_does_not_change_a_waiting_request(start: Callable[..., Running]) -> None:
    service = start()
    sports, world = Erasure(concept="Sports", top_fraction=1.0), Erasure(concept="World", method="neuron")
    clear = [text for text in TEXTS if alone(service, text, [sports])[1] >= NEAR][:3]
    service.store.set_erasures([LiveErasure(erasure=sports)])
    service.mirror.refresh()
    before = service.store.live_state().generation

    async def toggle_while_waiting() -> tuple[Answer, Answer]:
        async with service.held():
            first = asyncio.create_task(service.engine.classify(clear, None))
            while not len(service.engine._scheduler.queue):
                await asyncio.sleep(0)
            service.store.set_erasures([LiveErasure(erasure=world)])
            service.mirror.refresh()
            second = asyncio.create_task(service.engine.classify(clear, None))
            while len(service.engine._scheduler.queue) < 6:
                await asyncio.sleep(0)
        return await first, await second

    first, second = asyncio.run(toggle_while_waiting())
    assert (first.generation, [e.concept for e in first.erasures]) == (before, ["Sports"])
    assert (second.generation, [e.concept for e in second.erasures]) == (
        service.store.live_state().generation,
        ["World"],
    )
    for text, before_toggle, after_toggle in zip(clear, first.texts, second.texts, strict=True):
        assert np.abs(alone(service, text, [sports])[0] - before_toggle.logits).max() < TOLERANCE
        assert np.abs(alone(service, text, [world])[0] - after_toggle.logits).max() < TOLERANCE
        assert np.abs(before_toggle.logits - after_toggle.logits).max() > 0.01, "the toggle has no effect on the text"


def test_failing_text_fails_alone(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    service = start()
    poison = service.model.tokens.encode(["telescope"])[0].ids
    good = service.model.steered.trunk

    def fails_on_poison(batch: Any, split: int, *, whole: bool) -> Any:
        if any(tuple(row[: len(poison)].tolist()) == poison for row in batch.ids):
            raise torch.OutOfMemoryError("out of memory")
        return good(batch, split, whole=whole)

    monkeypatch.setattr(service.model.steered, "trunk", fails_on_poison)

    async def mixed() -> list[Any]:
        async with service.held():
            asks = [service.engine.classify([text], []) for text in [*TEXTS[:6], "telescope", *TEXTS[6:9]]]
            tasks = [asyncio.create_task(ask) for ask in asks]
            while len(service.engine._scheduler.queue) < len(tasks):
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(mixed())
    assert isinstance(answers.pop(6), EngineFailed)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert service.engine.ready


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_fail_when_the_engine_thread_dies(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start(max_batch_texts=1)

    def broken(*args: Any) -> None:
        raise SystemError("a fault of the engine itself")

    monkeypatch.setattr(service.engine._runner, "_observe", broken)

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(service.engine.classify([text], []) for text in TEXTS[:5]), return_exceptions=True
        )

    answers = asyncio.run(asyncio.wait_for(ask(), 60))
    assert all(isinstance(answer, EngineFailed | Draining) for answer in answers)
    assert any(isinstance(answer, EngineFailed) for answer in answers)
    assert not service.engine.ready


class Emptied(SimpleQueue[Any]):
    """An inbox that seems to hold one thing more than it does, as when another thread has just taken it."""

    def empty(self) -> bool:
        return False


def test_waiters_are_told_when_another_thread_empties_the_inbox_of_a_dying_engine(tiny: Tiny) -> None:
    async def waiting() -> None:
        engine = Engine(tiny("bert"), Mock(spec=Mirror), EngineSettings(), CollectorRegistry())
        engine._inbox = Emptied()
        task = Task(lambda: None)
        engine._inbox.put(task)
        engine._inbox.put(None)
        dying = threading.Thread(target=engine._die, args=("engine", SystemError("a fault"), []), daemon=True)
        dying.start()
        dying.join(10)
        assert not dying.is_alive()
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(task.done, 10)
        assert engine._next_requests() == [], "the tokenizer's thread still learns that the engine closes"

    asyncio.run(waiting())


def test_request_at_hand_waits_for_no_other(tiny: Tiny) -> None:
    engine = Engine(tiny("bert"), Mock(spec=Mirror), EngineSettings(), CollectorRegistry())
    engine._inbox = Emptied()
    request = Mock(spec=Request)
    engine._inbox.put(request)
    found: list[Any] = []
    reading = threading.Thread(target=lambda: found.extend(engine._next_requests()), daemon=True)
    reading.start()
    reading.join(10)
    assert found == [request]


def test_abandoned_request_costs_no_forward_pass(start: Callable[..., Running]) -> None:
    service = start()

    async def give_up() -> None:
        async with service.held():
            late = asyncio.create_task(service.engine.classify(TEXTS, [], timeout=0.05))
            with pytest.raises(DeadlineExceeded):
                await late
            cancelled = asyncio.create_task(service.engine.classify(TEXTS, []))
            while len(service.engine._scheduler.queue) < len(TEXTS):
                await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        await service.engine.classify(["two"], [])

    before = service.engine.metrics.tokens._value.get()
    asyncio.run(give_up())
    short = sum(len(e.ids) for e in service.model.tokens.encode(["busy", "two"]))
    assert service.engine.metrics.tokens._value.get() - before == short


def test_queue_tokens_bound_whole_requests(start: Callable[..., Running]) -> None:
    sizes = [len(e.ids) for e in start().model.tokens.encode(TEXTS[:4])]
    service = start(max_queue_tokens=sum(sizes))

    async def fill() -> None:
        with pytest.raises(RequestTooLarge):
            await service.engine.classify(TEXTS[:5], [])
        async with service.held():
            waiting = asyncio.create_task(service.engine.classify(TEXTS[:4], []))
            while len(service.engine._scheduler.queue) < 4:
                await asyncio.sleep(0)
            with pytest.raises(QueueFull) as full:
                await service.engine.classify(["one"], [])
            assert full.value.retry_after > 0
            assert len(service.engine._scheduler.queue) == 4
        await waiting

    asyncio.run(fill())


def test_queue_texts_bound_whole_requests(start: Callable[..., Running]) -> None:
    service = start(max_queue_texts=4)

    async def fill() -> None:
        with pytest.raises(RequestTooLarge, match="5 texts"):
            await service.engine.classify(TEXTS[:5], [])
        async with service.held():
            waiting = asyncio.create_task(service.engine.classify(TEXTS[:3], []))
            while len(service.engine._scheduler.queue) < 3:
                await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await service.engine.classify(TEXTS[:2], [])
            one = asyncio.create_task(service.engine.classify(TEXTS[:1], []))
            while len(service.engine._scheduler.queue) < 4:
                await asyncio.sleep(0)
        assert len((await waiting).texts) == 3
        assert len((await one).texts) == 1

    asyncio.run(fill())


def test_draining_engine_answers_accepted_requests(start: Callable[..., Running]) -> None:
    service = start()

    async def drain() -> None:
        async with service.held():
            waiting = asyncio.create_task(service.engine.classify(TEXTS, None))
            while len(service.engine._scheduler.queue) == 0:
                await asyncio.sleep(0)
            service.engine.drain()
            assert not service.engine.ready
            with pytest.raises(Draining):
                await service.engine.classify(["one"], None)
            closing = threading.Thread(target=service.engine.close)
            closing.start()
        assert len((await waiting).texts) == len(TEXTS)
        await asyncio.to_thread(closing.join)

    asyncio.run(drain())


def test_long_texts_are_truncated_or_rejected(start: Callable[..., Running]) -> None:
    service = start()
    long = "goal " * 500
    assert [text.truncated for text in service.ask([long, "goal"], []).texts] == [True, False]
    with pytest.raises(TextTooLong):
        service.ask([long], [], truncate=False)
    assert service.ask([], []).texts == ()


def test_long_pairs_are_truncated_or_rejected(start: Callable[..., Running]) -> None:
    service = start()
    long = "goal " * 500
    pairs = [(long, "goal"), ("goal", long), ("goal", "goal"), ("", "")]
    assert [text.truncated for text in service.ask(pairs, []).texts] == [True, True, False, False]
    with pytest.raises(TextTooLong, match="input 1"):
        service.ask(["goal", ("goal", long)], [], truncate=False)
