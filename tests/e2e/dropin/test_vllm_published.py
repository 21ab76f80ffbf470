"""`/classify` and `/tokenize` against the pydantic models that vLLM publishes: a download of some hundred MB."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tests.e2e.dropin import protocols, vllm_published
from tests.e2e.dropin.vllm_published import Published
from tests.servers import RunningServer

pytestmark = pytest.mark.full
TEXTS = ["a goal", "shares fell", "rain"]
LONG = "word " * 5000
PAGE = Path(__file__).parents[3] / "docs/dropin.md"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("vllm")
    wheel = vllm_published.download(folder)
    with vllm_published.models(wheel, folder) as found:
        wheel.unlink()  # pytest keeps the folders of several runs
        yield found


def complete(reply: httpx.Response, model: Any) -> Any:
    """The reply as vLLM's model reads it: it must have every field of the model, with exactly its type."""
    found = model.model_validate_json(reply.raise_for_status().content, strict=True)
    assert reply.json() == found.model_dump()
    return found


def test_replies_are_valid_and_complete_for_vllms_models(server: RunningServer, published: Published) -> None:
    for body in ({"input": TEXTS[0]}, {"input": TEXTS}, {"input": TEXTS, "use_activation": False}):
        found = complete(server.http.post("/classify", json=body), published.classify.ClassificationResponse)
        assert len(found.data) == (1 if isinstance(body["input"], str) else len(TEXTS))
    for strings in (None, False, True):
        body = {"prompt": TEXTS[0], "return_token_strs": strings}
        found = complete(server.http.post("/tokenize", json=body), published.tokenize.TokenizeResponse)
        assert (found.token_strs is not None) == bool(strings)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/classify", {"input": LONG}, 400),
        ("/classify", {"input": 5}, 400),
        ("/classify", {"input": []}, 400),
        ("/classify", {"input": "a", "model": "another"}, 404),
        ("/classify", {"input": "a", "erase": ["Weather"]}, 404),
        ("/classify", {"messages": [{"role": "user", "content": "a"}]}, 400),
        ("/tokenize", {"prompt": LONG}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": "a", "model": "another"}, 404),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, 400),
    ],
)
def test_errors_are_valid_for_vllms_models(
    server: RunningServer, published: Published, path: str, body: Any, status: int
) -> None:
    reply = server.http.post(path, json=body)
    error = published.engine.ErrorResponse.model_validate_json(reply.content, strict=True).error
    assert (reply.status_code, error.code) == (status, status)
    assert reply.json()["error"] == error.model_dump()


def test_requests_written_by_vllms_models_are_accepted(server: RunningServer, published: Published) -> None:
    completion = published.classify.ClassificationCompletionRequest
    expected = server.http.post("/classify", json={"input": TEXTS}).json()["data"]
    for fields in (
        {},
        {"use_activation": True},
        {"truncate_prompt_tokens": -1, "truncation_side": "right"},
        {"user": "me", "padding": "do_not_pad", "cache_salt": "x", "request_id": "1", "mm_processor_kwargs": {"a": 1}},
    ):
        request = completion(input=TEXTS, **fields)
        for body in (
            request.model_dump(),
            request.model_dump(exclude_none=True),
            request.model_dump(exclude_unset=True),
        ):
            assert server.http.post("/classify", json=body).raise_for_status().json()["data"] == expected
    prompt = published.tokenize.TokenizeCompletionRequest(prompt=TEXTS[0], add_special_tokens=False)
    plain = server.http.post("/tokenize", json=prompt.model_dump()).raise_for_status().json()
    assert plain["count"] == len(plain["tokens"]) > 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": 5},
        {"input": [["a"]]},
        {"input": "a", "truncate_prompt_tokens": -2},
        {"input": "a", "truncation_side": "middle"},
        {"input": "a", "use_activation": "perhaps"},
        {"input": "a", "add_special_tokens": "perhaps"},
    ],
)
def test_requests_that_vllms_models_reject_are_rejected(server: RunningServer, published: Published, body: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(published.classify.ClassificationRequest).validate_python(body)
    assert server.http.post("/classify", json=body).status_code == 400


def test_the_page_names_every_field_of_vllms_requests(published: Published) -> None:
    page = PAGE.read_text()
    section = page[page.index("## vLLM") : page.index("## Open Inference Protocol")]
    requests = [published.classify.ClassificationCompletionRequest, published.tokenize.TokenizeCompletionRequest]
    assert {name for model in requests for name in model.model_fields if f"`{name}`" not in section} == set()


def test_the_schemas_of_the_other_tests_match_vllms_models(published: Published) -> None:
    schemas = {
        published.classify.ClassificationResponse: protocols.VLLM_CLASSIFIED,
        published.tokenize.TokenizeResponse: protocols.VLLM_TOKENS,
        published.engine.ErrorResponse: protocols.VLLM_ERROR,
    }
    for model, schema in schemas.items():
        assert_same_fields(schema, model)
    assert_same_fields(protocols.VLLM_CLASSIFIED["properties"]["data"]["items"], published.classify.ClassificationData)
    assert_same_fields(protocols.VLLM_CLASSIFIED["properties"]["usage"], published.engine.UsageInfo)
    assert_same_fields(protocols.VLLM_ERROR["properties"]["error"], published.engine.ErrorInfo)


def assert_same_fields(schema: Any, model: type[BaseModel]) -> None:
    assert schema["properties"].keys() == model.model_fields.keys()
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert required <= set(schema["required"])
