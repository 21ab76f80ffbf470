"""`/classify`, as clients of vLLM use it."""

from typing import Any

import jsonschema
import pytest

from tests.e2e.dropin.protocols import VLLM_CLASSIFIED, VLLM_ERROR, refused
from tests.servers import LABELS, RunningServer

SHORT = "a goal"
LONG = "word " * 5000


def classify(running: RunningServer, **body: Any) -> Any:
    reply = running.http.post("/classify", json=body)
    assert reply.status_code == 200, reply.text
    jsonschema.validate(reply.json(), VLLM_CLASSIFIED)
    return reply.json()


def refusal(running: RunningServer, status: int, code: str, **body: Any) -> dict[str, Any]:
    error = refused(running.http.post("/classify", json=body), status, code)
    jsonschema.validate(error, VLLM_ERROR)
    assert error["error"]["code"] == status
    return dict(error["error"])


@pytest.mark.parametrize("texts", [SHORT, [SHORT], [SHORT, "shares fell", "rain"]])
def test_probabilities_are_in_the_order_of_the_labels(server: RunningServer, texts: Any) -> None:
    found = classify(server, input=texts, model=server.service.name)
    expected = server.classify(texts).json()
    assert [each["label"] for each in found["data"]] == [each["label"] for each in expected["results"]]
    for index, (each, result) in enumerate(zip(found["data"], expected["results"], strict=True)):
        by_label = {score["label"]: score["score"] for score in result["scores"]}
        assert each["probs"] == pytest.approx([by_label[label] for label in LABELS])
        assert (each["index"], each["num_classes"]) == (index, len(LABELS))
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == expected["usage"]["tokens"]
    assert found["model"] == server.service.name


def test_the_id_of_a_reply_is_the_request_id(server: RunningServer) -> None:
    reply = server.http.post("/classify", json={"input": SHORT}, headers={"X-Request-ID": "abc-1"})
    assert reply.json()["id"] == "classify-abc-1"


@pytest.mark.parametrize("name", ["use_activation", "activation", "softmax"])
def test_logits_are_returned_when_the_activation_is_off(server: RunningServer, name: str) -> None:
    bare = server.classify(SHORT, activation="none").json()["results"][0]["scores"]
    logits = {each["label"]: each["score"] for each in bare}
    found = classify(server, input=SHORT, **{name: False})["data"][0]["probs"]
    assert found == pytest.approx([logits[label] for label in LABELS])
    default = classify(server, input=SHORT)
    assert classify(server, input=SHORT, **{name: True})["data"] == default["data"]
    assert classify(server, input=SHORT, **{name: None})["data"] == default["data"]


def test_the_newest_name_of_the_activation_field_wins(server: RunningServer) -> None:
    both = classify(server, input=SHORT, use_activation=True, softmax=False)
    assert both["data"] == classify(server, input=SHORT)["data"]


def test_long_texts_are_rejected_or_truncated(server: RunningServer) -> None:
    limit = server.model.tokens.max_tokens
    assert refusal(server, 400, "text_too_long", input=LONG)["type"] == "BadRequestError"
    for cut in (-1, limit):
        assert classify(server, input=LONG, truncate_prompt_tokens=cut)["usage"]["prompt_tokens"] == limit
    assert "more than" in refusal(server, 400, "invalid", input=SHORT, truncate_prompt_tokens=limit + 1)["message"]


def test_texts_are_truncated_at_the_right_only(server: RunningServer) -> None:
    for side in ("left", "right", None):
        assert classify(server, input=SHORT, truncation_side=side)["data"] == classify(server, input=SHORT)["data"]
    cut = {"input": [SHORT, LONG], "truncate_prompt_tokens": -1}
    assert "input 1 is too long" in refusal(server, 400, "unsupported", **cut, truncation_side="left")["message"]
    assert classify(server, **cut, truncation_side="right")["data"] == classify(server, **cut)["data"]
    refusal(server, 400, "invalid", input=SHORT, truncation_side="middle")


def test_a_text_is_never_truncated_below_the_length_of_the_model(server: RunningServer) -> None:
    short = classify(server, input=SHORT)["usage"]["prompt_tokens"]
    assert classify(server, input=SHORT, truncate_prompt_tokens=short)["data"] == classify(server, input=SHORT)["data"]
    refusal(server, 400, "unsupported", input=SHORT, truncate_prompt_tokens=short - 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [101, 102]}, "input.0"),
        ({"input": [[101, 102]]}, "input.0"),
        ({"messages": [{"role": "user", "content": "a"}]}, "input"),
        ({"input": SHORT, "add_special_tokens": False}, "add_special_tokens"),
        ({"input": SHORT, "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": SHORT, "use_activation": "no"}, "use_activation"),
        ({"input": ""}, None),
        ({"input": []}, None),
    ],
)
def test_invalid_requests_are_rejected(server: RunningServer, body: Any, param: str | None) -> None:
    assert refusal(server, 400, "invalid", **body)["param"] == param


def test_another_model_is_not_found(server: RunningServer) -> None:
    assert refusal(server, 404, "unknown_model", input=SHORT, model="another")["type"] == "NotFoundError"


def test_fields_without_effect_are_ignored(server: RunningServer) -> None:
    classify(server, input=SHORT, user="me", priority=3, request_id="x", mm_processor_kwargs={"a": 1})
