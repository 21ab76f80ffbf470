"""`POST /classify`: vLLM with a classifier.

Shapes: `entrypoints/pooling/classify/protocol.py`, `pooling/base/protocol.py` and `serve/engine/protocol.py` of the
package vllm, 0.33; earlier names of the activation are accepted, too.
"""

import time
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.errors import STATUSES
from app.http.problems import ApiError, Dialect, Problem
from app.http.routing import Router
from app.routes.dependencies import ModelDep
from app.routes.dropin.steering import STEERING_HEADERS, Steered, check_truncation_side, set_headers
from app.schemas.requests import Inputs, erasures_of
from app.security.auth import CallerDep
from app.serving.classification import MinGeneration, Timeout, all_scores, answer_to
from app.serving.service import Activation, Answer


class VllmErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class VllmProblem(Problem):
    """An error as clients of vLLM, and of OpenAI, read it."""

    error: VllmErrorInfo | None = None


def _translate(problem: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status = 400 if problem["status"] == 422 else problem["status"]
    where = [str(part) for part in problem["errors"][0]["loc"][1:]] if problem.get("errors") else []
    info = {
        "message": problem["detail"],
        "type": STATUSES[status].vllm,
        "param": ".".join(where) or None,
        "code": status,
    }
    return status, {"error": info}


DIALECT = Dialect("vllm", VllmProblem, _translate, unused=frozenset({422}))
router = Router("vLLM", dialects=(DIALECT,), strict_query=False)


class VllmClassifyIn(Steered):
    """Texts to classify."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"input": ["The striker scored twice.", "Shares fell."], "truncate_prompt_tokens": -1}]
        }
    )

    input: Inputs = Field(description="One text, or several; not token ids.")
    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None,
        description="-1: cut a text to what the model takes. A number of tokens: refused if a text has more, unless it "
        "is what the model takes. Absent: a text that is too long is an error.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Refused where a text is cut, and the model's tokenizer cuts the other side."
    )
    use_activation: bool | None = Field(None, description="false: logits.")
    activation: bool | None = Field(None, description="An older name of `use_activation`.")
    softmax: bool | None = Field(None, description="An older name still.")
    add_special_tokens: Literal[True] = True

    def function(self, default: Activation) -> Activation:
        """The activation that turns logits into scores."""
        chosen = [each for each in (self.use_activation, self.activation, self.softmax) if each is not None]
        return "none" if chosen and not chosen[0] else default


class ClassificationData(BaseModel):
    """A text's answer; `probs` in the order of the model's labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class VllmUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


class VllmClassifyOut(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassificationData]
    usage: VllmUsage


@router.operation(
    "POST",
    "/classify",
    key_scope="infer",
    errors=(400, 404, 415, 429, 503, 504),
    responses=STEERING_HEADERS,
    classifies=True,
    model_in_body=True,
)
async def vllm_classify(
    request: Request,
    response: Response,
    body: VllmClassifyIn,
    selector: ModelDep,
    caller: CallerDep,
    x_request_timeout: Timeout = None,
    min_generation: MinGeneration = None,
) -> VllmClassifyOut:
    """Classify as vLLM does."""
    service = selector.service(body.model)
    if not body.input:
        raise ApiError("invalid", "input: expected at least one text")
    most, cut_to = service.model.max_tokens, body.truncate_prompt_tokens
    if cut_to is not None and cut_to > most:
        raise ApiError("invalid", f"truncate_prompt_tokens: {cut_to} is more than the model takes ({most})")
    answer = await answer_to(
        request,
        service,
        caller,
        [body.input] if isinstance(body.input, str) else body.input,
        erasures_of(body.erase),
        truncate=cut_to is not None,
        timeout=x_request_timeout,
        min_generation=min_generation,
    )
    if cut_to is not None and cut_to >= 0:
        _check_lengths(answer, cut_to, most)
    if body.truncation_side is not None:
        check_truncation_side(answer, service.model, body.truncation_side, "truncation_side: input ")
    set_headers(response, answer)
    labels = service.model.identity.labels
    scores = all_scores([text.logits for text in answer.texts], body.function(service.model.activation))
    tokens = sum(text.tokens for text in answer.texts)
    return VllmClassifyOut(
        id=f"classify-{request.state.request_id}",
        created=int(time.time()),
        model=service.name,
        data=[
            ClassificationData(index=index, label=labels[int(best)], probs=probs, num_classes=len(labels))
            for index, (probs, best) in enumerate(zip(scores.tolist(), scores.argmax(axis=-1), strict=True))
        ],
        usage=VllmUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _check_lengths(answer: Answer, cut_to: int, most: int) -> None:
    """Raises ApiError (422) if a text has more tokens than `cut_to`: this server cuts texts to `most` tokens only."""
    for index, text in enumerate(answer.texts):
        if text.tokens > cut_to:
            detail = f"truncate_prompt_tokens: input {index} is longer, and this server cuts to {most} tokens only"
            raise ApiError("unsupported", detail)
