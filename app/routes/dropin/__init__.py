"""Routes that speak as other servers do, so that their clients need no change: one module each (docs/dropin.md)."""

import re
from typing import Any

from starlette.types import Scope

from app.routes.dropin import health, hf, tei, tokenize, v2, vllm
from app.routes.dropin.dialect import Dialect, document

ROUTERS = (hf.router, tei.router, vllm.router, tokenize.router, health.router, v2.router)
TAGS = (
    {"name": "Hugging Face", "description": "As an Inference Endpoint."},
    {"name": "text-embeddings-inference", "description": "As its classifiers answer."},
    {"name": "vLLM", "description": "As its classifiers answer."},
    {"name": "Open Inference Protocol", "description": "As KServe, Triton and MLServer answer."},
)
_DIALECTS = {
    "/predict": tei.DIALECT,
    "/info": tei.DIALECT,
    "/tokenize": tei.DIALECT,
    "/health": tei.DIALECT,  # of those that have it, the one whose refusal has a body
    "/classify": vllm.DIALECT,
}
CLASSIFYING = (
    "/",
    "/predict",
    "/classify",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/versions/{model_version}/infer",
)
"""Templates of the routes whose POST takes the model's time."""
_INFER = re.compile(r"/v2/models/.+?/infer", re.DOTALL)


def dialect_of(scope: Scope) -> Dialect | None:
    """In which protocol's words to refuse a request; None: as a problem."""
    if scope["path"] == "/tokenize" and scope.get("state", {}).get(tokenize.OF_VLLM):
        return vllm.DIALECT
    return _dialect(scope["method"], scope["path"])


def _dialect(method: str, path: str) -> Dialect | None:
    if path == "/":  # anything but a POST is not meant for this protocol
        return hf.DIALECT if method == "POST" else None
    return v2.DIALECT if path == "/v2" or path.startswith("/v2/") else _DIALECTS.get(path)


def infers(path: str) -> bool:
    """Whether a path takes inference requests of the Open Inference Protocol."""
    return _INFER.fullmatch(path) is not None


def document_dialects(openapi: dict[str, Any]) -> None:
    """Say in an OpenAPI document in which words these calls are refused."""
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            if dialect := _dialect(method.upper(), path):
                document(operation, dialect, *((vllm.DIALECT,) if path == "/tokenize" else ()))
