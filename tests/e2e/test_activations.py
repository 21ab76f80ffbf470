"""`/v1/tokenize`, `/v1/activations` and `/v1/capabilities` over HTTP, for every kind of classifier."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from range_store.storage.api_keys import ApiKeyStore
from tests.servers import RunningServer, with_ranges
from tests.workers.checkpoints import TEMPLATE, save_label_token, save_language_model, save_tiny
from workers.engine import inspector
from workers.fitting.fit import FitResult
from workers.models.loading import load_model

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXTS = ["The keeper saved a penalty.", "Çok güzel, 日本 \U0001f600 goals", "a goal", "[SEP] in a text"]
StartServer = Callable[..., RunningServer]
LONG = "the keeper saved a penalty " * 60


@pytest.fixture(scope="module", params=["bert", "roberta", "gpt2", "label-token", "few-shot"])
def server_of_kind(
    request: pytest.FixtureRequest, start_module_server: StartServer, tmp_path_factory: pytest.TempPathFactory
) -> RunningServer:
    """A server without ranges, for a model of each kind. Its tests only read."""
    directory = tmp_path_factory.mktemp("activations")
    if request.param == "label-token":
        model = load_model(str(save_label_token("gpt2", directory)), device="cpu")
    elif request.param == "few-shot":
        (directory / "tiny.json").write_text(json.dumps(TEMPLATE))
        source = save_language_model("gpt2", directory / "lm")
        model = load_model(str(source), device="cpu", template=str(directory / "tiny.json"))
    else:
        model = load_model(str(save_tiny(request.param, directory)), device="cpu")
    return start_module_server(model)


def tokenize(server: RunningServer, inputs: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = server.http.post("/v1/tokenize", json={"inputs": inputs, **fields})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def test_tokens_match_the_model_input_and_spans_cover_the_text(server_of_kind: RunningServer) -> None:
    tokens, texts = server_of_kind.model.tokens, [*TEXTS, LONG]
    encoded = tokens.encode(texts)
    batch = tokens.batch(encoded)
    results = tokenize(server_of_kind, texts)
    without_special = tokenize(server_of_kind, texts, add_special_tokens=False)
    for text, result, bare, ids, read in zip(
        texts, results, without_special, encoded, batch.read.tolist(), strict=True
    ):
        assert [each["id"] for each in result["tokens"]] == list(ids.ids)
        assert [place for place, each in enumerate(result["tokens"]) if each["read"]] == [read]
        assert result["truncated"] == ids.truncated == (text == LONG)
        assert result["total"] > len(ids.ids) if ids.truncated else result["total"] == len(ids.ids)
        own = [each for each in result["tokens"] if not each["special"]]
        assert all((each["start"] is None) == each["special"] for each in result["tokens"])
        covered = {place for each in own for place in range(each["start"], each["stop"])}
        if not ids.truncated:
            assert covered >= {place for place, character in enumerate(text) if character.isalnum()}
        assert bare["tokens"] == own
    suffix = len(tokens.suffix)
    if suffix:
        assert [each["special"] for each in results[0]["tokens"]][-suffix:] == [True] * suffix
    usage = server_of_kind.classify(TEXTS[0], erase=[]).json()["usage"]["tokens"]
    assert usage == len(results[0]["tokens"])


def test_tokenize_counts_the_prompt_and_marks_the_read_token(server_of_kind: RunningServer) -> None:
    identity = server_of_kind.model.identity
    answer = server_of_kind.http.post("/v1/tokenize", json={"inputs": "a goal"}).json()
    assert (answer["prefix_tokens"] > 0) == (identity.kind == "few-shot")
    assert answer["max_tokens"] == server_of_kind.model.tokens.max_tokens
    read = [each["read"] for each in answer["results"][0]["tokens"]]
    assert read.index(True) == (0 if identity.family in ("bert", "roberta") else len(read) - 1)


def test_activations_are_the_states_that_a_fit_records(server_of_kind: RunningServer) -> None:
    model, texts = server_of_kind.model, [*TEXTS, LONG]
    batch = model.tokens.batch(model.tokens.encode(texts))
    n_layers, neurons = model.identity.n_layers, [0, 31, 7, 7]
    for layer in (0, -1):
        _, states = model.steered.record(batch, [layer % n_layers])
        body = {"inputs": texts, "layer": layer, "neurons": neurons}
        answer = server_of_kind.http.post("/v1/activations", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["layer"], found["neurons"]) == (layer % n_layers, neurons)
        expected = states[layer % n_layers].numpy()[:, neurons]
        np.testing.assert_allclose([each["values"] for each in found["results"]], expected, atol=1e-4)


def test_activations_default_to_the_site_of_the_active_range_set(server: RunningServer) -> None:
    found = server.http.post("/v1/activations", json={"inputs": "a goal", "neurons": [3]}).json()
    assert (found["site"], found["position"], found["layer"]) == ("block_output", "read", 2)
    neuron = server.http.get("/v1/neurons/-1/3").json()
    (value,) = found["results"][0]["values"]
    assert min(each["minimum"] for each in neuron["concepts"]) - 5 < value
    assert value < max(each["maximum"] for each in neuron["concepts"]) + 5


def test_erasures_do_not_change_activations(server: RunningServer) -> None:
    body = {"inputs": "a goal in the last minute", "neurons": list(range(32))}
    before = server.http.post("/v1/activations", json=body).json()
    server.http.put("/v1/erasures/Sports", json={"method": "neuron", "top_fraction": 1.0}).raise_for_status()
    assert server.http.post("/v1/activations", json=body).json() == before


def test_activations_need_admin_while_an_erasure_is_enforced(
    server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore], problem: Problem
) -> None:
    server, tokens, _ = server_with_keys
    body = {"inputs": "a goal", "neurons": [1]}

    def ask(scope: str) -> httpx.Response:
        return server.http.post("/v1/activations", json=body, headers={"X-API-Key": tokens[scope]})

    assert ask("infer").status_code == 200
    problem(ask("read"), 403, "wrong_scope")
    admin = {"X-API-Key": tokens["admin"]}
    server.http.put("/v1/erasures/Sports", json={"enforced": True}, headers=admin).raise_for_status()
    problem(ask("infer"), 403, "wrong_scope")
    assert ask("admin").status_code == 200


@pytest.fixture(scope="module")
def limited_server(start_module_server: StartServer, fitted: FitResult) -> RunningServer:
    """A server that accepts at most 100 characters in a text."""
    return with_ranges(start_module_server(max_characters=100), fitted)


@pytest.mark.parametrize("path", ["/v1/tokenize", "/v1/activations"])
def test_limits_of_inputs_are_enforced(limited_server: RunningServer, problem: Problem, path: str) -> None:
    required: dict[str, Any] = {} if path == "/v1/tokenize" else {"neurons": [0]}

    def call(inputs: Any, **fields: Any) -> httpx.Response:
        return limited_server.http.post(path, json={"inputs": inputs, **required, **fields})

    problem(call("x" * 101), 413, "text_too_large")
    problem(call(["x"] * 65), 413, "too_many_texts")
    problem(call("x", model="other"), 404, "unknown_model")
    problem(call(3), 422, "invalid")
    problem(call("x", surprise=1), 422, "invalid")
    assert call([]).json()["results"] == []
    surrogate = json.dumps({"inputs": "\ud800 a \x00 b", **required})
    answer = limited_server.http.post(path, content=surrogate, headers={"Content-Type": "application/json"})
    assert len(answer.json()["results"]) == 1
    if path == "/v1/activations":
        for layer, neuron, field in ((3, 0, "layer"), (-4, 0, "layer"), (0, 32, "neurons")):
            invalid = problem(call("x", layer=layer, neurons=[neuron]), 422, "invalid")
            assert invalid["errors"][0]["loc"] == ["body", field]
        problem(call("x", neurons=list(range(65))), 422, "invalid")
        problem(call("x", neurons=[]), 422, "invalid")


def test_draining_server_rejects_tokenize_and_activations(fresh_server: RunningServer, problem: Problem) -> None:
    fresh_server.service.engine.drain()
    problem(fresh_server.http.post("/v1/tokenize", json={"inputs": "x"}), 503, "draining")
    problem(fresh_server.http.post("/v1/activations", json={"inputs": "x", "neurons": [0]}), 503, "draining")


def test_reply_with_too_many_tokens_is_rejected(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspector, "MAX_LISTED_TOKENS", 20)
    rejected = server.http.post("/v1/tokenize", json={"inputs": ["a goal in the last minute"] * 10})
    assert "a reply holds 20" in problem(rejected, 413, "request_too_large")["detail"]


def test_activations_are_unaffected_by_concurrent_classification(server: RunningServer) -> None:
    body = {"inputs": ["a goal in the last minute", "shares fell"], "neurons": [0, 1]}

    def activations(_: int = 0) -> list[list[float]]:
        results = server.http.post("/v1/activations", json=body).json()["results"]
        return [each["values"] for each in results]

    def classify(_: int) -> int:
        return server.classify(["a goal"] * 20).status_code

    alone = activations()
    with ThreadPoolExecutor(8) as pool:
        statuses, found = pool.map(classify, range(10)), pool.map(activations, range(10))
        assert set(statuses) == {200}
        for values in found:
            np.testing.assert_allclose(values, alone, atol=1e-4)


def test_too_many_waiting_calls_are_rejected_and_late_ones_time_out(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(inspector, "MAX_CALLS", 0)
        rejected = server.http.post("/v1/tokenize", json={"inputs": "x"})
    problem(rejected, 429, "queue_full")
    assert rejected.headers["Retry-After"] == "1"
    late = {"X-Request-Timeout": "0.05"}
    with server.model.steered._lock:
        body = {"inputs": "x", "neurons": [0]}
        problem(server.http.post("/v1/activations", json=body, headers=late), 504, "deadline_exceeded")
    assert server.http.post("/v1/activations", json=body).status_code == 200


def test_failure_on_one_call_leaves_the_server_working(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a private text")

    with monkeypatch.context() as patched:
        patched.setattr(server.model.steered, "record", broken)
        failed = server.http.post("/v1/activations", json={"inputs": "x", "neurons": [0]})
        assert "private" not in problem(failed, 500, "engine_failed")["detail"]
    assert server.http.post("/v1/activations", json={"inputs": "x", "neurons": [0]}).status_code == 200
    assert server.classify("x").status_code == 200


def test_every_listed_capability_works(server: RunningServer) -> None:
    listed = server.http.get("/v1/capabilities").json()
    (loaded,) = server.http.get("/v1/models").json()["models"]
    for name in ("kind", "labels", "layers", "hidden_size", "max_tokens"):
        assert listed[name] == loaded[name]
    assert listed["model"] == loaded["id"]
    assert listed["layers_fitted"] == [1, 2]
    live = server.http.get("/v1/erasures").json()
    assert (listed["generation"], listed["range_set"]) == (live["generation"], live["range_set"])
    assert (listed["key"], listed["scopes"], listed["keys_in_force"]) == (None, ["infer", "read", "admin"], False)
    assert server.classify(["x"] * (listed["max_texts"] + 1)).status_code == 413
    for ranking in listed["rankings_fitted"]:
        assert server.classify("x", erase=[{"concept": "Sports", "ranking": ranking}]).status_code == 200
    for method in listed["methods"]:
        assert server.classify("x", erase=[{"concept": "Sports", "method": method}]).status_code == 200
    for activation in listed["activations"]:
        assert server.classify("x", erase=[], activation=activation).status_code == 200
    assert {"compare", "events", "tokenize", "activations", "reports"} <= set(listed["features"])


def test_capabilities_name_the_caller(server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore]) -> None:
    server, tokens, _ = server_with_keys
    listed = server.http.get("/v1/capabilities", headers={"X-API-Key": tokens["read"]}).json()
    assert (listed["key"], listed["scopes"], listed["keys_in_force"]) == ("the-read", ["read"], True)


def test_capabilities_need_no_range_set(start_server: Callable[..., RunningServer]) -> None:
    listed = start_server().http.get("/v1/capabilities").json()
    assert (listed["range_set"], listed["layers_fitted"], listed["rankings_fitted"]) == (None, [], [])
