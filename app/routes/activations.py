"""`/v1/tokenize` and `/v1/activations`: the tokens of a text, and the values of single neurons for it."""

from collections.abc import Sequence

from fastapi import Request

from app.http.problems import ApiError, FieldError
from app.http.responses import BODY, QUERY
from app.http.routing import Router
from app.observability.logs import note
from app.routes.dependencies import ModelDep
from app.schemas.replies import ActivationsOut, TextTokens, TextValues, Token, TokenizeOut
from app.schemas.requests import ActivationsIn, TokenizeIn
from app.security.auth import CallerDep, check_may_see
from app.serving.classification import Timeout, check_size, has_enforced_erasure, time_limit, unless_disconnected
from app.serving.service import Service
from range_store.domain.erasure import Site, resolve_layers
from range_store.errors import InvalidErasure

router = Router("inspection")

MAX_TEXTS = 64
"""Most texts of one of these calls: their replies are long, or cost passes of their own."""


@router.operation("POST", "/v1/tokenize", key_scope="infer", errors=(*QUERY, *BODY, 429, 503, 504), feature="tokenize")
async def tokenize(
    request: Request, body: TokenizeIn, selector: ModelDep, x_request_timeout: Timeout = None
) -> TokenizeOut:
    """The tokens of texts as the model reads them: cut to what it takes, with the special tokens around them.

    `prefix_tokens` of a few-shot prompt come before every text and are not listed.
    """
    service = selector.service(body.model)
    texts = _texts(service, body.inputs)
    work = service.engine.inspector.tokens(texts, timeout=time_limit(service, x_request_timeout))
    found = await unless_disconnected(request, work)
    return TokenizeOut(
        model=service.name,
        results=[
            TextTokens(
                tokens=[
                    Token.model_validate(vars(each))
                    for each in text.tokens
                    if body.add_special_tokens or not each.special
                ],
                total=text.total,
                truncated=text.truncated,
            )
            for text in found
        ],
        prefix_tokens=service.model.prefix_tokens,
        max_tokens=service.model.max_tokens,
    )


@router.operation(
    "POST", "/v1/activations", key_scope="infer", errors=(*QUERY, *BODY, 429, 503, 504), feature="activations"
)
async def show_activations(
    request: Request, body: ActivationsIn, selector: ModelDep, caller: CallerDep, x_request_timeout: Timeout = None
) -> ActivationsOut:
    """Values of neurons for texts, before anything is erased.

    They are taken where the active range set was fitted (`site`, `position`), so that they compare with its ranges and
    histograms. While an erasure is enforced they would show what it hides, and need a key with scope admin.
    """
    service = selector.service(body.model)
    texts = _texts(service, body.inputs)
    check_may_see(caller, has_enforced_erasure(service), "activations")
    identity = service.model.identity
    try:
        (layer,) = resolve_layers((body.layer,), identity.n_layers)
    except InvalidErasure as error:
        raise _invalid("layer", str(error)) from None
    hidden = identity.hidden_size
    if unknown := [neuron for neuron in body.neurons if not 0 <= neuron < hidden]:
        raise _invalid("neurons", f"neuron {unknown[0]} is out of range: a block has {hidden}, 0 to {hidden - 1}")
    range_set = service.require_snapshot().range_set
    fitted = range_set.provenance.settings if range_set is not None else None
    site: Site = fitted.site if fitted else "block_output"
    position = fitted.position if fitted else "read"
    seconds = time_limit(service, x_request_timeout)
    work = service.engine.inspector.states(texts, layer, site=site, position=position, timeout=seconds)
    states = await unless_disconnected(request, work)
    check_may_see(caller, has_enforced_erasure(service), "activations")  # one may have been enforced since
    return ActivationsOut(
        model=service.name,
        layer=layer,
        site=site,
        position=position,
        neurons=body.neurons,
        results=[TextValues(values=row) for row in states[:, body.neurons].tolist()],
    )


def _invalid(field: str, problem: str) -> ApiError:
    errors = [FieldError(loc=["body", field], msg=problem, type="out_of_range")]
    return ApiError("invalid", f"body.{field}: {problem}", errors=errors)


def _texts(service: Service, inputs: str | list[str]) -> Sequence[str]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    check_size(texts, service.settings, MAX_TEXTS)
    note(texts=len(texts))
    return texts
