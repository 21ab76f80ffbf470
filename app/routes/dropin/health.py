"""`GET /health`, as probes of text-embeddings-inference, of Hugging Face endpoints and of vLLM use it."""

from fastapi import Response

from app.http.routing import Router
from app.routes.dependencies import ModelsDep
from app.routes.dropin.tei import DIALECT
from app.routes.service import readyz

# of these protocols, the one whose refusal has a body
router = Router("Hugging Face", "text-embeddings-inference", "vLLM", dialects=(DIALECT,), strict_query=False)


@router.operation("GET", "/health", key_scope=None, errors=(503,), traced=False, response_class=Response)
async def health(models: ModelsDep) -> Response:
    """Every model is ready, as for `/readyz`; the reply has no body."""
    await readyz(models)
    return Response()
