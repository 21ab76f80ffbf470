"""Looking at what the model makes of a text: its tokens, and the values of single neurons."""

from collections.abc import Sequence

from fastapi import APIRouter, Request

from app.http.problems import BODY, QUERY, ApiError, FieldError, documented
from app.observability.logs import note
from app.routes.dependencies import ModelDep, QueryChecked
from app.routes.inspection import finite
from app.schemas.replies import ActivationsOut, TextTokens, TextValues, Token, TokenizeOut
from app.schemas.requests import ActivationsIn, TokenizeIn
from app.security.auth import Caller, CallerDep, check_shown
from app.serving.classification import Timeout, check_size, unless_gone
from app.serving.service import Service
from range_store.domain.erasure import Site, resolve_layers
from range_store.errors import InvalidErasure

router = APIRouter(tags=["inspection"], dependencies=[QueryChecked])

MOST_TEXTS = 64
"""Texts of one of these calls: their replies are long, or cost passes of their own."""


@router.post("/v1/tokenize", responses=documented(*QUERY, *BODY, 429, 503, 504))
async def tokenize(
    request: Request, body: TokenizeIn, selector: ModelDep, x_request_timeout: Timeout = None
) -> TokenizeOut:
    """The tokens of texts, as the model gets them: cut where it takes no more, with the tokens that it needs around.

    `prefix_tokens` of a few-shot prompt stand before every text and are not listed.
    """
    service = selector.service(body.model)
    texts = _texts(service, body.inputs)
    shown = await unless_gone(
        request, service.engine.inspector.tokens(texts, timeout=_seconds(service, x_request_timeout))
    )
    return TokenizeOut(
        model=service.name,
        results=[
            TextTokens(
                tokens=[
                    Token(
                        id=each.id,
                        text=each.text,
                        start=each.start,
                        stop=each.stop,
                        special=each.special,
                        read=each.read,
                    )
                    for each in text.tokens
                    if body.add_special_tokens or not each.special
                ],
                total=text.total,
                truncated=text.truncated,
            )
            for text in shown
        ],
        prefix_tokens=service.model.prefix_tokens,
        max_tokens=service.model.max_tokens,
    )


@router.post("/v1/activations", responses=documented(*QUERY, *BODY, 429, 503, 504))
async def show_activations(
    request: Request, body: ActivationsIn, selector: ModelDep, caller: CallerDep, x_request_timeout: Timeout = None
) -> ActivationsOut:
    """Values of neurons for texts, before anything is erased: where they fall among a neuron's ranges.

    Taken where the active range set was fitted (`site`, `position`), so that they compare with its ranges and
    histograms. While an erasure is enforced they would show what it hides, and need scope admin.
    """
    service = selector.service(body.model)
    texts = _texts(service, body.inputs)
    _check(service, caller)
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
    seconds = _seconds(service, x_request_timeout)
    work = service.engine.inspector.states(texts, layer, site=site, position=position, timeout=seconds)
    states = await unless_gone(request, work)
    _check(service, caller)  # it may have been switched on since
    return ActivationsOut(
        model=service.name,
        layer=layer,
        site=site,
        position=position,
        neurons=body.neurons,
        results=[TextValues(values=[finite(value) for value in row]) for row in states[:, body.neurons].tolist()],
    )


def _check(service: Service, caller: Caller) -> None:
    live = service.require_snapshot().live.at(service.mirror.now())
    check_shown(caller, any(each.enforced for each in live), "activations")


def _invalid(field: str, why: str) -> ApiError:
    errors = [FieldError(loc=["body", field], msg=why, type="out_of_range")]
    return ApiError("invalid", f"body.{field}: {why}", errors=errors)


def _texts(service: Service, inputs: str | list[str]) -> Sequence[str]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    check_size(texts, service.settings)
    if len(texts) > MOST_TEXTS:
        raise ApiError("too_many_texts", f"{len(texts)} texts, the limit of this call is {MOST_TEXTS}: send fewer")
    note(texts=len(texts))
    return texts


def _seconds(service: Service, asked: float | None) -> float:
    longest = service.settings.request_timeout
    return min(asked or longest, longest)
