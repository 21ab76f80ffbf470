"""`GET /health`: what clients and probes of text-embeddings-inference, of Hugging Face endpoints and of vLLM ask."""

from fastapi import APIRouter, Response

from app.http.problems import documented
from app.routes.dependencies import ModelsDep
from app.routes.dropin.tei import TeiProblem
from app.routes.service import readyz

router = APIRouter(tags=["Hugging Face", "text-embeddings-inference", "vLLM"], responses={500: {"model": TeiProblem}})


@router.get("/health", response_class=Response, responses=documented(503))
async def health(models: ModelsDep) -> Response:
    """Requests are answered, as `/readyz` means it; nothing more is said."""
    await readyz(models)
    return Response()
