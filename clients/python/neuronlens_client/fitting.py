"""What `fit` may be told, as the JSON of `POST /v1/fits` says it."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from neuronlens_client.api import Ranking


class FitSettings(TypedDict, total=False):
    """Which texts, and how; what is left out has the default of `neuronlens fit` (docs/http.md "Fits")."""

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
