"""Replies of `/v1`."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from range_store.domain.erasure import Damp, Erasure, Method, Ranking, Rule, Site, resolve_layers
from range_store.domain.live import Action
from range_store.domain.range_set import ModelKind
from range_store.storage.api_keys import Scope

Finite = Annotated[
    float | None, BeforeValidator(lambda value: value if value is None or math.isfinite(value) else None)
]
"""A number; NaN and infinities, which JSON cannot express, become null."""


class Score(BaseModel):
    label: str
    score: float


class Baseline(BaseModel):
    """The bare model's answer."""

    label: str
    score: float
    scores: list[Score]


class Result(BaseModel):
    """The answer for one text. `masked_neurons`: at the read position, union over concepts, summed over layers.

    `at_chance`: the erasures left nothing of the text in its scores: they are even, or those of an empty state.
    """

    label: str
    score: float
    scores: list[Score]
    masked_neurons: int
    truncated: bool
    at_chance: bool
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
        """The fields of the erasure itself, for a model of `n_layers` blocks."""
        values = {name: getattr(erasure, name) for name in Erasure.model_fields}
        return {**values, "layers": list(resolve_layers(erasure.layers, n_layers))}


class ErasurePlan(BaseModel):
    """The plan with which a request was admitted."""

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


class ReplicaOut(BaseModel):
    """A live replica, as it reported `age` seconds ago.

    `generation`: under which it answers; null until it has read one. `current`: it has the generation of the server
    that sends this reply, or a later one. `this`: it is that server.
    """

    name: str
    generation: str | None
    range_set: str | None
    age: float
    current: bool
    this: bool


class ReplicasOut(BaseModel):
    """The live replicas of a model, by name. `generation`: of the server that sends this reply."""

    model: str
    generation: str
    replicas: list[ReplicaOut]


class TargetsOut(BaseModel):
    """The address of one replica's metrics (`host:port`), with the labels `model`, `replica` and `node`."""

    targets: list[str]
    labels: dict[str, str]


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

    `overlap`: for each other concept, the length of the common range over that of the shorter one.
    """

    rank: int
    neuron: int
    saliency: Finite
    mean: Finite
    std: Finite
    low: Finite
    high: Finite
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
    mean: Finite
    std: Finite
    mean_abs: Finite
    skewness: Finite
    kurtosis: Finite
    minimum: Finite
    maximum: Finite
    low: Finite
    high: Finite
    saliency: dict[Ranking, Finite]
    rank: dict[Ranking, int]
    histogram: Histogram


class NeuronOut(BaseModel):
    model: str
    range_set: str
    layer: int
    neuron: int
    tau: float
    edges: list[Finite]
    concepts: list[NeuronOfConcept]


class OverlapOut(BaseModel):
    """The share of salient neurons that concepts have in common. `chance`: the share of random sets of this size."""

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


class AuditEntryOut(BaseModel):
    """A change of the live state. `at`: Unix seconds; `before` is null where the live state was created.

    `concepts`: those that changed; `dropped`: erasures that a forced activation removed.
    """

    id: str
    at: float
    action: Action
    before: str | None
    after: str
    range_set: str | None
    concepts: list[str]
    dropped: list[str]
    by: str | None
    reason: str | None


class AuditOut(BaseModel):
    model: str
    entries: list[AuditEntryOut]


class RangeSetOut(BaseModel):
    """A published range set and its provenance."""

    id: str
    published_at: float
    active: bool
    provenance: dict[str, Any]


class RangeSetsOut(BaseModel):
    model: str
    active: str | None
    range_sets: list[RangeSetOut]


class ModelOut(BaseModel):
    """A loaded model. `path`: for this machine only. `object`, `created`, `owned_by`: for clients of OpenAI."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds at which the server began to serve it.")
    owned_by: Literal["neuronlens"] = "neuronlens"
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
    template: str | None = Field(description="Prompt template of a few-shot classifier, with its version.")
    split: bool = Field(description="Trunk and tail; else erasures cost full passes.")
    path: str | None


class ModelsOut(BaseModel):
    """Every model, the default first; twice, since clients of OpenAI read `data`."""

    object: Literal["list"] = "list"
    models: list[ModelOut]
    data: list[ModelOut]


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """Ready to answer. `snapshot_age`: seconds since the live state was last known to be the newest; where several
    models are served, the largest of them."""

    status: Literal["ready"] = "ready"
    checks: dict[str, bool]
    generation: str | None = Field(description="Null where several models are served, each with its own.")
    snapshot_age: float
    problem: str | None = Field(
        description="Why the live state cannot be kept up to date, or its range set does not fit the model; else null."
    )


class Token(BaseModel):
    """A token of the vocabulary. `start`, `stop`: of its characters in the text; null if it stands for none.

    `special`: added around the text, and not part of it. `read`: whether the head reads the state at it.
    """

    id: int
    text: str
    start: int | None
    stop: int | None
    special: bool
    read: bool


class TextTokens(BaseModel):
    """The tokens of one text. `total`: their number before the text was cut."""

    tokens: list[Token]
    total: int
    truncated: bool


class TokenizeOut(BaseModel):
    """`prefix_tokens`: of a few-shot prompt, before every text. `max_tokens`: that a text may have after them."""

    model: str
    results: list[TextTokens]
    prefix_tokens: int
    max_tokens: int


class TextValues(BaseModel):
    """The values of one text, in the order of `neurons`; null where one is not a finite number."""

    values: list[Finite]


class ActivationsOut(BaseModel):
    """Values before any erasure. `site`, `position`: where they were taken."""

    model: str
    layer: int
    site: Site
    position: Literal["read", "mean"]
    neurons: list[int]
    results: list[TextValues]


class ReportOut(BaseModel):
    """An evaluation's report. `created_at`: Unix seconds at which its newest file was written.

    `incomplete`: files are missing, since the evaluation runs or was stopped; `broken`: run.json cannot be read, and
    its fields are null. `data`, `texts`: the corpus of the measurement, and its size.
    """

    id: str
    state: Literal["complete", "incomplete", "broken"]
    created_at: float
    files: list[Literal["report.html", "results.csv", "run.json"]]
    model: str | None
    data: str | None
    texts: int | None
    targets: list[str]
    methods: list[str]


class ReportsOut(BaseModel):
    reports: list[ReportOut]


class CapabilitiesOut(BaseModel):
    """What this server can do, and what its caller may do.

    `rankings_fitted`, `layers_fitted`: of the active range set. `multi_label`: each label is scored by itself, so that
    `activation: auto` is a sigmoid.
    Limits: `max_tokens` of a text, beyond which it is cut; `max_texts`, `max_characters` (of a text), `max_body_bytes`
    and `max_erasures` of a request; `max_shown_texts` of `/v1/tokenize` and `/v1/activations`.
    `key`, `scopes`: of the caller; without keys every caller has all scopes.
    """

    version: str
    model: str
    kind: ModelKind
    labels: list[str]
    multi_label: bool
    layers: int
    hidden_size: int
    methods: list[Method]
    rules: list[Rule]
    rankings_fitted: list[Ranking]
    layers_fitted: list[int]
    replacements: list[Literal["zero", "mean", "damp"]]
    activations: list[Literal["auto", "softmax", "sigmoid", "none"]]
    max_tokens: int
    max_texts: int
    max_characters: int
    max_body_bytes: int
    max_erasures: int
    max_shown_texts: int
    features: list[str]
    protocols: list[str]
    range_set: str | None
    generation: str | None
    keys_in_force: bool
    key: str | None
    scopes: list[Scope]
