"""`POST /tokenize`: two servers have it; `inputs` is text-embeddings-inference's (1.7.1), `prompt` is vLLM's (0.33)."""

from collections.abc import Callable, Coroutine, Sequence
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from app.http.problems import BODY, ApiError, documented
from app.observability.logs import note
from app.routes.activations import MOST_TEXTS
from app.routes.dependencies import ModelDep
from app.routes.dropin.steering import Loose
from app.schemas.requests import Inputs
from app.serving.classification import Timeout, check_size, unless_gone
from app.serving.service import TokenInfo

OF_VLLM = "tokenize_of_vllm"
"""Set in a request's state where its body is vLLM's."""


class _ToldApart(APIRoute):
    """Notes whose body it is even where the body is of no form that is taken here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def noting(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestValidationError as error:
                request.scope["state"][OF_VLLM] = isinstance(error.body, dict) and not _VLLM.isdisjoint(error.body)
                raise

        return noting


_VLLM = frozenset({"prompt", "messages"})
router = APIRouter(tags=["text-embeddings-inference", "vLLM"], route_class=_ToldApart)


class DropinTokenizeIn(Loose):
    """A text or several (`inputs`), or a single one (`prompt`)."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "a goal"}, {"prompt": "a goal"}]})

    inputs: Inputs | None = None
    prompt: str | None = None
    messages: list[Any] | None = Field(None, description="Refused: chats are not tokenized.")
    model: str | None = None
    add_special_tokens: bool = Field(True, description="List the tokens that are not of the text, too.")
    return_token_strs: bool | None = Field(None, description="With `prompt`: the tokens as words of the vocabulary.")


class SimpleToken(BaseModel):
    """`start`, `stop`: of its bytes in the text's UTF-8, `text`: what stands there; a special token has its name."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class VllmTokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@router.post("/tokenize", responses=documented(*BODY, 404, 422, 429, 503, 504))
async def dropin_tokenize(
    request: Request, body: DropinTokenizeIn, selector: ModelDep, x_request_timeout: Timeout = None
) -> list[list[SimpleToken]] | VllmTokens:
    """The tokens of texts: as text-embeddings-inference lists them, or for a `prompt` as vLLM does."""
    asked: dict[str, Any] = request.scope["state"]
    asked[OF_VLLM] = body.prompt is not None or body.messages is not None
    if body.messages is not None:
        raise ApiError("unsupported", "messages: this server tokenizes texts, not chats: send a prompt")
    if (body.inputs is None) == (body.prompt is None):
        raise ApiError("invalid", "say either inputs (text-embeddings-inference) or prompt (vLLM)")
    given = body.inputs if body.inputs is not None else body.prompt or ""
    texts = [given] if isinstance(given, str) else given
    service = selector.service(body.model if body.prompt is not None else None)
    check_size(texts, service.settings)
    if len(texts) > MOST_TEXTS:
        raise ApiError("too_many_texts", f"{len(texts)} texts, the limit of this call is {MOST_TEXTS}: send fewer")
    note(texts=len(texts))
    longest = service.settings.request_timeout
    seconds = min(x_request_timeout or longest, longest)
    shown = await unless_gone(request, service.engine.inspector.tokens(texts, timeout=seconds))
    for index, text in enumerate(shown):
        if text.truncated:
            detail = f"input {index} has {text.total} tokens; this server lists no more than the model takes"
            raise ApiError("unsupported", detail)
    listed = [[each for each in text.tokens if body.add_special_tokens or not each.special] for text in shown]
    if body.prompt is not None:
        (tokens,) = listed
        return VllmTokens(
            count=len(tokens),
            max_model_len=service.model.max_tokens,
            tokens=[each.id for each in tokens],
            token_strs=[each.text for each in tokens] if body.return_token_strs else None,
        )
    return [_simple(text, tokens) for text, tokens in zip(texts, listed, strict=True)]


def _simple(text: str, tokens: Sequence[TokenInfo]) -> list[SimpleToken]:
    """As `into_tokens` of its `core/src/tokenization.rs`: places are of bytes, and a token's text is what stands there.

    A token without a place has its name in the vocabulary.
    """
    each_character = [character.encode(errors="replace") for character in text]  # lone surrogates: as they are read
    of_text = b"".join(each_character)
    at = list(accumulate(map(len, each_character), initial=0))
    simple = []
    for token in tokens:
        start, stop, words = None, None, token.text
        if token.start is not None and token.stop is not None:
            start, stop = at[token.start], at[token.stop]
            words = of_text[start:stop].decode()
        simple.append(SimpleToken(id=token.id, text=words, special=token.special, start=start, stop=stop))
    return simple
