"""Extensions to every protocol: erasures in a request, and headers of the reply that say what was erased."""

from typing import Any
from urllib.parse import quote

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from app.http.problems import ApiError
from app.schemas.requests import Erase
from app.serving.service import Answer, ModelFacts

LONGEST_HEADER = 2000
"""Most characters of `X-NeuronLens-Erased`; many clients accept 8,000 for all headers together."""


class Loose(BaseModel):
    """Base of requests of other protocols: unknown fields are ignored, wrong types are errors."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Steered(Loose):
    """A request that may name erasures."""

    erase: Erase | None = Field(
        None, description="Extension: what to erase, as in /v1/classify; null or absent: the live erasures."
    )


def erased_header(concepts: list[str]) -> str:
    """The names, percent-encoded and separated by commas; `*` stands for those beyond the limit."""
    header = ""
    for concept in concepts:
        name = ("," if header else "") + quote(concept, safe="")
        if len(header) + len(name) > LONGEST_HEADER:
            return header + ("," if header else "") + "*"
        header += name
    return header


def check_truncation_side(answer: Answer, model: ModelFacts, side: str, where: str) -> None:
    """Raises ApiError (422) if a text was cut at another side than `side`. `where`: what precedes the text's index."""
    if side == model.truncation_side:
        return
    for index, text in enumerate(answer.texts):
        if text.truncated:
            detail = f"{where}{index} is too long, and this model's texts are cut at the {model.truncation_side} only"
            raise ApiError("unsupported", detail)


def set_headers(response: Response, answer: Answer) -> None:
    """Set the headers that say what was erased; bodies of these protocols have no place for it."""
    headers = {
        "X-NeuronLens-Source": answer.source,
        "X-NeuronLens-Generation": answer.generation,
        "X-NeuronLens-Range-Set": answer.range_set,
        "X-NeuronLens-Erased": erased_header([erasure.concept for erasure in answer.erasures]),
    }
    response.headers.update({name: value for name, value in headers.items() if value})


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


STEERING_HEADERS: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            "X-NeuronLens-Source": _header("Where the erasures came from: live, request or none."),
            "X-NeuronLens-Generation": _header("Generation of the live state that the request was admitted under."),
            "X-NeuronLens-Range-Set": _header("Range set that the erasures were resolved against."),
            "X-NeuronLens-Erased": _header("Concepts that were erased: percent-encoded, separated by commas."),
        }
    }
}
"""The `responses` that document the headers of `set_headers`."""
