"""`/v2`: the Open Inference Protocol, as KServe, Triton and MLServer serve it.

Shapes: `specification/protocol/open_inference_rest.yaml` and `inference_rest.md` of kserve/open-inference-protocol
(version 2.0). One BYTES tensor `text` goes in; `label`, `score` and `probs` come out. Erasures are
in the request's `parameters`. There is one version of the model, "1".
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, Request, Response
from pydantic import Field
from starlette.convertors import register_url_convertor

from app.http.problems import ApiError, Dialect, Problem
from app.http.routing import Router
from app.routes.dependencies import ModelsDep, RestOfPath, log_model
from app.routes.dropin.steering import STEERING_HEADERS, erased_header, set_headers
from app.routes.dropin.v2_binary import binary_tensors
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
from app.serving.service import Activation, Answer, Logits, Service, conditions


class V2Problem(Problem):
    """An error as clients of the Open Inference Protocol read it."""

    error: str | None = Field(None, description="The same as `detail`.")


def _translate(problem: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status = 400 if problem["status"] == 422 else problem["status"]
    return status, {"error": problem["detail"]}


class _ModelName(RestOfPath):
    """The name of a model: it may hold slashes, but does not end as a path of this protocol does."""

    regex = r"(?s:.+)(?<!/infer)(?<!/ready)"


register_url_convertor("model_name", _ModelName())
DIALECT = Dialect("open-inference", V2Problem, _translate, unused=frozenset({422}))
MODEL_VERSION = "1"
_MODEL = "/v2/models/{model:model_name}"
_VERSION = "/v2/models/{model:model_name}/versions/{model_version}"
_INFER_ERRORS = (400, 404, 429, 503, 504)
router = Router("Open Inference Protocol", dialects=(DIALECT,), strict_query=False)
# the lower of two decorators declares its route first: the path with a version must come first, or the model's name
# would be read as "…/versions/1"


async def _get_service(request: Request, models: ModelsDep, model: str) -> Service:
    """The service of the model that the path names; raises ApiError (404) if there is none."""
    service: Service | None = getattr(request.state, "service", None)  # from `ServedModels.refuse_if_full`
    below = [name for name in models.names if model.startswith(f"{name}/")]
    if service is None and model not in models.names and below:
        raise ApiError("not_found", f"no such path below the model {below[0]!r}; see /docs")
    return log_model(service or models.find(model))


_PathServiceDep = Annotated[Service, Depends(_get_service)]


async def _check_version(model: str, model_version: str) -> None:  # in this order, which generated clients follow
    if model_version != MODEL_VERSION:
        raise ApiError("unknown_model", f"no such version; the only one is {MODEL_VERSION!r}")


_CHECK_VERSION = [Depends(_check_version)]


@router.operation("GET", "/v2/health/live", key_scope=None, traced=False)
async def v2_live() -> ServerLive:
    """The process is alive."""
    return ServerLive(live=True)


@router.operation("GET", "/v2/health/ready", key_scope=None, errors=(503,), traced=False)
async def v2_ready(models: ModelsDep) -> ServerReady:
    """Every model is ready, as for `/readyz`."""
    for service in models:
        _check_ready(service)
    return ServerReady(ready=True)


@router.operation("GET", "/v2/", key_scope="read", include_in_schema=False)
@router.operation("GET", "/v2", key_scope="read")
async def v2_server() -> ServerMetadata:
    """The name, version and extensions of this server."""
    return ServerMetadata(name="neuronlens", version=version("neuronlens"), extensions=["binary_tensor_data", "erase"])


@router.operation("GET", _MODEL + "/ready", key_scope="read", errors=(404, 503))
@router.operation(
    "GET",
    _VERSION + "/ready",
    key_scope="read",
    errors=(404, 503),
    name="v2_version_ready",
    dependencies=_CHECK_VERSION,
)
async def v2_model_ready(service: _PathServiceDep) -> ModelReady:
    """The model is ready."""
    _check_ready(service)
    return ModelReady(name=service.name, ready=True)


@router.operation(
    "POST",
    _MODEL + "/infer",
    key_scope="infer",
    errors=_INFER_ERRORS,
    responses=STEERING_HEADERS,
    classifies=True,
    decode_body=binary_tensors,
    response_model_exclude_none=True,
)
@router.operation(
    "POST",
    _VERSION + "/infer",
    key_scope="infer",
    errors=_INFER_ERRORS,
    responses=STEERING_HEADERS,
    classifies=True,
    decode_body=binary_tensors,
    name="v2_version_infer",
    response_model_exclude_none=True,
    dependencies=_CHECK_VERSION,
)
async def v2_infer(
    request: Request,
    response: Response,
    body: InferIn,
    service: _PathServiceDep,
    caller: CallerDep,
    x_request_timeout: Timeout = None,
    min_generation: MinGeneration = None,
) -> InferOut:
    """Classify as servers of the Open Inference Protocol do."""
    chosen = body.parameters or InferParameters()
    names = _output_names(body, chosen)
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
    set_headers(response, answer)
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
        parameters=_parameters(answer),
        outputs=[tensors[name] for name in names],
    )


@router.operation("GET", _MODEL, key_scope="read", errors=(404,))
@router.operation("GET", _VERSION, key_scope="read", errors=(404,), name="v2_version", dependencies=_CHECK_VERSION)
async def v2_model(service: _PathServiceDep) -> ModelMetadata:
    """The inputs and outputs of the model."""
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


def _check_ready(service: Service) -> None:
    failing = [name for name, good in conditions(service).items() if not good]
    if failing:
        raise ApiError("not_ready", f"not ready: {', '.join(failing)}")


def _output_names(body: InferIn, chosen: InferParameters) -> list[str]:
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


def _parameters(answer: Answer) -> dict[str, str]:
    """What was erased, as parameters of the reply: strings, as the protocol requires."""
    parameters = {
        "source": answer.source,
        "generation": answer.generation,
        "range_set": answer.range_set,
        "erased": erased_header([erasure.concept for erasure in answer.erasures]),
    }
    return {name: value for name, value in parameters.items() if value}
