"""`POST /v1/classify` over HTTP: forms of a request, of its answer, and of what goes wrong."""

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.range_store.waiting import until
from tests.servers import LABELS, RunningServer, with_ranges
from tests.workers.checkpoints import save_tiny
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel, load_model

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty, and nobody was surprised"


def test_an_answer_has_the_designed_form(server: RunningServer) -> None:
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
    assert body["erasure"]["range_set"] == server.service.store.live().range_set
    assert body["usage"]["tokens"] == len(server.model.tokens.encode([TEXT])[0].ids)


def test_every_form_of_erase_means_what_it_says(server: RunningServer) -> None:
    def concepts(erase: Any) -> list[str]:
        answer = server.classify(TEXT, erase=erase)
        assert answer.status_code == 200, answer.text
        named: list[str] = answer.json()["erasure"]["concepts"]
        return named

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


def test_erasing_all_neurons_zeroes_what_the_head_reads(server: RunningServer) -> None:
    """All neurons at 0 is the same state whatever the text: every text gets one and the same answer."""
    erase = {"concepts": ["World"], "method": "neuron", "top_fraction": 1.0}
    results = server.classify([TEXT, "shares fell sharply", "a"], erase=erase, compare=True).json()["results"]
    scores = [{score["label"]: score["score"] for score in result["scores"]} for result in results]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-6)
    assert all(result["masked_neurons"] == 32 for result in results)
    baselines = [result["baseline"]["scores"] for result in results]
    bare = [result["scores"] for result in server.classify([TEXT, "shares fell sharply", "a"]).json()["results"]]
    assert baselines == bare


def test_activations_and_top_k(server: RunningServer) -> None:
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


def test_a_long_text_is_cut_or_refused(server: RunningServer, problem: Problem) -> None:
    long = "goal " * 200
    assert [r["truncated"] for r in server.classify([long, "goal"]).json()["results"]] == [True, False]
    problem(server.classify([long], truncate=False), 422, "text_too_long")


def test_no_texts_and_the_empty_text(server: RunningServer) -> None:
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
def test_invalid_fields_are_named(server: RunningServer, problem: Problem, fields: dict[str, Any]) -> None:
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
def test_a_wrong_field_is_one_error_at_its_place(
    server: RunningServer, problem: Problem, fields: dict[str, Any], detail: str
) -> None:
    body = problem(server.http.post("/v1/classify", json={"inputs": TEXT, **fields}), 422, "invalid")
    assert (body["detail"], len(body["errors"])) == (detail, 1)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [1] * 2_000_000},
        {"inputs": TEXT, "erase": [f"concept {i}" for i in range(300_000)]},
        {"inputs": TEXT, "erase": ["Sports"] * 300_000},
        {"inputs": TEXT, "erase": {"concepts": ["Sports"], "layer": list(range(500_000))}},
        {"inputs": TEXT, **{f"field {i}": 1 for i in range(200_000)}},
    ],
    ids=["numbers", "concepts", "one concept", "layers", "fields"],
)
def test_a_body_of_a_million_errors_is_refused_in_few_words(
    server: RunningServer, problem: Problem, body: dict[str, Any]
) -> None:
    refused = server.http.post("/v1/classify", json=body, timeout=20)
    problem(refused, 422, "invalid")
    assert len(refused.content) < 4000


def test_a_concept_named_twice_is_wrong_even_where_it_is_enforced_anyway(
    server: RunningServer, problem: Problem
) -> None:
    server.http.put("/v1/erasures/Sports", json={"enforced": True})
    problem(server.classify(TEXT, erase=["Sports", "Sports"]), 422, "invalid_erasure")
    problem(server.classify(TEXT, erase={"concepts": ["Sports", "Sports"]}), 422, "invalid_erasure")


@pytest.mark.parametrize("layer", [[], [1, 1], [2, -1]])
def test_layers_named_twice_or_not_at_all(server: RunningServer, problem: Problem, layer: list[int]) -> None:
    problem(server.classify(TEXT, erase=[{"concept": "Sports", "layer": layer}]), 422, "invalid_erasure")


def test_what_cannot_be_resolved_is_named(server: RunningServer, problem: Problem) -> None:
    known = problem(server.classify(TEXT, erase=["Weather"]), 404, "unknown_concept")["known"]
    assert known == [*LABELS, "Météo & co"]
    assert problem(server.classify(TEXT, erase=[{"concept": "Sports", "layer": 0}]), 422, "not_fitted")["fitted"] == [
        1,
        2,
    ]
    problem(server.classify(TEXT, erase={"concepts": ["Sports"], "layer": "all"}), 422, "not_fitted")
    problem(server.classify(TEXT, erase=[{"concept": "Sports", "layer": 7}]), 422, "invalid_erasure")
    problem(server.classify(TEXT, erase=["Sports", "World", "Sports"]), 422, "invalid_erasure")
    problem(server.classify(TEXT, model="another"), 404, "unknown_model")
    assert server.classify(TEXT, model=server.service.name).status_code == 200
    named = server.http.post("/v1/classify", params={"model": "another"}, json={"inputs": TEXT})
    problem(named, 404, "unknown_model")


def test_limits_of_a_request(start_server: Callable[..., RunningServer], fitted: Fitted, problem: Problem) -> None:
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


def test_bodies_that_are_no_json(server: RunningServer, problem: Problem) -> None:
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
def test_a_deadline_is_kept(server: RunningServer, problem: Problem) -> None:
    with server.model.steered._lock:
        late = server.http.post("/v1/classify", json={"inputs": "a"}, headers={"X-Request-Timeout": "0.05"})
    problem(late, 504, "deadline_exceeded")
    refused = server.http.post("/v1/classify", json={"inputs": "a"}, headers={"X-Request-Timeout": "0"})
    problem(refused, 422, "invalid")


@pytest.mark.local
def test_erasing_without_ranges_is_503_and_never_ignored(
    start_server: Callable[..., RunningServer], problem: Problem
) -> None:
    bare = start_server()
    assert bare.classify(TEXT).status_code == 200
    problem(bare.classify(TEXT, erase=["Sports"]), 503, "no_range_set")


@pytest.mark.local
def test_logits_that_are_no_numbers_are_a_fault_and_no_json(
    start_server: Callable[..., RunningServer], model: LoadedModel, problem: Problem
) -> None:
    poisoned = load_model(model.source, device="cpu")
    with torch.no_grad():
        poisoned.steered.model.get_parameter("classifier.bias")[0] = torch.nan
    running = start_server(poisoned)
    for activation in ("auto", "sigmoid", "none"):
        problem(running.classify(TEXT, activation=activation), 500, "non_finite")


def test_a_multi_label_model_answers_with_sigmoids(
    start_server: Callable[..., RunningServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = save_tiny("bert", tmp_path_factory.mktemp("multi") / "multi", problem_type="multi_label_classification")
    running = start_server(load_model(str(path), device="cpu"))
    auto, sigmoid = running.classify(TEXT).json(), running.classify(TEXT, activation="sigmoid").json()
    assert auto["results"] == sigmoid["results"]
    soft = running.classify(TEXT, activation="softmax").json()["results"][0]["scores"]
    assert math.isclose(sum(score["score"] for score in soft), 1.0)


@pytest.mark.local
def test_a_client_that_hangs_up_is_not_computed_for(server: RunningServer) -> None:
    def counted(name: str, **labels: str) -> float | None:
        return server.value(name, labels)

    with server.model.steered._lock:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/classify", json={"inputs": [TEXT] * 3}, timeout=0.3)
        until(lambda: counted("neuronlens_rejections_total", reason="cancelled") == 1)
    until(lambda: counted("neuronlens_http_requests_total", method="POST", route="/v1/classify", status="499") == 1)
    assert server.classify(TEXT).status_code == 200


@pytest.mark.local
def test_a_full_queue_says_when_to_come_back(
    start_server: Callable[..., RunningServer], model: LoadedModel, problem: Problem
) -> None:
    tokens = len(model.tokens.encode([TEXT])[0].ids)
    running = start_server(max_queue_tokens=tokens)
    value = running.value
    held, queued = (threading.Thread(target=running.classify, args=(TEXT,)) for _ in range(2))
    with model.steered._lock:
        held.start()
        until(lambda: value("neuronlens_queue_wait_seconds_count") == 1)  # it left the queue for the model
        queued.start()
        until(lambda: value("neuronlens_queue_tokens") == tokens)
        full = running.classify(TEXT)
    problem(full, 429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    held.join()
    queued.join()
    assert running.classify(TEXT).status_code == 200
