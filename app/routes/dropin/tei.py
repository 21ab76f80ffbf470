"""`POST /predict`, `GET /info`: text-embeddings-inference with a classifier.

Shapes: its OpenAPI document and router of version 1.7.1 (huggingface/text-embeddings-inference, `docs/openapi.json`,
`router/src/http`). Where we differ, `docs/dropin.md` says so: there, two strings in the outer list are one pair.
"""

from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.errors import STATUSES, TeiType
from app.http.problems import Dialect, Problem
from app.http.responses import BODY
from app.http.routing import Router
from app.routes.dependencies import ServiceDep
from app.routes.dropin.steering import STEERING_HEADERS, Steered, check_truncation_side, set_headers
from app.schemas.replies import Score
from app.schemas.requests import erasures_of
from app.schemas.unions import LIST, TEXT, by_shape
from app.security.auth import CallerDep
from app.serving.classification import MinGeneration, Timeout, answer_to, ranked
from app.serving.service import TextOrPair


class TeiProblem(Problem):
    """An error as clients of text-embeddings-inference read it."""

    error: str | None = Field(None, description="The same as `detail`.")
    error_type: TeiType | None = None


_OWN_STATUSES = {"text_too_long": 413, "engine_failed": 424, "non_finite": 424}


def _translate(problem: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status = _OWN_STATUSES.get(problem["code"], problem["status"])
    kind = "Tokenizer" if problem["code"] == "empty_text" else STATUSES[problem["status"]].tei
    return status, {"error": problem["detail"], "error_type": kind}


DIALECT = Dialect("text-embeddings-inference", TeiProblem, _translate)
router = Router("text-embeddings-inference", dialects=(DIALECT,), strict_query=False)

OneInput = Annotated[
    Annotated[str, TEXT] | Annotated[list[str], Field(min_length=1, max_length=2), LIST],
    by_shape("a text, or a list of one text or of a pair"),
]
PredictInput = Annotated[
    Annotated[str, TEXT] | Annotated[list[OneInput], Field(min_length=1, fail_fast=True), LIST],
    by_shape("a text or a list of texts and pairs"),
]


class PredictIn(Steered):
    """Texts, or pairs of texts, to classify."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "The striker scored twice."},
                {"inputs": [["A goal.", "Somebody scored."], "Shares fell."], "raw_scores": True},
            ]
        }
    )

    inputs: PredictInput = Field(description="One text, or a batch of texts, of lists of one text, and of pairs.")
    raw_scores: bool = Field(False, description="Logits instead of scores.")
    truncate: bool | None = Field(None, description="false: a text that is too long is an error.")
    truncation_direction: Literal["Left", "Right"] | Literal["left", "right"] | None = Field(
        None, description="Refused where a text is cut, and the model's tokenizer cuts the other side."
    )

    def texts(self) -> list[TextOrPair]:
        """The texts and pairs, one or many."""
        if isinstance(self.inputs, str):
            return [self.inputs]
        return [_text_or_pair(each) for each in self.inputs]


def _text_or_pair(each: str | list[str]) -> TextOrPair:
    if isinstance(each, str):
        return each
    return each[0] if len(each) == 1 else (each[0], each[1])


class ClassifierInfo(BaseModel):
    id2label: dict[str, str]
    label2id: dict[str, int]


class ClassifierType(BaseModel):
    classifier: ClassifierInfo


class InfoOut(BaseModel):
    """The model and its limits. `max_concurrent_requests`: texts that may wait; `version`: of this server."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: ClassifierType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


@router.operation(
    "POST",
    "/predict",
    key_scope="infer",
    errors=(*BODY, 404, 422, 424, 429, 503, 504),
    responses=STEERING_HEADERS,
    classifies=True,
)
async def tei_predict(
    request: Request,
    response: Response,
    body: PredictIn,
    service: ServiceDep,
    caller: CallerDep,
    x_request_timeout: Timeout = None,
    min_generation: MinGeneration = None,
) -> list[Score] | list[list[Score]]:
    """Classify as text-embeddings-inference does: a list of labels for a text, a list of such lists for a batch."""
    answer = await answer_to(
        request,
        service,
        caller,
        body.texts(),
        erasures_of(body.erase),
        truncate=body.truncate is not False,
        timeout=x_request_timeout,
        min_generation=min_generation,
    )
    if body.truncation_direction is not None:
        check_truncation_side(answer, service.model, body.truncation_direction.lower(), "inputs.")
    set_headers(response, answer)
    activation = "none" if body.raw_scores else service.model.activation
    predictions = ranked([text.logits for text in answer.texts], service.model.identity.labels, activation, None)
    return predictions[0] if isinstance(body.inputs, str) else predictions


@router.operation("GET", "/info", key_scope="read", errors=(404, 422))
async def tei_info(service: ServiceDep) -> InfoOut:
    """The loaded model, as text-embeddings-inference describes it."""
    model, limits = service.model, service.engine.settings
    labels = model.identity.labels
    return InfoOut(
        model_id=service.name,
        model_sha=model.identity.revision,
        model_dtype=model.dtype,
        model_type=ClassifierType(
            classifier=ClassifierInfo(
                id2label={str(index): label for index, label in enumerate(labels)},
                label2id={label: index for index, label in enumerate(labels)},
            )
        ),
        max_concurrent_requests=limits.max_queue_texts,
        max_input_length=model.max_tokens,
        max_batch_tokens=limits.max_batch_tokens,
        max_batch_requests=None,
        max_client_batch_size=service.settings.max_texts,
        auto_truncate=True,
        tokenization_workers=1,
        version=version("neuronlens"),
        sha=None,
        docker_label=None,
    )
