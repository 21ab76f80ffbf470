"""`/tokenize`: told apart by its field, since two servers have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from range_store.api_keys import KeyStore
from tests.e2e.dropin.protocols import TEI_ERROR, TEI_TOKENS, VLLM_ERROR, VLLM_TOKENS, refused
from tests.servers import RunningServer
from tests.workers.checkpoints import save_tiny
from workers.models.loading import load_model


def post(running: RunningServer, **body: Any) -> httpx.Response:
    return running.http.post("/tokenize", json=body)


def shown(running: RunningServer, text: str) -> Any:
    return running.http.post("/v1/tokenize", json={"inputs": text}).json()["results"][0]["tokens"]


def test_inputs_are_answered_as_text_embeddings_inference_does(server: RunningServer) -> None:
    texts = ["a goal", "shares fell"]
    found = post(server, inputs=texts).json()
    jsonschema.validate(found, TEI_TOKENS)
    for tokens, text in zip(found, texts, strict=True):
        assert [each["id"] for each in tokens] == [each["id"] for each in shown(server, text)]
    assert post(server, inputs=texts[0]).json() == found[:1]
    plain = post(server, inputs=texts[0], add_special_tokens=False, prompt_name=None).json()
    assert plain[0] == [each for each in found[0] if not each["special"]]


def test_its_tokens_are_pieces_of_the_text_by_places_of_its_bytes(server: RunningServer) -> None:
    """As Rust counts: an é has two bytes, an emoji four; a token's text is the text's, and not the vocabulary's."""
    (tokens,) = post(server, inputs="The émigré 🙂 minerals").json()
    assert [(each["text"], each["start"], each["stop"], each["special"]) for each in tokens] == [
        ("[CLS]", None, None, True),
        ("The", 0, 3, False),
        ("é", 4, 6, False),
        ("m", 6, 7, False),
        ("i", 7, 8, False),
        ("g", 8, 9, False),
        ("ré", 9, 12, False),
        ("🙂", 13, 17, False),
        ("miner", 18, 23, False),
        ("al", 23, 25, False),
        ("s", 25, 26, False),
        ("[SEP]", None, None, True),
    ]
    ours = [each["text"] for each in shown(server, "The émigré 🙂 minerals")]
    assert {"the", "[UNK]", "##al"} <= set(ours), "the vocabulary knows neither capitals nor the emoji"
    as_json = {"Content-Type": "application/json"}
    half = server.http.post("/tokenize", content=r'{"inputs": "a\ud83d"}', headers=as_json)
    assert [each["text"] for each in half.json()[0]] == ["[CLS]", "a", "?", "[SEP]"], "half an emoji, and no error"


def test_a_character_of_several_tokens_is_the_text_of_each(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """Byte-level tokenizers cut characters that they do not know; each part stands where the whole does."""
    running = start_server(load_model(str(save_tiny("gpt2", tmp_path / "tiny")), device="cpu"))
    (tokens,) = post(running, inputs="a 🙂!", add_special_tokens=False).json()
    assert [(each["text"], each["start"], each["stop"]) for each in tokens] == [
        ("a", 0, 1),
        (" ", 1, 2),
        *[("🙂", 2, 6)] * 4,
        ("!", 6, 7),
    ]


def test_a_prompt_is_answered_as_vllm_does(server: RunningServer) -> None:
    found = post(server, prompt="a goal", model=server.service.name, return_token_strs=True).json()
    jsonschema.validate(found, VLLM_TOKENS)
    tokens = shown(server, "a goal")
    assert (found["tokens"], found["token_strs"]) == (
        [each["id"] for each in tokens],
        [each["text"] for each in tokens],
    )
    assert (found["count"], found["max_model_len"]) == (len(tokens), server.model.tokens.max_tokens)
    assert post(server, prompt="a goal").json()["token_strs"] is None


def test_each_is_refused_in_its_own_words(server: RunningServer) -> None:
    long = "word " * 5000
    jsonschema.validate(refused(post(server, inputs=long), 422, "unsupported"), TEI_ERROR)
    jsonschema.validate(refused(post(server, prompt=long), 400, "unsupported"), VLLM_ERROR)
    jsonschema.validate(refused(post(server, prompt="a", model="another"), 404, "unknown_model"), VLLM_ERROR)
    for neither in ({}, {"inputs": 5}, {"inputs": None, "prompt": None}, {"text": "a"}):
        jsonschema.validate(refused(post(server, **neither), 422, "invalid"), TEI_ERROR)
    for wrong in ({"prompt": 5}, {"prompt": ["a"]}, {"prompt": "a", "return_token_strs": "x"}, {"messages": "a"}):
        jsonschema.validate(refused(post(server, **wrong), 400, "invalid"), VLLM_ERROR)
    chat = post(server, messages=[{"role": "user", "content": "a"}], add_generation_prompt=True)
    jsonschema.validate(refused(chat, 400, "unsupported"), VLLM_ERROR)
    jsonschema.validate(refused(server.http.post("/tokenize", json=["a"]), 422, "invalid"), TEI_ERROR)
    refused(post(server, inputs="a", prompt="b"), 400, "invalid")
    refused(post(server, inputs=["a"] * 65), 413, "too_many_texts")


def test_it_needs_scope_infer(server_with_keys: tuple[RunningServer, dict[str, str], KeyStore]) -> None:
    running, tokens, _ = server_with_keys
    refused(post(running, inputs="a"), 401, "no_key")
    for scope, status in (("read", 403), ("infer", 200)):
        headers = {"Authorization": f"Bearer {tokens[scope]}"}
        assert running.http.post("/tokenize", json={"inputs": "a"}, headers=headers).status_code == status
