"""Routes that speak as other servers do, so that their clients need no change: one module each (docs/dropin.md)."""

from typing import Any

from starlette.types import Scope

from app.routes.dropin import hf, tei
from app.routes.dropin.dialect import Dialect, document

ROUTERS = (hf.router, tei.router)
TAGS = (
    {"name": "Hugging Face", "description": "As an Inference Endpoint."},
    {"name": "text-embeddings-inference", "description": "As its classifiers answer."},
)
_DIALECTS = {"/predict": tei.DIALECT, "/info": tei.DIALECT}
_ANSWERING = frozenset({"/", "/predict"})


def dialect_of(scope: Scope) -> Dialect | None:
    """In which protocol's words to refuse a request; None: as a problem."""
    return _dialect(scope["method"], scope["path"])


def _dialect(method: str, path: str) -> Dialect | None:
    if path == "/":  # anything but a POST is not meant for this protocol
        return hf.DIALECT if method == "POST" else None
    return _DIALECTS.get(path)


def answering(path: str) -> str | None:
    """The template of the route at a path whose POST takes the model's time; None if there is none."""
    return path if path in _ANSWERING else None


def document_dialects(openapi: dict[str, Any]) -> None:
    """Say in an OpenAPI document in which words these calls are refused."""
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            if dialect := _dialect(method.upper(), path):
                document(operation, dialect)
