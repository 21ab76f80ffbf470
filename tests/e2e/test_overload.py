"""More than the server can take, over real HTTP: it refuses what is too much, answers the rest, and stays itself."""

import asyncio
import json
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from tests.workers.texts import labelled_texts
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXTS = [text for text, _ in labelled_texts(30, seed=6)]


def test_overload_is_refused_at_once_and_what_was_accepted_is_answered(
    start_server: Callable[..., RunningServer], fitted: Fitted, problem: Problem
) -> None:
    """Many more requests in flight than the queue holds: 200 or 429, the 200s right, probes and toggles as ever."""
    running = with_ranges(start_server(max_queue_texts=24), fitted)
    known = {text: running.classify(text, erase=[]).json()["results"][0]["label"] for text in TEXTS}
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

    answers = asyncio.run(flood())
    statuses = Counter(response.status_code for _, response in answers)
    assert set(statuses) == {200, 429}
    for texts, response in answers:
        if response.status_code == 429:
            problem(response, 429, "queue_full")
            assert int(response.headers["retry-after"]) >= 1
        else:
            assert [each["label"] for each in response.json()["results"]] == [known[text] for text in texts]
    value = running.value
    assert value("neuronlens_rejections_total", {"reason": "queue_full"}) == statuses[429]
    labels = {"method": "POST", "route": "/v1/classify", "status": "429"}
    until(lambda: value("neuronlens_http_requests_total", labels) == statuses[429])  # counted once the reply is sent
    assert value("neuronlens_queue_texts") == value("neuronlens_queue_tokens") == 0


def test_a_request_larger_than_the_whole_queue_is_413(
    start_server: Callable[..., RunningServer], fitted: Fitted, problem: Problem
) -> None:
    running = with_ranges(start_server(max_queue_tokens=100), fitted)
    tokens = len(running.model.tokens.encode([TEXTS[0]])[0].ids)
    few, many = 100 // tokens, 100 // tokens + 1
    assert running.classify([TEXTS[0]] * few, erase=[]).status_code == 200
    problem(running.classify([TEXTS[0]] * many, erase=[]), 413, "request_too_large")
    deep = [{"concept": "Sports", "layer": -2}]
    assert running.classify([TEXTS[0]] * few, erase=deep).status_code == 200
    problem(running.classify([TEXTS[0]] * few, erase=deep, compare=True), 413, "request_too_large")


def test_clients_that_hang_up_in_a_storm_cost_nobody_an_answer(server: RunningServer) -> None:
    """Connections are cut at any moment of their request; the others are answered, and nothing is left over."""
    port = httpx.URL(server.url).port
    body = json.dumps({"inputs": TEXTS[:3], "erase": []}).encode()
    fields = ("Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}")
    request = "\r\n".join(("POST /v1/classify HTTP/1.1", *fields, "", "")).encode() + body
    rng = random.Random(4)

    async def rude() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[: rng.randrange(1, len(request) + 200)])
        await writer.drain()
        await asyncio.sleep(rng.random() * 0.02)
        writer.transport.abort()

    async def storm() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            answers: list[httpx.Response] = []
            for _ in range(10):
                polite = [http.post("/v1/classify", json={"inputs": TEXTS[:3], "erase": []}) for _ in range(3)]
                ends = await asyncio.gather(*polite, *(rude() for _ in range(30)))
                answers += [end for end in ends if end is not None]
        return answers

    expected = server.classify(TEXTS[:3], erase=[]).json()["results"]
    answers = asyncio.run(storm())
    assert len(answers) == 30
    for answer in answers:
        assert answer.status_code == 200
        for one, other in zip(answer.json()["results"], expected, strict=True):
            assert one["label"] == other["label"]
            assert math.isclose(one["score"], other["score"], abs_tol=1e-4)
    value = server.value
    until(lambda: value("neuronlens_queue_texts") == 0)
    engine = server.service.engine
    until(lambda: (len(engine._queue), engine._untokenized) == (0, 0))
    assert server.http.get("/readyz").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lost_device_makes_the_server_unready_and_leaves_nobody_waiting(
    start_server: Callable[..., RunningServer],
    model: LoadedModel,
    fitted: Fitted,
    problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That the process ends with one line is in tests/app/cli/test_signals.py."""
    running = with_ranges(start_server(), fitted)
    assert running.http.get("/readyz").status_code == 200

    def lost(*args: Any) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(model.steered, "_call", lost)
    monkeypatch.setattr(model.steered, "_call_packed", lost)
    answers: list[httpx.Response] = []
    askers = [threading.Thread(target=lambda: answers.append(running.classify(TEXTS[:5]))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert {answer.status_code for answer in answers} <= {500, 503}
    assert any(answer.status_code == 500 for answer in answers)
    body = problem(running.http.get("/readyz"), 503, "not_ready")
    assert body["checks"]["engine"] is False
    problem(running.classify("a"), 503, "draining")
    assert running.http.get("/livez").status_code == 200
    assert running.service.engine.failure is not None
