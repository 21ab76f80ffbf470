"""`POST /v1/classify` over HTTP: requests, answers, limits and errors."""

import json
import math
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.range_store.waiting import until
from tests.servers import LABELS, RunningServer, with_ranges
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel, load_model

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty, and nobody was surprised"


def test_answer_lists_sorted_scores_that_sum_to_one(server: RunningServer) -> None:
    body = server.classify(TEXT).json()
    assert set(body) == {"model", "results", "erasure", "usage"}
    (result,) = body["results"]
    assert {score["label"] for score in result["scores"]} == set(LABELS)
    scores = [score["score"] for score in result["scores"]]
    assert scores == sorted(scores, reverse=True)
    assert math.isclose(sum(scores), 1.0)
    assert (result["label"], result["score"]) == (result["scores"][0]["label"], scores[0])
    assert (result["masked_neurons"], result["truncated"], result["baseline"]) == (0, False, None)
    assert body["erasure"]["source"] == "none"
    assert body["erasure"]["range_set"] == server.service.store.live_state().range_set
    assert body["usage"]["tokens"] == len(server.model.tokens.encode([TEXT])[0].ids)


def test_every_form_of_erase_selects_the_named_concepts(server: RunningServer) -> None:
    def concepts(erase: Any) -> Any:
        answer = server.classify(TEXT, erase=erase)
        assert answer.status_code == 200, answer.text
        return answer.json()["erasure"]["concepts"]

    assert concepts(None) == concepts([]) == []
    assert concepts(["Sports", "Sci/Tech", "Météo & co"]) == ["Sports", "Sci/Tech", "Météo & co"]
    assert concepts([{"concept": "Sports", "tau": 2}, "World"]) == ["Sports", "World"]
    group = {"concepts": ["World", "Sports"], "method": "neuron", "top_fraction": 0.5, "layer": [-2, 2]}
    answer = server.classify(TEXT, erase=group).json()["erasure"]
    assert answer["source"] == "request"
    assert answer["erasures"][0] == {
        "concept": "World",
        "method": "neuron",
        "rule": "sigma",
        "tau": 2.5,
        "top_fraction": 0.5,
        "ranking": "max",
        "layers": [1, 2],
        "replacement": "zero",
        "enforced": False,
    }
    damped = server.classify(TEXT, erase=[{"concept": "Sports", "replacement": {"damp": 0.5}}]).json()
    assert damped["erasure"]["erasures"][0]["replacement"] == {"damp": 0.5}


def test_erasing_all_neurons_gives_every_text_the_same_scores(server: RunningServer) -> None:
    erase = {"concepts": ["World"], "method": "neuron", "top_fraction": 1.0}
    results = server.classify([TEXT, "shares fell sharply", "a"], erase=erase, compare=True).json()["results"]
    scores = [{score["label"]: score["score"] for score in result["scores"]} for result in results]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-6)
    assert all(result["masked_neurons"] == 32 and result["at_chance"] for result in results)
    assert not any(result["at_chance"] for result in server.classify([TEXT, "a"]).json()["results"])
    baselines = [result["baseline"]["scores"] for result in results]
    bare = [result["scores"] for result in server.classify([TEXT, "shares fell sharply", "a"]).json()["results"]]
    assert baselines == bare


def test_activation_and_top_k_transform_the_raw_logits(server: RunningServer) -> None:
    def scores(**fields: Any) -> dict[str, float]:
        result = server.classify(TEXT, **fields).json()["results"][0]
        return {score["label"]: score["score"] for score in result["scores"]}

    raw = scores(activation="none")
    soft, sigmoid = scores(activation="softmax"), scores(activation="sigmoid")
    odds = np.exp(np.array(list(raw.values())))
    assert soft == pytest.approx(dict(zip(raw, odds / odds.sum(), strict=True)))
    assert sigmoid == pytest.approx({label: 1 / (1 + math.exp(-value)) for label, value in raw.items()})
    assert scores() == soft
    assert list(scores(top_k=2)) == list(soft)[:2]
    assert len(scores(top_k=99)) == 4


def test_long_text_is_truncated_or_rejected(server: RunningServer, problem: Problem) -> None:
    long = "goal " * 200
    assert [r["truncated"] for r in server.classify([long, "goal"]).json()["results"]] == [True, False]
    problem(server.classify([long], truncate=False), 422, "text_too_long")


def test_empty_list_and_empty_text_are_accepted(server: RunningServer) -> None:
    assert server.classify([]).json()["results"] == []
    assert server.classify("").json()["results"][0]["label"] in LABELS


@pytest.mark.parametrize(
    "fields",
    [
        {"erase": ["Sports"], "unknown": 1},
        {"erase": [{"concept": "Sports", "taau": 1}]},
        {"erase": [{"concept": "Sports", "tau": -1}]},
        {"erase": [{"concept": "Sports", "tau": "2"}]},
        {"erase": [{"concept": "Sports", "top_fraction": 0}]},
        {"erase": [{"concept": "Sports", "top_fraction": 1.5}]},
        {"erase": [{"concept": "Sports", "method": "delete"}]},
        {"erase": [{"concept": "Sports", "replacement": {"damp": 2}}]},
        {"erase": [{"concept": "Sports", "layer": True}]},
        {"erase": [{"concept": ""}]},
        {"erase": "Sports"},
        {"compare": "yes"},
        {"top_k": 0},
        {"activation": "tanh"},
        {"truncate": 1},
    ],
)
def test_invalid_field_is_named_in_the_error(server: RunningServer, problem: Problem, fields: dict[str, Any]) -> None:
    body = problem(server.classify("secret text of a user", **fields), 422, "invalid")
    assert any(set(fields) & set(map(str, error["loc"])) for error in body["errors"])
    assert "secret" not in json.dumps(body)


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"inputs": 3}, "body.inputs: Input should be a text or a list of texts"),
        ({"inputs": ["a", None]}, "body.inputs.1: Input should be a valid string"),
        ({"erase": ["World", 4]}, "body.erase.1: Input should be a concept or an object with concept"),
        (
            {"erase": ["World", {"concept": "Sports", "tau": -1}]},
            "body.erase.1.tau: Input should be greater than or equal to 0",
        ),
        ({"erase": {"concepts": ["World"], "layer": "last"}}, "body.erase.layer: Input should be 'all'"),
        (
            {"erase": {"concepts": ["World"], "replacement": {"damp": 2}}},
            "body.erase.replacement.damp: Input should be less than or equal to 1",
        ),
    ],
)
def test_invalid_field_gives_one_error_at_its_location(
    server: RunningServer, problem: Problem, fields: dict[str, Any], detail: str
) -> None:
    body = problem(server.http.post("/v1/classify", json={"inputs": TEXT, **fields}), 422, "invalid")
    assert (body["detail"], len(body["errors"])) == (detail, 1)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [1] * 100_000},
        {"inputs": TEXT, "erase": [f"concept {i}" for i in range(30_000)]},
        {"inputs": TEXT, "erase": ["Sports"] * 30_000},
        {"inputs": TEXT, "erase": {"concepts": ["Sports"], "layer": list(range(50_000))}},
        {"inputs": TEXT, **{f"field {i}": 1 for i in range(20_000)}},
    ],
    ids=["numbers", "concepts", "one concept", "layers", "fields"],
)
def test_error_reply_stays_short_for_any_number_of_errors(
    server: RunningServer, problem: Problem, body: dict[str, Any]
) -> None:
    response = server.http.post("/v1/classify", json=body, timeout=60)
    problem(response, 422, "invalid")
    assert len(response.content) < 4000


@pytest.mark.parametrize("enforced", [False, True])
def test_repeated_concept_is_rejected(server: RunningServer, problem: Problem, enforced: bool) -> None:
    server.http.put("/v1/erasures/Sports", json={"enforced": enforced}).raise_for_status()
    problem(server.classify(TEXT, erase=["Sports", "World", "Sports"]), 422, "invalid_erasure")
    problem(server.classify(TEXT, erase={"concepts": ["Sports", "Sports"]}), 422, "invalid_erasure")


@pytest.mark.parametrize("layer", [[], [1, 1], [2, -1]])
def test_repeated_or_missing_layers_are_rejected(server: RunningServer, problem: Problem, layer: list[int]) -> None:
    problem(server.classify(TEXT, erase=[{"concept": "Sports", "layer": layer}]), 422, "invalid_erasure")


def test_unknown_concepts_layers_and_models_are_rejected(server: RunningServer, problem: Problem) -> None:
    known = problem(server.classify(TEXT, erase=["Weather"]), 404, "unknown_concept")["known"]
    assert known == [*LABELS, "Météo & co"]
    not_fitted = server.classify(TEXT, erase=[{"concept": "Sports", "layer": 0}])
    assert problem(not_fitted, 422, "not_fitted")["fitted"] == [1, 2]
    problem(server.classify(TEXT, erase={"concepts": ["Sports"], "layer": "all"}), 422, "not_fitted")
    problem(server.classify(TEXT, erase=[{"concept": "Sports", "layer": 7}]), 422, "invalid_erasure")
    problem(server.classify(TEXT, model="another"), 404, "unknown_model")
    assert server.classify(TEXT, model=server.service.name).status_code == 200
    in_query = server.http.post("/v1/classify", params={"model": "another"}, json={"inputs": TEXT})
    problem(in_query, 404, "unknown_model")


def test_oversized_requests_are_rejected(
    start_server: Callable[..., RunningServer], fitted: FitResult, problem: Problem
) -> None:
    server = with_ranges(start_server(max_texts=3, max_characters=50, max_body_bytes=2000, max_queue_tokens=30), fitted)
    problem(server.classify(["a"] * 4), 413, "too_many_texts")
    problem(server.classify("b" * 51), 413, "text_too_large")
    problem(server.classify("c" * 3000), 413, "body_too_large")
    problem(server.classify(["shares fell sharply on Monday"] * 3), 413, "request_too_large")

    def chunks() -> Any:
        for _ in range(30):
            yield b" " * 100

    chunked = server.http.post("/v1/classify", content=chunks(), headers={"content-type": "application/json"})
    problem(chunked, 413, "body_too_large")


def test_body_that_is_not_valid_json_is_rejected(server: RunningServer, problem: Problem) -> None:
    def post(content: bytes, kind: str = "application/json") -> httpx.Response:
        return server.http.post("/v1/classify", content=content, headers={"content-type": kind})

    problem(post(b"{"), 400, "malformed")
    problem(post(b'{"inputs": "\xff\xfe"}'), 400, "malformed")
    problem(post(b""), 422, "invalid")
    problem(post(b"[1]"), 422, "invalid")
    problem(post(b"[" * 100_000), 400, "malformed")
    problem(post(b'{"inputs": "a", "top_k": ' + b"9" * 5000 + b"}"), 400, "malformed")
    problem(post(b"inputs=a", "application/x-www-form-urlencoded"), 415, "unsupported_media_type")
    problem(post(b'{"inputs": "a"}', "text/plain"), 415, "unsupported_media_type")
    assert post(b'{"inputs": "a"}', "application/json; charset=utf-8").status_code == 200
    problem(post(b'{"inputs": "a", "erase": ["lone \\ud800 surrogate"]}'), 422, "invalid")
    problem(post(b'{"inputs": "a", "\\ud800": 1}'), 422, "invalid")
    assert post(b'{"inputs": "lone \\ud800 surrogate"}').status_code == 200
    problem(post(b'{"inputs": "a", "erase": [{"concept": "Sports", "tau": NaN}]}'), 422, "invalid")
    problem(post(b'{"inputs": "a", "erase": [{"concept": "Sports", "tau": 1e999}]}'), 422, "invalid")
    assert post(b'{"inputs": "nul \\u0000 byte"}').status_code == 200


@pytest.mark.local
def test_request_past_its_deadline_is_rejected(server: RunningServer, problem: Problem) -> None:
    with server.model.steered._lock:
        late = server.http.post("/v1/classify", json={"inputs": "a"}, headers={"X-Request-Timeout": "0.05"})
    problem(late, 504, "deadline_exceeded")
    invalid = server.http.post("/v1/classify", json={"inputs": "a"}, headers={"X-Request-Timeout": "0"})
    problem(invalid, 422, "invalid")


@pytest.mark.local
def test_erasing_without_a_range_set_is_rejected(start_server: Callable[..., RunningServer], problem: Problem) -> None:
    server = start_server()
    assert server.classify(TEXT).status_code == 200
    rejected = server.classify(TEXT, erase=["Sports"])
    problem(rejected, 503, "no_range_set")
    assert "retry-after" not in rejected.headers, "it lasts until somebody fits one"


@pytest.mark.local
def test_logits_that_are_not_finite_are_an_error(
    start_server: Callable[..., RunningServer], model: LoadedModel, problem: Problem
) -> None:
    broken = load_model(model.source, device="cpu")
    with torch.no_grad():
        broken.steered.model.get_parameter("classifier.bias")[0] = torch.nan
    server = start_server(broken)
    for activation in ("auto", "sigmoid", "none"):
        problem(server.classify(TEXT, activation=activation), 500, "non_finite")


@pytest.mark.local
def test_request_of_a_disconnected_client_is_cancelled(server: RunningServer) -> None:
    body = json.dumps({"inputs": [TEXT] * 3})
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    port = httpx.URL(server.url).port or 80
    with server.model.steered._lock:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
            until(lambda: server.value("neuronlens_queue_wait_seconds_count"))  # the texts have left the queue
        until(lambda: server.value("neuronlens_rejections_total", {"reason": "cancelled"}) == 1)
    closed = {"method": "POST", "route": "/v1/classify", "status": "499"}
    until(lambda: server.value("neuronlens_http_requests_total", closed) == 1)
    assert server.classify(TEXT).status_code == 200


@pytest.mark.local
def test_request_for_a_full_queue_is_rejected_with_retry_after(
    start_server: Callable[..., RunningServer], model: LoadedModel, problem: Problem
) -> None:
    tokens = len(model.tokens.encode([TEXT])[0].ids)
    server = start_server(max_queue_tokens=tokens)
    with ThreadPoolExecutor(2) as pool:
        with model.steered._lock:
            answers = [pool.submit(server.classify, TEXT)]
            until(lambda: server.value("neuronlens_queue_wait_seconds_count") == 1)  # it has left the queue
            answers.append(pool.submit(server.classify, TEXT))
            until(lambda: server.value("neuronlens_queue_tokens") == tokens)
            rejected = server.classify(TEXT)
        problem(rejected, 429, "queue_full")
        assert int(rejected.headers["retry-after"]) >= 1
        assert [answer.result().status_code for answer in answers] == [200, 200]
