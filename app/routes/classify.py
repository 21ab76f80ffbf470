"""`POST /v1/classify`: texts in, labels out, with concepts erased."""

from fastapi import Request

from app.http.problems import ApiError
from app.http.responses import BODY, QUERY
from app.http.routing import Router
from app.routes.dependencies import ModelDep
from app.schemas.replies import Baseline, ClassifyOut, ErasureOut, ErasurePlan, Result, Usage
from app.schemas.requests import ClassifyIn
from app.security.auth import CallerDep
from app.serving.classification import MinGeneration, Timeout, answer_to, at_chance, ranked
from app.serving.service import Activation, Answer, Service

router = Router("classify")


@router.operation(
    "POST",
    "/v1/classify",
    key_scope="infer",
    errors=(*QUERY, *BODY, 429, 503, 504),
    classifies=True,
    model_in_body=True,
    feature="compare",
)
async def classify(
    request: Request,
    body: ClassifyIn,
    selector: ModelDep,
    caller: CallerDep,
    x_request_timeout: Timeout = None,
    min_generation: MinGeneration = None,
) -> ClassifyOut:
    """Classify one text or several while concepts are erased from the model's activations."""
    service = selector.service(body.model)
    answer = await answer_to(
        request,
        service,
        caller,
        [body.inputs] if isinstance(body.inputs, str) else body.inputs,
        body.erasures(),
        compare=body.compare,
        truncate=body.truncate,
        timeout=x_request_timeout,
        min_generation=_same(body.min_generation, min_generation),
    )
    activation = body.activation if body.activation != "auto" else service.model.activation
    return ClassifyOut(
        model=service.name,
        results=_results(answer, service, activation, body.top_k),
        erasure=_plan(answer, service.model.identity.n_layers),
        usage=Usage(tokens=sum(text.tokens for text in answer.texts)),
    )


def _same(in_body: str | None, in_header: str | None) -> str | None:
    if in_body and in_header and in_body != in_header:
        raise ApiError("invalid", "min_generation: the body and X-NeuronLens-Min-Generation differ")
    return in_body or in_header


def _results(answer: Answer, service: Service, activation: Activation, top_k: int | None) -> list[Result]:
    labels = service.model.identity.labels
    fitted = snapshot.range_set if (snapshot := service.mirror.snapshot) else None
    within_blocks = fitted is not None and fitted.provenance.settings.site != "block_output"
    chance = at_chance(answer.texts, answer.erasures, service.model, within_blocks=within_blocks)
    erased = ranked([text.logits for text in answer.texts], labels, activation, top_k)
    compared = [index for index, text in enumerate(answer.texts) if text.baseline is not None]
    baselines = [text.baseline for text in answer.texts if text.baseline is not None]
    bare = dict(zip(compared, ranked(baselines, labels, activation, top_k), strict=True))
    return [
        Result(
            label=best[0].label,
            score=best[0].score,
            scores=best,
            masked_neurons=text.masked_neurons,
            truncated=text.truncated,
            at_chance=chance[index],
            baseline=(
                Baseline(label=bare[index][0].label, score=bare[index][0].score, scores=bare[index])
                if index in bare
                else None
            ),
        )
        for index, (text, best) in enumerate(zip(answer.texts, erased, strict=True))
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
