"""Types of request fields, as the JSON of the HTTP API has them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

Texts = list[str] | tuple[str, ...]
"""Not `Sequence[str]`: a str is one too, and gets a single answer."""
Activation = Literal["auto", "softmax", "sigmoid", "none"]
Layer = int | Sequence[int] | Literal["all"]
Ranking = Literal["max", "probe", "probeless", "probeless_global", "selectivity"]
Replacement = Literal["zero", "mean"] | Mapping[Literal["damp"], float]
ReportFile = Literal["report.html", "results.csv", "run.json"]
Wait = Literal["all"]


class ErasureSettings(TypedDict, total=False):
    """How to erase. A field that is left out has the server's default (docs/method.md)."""

    method: Literal["range", "neuron"]
    rule: Literal["sigma"]
    tau: float
    top_fraction: float
    ranking: Ranking
    layer: Layer
    replacement: Replacement


class ErasureSpec(ErasureSettings, total=False):
    """One concept to erase: `{"concept": "Sports", "tau": 2}`."""

    concept: Required[str]


class ErasuresSpec(ErasureSettings, total=False):
    """Several concepts to erase with the same settings: `{"concepts": ["Sports", "World"], "tau": 2}`."""

    concepts: Required[Sequence[str]]


class LiveSpec(ErasureSpec, total=False):
    """One concept to erase live. `enforced`: from every request, whatever it names; `expires_in`: seconds."""

    enforced: bool
    reason: str | None
    expires_in: float | None


Erase = str | ErasureSpec | ErasuresSpec | Sequence[str | ErasureSpec]
"""A concept, a concept with settings, several with the same settings, or a list: as in `POST /v1/classify`."""


class ClassifyOptions(TypedDict, total=False):
    """Options of `classify`, as in `POST /v1/classify`.

    - `compare`: also return the answer without erasure, as `baseline`.
    - `top_k`: how many of the best labels to return; default: all.
    - `activation`: default: "auto".
    - `truncate`: cut texts that are too long for the model (the default); otherwise they are an error.
    - `min_generation`: the generation that the server must have reached, as a change returned it.
    """

    compare: bool
    top_k: int | None
    activation: Activation
    truncate: bool
    min_generation: str | None


def erase_json(erase: Erase) -> Any:
    """`erase` as JSON: a single concept becomes a list of one."""
    if isinstance(erase, str) or (isinstance(erase, Mapping) and "concept" in erase):
        return [erase]
    return erase if isinstance(erase, Mapping) else list(erase)


class FitSettings(TypedDict, total=False):
    """Settings of a fit (`POST /v1/fits`). A field that is left out has the default of `neuronlens fit`."""

    dataset: str | None
    split: str | None
    text_field: str | None
    label_field: str | None
    label_map: Mapping[str, str] | None
    max_rows: int | None
    rows_per_class: int | None
    correct_only: bool
    seed: int
    layers: Sequence[int] | Literal["all"]
    rankings: Sequence[Ranking]
    site: Literal["block_output", "mlp_output"]
    position: Literal["read", "mean"]
    probe_l1: float
    probe_l2: float
    probe_rows: int
    bins: int
    batch_tokens: int
    activate: bool
    force: bool
    reason: str | None
