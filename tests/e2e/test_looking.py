"""Tokens, activations and capabilities over real HTTP, for classifiers with a head, with label tokens, and prompted."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from range_store.api_keys import KeyStore
from tests.servers import RunningServer, with_ranges
from tests.workers.checkpoints import TEMPLATE, save_label_token, save_language_model, save_tiny
from workers.engine import looking as looking_module
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel, load_model

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXTS = ["The keeper saved a penalty.", "Çok güzel, 日本 \U0001f600 goals", "a goal", "[SEP] in a text"]
LONG = "the keeper saved a penalty " * 60


@pytest.fixture(scope="module", params=["bert", "roberta", "gpt2", "label-token", "few-shot"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("looking")
    if request.param == "label-token":
        return load_model(str(save_label_token("gpt2", directory)), device="cpu")
    if request.param == "few-shot":
        (directory / "tiny.json").write_text(json.dumps(TEMPLATE))
        source = save_language_model("gpt2", directory / "lm")
        return load_model(str(source), device="cpu", template=str(directory / "tiny.json"))
    return load_model(str(save_tiny(request.param, directory)), device="cpu")


def tokens(running: RunningServer, inputs: Any, **more: Any) -> list[dict[str, Any]]:
    answer = running.http.post("/v1/tokenize", json={"inputs": inputs, **more})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def test_tokens_are_what_the_model_gets_and_spans_are_the_texts(
    loaded: LoadedModel, start_server: Callable[..., RunningServer]
) -> None:
    running = start_server(loaded)
    encoded = loaded.tokens.encode([*TEXTS, LONG])
    batch = loaded.tokens.pad([each.ids for each in encoded])
    results = tokens(running, [*TEXTS, LONG])
    for text, result, ids, read in zip([*TEXTS, LONG], results, encoded, batch.read.tolist(), strict=True):
        assert [each["id"] for each in result["tokens"]] == list(ids.ids)
        assert [place for place, each in enumerate(result["tokens"]) if each["read"]] == [read]
        assert result["truncated"] == ids.truncated == (text == LONG)
        assert result["total"] > len(ids.ids) if ids.truncated else result["total"] == len(ids.ids)
        own = [each for each in result["tokens"] if not each["special"]]
        assert all((each["start"] is None) == each["special"] for each in result["tokens"])
        covered = {place for each in own for place in range(each["start"], each["stop"])}
        if not ids.truncated:
            assert covered >= {place for place, character in enumerate(text) if character.isalnum()}
        (bare,) = tokens(running, text, add_special_tokens=False)
        assert bare["tokens"] == own
    suffix = len(loaded.tokens.suffix)
    if suffix:
        assert [each["special"] for each in results[0]["tokens"]][-suffix:] == [True] * suffix
    usage = running.classify(TEXTS[0], erase=[]).json()["usage"]["tokens"]
    assert usage == len(results[0]["tokens"])


def test_a_prompt_is_counted_and_a_head_reads_where_it_says(
    loaded: LoadedModel, start_server: Callable[..., RunningServer]
) -> None:
    running = start_server(loaded)
    answer = running.http.post("/v1/tokenize", json={"inputs": "a goal"}).json()
    assert (answer["prefix_tokens"] > 0) == (loaded.identity.kind == "few-shot")
    assert answer["max_tokens"] == loaded.tokens.max_tokens
    read = [each["read"] for each in answer["results"][0]["tokens"]]
    assert read.index(True) == (0 if loaded.identity.family in ("bert", "roberta") else len(read) - 1)


def test_activations_are_the_states_that_a_fit_records(
    loaded: LoadedModel, start_server: Callable[..., RunningServer]
) -> None:
    running = start_server(loaded)
    batch = loaded.tokens.pad([each.ids for each in loaded.tokens.encode([*TEXTS, LONG])])
    n_layers, chosen = loaded.identity.n_layers, [0, 31, 7, 7]
    for layer in (0, -1):
        _, states = loaded.steered.record(batch, [layer % n_layers])
        body = {"inputs": [*TEXTS, LONG], "layer": layer, "neurons": chosen}
        answer = running.http.post("/v1/activations", json=body)
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        assert (shown["layer"], shown["neurons"]) == (layer % n_layers, chosen)
        expected = states[layer % n_layers].numpy()[:, chosen]
        np.testing.assert_allclose([each["values"] for each in shown["results"]], expected, atol=1e-4)


def test_activations_are_taken_where_the_active_range_set_was_fitted(server: RunningServer, model: LoadedModel) -> None:
    shown = server.http.post("/v1/activations", json={"inputs": "a goal", "neurons": [3]}).json()
    assert (shown["site"], shown["position"], shown["layer"]) == ("block_output", "read", 2)
    neuron = server.http.get("/v1/neurons/-1/3").json()
    (value,) = shown["results"][0]["values"]
    assert min(each["minimum"] for each in neuron["concepts"]) - 5 < value
    assert value < max(each["maximum"] for each in neuron["concepts"]) + 5


def test_an_erasure_changes_nothing_that_is_shown(server: RunningServer) -> None:
    asked = {"inputs": "a goal in the last minute", "neurons": list(range(32))}
    before = server.http.post("/v1/activations", json=asked).json()
    server.http.put("/v1/erasures/Sports", json={"method": "neuron", "top_fraction": 1.0}).raise_for_status()
    assert server.http.post("/v1/activations", json=asked).json() == before


def test_what_an_enforced_erasure_hides_is_shown_to_admins_only(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], problem: Problem
) -> None:
    running, keys, _ = server_with_keys
    asked = {"inputs": "a goal", "neurons": [1]}

    def ask(scope: str) -> httpx.Response:
        return running.http.post("/v1/activations", json=asked, headers={"X-API-Key": keys[scope]})

    assert ask("infer").status_code == 200
    problem(ask("read"), 403, "wrong_scope")
    admin = {"X-API-Key": keys["admin"]}
    running.http.put("/v1/erasures/Sports", json={"enforced": True}, headers=admin).raise_for_status()
    problem(ask("infer"), 403, "wrong_scope")
    assert ask("admin").status_code == 200


@pytest.mark.parametrize("path", ["/v1/tokenize", "/v1/activations"])
def test_limits_hold(start_server: Callable[..., RunningServer], fitted: Fitted, problem: Problem, path: str) -> None:
    running = with_ranges(start_server(max_characters=100), fitted)
    more: dict[str, Any] = {} if path == "/v1/tokenize" else {"neurons": [0]}

    def ask(inputs: Any, **other: Any) -> httpx.Response:
        return running.http.post(path, json={"inputs": inputs, **more, **other})

    problem(ask("x" * 101), 413, "text_too_large")
    problem(ask(["x"] * 65), 413, "too_many_texts")
    problem(ask("x", model="other"), 404, "unknown_model")
    problem(ask(3), 422, "invalid")
    problem(ask("x", surprise=1), 422, "invalid")
    assert ask([]).json()["results"] == []
    odd = json.dumps({"inputs": "\ud800 a \x00 b", **more})
    assert (
        len(running.http.post(path, content=odd, headers={"Content-Type": "application/json"}).json()["results"]) == 1
    )
    if path == "/v1/activations":
        for layer, neuron in ((3, 0), (-4, 0), (0, 32)):
            problem(ask("x", layer=layer, neurons=[neuron]), 404, "unknown_neuron")
        problem(ask("x", neurons=list(range(65))), 422, "invalid")
        problem(ask("x", neurons=[]), 422, "invalid")
    running.service.engine.drain()
    problem(ask("x"), 503, "draining")


def test_a_reply_lists_no_more_tokens_than_a_bound(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking_module, "MOST_SHOWN", 20)
    refused = server.http.post("/v1/tokenize", json={"inputs": ["a goal in the last minute"] * 10})
    assert "a reply holds 20" in problem(refused, 413, "request_too_large")["detail"]


def test_looking_and_classifying_go_on_side_by_side(server: RunningServer) -> None:
    asked = {"inputs": ["a goal in the last minute", "shares fell"], "neurons": [0, 1]}
    alone = server.http.post("/v1/activations", json=asked).json()

    def look(_: int) -> bool:
        return bool(
            np.allclose(
                [each["values"] for each in server.http.post("/v1/activations", json=asked).json()["results"]],
                [each["values"] for each in alone["results"]],
                atol=1e-4,
            )
        )

    def classify(_: int) -> bool:
        return server.classify(["a goal"] * 20).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        assert all([*pool.map(look, range(20)), *pool.map(classify, range(20))])


def test_more_errands_than_may_wait_are_refused_and_a_late_one_times_out(
    server: RunningServer, problem: Problem
) -> None:
    looking = server.service.engine.looking
    looking._waiting = 32  # as many as may wait
    try:
        refused = server.http.post("/v1/tokenize", json={"inputs": "x"})
        problem(refused, 429, "queue_full")
        assert refused.headers["Retry-After"] == "1"
    finally:
        looking._waiting = 0
    late = {"X-Request-Timeout": "0.000001"}
    problem(server.http.post("/v1/tokenize", json={"inputs": "x"}, headers=late), 504, "deadline_exceeded")
    assert server.http.post("/v1/tokenize", json={"inputs": "x"}).status_code == 200


def test_a_model_that_fails_on_texts_fails_them_alone(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("what the text was")

    with monkeypatch.context() as patched:
        patched.setattr(server.model.steered, "record", broken)
        refused = server.http.post("/v1/activations", json={"inputs": "x", "neurons": [0]})
        assert "what the text was" not in problem(refused, 500, "engine_failed")["detail"]
    assert server.http.post("/v1/activations", json={"inputs": "x", "neurons": [0]}).status_code == 200
    assert server.classify("x").status_code == 200


def test_capabilities_say_what_the_rest_of_the_server_does(server: RunningServer, model: LoadedModel) -> None:
    told = server.http.get("/v1/capabilities").json()
    (shown,) = server.http.get("/v1/models").json()["models"]
    for name in ("kind", "labels", "layers", "hidden_size", "max_tokens"):
        assert told[name] == shown[name]
    assert told["model"] == shown["id"]
    assert told["layers_fitted"] == [1, 2]
    live = server.http.get("/v1/erasures").json()
    assert (told["generation"], told["range_set"]) == (live["generation"], live["range_set"])
    assert (told["key"], told["scopes"], told["keys_in_force"]) == (None, ["infer", "read", "admin"], False)
    assert server.classify(["x"] * (told["max_texts"] + 1)).status_code == 413
    for ranking in told["rankings_fitted"]:
        assert server.classify("x", erase=[{"concept": "Sports", "ranking": ranking}]).status_code == 200
    for method in told["methods"]:
        assert server.classify("x", erase=[{"concept": "Sports", "method": method}]).status_code == 200
    for activation in told["activations"]:
        assert server.classify("x", erase=[], activation=activation).status_code == 200
    assert {"compare", "events", "tokenize", "activations", "reports"} <= set(told["features"])


def test_capabilities_name_the_caller_and_need_no_range_set(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], start_server: Callable[..., RunningServer]
) -> None:
    running, keys, _ = server_with_keys
    told = running.http.get("/v1/capabilities", headers={"X-API-Key": keys["read"]}).json()
    assert (told["key"], told["scopes"], told["keys_in_force"]) == ("the-read", ["read"], True)
    bare = start_server().http.get("/v1/capabilities").json()
    assert (bare["range_set"], bare["layers_fitted"], bare["rankings_fitted"]) == (None, [], [])
