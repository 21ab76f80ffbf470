"""Requests and replies of `/v2`: tensors, parameters and metadata of the Open Inference Protocol (see `v2.py`)."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from app.http.problems import ApiError
from app.routes.dropin.steering import Loose
from app.schemas.requests import Erase, storable
from app.schemas.unions import LIST, TEXT, by_shape


def _parsed(value: Any) -> Any:
    """Parameters are strings, numbers or booleans in the protocol, so `erase` may be JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None


class InferParameters(Loose):
    """How to classify; unknown parameters are ignored."""

    erase: Annotated[Erase | None, BeforeValidator(_parsed, json_schema_input_type=Erase | str | None)] = Field(
        None, description="What to erase, as in /v1/classify, or that as JSON in a string."
    )
    compare: bool = Field(False, description="Give baseline_label, baseline_score and baseline_probs, too.")
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="label and score get a row of so many a text, best first; null: the best one alone."
    )
    truncate: bool = Field(True, description="Cut texts that are too long; else they are an error.")
    activation: Literal["auto", "softmax", "sigmoid", "none"] = "auto"


Row = Annotated[Annotated[str, TEXT] | Annotated[list[str], LIST], by_shape("a text, or a list of texts")]


class TensorIn(Loose):
    """A tensor of texts."""

    name: Literal["text"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=2)]
    data: Annotated[list[Row], Field(min_length=1, fail_fast=True)]

    def texts(self) -> list[str]:
        """The texts, flat or in rows.

        Raises:
            ApiError: their number does not match the shape (422).
        """
        texts = [text for row in self.data for text in ([row] if isinstance(row, str) else row)]
        if len(texts) != math.prod(self.shape):
            wanted = math.prod(self.shape)
            raise ApiError("invalid", f"inputs.0: the shape has {wanted} texts, the data {len(texts)}")
        return texts


class OutputWanted(Loose):
    name: str


class InferIn(Loose):
    """Texts to classify."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["The striker scored twice."]}
                    ],
                    "parameters": {"top_k": 2, "erase": ["Sports"]},
                }
            ]
        }
    )

    id: Annotated[str, AfterValidator(storable)] | None = None  # the reply repeats it
    parameters: InferParameters | None = None
    inputs: Annotated[list[TensorIn], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[OutputWanted], Field(max_length=20)] | None = Field(
        None, description="Outputs to return; absent or empty: all."
    )


class TensorOut(BaseModel):
    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    data: list[str] | list[float]


class InferOut(BaseModel):
    """The tensors; `parameters` say what was erased."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str]
    outputs: list[TensorOut]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model; `parameters.labels` in the order of `probs`."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, list[str]]


class ServerLive(BaseModel):
    live: bool


class ServerReady(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool
