"""Overload over real HTTP: the server rejects what it cannot take, answers the rest, and recovers."""

import asyncio
import json
import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from tests.workers.texts import labelled_texts
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXTS = [text for text, _ in labelled_texts(30, seed=6)]


@pytest.fixture
def small_queue(start_server: Callable[..., RunningServer], fitted: FitResult) -> RunningServer:
    """A server whose queue holds 24 texts."""
    return with_ranges(start_server(max_queue_texts=24), fitted)


def check_results(response: httpx.Response, expected: list[dict[str, Any]]) -> None:
    """A response has the expected labels, and scores up to rounding: batches differ."""
    assert response.status_code == 200, response.text
    for result, right in zip(response.json()["results"], expected, strict=True):
        assert result["label"] == right["label"]
        assert math.isclose(result["score"], right["score"], abs_tol=1e-4)


def test_full_queue_rejects_requests_and_answers_the_accepted_ones(
    small_queue: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes and changes of erasures go on meanwhile."""
    running, engine = small_queue, small_queue.service.engine
    expected = {text: running.classify(text, erase=[]).json()["results"][0] for text in TEXTS}
    model_may_run = threading.Event()
    run_batch = engine._runner.answer

    def run_later(batch: Any) -> None:
        model_may_run.wait(120)
        run_batch(batch)

    monkeypatch.setattr(engine._runner, "answer", run_later)
    accepted = [TEXTS[:1], *(TEXTS[start : start + 4] for start in range(0, 24, 4))]
    with ThreadPoolExecutor(len(accepted)) as pool:
        try:
            replies = [pool.submit(running.classify, accepted[0], erase=[])]
            until(lambda: engine._scheduler.running)
            replies += [pool.submit(running.classify, texts, erase=[]) for texts in accepted[1:]]
            until(lambda: running.value("neuronlens_queue_texts") == 24)
            for count in (1, 4, 1, 4):
                refused = running.classify(TEXTS[:count], erase=[])
                problem(refused, 429, "queue_full")
                assert int(refused.headers["retry-after"]) >= 1
            for path in ("/livez", "/readyz", "/metrics"):
                assert running.http.get(path).status_code == 200
            assert running.http.put("/v1/erasures/Sports", json={"tau": 2}).status_code == 200
            assert not any(reply.done() for reply in replies)
        finally:
            model_may_run.set()
        for texts, reply in zip(accepted, replies, strict=True):
            check_results(reply.result(), [expected[text] for text in texts])
    value = running.value
    assert value("neuronlens_rejections_total", {"reason": "queue_full"}) == 4
    labels = {"method": "POST", "route": "/v1/classify", "status": "429"}
    until(lambda: value("neuronlens_http_requests_total", labels) == 4)  # counted once the reply is sent
    assert value("neuronlens_queue_texts") == value("neuronlens_queue_tokens") == 0


@pytest.mark.full
def test_every_answer_under_random_overload_is_right_or_a_rejection(
    small_queue: RunningServer, problem: Problem
) -> None:
    """60 clients send 10 requests each while an operator changes erasures and reads the probes."""
    running = small_queue
    expected = {text: running.classify(text, erase=[]).json()["results"][0] for text in TEXTS}
    rng = random.Random(1)

    async def flood() -> list[tuple[list[str], httpx.Response]]:
        found = []
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits) as http:

            async def user() -> None:
                for _ in range(10):
                    texts = rng.choices(TEXTS, k=rng.randrange(1, 5))
                    found.append((texts, await http.post("/v1/classify", json={"inputs": texts, "erase": []})))

            async def operator() -> None:
                for n in range(10):
                    for path in ("/livez", "/readyz", "/metrics"):
                        assert (await http.get(path)).status_code == 200
                    assert (await http.put("/v1/erasures/Sports", json={"tau": 1 + n})).status_code == 200

            await asyncio.gather(operator(), *(user() for _ in range(60)))
        return found

    rejections = 0
    for texts, response in asyncio.run(flood()):
        if response.status_code == 429:
            problem(response, 429, "queue_full")
            rejections += 1
        else:
            check_results(response, [expected[text] for text in texts])
    assert (running.value("neuronlens_rejections_total", {"reason": "queue_full"}) or 0) == rejections
    assert running.value("neuronlens_queue_texts") == running.value("neuronlens_queue_tokens") == 0


def test_request_larger_than_the_queue_is_rejected_with_413(
    start_server: Callable[..., RunningServer], fitted: FitResult, problem: Problem
) -> None:
    running = with_ranges(start_server(max_queue_tokens=100), fitted)
    tokens = len(running.model.tokens.encode([TEXTS[0]])[0].ids)
    few, many = 100 // tokens, 100 // tokens + 1
    assert running.classify([TEXTS[0]] * few, erase=[]).status_code == 200
    problem(running.classify([TEXTS[0]] * many, erase=[]), 413, "request_too_large")
    deep = [{"concept": "Sports", "layer": -2}]
    assert running.classify([TEXTS[0]] * few, erase=deep).status_code == 200
    problem(running.classify([TEXTS[0]] * few, erase=deep, compare=True), 413, "request_too_large")


def test_clients_that_hang_up_do_not_disturb_other_clients(server: RunningServer) -> None:
    """Connections are cut at any moment of a request; nothing of them is left in the queue."""
    port = httpx.URL(server.url).port
    body = json.dumps({"inputs": TEXTS[:3], "erase": []}).encode()
    fields = ("Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}")
    request = "\r\n".join(("POST /v1/classify HTTP/1.1", *fields, "", "")).encode() + body
    rng = random.Random(4)

    async def hang_up() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[: rng.randrange(1, len(request) + 200)])
        await writer.drain()
        await asyncio.sleep(rng.random() * 0.02)  # whatever the server has reached by then
        writer.transport.abort()

    async def mix() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            answers: list[httpx.Response] = []
            for _ in range(6):
                complete = [http.post("/v1/classify", json={"inputs": TEXTS[:3], "erase": []}) for _ in range(3)]
                ends = await asyncio.gather(*complete, *(hang_up() for _ in range(20)))
                answers += [end for end in ends if end is not None]
        return answers

    expected = server.classify(TEXTS[:3], erase=[]).json()["results"]
    answers = asyncio.run(mix())
    assert len(answers) == 18
    for answer in answers:
        check_results(answer, expected)
    until(lambda: server.value("neuronlens_queue_texts") == 0)
    engine = server.service.engine
    until(lambda: (len(engine._scheduler.queue), engine._scheduler.untokenized) == (0, 0))
    assert server.http.get("/readyz").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lost_device_makes_the_server_unready_and_fails_all_requests(
    fresh_server: RunningServer, model: LoadedModel, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/app/cli/test_signals.py shows that the process then ends with one line."""
    running = fresh_server
    assert running.http.get("/readyz").status_code == 200

    def fail(*args: Any) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(model.steered, "_call", fail)
    monkeypatch.setattr(model.steered, "_call_packed", fail)
    with ThreadPoolExecutor(4) as pool:
        statuses = {answer.status_code for answer in pool.map(running.classify, [TEXTS[:5]] * 4)}
    assert 500 in statuses
    assert statuses <= {500, 503}
    body = problem(running.http.get("/readyz"), 503, "not_ready")
    assert body["checks"]["engine"] is False
    problem(running.classify("a"), 503, "draining")
    assert running.http.get("/livez").status_code == 200
    assert running.service.engine.failure is not None
