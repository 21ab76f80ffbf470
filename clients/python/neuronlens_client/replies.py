"""Replies of the server (docs/http.md; all fields are in openapi.json)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Base of all replies. They are immutable; fields that this version does not know are kept in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class ModelReply(Reply):
    """Base of replies that name the served model."""

    model: str


class Score(Reply):
    label: str
    score: float


class Baseline(Score):
    """The answer without erasure. `scores`: best first."""

    scores: tuple[Score, ...]


class Result(Baseline):
    """The answer to one text. `masked_neurons`: at the read position, summed over layers.

    `at_chance`: the erasure left no information about the text in its scores.
    """

    masked_neurons: int
    truncated: bool
    at_chance: bool = False
    baseline: Baseline | None = None


class Erasure(Reply):
    """An erasure as it was applied. `layers`: block indices from 0; `replacement`: as in a request."""

    concept: str
    method: str
    rule: str
    tau: float
    top_fraction: float
    ranking: str
    layers: tuple[int, ...]
    replacement: str | Mapping[str, float]
    enforced: bool


class Plan(Reply):
    """The erasures of a request. `source`: "request", "live" or "none"."""

    source: str
    concepts: tuple[str, ...]
    erasures: tuple[Erasure, ...]
    range_set: str | None
    generation: str | None


class Usage(Reply):
    tokens: int


class ClassifyReply(ModelReply):
    """Reply to one `POST /v1/classify`."""

    results: tuple[Result, ...]
    erasure: Plan
    usage: Usage


class Answer(Result):
    """The answer to one text, with the erasures that were applied."""

    model: str
    erasure: Plan
    usage: Usage

    @classmethod
    def of(cls, reply: ClassifyReply) -> Self:
        """The answer in a reply to one text."""
        (result,) = reply.results
        return cls(**dict(result), model=reply.model, erasure=reply.erasure, usage=reply.usage)


class Answers(ModelReply):
    """The answers to a list of texts, in its order.

    `plans`: the erasures of each request that the list took. They differ if the live erasures changed in between.
    """

    results: tuple[Result, ...]
    plans: tuple[Plan, ...]
    usage: Usage

    @classmethod
    def of(cls, replies: Sequence[ClassifyReply]) -> Self:
        """The answers in the replies to the batches of a list."""
        return cls(
            model=replies[0].model,
            results=tuple(result for reply in replies for result in reply.results),
            plans=tuple(reply.erasure for reply in replies),
            usage=Usage(tokens=sum(reply.usage.tokens for reply in replies)),
        )

    @property
    def erasure(self) -> Plan:
        """The erasures of the first request."""
        return self.plans[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """The best label of each text."""
        return tuple(each.label for each in self.results)


class LiveErasure(Erasure):
    """A live erasure. Times are Unix seconds."""

    reason: str | None
    expires_at: float | None
    since: float
    by: str | None


class Replica(Reply):
    """A process that serves the model, as it reported `age` seconds ago.

    `generation`: the one that it uses; None until it has read one. `current`: whether that is at least as new as the
    generation of the server that replied. `this`: whether it is that server.
    """

    name: str
    generation: str | None
    range_set: str | None
    age: float
    current: bool
    this: bool


class Replicas(ModelReply):
    """The live replicas of a model, by name. `generation`: of the server that replied."""

    generation: str
    replicas: tuple[Replica, ...]


class LiveState(ModelReply):
    """The live erasures, which apply to requests that name none. `generation`: for `if_match`."""

    generation: str
    range_set: str | None
    erasures: tuple[LiveErasure, ...]

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(each.concept for each in self.erasures)


class Concept(Reply):
    """A concept of the active range set. `texts`: in the fitting corpus; `label`: whether the model has it."""

    concept: str
    texts: int
    label: bool
    erased: bool
    enforced: bool


class Concepts(ModelReply):
    range_set: str
    generation: str
    concepts: tuple[Concept, ...]


class NeuronRange(Reply):
    """One neuron's range for one concept. `low`, `high`: None if it is empty; `overlap`: with other concepts."""

    rank: int
    neuron: int
    saliency: float | None
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    overlap: Mapping[str, float]


class Ranges(ModelReply):
    """A concept's neurons, by rank."""

    range_set: str
    concept: str
    layer: int
    ranking: str
    tau: float
    neurons: tuple[NeuronRange, ...]
    next_cursor: str | None


class Histogram(Reply):
    """Number of texts per bin, and below and above all bins."""

    below: int
    counts: tuple[int, ...]
    above: int


class NeuronOfConcept(Reply):
    """One concept's statistics of one neuron."""

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
    saliency: Mapping[str, float | None]
    rank: Mapping[str, int]
    histogram: Histogram


class Neuron(ModelReply):
    range_set: str
    layer: int
    neuron: int
    tau: float
    edges: tuple[float | None, ...]
    concepts: tuple[NeuronOfConcept, ...]


class Overlap(ModelReply):
    """How many salient neurons concepts share. `chance`: the share of random sets of the same size."""

    range_set: str
    layer: int
    ranking: str
    top_fraction: float
    neurons: int
    concepts: tuple[str, ...]
    share: tuple[tuple[float, ...], ...]
    jaccard: tuple[tuple[float, ...], ...]
    chance: float
    shared_by_all: tuple[int, ...]


class AuditEntry(Reply):
    """A change of the live state. `at`: Unix seconds; `before`: None if the change created the live state."""

    id: str
    at: float
    action: str
    before: str | None
    after: str
    range_set: str | None
    concepts: tuple[str, ...]
    dropped: tuple[str, ...]
    by: str | None
    reason: str | None


class Audit(ModelReply):
    """Changes of the live state, newest first."""

    entries: tuple[AuditEntry, ...]


class RangeSet(Reply):
    """A published range set and its provenance."""

    id: str
    published_at: float
    active: bool
    provenance: Mapping[str, Any]


class RangeSets(ModelReply):
    """Published range sets, newest first."""

    active: str | None
    range_sets: tuple[RangeSet, ...]


class Model(Reply):
    """A loaded model. `created`: when the server began to serve it, in Unix seconds."""

    id: str
    object: str
    created: int
    owned_by: str
    kind: str
    family: str
    fingerprint: str
    revision: str | None
    labels: tuple[str, ...]
    layers: int
    hidden_size: int
    max_tokens: int
    dtype: str
    device: str
    problem_type: str | None
    template: str | None
    split: bool
    path: str | None


class Models(Reply):
    """Every loaded model, the default first. `data`: the same."""

    object: str
    models: tuple[Model, ...]
    data: tuple[Model, ...]


class Ready(Reply):
    """Whether the server is ready. `snapshot_age`: seconds since the live state was last confirmed to be the newest.

    `problem`: why it cannot be used. With several models, `checks` names each, `snapshot_age` is the longest, and
    `generation` is None.
    """

    status: str
    checks: Mapping[str, bool]
    generation: str | None
    snapshot_age: float
    problem: str | None


class Token(Reply):
    """A token, as in the vocabulary. `start`, `stop`: its characters in the text; None if it has none."""

    id: int
    text: str
    start: int | None
    stop: int | None
    special: bool
    read: bool


class TextTokens(Reply):
    """One text's tokens. `total`: their number before the text is cut."""

    tokens: tuple[Token, ...]
    total: int
    truncated: bool


class Tokens(ModelReply):
    """The tokens of texts. `prefix_tokens`: of the few-shot prompt before every text; `max_tokens`: left for a text."""

    results: tuple[TextTokens, ...]
    prefix_tokens: int
    max_tokens: int


class TextValues(Reply):
    """One text's values, in the order of `neurons`."""

    values: tuple[float | None, ...]


class Activations(ModelReply):
    """Values of neurons without erasure. `site`, `position`: where they are read."""

    layer: int
    site: str
    position: str
    neurons: tuple[int, ...]
    results: tuple[TextValues, ...]


class Capabilities(Reply):
    """What the server can do, its limits, and the `scopes` of the caller's key."""

    version: str
    model: str
    kind: str
    labels: tuple[str, ...]
    multi_label: bool
    layers: int
    hidden_size: int
    methods: tuple[str, ...]
    rules: tuple[str, ...]
    rankings_fitted: tuple[str, ...]
    layers_fitted: tuple[int, ...]
    replacements: tuple[str, ...]
    activations: tuple[str, ...]
    max_tokens: int
    max_texts: int
    max_characters: int
    max_body_bytes: int
    max_erasures: int
    max_shown_texts: int
    features: tuple[str, ...]
    protocols: tuple[str, ...]
    range_set: str | None
    generation: str | None
    keys_in_force: bool
    key: str | None
    scopes: tuple[str, ...]


class Progress(Reply):
    """Progress of a fit. `rows_total`: 0 until its texts are read."""

    phase: str
    rows_done: int
    rows_total: int
    rows_per_second: float | None
    seconds_left: float | None


class Job(Reply):
    """A fit that was requested. `state`: queued, running, cancelling, cancelled, failed or done.

    Times are Unix seconds. `error`: why it failed, in one line; `range_set`: what it published; `generation`: the live
    state's after it was activated.
    """

    id: str
    kind: str
    model: str
    state: str
    progress: Progress | None
    request: Mapping[str, Any]
    by: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    error: str | None
    exit_code: int | None
    range_set: str | None
    generation: str | None

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


class Report(Reply):
    """An evaluation's report. `created_at`: Unix seconds; `state`: complete, incomplete or broken.

    The model, the corpus (`data`) and its number of `texts` come from run.json; they are None if it cannot be read.
    """

    id: str
    state: str
    created_at: float
    files: tuple[str, ...]
    model: str | None
    data: str | None
    texts: int | None
    targets: tuple[str, ...]
    methods: tuple[str, ...]


class Reports(Reply):
    """The newest 200 reports, newest first."""

    reports: tuple[Report, ...]


class Jobs(ModelReply):
    """Fits that wait or run, and the latest that have ended, newest first."""

    jobs: tuple[Job, ...]
