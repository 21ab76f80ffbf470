"""From texts and erasures to an answer within the limits of a request, as every route that classifies needs it."""

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
from app.security.auth import Caller, check_may_see
from app.serving.scores import near, scores_of
from app.serving.service import CHANCE, Activation, Answer, ModelFacts, Service, TextAnswer, TextOrPair, characters
from app.settings import Settings
from range_store.domain.erasure import Erasure, resolve_layers
from range_store.domain.live import Generation

Timeout = Annotated[float | None, Header(gt=0, description="Seconds; at most the server's own limit.")]
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

CLIENT_DISCONNECTED = 499
"""Status that proxies use for it. Nobody reads this reply."""


class ClientDisconnected(Exception):
    """The client has disconnected."""


async def client_disconnected(request: Request, error: Exception) -> Response:
    """The reply to `ClientDisconnected`."""
    return Response(status_code=CLIENT_DISCONNECTED)


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
    """Answer a request whose body has been read, with a span and facts for its log line.

    Args:
        erase: erasures of the request; None: the live ones.
        compare: also give the bare model's logits.
        truncate: cut texts that are too long; else they are an error.
        timeout: seconds; at most the server's own limit counts.
        min_generation: answer under this generation or a later one of its epoch, even with erasures of the request.

    Raises:
        ApiError: too many texts, or too long ones (413); an erasure is enforced and `caller` may not compare (403).
        ClientDisconnected: the client has disconnected, and the work is cancelled.
        EngineError, RangeStoreError, TextTooLong, EmptyText, UnknownToken, PairUnsupported: see `classify` of the
            engine.
    """
    check_size(texts, service.settings)
    if compare:
        check_may_see(caller, has_enforced_erasure(service), "compare")
    note(texts=len(texts))
    with step("classify") as span:
        span.set_attribute("neuronlens.model", service.name)
        span.set_attributes({"neuronlens.texts": len(texts), "neuronlens.compare": compare})
        answer = await unless_disconnected(
            request,
            service.engine.classify(
                texts,
                erase,
                compare=compare,
                truncate=truncate,
                timeout=time_limit(service, timeout),
                min_generation=min_generation,
            ),
        )
        _trace(span, answer)
    note(generation=answer.generation, replica=answer.replica)
    if compare:  # an erasure may have been enforced since
        check_may_see(caller, bool(answer.enforced), "compare")
    return answer


def all_scores(logits: Sequence[npt.NDArray[np.float32]], activation: Activation) -> npt.NDArray[np.float64]:
    """Each text's scores in the order of the model's labels, [N, K]; of all texts at once, since the event loop waits.

    Raises:
        ApiError: a score is not a finite number (500 `non_finite`).
    """
    scores = scores_of(np.stack(logits), activation)
    if not np.isfinite(scores).all():
        raise ApiError("non_finite", "the model gave a score that is not a finite number")
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
    """Whether the erasures left nothing of each text in its scores, by the model's own activation.

    Such scores are even, or equal those of a state that is all zero after the last erased block. The latter counts only
    if at least half of the neurons there were masked: fewer cannot empty a state, whatever the scores.

    Args:
        within_blocks: the erasures act on what a block adds to a state (site `mlp_output`), and never empty the state.
    """
    if not any(text.masked_neurons for text in texts):
        return [False] * len(texts)
    scores = scores_of(np.stack([text.logits for text in texts]), model.activation)
    labels = scores.shape[-1]
    even_scores = np.full(labels, 1 / labels if model.activation == "softmax" else 0.5)
    even = near(scores, even_scores, model.activation, CHANCE)
    layers = {layer for each in erasures for layer in resolve_layers(each.layers, model.identity.n_layers)}
    half = len(layers) * model.identity.hidden_size / 2
    empty = np.zeros(len(texts), dtype=np.bool_)
    if model.empty_logits and not within_blocks:
        logits = np.array([model.empty_logits[max(layers)]], dtype=np.float32)
        empty = near(scores, scores_of(logits, model.activation)[0], model.activation, CHANCE)
    return [
        bool(text.masked_neurons and (even[index] or (empty[index] and text.masked_neurons >= half)))
        for index, text in enumerate(texts)
    ]


def _trace(span: Span, answer: Answer) -> None:
    """Record numbers and identifiers of an answer; names of concepts are left out, since callers write them."""
    attributes = {
        "neuronlens.tokens": sum(text.tokens for text in answer.texts),
        "neuronlens.erasures": len(answer.erasures),
        "neuronlens.source": answer.source,
        "neuronlens.generation": answer.generation,
        "neuronlens.range_set": answer.range_set,
        "neuronlens.replica": answer.replica,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    step_done("queue", answer.queued_seconds + answer.running_seconds, answer.queued_seconds)
    step_done("model", answer.running_seconds, answer.running_seconds)


def has_enforced_erasure(service: Service) -> bool:
    """Whether an erasure is enforced now."""
    return any(each.enforced for each in service.require_snapshot().live.active_at(service.mirror.now()))


def time_limit(service: Service, requested: float | None) -> float:
    """Seconds that a request may take: what it asks for, at most the server's own limit."""
    longest = service.settings.request_timeout
    return min(requested or longest, longest)


def check_size(texts: Sequence[TextOrPair], settings: Settings, max_texts: int | None = None) -> None:
    """Raises ApiError (413) if a request holds too many texts or pairs, or too long ones: a pair counts as one text.

    Args:
        max_texts: of this kind of request, if fewer than the server's own limit.
    """
    max_texts = min(max_texts or settings.max_texts, settings.max_texts)
    if len(texts) > max_texts:
        raise ApiError("too_many_texts", f"{len(texts)} texts, the limit is {max_texts}: send fewer at a time")
    for index, text in enumerate(texts):
        if (length := characters(text)) > settings.max_characters:
            detail = f"input {index} has {length} characters, the limit is {settings.max_characters}"
            raise ApiError("text_too_large", detail)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientDisconnected if the client disconnects first; then the work is cancelled."""
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return await working
    finally:
        working.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client disconnects; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
