"""`GET /v1/capabilities`: what a client must know of a server before it asks."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import get_args

from fastapi import APIRouter, Request

from app.http.problems import QUERY, documented
from app.routes.activations import MOST_TEXTS
from app.routes.dependencies import QueryChecked, ServiceDep
from app.schemas.replies import CapabilitiesOut
from app.schemas.requests import MOST
from app.security.auth import CallerDep
from app.serving.service import Activation
from range_store.domain.erasure import Method, Rule
from range_store.storage.api_keys import SCOPES

router = APIRouter(tags=["service"])

FEATURES: Mapping[str, str] = {
    "compare": "/v1/classify",
    "events": "/v1/events",
    "tokenize": "/v1/tokenize",
    "activations": "/v1/activations",
    "reports": "/v1/reports",
    "fits": "/v1/fits",
}
PROTOCOLS: Mapping[str, str] = {
    "hugging-face": "/",
    "text-embeddings-inference": "/predict",
    "vllm": "/classify",
    "open-inference": "/v2/",
}
"""What other servers' clients can speak here, by a path that tells (one that ends in a slash: by its beginning)."""


@router.get("/v1/capabilities", dependencies=[QueryChecked], responses=documented(*QUERY))
async def show_capabilities(service: ServiceDep, caller: CallerDep, request: Request) -> CapabilitiesOut:
    """What this server can do, its limits, and what the caller may do."""
    settings, model, snapshot = service.settings, service.model, service.mirror.snapshot
    range_set = snapshot.range_set if snapshot else None
    fitted = range_set.provenance.settings if range_set else None
    paths = request.app.openapi()["paths"]
    features = [name for name in _served(FEATURES, paths) if name != "fits" or settings.fits]
    return CapabilitiesOut(
        version=version("neuronlens"),
        model=service.name,
        kind=model.identity.kind,
        labels=list(model.identity.labels),
        multi_label=model.activation == "sigmoid",
        layers=model.identity.n_layers,
        hidden_size=model.identity.hidden_size,
        methods=list(get_args(Method)),
        rules=list(get_args(Rule)),
        rankings_fitted=list(fitted.rankings) if fitted else [],
        layers_fitted=list(fitted.layers) if fitted else [],
        replacements=["zero", "mean", "damp"],
        activations=list(get_args(Activation)),
        max_tokens=model.max_tokens,
        max_texts=settings.max_texts,
        max_characters=settings.max_characters,
        max_body_bytes=settings.max_body_bytes,
        max_erasures=MOST,
        max_shown_texts=min(MOST_TEXTS, settings.max_texts),
        features=features,
        protocols=_served(PROTOCOLS, paths),
        range_set=range_set.id if range_set else None,
        generation=snapshot.live.generation if snapshot else None,
        keys_in_force=service.keyring.in_force,
        key=caller.key.name if caller.key else None,
        scopes=list(caller.key.scopes if caller.key else SCOPES),
    )


def _served(named: Mapping[str, str], paths: Iterable[str]) -> list[str]:
    known = set(paths)
    return [
        name
        for name, path in named.items()
        if path in known or (path != "/" and path.endswith("/") and any(each.startswith(path) for each in known))
    ]
