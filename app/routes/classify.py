"""`POST /v1/classify`: texts in, labels out, with concepts erased."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header

from app.problems import ApiError, documented
from app.replies import Baseline, ClassifyOut, ErasureOut, ErasurePlan, Result, Score, Usage
from app.requests import ClassifyIn
from app.routes import Serving, check_model_name
from app.scores import Activation, scores_of
from app.wiring import Answer

router = APIRouter(tags=["classify"])

Timeout = Annotated[float | None, Header(gt=0, description="Seconds to wait; the server's own limit is the longest.")]


@router.post("/v1/classify", responses=documented(404, 409, 429, 504))
async def classify(
    body: ClassifyIn,
    service: Serving,
    x_request_timeout: Annotated[
        float | None, Header(gt=0, description="Seconds; no more than the server's own.")
    ] = None,
) -> ClassifyOut:
    """Classify one text or several while concepts are erased from the model's activations."""
    check_model_name(service, body.model)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    settings = service.settings
    if len(texts) > settings.max_texts:
        raise ApiError(413, "too_many_texts", f"{len(texts)} texts, the limit is {settings.max_texts}: send fewer")
    for index, text in enumerate(texts):
        if len(text) > settings.max_characters:
            detail = f"input {index} has {len(text)} characters, the limit is {settings.max_characters}"
            raise ApiError(413, "text_too_large", detail)
    timeout = min(x_request_timeout or settings.request_timeout, settings.request_timeout)
    answer = await service.engine.classify(
        texts, body.erasures(), compare=body.compare, truncate=body.truncate, timeout=timeout
    )
    activation: Activation = body.activation if body.activation != "auto" else _activation(service.model.problem_type)
    labels = service.model.identity.labels
    return ClassifyOut(
        model=service.name,
        results=[_result(text, labels, activation, body.top_k) for text in answer.texts],
        erasure=_plan(answer, service.model.identity.n_layers),
        usage=Usage(tokens=sum(text.tokens for text in answer.texts)),
    )


def _activation(problem_type: str | None) -> Activation:
    return "sigmoid" if problem_type == "multi_label_classification" else "softmax"


def _result(text: Any, labels: tuple[str, ...], activation: Activation, top_k: int | None) -> Result:
    best = _best(text.logits, labels, activation, top_k)
    baseline = None
    if text.baseline is not None:
        bare = _best(text.baseline, labels, activation, top_k)
        baseline = Baseline(label=bare[0].label, score=bare[0].score, scores=bare)
    return Result(
        label=best[0].label,
        score=best[0].score,
        scores=best,
        masked_neurons=text.masked_neurons,
        truncated=text.truncated,
        baseline=baseline,
    )


def _best(logits: Any, labels: tuple[str, ...], activation: Activation, top_k: int | None) -> list[Score]:
    """Labels by score, best first; ties in the model's order."""
    scores = scores_of(logits, activation)
    if not np.isfinite(scores).all():
        raise ApiError(500, "non_finite", "the model gave a score that is no finite number")
    best = np.argsort(-scores, kind="stable")[:top_k]
    return [Score(label=labels[index], score=float(scores[index])) for index in best]


def _plan(answer: Answer, n_layers: int) -> ErasurePlan:
    return ErasurePlan(
        source=answer.source,
        concepts=[erasure.concept for erasure in answer.erasures],
        erasures=[
            ErasureOut(**ErasureOut.values(erasure, n_layers), enforced=erasure.concept in answer.enforced)
            for erasure in answer.erasures
        ],
        range_set=answer.range_set,
        generation=answer.generation,
    )
