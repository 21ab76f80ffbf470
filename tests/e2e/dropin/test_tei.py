"""`/predict` and `/info`, as clients of text-embeddings-inference use them."""

import functools
import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tei_client import HttpClient, ModelType
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.http.problems import ApiError
from app.routes.dropin.steering import check_truncation_side
from tests.e2e.dropin.protocols import TEI_ERROR, TEI_INFO, TEI_PREDICTIONS, refused
from tests.servers import LABELS, RunningServer
from tests.workers.texts import labelled_texts
from workers.engine.answers import Answer, TextAnswer
from workers.models.loading import LoadedModel

TEXTS = [text for text, _ in labelled_texts(3, seed=3)]


def predict(running: RunningServer, **body: Any) -> Any:
    reply = running.http.post("/predict", json=body)
    assert reply.status_code == 200, reply.text
    jsonschema.validate(reply.json(), TEI_PREDICTIONS)
    return reply.json()


def test_a_string_gets_one_list_of_scores(server: RunningServer) -> None:
    assert predict(server, inputs=TEXTS[0]) == server.classify(TEXTS[0]).json()["results"][0]["scores"]


@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text]])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_list_is_a_batch(server: RunningServer, wrap: Any, size: int) -> None:
    found = predict(server, inputs=[wrap(text) for text in TEXTS[:size]])
    assert [each[0]["label"] for each in found] == [
        each["label"] for each in server.classify(TEXTS[:size]).json()["results"]
    ]


def test_the_client_gets_the_scores_of_v1(server: RunningServer) -> None:
    client = HttpClient(server.url)
    for inputs in (TEXTS[0], TEXTS):
        expected = server.classify(inputs).json()["results"]
        found = client.classify(inputs, truncate=True)
        assert [[score.model_dump() for score in each.scores] for each in found] == [
            [{"score": score["score"], "label": score["label"]} for score in each["scores"]] for each in expected
        ]
    logits = server.classify(TEXTS[0], activation="none").json()["results"][0]["scores"]
    assert [score.score for score in client.classify(TEXTS[0], raw_scores=True)[0].scores] == [
        each["score"] for each in logits
    ]


def test_the_client_reads_health_metadata_and_tokens(server: RunningServer) -> None:
    client = HttpClient(server.url)
    assert client.health()
    info = client.info()
    assert (info.server_model_id, info.server_model_type) == (server.service.name, ModelType.Classifier)
    assert info.server_model_metadata.id2label == {str(n): label for n, label in enumerate(LABELS)}
    assert client.prompt_names() == []
    for special in (True, False):
        tokenized = client.tokenize(TEXTS, add_special_tokens=special)
        expected = server.http.post("/v1/tokenize", json={"inputs": TEXTS, "add_special_tokens": special}).json()
        assert [each.get_ids() for each in tokenized] == [
            [token["id"] for token in each["tokens"]] for each in expected["results"]
        ]


def test_scores_of_pairs_equal_those_of_transformers(server: RunningServer, model: LoadedModel) -> None:
    first, second, third = TEXTS
    inputs: list[Any] = [[first, second], [third], second, [second, first], ["", first], [first, ""]]
    found = predict(server, inputs=inputs, raw_scores=True)
    for each, scores in zip(inputs, found, strict=True):
        parts = [each] if isinstance(each, str) else each
        assert {score["label"]: score["score"] for score in scores} == pytest.approx(
            own_logits(model, *parts), abs=1e-5
        )
    assert found[0] != found[3], "the order of a pair matters"


@functools.cache
def loaded(source: str) -> tuple[Any, Any]:
    return AutoModelForSequenceClassification.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)


def own_logits(model: LoadedModel, *parts: str) -> dict[str, float]:
    """The logits that transformers itself gives a text or a pair."""
    own, tokenizer = loaded(model.source)
    tokens = tokenizer(*([part] for part in parts), truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return dict(zip(LABELS, own(**tokens).logits[0].tolist(), strict=True))


def test_two_strings_are_a_batch_and_a_nested_list_of_two_is_a_pair(server: RunningServer) -> None:
    assert len(predict(server, inputs=TEXTS[:2])) == 2
    assert len(predict(server, inputs=[TEXTS[:2]])) == 1


def test_erasures_apply_to_pairs(server: RunningServer) -> None:
    """With every neuron of the last block masked, a pair and a text get the same scores."""
    everything = [{"concept": "Sports", "method": "neuron", "top_fraction": 1.0}]
    pair, text = predict(server, inputs=[TEXTS[:2], TEXTS[2]], erase=everything)
    assert pair == text
    assert pair != predict(server, inputs=[TEXTS[:2]])[0]


def test_limits_of_texts_apply_to_pairs(server: RunningServer) -> None:
    half, long = "a" * 60_000, "word " * 5000
    for inputs, status, code in (
        ([["a", "b"]] * (server.service.settings.max_texts + 1), 413, "too_many_texts"),
        ([["a", "b"], [half, half]], 413, "text_too_large"),
        (["a", ["b", long]], 413, "text_too_long"),
    ):
        body = refused(server.http.post("/predict", json={"inputs": inputs, "truncate": False}), status, code)
        jsonschema.validate(body, TEI_ERROR)
        assert "input 1 " in body["error"] or code == "too_many_texts"
    assert len(predict(server, inputs=[[half[:1000], long], ["a", long]])) == 2
    lone_surrogates = json.dumps({"inputs": [["a lone surrogate: \ud800", "\udc00"]]})
    as_json = {"Content-Type": "application/json"}
    assert server.http.post("/predict", content=lone_surrogates, headers=as_json).is_success
    left = server.http.post("/predict", json={"inputs": ["a", ["b", long]], "truncation_direction": "Left"})
    assert refused(left, 422, "unsupported")["error"].startswith("inputs.1 is too long")


@pytest.mark.parametrize("inputs", [[], [[]], [["a", "b", "c"]], 5, [5], [["a", 5]], None, {"text": "a"}])
def test_invalid_inputs_are_rejected(server: RunningServer, inputs: Any) -> None:
    body = refused(server.http.post("/predict", json={"inputs": inputs}), 422, "invalid")
    jsonschema.validate(body, TEI_ERROR)
    assert body["error_type"] == "Validation"


def test_raw_scores_are_logits(server: RunningServer) -> None:
    found = predict(server, inputs=TEXTS[0], raw_scores=True)
    assert found == server.classify(TEXTS[0], activation="none").json()["results"][0]["scores"]


@pytest.mark.parametrize("direction", ["Left", "left", "Right", "right"])
def test_long_texts_are_cut_at_the_right_or_rejected(server: RunningServer, direction: str) -> None:
    long = "word " * 5000
    assert predict(server, inputs=long) == server.classify(long).json()["results"][0]["scores"]
    assert len(predict(server, inputs="short", truncation_direction=direction)) == len(LABELS)
    whole = server.http.post("/predict", json={"inputs": long, "truncate": False, "truncation_direction": direction})
    body = refused(whole, 413, "text_too_long")
    assert body["error_type"] == "Validation"
    cut = server.http.post("/predict", json={"inputs": ["short", long], "truncation_direction": direction})
    if direction.lower() == "left":
        assert refused(cut, 422, "unsupported")["error"].startswith("inputs.1 is too long")
    else:
        assert cut.status_code == 200


@pytest.mark.local
def test_a_failure_of_the_model_is_status_424(
    server: RunningServer, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.steered._call_packed
    failed: list[int] = []

    def fails_once(*args: Any) -> torch.Tensor:
        if not failed:
            failed.append(1)
            raise ValueError("a text that fails")
        return whole(*args)

    monkeypatch.setattr(model.steered, "_call_packed", fails_once)
    reply = server.http.post("/predict", json={"inputs": TEXTS[0]})
    body = refused(reply, 424, "engine_failed")
    jsonschema.validate(body, TEI_ERROR)
    assert body["error_type"] == "Backend"
    assert server.http.post("/predict", json={"inputs": TEXTS[0]}).status_code == 200


def test_a_missed_deadline_is_a_backend_error(server: RunningServer) -> None:
    late = server.http.post("/predict", json={"inputs": "a"}, headers={"X-Request-Timeout": "1e-9"})
    assert refused(late, 504, "deadline_exceeded")["error_type"] == "Backend"


def test_info_describes_the_model(server: RunningServer) -> None:
    info = server.http.get("/info").json()
    jsonschema.validate(info, TEI_INFO)
    assert info["model_id"] == server.service.name
    assert info["model_type"]["classifier"]["id2label"] == {str(n): label for n, label in enumerate(LABELS)}
    assert info["model_type"]["classifier"]["label2id"] == {label: n for n, label in enumerate(LABELS)}
    assert info["max_client_batch_size"] == server.service.settings.max_texts


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_may_be_cut_where_the_models_tokenizer_cuts(model: LoadedModel, side: Any) -> None:
    text = TextAnswer(np.zeros(4, np.float32), None, 0, True, 64)
    answer = Answer((text,), "none", (), frozenset(), None, None, 0.0, 0.0)
    facts = replace(model.facts, truncation_side=side)
    check_truncation_side(answer, facts, side, "inputs.")
    with pytest.raises(ApiError, match=rf"inputs\.0 is too long, and this model's texts are cut at the {side} only"):
        check_truncation_side(answer, facts, {"left": "right", "right": "left"}[side], "inputs.")
