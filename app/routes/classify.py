"""`POST /v1/classify`: texts in, labels out, with concepts erased."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Header, Request, Response
from opentelemetry.trace import Span

from app.auth import Calling, check_compare
from app.logs import note
from app.problems import BODY, QUERY, ApiError, documented
from app.replies import Baseline, ClassifyOut, ErasureOut, ErasurePlan, Result, Score, Usage
from app.requests import ClassifyIn
from app.routes import QueryChecked, Serving, check_model_name, snapshot_of
from app.scores import Activation, scores_of
from app.settings import Settings
from app.tracing import step, step_done
from app.wiring import Answer

router = APIRouter(tags=["classify"])

Timeout = Annotated[float | None, Header(gt=0, description="Seconds; no more than the server's own.")]
CLIENT_GONE = 499
"""As proxies count it. Nobody reads this reply."""


@router.post(
    "/v1/classify",
    dependencies=[QueryChecked],
    response_model=ClassifyOut,
    responses=documented(*QUERY, *BODY, 429, 503, 504),
)
async def classify(
    request: Request, body: ClassifyIn, service: Serving, caller: Calling, x_request_timeout: Timeout = None
) -> ClassifyOut | Response:
    """Classify one text or several while concepts are erased from the model's activations."""
    check_model_name(service, body.model)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    _check_size(texts, service.settings)
    if body.compare:
        check_compare(caller, any(each.enforced for each in snapshot_of(service).live.at(time.time())))
    longest = service.settings.request_timeout
    note(texts=len(texts))
    with step("classify") as span:
        span.set_attributes({"neuronlens.texts": len(texts), "neuronlens.compare": body.compare})
        answer = await _unless_gone(
            request,
            service.engine.classify(
                texts,
                body.erasures(),
                compare=body.compare,
                truncate=body.truncate,
                timeout=min(x_request_timeout or longest, longest),
            ),
        )
        if answer is None:
            return Response(status_code=CLIENT_GONE)
        _trace(span, answer)
    note(generation=answer.generation)
    if body.compare:  # the plan was frozen later than the look above
        check_compare(caller, bool(answer.enforced))
    activation: Activation = body.activation if body.activation != "auto" else _activation(service.model.problem_type)
    return ClassifyOut(
        model=service.name,
        results=_results(answer, service.model.identity.labels, activation, body.top_k),
        erasure=_plan(answer, service.model.identity.n_layers),
        usage=Usage(tokens=sum(text.tokens for text in answer.texts)),
    )


def _trace(span: Span, answer: Answer) -> None:
    """Numbers and identifiers of an answer; the names of concepts come from callers, and are left out."""
    told = {
        "neuronlens.tokens": sum(text.tokens for text in answer.texts),
        "neuronlens.erasures": len(answer.erasures),
        "neuronlens.source": answer.source,
        "neuronlens.generation": answer.generation,
        "neuronlens.range_set": answer.range_set,
    }
    span.set_attributes({name: value for name, value in told.items() if value is not None})
    step_done("queue", answer.queued_seconds + answer.running_seconds, answer.queued_seconds)
    step_done("model", answer.running_seconds, answer.running_seconds)


def _check_size(texts: Sequence[str], settings: Settings) -> None:
    if len(texts) > settings.max_texts:
        raise ApiError(413, "too_many_texts", f"{len(texts)} texts, the limit is {settings.max_texts}: send fewer")
    for index, text in enumerate(texts):
        if len(text) > settings.max_characters:
            detail = f"input {index} has {len(text)} characters, the limit is {settings.max_characters}"
            raise ApiError(413, "text_too_large", detail)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer | None:
    """What `work` gives; None if the client hung up before, and then the work is cancelled."""
    answering = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else None
    finally:
        answering.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client hangs up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _activation(problem_type: str | None) -> Activation:
    return "sigmoid" if problem_type == "multi_label_classification" else "softmax"


def _results(answer: Answer, labels: tuple[str, ...], activation: Activation, top_k: int | None) -> list[Result]:
    erased = _ranked([text.logits for text in answer.texts], labels, activation, top_k)
    compared = [index for index, text in enumerate(answer.texts) if text.baseline is not None]
    baselines = [text.baseline for text in answer.texts if text.baseline is not None]
    bare = dict(zip(compared, _ranked(baselines, labels, activation, top_k), strict=True))
    return [
        Result(
            label=best[0].label,
            score=best[0].score,
            scores=best,
            masked_neurons=text.masked_neurons,
            truncated=text.truncated,
            baseline=(
                Baseline(label=bare[index][0].label, score=bare[index][0].score, scores=bare[index])
                if index in bare
                else None
            ),
        )
        for index, (text, best) in enumerate(zip(answer.texts, erased, strict=True))
    ]


def _ranked(
    logits: Sequence[npt.NDArray[np.float32]], labels: tuple[str, ...], activation: Activation, top_k: int | None
) -> list[list[Score]]:
    """Each text's labels by score, best first; ties in the model's order. All texts at once: the event loop waits.

    Raises:
        ApiError: a score is no finite number (500 `non_finite`).
    """
    if not logits:
        return []
    scores = scores_of(np.stack(logits), activation)
    if not np.isfinite(scores).all():
        raise ApiError(500, "non_finite", "the model gave a score that is no finite number")
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    return [
        [Score(label=labels[index], score=score) for index, score in zip(indices, values, strict=True)]
        for indices, values in zip(best.tolist(), np.take_along_axis(scores, best, axis=-1).tolist(), strict=True)
    ]


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
