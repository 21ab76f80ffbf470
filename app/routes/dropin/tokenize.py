"""`POST /tokenize` of two servers: `inputs` is text-embeddings-inference's (1.7.1), `prompt` is vLLM's (0.33)."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from app.http.problems import ApiError
from app.http.responses import BODY
from app.http.routing import Router
from app.observability.logs import note
from app.routes.activations import MAX_TEXTS
from app.routes.dependencies import ModelDep
from app.routes.dropin import tei, vllm
from app.routes.dropin.steering import Loose
from app.schemas.requests import Inputs
from app.serving.classification import Timeout, check_size, time_limit, unless_disconnected
from app.serving.service import TokenInfo

_OF_VLLM = ("prompt", "messages")
"""Fields that tell vLLM's bodies from those of text-embeddings-inference."""

router = Router("text-embeddings-inference", "vLLM", dialects=(tei.DIALECT, vllm.DIALECT), strict_query=False)


async def choose_dialect(request: Request) -> None:
    """Have errors written for clients of vLLM if the body is theirs, even if it is not valid otherwise."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):  # not declared as JSON, and none: refused like everywhere else
        return
    if isinstance(body, dict) and any(body.get(name) is not None for name in _OF_VLLM):
        request.state.dialect = vllm.DIALECT


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


@router.operation(
    "POST",
    "/tokenize",
    key_scope="infer",
    errors=(*BODY, 404, 422, 429, 503, 504),
    dependencies=[Depends(choose_dialect)],
)
async def dropin_tokenize(
    request: Request, body: DropinTokenizeIn, selector: ModelDep, x_request_timeout: Timeout = None
) -> list[list[SimpleToken]] | VllmTokens:
    """The tokens of texts: as text-embeddings-inference lists them, or for a `prompt` as vLLM does."""
    if body.messages is not None:
        raise ApiError("unsupported", "messages: this server tokenizes no chats: send a prompt")
    if (body.inputs is None) == (body.prompt is None):
        raise ApiError("invalid", "send either inputs (text-embeddings-inference) or prompt (vLLM)")
    given = body.inputs if body.inputs is not None else body.prompt or ""
    texts = [given] if isinstance(given, str) else given
    service = selector.service(body.model if body.prompt is not None else None)
    check_size(texts, service.settings, MAX_TEXTS)
    note(texts=len(texts))
    work = service.engine.inspector.tokens(texts, timeout=time_limit(service, x_request_timeout))
    found = await unless_disconnected(request, work)
    for index, text in enumerate(found):
        if text.truncated:
            detail = f"input {index} has {text.total} tokens, more than the model takes: send a shorter text"
            raise ApiError("unsupported", detail)
    listed = [[each for each in text.tokens if body.add_special_tokens or not each.special] for text in found]
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
    """Tokens as text-embeddings-inference lists them (`into_tokens` of its `core/src/tokenization.rs`).

    `start` and `stop` count bytes of the text's UTF-8, and `text` is the text between them; a token that stands for no
    characters has its name in the vocabulary instead.
    """
    encoded = [character.encode(errors="replace") for character in text]  # lone surrogates: as the tokenizer reads them
    utf8 = b"".join(encoded)
    offsets = list(accumulate(map(len, encoded), initial=0))
    simple = []
    for token in tokens:
        start, stop, words = None, None, token.text
        if token.start is not None and token.stop is not None:
            start, stop = offsets[token.start], offsets[token.stop]
            words = utf8[start:stop].decode()
        simple.append(SimpleToken(id=token.id, text=words, special=token.special, start=start, stop=stop))
    return simple
