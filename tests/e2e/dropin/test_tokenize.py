"""`/tokenize`: told apart by its field, since two servers have it."""

from typing import Any

import httpx
import jsonschema

from range_store.api_keys import KeyStore
from tests.e2e.conftest import Running
from tests.e2e.dropin.protocols import TEI_ERROR, TEI_TOKENS, VLLM_ERROR, VLLM_TOKENS, refused


def post(running: Running, **body: Any) -> httpx.Response:
    return running.http.post("/tokenize", json=body)


def shown(running: Running, text: str) -> Any:
    return running.http.post("/v1/tokenize", json={"inputs": text}).json()["results"][0]["tokens"]


def test_inputs_are_answered_as_text_embeddings_inference_does(news: Running) -> None:
    texts = ["a goal", "shares fell"]
    found = post(news, inputs=texts).json()
    jsonschema.validate(found, TEI_TOKENS)
    for tokens, text in zip(found, texts, strict=True):
        assert [{**each, "read": None} for each in tokens] == [{**each, "read": None} for each in shown(news, text)]
    assert post(news, inputs=texts[0]).json() == found[:1]
    plain = post(news, inputs=texts[0], add_special_tokens=False, prompt_name=None).json()
    assert plain[0] == [each for each in found[0] if not each["special"]]


def test_a_prompt_is_answered_as_vllm_does(news: Running) -> None:
    found = post(news, prompt="a goal", model=news.service.name, return_token_strs=True).json()
    jsonschema.validate(found, VLLM_TOKENS)
    tokens = shown(news, "a goal")
    assert (found["tokens"], found["token_strs"]) == (
        [each["id"] for each in tokens],
        [each["text"] for each in tokens],
    )
    assert (found["count"], found["max_model_len"]) == (len(tokens), news.model.tokens.max_tokens)
    assert post(news, prompt="a goal").json()["token_strs"] is None


def test_each_is_refused_in_its_own_words(news: Running) -> None:
    long = "word " * 5000
    jsonschema.validate(refused(post(news, inputs=long), 422, "unsupported"), TEI_ERROR)
    jsonschema.validate(refused(post(news, prompt=long), 400, "unsupported"), VLLM_ERROR)
    jsonschema.validate(refused(post(news, prompt="a", model="another"), 404, "unknown_model"), VLLM_ERROR)
    for neither in ({}, {"inputs": 5}, {"inputs": None, "prompt": None}, {"text": "a"}):
        jsonschema.validate(refused(post(news, **neither), 422, "invalid"), TEI_ERROR)
    for wrong in ({"prompt": 5}, {"prompt": ["a"]}, {"prompt": "a", "return_token_strs": "x"}, {"messages": "a"}):
        jsonschema.validate(refused(post(news, **wrong), 400, "invalid"), VLLM_ERROR)
    chat = post(news, messages=[{"role": "user", "content": "a"}], add_generation_prompt=True)
    jsonschema.validate(refused(chat, 400, "unsupported"), VLLM_ERROR)
    jsonschema.validate(refused(news.http.post("/tokenize", json=["a"]), 422, "invalid"), TEI_ERROR)
    refused(post(news, inputs="a", prompt="b"), 400, "invalid")
    refused(post(news, inputs=["a"] * 65), 413, "too_many_texts")


def test_it_needs_scope_infer(keyed: tuple[Running, dict[str, str], KeyStore]) -> None:
    running, tokens, _ = keyed
    refused(post(running, inputs="a"), 401, "no_key")
    for scope, status in (("read", 403), ("infer", 200)):
        headers = {"Authorization": f"Bearer {tokens[scope]}"}
        assert running.http.post("/tokenize", json={"inputs": "a"}, headers=headers).status_code == status
