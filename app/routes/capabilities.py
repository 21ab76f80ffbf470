"""`GET /v1/capabilities`: what a client needs to know of a server before it sends requests."""

from importlib.metadata import version
from typing import get_args

from fastapi import Request

from app.http.responses import QUERY
from app.http.routing import Router, routes_of
from app.routes.activations import MAX_TEXTS
from app.routes.dependencies import ServiceDep
from app.schemas.replies import CapabilitiesOut
from app.schemas.requests import MAX_ITEMS
from app.security.auth import CallerDep
from app.serving.service import Activation
from range_store.domain.erasure import Method, Rule
from range_store.storage.api_keys import SCOPES

router = Router("service")


@router.operation("GET", "/v1/capabilities", key_scope="read", errors=QUERY)
async def show_capabilities(service: ServiceDep, caller: CallerDep, request: Request) -> CapabilitiesOut:
    """What this server can do, its limits, and what the caller may do."""
    settings, model, snapshot = service.settings, service.model, service.mirror.snapshot
    range_set = snapshot.range_set if snapshot else None
    fitted = range_set.provenance.settings if range_set else None
    routes = [route.info for route in routes_of(request.app)]
    features = [info.feature for info in routes if info.feature and (info.feature != "fits" or settings.fits)]
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
        max_erasures=MAX_ITEMS,
        max_shown_texts=min(MAX_TEXTS, settings.max_texts),
        features=features,
        protocols=list(dict.fromkeys(dialect.name for info in routes for dialect in info.dialects)),
        range_set=range_set.id if range_set else None,
        generation=snapshot.live.generation if snapshot else None,
        keys_in_force=service.keyring.in_force,
        key=caller.key.name if caller.key else None,
        scopes=list(caller.key.scopes if caller.key else SCOPES),
    )
