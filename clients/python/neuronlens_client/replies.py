"""What the server replies (docs/http.md; all fields in openapi.json). Unknown fields are kept."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Base of all replies: immutable; what this version does not know stands in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Score(Reply):
    label: str
    score: float


class Baseline(Reply):
    """The bare model's answer."""

    label: str
    score: float
    scores: tuple[Score, ...]


class Result(Reply):
    """One text's answer; `scores` best first. `masked_neurons`: at the read position, summed over layers.

    `at_chance`: what was erased left nothing of the text in its scores.
    """

    label: str
    score: float
    scores: tuple[Score, ...]
    masked_neurons: int
    truncated: bool
    at_chance: bool = False
    baseline: Baseline | None = None


class Erasure(Reply):
    """An erasure as it was applied; `layers` are block indices from 0, `replacement` as in a request."""

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
    """What was erased from a request: `source` is "request", "live" or "none"."""

    source: str
    concepts: tuple[str, ...]
    erasures: tuple[Erasure, ...]
    range_set: str | None
    generation: str | None


class Usage(Reply):
    tokens: int


class Classified(Reply):
    """Reply to one `POST /v1/classify`."""

    model: str
    results: tuple[Result, ...]
    erasure: Plan
    usage: Usage


class Answer(Result):
    """One text's answer, with what was erased from it."""

    model: str
    erasure: Plan
    usage: Usage


class Answers(Reply):
    """Several texts' answers, in their order.

    `plans`: what was erased, of each request that the list took. They differ if what is live changed in between.
    """

    model: str
    results: tuple[Result, ...]
    plans: tuple[Plan, ...]
    usage: Usage

    @property
    def erasure(self) -> Plan:
        """What was erased, by the first request's plan."""
        return self.plans[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """The best label of each text."""
        return tuple(each.label for each in self.results)


class LiveErasure(Erasure):
    """An erasure that is switched on; times are Unix seconds."""

    reason: str | None
    expires_at: float | None
    since: float
    by: str | None


class Replica(Reply):
    """A process that answers for the model, as it reported `age` seconds ago.

    `generation`: what it answers under; None while it has read none. `current`: as new as that of the server asked.
    `this`: it is the server that was asked.
    """

    name: str
    generation: str | None
    range_set: str | None
    age: float
    current: bool
    this: bool


class Replicas(Reply):
    """The live replicas of a model, by name. `generation`: of the server asked."""

    model: str
    generation: str
    replicas: tuple[Replica, ...]


class LiveState(Reply):
    """What is erased when a request names nothing. `generation` is what `if_match` takes."""

    model: str
    generation: str
    range_set: str | None
    erasures: tuple[LiveErasure, ...]

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(each.concept for each in self.erasures)


class Concept(Reply):
    """A concept of the active range set. `texts`: of the fitting corpus; `label`: whether it is one of the model."""

    concept: str
    texts: int
    label: bool
    erased: bool
    enforced: bool


class Concepts(Reply):
    model: str
    range_set: str
    generation: str
    concepts: tuple[Concept, ...]


class NeuronRange(Reply):
    """One neuron's range for one concept; low and high are None where it is empty. `overlap`: with other concepts'."""

    rank: int
    neuron: int
    saliency: float | None
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    overlap: Mapping[str, float]


class Ranges(Reply):
    """A concept's neurons by rank."""

    model: str
    range_set: str
    concept: str
    layer: int
    ranking: str
    tau: float
    neurons: tuple[NeuronRange, ...]
    next_cursor: str | None


class Histogram(Reply):
    """Texts per bin; `below` and `above` fell outside the edges."""

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


class Neuron(Reply):
    model: str
    range_set: str
    layer: int
    neuron: int
    tau: float
    edges: tuple[float | None, ...]
    concepts: tuple[NeuronOfConcept, ...]


class Overlap(Reply):
    """How far concepts share their salient neurons. `chance`: the share that random sets of this size would have."""

    model: str
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
    """A change of the live state. `at`: Unix seconds; `before` is None where the live state was created."""

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


class Audit(Reply):
    """Newest first."""

    model: str
    entries: tuple[AuditEntry, ...]


class RangeSet(Reply):
    """A published range set and where it comes from."""

    id: str
    published_at: float
    active: bool
    provenance: Mapping[str, Any]


class RangeSets(Reply):
    """Newest first."""

    model: str
    active: str | None
    range_sets: tuple[RangeSet, ...]


class Model(Reply):
    """What is loaded. `created`: Unix seconds at which the server began to serve it."""

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
    """Every model, the default first; `data` is the same."""

    object: str
    models: tuple[Model, ...]
    data: tuple[Model, ...]


class Ready(Reply):
    """`snapshot_age`: seconds since the live state was last known to be the newest; `problem`: why it cannot be.

    Of several models, the `checks` name each, the age is the longest, and `generation` is None.
    """

    status: str
    checks: Mapping[str, bool]
    generation: str | None
    snapshot_age: float
    problem: str | None


class Token(Reply):
    """A token as it stands in the vocabulary; `start`, `stop`: of its characters in the text, None if of none."""

    id: int
    text: str
    start: int | None
    stop: int | None
    special: bool
    read: bool


class TextTokens(Reply):
    """One text's tokens. `total`: how many they would be if none were cut off."""

    tokens: tuple[Token, ...]
    total: int
    truncated: bool


class Tokenized(Reply):
    """`prefix_tokens`: of a few-shot prompt, before every text. `max_tokens`: what is left for a text after them."""

    model: str
    results: tuple[TextTokens, ...]
    prefix_tokens: int
    max_tokens: int


class TextValues(Reply):
    """One text's values, in the order of `neurons`."""

    values: tuple[float | None, ...]


class Activations(Reply):
    """Values of neurons before anything is erased. `site`, `position`: where they were taken."""

    model: str
    layer: int
    site: str
    position: str
    neurons: tuple[int, ...]
    results: tuple[TextValues, ...]


class Capabilities(Reply):
    """What the server can do, its limits, and what the caller may do (`scopes`)."""

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
    """How far a fit is; `rows_total` is 0 until its texts are read."""

    phase: str
    rows_done: int
    rows_total: int
    rows_per_second: float | None
    seconds_left: float | None


class Job(Reply):
    """A fit that was asked for: queued, running, cancelling, cancelled, failed or done. Times are Unix seconds.

    `error`: one line, why it failed; `range_set`: what it published; `generation`: what activating that made.
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
    def over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ("done", "failed", "cancelled")


class Report(Reply):
    """An evaluation's report. `created_at`: Unix seconds; `state`: complete, incomplete or broken.

    What its run.json says is None where that cannot be read: the model, the corpus (`data`) and its `texts`.
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
    """The newest 200, newest first."""

    reports: tuple[Report, ...]


class Jobs(Reply):
    """Those that wait or run, and the last that are over; newest first."""

    model: str
    jobs: tuple[Job, ...]
