"""`POST /` with the client that people have, huggingface_hub's own, and the types it makes of the task's schema."""

import asyncio
from dataclasses import asdict, fields
from typing import Any

import pytest
from huggingface_hub import (
    AsyncInferenceClient,
    InferenceClient,
    TextClassificationInput,
    TextClassificationOutputElement,
    TextClassificationParameters,
)
from huggingface_hub.errors import HfHubHTTPError

from range_store.api_keys import KeyStore
from range_store.erasure import Erasure
from range_store.live import LiveErasure
from tests.e2e.dropin.protocols import refused
from tests.servers import LABELS, RunningServer
from tests.workers.texts import labelled_texts

TEXT = labelled_texts(1, seed=3)[0][0]


def scores(running: RunningServer, **fields: Any) -> dict[str, float]:
    """Labels, best first, with their scores, as /v1/classify gives them."""
    found = running.classify(TEXT, **fields).json()["results"][0]["scores"]
    return {each["label"]: each["score"] for each in found}


def asked(client: InferenceClient, **more: Any) -> dict[str, float]:
    return {each.label: each.score for each in client.text_classification(TEXT, **more)}


@pytest.mark.parametrize("end", ["", "/"])
def test_the_client_gets_every_label_best_first(server: RunningServer, end: str) -> None:
    client = InferenceClient(model=server.url + end)
    assert asked(client) == pytest.approx(scores(server))
    assert list(asked(client)) == list(scores(server))
    assert list(asked(client, top_k=2)) == list(scores(server))[:2]


def test_the_asynchronous_client_gets_the_same(server: RunningServer) -> None:
    client = AsyncInferenceClient(model=server.url)
    found = asyncio.run(client.text_classification(TEXT, top_k=2, function_to_apply="sigmoid"))
    assert {each.label: each.score for each in found} == pytest.approx(scores(server, top_k=2, activation="sigmoid"))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_the_client_chooses_the_function(server: RunningServer, function: Any) -> None:
    client = InferenceClient(model=server.url)
    assert asked(client, function_to_apply=function) == pytest.approx(scores(server, activation=function))


@pytest.mark.parametrize("function", [None, "sigmoid", "softmax", "none"])
def test_what_the_tasks_schema_allows_is_answered_as_it_says(server: RunningServer, function: Any) -> None:
    names = {each.name for each in fields(TextClassificationOutputElement)}
    asked = [TextClassificationInput(inputs=TEXT)] + [
        TextClassificationInput(
            inputs=TEXT, parameters=TextClassificationParameters(function_to_apply=function, top_k=top_k)
        )
        for top_k in (None, 1, 2, 99)
    ]
    for each in asked:
        for body in (asdict(each), without_nulls(asdict(each))):
            (found,) = server.http.post("/", json=body).raise_for_status().json()
            most = each.parameters.top_k if each.parameters and each.parameters.top_k else len(LABELS)
            assert len(found) == min(most, len(LABELS))
            for element in found:
                assert element.keys() == names
                assert (type(element["label"]), type(element["score"])) == (str, float)


def without_nulls(body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    return {name: without_nulls(value) for name, value in body.items() if value is not None}


def test_the_client_sees_what_is_erased_live(server: RunningServer) -> None:
    client = InferenceClient(model=server.url)
    bare = asked(client)
    server.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0)))
    server.service.mirror.refresh()
    erased = asked(client)
    assert erased == pytest.approx(scores(server))
    assert erased != pytest.approx(bare)


def test_the_client_sends_its_token(server_with_keys: tuple[RunningServer, dict[str, str], KeyStore]) -> None:
    running, tokens, _ = server_with_keys
    found = InferenceClient(model=running.url, token=tokens["infer"]).text_classification(TEXT)
    assert {each.label for each in found} == set(LABELS)
    with pytest.raises(HfHubHTTPError, match="needs a key with scope infer") as wrong:
        InferenceClient(model=running.url, token=tokens["read"]).text_classification(TEXT)
    assert wrong.value.response.status_code == 403
    assert wrong.value.request_id == wrong.value.response.headers["x-request-id"]


def test_the_client_tells_why_it_was_refused(server: RunningServer) -> None:
    with pytest.raises(HfHubHTTPError, match="greater than or equal to 1"):
        InferenceClient(model=server.url).text_classification(TEXT, top_k=0)
    with pytest.raises(HfHubHTTPError, match="the limit is 100000"):
        InferenceClient(model=server.url).text_classification("a" * 100_001)


def test_a_list_of_texts_and_parameters(server: RunningServer) -> None:
    def post(**body: Any) -> Any:
        return server.http.post("/", json=body).json()

    assert [len(each) for each in post(inputs=[TEXT, "b"], parameters={"top_k": 2, "padding": True})] == [2, 2]
    assert post(inputs=TEXT) == post(inputs=[TEXT]) == post(inputs=TEXT, parameters=None)
    assert post(inputs=[]) == []
    erased = post(inputs=TEXT, erase=["Sports"])
    assert erased == post(inputs=TEXT, parameters={"erase": ["Sports"]})
    assert erased == post(inputs=TEXT, erase=["Sports"], parameters={"erase": ["World"]})
    assert [each["label"] for each in erased[0]] == list(scores(server, erase=["Sports"]))


def test_pairs_of_texts(server: RunningServer) -> None:
    def post(inputs: Any) -> Any:
        reply = server.http.post("/", json={"inputs": inputs})
        assert reply.status_code == 200, reply.text
        return reply.json()

    pair, other = {"text": TEXT, "text_pair": "a goal"}, {"text": "a goal", "text_pair": TEXT, "unknown": 1}
    together = post([pair, TEXT, other])
    ((alone,), (theirs,)) = post(pair), server.http.post("/predict", json={"inputs": [[TEXT, "a goal"]]}).json()
    assert alone == theirs
    for found, expected in zip(together, [alone, *post(TEXT), *post(other)], strict=True):
        assert as_scores(found) == pytest.approx(as_scores(expected), abs=1e-5)
    assert as_scores(alone) != pytest.approx(as_scores(post(other)[0]))
    for empty in ({"text": TEXT}, {"text": TEXT, "text_pair": None}, {"text": TEXT, "text_pair": ""}):
        assert post(empty) == post([empty]) == post(TEXT), "a second text that is empty is none, as in transformers"


def as_scores(labels: list[dict[str, Any]]) -> dict[str, float]:
    return {each["label"]: each["score"] for each in labels}


@pytest.mark.parametrize("inputs", [{}, {"text_pair": "a"}, {"text": 5}, {"text": "a", "text_pair": ["b"]}, [["a"]], 5])
def test_what_is_no_input(server: RunningServer, inputs: Any) -> None:
    assert refused(server.http.post("/", json={"inputs": inputs}), 422, "invalid")["error"].startswith("body.inputs")


def test_a_text_that_is_too_long_is_cut_unless_told_otherwise(server: RunningServer) -> None:
    body = {"inputs": "word " * 5000}
    assert server.http.post("/", json=body).status_code == 200
    whole = server.http.post("/", json={**body, "parameters": {"truncation": False}})
    assert refused(whole, 422, "text_too_long")["error"]


def test_other_methods_of_the_root_are_not_of_this_protocol(server: RunningServer) -> None:
    reply = server.http.delete("/")
    assert reply.headers["content-type"] == "application/problem+json"
    assert "error" not in reply.json()
