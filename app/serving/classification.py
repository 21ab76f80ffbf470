"""What every route that classifies shares: from texts and erasures to an answer, within all limits of a request."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import Header, Request, Response
from opentelemetry.trace import Span

from app.http.problems import ApiError
from app.observability.logs import note
from app.observability.tracing import step, step_done
from app.schemas.replies import Score
from app.security.auth import Caller, check_compare
from app.serving.scores import near, scores_of
from app.serving.service import CHANCE, Activation, Answer, ModelFacts, Service, TextAnswer, TextOrPair, characters
from app.settings import Settings
from range_store.domain.erasure import Erasure, resolve_layers
from range_store.domain.live import Generation

Timeout = Annotated[float | None, Header(gt=0, description="Seconds; no more than the server's own.")]
"""The header `X-Request-Timeout`."""

MinGeneration = Annotated[
    Generation | None,
    Header(
        alias="X-NeuronLens-Min-Generation",
        description="Answer only under this generation of the live state, or a later one of its epoch; else 503.",
    ),
]
"""The header `X-NeuronLens-Min-Generation`."""

Result = TypeVar("Result")

CLIENT_GONE = 499
"""As proxies count it. Nobody reads this reply."""


class ClientGone(Exception):
    """The client hung up."""


async def client_gone(request: Request, error: Exception) -> Response:
    """The reply to `ClientGone`."""
    return Response(status_code=CLIENT_GONE)


async def answer_to(
    request: Request,
    service: Service,
    caller: Caller,
    texts: Sequence[TextOrPair],
    erase: Sequence[Erasure] | None,
    *,
    compare: bool = False,
    truncate: bool = True,
    timeout: float | None = None,
    min_generation: str | None = None,
) -> Answer:
    """The answer to a request whose body has been read, traced and noted in its log line.

    Args:
        erase: what to erase; None: the live erasures.
        compare: also give the bare model's logits.
        truncate: cut texts that are too long; else they are an error.
        timeout: seconds, no more than the server's own limit.
        min_generation: of the live state, or a later one of its epoch, even if the request brings its own erasures.

    Raises:
        ApiError: too many texts, or too long ones (413); an erasure is enforced and `caller` may not compare (403).
        ClientGone: the client hung up before, and the work is cancelled.
        EngineError, RangeStoreError, TextTooLong, EmptyText, UnknownToken, PairUnsupported: see `classify` of the
            engine.
    """
    check_size(texts, service.settings)
    if compare:
        check_compare(caller, any(each.enforced for each in service.require_snapshot().live.at(service.mirror.now())))
    longest = service.settings.request_timeout
    note(texts=len(texts))
    with step("classify") as span:
        span.set_attribute("neuronlens.model", service.name)
        span.set_attributes({"neuronlens.texts": len(texts), "neuronlens.compare": compare})
        answer = await unless_gone(
            request,
            service.engine.classify(
                texts,
                erase,
                compare=compare,
                truncate=truncate,
                timeout=min(timeout or longest, longest),
                min_generation=min_generation,
            ),
        )
        _trace(span, answer)
    note(generation=answer.generation, replica=answer.replica)
    if compare:  # the plan was frozen later than the look above
        check_compare(caller, bool(answer.enforced))
    return answer


def all_scores(logits: Sequence[npt.NDArray[np.float32]], activation: Activation) -> npt.NDArray[np.float64]:
    """Each text's scores in the order of the model's labels, [N, K]. All texts at once: the event loop waits.

    Raises:
        ApiError: a score is no finite number (500 `non_finite`).
    """
    scores = scores_of(np.stack(logits), activation)
    if not np.isfinite(scores).all():
        raise ApiError("non_finite", "the model gave a score that is no finite number")
    return scores


def ranked(
    logits: Sequence[npt.NDArray[np.float32]], labels: tuple[str, ...], activation: Activation, top_k: int | None
) -> list[list[Score]]:
    """Each text's labels by score, best first; ties in the model's order. Raises as `all_scores` does."""
    if not logits:
        return []
    scores = all_scores(logits, activation)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    return [
        [Score(label=labels[index], score=score) for index, score in zip(indices, values, strict=True)]
        for indices, values in zip(best.tolist(), np.take_along_axis(scores, best, axis=-1).tolist(), strict=True)
    ]


def at_chance(
    texts: Sequence[TextAnswer], erasures: Sequence[Erasure], model: ModelFacts, *, within_blocks: bool = False
) -> list[bool]:
    """Whether what was erased left nothing of each text in its scores, by the model's own activation.

    They are even; or they are those of a state that is all zero after the last block that was erased at, where at least
    half of the neurons there were masked: few of them cannot empty a state, whatever the scores.

    Args:
        within_blocks: what was erased is added to a state (the site `mlp_output`), and its end empties none.
    """
    if not any(text.masked_neurons for text in texts):
        return [False] * len(texts)
    scores = scores_of(np.stack([text.logits for text in texts]), model.activation)
    labels = scores.shape[-1]
    same = np.full(labels, 1 / labels if model.activation == "softmax" else 0.5)
    even = near(scores, same, model.activation, CHANCE)
    layers = {layer for each in erasures for layer in resolve_layers(each.layers, model.identity.n_layers)}
    half = len(layers) * model.identity.hidden_size / 2
    empty = np.zeros(len(texts), dtype=np.bool_)
    if model.empty_logits and not within_blocks:
        left = np.array([model.empty_logits[max(layers)]], dtype=np.float32)
        empty = near(scores, scores_of(left, model.activation)[0], model.activation, CHANCE)
    return [
        bool(text.masked_neurons and (even[index] or (empty[index] and text.masked_neurons >= half)))
        for index, text in enumerate(texts)
    ]


def _trace(span: Span, answer: Answer) -> None:
    """Numbers and identifiers of an answer; the names of concepts come from callers, and are left out."""
    told = {
        "neuronlens.tokens": sum(text.tokens for text in answer.texts),
        "neuronlens.erasures": len(answer.erasures),
        "neuronlens.source": answer.source,
        "neuronlens.generation": answer.generation,
        "neuronlens.range_set": answer.range_set,
        "neuronlens.replica": answer.replica,
    }
    span.set_attributes({name: value for name, value in told.items() if value is not None})
    step_done("queue", answer.queued_seconds + answer.running_seconds, answer.queued_seconds)
    step_done("model", answer.running_seconds, answer.running_seconds)


def check_size(texts: Sequence[TextOrPair], settings: Settings) -> None:
    """Raises ApiError (413) if a request holds too many texts or pairs, or too long ones: a pair counts as one text."""
    if len(texts) > settings.max_texts:
        raise ApiError("too_many_texts", f"{len(texts)} texts, the limit is {settings.max_texts}: send fewer")
    for index, text in enumerate(texts):
        if (length := characters(text)) > settings.max_characters:
            detail = f"input {index} has {length} characters, the limit is {settings.max_characters}"
            raise ApiError("text_too_large", detail)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives. Raises ClientGone if the client hangs up before; then the work is cancelled."""
    answering = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientGone
        return await answering
    finally:
        answering.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client hangs up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
