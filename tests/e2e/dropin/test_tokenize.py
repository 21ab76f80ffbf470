"""`/tokenize`, which two protocols have: the fields of the body select one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.e2e.dropin.protocols import TEI_ERROR, TEI_TOKENS, VLLM_ERROR, VLLM_TOKENS, refused
from tests.servers import RunningServer
from tests.workers.checkpoints import save_tiny
from workers.models.loading import load_model


def post(running: RunningServer, **body: Any) -> httpx.Response:
    return running.http.post("/tokenize", json=body)


def v1_tokens(running: RunningServer, text: str) -> Any:
    return running.http.post("/v1/tokenize", json={"inputs": text}).json()["results"][0]["tokens"]


def test_inputs_get_the_reply_of_text_embeddings_inference(server: RunningServer) -> None:
    texts = ["a goal", "shares fell"]
    found = post(server, inputs=texts).json()
    jsonschema.validate(found, TEI_TOKENS)
    for tokens, text in zip(found, texts, strict=True):
        assert [each["id"] for each in tokens] == [each["id"] for each in v1_tokens(server, text)]
    assert post(server, inputs=texts[0]).json() == found[:1]
    plain = post(server, inputs=texts[0], add_special_tokens=False, prompt_name=None).json()
    assert plain[0] == [each for each in found[0] if not each["special"]]


def test_offsets_of_tokens_count_bytes(server: RunningServer) -> None:
    """An é has two bytes and an emoji four. The text of a token is a slice of the input, not a vocabulary entry."""
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
    vocabulary_entries = [each["text"] for each in v1_tokens(server, "The émigré 🙂 minerals")]
    assert {"the", "[UNK]", "##al"} <= set(vocabulary_entries), "the vocabulary has neither capitals nor the emoji"
    as_json = {"Content-Type": "application/json"}
    surrogate = server.http.post("/tokenize", content=r'{"inputs": "a\ud83d"}', headers=as_json)
    assert [each["text"] for each in surrogate.json()[0]] == ["[CLS]", "a", "?", "[SEP]"]


def test_tokens_of_one_character_share_its_text_and_offsets(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """Byte-level tokenizers split characters that they do not know."""
    running = start_server(load_model(str(save_tiny("gpt2", tmp_path / "tiny")), device="cpu"))
    (tokens,) = post(running, inputs="a 🙂!", add_special_tokens=False).json()
    assert [(each["text"], each["start"], each["stop"]) for each in tokens] == [
        ("a", 0, 1),
        (" ", 1, 2),
        *[("🙂", 2, 6)] * 4,
        ("!", 6, 7),
    ]


def test_a_prompt_gets_the_reply_of_vllm(server: RunningServer) -> None:
    found = post(server, prompt="a goal", model=server.service.name, return_token_strs=True).json()
    jsonschema.validate(found, VLLM_TOKENS)
    tokens = v1_tokens(server, "a goal")
    assert (found["tokens"], found["token_strs"]) == (
        [each["id"] for each in tokens],
        [each["text"] for each in tokens],
    )
    assert (found["count"], found["max_model_len"]) == (len(tokens), server.model.tokens.max_tokens)
    assert post(server, prompt="a goal").json()["token_strs"] is None


def test_errors_have_the_form_of_the_protocol_of_the_request(server: RunningServer) -> None:
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
