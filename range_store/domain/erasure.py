"""An erasure: which concept to remove from the activations, where, and how."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from range_store.errors import InvalidErasure
from range_store.formatting import format_count

Method = Literal["range", "neuron"]
Rule = Literal["sigma"]
Ranking = Literal["max", "probe", "probeless", "probeless_global", "selectivity"]
RANKINGS: tuple[Ranking, ...] = ("max", "probe", "probeless", "probeless_global", "selectivity")
STATISTICAL_RANKINGS: tuple[Ranking, ...] = ("max", "probeless", "probeless_global", "selectivity")
"""The rankings that are computed from statistics; `probe` is trained, so it is fitted on request only."""
Site = Literal["block_output", "mlp_output"]
"""Where values are recorded and masked: at a block's output, or at what its MLP adds to the residual stream."""
Positions = Literal["all", "read"]
"""Which tokens are masked: all except padding, or only those that the head reads."""


class FrozenModel(BaseModel):
    """Base of validated values: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Damp(FrozenModel):
    """Replacement h ← damp · h: 0 erases, 1 leaves the neuron as it is."""

    damp: Annotated[float, Field(ge=0.0, le=1.0)]


Replacement = Literal["zero", "mean"] | Damp
"""New value of a masked neuron: 0, its mean over the texts of the other concepts, or a fraction of itself."""


class Erasure(FrozenModel):
    """One concept to remove from the activations (paper §4; docs/method.md explains the defaults).

    `layers` are block indices, negative ones from the end, or "all" blocks of the model. The `top_fraction` of the D
    neurons that is highest in `ranking` is masked: k = ⌊p·D⌋.
    """

    concept: Annotated[str, Field(min_length=1)]
    method: Method = "range"
    rule: Rule = "sigma"
    tau: Annotated[float, Field(ge=0.0)] = 2.5
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    ranking: Ranking = "max"
    layers: tuple[int, ...] | Literal["all"] = (-1,)
    replacement: Replacement = "zero"

    @field_validator("layers")
    @classmethod
    def _some_layer_once(cls, layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if not layers:
            raise ValueError("name at least one layer, or 'all'")
        if layers != "all" and len(set(layers)) != len(layers):
            raise ValueError("a layer is named twice: name each one once")
        return layers


def resolve_layers(layers: tuple[int, ...] | Literal["all"], n_layers: int) -> tuple[int, ...]:
    """Return block indices counted from 0, ascending.

    Raises:
        InvalidErasure: a layer outside [-n_layers, n_layers), or one named twice (-1 and 5 of six).
    """
    if layers == "all":
        return tuple(range(n_layers))
    resolved = []
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise InvalidErasure(
                f"layer {layer} is out of range: the model has {format_count(n_layers, 'block')}, 0 to {n_layers - 1}"
            )
        resolved.append(layer % n_layers)
    if len(set(resolved)) != len(resolved):
        raise InvalidErasure(f"layers {', '.join(map(str, layers))} name one block twice")
    return tuple(sorted(resolved))


def check_distinct_concepts(concepts: list[str]) -> None:
    """Raise InvalidErasure if a concept occurs twice in one list of erasures."""
    for concept in concepts:
        if concepts.count(concept) > 1:
            raise InvalidErasure(f"concept {concept!r} is named twice")
