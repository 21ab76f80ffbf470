"""`/v2`: the Open Inference Protocol, as KServe, Triton and MLServer serve it.

Shapes: `specification/protocol/open_inference_rest.yaml` and `inference_rest.md` of kserve/open-inference-protocol
(version 2.0). One BYTES tensor `text` goes in; `label`, `score` and `probs` come out. What steers stands in the
request's `parameters`. There is one version of the model, "1".
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from starlette.convertors import register_url_convertor

from app.http.problems import ApiError, Problem, documented
from app.routes.dependencies import ModelsDep, Whole, log_model
from app.routes.dropin.dialect import Dialect
from app.routes.dropin.steering import TOLD, erased_header, tell
from app.routes.dropin.v2_shapes import (
    InferIn,
    InferOut,
    InferParameters,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
    TensorOut,
)
from app.schemas.requests import erasures_of
from app.security.auth import CallerDep
from app.serving.classification import MinGeneration, Timeout, all_scores, answer_to
from app.serving.models import ServedModels
from app.serving.readiness import conditions
from app.serving.service import Activation, Answer, Logits, Service


class V2Problem(Problem):
    """An error as clients of the Open Inference Protocol read it."""

    error: str | None = Field(None, description="The same as `detail`.")


def _say(problem: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status = 400 if problem["status"] == 422 else problem["status"]
    return status, {"error": problem["detail"]}


class _Served(Whole):
    """A model's name, which may hold slashes, but does not end as a path of this protocol does."""

    regex = r"(?s:.+)(?<!/infer)(?<!/ready)"


register_url_convertor("served", _Served())
DIALECT = Dialect(V2Problem, _say, without=frozenset({422}))
MODEL_VERSION = "1"
_MODEL = "/v2/models/{model:served}"
_VERSION = "/v2/models/{model:served}/versions/{model_version}"
_INFER = documented(400, 404, 429, 503, 504) | TOLD
_READY = documented(404, 503)
router = APIRouter(tags=["Open Inference Protocol"], responses={500: {"model": V2Problem}})
# of two decorators the lower one is first: the path of a version must be, or the model would be called "…/versions/1"


async def _check_version(model_version: str) -> None:
    if model_version != MODEL_VERSION:
        raise ApiError("unknown_model", f"no such version; there is {MODEL_VERSION!r} alone")


_KNOWN = [Depends(_check_version)]


@router.get("/v2/health/live")
async def v2_live() -> ServerLive:
    """The process lives."""
    return ServerLive(live=True)


@router.get("/v2/health/ready", responses=documented(503))
async def v2_ready(models: ModelsDep) -> ServerReady:
    """Requests are answered, as `/readyz` means it."""
    for service in models:
        _check_ready(service)
    return ServerReady(ready=True)


@router.get("/v2/", include_in_schema=False)
@router.get("/v2")
async def v2_server() -> ServerMetadata:
    """What this server is."""
    return ServerMetadata(name="neuronlens", version=version("neuronlens"), extensions=["binary_tensor_data", "erase"])


@router.get(_MODEL + "/ready", responses=_READY)
@router.get(_VERSION + "/ready", name="v2_version_ready", responses=_READY, dependencies=_KNOWN)
async def v2_model_ready(models: ModelsDep, model: str) -> ModelReady:
    """The model answers."""
    service = _named(models, model)
    _check_ready(service)
    return ModelReady(name=service.name, ready=True)


@router.post(_MODEL + "/infer", responses=_INFER, response_model_exclude_none=True)
@router.post(
    _VERSION + "/infer",
    name="v2_version_infer",
    responses=_INFER,
    response_model_exclude_none=True,
    dependencies=_KNOWN,
)
async def v2_infer(
    request: Request,
    response: Response,
    body: InferIn,
    models: ModelsDep,
    caller: CallerDep,
    model: str,
    x_request_timeout: Timeout = None,
    min_generation: MinGeneration = None,
) -> InferOut:
    """Classify as servers of the Open Inference Protocol do."""
    service = _named(models, model)
    chosen = body.parameters or InferParameters()
    wanted = _wanted(body, chosen)
    answer = await answer_to(
        request,
        service,
        caller,
        body.inputs[0].texts(),
        erasures_of(chosen.erase),
        compare=chosen.compare,
        truncate=chosen.truncate,
        timeout=x_request_timeout,
        min_generation=min_generation,
    )
    tell(response, answer)
    activation = chosen.activation if chosen.activation != "auto" else service.model.activation
    tensors = _tensors([text.logits for text in answer.texts], service, activation, chosen.top_k)
    if chosen.compare:
        bare = [text.logits if text.baseline is None else text.baseline for text in answer.texts]
        tensors |= {
            f"baseline_{name}": tensor.model_copy(update={"name": f"baseline_{name}"})
            for name, tensor in _tensors(bare, service, activation, chosen.top_k).items()
        }
    return InferOut(
        model_name=service.name,
        model_version=MODEL_VERSION,
        id=body.id,
        parameters=_told(answer),
        outputs=[tensors[name] for name in wanted],
    )


@router.get(_MODEL, responses=documented(404))
@router.get(_VERSION, name="v2_version", responses=documented(404), dependencies=_KNOWN)
async def v2_model(models: ModelsDep, model: str) -> ModelMetadata:
    """What goes into the model, and what comes out."""
    service = _named(models, model)
    labels = service.model.identity.labels
    return ModelMetadata(
        name=service.name,
        versions=[MODEL_VERSION],
        platform=f"neuronlens_{service.model.identity.family}",
        inputs=[TensorMetadata(name="text", datatype="BYTES", shape=[-1])],
        outputs=[
            TensorMetadata(name="label", datatype="BYTES", shape=[-1]),
            TensorMetadata(name="score", datatype="FP32", shape=[-1]),
            TensorMetadata(name="probs", datatype="FP32", shape=[-1, len(labels)]),
        ],
        parameters={"labels": list(labels)},
    )


def _named(models: ServedModels, name: str) -> Service:
    """The service of a name; raises ApiError (404) if it is that of a model and a path that this server lacks."""
    if name not in models.names and (below := [each for each in models.names if name.startswith(f"{each}/")]):
        raise ApiError("not_found", f"no such path below the model {below[0]!r}; see /docs")
    return log_model(models.named(name))


def _check_ready(service: Service) -> None:
    failing = [name for name, good in conditions(service).items() if not good]
    if failing:
        raise ApiError("not_ready", f"not ready: {', '.join(failing)}")


def _wanted(body: InferIn, chosen: InferParameters) -> list[str]:
    known = ["label", "score", "probs"]
    if chosen.compare:
        known += [f"baseline_{name}" for name in known]
    wanted = [each.name for each in body.outputs or []]
    if unknown := [name for name in wanted if name not in known]:
        position = wanted.index(unknown[0])
        raise ApiError("invalid", f"outputs.{position}: no such output; there are {', '.join(known)}")
    return wanted or known


def _tensors(
    logits: Sequence[Logits], service: Service, activation: Activation, top_k: int | None
) -> dict[str, TensorOut]:
    """The outputs for texts: labels and scores, best first, of shape [N], or [N, k] with `top_k`; and [N, K] of all."""
    labels = service.model.identity.labels
    scores = all_scores(logits, activation)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, : top_k or 1]
    shape = list(best.shape) if top_k else [len(best)]
    return {
        "label": TensorOut(
            name="label", datatype="BYTES", shape=shape, data=[labels[index] for index in best.ravel().tolist()]
        ),
        "score": TensorOut(
            name="score", datatype="FP32", shape=shape, data=np.take_along_axis(scores, best, axis=-1).ravel().tolist()
        ),
        "probs": TensorOut(name="probs", datatype="FP32", shape=list(scores.shape), data=scores.ravel().tolist()),
    }


def _told(answer: Answer) -> dict[str, str]:
    """What was erased, as parameters of the reply: strings, as the protocol has it."""
    told = {
        "source": answer.source,
        "generation": answer.generation,
        "range_set": answer.range_set,
        "erased": erased_header([erasure.concept for erasure in answer.erasures]),
    }
    return {name: value for name, value in told.items() if value}
