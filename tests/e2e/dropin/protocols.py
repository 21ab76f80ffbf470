"""The drop-in protocols as data: their requests, and how to read their replies and errors.

The schemas are written here from the protocols' own documents, which docs/dropin.md names; none is copied.
`test_vllm_published.py` compares vLLM's with the models that vLLM publishes; the other protocols are also tested with
their own clients.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.servers import LABELS

Body = dict[str, Any]
Scores = list[dict[str, float]]


@dataclass(frozen=True)
class Protocol:
    """How to send a request in a protocol and read its replies."""

    path: Callable[[str], str]
    """The route that classifies, by the name of the model."""
    request: Callable[[list[str]], Body]
    """A body that classifies texts."""
    with_erase: Callable[[Body, Any], Body]
    """That body with erasures."""
    scores: Callable[[Any], Scores]
    """The score of each label, for each text of a reply."""
    error: Callable[[Any], str]
    """The message where clients of the protocol look for it."""
    invalid: int
    """The status of an invalid request."""


def _at_top(body: Body, erase: Any) -> Body:
    return {**body, "erase": erase}


def _scores_of_lists(reply: Any) -> Scores:
    return [{each["label"]: each["score"] for each in text} for text in reply]


def _by_label(rows: Sequence[Sequence[float]]) -> Scores:
    return [dict(zip(LABELS, row, strict=False)) for row in rows]  # heads may have fewer labels


def _v2_request(texts: list[str]) -> Body:
    return {"id": "7", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}


def _in_parameters(body: Body, erase: Any) -> Body:
    """JSON in a string: parameters of the Open Inference Protocol are strings, numbers or booleans."""
    return {**body, "parameters": {"erase": json.dumps(erase)}}


def _v2_scores(reply: Any) -> Scores:
    ((flat, width),) = ((each["data"], each["shape"][1]) for each in reply["outputs"] if each["name"] == "probs")
    return _by_label([flat[start : start + width] for start in range(0, len(flat), width)])


PROTOCOLS = {
    "hf": Protocol(
        lambda name: "/", lambda texts: {"inputs": texts}, _at_top, _scores_of_lists, lambda body: body["error"], 422
    ),
    "tei": Protocol(
        lambda name: "/predict",
        lambda texts: {"inputs": texts},
        _at_top,
        _scores_of_lists,
        lambda body: body["error"],
        422,
    ),
    "vllm": Protocol(
        lambda name: "/classify",
        lambda texts: {"input": texts, "truncate_prompt_tokens": -1},
        _at_top,
        lambda reply: _by_label([each["probs"] for each in reply["data"]]),
        lambda body: body["error"]["message"],
        400,
    ),
    "v2": Protocol(
        lambda name: f"/v2/models/{name}/infer",
        _v2_request,
        _in_parameters,
        _v2_scores,
        lambda body: body["error"],
        400,
    ),
}


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an error: the members of a problem document, sent as plain JSON."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    body: dict[str, Any] = response.json()
    assert (body["status"], body["code"]) == (status, code), body
    assert body["request_id"] == response.headers["x-request-id"]
    assert {"type", "title", "detail"} <= body.keys()
    return body


def _array(of: Any) -> Any:
    return {"type": "array", "items": of}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Any:
    return {"type": "object", "required": list(required), "properties": required | (optional or {})}


TEXT, NUMBER, BOOLEAN = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
MAYBE_TEXT = {"type": ["string", "null"]}
PREDICTION = _object({"score": NUMBER, "label": TEXT})
TEI_PREDICTIONS = {"oneOf": [_array(PREDICTION), _array(_array(PREDICTION))]}
TEI_ERROR = _object(
    {"error": TEXT, "error_type": {"enum": ["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer"]}}
)
TEI_INFO = _object(
    {
        "model_id": TEXT,
        "model_dtype": TEXT,
        "model_type": _object(
            {
                "classifier": _object(
                    {
                        "id2label": {"type": "object", "additionalProperties": TEXT},
                        "label2id": {"type": "object", "additionalProperties": COUNT},
                    }
                )
            }
        ),
        "max_concurrent_requests": COUNT,
        "max_input_length": COUNT,
        "max_batch_tokens": COUNT,
        "max_client_batch_size": COUNT,
        "auto_truncate": BOOLEAN,
        "tokenization_workers": COUNT,
        "version": TEXT,
    },
    {
        "model_sha": MAYBE_TEXT,
        "sha": MAYBE_TEXT,
        "docker_label": MAYBE_TEXT,
        "max_batch_requests": {"type": ["integer", "null"], "minimum": 0},
    },
)
VLLM_CLASSIFIED = _object(
    {
        "id": TEXT,
        "object": {"const": "list"},
        "created": COUNT,
        "model": TEXT,
        "data": _array(_object({"index": COUNT, "label": MAYBE_TEXT, "probs": _array(NUMBER), "num_classes": COUNT})),
        "usage": _object(
            {"prompt_tokens": COUNT, "total_tokens": COUNT},
            {
                "completion_tokens": {"type": ["integer", "null"]},
                "prompt_tokens_details": {"type": ["object", "null"]},
                "completion_tokens_details": {"type": ["object", "null"]},
            },
        ),
    }
)
VLLM_ERROR = _object({"error": _object({"message": TEXT, "type": TEXT, "param": MAYBE_TEXT, "code": COUNT})})
V2_TENSOR_DATA = {"type": "array", "items": {"type": ["array", "number", "string", "boolean"]}}
V2_INFERRED = _object(
    {
        "model_name": TEXT,
        "outputs": _array(_object({"name": TEXT, "shape": _array(COUNT), "datatype": TEXT, "data": V2_TENSOR_DATA})),
    },
    {"model_version": TEXT, "id": TEXT, "parameters": {"type": "object"}},
)
V2_SERVER = _object({"name": TEXT, "version": TEXT, "extensions": _array(TEXT)})
_V2_METADATA = _object({"name": TEXT, "datatype": TEXT, "shape": _array({"type": "integer", "minimum": -1})})
V2_MODEL = _object(
    {"name": TEXT, "platform": TEXT},
    {"versions": _array(TEXT), "inputs": _array(_V2_METADATA), "outputs": _array(_V2_METADATA)},
)
V2_ERROR = _object({"error": TEXT})
MAYBE_COUNT = {"type": ["integer", "null"], "minimum": 0}
TEI_TOKENS = _array(
    _array(_object({"id": COUNT, "text": TEXT, "special": BOOLEAN}, {"start": MAYBE_COUNT, "stop": MAYBE_COUNT}))
)
VLLM_TOKENS = _object(
    {"count": COUNT, "max_model_len": COUNT, "tokens": _array(COUNT)}, {"token_strs": {"type": ["array", "null"]}}
)
