"""`POST /` with the clients of huggingface_hub, and the types that it generates from the schema of the task."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import huggingface_hub as hub
import pytest
from huggingface_hub import (
    AsyncInferenceClient,
    InferenceClient,
    TextClassificationInput,
    TextClassificationOutputElement,
    TextClassificationParameters,
)
from huggingface_hub.errors import HfHubHTTPError

from app.routes.dropin.hf import OTHER_TASKS
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from tests.e2e.dropin.protocols import refused
from tests.servers import LABELS, KeyedServer, RunningServer
from tests.workers.texts import labelled_texts

TEXT = labelled_texts(1, seed=3)[0][0]


def scores(running: RunningServer, **fields: Any) -> dict[str, float]:
    """The labels that /v1/classify gives, best first, with their scores."""
    found = running.classify(TEXT, **fields).json()["results"][0]["scores"]
    return {each["label"]: each["score"] for each in found}


def client_scores(client: InferenceClient, **options: Any) -> dict[str, float]:
    return {each.label: each.score for each in client.text_classification(TEXT, **options)}


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_client_gets_every_label_best_first(server: RunningServer, slash: str) -> None:
    client = InferenceClient(model=server.url + slash)
    assert client_scores(client) == pytest.approx(scores(server))
    assert list(client_scores(client)) == list(scores(server))
    assert list(client_scores(client, top_k=2)) == list(scores(server))[:2]


def test_the_asynchronous_client_gets_the_same_scores(server: RunningServer) -> None:
    client = AsyncInferenceClient(model=server.url)
    found = asyncio.run(client.text_classification(TEXT, top_k=2, function_to_apply="sigmoid"))
    assert {each.label: each.score for each in found} == pytest.approx(scores(server, top_k=2, activation="sigmoid"))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_the_client_chooses_the_activation_function(server: RunningServer, function: Any) -> None:
    client = InferenceClient(model=server.url)
    assert client_scores(client, function_to_apply=function) == pytest.approx(scores(server, activation=function))


@pytest.mark.parametrize("function", [None, "sigmoid", "softmax", "none"])
def test_requests_of_the_schema_get_replies_of_the_schema(server: RunningServer, function: Any) -> None:
    names = {each.name for each in fields(TextClassificationOutputElement)}
    requests = [TextClassificationInput(inputs=TEXT)] + [
        TextClassificationInput(
            inputs=TEXT, parameters=TextClassificationParameters(function_to_apply=function, top_k=top_k)
        )
        for top_k in (None, 1, 2, 99)
    ]
    for each in requests:
        for body in (asdict(each), without_nulls(asdict(each))):
            (found,) = server.http.post("/", json=body).raise_for_status().json()
            top_k = each.parameters.top_k if each.parameters and each.parameters.top_k else len(LABELS)
            assert len(found) == min(top_k, len(LABELS))
            for element in found:
                assert element.keys() == names
                assert (type(element["label"]), type(element["score"])) == (str, float)


def without_nulls(body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    return {name: without_nulls(value) for name, value in body.items() if value is not None}


TASKS: dict[str, tuple[type, ...]] = {
    "zero-shot-classification": (hub.ZeroShotClassificationParameters,),
    "token-classification": (hub.TokenClassificationParameters,),
    "fill-mask": (hub.FillMaskParameters,),
    "text-generation": (hub.TextGenerationInputGenerateParameters,),
    "summarization": (hub.SummarizationParameters, hub.Text2TextGenerationParameters),
    "translation": (hub.TranslationParameters,),
    "text-to-speech": (hub.TextToSpeechParameters, hub.TextToAudioParameters),
    "text-to-image": (hub.TextToImageParameters, hub.TextToVideoParameters),
}
SHARED = {"top_k", "truncation", "truncate", "num_frames"}
"""Names that classification, or what runs it, may take as well; and one that comes with others."""


def test_the_parameters_of_every_other_task_on_texts_are_known() -> None:
    of_classification = {each.name for each in fields(TextClassificationParameters)}
    assert TASKS.keys() == OTHER_TASKS.keys()
    known = {name: task for task, names in OTHER_TASKS.items() for name in names}
    for kinds in TASKS.values():
        names = {each.name for kind in kinds for each in fields(kind)}
        assert names - of_classification - SHARED <= known.keys()
    for task, kinds in TASKS.items():
        assert set(OTHER_TASKS[task]) <= {each.name for kind in kinds for each in fields(kind)}


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_a_request_of_another_task_is_rejected(server: RunningServer, task: str) -> None:
    for name in OTHER_TASKS[task]:
        given = server.http.post("/", json={"inputs": TEXT, "parameters": {name: ["a", "b"]}})
        assert task in refused(given, 422, "invalid")["error"]
        absent = server.http.post("/", json={"inputs": TEXT, "parameters": {name: None}})
        assert absent.json() == server.http.post("/", json={"inputs": TEXT}).json()


def test_clients_that_call_another_task_are_told(server: RunningServer) -> None:
    client = InferenceClient(model=server.url)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: client.zero_shot_classification(TEXT, ["a", "b"]),
        lambda: client.token_classification(TEXT, aggregation_strategy="simple"),
        lambda: client.fill_mask("A [MASK].", targets=["goal"]),
        lambda: client.translation(TEXT, src_lang="en", tgt_lang="de"),
    )
    for call in calls:
        with pytest.raises(HfHubHTTPError, match="supports text-classification only"):
            call()


def test_live_erasures_change_the_scores_that_the_client_gets(server: RunningServer) -> None:
    client = InferenceClient(model=server.url)
    bare = client_scores(client)
    server.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0)))
    server.service.mirror.refresh()
    erased = client_scores(client)
    assert erased == pytest.approx(scores(server))
    assert erased != pytest.approx(bare)


def test_the_client_sends_its_token(keyed_server: KeyedServer) -> None:
    running, tokens = keyed_server
    found = InferenceClient(model=running.url, token=tokens["infer"]).text_classification(TEXT)
    assert {each.label for each in found} == set(LABELS)
    with pytest.raises(HfHubHTTPError, match="needs a key with scope infer") as wrong:
        InferenceClient(model=running.url, token=tokens["read"]).text_classification(TEXT)
    assert wrong.value.response.status_code == 403
    assert wrong.value.request_id == wrong.value.response.headers["x-request-id"]


def test_the_client_reports_why_a_request_was_rejected(server: RunningServer) -> None:
    with pytest.raises(HfHubHTTPError, match="greater than or equal to 1"):
        InferenceClient(model=server.url).text_classification(TEXT, top_k=0)
    with pytest.raises(HfHubHTTPError, match="the limit is 100000"):
        InferenceClient(model=server.url).text_classification("a" * 100_001)


def test_lists_of_texts_and_parameters_are_accepted(server: RunningServer) -> None:
    def post(**body: Any) -> Any:
        return server.http.post("/", json=body).json()

    assert [len(each) for each in post(inputs=[TEXT, "b"], parameters={"top_k": 2, "padding": True})] == [2, 2]
    assert post(inputs=TEXT) == post(inputs=[TEXT]) == post(inputs=TEXT, parameters=None)
    assert post(inputs=[]) == []
    erased = post(inputs=TEXT, erase=["Sports"])
    assert erased == post(inputs=TEXT, parameters={"erase": ["Sports"]})
    assert erased == post(inputs=TEXT, erase=["Sports"], parameters={"erase": ["World"]})
    assert [each["label"] for each in erased[0]] == list(scores(server, erase=["Sports"]))


def test_pairs_of_texts_are_classified(server: RunningServer) -> None:
    def post(inputs: Any) -> Any:
        reply = server.http.post("/", json={"inputs": inputs})
        assert reply.status_code == 200, reply.text
        return reply.json()

    pair, other = {"text": TEXT, "text_pair": "a goal"}, {"text": "a goal", "text_pair": TEXT, "unknown": 1}
    together = post([pair, TEXT, other])
    (alone,) = post(pair)
    assert [alone] == server.http.post("/predict", json={"inputs": [[TEXT, "a goal"]]}).json()
    for found, expected in zip(together, [alone, *post(TEXT), *post(other)], strict=True):
        assert as_scores(found) == pytest.approx(as_scores(expected), abs=1e-5)
    assert as_scores(alone) != pytest.approx(as_scores(post(other)[0]))
    for empty in ({"text": TEXT}, {"text": TEXT, "text_pair": None}, {"text": TEXT, "text_pair": ""}):
        assert post(empty) == post([empty]) == post(TEXT), "transformers ignores an empty second text"


def as_scores(labels: list[dict[str, Any]]) -> dict[str, float]:
    return {each["label"]: each["score"] for each in labels}


@pytest.mark.parametrize("inputs", [{}, {"text_pair": "a"}, {"text": 5}, {"text": "a", "text_pair": ["b"]}, [["a"]], 5])
def test_invalid_inputs_are_rejected(server: RunningServer, inputs: Any) -> None:
    assert refused(server.http.post("/", json={"inputs": inputs}), 422, "invalid")["error"].startswith("body.inputs")


def test_long_texts_are_truncated_unless_truncation_is_off(server: RunningServer) -> None:
    body = {"inputs": "word " * 5000}
    assert server.http.post("/", json=body).status_code == 200
    whole = server.http.post("/", json={**body, "parameters": {"truncation": False}})
    assert refused(whole, 422, "text_too_long")["error"]


def test_other_methods_of_the_root_get_problem_documents(server: RunningServer) -> None:
    reply = server.http.delete("/")
    assert reply.headers["content-type"] == "application/problem+json"
    assert "error" not in reply.json()
