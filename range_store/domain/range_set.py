"""A range set: the immutable, content-addressed result of one fit.

Statistics have two parts: `ServeLayer` is what masking needs, and every worker loads it; `InspectLayer` (higher
moments, histograms) is read on demand. `Provenance` records where they come from.

C: concepts, D: neurons (hidden size), B: histogram bins between the first and the last edge.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from range_store.domain.erasure import FrozenModel, Ranking, Site
from range_store.errors import DtypeMismatch, ForeignRangeSet, NotFitted, UnknownConcept

FORMAT: Literal[1] = 1
"""Version of the stored form; readers refuse any other."""

Floats = npt.NDArray[np.float64]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


ModelKind = Literal["sequence-classification", "label-token", "few-shot"]
"""How a model classifies: by a head, by one added token per label, or by a prompted language model's answer."""


class ModelIdentity(FrozenModel):
    """The model of the statistics. `fingerprint` hashes config and weights and identifies it; names do not."""

    id: str
    revision: str | None
    kind: ModelKind
    family: str
    fingerprint: Digest
    labels: tuple[str, ...]
    n_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]


class CorpusIdentity(FrozenModel):
    """The fitted texts. `sha256` covers every text and label in order; `counts` has the number of texts per concept.

    `selection` describes the rows of the source: all, or a sample and its seed. `truncated` texts were cut to fit the
    model, `empty` ones had no token and were left out, `odd` ones contain characters that look damaged.
    """

    name: str
    split: str | None
    selection: str = "all rows"
    sha256: Digest
    rows: Annotated[int, Field(ge=1)]
    truncated: Annotated[int, Field(ge=0)]
    empty: Annotated[int, Field(ge=0)] = 0
    odd: Annotated[int, Field(ge=0)] = 0
    counts: dict[str, Annotated[int, Field(ge=1)]]


class ProbeSettings(FrozenModel):
    """Training of the `probe` ranking: mean log loss + l1·Σ|w| + l2·Σw², on standardized states of a sample."""

    l1: Annotated[float, Field(ge=0)] = 1e-3
    l2: Annotated[float, Field(ge=0)] = 1e-3
    rows: Annotated[int, Field(ge=2)] = 4096
    seed: Annotated[int, Field(ge=0)] = 0
    iterations: Annotated[int, Field(ge=1)] = 200


class FitSettings(FrozenModel):
    """Settings of the fit that change its numbers."""

    layers: tuple[int, ...]
    rankings: tuple[Ranking, ...]
    site: Site = "block_output"
    position: Literal["read", "mean"] = "read"
    dtype: str
    bins: Annotated[int, Field(ge=1)]
    batch_tokens: Annotated[int, Field(ge=1)]
    block_rows: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    texts: Literal["all", "correct"] = "all"
    rows_per_class: Annotated[int, Field(ge=1)] | None = None
    probe: ProbeSettings | None = None
    edge_rows: Annotated[int, Field(ge=1)] | None = Field(None, exclude_if=lambda rows: rows is None)
    """Rows of the whole corpus that set the edges of the histograms; None: those of its first chunk. Not stored if
    None, so that older range sets keep their ids and files."""


class Provenance(FrozenModel):
    """The model, corpus, settings and versions that a range set comes from."""

    format: Literal[1] = FORMAT
    model: ModelIdentity
    corpus: CorpusIdentity
    settings: FitSettings
    versions: dict[str, str]
    created_at: float

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts in the order of the statistics' first axis."""
        return tuple(self.corpus.counts)

    @model_validator(mode="after")
    def _layers_exist(self) -> "Provenance":
        layers = self.settings.layers
        if list(layers) != sorted(set(layers)) or not all(0 <= layer < self.model.n_layers for layer in layers):
            raise ValueError(f"layers {layers} are not ascending blocks of a model with {self.model.n_layers}")
        return self


@dataclass(frozen=True, eq=False)
class ServeLayer:
    """Statistics for masking at one layer: mean and std [C, D] float64, saliency per ranking [C, D] float64."""

    mean: Floats
    std: Floats
    saliency: Mapping[Ranking, Floats]


@dataclass(frozen=True, eq=False)
class InspectLayer:
    """The other statistics of one layer.

    mean_abs, third and fourth central moment (m3, m4), minimum, maximum: [C, D] float64.
    edges: [D, B + 1] float64, ascending. histogram: [C, D, B + 2] uint32; column 0 counts values below the first
    edge and the last column those at or above the last edge.
    """

    mean_abs: Floats
    m3: Floats
    m4: Floats
    minimum: Floats
    maximum: Floats
    edges: Floats
    histogram: npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class RangeSet:
    """Statistics for masking at every fitted layer, with their provenance and content id."""

    id: str
    provenance: Provenance
    layers: Mapping[int, ServeLayer]

    @property
    def concepts(self) -> tuple[str, ...]:
        return self.provenance.concepts

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Texts per concept, [C]."""
        return np.array(list(self.provenance.corpus.counts.values()), dtype=np.int64)

    def concept_index(self, concept: str) -> int:
        """Return the row of `concept` in the statistics.

        Raises:
            UnknownConcept: there is no such concept; the error lists all.
        """
        try:
            return self.concepts.index(concept)
        except ValueError:
            raise UnknownConcept(concept, self.concepts) from None

    def layer(self, layer: int) -> ServeLayer:
        """Return the statistics of block `layer`, counted from 0.

        Raises:
            NotFitted: the layer was not fitted; the error lists those that were.
        """
        if layer not in self.layers:
            raise NotFitted("layer", [layer], self.provenance.settings.layers)
        return self.layers[layer]

    def saliency(self, layer: int, ranking: Ranking, concept: str) -> Floats:
        """Return the saliency [D] of one concept at one layer.

        Raises:
            NotFitted: that layer or ranking was not fitted.
            UnknownConcept: there is no such concept.
        """
        serve = self.layer(layer)
        if ranking not in serve.saliency:
            raise NotFitted("ranking", [ranking], self.provenance.settings.rankings)
        of_concept: Floats = serve.saliency[ranking][self.concept_index(concept)]
        return of_concept


def check_model(provenance: Provenance, fingerprint: str, earlier: str | None = None) -> None:
    """Raise ForeignRangeSet unless the statistics are of the model with that fingerprint.

    Args:
        earlier: its fingerprint in earlier versions; see `workers.models.checkpoint`.
    """
    if provenance.model.fingerprint not in (fingerprint, earlier):
        raise ForeignRangeSet(
            f"the range set was fitted on {provenance.model.id!r} (fingerprint {provenance.model.fingerprint[:12]}), "
            f"not on the model in use (fingerprint {fingerprint[:12]}): fit this model, or activate another range set"
        )


def dtype_mismatch(provenance: Provenance, dtype: str) -> str | None:
    """Return a message if the model runs in another dtype than the range set was fitted in, else None."""
    fitted = provenance.settings.dtype
    if fitted == dtype:
        return None
    return (
        f"the range set was fitted in {fitted}, and the model runs in {dtype}, where its ranges erase less: "
        f"fit in {dtype}, or run the model in {fitted}"
    )


def check_dtype(provenance: Provenance, served: Iterable[str]) -> None:
    """Raise DtypeMismatch unless the range set was fitted in the dtypes that the model is served in."""
    if message := next(filter(None, (dtype_mismatch(provenance, dtype) for dtype in served)), None):
        raise DtypeMismatch(f"{message}; or use force")


def content_id(provenance: Provenance, parts: Mapping[str, str]) -> str:
    """Return the id of a range set: a hash of what was fitted and of the digests of all stored parts.

    Date and library versions are left out: equal numbers have equal ids.

    Args:
        parts: sha256 of the bytes of each stored part, by the part's name.
    """
    identity: dict[str, Any] = provenance.model_dump(mode="json", exclude={"created_at", "versions"})
    for described in ("selection", "empty", "odd"):  # the hash of the rows covers them
        del identity["corpus"][described]
    for later in ("texts", "rows_per_class", "probe"):  # later settings must not change the ids of older range sets
        if identity["settings"][later] == FitSettings.model_fields[later].default:
            del identity["settings"][later]
    identity["corpus"]["counts"] = list(provenance.corpus.counts.items())  # in the order of the statistics
    identity["parts"] = dict(sorted(parts.items()))
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def field_names(kind: type[ServeLayer] | type[InspectLayer]) -> tuple[str, ...]:
    """Return the names of a layer's arrays."""
    return tuple(field.name for field in dataclasses.fields(kind))
