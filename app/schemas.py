"""Requests and replies of `/v1` (DESIGN "HTTP"). Unknown fields are errors, and so are values of the wrong type."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from range_store.erasure import Damp, Erasure, Method, Ranking, Replacement, Rule, resolve_layers
from range_store.errors import InvalidErasure
from range_store.live import LiveErasure


def _storable(value: str) -> str:
    """JSON may hold half of a surrogate pair; nothing that is stored may."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no character") from None
    return value


Concept = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_storable)]
Reason = Annotated[str, Field(max_length=500), AfterValidator(_storable)]


class In(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DampIn(In):
    """Replacement h ← damp · h."""

    damp: Annotated[float, Field(ge=0.0, le=1.0)]


class ErasureSettings(In):
    """How to erase; what is left out has the default of the method (METHOD "Choices")."""

    method: Method = "range"
    rule: Rule = "sigma"
    tau: Annotated[float, Field(ge=0.0, description="Half-width of the range, in standard deviations.")] = 2.5
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0, description="Share of the neurons to mask.")] = 0.3
    ranking: Ranking = "max"
    layer: int | list[int] | Literal["all"] = Field(-1, description="Block or blocks; negative ones from the end.")
    replacement: Literal["zero", "mean"] | DampIn = "zero"

    def of(self, concept: str) -> Erasure:
        """The erasure of `concept` with these settings.

        Raises:
            InvalidErasure: no layer, or one named twice.
        """
        layers: tuple[int, ...] | Literal["all"]
        if self.layer == "all":
            layers = "all"
        else:
            layers = (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)
            if not layers or len(set(layers)) != len(layers):
                raise InvalidErasure("layer: name at least one layer, and each once")
        replacement: Replacement
        replacement = Damp(damp=self.replacement.damp) if isinstance(self.replacement, DampIn) else self.replacement
        return Erasure(
            concept=concept,
            method=self.method,
            rule=self.rule,
            tau=self.tau,
            top_fraction=self.top_fraction,
            ranking=self.ranking,
            layers=layers,
            replacement=replacement,
        )


class ErasureIn(ErasureSettings):
    """One concept to erase."""

    concept: Concept


class ErasuresIn(ErasureSettings):
    """Several concepts to erase in the same way."""

    concepts: list[Concept]


class ClassifyIn(In):
    """Texts to classify."""

    inputs: str | list[str] = Field(description="One text, or several.")
    erase: list[Concept | ErasureIn] | ErasuresIn | None = Field(
        None, description="What to erase; null or absent: the live erasures; []: nothing."
    )
    compare: bool = Field(False, description="Answer without erasure beside it.")
    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="Best labels to give; null: all.")
    truncate: bool = Field(True, description="Cut texts that are too long; else they are an error.")
    activation: Literal["auto", "softmax", "sigmoid", "none"] = "auto"
    model: str | None = None

    def erasures(self) -> list[Erasure] | None:
        """What the request wants erased, in its order; None: the live erasures.

        Raises:
            InvalidErasure: see `ErasureSettings.of`.
        """
        if self.erase is None:
            return None
        if isinstance(self.erase, ErasuresIn):
            return [self.erase.of(concept) for concept in self.erase.concepts]
        plain = ErasureSettings()
        return [plain.of(each) if isinstance(each, str) else each.of(each.concept) for each in self.erase]


class LiveIn(ErasureSettings):
    """An erasure to switch on."""

    enforced: bool = Field(False, description="Join it to every request, whatever that asks for.")
    reason: Reason | None = None
    expires_in: Annotated[float, Field(gt=0, le=10 * 365 * 86400, description="Seconds.")] | None = None

    def live(self, concept: str, now: float, by: str) -> LiveErasure:
        """The live erasure of `concept`, switched on at Unix time `now`."""
        expires_at = None if self.expires_in is None else now + self.expires_in
        return LiveErasure(
            erasure=self.of(concept),
            enforced=self.enforced,
            reason=self.reason,
            expires_at=expires_at,
            since=now,
            by=by,
        )


class NamedLiveIn(LiveIn):
    """An erasure to switch on, in a list."""

    concept: Concept


class LiveListIn(In):
    """What is to be erased live, and nothing else."""

    erasures: list[NamedLiveIn]
    reason: Reason | None = None
    model: str | None = None


class ActivateIn(In):
    """The range set to make active."""

    id: Annotated[str, Field(min_length=1, max_length=100)]
    force: bool = Field(False, description="Drop live erasures that it cannot serve.")
    reason: Reason | None = None
    model: str | None = None


class Score(BaseModel):
    label: str
    score: float


class Baseline(BaseModel):
    """The bare model's answer."""

    label: str
    score: float
    scores: list[Score]


class Result(BaseModel):
    """One text's answer. `masked_neurons`: at the read position, union over concepts, summed over layers."""

    label: str
    score: float
    scores: list[Score]
    masked_neurons: int
    truncated: bool
    baseline: Baseline | None


class ErasureOut(BaseModel):
    """An erasure as it was applied: layers as block indices from 0."""

    concept: str
    method: Method
    rule: Rule
    tau: float
    top_fraction: float
    ranking: Ranking
    layers: list[int]
    replacement: Literal["zero", "mean"] | Damp
    enforced: bool

    @classmethod
    def values(cls, erasure: Erasure, n_layers: int) -> dict[str, Any]:
        """The fields that stand in the erasure itself, for a model of `n_layers` blocks."""
        values = {name: getattr(erasure, name) for name in Erasure.model_fields}
        return {**values, "layers": list(resolve_layers(erasure.layers, n_layers))}


class ErasurePlan(BaseModel):
    """Which plan a request was admitted with."""

    source: Literal["live", "request", "none"]
    concepts: list[str]
    erasures: list[ErasureOut]
    range_set: str | None
    generation: str | None


class Usage(BaseModel):
    tokens: int


class ClassifyOut(BaseModel):
    model: str
    results: list[Result]
    erasure: ErasurePlan
    usage: Usage


class LiveOut(ErasureOut):
    """An erasure that is switched on; times are Unix seconds."""

    reason: str | None
    expires_at: float | None
    since: float
    by: str | None


class LiveListOut(BaseModel):
    """The live state of a model."""

    model: str
    generation: str
    range_set: str | None
    erasures: list[LiveOut]


class ConceptOut(BaseModel):
    """A concept of the active range set. `texts`: of the fitting corpus; `label`: whether it is one of the model."""

    concept: str
    texts: int
    label: bool
    erased: bool
    enforced: bool


class ConceptsOut(BaseModel):
    model: str
    range_set: str
    generation: str
    concepts: list[ConceptOut]


class NeuronRange(BaseModel):
    """One neuron's range for one concept; low and high are null where the range is empty.

    `overlap`: for each other concept, the length that both ranges share over the shorter one's.
    """

    rank: int
    neuron: int
    saliency: float | None
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    overlap: dict[str, float]


class RangesOut(BaseModel):
    model: str
    range_set: str
    concept: str
    layer: int
    ranking: Ranking
    tau: float
    neurons: list[NeuronRange]
    next_cursor: str | None


class Histogram(BaseModel):
    """Texts per bin; `below` and `above` fell outside the edges."""

    below: int
    counts: list[int]
    above: int


class NeuronOfConcept(BaseModel):
    """One concept's statistics of one neuron. Skewness is g1, kurtosis m4/m2² (3 for a Gaussian)."""

    concept: str
    texts: int
    mean: float | None
    std: float | None
    mean_abs: float | None
    skewness: float | None
    kurtosis: float | None
    minimum: float | None
    maximum: float | None
    low: float | None
    high: float | None
    saliency: dict[Ranking, float | None]
    rank: dict[Ranking, int]
    histogram: Histogram


class NeuronOut(BaseModel):
    model: str
    range_set: str
    layer: int
    neuron: int
    tau: float
    edges: list[float | None]
    concepts: list[NeuronOfConcept]


class OverlapOut(BaseModel):
    """How far concepts share their salient neurons. `chance`: the share that random sets of this size would have."""

    model: str
    range_set: str
    layer: int
    ranking: Ranking
    top_fraction: float
    neurons: int
    concepts: list[str]
    share: list[list[float]]
    jaccard: list[list[float]]
    chance: float
    shared_by_all: list[int]


class RangeSetOut(BaseModel):
    """A published range set and where it comes from."""

    id: str
    published_at: float
    active: bool
    provenance: dict[str, Any]


class RangeSetsOut(BaseModel):
    model: str
    active: str | None
    range_sets: list[RangeSetOut]


class ModelOut(BaseModel):
    """What is loaded. `path` only to this machine."""

    id: str
    kind: str
    family: str
    fingerprint: str
    revision: str | None
    labels: list[str]
    layers: int
    hidden_size: int
    max_tokens: int
    dtype: str
    device: str
    problem_type: str | None
    split: bool = Field(description="Trunk and tail; else erasures cost full passes.")
    path: str | None


class ModelsOut(BaseModel):
    models: list[ModelOut]


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """Ready to answer. `snapshot_age`: seconds since the live state was last known to be the newest."""

    status: Literal["ready"] = "ready"
    checks: dict[str, bool]
    generation: str
    snapshot_age: float
